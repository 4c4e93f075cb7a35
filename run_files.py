"""The files of a run: atomic writes, readers that check what they read, a lock for each run's folder, and `UserError`,
the error that tells a person what to do."""

import csv
import errno
import hashlib
import json
import math
import os
import shlex
import socket
import typing
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import filelock

if typing.TYPE_CHECKING:  # tools that only read results start without torch
    import numpy as np
    from torch import Tensor

PUBLISHED_CSV = Path(__file__).resolve().parent / "results" / "published.csv"
CHOICES = ("best", "last", "selected")  # the epochs that a run reports; the last of them with --val-size alone

# Files small enough to be published, in half precision, by what they stand in for. Of probabilities it is the
# logarithms, since half precision has nothing between 0 and 6e-8.
HALF = {"model.safetensors": "model.fp16.safetensors", "probabilities.npz": "log_probabilities.fp16.npz"}


class UserError(Exception):
    """Something the person at the keyboard can mend. The command line shows it as one line and exits with 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its type, if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever the body raises into a `UserError` that names the file: torch, numpy and zipfile raise many kinds
    of errors when a file is damaged."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except PermissionError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be used: {first_line(error)}") from None


@contextmanager
def atomic_write(path: Path, keep: Path | None = None) -> Iterator[typing.BinaryIO]:
    """Open a file that appears under its name only once it is whole and on the disk. What had the name before is then
    called `keep`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # writing to a full disk names no file
        raise
    if os.name == "posix":  # the names are on the disk once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF):  # no folder can be synced there: VirtualBox, older SMB
                raise
        finally:
            os.close(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, or a file; while another process does, say which one and wait for it.

    The lock is `flock`'s on a file beside the folder: the kernel lets go of it when its process dies, however it dies.
    Over NFS it holds between machines as well; where a file system has no such locks, filelock falls back to the
    file's existence, with process and machine in it.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, mode=0o666)  # for others too who may write in this folder, whatever our umask
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        process, host, *_ = [*path.read_text().splitlines(), "?", "?"]
        print(f"process {process} on {host} is at work in {folder}: waiting for it")
        lock.acquire(poll_interval=0.5)
    try:
        with suppress(OSError):  # only whoever waits is told less
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def save_weights(path: Path, weights: "dict[str, Tensor]") -> None:
    """Write a model's weights as safetensors; of a tensor that has two names, a copy under either."""
    import safetensors.torch

    with atomic_write(path) as file:
        file.write(safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in weights.items()}))


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(path: Path) -> "dict[str, Tensor]":
    """A model's weights, from safetensors.

    Raises:
        UserError: the file is damaged, or its weights are not finite.
    """
    import safetensors.torch

    with reading(path):
        weights = safetensors.torch.load_file(path)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("it has weights that are not finite")
    return weights


