"""--val-size: what is held out, and that it alone chooses the epoch and the temperature of `selected`."""

import csv
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import common
from calibration import calibration_metrics, fit_temperature
from image_data import Dataset, load_dataset
from run_files import UserError


@pytest.fixture(scope="module")
def dataset():
    """300, 200 and 100 training images of three classes, each image its own number."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([300, 200, 100]))
    images = torch.stack([torch.arange(600) // 256, torch.arange(600) % 256, torch.zeros(600)], 1).to(torch.uint8)
    images = images[:, :, None, None].repeat(1, 1, 16, 16)
    return Dataset(("a", "b", "c"), images, labels, images[:30], labels[:30])


def numbers(images):
    return (images[:, 0, 0, 0].int() * 256 + images[:, 1, 0, 0]).tolist()


def test_split_is_disjoint_whole_and_stratified(dataset):
    split = dataset.hold_out(60, seed=0)
    assert sorted(numbers(split.train_images) + numbers(split.val_images)) == list(range(600))
    assert split.val_labels.bincount().tolist() == [30, 20, 10]
    assert split.train_labels.bincount().tolist() == [270, 180, 90]
    for images, labels in ((split.train_images, split.train_labels), (split.val_images, split.val_labels)):
        assert torch.equal(labels, dataset.train_labels[numbers(images)])  # labels go with their images
    assert torch.equal(split.test_images, dataset.test_images)


def test_split_is_the_same_for_a_seed_and_another_for_another(dataset):
    first = dataset.hold_out(60, seed=0)
    assert first.fingerprint == dataset.hold_out(60, seed=0).fingerprint
    assert len({first.fingerprint, dataset.hold_out(60, seed=1).fingerprint, dataset.fingerprint}) == 3


def test_any_seed_splits(dataset):
    assert len(dataset.hold_out(60, seed=2**40).val_labels) == 60


@pytest.mark.parametrize("size", [2, 598, 600, 10_000])
def test_split_that_leaves_a_class_empty_is_refused(dataset, size):
    with pytest.raises(UserError, match=f"--val-size {size} "):
        dataset.hold_out(size, seed=0)


@pytest.mark.parametrize("row", ["teacher_baseline", "kd_mixup", "student_ensemble"])
def test_every_row_of_a_seed_holds_out_the_same(tmp_path, row):
    def data(row, seed):
        cfg = common.config_type(common.load_recipe(row))(
            protocol="smoke", val_size=100, seed=seed, results_dir=tmp_path, device="cpu"
        )
        return common.Run(row, cfg).data

    expected = load_dataset("digits", tmp_path).hold_out(100, seed=3)
    assert data(row, 3).fingerprint == expected.fingerprint
    assert data(row, 4).fingerprint != expected.fingerprint


@dataclass(kw_only=True)
class EnsembleConfig(common.Config):
    members: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a student trained for three epochs on 200 digits, 100 others held out."""
    main = common.load_recipe("student_baseline")
    cfg = common.config_type(main)(
        protocol="smoke", epochs=3, train_size=200, val_size=100, device="cpu", wandb_mode="disabled",
        results_dir=tmp_path_factory.mktemp("results"),
    )  # fmt: skip
    common.run_row("student_baseline", main, cfg)
    return common.Run("student_baseline", cfg)


def test_validation_images_choose_the_epoch_and_the_temperature(trained):
    result = json.loads((trained.path / "result.json").read_text())
    with open(trained.path / "history.csv", newline="") as file:
        history = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]
    by_val = max(history, key=lambda line: line["val_accuracy"])  # the first of equals, as in training
    assert result["selected"]["epoch"] == by_val["epoch"]
    assert result["best"]["epoch"] == max(history, key=lambda line: line["accuracy"])["epoch"]
    for metric in ("accuracy", "ece", "oe", "nll"):
        assert result["selected"][metric] == pytest.approx(by_val[metric])
    with np.load(trained.path / "probabilities.npz") as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored}
    assert len(arrays["val"]) == 100 and torch.equal(arrays["val_labels"], trained.data.val_labels)
    val_scores = calibration_metrics(arrays["val"], arrays["val_labels"]).scores
    assert {f"val_{k}": pytest.approx(val_scores[k]) for k in ("accuracy", "nll")}.items() <= by_val.items()
    assert result["selected"]["temperatures"] == [fit_temperature(arrays["val"], arrays["val_labels"])]
    assert (trained.path / "selected.safetensors").is_file()
    assert len(trained.data.train_labels) == 200


def test_ensemble_averages_the_validation_probabilities_too(trained):
    cfg = EnsembleConfig(**{name: getattr(trained.cfg, name) for name in vars(common.Config())}, members=("x",))
    run = common.Run("student_ensemble", cfg)
    run.ensemble([str(trained.path)] * 2, [1, 3])  # the mean of a run and itself is that run
    result, member = (json.loads((path / "result.json").read_text()) for path in (run.path, trained.path))
    assert result["selected"]["temperatures"] == pytest.approx(member["selected"]["temperatures"], rel=1e-4)
    assert result["selected"]["scaled"]["nll"] == pytest.approx(member["selected"]["scaled"]["nll"], abs=1e-5)
    assert result["best"]["accuracy"] == member["best"]["accuracy"]


def test_members_with_other_held_out_images_are_refused(trained, tmp_path):
    values = {name: getattr(trained.cfg, name) for name in vars(common.Config())}
    run = common.Run("student_ensemble", EnsembleConfig(**{**values, "val_size": 90, "results_dir": tmp_path}))
    with pytest.raises(UserError, match="other images"):
        run.ensemble([str(trained.path)], [1])


def test_of_members_of_another_seed_the_seed_is_named(trained, tmp_path):
    values = {name: getattr(trained.cfg, name) for name in vars(common.Config())}
    run = common.Run("student_ensemble", EnsembleConfig(**{**values, "seed": 1, "results_dir": tmp_path}))
    with pytest.raises(UserError, match=rf"than student_ensemble is \(--seed {trained.cfg.seed}, not 1\)"):
        run.ensemble([str(trained.path)], [1])


def test_a_stopped_run_resumes_to_the_same_selection(trained, tmp_path, monkeypatch):
    main, predict, calls = common.load_recipe("student_baseline"), common.Run.predict, []
    cfg = common.config_type(main)(**{**vars(trained.cfg), "results_dir": tmp_path})

    def stop_in_third_epoch(self, model, images):
        calls.append(1)
        if len(calls) == 5:  # test and validation images in each epoch
            raise KeyboardInterrupt
        return predict(self, model, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "predict", stop_in_third_epoch)
        common.run_row("student_baseline", main, cfg)
    result = common.run_row("student_baseline", main, cfg)
    whole = json.loads((trained.path / "result.json").read_text())
    assert [result[name] for name in ("best", "last", "selected")] == [
        whole[name] for name in ("best", "last", "selected")
    ]
