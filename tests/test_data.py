import dataclasses
import errno
import functools
import hashlib
import itertools
import os
import pickle
import shutil
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR100

import image_data
from image_data import Dataset, load_dataset, read_image
from run_files import UserError


def assert_equal(a: Dataset, b: Dataset) -> None:
    assert a.classes == b.classes and a.fingerprint == b.fingerprint
    assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_digits_are_scikit_learns():
    data = load_dataset("digits", Path("nowhere"))
    assert data.train_images.shape == (1437, 3, 16, 16) and data.test_images.shape == (360, 3, 16, 16)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    counts = data.train_labels.bincount() + data.test_labels.bincount()
    assert counts.tolist() == np.bincount(load_digits().target).tolist()
    assert data.train_images.float().mean() / 255 == pytest.approx(load_digits().images.mean() / 16, abs=0.01)


def test_image_folder(image_folder):
    data = load_dataset("folder", image_folder, image_size=16)
    assert data.classes == ("ant", "bee", "cat")
    assert data.train_images.shape == (24, 3, 16, 16) and data.train_labels.bincount().tolist() == [8, 8, 8]
    assert data.test_images.shape == (12, 3, 16, 16) and data.test_labels.bincount().tolist() == [4, 4, 4]
    assert load_dataset("folder", image_folder, image_size=20).test_images.shape[-1] == 20  # not from the other's cache


def test_image_folder_pixels_are_the_files(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for split, name in itertools.product(("train", "test"), ("one", "two")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / split / name / "a.png")
    data = load_dataset("folder", tmp_path)
    np.testing.assert_array_equal(data.train_images[0].permute(1, 2, 0), image)


def test_a_second_start_reads_the_cache_and_changed_images_do_not(image_folder, monkeypatch):
    first = load_dataset("folder", image_folder)
    with monkeypatch.context() as patch:
        patch.setattr(image_data, "_read_folder", lambda *args: pytest.fail("decoded again"))
        assert_equal(load_dataset("folder", image_folder), first)
    Image.new("RGB", (20, 24)).save(image_folder / "train" / "ant" / "0.png")
    changed = load_dataset("folder", image_folder)
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", [0, 100, 3000, b"\x2d\x00"])
def test_a_broken_cache_is_read_past(image_folder, damage):
    first = load_dataset("folder", image_folder)
    cache = image_folder / "folder-32px.npz"
    if isinstance(damage, int):
        os.truncate(cache, damage)
    else:  # the version that zip needs, at first 4.5
        cache.write_bytes(cache.read_bytes().replace(damage, b"\x6d\x00"))
    assert_equal(load_dataset("folder", image_folder), first)
    assert_equal(image_data._read_cache(cache, image_data._listing(image_folder, ["train", "test"])), first)


def test_of_starts_side_by_side_one_decodes(image_folder, monkeypatch, capsys):
    decoded, real = [], image_data._read_folder

    def slowly(*args):
        decoded.append(1)
        time.sleep(0.3)
        return real(*args)

    monkeypatch.setattr(image_data, "_read_folder", slowly)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: load_dataset("folder", image_folder), range(3))
    assert len(decoded) == 1
    for other in others:
        assert_equal(first, other)
    out, err = capsys.readouterr()
    assert "folder-32px.npz: waiting for it" in out and not err


@pytest.mark.parametrize("writable", [True, False])
def test_images_whose_cache_cannot_be_written_cost_a_warning(writable, image_folder, monkeypatch, capsys):
    def refuse(path):
        raise OSError(28, "No space left on device")

    before = sorted(image_folder.iterdir())
    monkeypatch.setattr(image_data, "atomic_write", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: writable)  # tests may run as root, whom nothing is denied
    assert len(load_dataset("folder", image_folder).train_labels) == 24
    assert "not cached" in capsys.readouterr().err
    assert writable or sorted(image_folder.iterdir()) == before


