"""The images: read from wherever they are, decoded once, cached, held as tensors.

An epoch then needs no files and no worker processes.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from run_files import UserError, atomic_write, locked

# Not all that Pillow reads: whatever a file is called, it would have EPS run by Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
DOWNLOAD_TIMEOUT = 60  # seconds without a byte
CIFAR100_FINGERPRINT = "4734d03245d994a761d6feb843dc22d250ad01e13a1e824ea154be297ba6050a"


@dataclass(frozen=True)
class Dataset:
    """Images and labels of both splits, decoded once, on one device.

    Images are uint8 (N, 3, H, W), labels int64 (N,). Within a split they are ordered by label, then pixels,
    so that every source of the same images gives the same tensors. Validation images are there only once `hold_out`
    has taken them from the training images.
    """

    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    val_images: Tensor | None = None
    val_labels: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Images and labels for training and testing and, where there are any, those held out."""
        held_out = () if self.val_images is None else (self.val_images, self.val_labels)
        return self.train_images, self.train_labels, self.test_images, self.test_labels, *held_out

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over class names, images and labels: the identity of what a run was trained on."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for tensor in self.tensors:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Dataset":
        """The same dataset, on that device."""
        return Dataset(self.classes, *(tensor.to(device) for tensor in self.tensors))

    def train_subset(self, size: int) -> "Dataset":
        """The same dataset with `size` training images, as evenly over the classes as they divide.

        Drawn at random, the same ones every time: the first of a class, in the order that its images have here, would
        be those with a dark corner.
        """
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(0))
        rank_in_class = torch.zeros_like(order)
        for label in range(len(self.classes)):
            members = order[self.train_labels[order] == label]
            rank_in_class[members] = torch.arange(len(members))
        keep = rank_in_class.argsort(stable=True)[:size].sort().values
        return dataclasses.replace(self, train_images=self.train_images[keep], train_labels=self.train_labels[keep])

    def hold_out(self, size: int, seed: int) -> "Dataset":
        """The same dataset with `size` training images held out for validation: drawn by `seed`, classes in proportion,
        so that of a rare one there may be none.

        Raises:
            UserError: there are fewer images than that, or classes that would have none left to train on.
        """
        from sklearn.model_selection import train_test_split

        images, labels = self.train_images, self.train_labels
        try:
            train, val = train_test_split(
                np.arange(len(labels)), test_size=size, stratify=labels.cpu().numpy(), random_state=seed % 2**32
            )
            if len(labels[train].unique()) < len(self.classes):
                raise ValueError
        except ValueError:
            raise UserError(
                f"--val-size {size} cannot be held out of {len(labels)} training images: each class needs 2 or more "
                f"and keeps one to train on, and both parts need as many images as classes ({len(self.classes)})"
            ) from None
        train, val = (torch.from_numpy(index).sort().values for index in (train, val))
        return dataclasses.replace(
            self, train_images=images[train], train_labels=labels[train], val_images=images[val], val_labels=labels[val]
        )


def load_dataset(name: str, data_dir: Path, image_size: int = 32) -> Dataset:
    """Read a dataset, from its cache in `data_dir` if there is one for the files as they are now.

    Args:
        name: `cifar100` (an image folder or torchvision's files in `data_dir`, else its download), `folder`
            (an image folder, `{train,test}/<class>/<image>`) or `digits` (comes with scikit-learn).
        data_dir: where the files are, or go.
        image_size: side in pixels to which `folder` images are resized and centre-cropped.

    Raises:
        UserError: missing, incomplete or unreadable data.
    """
    if name == "digits":
        return _read_digits()
    is_folder = (data_dir / "train").is_dir() and (data_dir / "test").is_dir()
    if name == "folder" and not is_folder:
        raise UserError(
            f"no images in {data_dir}: it should hold train/<class>/<image> and test/<class>/<image> (--data-dir)"
        )
    if not is_folder and not (data_dir / "cifar-100-python").is_dir():
        _download_cifar100(data_dir)

    listing = _listing(data_dir, ["train", "test"] if is_folder else ["cifar-100-python"])
    cache = data_dir / f"{name}-{image_size}px.npz"
    dataset = _read_cache(cache, listing)
    if dataset is None:
        # Of runs that start side by side one decodes and the others wait for its cache, unless there can be none.
        with locked(cache) if os.access(data_dir, os.W_OK) else nullcontext():
            dataset = _read_cache(cache, listing)
            if dataset is None:
                dataset = _read_folder(data_dir, image_size) if is_folder else _read_torchvision(data_dir)
                if name == "cifar100" and dataset.fingerprint != CIFAR100_FINGERPRINT:
                    raise UserError(
                        f"{data_dir} is not CIFAR-100: {len(dataset.train_labels)} training and "
                        f"{len(dataset.test_labels)} test images of {len(dataset.classes)} classes, not exactly its "
                        "50000, 10000 and 100; use --dataset folder for other images, or another --data-dir"
                    )
                _write_cache(cache, dataset, listing)
    return dataset