def load_probabilities(path: Path) -> "dict[str, np.ndarray]":
    """What a run's `probabilities.npz` holds: `labels` (n,), and under the other names predictions (n, classes).

    Of `log_probabilities.fp16.npz`, which holds their logarithms in half precision, the same, with or without `last`.

    Raises:
        UserError: the file is damaged, or its numbers are no probabilities of such labels.
    """
    import numpy as np

    with reading(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 1000 * 2**10 + 100 * path.stat().st_size:
                raise ValueError("it would unpack to far more than predictions do")
        with np.load(path) as file:
            arrays = dict(file)
        predictions = arrays.keys() - {"labels", "val_labels"}
        if path.name.startswith("log_"):
            for name in predictions:
                p = np.exp(arrays[name].astype(np.float64))
                arrays[name] = (p / p.sum(1, keepdims=True)).astype(np.float32)
        for name in predictions:
            p, labels = arrays[name], arrays["val_labels" if name == "val" else "labels"]
            fits = p.ndim == 2 and p.dtype.kind == "f" and labels.shape == p.shape[:1] and labels.dtype.kind == "i"
            if not fits or not ((labels >= 0) & (labels < p.shape[1])).all():
                raise ValueError(f"its {name} and labels do not fit together")
            if not ((p >= 0).all() and np.allclose(p.sum(1, dtype=np.float64), 1, rtol=0, atol=1e-3)):
                raise ValueError(f"its {name} are no probabilities")
        needed = {"best", "labels"} | ({"val"} if "selected" in arrays else set())
        if not path.name.startswith("log_"):
            needed.add("last")
        if not needed <= arrays.keys() or len(arrays["labels"]) < 2:  # two, for temperatures are cross-fitted
            raise ValueError("it lacks predictions")
    return arrays


def save_log_probabilities(folder: Path, arrays: "dict[str, np.ndarray]") -> None:
    """Write `log_probabilities.fp16.npz`, a run's predictions small enough to publish: without those of the last epoch
    where they are the best one's, or where its weights are there in half precision too, and make them again."""
    import numpy as np

    with np.errstate(divide="ignore"):
        half = {k: np.log(v).astype(np.float16) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    if (folder / HALF["model.safetensors"]).is_file() or np.array_equal(arrays["best"], arrays["last"]):
        del half["last"]
    with atomic_write(folder / HALF["probabilities.npz"]) as file:
        np.savez_compressed(file, **half)


def variant(changes: dict[str, Any]) -> str:
    """What tells a variant's names from its row's: `-` and 8 hex digits of its changes; nothing for the row itself."""
    return f"-{hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]}" if changes else ""


def flag(name: str) -> str:
    """A setting's name on the command line: val_size -> --val-size."""
    return f"--{name.replace('_', '-')}"


def flags(changes: dict[str, Any]) -> str:
    """The words that a variant adds to its recipe's command line: {"temperature": 4.0} -> --temperature 4."""

    def words(name: str, value: Any) -> Iterator[str]:
        yield flag(f"no_{name}" if value is False else name)
        for v in value if isinstance(value, list) else [value]:
            if not isinstance(v, bool):
                yield shlex.quote(str(int(v) if isinstance(v, float) and v.is_integer() else v))

    return " ".join(word for change in changes.items() for word in words(*change))


def full_name(row: str, changes: dict[str, Any]) -> str:
    """A row's name and, for a variant, its flags: what tables and titles call it."""
    return f"{row} {flags(changes)}".strip()


# What every reader of a result relies on. A run's folder is named by row, protocol and seed, never by what a file says.
RESULT = {
    "row": str, "protocol": str, "seed": int, "dataset": str, "model": (str, NoneType), "sources": list,
    "changes": dict, "best": dict, "last": dict, "settings": dict, "classes": list, "fingerprint": str,
    "files": dict,
}  # fmt: skip


def read_result(path: Path) -> dict[str, Any]:
    """The `result.json` in a run's folder.

    Raises:
        UserError: it is not whole, or not the result of a run.
    """
    file = path / "result.json"
    try:
        result = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged: start this row over (--overwrite), or name another run") from None
    wrong = [
        key for key, kind in RESULT.items() if not isinstance(result, dict) or not isinstance(result.get(key), kind)
    ]
    if wrong:
        raise UserError(f"{file} is no result, for its {wrong[0]} is missing or wrong: use --overwrite or another run")
    return result


def files_for(needed: str, result: dict[str, Any]) -> list[str]:
    """The names of a finished run's files that serve where others need `needed`, the most exact first.

    Where all choices are of one epoch, as `best` and `last` after a short training are, that epoch's weights serve for
    its predictions too.
    """
    names = [needed, HALF[needed]]
    choices = [result[name] for name in CHOICES if isinstance(result.get(name), dict)]
    same = all(choice.get("epoch") == choices[0].get("epoch") for choice in choices)
    if needed == "probabilities.npz" and result["model"] and same:
        names += ["model.safetensors", HALF["model.safetensors"]]
    return names


def csv_text(lines: Sequence[dict[str, Any]]) -> str:
    """A table with a header, from its lines; not empty."""
    text = StringIO()
    columns = dict.fromkeys(chain.from_iterable(lines))  # of a recipe that was edited midway, later lines have others
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """`csv_text` as a file."""
    with atomic_write(path) as file:
        file.write(csv_text(lines).encode())


def read_csv(path: Path, columns: Sequence[str] = ("epoch", "lr", "accuracy", "ece")) -> list[dict[str, float]]:
    """What `write_csv` wrote of numbers, line by line: a run's `history.csv`, if no other columns are asked for.

    Raises:
        UserError: the file is damaged, or lacks one of the columns.
    """
    try:
        lines = csv.DictReader(StringIO(path.read_text()), strict=True)
        numbers = [{name: float(value) for name, value in line.items() if value != ""} for line in lines]
        finite = all(map(math.isfinite, chain(*(line.values() for line in numbers))))
        if not finite or not all(set(columns) <= set(names) for names in (lines.fieldnames or (), *numbers)):
            raise ValueError
    except (ValueError, TypeError, csv.Error):
        raise UserError(f"{path} is damaged: delete it, reports do not need this file") from None
    return numbers


def read_bins(path: Path) -> list[dict[str, float]]:
    """The 100 bins of a run's `reliability.csv`: count, accuracy and confidence.

    Raises:
        UserError: the file is damaged, or its numbers are none of bins.
    """
    try:
        bins = read_csv(path, ("count", "accuracy", "confidence"))
        counts = [line["count"] for line in bins]
        counted = all(n >= 0 and n.is_integer() for n in counts) and 0 < sum(counts) < 1e9
        fractions = all(0 <= line[name] <= 1 for line in bins for name in ("accuracy", "confidence"))
        if not (len(bins) == 100 and counted and fractions):
            raise UserError
    except UserError:
        raise UserError(f"{path} is damaged: delete it, and report.py --recompute writes it anew") from None
    return bins


def read_published() -> list[dict[str, Any]]:
    """The published table, line by line in its order, from `results/published.csv`.

    A line has row, changes (the settings that differ from the row's own, as in `result.json`; {} for the row itself),
    table, technique, source, and as float or None accuracy, ece, oe (fractions; 100 bins) and best_epoch.
    """
    numbers = ("accuracy", "ece", "oe", "best_epoch")
    with open(PUBLISHED_CSV, newline="") as file:
        return [
            {
                **line,
                "changes": json.loads(line["changes"] or "{}"),
                **{name: float(line[name]) if line[name] else None for name in numbers},
            }
            for line in csv.DictReader(file)
        ]
