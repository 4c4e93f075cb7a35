"""Every fast path against the plain one it stands for."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

import common


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 40)], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.05])  # so small an alpha draws lambdas that are exactly 1
def test_cutmix_gives_what_timms_loop_gives(size, alpha):
    ones = 0
    for seed in range(20):
        images, labels = torch.randn(30, 3, *size), torch.randint(10, (30,))
        np.random.seed(seed)
        timm = Mixup(0.0, alpha, mode="elem", label_smoothing=0.0, num_classes=10)
        expected = timm(images.clone(), labels)
        following = np.random.rand()
        np.random.seed(seed)
        ours = common.CutMix(alpha, 10)(images.clone(), labels)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
        assert np.random.rand() == following  # nothing more and nothing less was drawn
        ones += (expected[1].amax(1) == 1).sum()
    assert alpha == 1 or ones > 0


@pytest.mark.parametrize("size", [32, 16])
def test_cutout_gives_what_timms_loop_gives_on_the_images(size):
    images, labels = torch.randint(256, (40, 3, size, size), dtype=torch.uint8), torch.arange(40)
    random.seed(0), torch.manual_seed(0)
    ours, _ = common.CutOut(0.5)(images, labels)
    random.seed(0), torch.manual_seed(0)
    plain, _ = common.Standard()(images, labels)
    hole = size // 2
    area = hole**2 / (size + hole - 1) ** 2
    erase = RandomErasing(1.0, area, area, min_aspect=1.0, max_aspect=1.0, device="cpu")
    before, after = hole // 2, hole - 1 - hole // 2
    expected = erase(F.pad(plain, (before, after, before, after)))[..., before : before + size, before : before + size]
    assert torch.equal(ours, expected) and not torch.equal(ours, plain)
