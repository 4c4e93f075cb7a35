"""What a batch goes through before the model sees it: the standard augmentation, MixUp, CutMix, CutOut, AugMix.

An augmentation takes a batch of raw images, uint8 (B, 3, H, W), with labels, int64 (B,), and returns what the model and
the objective see: normalised float images, and labels or soft targets. It draws from the global generators of torch (on
the CPU, so that every device sees the same views), numpy and random, which the run seeds at the start of every epoch.
Lengths are fractions of the image, so they hold at any size.
"""

import functools
import random
from typing import Literal

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from augmix import BatchedAugMix, TimmAugMix
from cifar_models import CIFAR_MEAN, CIFAR_STD


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), or floats up to 255 -> float32 with CIFAR's mean and standard deviation taken out."""
    mean, std = _mean_std(images.device)
    return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


@functools.cache
def _mean_std(device: torch.device) -> Tensor:
    """float32 (2, 3, 1, 1). Kept, for a GPU would be waited for at every copy."""
    return torch.tensor((CIFAR_MEAN, CIFAR_STD), device=device).view(2, 3, 1, 1)


class Standard:
    """Random crop after zero padding, horizontal flip, rotation; each drawn per image. Then normalised.

    All three are one gather: every output pixel is traced back through the operations, last one first, and is
    black once it leaves the frame. Rotation is nearest-neighbour and agrees with PIL's to the pixel.

    Args:
        padding: zeros on each side before the crop, as a fraction of the image (4 of 32 pixels).
        degrees: rotation is uniform in [-degrees, degrees].
    """

    order = ("crop", "flip", "rotate")

    def __init__(self, padding: float = 1 / 8, degrees: float = 15.0):
        self.padding, self.degrees = padding, degrees

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.warp(images, *self.draw(images))), labels

    def draw(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift (2, B) in pixels, down and right; flip (B,) bool; angle (B,) float64 in degrees, anticlockwise."""
        pad = round(self.padding * images.shape[-1])
        shift = torch.randint(-pad, pad + 1, (2, len(images)))
        flip = torch.rand(len(images)) < 0.5
        angle = torch.empty(len(images), dtype=torch.float64).uniform_(-self.degrees, self.degrees)
        return shift, flip, angle

    def warp(self, images: Tensor, shift: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the cropped, flipped and rotated images, likewise."""
        b, _, h, w = images.shape
        cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
        start_x = w / 2 - cos * (w - 1) / 2 + sin * (h - 1) / 2  # where output pixel (0, 0) comes from
        start_y = h / 2 - sin * (w - 1) / 2 - cos * (h - 1) / 2
        # 16.16 fixed point as in PIL, so that what lies on an edge falls to the same side as there
        fixed = (torch.floor(v * 65536 + 0.5).long() for v in (cos, sin, start_x, start_y))
        draws = torch.stack([*shift, flip, *fixed]).int().to(images.device, non_blocking=True)
        down, right, flip, cos, sin, start_x, start_y = draws.view(7, b, 1, 1)
        y = torch.arange(h, device=images.device, dtype=torch.int32).view(h, 1)
        x = torch.arange(w, device=images.device, dtype=torch.int32)
        signs = 0  # a sign bit where a pixel has left the frame in any of the operations: one comparison for all
        for step in reversed(self.order):
            if step == "crop":
                y, x = y - down, x - right
            elif step == "flip":
                x = x * (1 - 2 * flip) + flip * (w - 1)
            else:
                y, x = (start_y + sin * x) + cos * y >> 16, (start_x + cos * x) - sin * y >> 16
            if step != "flip":
                signs = (signs | y | h - 1 - y) | (x | w - 1 - x)
        visible = signs >= 0
        source = ((y * w + x) * visible).long().view(b, 1, h * w).expand(-1, 3, -1)
        return images.flatten(2).gather(2, source).view_as(images) * visible.unsqueeze(1)


def inside(boxes: Tensor, h: int, w: int, device: torch.device) -> Tensor:
    """int64 (B, 4) of top, left, bottom, right, the last two excluded -> bool (B, 1, h, w), on the device."""
    top, left, bottom, right = boxes.to(device, non_blocking=True).view(-1, 4, 1, 1, 1).unbind(1)
    y, x = torch.arange(h, device=device).view(h, 1), torch.arange(w, device=device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


class CutMix(Mixup):
    """timm's `Mixup` with CutMix alone, per image, but without its loop over the images: the same numbers drawn in the
    same order, hence the same result. The loop would launch a copy for each image."""

    def __init__(self, alpha: float, num_classes: int):
        super().__init__(0.0, alpha, mode="elem", label_smoothing=0.0, num_classes=num_classes)

    def _mix_elem(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        lam, _ = self._params_per_elem(len(x))
        side = np.sqrt(1 - lam)[:, None]
        size = (np.array((h, w), np.float32) * side).astype(int)
        center = np.zeros_like(size)
        center[lam != 1] = np.random.randint((h, w), size=((lam != 1).sum(), 2))
        low, high = (np.clip(edge, 0, (h, w)) for edge in (center - size // 2, center + (size + 1) // 2))
        lam = torch.from_numpy(1 - np.prod(high - low, 1) / (h * w)).to(x.dtype).unsqueeze(1)
        boxes = torch.from_numpy(np.hstack([low, high]))
        torch.where(inside(boxes, h, w, x.device), x.flip(0), x, out=x)
        lam = lam.to(x.device, non_blocking=True)
        return lam


class Mix(Standard):
    """Standard augmentation, then timm's `Mixup`: images paired within the batch, soft targets (B, num_classes).

    Of an odd number of images the last is left out.

    Args:
        num_classes: width of the targets.
        mixup_alpha: MixUp (Zhang et al., 2018), lambda ~ Beta(alpha, alpha), one a batch. 0 switches it off.
        cutmix_alpha: CutMix (Yun et al., 2019) instead, lambda ~ Beta(alpha, alpha), one box an image, the label
            weights corrected to the area really pasted. 0 switches it off.

    Raises:
        ValueError: both are on.
    """

    def __init__(self, num_classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0):
        super().__init__()
        if mixup_alpha and cutmix_alpha:
            raise ValueError(f"want mixup_alpha or cutmix_alpha, got both: {mixup_alpha} and {cutmix_alpha}")
        if cutmix_alpha:
            self.mixup = CutMix(cutmix_alpha, num_classes)
        else:
            self.mixup = Mixup(mixup_alpha, label_smoothing=0.0, num_classes=num_classes)
            self.mixup.mixup_enabled = mixup_alpha > 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) // 2 * 2
        return self.mixup(*super().__call__(images[:even], labels[:even]))


class CutOut(Standard):
    """Standard augmentation, then CutOut (DeVries & Taylor, 2017): one square hole, 0 after normalisation.

    Its centre is uniform over the image and the border clips it. The holes are those that timm's `RandomErasing` makes
    in an image padded by the hole less one pixel, since it keeps its rectangles inside; without its loop over pixels.

    Args:
        size: side of the hole, as a fraction of the image's height (16 of 32 pixels).
    """

    def __init__(self, size: float = 0.5):
        super().__init__()
        self.size = size

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = super().__call__(images, labels)
        h, w = images.shape[-2:]
        hole = round(self.size * h)
        corners = torch.tensor([self.center(h, w) for _ in range(len(images))]) - hole // 2
        boxes = torch.hstack([corners, corners + hole])
        return images.masked_fill_(inside(boxes, h, w, images.device), 0), labels

    @staticmethod
    def center(h: int, w: int) -> tuple[int, int]:
        """Row and column, drawn as timm draws them."""
        random.random(), random.uniform(0, 1), random.uniform(0, 1)  # timm's whether, area and aspect
        return random.randint(0, h - 1), random.randint(0, w - 1)


class AugMix(Standard):
    """AugMix (Hendrycks et al., 2020): returns (3 * B, 3, H, W), the clean view and two augmented ones in turn, as
    timm's `JsdCrossEntropy` expects them; labels stay (B,).

    Args:
        severity: largest level of an operation, from 0.1 to 10.
        backend: `batched` is tensor code on the images' device, `timm` goes through PIL, an image at a time. They
            agree but for rounding, and draw from other generators.
    """

    order = ("rotate", "flip", "crop")  # as the original script has it for this row

    def __init__(self, severity: float = 3.0, backend: Literal["batched", "timm"] = "batched"):
        super().__init__()
        self.augmix = {"batched": BatchedAugMix, "timm": TimmAugMix}[backend](severity)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        clean = self.warp(images, *self.draw(images))
        return normalize(torch.cat([clean, self.augmix(clean.repeat(2, 1, 1, 1))])), labels