def _files(root: Path) -> list[str]:
    """All files below a folder, behind links too, in order. Not the hidden ones that macOS and notebooks leave."""

    def refuse(error: OSError) -> None:  # else the images in there would be left out without a word
        raise UserError(f"{error.filename} cannot be read: {error.strerror} (--data-dir)")

    found = []
    for parent, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _listing(root: Path, folders: list[str]) -> str:
    """Hash of names, sizes and times of all files: changes when the images may have."""
    digest = hashlib.sha256()
    for file in (file for folder in folders for file in _files(root / folder)):
        try:
            stat = os.stat(file)
            digest.update(f"{os.path.relpath(file, root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        except UnicodeEncodeError:  # unpacked from an archive of another system
            raise UserError(f"{file!a} has a name that is not UTF-8: rename it (--data-dir)") from None
        except OSError as error:  # a link to what is not there
            raise UserError(f"{file} cannot be read: {error.strerror} (--data-dir)") from None
    return digest.hexdigest()


def _read_cache(path: Path, listing: str) -> Dataset | None:
    try:
        with np.load(path) as arrays:
            if str(arrays["listing"]) != listing:
                return None
            tensors = [
                torch.from_numpy(arrays[key]) for key in ("train_images", "train_labels", "test_images", "test_labels")
            ]
            return Dataset(tuple(arrays["classes"].tolist()), *tensors)
    except Exception:  # zipfile raises many kinds
        return None  # not there, or not whole: the images themselves are read again


def _write_cache(path: Path, dataset: Dataset, listing: str) -> None:
    arrays = dict(zip(("train_images", "train_labels", "test_images", "test_labels"), dataset.tensors, strict=True))
    try:
        with atomic_write(path) as file:
            np.savez(
                file, listing=listing, classes=np.array(dataset.classes), **{k: v.numpy() for k, v in arrays.items()}
            )
    except OSError as error:
        print(f"warning: the decoded images are not cached, so every start decodes them: {error}", file=sys.stderr)


def _sorted_dataset(classes: Sequence[str], splits: Sequence[tuple[np.ndarray, np.ndarray]]) -> Dataset:
    """From (images (N, H, W, 3) uint8, labels (N,)) for train and test."""
    tensors = []
    for images, labels in splits:
        order = sorted(range(len(labels)), key=lambda i: (labels[i], images[i].tobytes()))
        tensors += [torch.from_numpy(images[order].transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels[order])]
    return Dataset(tuple(classes), *tensors)


def _read_digits() -> Dataset:
    """The 1,797 handwritten digits (8 x 8) that come with scikit-learn, enlarged to 16 x 16; every fifth is test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images]
    images = np.stack(
        [np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)) for image in images]
    )
    labels, test = digits.target.astype(np.int64), np.arange(len(images)) % 5 == 0
    splits = [(images[~test], labels[~test]), (images[test], labels[test])]
    return _sorted_dataset([str(i) for i in range(10)], splits)


def read_image(file: str | Path, size: int) -> Tensor:
    """An image as `--dataset folder` sees it: upright, in RGB, resized and centre-cropped to a square.

    Args:
        file: in one of the `FORMATS`, of 8 bits a channel.
        size: side in pixels, as the model's --image-size.

    Returns:
        uint8 (3, size, size); several of them stacked are what `normalize` takes.

    Raises:
        UserError: the file is damaged, or is no such image.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.mode[0] in "IF":  # what is above 255 would become white
                raise ValueError(f"its pixels are of mode {image.mode}: convert it to 8 bits a channel")
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises many kinds, of EXIF data struct.error and TypeError too
        raise UserError(f"cannot read the image {file}: {error}: replace or delete this file") from None
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _find_images(root: Path) -> dict[str, list[str]]:
    """The image files of each class. What is no image is counted in a warning.

    Raises:
        UserError: no images, or some that are not in a class's folder.
    """
    files, classes, skipped = _files(root), {}, Counter()
    for file in files:
        folder, *rest = os.path.relpath(file, root).split(os.sep)
        suffix = os.path.splitext(file)[1].lower()
        if suffix not in IMG_EXTENSIONS:
            skipped[suffix or "without a suffix"] += 1
        elif len(rest) == 1:
            classes.setdefault(folder, []).append(file)
        else:
            raise UserError(f"{file} is not in the folder of a class: {root} should hold <class>/<image> (--data-dir)")
    if not classes:
        raise UserError(f"no images in {root}: it needs <class>/<image> {IMG_EXTENSIONS} (--data-dir)")
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
        print(f"warning: in {root}, files of these kinds are not read as images: {kinds}", file=sys.stderr)
    return dict(sorted(classes.items()))


def _read_folder(data_dir: Path, image_size: int) -> Dataset:
    train, test = (_find_images(data_dir / split) for split in ("train", "test"))
    if train.keys() != test.keys():
        odd = {"test": sorted(train.keys() - test.keys()), "train": sorted(test.keys() - train.keys())}
        lacking = [f"{data_dir / split} has no images of {', '.join(odd[split][:5])}" for split in odd if odd[split]]
        raise UserError(f"train and test differ in their class folders: {'; '.join(lacking)} (--data-dir)")
    if len(train) == 1:
        raise UserError(f"{data_dir} has images of one class, {min(train)}: nothing to tell apart (--data-dir)")
    splits, unread = [], {}
    for split, found in (("train", train), ("test", test)):
        files = [file for files in found.values() for file in files]
        images = np.empty((len(files), image_size, image_size, 3), np.uint8)
        for i, file in enumerate(tqdm(files, f"decoding {split}", unit=" images", disable=None, leave=False)):
            try:
                images[i] = read_image(file, image_size).permute(1, 2, 0)
            except UserError as error:  # all are tried, for decoding takes long
                unread[file] = error
        splits.append((images, np.repeat(np.arange(len(found)), [len(files) for files in found.values()])))
    if unread:
        first, *others = unread
        more = f"; {len(others)} more cannot be read: {', '.join(others[:5])}" if others else ""
        raise UserError(f"{unread[first]}{more}")
    (_, train_labels), (_, test_labels) = splits
    print(f"{data_dir}: {len(train_labels):,} training and {len(test_labels):,} test images of {len(train)} classes")
    return _sorted_dataset(list(train), splits)


def _read_torchvision(data_dir: Path) -> Dataset:
    from torchvision.datasets import CIFAR100

    try:
        train, test = (CIFAR100(str(data_dir), train=is_train) for is_train in (True, False))
    except RuntimeError:
        folder = data_dir / "cifar-100-python"
        raise UserError(
            f"{folder} is incomplete or damaged: delete it to download it again, or name another --data-dir"
        ) from None
    splits = [(split.data, np.array(split.targets, np.int64)) for split in (train, test)]
    return _sorted_dataset(train.classes, splits)


def _download_cifar100(data_dir: Path) -> None:
    """Put `cifar-100-python` into `data_dir`, whole or not at all."""
    from torchvision.datasets import CIFAR100

    folder, timeout = data_dir / "cifar-100-python", socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with locked(folder):
            if folder.is_dir():  # another process had it downloaded meanwhile
                return
            print(f"CIFAR-100 is not in {data_dir} (--data-dir): downloading it (169 MB)")
            for unfinished in data_dir.glob(".download-*"):  # of a process that was killed
                shutil.rmtree(unfinished)
            with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary:
                CIFAR100(temporary, download=True)
                os.replace(Path(temporary, folder.name), folder)
    except (OSError, RuntimeError, HTTPException) as error:  # a wrong checksum is a RuntimeError
        raise UserError(
            f"CIFAR-100 is not in {data_dir} and could not be downloaded ({error}): point --data-dir at a folder "
            "with cifar-100-python/ or {train,test}/<class>/<image>; recipes with --protocol smoke need no download"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
