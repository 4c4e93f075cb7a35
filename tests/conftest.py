import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin make a busy machine crawl
os.environ.pop("MPLBACKEND", None)  # of a notebook that runs the tests
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere; a real GPU is asked by benchmarks/new_gpu.py
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a test process for every core

import numpy as np
import pytest
import torch
from PIL import Image

import common
from run_files import read_published

ROOT = Path(common.__file__).parent
ROWS = sorted({line["row"] for line in read_published()})  # of the table; there may be other recipes of one's own


@pytest.fixture(autouse=True)
def quiet_and_seeded(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    common.seed_everything(0, 0)
    common._shared_dataset.cache_clear()


@pytest.fixture(scope="session")
def cifar100(tmp_path_factory) -> Path:
    """The real CIFAR-100 as an image folder: `CIFAR100_DIR`, or unpacked from `shared/` beside the project."""
    if "CIFAR100_DIR" in os.environ:
        return Path(os.environ["CIFAR100_DIR"])
    unpack = ROOT.parent / "shared" / "cifar100" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("no real CIFAR-100 here: set CIFAR100_DIR to a folder with {train,test}/<class>/*.png")
    folder = tmp_path_factory.mktemp("cifar100")
    subprocess.run([sys.executable, unpack, folder], check=True)
    return folder


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three classes of noise images, 20 x 24: 8 for training and 4 for testing in each."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("ant", "bee", "cat"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def digits() -> torch.Tensor:
    """64 real images, uint8 (64, 3, 16, 16), and their labels."""
    data = common.load_dataset("digits", Path())
    index = torch.randperm(len(data.train_labels))[:64]
    return data.train_images[index], data.train_labels[index]


def run_row(row: str, results_dir: Path, **settings) -> tuple[dict, Path]:
    """One row on a few digits. Returns its result and its folder."""
    main = common.load_recipe(row)
    tiny = dict(protocol="smoke", epochs=1, train_size=96, results_dir=results_dir)
    cfg = common.config_type(main)(**{**tiny, **settings})
    return common.run_row(row, main, cfg), common.Run(row, cfg).path


class Linear(torch.nn.Linear):
    """A model whose logits are easy to have: four inputs, flattened, to five classes."""

    num_classes, in_chans = 5, 1

    def __init__(self):
        super().__init__(4, 5)
        self.pretrained_cfg = dict(mean=(0.0,), std=(1.0,))

    def forward(self, x):
        return super().forward(x.flatten(1)) * 5


class RecordingRun:
    """Stands in for `common.Run` and keeps what a recipe builds."""

    num_classes = 10

    def create_model(self, name):
        self.model = name
        return Linear()

    def teacher(self, *rows):
        self.teachers = rows
        return common.Teacher(*(Linear() for _ in rows))

    def fit(self, task, augment):
        self.task, self.augment = task, augment


THREE_STEPS = dict(epochs=3, train_size=96, batch_size=32)  # three steps an epoch


class Killed(Exception):
    pass


def die() -> None:
    raise Killed


def in_epoch(monkeypatch, epoch: int, steps_an_epoch: int = 3, do=die) -> None:
    """Have something happen in the second step of an epoch, or in its only one: the training loop dies."""
    real = common.Standard.__call__
    steps = []

    def augment(self, images, labels):
        steps.append(1)
        if len(steps) == steps_an_epoch * (epoch - 1) + min(2, steps_an_epoch):
            do()
        return real(self, images, labels)

    monkeypatch.setattr(common.Standard, "__call__", augment)
