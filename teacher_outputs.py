"""Teachers' logits, computed once for all students that see the same views.

What a student sees in an epoch follows from the images, the seed, the epoch, the batch size and the augmentation. So
every student of a table hears the same from a teacher, and the first one may write it down: a file an epoch and
teacher, 4 bytes a logit, 20 MB for the 50,000 images of CIFAR-100.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from run_files import atomic_write


class EpochOutputs:
    """The logits of one teacher in one epoch, step by step: read where they are known, else recorded.

    Args:
        file: where they are, or go: `.npz` with `logits`, float32 (images, classes), in the epoch's order.
        images: how many the epoch has.
        device: where the logits are wanted.
    """

    def __init__(self, file: Path, images: int, device: torch.device):
        self.file, self.images = file, images
        known = self._read()
        self.known = None if known is None else known.to(device)
        self.recorded: list[Tensor] = []
        self.seen = 0

    def step(self, teacher: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
        """What `teacher` says of the epoch's next views: (B, classes)."""
        start, self.seen = self.seen, self.seen + len(views)
        if self.known is not None:
            return self.known[start : self.seen]
        logits = teacher(views)
        self.recorded.append(logits.detach().clone())  # CUDA graphs write the next ones to the same place
        return logits

    def save(self) -> None:
        """Once the epoch is over, keep what was recorded. Runs side by side may do so at the same time."""
        if self.known is None:
            mine = self.file.with_suffix(f".{os.getpid()}.npz")
            with atomic_write(mine) as stream:
                np.savez(stream, logits=torch.cat(self.recorded).cpu().numpy())
            os.replace(mine, self.file)

    def _read(self) -> Tensor | None:
        """None where there is no such file, or it is not whole (a zip's checksum tells): it is then written anew."""
        try:
            with np.load(self.file) as arrays:
                logits = torch.from_numpy(arrays["logits"])
        except Exception:  # zipfile raises many kinds
            return None
        return logits if logits.dtype == torch.float32 and len(logits) == self.images else None
