"""AugMix (Hendrycks et al., 2020) on raw images: `BatchedAugMix` on a whole batch where it lies, `TimmAugMix` by PIL.

Each of the nine operations is either a table, which gives every pixel value of a channel a new one, or an affine map
with bilinear interpolation, black outside the frame. So a step along all chains of all images is one pass over each
table's images and one over all that are mapped. Rounding, clipping and borders are PIL's, and so are the results: the
tables to the bit, the maps within one grey level.
"""

import random
import typing

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import AugmentOp, AugMixAugment
from torch import Tensor

# Operations ------------------------------------------------------------------------------------------------
#
# A table takes uint8 images (N, 3, H, W) and levels (N,), float64 out of 10, and returns int64 (N, 1 or 3, 256):
# what becomes of each value.


def autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Each channel's darkest value becomes 0 and its lightest 255; a channel of one value stays."""
    values = torch.arange(256, device=images.device)
    low, high = (v.double().unsqueeze(2) for v in images.flatten(2).aminmax(dim=2))
    scale = torch.full_like(low, 255) / (high - low)  # not 255 / ..., which torch rounds twice
    return torch.where(high > low, values * scale + -low * scale, values).clamp(0, 255).long()


def equalize(images: Tensor, level: Tensor) -> Tensor:
    """Each channel's values as evenly spread as PIL's whole steps allow; too few pixels for a step leave it."""
    values, pixels = torch.arange(256, device=images.device), images.flatten(2).long()
    count = torch.zeros((*pixels.shape[:2], 256), dtype=torch.long, device=images.device)
    count.scatter_add_(2, pixels, torch.ones_like(pixels))
    step = (pixels.shape[2] - count.gather(2, pixels.amax(2, keepdim=True))) // 255
    darker = count.cumsum(2) - count
    return torch.where(step > 0, (darker + step // 2) // step.clamp(min=1), values).clamp(max=255)


def posterize(images: Tensor, level: Tensor) -> Tensor:
    """Keep the 4 - int(4 level / 10) highest bits."""
    values = torch.arange(256, device=images.device)
    bits = 4 - (level / 10 * 4).long().view(-1, 1, 1)
    return values - values % 2 ** (8 - bits)


def solarize(images: Tensor, level: Tensor) -> Tensor:
    """Invert the values from 256 - int(256 level / 10) up."""
    values = torch.arange(256, device=images.device)
    threshold = 256 - (level / 10 * 256).long().view(-1, 1, 1)
    return torch.where(values < threshold, values, 255 - values)


TABLES = (autocontrast, equalize, posterize, solarize)
OPERATIONS = (*(table.__name__ for table in TABLES), "rotate", "shear_x", "shear_y", "translate_x", "translate_y")
NOTHING = len(OPERATIONS)  # the operation of a chain that has come to its end
WIDTH, DEPTH = 3, 3  # chains that are mixed, and the most operations in one: as the paper and timm have it


def affine_maps(operation: Tensor, level: Tensor, height: int, width: int) -> Tensor:
    """Where the pixels of a mapped image come from: float32 (N, 2, 3), from output (x, y, 1) to input (x, y), with the
    frame from -1 to 1 as `grid_sample` has it.

    Rotation is up to 30 degrees around the centre, shear up to 0.3 from the upper left corner, translation up to a
    third of the side: each times level / 10. The identity for other operations.
    """
    share = level / 10
    cos, sin = (30 * share).deg2rad().cos(), (30 * share).deg2rad().sin()
    shear_x, shear_y = 0.3 * share * height / width, 0.3 * share * width / height
    entries = {
        "rotate": {(0, 0): cos, (0, 1): -sin * height / width, (1, 0): sin * width / height, (1, 1): cos},
        "shear_x": {(0, 1): shear_x, (0, 2): shear_x},
        "shear_y": {(1, 0): shear_y, (1, 2): shear_y},
        "translate_x": {(0, 2): share * 2 / 3},
        "translate_y": {(1, 2): share * 2 / 3},
    }
    maps = torch.eye(2, 3, dtype=torch.float64).repeat(len(level), 1, 1)
    for name, places in entries.items():
        for (row, column), value in places.items():
            maps[:, row, column] = torch.where(operation == OPERATIONS.index(name), value, maps[:, row, column])
    return maps.float()


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) through tables (N, 1 or 3, 256), likewise."""
    return table.byte().expand(-1, 3, -1).gather(2, images.flatten(2).long()).view_as(images)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) through `affine_maps`, likewise: bilinear between pixel centres, as PIL's transform.

    What comes from outside the frame is black; within half a pixel of its edge the edge's pixel counts alone.
    """
    h, w = images.shape[-2:]
    y, x = ((torch.arange(s, device=images.device) * 2 + 1) / s - 1 for s in (h, w))
    xx, xy, x0, yx, yy, y0 = maps.flatten(1)[..., None, None].unbind(1)
    x, y = (xy * y[:, None] + x0) + xx * x, (yy * y[:, None] + y0) + yx * x
    visible = (x >= -1) & (x < 1) & (y >= -1) & (y < 1)
    grid = torch.stack([x, y], -1)
    value = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    # PIL truncates; the little on top keeps what is a whole number but for float32's rounding
    return value.add_(1e-3).mul_(visible.unsqueeze(1)).byte()


def apply_operations(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Do to each image what was drawn for it.

    Args:
        images: uint8 (N, 3, H, W), on any device; changed in place.
        operation: int64 (N,) on the CPU, indices into `OPERATIONS`, or `NOTHING`.
        level: float64 (N,) on the CPU, out of 10; a negative one maps the other way.
    """
    tables, nothing = len(TABLES), NOTHING
    maps = affine_maps(operation, level, *images.shape[-2:])
    order, level, maps = (t.to(images.device, non_blocking=True) for t in (operation.argsort(), level.abs(), maps))
    count = operation.bincount(minlength=nothing + 1).tolist()  # of a tensor on the CPU: no device waits
    *groups, mapped, _ = order.split([*count[:tables], sum(count[tables:nothing]), count[nothing]])
    for table, group in zip(TABLES, groups, strict=True):
        images[group] = look_up(images[group], table(images[group], level[group]))
    images[mapped] = warp(images[mapped], maps[mapped])
    return images


# The whole -------------------------------------------------------------------------------------------------


class Draws(typing.NamedTuple):
    """What AugMix leaves to chance for N images; on the CPU."""

    operation: Tensor
    """int64 (DEPTH, WIDTH, N), indices into `OPERATIONS`; `NOTHING` beyond a chain's end"""
    level: Tensor
    """float64 (DEPTH, WIDTH, N), out of 10, its sign the direction of a map"""
    weights: Tensor
    """float32 (WIDTH, N) of the chains, sum 1"""
    share: Tensor
    """float32 (N,) of the mixed chains beside the image itself"""


class BatchedAugMix:
    """AugMix on a batch: uint8 (N, 3, H, W) -> likewise, on the same device, without waiting for it.

    Draws from torch's global CPU generator, so that every device sees the same views.

    Args:
        severity: largest level of an operation, out of 10; each draws one from U(0.1, severity).
    """

    def __init__(self, severity: float):
        self.severity = severity

    def __call__(self, images: Tensor) -> Tensor:
        return self.mix(images, self.draw(len(images)))

    def draw(self, n: int) -> Draws:
        shape = (DEPTH, WIDTH, n)
        operation = torch.randint(len(OPERATIONS), shape)
        length = torch.randint(1, DEPTH + 1, (WIDTH, n))
        operation[torch.arange(DEPTH).view(-1, 1, 1) >= length] = NOTHING
        level = torch.empty(shape, dtype=torch.float64).uniform_(0.1, self.severity)
        level *= torch.randint(2, shape) * 2 - 1
        weights = torch.distributions.Dirichlet(torch.ones(WIDTH)).sample((n,)).T
        share = torch.distributions.Beta(1.0, 1.0).sample((n,))
        return Draws(operation, level, weights, share)

    def mix(self, images: Tensor, draws: Draws) -> Tensor:
        """The images' chains, mixed with weights, then with the images; both truncated to whole grey levels."""
        n = len(images)
        chains = images.repeat(WIDTH, 1, 1, 1)
        for operation, level in zip(draws.operation.flatten(1), draws.level.flatten(1), strict=True):
            chains = apply_operations(chains, operation, level)
        weights, share = (t.to(images.device, non_blocking=True)[..., None, None, None] for t in draws[2:])
        mixed = torch.zeros(images.shape, device=images.device)
        for chain, weight in zip(chains.split(n), weights, strict=True):  # in timm's order, for the same rounding
            mixed += weight * chain
        mixed, images = mixed.clamp_(0, 255).trunc_(), images.float()
        return images.add_(share * mixed.sub_(images)).byte()


class AugMixOp(AugmentOp):
    """A timm operation at a level drawn from U(0.1, severity) at each call, as AugMix's authors draw it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        level = random.uniform(0.1, self.magnitude)
        return self.aug_fn(image, *(self.level_fn(level, self.hparams) if self.level_fn else ()), **self.kwargs)


class TimmAugMix:
    """The same through timm's `AugMixAugment`, an image at a time, drawn from numpy's and random's generators."""

    operations = (
        "AutoContrast", "Equalize", "PosterizeIncreasing", "SolarizeIncreasing", "Rotate",
        "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
    )  # fmt: skip

    def __init__(self, severity: float):
        hparams = dict(img_mean=(0, 0, 0), translate_pct=1 / 3, interpolation=Image.Resampling.BILINEAR)
        self.augmix = AugMixAugment([AugMixOp(name, 1.0, severity, hparams) for name in self.operations])

    def __call__(self, images: Tensor) -> Tensor:
        pictures = [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]
        mixed = np.stack([np.asarray(self.augmix(picture)) for picture in pictures])
        return torch.from_numpy(mixed).to(images.device).permute(0, 3, 1, 2)
