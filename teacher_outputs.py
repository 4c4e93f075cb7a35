"""Teachers' logits, computed once for all students that see the same views.

What a student sees in an epoch follows from the images, the seed, the epoch, the batch size and the augmentation. So
every student of a table hears the same from a teacher, and the first one may write it down: a file an epoch and
teacher, 4 bytes a logit, 20 MB for the 50,000 images of CIFAR-100.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from run_files import atomic_write


class EpochOutputs:
    """The logits of one teacher or several in one epoch, step by step: read where they are known, else recorded.

    Args:
        files: where each teacher's are, or go: `.npz` with `logits`, float32 (images, classes), in the epoch's order.
        images: how many the epoch has.
        device: where the logits are wanted.
    """

    def __init__(self, files: Sequence[Path], images: int, device: torch.device):
        self.files, self.images, self.device = files, images, device
        read = [self._read(file) for file in files]
        self.known = None if any(logits is None for logits in read) else torch.stack(read).to(device)
        self.recorded: list[Tensor] = []
        self.seen = 0

    def step(self, teacher: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
        """What `teacher` says of the epoch's next views: (B, classes), or (teachers, B, classes) of several."""
        start, self.seen = self.seen, self.seen + len(views)
        if self.known is not None:
            logits = self.known[:, start : self.seen]
            return logits if len(self.files) > 1 else logits[0]
        logits = teacher(views)
        self.recorded.append(logits.detach().clone())  # CUDA graphs write the next ones to the same place
        return logits

    def save(self) -> None:
        """Once the epoch is over, keep what was recorded. Runs side by side may do so at the same time."""
        if self.known is None:
            recorded = torch.cat(self.recorded, dim=-2).cpu()
            for file, logits in zip(self.files, recorded.view(len(self.files), self.images, -1), strict=True):
                mine = file.with_suffix(f".{os.getpid()}.npz")
                with atomic_write(mine) as stream:
                    np.savez(stream, logits=logits.numpy())
                os.replace(mine, file)

    def _read(self, file: Path) -> Tensor | None:
        """None where there is no such file, or it is not whole (a zip's checksum tells): it is then written anew."""
        try:
            with np.load(file) as arrays:
                logits = torch.from_numpy(arrays["logits"])
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return logits if logits.dtype == torch.float32 and len(logits) == self.images else None
