"""The two models of the table as timm models: `timm.create_model("wrn_40_2")`, `timm.create_model("shufflenet_v1")`.

Parameter names are those of the public CIFAR distillation checkpoints (CRD, DKD and the original of this kit), so
`timm.models.load_checkpoint` reads such files as they are.
"""

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)


class CifarModel(nn.Module):
    """The timm model interface. Subclasses build their features, then call `reset_classifier`."""

    classifier: str  # attribute name of the linear layer

    def __init__(self, num_features: int, in_chans: int):
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.in_chans = in_chans

    def get_classifier(self) -> nn.Module:
        """The last layer: `nn.Linear`, or `nn.Identity` where `num_classes` is 0."""
        return getattr(self, self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Put a fresh classifier on, for `num_classes` classes (0: none)."""
        self.num_classes = num_classes
        self.global_pool, fc = create_classifier(self.num_features, num_classes, global_pool)
        setattr(self, self.classifier, fc)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> logits (B, num_classes), or the pooled features before them."""
        x = self.global_pool(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) float -> logits (B, num_classes). H and W from 16 up."""
        return self.forward_head(self.forward_features(x))


class PreActBlock(nn.Module):
    """Pre-activation basic block (He et al., 2016, fig. 1b). Where the width changes, both branches see BN-ReLU."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if in_chs != out_chs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y)), inplace=True))


class PreActStage(nn.Module):
    """Blocks in a row, under the name `layer` that public checkpoints have."""

    def __init__(self, in_chs: int, out_chs: int, depth: int, stride: int):
        super().__init__()
        first = PreActBlock(in_chs, out_chs, stride)
        self.layer = nn.Sequential(first, *(PreActBlock(out_chs, out_chs, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(CifarModel):
    """Wide residual network for small images (Zagoruyko & Komodakis, 2016)."""

    classifier = "fc"

    def __init__(self, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg", depth=40, width=2):
        chs = [16 * width, 32 * width, 64 * width]
        super().__init__(chs[-1], in_chans)
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = PreActStage(16, chs[0], blocks, stride=1)
        self.block2 = PreActStage(chs[0], chs[1], blocks, stride=2)
        self.block3 = PreActStage(chs[1], chs[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(chs[-1])
        self.feature_info = [dict(num_chs=c, reduction=2**i, module=f"block{i + 1}") for i, c in enumerate(chs)]
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, sqrt(2 / (k * k * out_channels)))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 64 * width, H / 4, W / 4), after the last BN and ReLU."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x), inplace=True)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) with channel (g, c) moved to (c, g), as `F.channel_shuffle`; channels last stay channels last, which
    on a GPU torch's own does not keep."""
    return x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)


class ShuffleUnit(nn.Module):
    """ShuffleNet unit (Zhang et al., 2018, fig. 2b and 2c). With stride 2 it appends the pooled input."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int):
        super().__init__()
        out_chs = out_chs - in_chs if stride == 2 else out_chs
        mid_chs = out_chs // 4
        self.groups_in = 1 if in_chs == 24 else groups  # the stem's 24 channels are too few to group
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, groups=self.groups_in, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_chs)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, stride, padding=1, groups=mid_chs, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_chs)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = channel_shuffle(F.relu(self.bn1(self.conv1(x)), inplace=True), self.groups_in)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)), inplace=True)))
        if self.pool is None:
            return F.relu(y + x, inplace=True)
        # Not a ReLU of both: batch norm is slow to take a slice of its gradient, and x, another ReLU's, needs none
        return torch.cat([F.relu(y, inplace=True), self.pool(x)], 1)


class ShuffleNetV1(CifarModel):
    """ShuffleNet (Zhang et al., 2018), 3 groups, with a stem for small images."""

    classifier = "linear"

    def __init__(self, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg", groups=3):
        chs = [240, 480, 960]
        super().__init__(chs[-1], in_chans)
        self.conv1 = nn.Conv2d(in_chans, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.act1 = nn.ReLU(inplace=True)
        for i, (in_chs, out_chs, depth) in enumerate(zip([24, *chs], chs, [4, 8, 4], strict=False)):
            units = [ShuffleUnit(out_chs if j else in_chs, out_chs, 1 if j else 2, groups) for j in range(depth)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
        self.feature_info = [dict(num_chs=c, reduction=2 ** (i + 1), module=f"layer{i + 1}") for i, c in enumerate(chs)]
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 960, H / 8, W / 8)."""
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))


_CFG = dict(
    num_classes=100, input_size=(3, 32, 32), min_input_size=(3, 16, 16), mean=CIFAR_MEAN, std=CIFAR_STD, crop_pct=1.0
)
default_cfgs = generate_default_cfgs(
    {
        "wrn_40_2": dict(_CFG, first_conv="conv1", classifier="fc", paper_ids="arXiv:1605.07146"),
        "shufflenet_v1": dict(_CFG, first_conv="conv1", classifier="linear", paper_ids="arXiv:1707.01083"),
    }
)


@register_model
def wrn_40_2(pretrained=False, **kwargs) -> WideResNet:
    """The teacher: 2,255,156 parameters at 100 classes."""
    return build_model_with_cfg(WideResNet, "wrn_40_2", pretrained, feature_cfg=dict(out_indices=(0, 1, 2)), **kwargs)


@register_model
def shufflenet_v1(pretrained=False, **kwargs) -> ShuffleNetV1:
    """The student: 949,258 parameters at 100 classes."""
    cfg = dict(out_indices=(0, 1, 2))
    return build_model_with_cfg(ShuffleNetV1, "shufflenet_v1", pretrained, feature_cfg=cfg, **kwargs)