def test_torchvisions_files_and_an_image_folder_give_the_same_bits(image_folder, tmp_path, monkeypatch):
    """Two classes in torchvision's own pickles, and the same images as files in another order."""
    as_folder = load_dataset("folder", image_folder)
    files = tmp_path / "torchvision" / "cifar-100-python"
    files.mkdir(parents=True)
    random = np.random.default_rng(1)
    for split in ("train", "test"):
        images, labels = getattr(as_folder, f"{split}_images").numpy(), getattr(as_folder, f"{split}_labels").tolist()
        order = random.permutation(len(labels))
        entry = {"data": images[order].reshape(len(labels), -1), "fine_labels": [labels[i] for i in order]}
        (files / split).write_bytes(pickle.dumps(entry))
    (files / "meta").write_bytes(pickle.dumps({"fine_label_names": list(as_folder.classes)}))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
    monkeypatch.setattr(image_data, "CIFAR100_FINGERPRINT", as_folder.fingerprint)
    assert_equal(load_dataset("cifar100", files.parent), as_folder)
    assert_equal(load_dataset("cifar100", files.parent), as_folder)  # from the cache


def test_other_images_are_not_cifar100(image_folder):
    with pytest.raises(UserError, match=r"images is not CIFAR-100: 24 training .* --dataset folder"):
        load_dataset("cifar100", image_folder)


def test_missing_folder_names_itself_and_the_flag(tmp_path):
    with pytest.raises(UserError, match=r"no images in .*/here.*train/<class>/<image>.*--data-dir"):
        load_dataset("folder", tmp_path / "here")


@functools.cache
def archive() -> bytes:
    """An archive as CIFAR-100's, of four images."""
    split = {"data": np.arange(4 * 3072).astype(np.uint8).reshape(4, -1), "fine_labels": [0, 1, 0, 1]}
    contents = {"train": split, "test": split, "meta": {"fine_label_names": ["ant", "bee"]}}
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in contents.items():
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    return stream.getvalue()


