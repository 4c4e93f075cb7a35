"""Every augmentation against what it should do: PIL, counted pixels, formulas."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from timm.data.auto_augment import AugMixAugment

import common
from augmix import OPERATIONS, TimmAugMix
from cifar_models import CIFAR_MEAN, CIFAR_STD


def indexed_images(n: int, size: int = 32) -> torch.Tensor:
    """uint8 (n, 3, size, size) whose channels hold the image's number, the row and the column of each pixel, plus 1."""
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    images[:, 0] = torch.arange(1, n + 1).view(n, 1, 1)
    images[:, 1] = torch.arange(1, size + 1).view(1, size, 1)
    images[:, 2] = torch.arange(1, size + 1).view(1, 1, size)
    return images


def raw(inputs: torch.Tensor) -> torch.Tensor:
    """Undo `normalize`."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (inputs * std + mean) * 255


class Unchanged(common.Standard):
    """The standard augmentation with nothing drawn: shows what comes after it alone."""

    def __init__(self):
        super().__init__(padding=0, degrees=0)

    def draw(self, images):
        shift, flip, angle = super().draw(images)
        return shift, torch.zeros_like(flip), angle


def undrawn(augment: common.Standard) -> common.Standard:
    augment.draw = Unchanged().draw
    return augment


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = images.numpy() / 255
    expected = (expected - np.array([0.5071, 0.4867, 0.4408])[:, None, None]) / np.array([0.2675, 0.2565, 0.2761])[
        :, None, None
    ]
    np.testing.assert_allclose(common.normalize(images), expected, atol=1e-5)
    floats = images.float()
    np.testing.assert_allclose(common.normalize(floats), expected, atol=1e-5)
    assert floats.equal(images.float())  # not overwritten


@pytest.mark.parametrize(
    ("augment", "order"),
    [(common.Standard(), ("crop", "flip", "rotate")), (common.AugMix(), ("rotate", "flip", "crop"))],
    ids=["standard", "augmix"],
)
@pytest.mark.parametrize("size", [32, 16, 21])
def test_standard_augmentation_is_pils_to_the_pixel(augment, order, size):
    images = torch.randint(0, 256, (200, 3, size, size), dtype=torch.uint8)
    shift, flip, angle = augment.draw(images)
    pad = round(size / 8)
    results = augment.warp(images, shift, flip, angle)
    for image, result, down, right, is_flipped, degrees in zip(images, results, *shift, flip, angle, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        left, top = pad - int(right), pad - int(down)
        steps = {
            "crop": lambda p, left=left, top=top: ImageOps.expand(p, pad).crop((left, top, left + size, top + size)),
            "flip": lambda p, is_flipped=is_flipped: ImageOps.mirror(p) if is_flipped else p,
            "rotate": lambda p, degrees=degrees: p.rotate(float(degrees)),
        }
        for step in order:
            picture = steps[step](picture)
        np.testing.assert_array_equal(np.asarray(picture), result.permute(1, 2, 0))


def test_standard_augmentation_draws_per_image_and_over_the_whole_range():
    shift, flip, angle = common.Standard().draw(torch.empty(20_000, 3, 32, 32))
    for axis in shift:
        counts = axis.add(4).bincount(minlength=9)
        assert len(counts) == 9 and stats.chisquare(counts).pvalue > 1e-4
    assert stats.binomtest(int(flip.sum()), len(flip)).pvalue > 1e-4
    assert stats.kstest(angle, stats.uniform(-15, 30).cdf).pvalue > 1e-4
    assert abs(np.corrcoef(torch.stack([*shift, flip, angle]))[np.triu_indices(4, 1)]).max() < 0.03


@pytest.mark.parametrize(
    "augment",
    [
        common.Standard(),
        common.Mix(10, mixup_alpha=0.3),
        common.Mix(10, cutmix_alpha=1),
        common.CutOut(),
        common.AugMix(),
    ],
    ids=["standard", "mixup", "cutmix", "cutout", "augmix"],
)
def test_every_augmentation_leaves_the_data_alone_and_repeats_with_its_seed(augment, digits):
    images, labels = digits
    before = images.clone(), labels.clone()
    runs = []
    for epoch in (1, 1, 2):
        common.seed_everything(0, epoch)
        runs.append(augment(images, labels))
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert runs[0][0].dtype == torch.float32 and runs[0][0].isfinite().all()


def test_mixup_mixes_images_and_labels_alike():
    images, labels = indexed_images(8), torch.arange(8)
    inputs, targets = undrawn(common.Mix(8, mixup_alpha=0.3))(images, labels)
    weights = targets.double()
    torch.testing.assert_close(weights.sum(1), torch.ones(8, dtype=torch.float64))
    expected = torch.einsum("ij,jchw->ichw", weights, images.double())
    torch.testing.assert_close(raw(inputs).double(), expected, atol=1e-3, rtol=0)


def test_mixup_lambda_is_beta_one_a_batch():
    mix = undrawn(common.Mix(2, mixup_alpha=0.3))
    images, labels = indexed_images(4), torch.tensor([0, 0, 1, 1])
    targets = torch.stack([mix(images, labels)[1] for _ in range(400)])
    lam = targets[:, 0, 0]
    assert torch.equal(targets[:, 1, 0], lam)
    assert stats.kstest(lam, stats.beta(0.3, 0.3).cdf).pvalue > 1e-4


def test_mixup_alpha_zero_mixes_nothing():
    inputs, targets = undrawn(common.Mix(8, mixup_alpha=0))(indexed_images(8), torch.arange(8))
    assert torch.equal(targets, torch.eye(8))
    torch.testing.assert_close(raw(inputs), indexed_images(8).float(), atol=1e-3, rtol=0)


def test_mixup_and_cutmix_at_once_are_refused():
    with pytest.raises(ValueError, match=r"mixup_alpha or cutmix_alpha, got both: 0\.3 and 1\.0"):
        common.Mix(8, mixup_alpha=0.3, cutmix_alpha=1.0)


def test_an_odd_last_image_sits_out_of_mixing():
    inputs, targets = common.Mix(9, mixup_alpha=0.3)(indexed_images(9), torch.arange(9))
    assert len(inputs) == len(targets) == 8


def test_cutmix_label_weights_are_the_area_pasted():
    boxes, lam = [], []
    mix = undrawn(common.Mix(64, cutmix_alpha=1.0))
    for _ in range(20):
        inputs, targets = mix(indexed_images(64), torch.arange(64))
        pixels = raw(inputs).round().long()
        owner = pixels[:, 0] - 1  # which image each pixel came from
        assert torch.equal(pixels[:, 1:], indexed_images(64)[:, 1:].long())  # pasted in place
        for i in range(64):
            own = owner[i] == i
            assert owner[i][~own].unique().tolist() in ([], [63 - i])  # one partner
            assert targets[i, i].item() == pytest.approx(own.float().mean().item(), abs=1e-6)
            assert targets[i].sum().item() == pytest.approx(1, abs=1e-6)
            rows, columns = (~own).any(1).nonzero().flatten(), (~own).any(0).nonzero().flatten()
            if len(rows):  # a full rectangle
                assert (
                    (~own).sum()
                    == len(rows) * len(columns)
                    == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
                )
            boxes.append((len(rows), len(columns)))
            lam.append(targets[i, i].item())
    assert len(set(boxes)) > 100  # drawn per image
    # an independent simulation of CutMix's box: side sqrt(1 - lambda), centre uniform, clipped
    random = np.random.default_rng(0)
    side = np.floor(32 * np.sqrt(1 - random.beta(1, 1, 20_000)))
    length = [
        np.clip(c + (side + 1) // 2, 0, 32) - np.clip(c - side // 2, 0, 32) for c in random.integers(0, 32, (2, 20_000))
    ]
    assert stats.ks_2samp(lam, 1 - length[0] * length[1] / 1024).pvalue > 1e-4


@pytest.mark.parametrize(("size", "hole"), [(32, 16), (16, 8), (32, 5)])
def test_cutout_is_one_clipped_square_with_a_uniform_centre(size, hole):
    images = indexed_images(200, size)
    cutout = undrawn(common.CutOut(hole / size))
    tops, seen = [], set()
    for _ in range(10):
        inputs, labels = cutout(images, torch.arange(200))
        assert torch.equal(labels, torch.arange(200))
        erased = (inputs == 0).all(1)
        kept = (raw(inputs).round() == images).all(1)
        assert torch.equal(erased, ~kept)  # everything else is untouched
        for mask in erased:
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert mask.sum() == len(rows) * len(columns)
            for line in (rows, columns):
                clipped = line[0] == 0 or line[-1] == size - 1
                assert len(line) == hole or (clipped and hole - hole // 2 <= len(line) < hole)
            # the centre, hole // 2 below the top edge, wherever that edge is
            top = int(rows[0]) if rows[0] > 0 else int(rows[-1]) + 1 - hole
            tops.append(top + hole // 2)
            seen.add((len(rows), len(columns)))
    assert stats.chisquare(np.bincount(tops, minlength=size)).pvalue > 1e-4 and len(np.bincount(tops)) == size
    assert (hole, hole) in seen and len(seen) > hole // 2


def test_augmix_has_the_nine_operations_of_the_paper():
    nine = {
        "autocontrast", "equalize", "posterize", "rotate", "solarize", "shearx", "sheary", "translatex", "translatey"
    }  # fmt: skip
    assert {name.replace("_", "") for name in OPERATIONS} == nine and len(OPERATIONS) == 9
    timms = [op.name.removesuffix("Increasing").removesuffix("Rel").lower() for op in TimmAugMix(severity=3).augmix.ops]
    assert set(timms) == nine and len(timms) == 9


def test_augmix_severity_range(monkeypatch):
    """Arguments that reach the pixel operations, against the range that levels from U(0.1, 3) of 10 allow."""
    got = {}
    for op in TimmAugMix(severity=3).augmix.ops:
        calls = got[op.name] = []
        monkeypatch.setattr(
            op, "aug_fn", lambda image, *args, calls=calls, **kwargs: calls.append((args, kwargs)) or image
        )
        for _ in range(2000):
            op(Image.new("RGB", (32, 32)))
    for calls in got.values():
        assert all(kwargs["fillcolor"] == (0, 0, 0) for _, kwargs in calls)
        assert all(kwargs["resample"] == Image.Resampling.BILINEAR for _, kwargs in calls)
    values = {name: [args[0] for args, _ in calls if args] for name, calls in got.items()}
    assert values.pop("AutoContrast") == values.pop("Equalize") == []
    assert set(values.pop("PosterizeIncreasing")) == {3, 4}  # 4 - int(4 * level / 10) bits
    solarize = values.pop("SolarizeIncreasing")
    assert set(solarize) == set(range(256 - 76, 256 - 2 + 1))  # 256 - int(256 * level / 10)
    for name, largest in {
        "Rotate": 30,
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateXRel": 1 / 3,
        "TranslateYRel": 1 / 3,
    }.items():
        level = np.abs(values.pop(name)) / largest * 10
        assert stats.kstest(level, stats.uniform(0.1, 2.9).cdf).pvalue > 1e-4
        assert 0.4 < np.mean(np.array([args[0] for args, _ in got[name]]) > 0) < 0.6
    assert not values


def test_timms_augmix_chains():
    """Width and depth as AugMix's authors have them, seen through an operation that only counts."""
    augmix = TimmAugMix(severity=3).augmix
    assert isinstance(augmix, AugMixAugment)
    calls, drawn = [], []
    augmix.ops = [lambda image: calls.append(1) or image]
    for _ in range(500):
        augmix(Image.new("RGB", (8, 8)))
        drawn.append(len(calls) - sum(drawn))
    assert augmix.width == 3 and set(drawn) == set(range(3, 10))  # 1 to 3 operations a chain
    assert np.mean(drawn) / 3 == pytest.approx(2, abs=0.1)
