"""Files that are whole or not there, and the error that tells a person what to do about one."""

import csv
import hashlib
import json
import os
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if typing.TYPE_CHECKING:  # tools that only read results start without torch
    from torch import Tensor

PUBLISHED = Path(__file__).resolve().parent / "results" / "published.csv"


class UserError(Exception):
    """Something the person at the keyboard can mend. The command line shows it as one line and exits with 2."""


@contextmanager
def atomic_write(path: Path) -> Iterator[typing.BinaryIO]:
    """Open a file that appears under its name only once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_weights(path: Path, weights: "dict[str, Tensor]") -> None:
    import safetensors.torch

    with atomic_write(path) as file:
        file.write(safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}))


def variant(changes: dict[str, Any]) -> str:
    """What tells a variant's names from its row's: `-` and 8 hex digits of its changes; nothing for the row itself."""
    return f"-{hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]}" if changes else ""


def read_result(path: Path) -> dict[str, Any]:
    """The `result.json` in a run's folder."""
    try:
        return json.loads((path / "result.json").read_bytes())
    except ValueError:
        raise UserError(f"{path / 'result.json'} is damaged: delete the folder to train this row again") from None


def read_published() -> list[dict[str, Any]]:
    """The published table, line by line in its order, from `results/published.csv`.

    A line has row, changes (the settings that differ from the row's own, as in `result.json`; {} for the row itself),
    table, technique, source, and as float or None accuracy, ece, oe (fractions; 100 bins) and best_epoch.
    """
    numbers = ("accuracy", "ece", "oe", "best_epoch")
    with open(PUBLISHED, newline="") as file:
        return [
            {
                **line,
                "changes": json.loads(line["changes"] or "{}"),
                **{name: float(line[name]) if line[name] else None for name in numbers},
            }
            for line in csv.DictReader(file)
        ]
