"""CIFAR-100 itself: `CIFAR100_DIR`, or unpacked from `shared/` beside the project; skipped where there is neither."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import adopt
from image_data import load_dataset
from run_files import read_result
from verify import TOLERANCE


@pytest.mark.slow
def test_the_real_cifar100(cifar100):
    data = load_dataset("cifar100", cifar100)  # refuses anything but CIFAR-100's fingerprint
    assert data.train_images.shape == (50_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [500] * 100
    assert data.classes[0] == "apple" and data.classes[-1] == "worm"
    pixels = data.train_images.double() / 255  # the published statistics
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor([0.50707516, 0.48654887, 0.44091784]).double())
    torch.testing.assert_close(
        pixels.std((0, 2, 3), correction=0), torch.tensor([0.26733429, 0.25643846, 0.27615047]).double()
    )
    subset = data.train_subset(5000).train_images.double() / 255
    torch.testing.assert_close(subset.mean(0), pixels.mean(0), atol=0.03, rtol=0)  # at every pixel, the first ones too


@pytest.mark.slow
def test_a_row_of_real_images_from_the_command_line(cifar100, tmp_path):
    """The command a user types, on five images a class to train with and five to test with."""
    for folder in cifar100.glob("t*/*/"):
        copy = tmp_path / "images" / folder.relative_to(cifar100)
        copy.mkdir(parents=True)
        for image in sorted(folder.iterdir())[:5]:
            (copy / image.name).symlink_to(image)
    command = [sys.executable, ROOT / "recipes" / "student_baseline.py", "--dataset", "folder", "--epochs", "1"]
    command += ["--data-dir", tmp_path / "images", "--results-dir", tmp_path / "results"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    result = json.loads(next(tmp_path.glob("results/paper/*/*/result.json")).read_text())
    assert len(result["classes"]) == 100
    line = f"best (epoch 1)          {result['best']['accuracy']:.2%}"
    assert line.split() in [printed.split()[:4] for printed in done.stdout.splitlines()]
    assert result["last"]["nll"] == pytest.approx(np.log(100), abs=1.5)


@pytest.mark.slow
def test_published_weights_that_are_adopted_have_their_numbers(cifar100, tmp_path):
    folder = ROOT / "results/small/student_baseline/seed0"
    here = dict(data_dir=cifar100, results_dir=tmp_path, wandb_mode="disabled")
    adopt.main(adopt.Config(row=folder.parts[-2], weights=folder / "model.fp16.safetensors", protocol="small", **here))
    theirs, ours = (read_result(path)["last"] for path in (folder, tmp_path / folder.relative_to(ROOT / "results")))
    for metric, tolerance in TOLERANCE.items():
        assert ours[metric] == pytest.approx(theirs[metric], abs=tolerance), metric
