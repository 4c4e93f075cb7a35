"""A run's progress on disk: what the same command goes on from after any kind of stop.

Two files, that of the last epoch and the one before, both plain safetensors: names, shapes and numbers, and nothing
that could run when they are read. What is not a tensor is JSON in their metadata, and so is a digest over everything,
which tells a damaged file from a whole one.
"""

import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from run_files import UserError, atomic_write, first_line

NAMES = ("checkpoint.safetensors", "checkpoint.previous.safetensors")


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state`, a nested dict of tensors and of what JSON holds; the checkpoint so far becomes the previous one.

    Tensors come back on the CPU and contiguous.

    Raises:
        ValueError: a key has a slash.
    """
    tensors, rest = _split(state)
    text = json.dumps(rest)
    metadata = {"state": text, "sha256": _digest(tensors, text)}
    path, previous = (folder / name for name in NAMES)
    with atomic_write(path, keep=previous) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def load(folder: Path) -> dict[str, Any] | None:
    """The last state that was saved whole, or None where there is none.

    A damaged checkpoint is named and the one before it used.

    Raises:
        UserError: neither is whole.
    """
    path, previous = (folder / name for name in NAMES)
    problems = []
    for file in filter(Path.is_file, (path, previous)):
        try:
            state = _read(file)
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            problems.append(f"{file} is damaged ({first_line(error)})")
            continue
        if problems:
            print(f"warning: {problems[0]}: going on from the one before", file=sys.stderr)
            os.replace(previous, path)
        return state
    if problems:
        raise UserError(f"{' and '.join(problems)}: delete {folder} to start this run over")
    return None


def remove(folder: Path) -> None:
    """Delete both files."""
    for name in reversed(NAMES):  # killed in between, nobody goes on from the one before
        (folder / name).unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    tensors = safetensors.torch.load(file.read_bytes())
    with safetensors.safe_open(file, "pt") as content:
        metadata = content.metadata()
    if metadata["sha256"] != _digest(tensors, metadata["state"]):
        raise ValueError("its digest is not that of its content")
    return _join(tensors, json.loads(metadata["state"]))


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _split(tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a nested dict by their path in it, and the rest of it."""
    tensors, rest = {}, {}
    for key, value in tree.items():
        if "/" in key:
            raise ValueError(f"a name in a checkpoint, as of a model's layer, has no slash: {key!r}")
        if isinstance(value, Tensor):  # a copy: two names may share one tensor, which the format refuses
            tensors[prefix + key] = value.detach().cpu().contiguous().clone()
        elif isinstance(value, dict):
            below, rest[key] = _split(value, f"{prefix}{key}/")
            tensors |= below
        else:
            rest[key] = value
    return tensors, rest


def _join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    for name, tensor in tensors.items():
        *parents, key = name.split("/")
        functools.reduce(dict.__getitem__, parents, rest)[key] = tensor
    return rest