class Server(BaseHTTPRequestHandler):
    """Answers in the way that the address names."""

    def do_GET(self):
        kind, data = self.path.split("/")[1], archive()
        if kind == "stalls":
            time.sleep(2)
        self.send_response(404 if kind == "refuses" else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if kind != "refuses":
            self.wfile.write({"cut": data[:100], "damaged": data[::-1]}.get(kind, data))

    def log_message(self, *args):
        pass


@pytest.fixture
def download(monkeypatch):
    """Have torchvision download from a server of ours, which answers in the way that is asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(image_data, "DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive()).hexdigest())
    yield lambda kind: monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{kind}/a.tar.gz")
    server.shutdown()


def test_a_proxy_that_is_no_address_is_named(tmp_path, monkeypatch):
    """http.client's errors are no OSErrors."""
    monkeypatch.setattr(CIFAR100, "url", "http://localhost:port/a.tar.gz")
    with pytest.raises(UserError, match=r"could not be downloaded.*port"):
        load_dataset("cifar100", tmp_path)


def test_a_link_to_no_image_is_named(image_folder):
    (image_folder / "train" / "ant" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"gone.png cannot be read: No such file or directory \(--data-dir\)"):
        load_dataset("folder", image_folder, 20)


@pytest.mark.parametrize("kind", ["refuses", "stalls", "cut", "damaged", "no server"])
def test_a_download_that_fails_leaves_nothing_and_says_how_to_go_on(kind, tmp_path, monkeypatch, download):
    download(kind)
    if kind == "no server":
        monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/a.tar.gz")
    with pytest.raises(UserError, match=r"could not be downloaded.*--data-dir.*--protocol smoke"):
        load_dataset("cifar100", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cifar-100-python.lock"]


def test_a_download_arrives_whole(tmp_path, monkeypatch, download):
    download("works")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
    monkeypatch.setattr(image_data, "CIFAR100_FINGERPRINT", None)
    (tmp_path / ".download-killed").mkdir()  # what kill -9 leaves
    with pytest.raises(UserError, match="is not CIFAR-100: 4 training and 4 test images of 2 classes"):
        load_dataset("cifar100", tmp_path)
    locks = [".cifar-100-python.lock", ".cifar100-32px.npz.lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*locks, "cifar-100-python"]


def test_damaged_torchvision_files(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cifar-100-python is incomplete or damaged: delete it"):
        load_dataset("cifar100", tmp_path)


def test_damaged_images_are_named_not_skipped(image_folder):
    os.truncate(image_folder / "test" / "bee" / "2.png", 200)
    with pytest.raises(UserError, match=r"cannot read the image .*test/bee/2.png: .*: replace or delete this file$"):
        load_dataset("folder", image_folder)
    for name in ("train/ant/0.png", "train/cat/1.png"):
        os.truncate(image_folder / name, 200)
    with pytest.raises(UserError, match=r"ant/0.png: .*; 2 more cannot be read: .*/cat/1.png, .*/test/bee/2.png$"):
        load_dataset("folder", image_folder)


def test_one_class_is_nothing_to_learn(image_folder):
    for name in ("train/ant", "train/bee", "test/ant", "test/bee"):
        shutil.rmtree(image_folder / name)
    with pytest.raises(UserError, match="images of one class, cat: nothing to tell apart"):
        load_dataset("folder", image_folder)


def test_a_folder_that_cannot_be_read_is_named_not_skipped(image_folder, monkeypatch):
    """Behind `os.walk`, which leaves such folders out: whoever runs the tests may be allowed to read everything."""
    scandir = os.scandir

    def refused(folder):
        if str(folder).endswith("cat"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"train/cat cannot be read: Permission denied \(--data-dir\)"):
        load_dataset("folder", image_folder)


def test_splits_with_other_classes(image_folder):
    (image_folder / "test" / "cat").rename(image_folder / "test" / "dog")
    with pytest.raises(UserError, match=r"folders: .*test has no images of cat; .*train has no images of dog"):
        load_dataset("folder", image_folder)
    shutil.rmtree(image_folder / "test")
    (image_folder / "test").mkdir()
    with pytest.raises(UserError, match=r"no images in .*/test"):
        load_dataset("folder", image_folder)


def test_photos_are_upright_as_their_camera_says(tmp_path):
    photo = Image.new("RGB", (20, 20), "black")
    photo.paste("white", (0, 0, 10, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored on the left belongs on top
    photo.save(tmp_path / "photo.png", exif=exif)
    image = read_image(tmp_path / "photo.png", 20)
    assert image.shape == (3, 20, 20) and image.dtype == torch.uint8
    assert (image[:, :10] == 255).all() and (image[:, 10:] == 0).all()


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "RGB"), ("a.jpeg", "CMYK"), ("a.png", "L"), ("b.png", "P"), ("a.webp", "RGBA")]
)
def test_images_become_rgb_and_their_middle_is_resized(name, mode, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / name)
    image = read_image(tmp_path / name, 10)
    with Image.open(tmp_path / name) as stored:
        pixels = np.asarray(stored.convert("RGB"), float)

    def halved(start: int, length: int) -> np.ndarray:
        """PIL's bilinear filter: of four pixels 1, 3, 3 and 1 eighths, and at the image's border those that it has."""
        weights = np.zeros((10, length + 2))
        for i in range(10):
            weights[i, start + 2 * i :][:4] = 1, 3, 3, 1
        return weights[:, 1:-1] / weights[:, 1:-1].sum(1, keepdims=True)

    expected = np.einsum("iy,yxc,jx->cij", halved(0, 20), pixels, halved(14, 48))
    assert np.abs(image.numpy() - expected).max() < 1.5


def test_an_image_of_16_bits_is_refused_for_it_would_be_white(image_folder):
    Image.fromarray(np.full((20, 24), 30_000, np.uint16)).save(image_folder / "train" / "ant" / "9.png")
    with pytest.raises(UserError, match=r"train/ant/9.png: its pixels are of mode I;16: convert it to 8 bits"):
        load_dataset("folder", image_folder)


def test_an_image_too_large_to_unpack_is_named(image_folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"cannot read the image .*train/ant/0.png: .*decompression bomb"):
        load_dataset("folder", image_folder)


@pytest.mark.parametrize("place", ["train/stray.png", "train/ant/small/deep.png"])
def test_an_image_that_lies_in_no_class_is_named(place, image_folder):
    file = image_folder / place
    file.parent.mkdir(exist_ok=True)
    shutil.copy(image_folder / "train" / "ant" / "0.png", file)
    with pytest.raises(
        UserError, match=rf"{place} is not in the folder of a class: .*train should hold <class>/<image>"
    ):
        load_dataset("folder", image_folder)


def test_what_is_no_image_is_counted_and_what_is_hidden_is_not(image_folder, capsys):
    plain = load_dataset("folder", image_folder)
    out, err = capsys.readouterr()
    assert "24 training and 12 test images of 3 classes" in out and not err
    for name in ("1.gif", "2.GIF", "notes.txt", "README", "._0.png"):
        (image_folder / "train" / "ant" / name).write_bytes(b"none")
    (image_folder / "test" / ".checkpoints").mkdir()
    shutil.copy(image_folder / "train" / "ant" / "0.png", image_folder / "test" / ".checkpoints")
    assert_equal(load_dataset("folder", image_folder), plain)
    assert capsys.readouterr().err.rstrip().endswith("not read as images: 2 .gif, 1 without a suffix, 1 .txt")


def test_changes_behind_a_link_are_noticed(image_folder, tmp_path):
    (image_folder / "train" / "ant").rename(tmp_path / "elsewhere")
    (image_folder / "train" / "ant").symlink_to(tmp_path / "elsewhere")
    before = load_dataset("folder", image_folder)
    Image.new("RGB", (20, 24)).save(tmp_path / "elsewhere" / "new.png")
    after = load_dataset("folder", image_folder)
    assert (len(before.train_labels), len(after.train_labels)) == (24, 25)


def test_a_class_is_never_held_out_whole():
    labels = torch.tensor([0] * 98 + [1] * 2)
    images = torch.arange(100 * 3, dtype=torch.uint8).view(100, 3, 1, 1)
    data = Dataset(("many", "few"), images, labels, images, labels)
    assert len(data.hold_out(50, 0).val_labels) == 50
    for seed in range(20):
        assert (data.hold_out(20, seed).train_labels == 1).any()
    with pytest.raises(UserError, match="--val-size 90 cannot be held out of 100 training images"):
        data.hold_out(90, 0)


def test_a_fingerprint_tells_apart_all_that_a_run_is_trained_and_measured_on():
    images, labels = torch.arange(12, dtype=torch.uint8).view(4, 3, 1, 1), torch.tensor([0, 0, 1, 1])
    data = Dataset(("a", "b"), images, labels, images, labels)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    changes = [{name: getattr(data, name).flip(0)} for name in names] + [{"classes": ("a", "c")}]
    assert len({of.fingerprint for of in (data, *(dataclasses.replace(data, **change) for change in changes))}) == 6


def test_train_subset_is_even_over_the_classes():
    data = load_dataset("digits", Path())
    subset = data.train_subset(103)
    counts = subset.train_labels.bincount()
    assert counts.sum() == 103 and counts.max() - counts.min() == 1
    assert torch.equal(subset.test_images, data.test_images)
    rows = {row.numpy().tobytes() for row in data.train_images}
    assert all(row.numpy().tobytes() in rows for row in subset.train_images)
    assert subset.fingerprint != data.fingerprint


def test_train_subset_is_drawn_from_all_of_a_class():
    """In the order that the images have, the first of a class are the dark ones."""
    data = load_dataset("digits", Path())
    subset = data.train_subset(500)
    place = {image.numpy().tobytes(): i for i, image in enumerate(data.train_images)}
    first = data.train_labels.bincount().cumsum(0) - data.train_labels.bincount()
    places = torch.tensor([place[image.numpy().tobytes()] for image in subset.train_images])
    share = (places - first[subset.train_labels]) / data.train_labels.bincount()[subset.train_labels]
    assert share.mean() == pytest.approx(0.5, abs=0.04) and share.std() == pytest.approx(12**-0.5, abs=0.03)
    assert torch.equal(data.train_subset(500).train_images, subset.train_images)


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_names_that_are_not_utf8(image_folder):
    os.rename(image_folder / "train" / "bee", os.fsencode(image_folder / "train") + b"/b\xe4r")
    with pytest.raises(UserError, match=r"b\\udce4r/0\.png' has a name that is not UTF-8: rename it"):
        load_dataset("folder", image_folder)
