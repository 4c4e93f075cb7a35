"""The batched AugMix against PIL and timm: operation by operation, and the whole."""

import math
import random
from collections.abc import Callable
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, AugMixAugment
from torch import Tensor

import common
from augmix import NOTHING, OPERATIONS, WIDTH, BatchedAugMix, TimmAugMix, apply_operations

TABLES = OPERATIONS[:4]
TIMM_NAMES = dict(zip(OPERATIONS, TimmAugMix.operations, strict=True))
SIZES = [(32, 32), (16, 16), (24, 40)]


def make_images(n: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Smooth images, with noise, of little contrast, and flat, in turn: uint8 (n, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, size, mode="bicubic", align_corners=False).clamp(0, 1)
    images = (smooth * 255).byte()
    images[1::4] = torch.randint(256, images[1::4].shape, generator=generator, dtype=torch.uint8)
    images[2::4] = images[2::4] // 16 + 90
    images[3::4] = torch.randint(256, images[3::4, :, :1, :1].shape, generator=generator, dtype=torch.uint8)
    return images


def signed_levels(n: int, largest: float = 3.0) -> Tensor:
    level = torch.empty(n, dtype=torch.float64).uniform_(0.1, largest, generator=torch.Generator().manual_seed(1))
    level[::2] *= -1
    return level


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def timm_operation(name: str, level: float) -> Callable[[Image.Image], Image.Image]:
    """timm's operation at this level, as AugMix's setting has it; the level's sign is the map's direction."""
    level_fn = LEVEL_TO_ARG[TIMM_NAMES[name]]
    arguments = level_fn(abs(level), {"translate_pct": 1 / 3}) if level_fn else ()
    if name not in TABLES:  # timm has drawn a sign of its own
        arguments = (math.copysign(arguments[0], level),)
    kwargs = dict(fillcolor=(0, 0, 0), resample=Image.Resampling.BILINEAR)
    return lambda image: NAME_TO_OP[TIMM_NAMES[name]](image, *arguments, **kwargs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_pil(name, size):
    images, level = make_images(64, size), signed_levels(64, largest=9.99)
    expected = torch.stack([from_pil(timm_operation(name, v)(to_pil(i))) for i, v in zip(images, level, strict=True)])
    ours = apply_operations(images.clone(), torch.full((64,), OPERATIONS.index(name)), level)
    difference = (ours.int() - expected.int()).abs()
    assert (name == "equalize" and size == (16, 16)) or (expected != images).any()
    if name in TABLES:
        assert torch.equal(ours, expected)
    else:
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 2e-3  # and hardly ever


def test_same_draws_give_what_timm_gives(monkeypatch):
    """timm's own `AugMixAugment`, its random numbers replaced by ours."""
    n = 48
    images = make_images(n, (32, 32))
    torch.manual_seed(3)
    augmix = BatchedAugMix(severity=3.0)
    draws = augmix.draw(n)
    tables_only = draws.operation[..., : n // 4]
    tables_only[tables_only != NOTHING] %= len(TABLES)
    draws.share[:2] = torch.tensor([0.0, 1.0])  # which PIL's blend treats on their own
    length = (draws.operation != NOTHING).sum(0)
    expected = []
    for i in range(n):
        chains = [
            [
                timm_operation(OPERATIONS[draws.operation[k, c, i]], draws.level[k, c, i].item())
                for k in range(length[c, i])
            ]
            for c in range(WIDTH)
        ]
        lengths, chosen = iter(length[:, i].tolist()), iter(chains)
        replaced = SimpleNamespace(
            dirichlet=lambda alpha, i=i: draws.weights[:, i].numpy(),
            beta=lambda a, b, i=i: draws.share[i].item(),
            randint=lambda low, high, lengths=lengths: next(lengths),
            choice=lambda ops, depth, replace, chosen=chosen: next(chosen),
        )
        monkeypatch.setattr(auto_augment.np, "random", replaced)
        expected.append(from_pil(AugMixAugment([])(to_pil(images[i]))))
        monkeypatch.undo()
    ours = augmix.mix(images, draws)
    difference = (ours.int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 2  # a grey level of an early map may be stretched by a later table
    assert (difference > 0).float().mean() < 0.01
    assert difference[: n // 4].max() == 0


def test_draws_have_the_distribution_of_the_method():
    torch.manual_seed(0)
    n = 20_000
    operation, level, weights, share = BatchedAugMix(severity=3.0).draw(n)
    drawn = operation != NOTHING
    for length in (1, 2, 3):
        assert (drawn.sum(0) == length).double().mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert drawn[0].all() and not (drawn[2] & ~drawn[1]).any()  # chains end, they have no gaps
    assert torch.allclose(operation[drawn].bincount() / drawn.sum(), torch.tensor(1 / 9), atol=0.005)
    assert level.abs().min() >= 0.1 and level.abs().max() <= 3.0
    assert level.abs().mean().item() == pytest.approx(1.55, abs=0.01)
    assert (level > 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.allclose(weights.sum(0), torch.ones(n), atol=1e-6)
    # Dirichlet(1, 1, 1): mean 1/3, variance 1/18; Beta(1, 1): mean 1/2, variance 1/12
    assert torch.allclose(weights.mean(1), torch.tensor(1 / 3), atol=0.01)
    assert torch.allclose(weights.var(1), torch.tensor(1 / 18), atol=0.002)
    assert share.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert share.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_views_are_distributed_as_timms():
    """Many views of one image: mean, spread and distance from the image agree within five standard errors."""
    n, image = 3000, make_images(1, (16, 16), seed=4)
    images = image.repeat(n, 1, 1, 1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    ours, timms = (augmix(images).double() for augmix in (BatchedAugMix(3.0), TimmAugMix(3.0)))
    statistics = {
        "brightness": lambda views: views.mean((1, 2, 3)),
        "contrast": lambda views: views.std((1, 2, 3)),
        "distance": lambda views: (views - image).abs().mean((1, 2, 3)),
        "distance squared": lambda views: (views - image).square().mean((1, 2, 3)),
        "edge": lambda views: views[..., 0].mean((1, 2)),
        "corner": lambda views: views[..., 0, 0].mean(1),
    }
    for name, statistic in statistics.items():
        a, b = statistic(ours), statistic(timms)
        error = ((a.var() + b.var()) / n).sqrt()
        assert (a.mean() - b.mean()).abs() < 5 * error, name
        assert (a.std() / b.std()).log().abs() < 0.15, name


@pytest.mark.parametrize("backend", ["batched", "timm"])
def test_augmentation_gives_the_clean_view_then_two(digits, backend):
    images, labels = digits
    augment = common.AugMix(3.0, backend)
    torch.manual_seed(0)
    views, targets = augment(images, labels)
    torch.manual_seed(0)
    clean = common.normalize(augment.warp(images, *augment.draw(images)))
    assert torch.equal(views.chunk(3)[0], clean) and torch.equal(targets, labels)
    for view, other in combinations(views.chunk(3), 2):
        assert (view != other).flatten(1).any(1).float().mean() > 0.9
        nearest = torch.cdist(other.flatten(1), clean.flatten(1)).argmin(1)  # still recognisable as its own image
        assert (nearest == torch.arange(len(images))).float().mean() > 0.8
