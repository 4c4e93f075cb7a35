"""Both models against the architecture written out once more, in functional form, over a state dict."""

import pytest
import timm
import torch
import torch.nn.functional as F

from cifar_models import CIFAR_MEAN, CIFAR_STD

MODELS = {"wrn_40_2": 2_255_156, "shufflenet_v1": 949_258}


def batch_norm(x, weights, name):
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(weights[f"{name}.{key}"] for key in keys))


def wrn_40_2(x, weights):
    x = F.conv2d(x, weights["conv1.weight"], padding=1)
    for block in (1, 2, 3):
        for i in range(6):
            name = f"block{block}.layer.{i}"
            stride = 2 if i == 0 and block > 1 else 1
            y = batch_norm(x, weights, f"{name}.bn1").relu()
            if i == 0:
                x = F.conv2d(y, weights[f"{name}.convShortcut.weight"], stride=stride)
            y = F.conv2d(y, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = batch_norm(y, weights, f"{name}.bn2").relu()
            x = x + F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1)
    x = batch_norm(x, weights, "bn1").relu().mean((2, 3))
    return x @ weights["fc.weight"].T + weights["fc.bias"]


def shufflenet_v1(x, weights):
    x = batch_norm(F.conv2d(x, weights["conv1.weight"]), weights, "bn1").relu()
    for layer, depth in ((1, 4), (2, 8), (3, 4)):
        for i in range(depth):
            name, stride = f"layer{layer}.{i}", 2 if i == 0 else 1
            groups = 1 if (layer, i) == (1, 0) else 3
            y = F.conv2d(x, weights[f"{name}.conv1.weight"], groups=groups)
            y = batch_norm(y, weights, f"{name}.bn1").relu()
            channels = y.shape[1]
            order = torch.arange(channels).view(groups, -1).T.flatten()  # shuffle: one channel of each group in turn
            y = F.conv2d(y[:, order], weights[f"{name}.conv2.weight"], stride=stride, padding=1, groups=channels)
            y = batch_norm(y, weights, f"{name}.bn2").relu()
            y = batch_norm(F.conv2d(y, weights[f"{name}.conv3.weight"], groups=3), weights, f"{name}.bn3")
            x = (torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if stride == 2 else y + x).relu()
    return x.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def randomized(name, **kwargs):
    """A model in eval mode whose batch norms are not the identity."""
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def test_parameter_count(name):
    model = timm.create_model(name, num_classes=100)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == MODELS[name]


@pytest.mark.parametrize("size", [16, 32, 37])
def test_computes_the_published_architecture(name, size):
    model = randomized(name, num_classes=10)
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(model(x), globals()[name](x, model.state_dict()), rtol=1e-4, atol=1e-4)


def test_timm_interface(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert timm.create_model(name, num_classes=0, in_chans=1)(x).shape == pooled.shape
    assert model.pretrained_cfg["mean"] == CIFAR_MEAN and model.pretrained_cfg["std"] == CIFAR_STD


def test_features_only(name):
    model = timm.create_model(name, features_only=True)
    maps = model(torch.randn(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [32 // m.shape[2] for m in maps] == model.feature_info.reduction()


def test_wrn_initialisation():
    model = timm.create_model("wrn_40_2", num_classes=100)
    for conv in (model.block3.layer[1].conv1, model.block3.layer[0].convShortcut):
        k, out = conv.kernel_size[0], conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / (k * k * out)) ** 0.5, rel=0.03)
    assert model.fc.bias.abs().max() == 0


def test_loads_public_checkpoints(name, tmp_path):
    source, target = timm.create_model(name, num_classes=100), timm.create_model(name, num_classes=100)
    torch.save({"model": source.state_dict(), "epoch": 240}, tmp_path / "weights.pth")
    timm.models.load_checkpoint(target, str(tmp_path / "weights.pth"))
    for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_public_parameter_names():
    wrn = set(timm.create_model("wrn_40_2").state_dict())
    assert {"conv1.weight", "bn1.weight", "fc.bias", "block1.layer.0.convShortcut.weight"} <= wrn
    assert {"block3.layer.5.bn1.weight", "block2.layer.3.conv2.weight", "block1.layer.1.bn2.running_var"} <= wrn
    shuffle = set(timm.create_model("shufflenet_v1").state_dict())
    assert {"conv1.weight", "bn1.bias", "linear.weight", "layer2.7.conv3.weight", "layer3.0.bn3.bias"} <= shuffle
    assert not [key for key in wrn if "convShortcut" in key and ".0." not in key]
