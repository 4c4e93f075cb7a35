"""What a run promises: the same bits, resumed or not; nothing trained twice; no foreign teacher believed."""

import csv
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, THREE_STEPS, Killed, die, in_epoch, run_row

import calibration
import common
import rows
from consistency import errors_by_chance
from run_files import (
    HALF,
    UserError,
    csv_text,
    files_for,
    load_probabilities,
    load_weights,
    read_csv,
    read_result,
    save_log_probabilities,
    save_weights,
    sha256,
)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bits(precision, tmp_path, monkeypatch, capsys):
    settings = dict(precision=precision, **THREE_STEPS)
    result, whole = run_row("teacher_cutmix", tmp_path / "whole", **settings)
    for epoch in (3, 1):  # dies in its third epoch, then once more right after resuming
        with monkeypatch.context() as patch, pytest.raises(Killed):
            in_epoch(patch, epoch)
            run_row("teacher_cutmix", tmp_path / "killed", **settings)
    assert "resuming after epoch 2 of 3" in capsys.readouterr().out
    resumed, killed = run_row("teacher_cutmix", tmp_path / "killed", **settings)
    for name in ("model.safetensors", "best.safetensors", "probabilities.npz", "reliability.png"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    histories = [list(csv.DictReader((path / "history.csv").open())) for path in (whole, killed)]
    for line in (*histories[0], *histories[1]):
        del line["seconds"]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    assert (result["best"], result["last"]) == (resumed["best"], resumed["last"])
    assert not list(killed.glob("checkpoint*"))


def test_the_seed_decides_everything(tmp_path):
    runs = [run_row("student_baseline", tmp_path / str(i), seed=seed)[0] for i, seed in enumerate((1, 1, 2))]
    assert runs[0]["last"] == runs[1]["last"] != runs[2]["last"]


def test_every_file_is_there_and_consistent(tmp_path):
    result, path = run_row("student_baseline", tmp_path, epochs=2, lr=0.05)
    assert {p.name for p in path.iterdir()} == {
        "result.json", "history.csv", "reliability.png", "reliability.csv", "model.safetensors", "best.safetensors",
        "probabilities.npz", *HALF.values(),
    }  # fmt: skip
    assert json.loads((path / "result.json").read_text()) == result
    assert (result["row"], result["protocol"], result["seed"], result["dataset"]) == (
        "student_baseline",
        "smoke",
        0,
        "digits",
    )
    assert result["published"] == {"accuracy": 0.7145, "ece": 0.089, "oe": 0.0646, "best_epoch": 186}
    assert result["settings"]["lr"] == 0.05 and result["changes"] == {
        "epochs": 2, "milestones": [2], "train_size": 96, "lr": 0.05
    }  # fmt: skip
    assert set(result["versions"]) == {"python", "torch", "timm", "numpy", "cuda", "commit", "recipe"}
    assert result["versions"]["torch"] == torch.__version__ and result["train_seconds"] > 0
    assert result["images_per_second"] * result["train_seconds"] == pytest.approx(2 * 96)

    with (path / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert list(history[0]) == ["epoch", "lr", "train_loss", "accuracy", "ece", "oe", "nll", "brier", "seconds"]
    assert [float(line["lr"]) for line in history] == [0.05, 0.05]
    assert float(history[-1]["accuracy"]) == result["last"]["accuracy"]
    assert max(float(line["accuracy"]) for line in history) == result["best"]["accuracy"]

    data = common.load_dataset("digits", Path())
    arrays = np.load(path / "probabilities.npz")
    assert arrays["labels"].tolist() == data.test_labels.tolist()
    for which, weights in (("last", "model"), ("best", "best")):
        metrics = common.calibration_metrics(arrays[which], arrays["labels"])
        assert result[which].items() >= metrics.scores.items()
        model = timm.create_model("shufflenet_v1", num_classes=10).eval()
        model.load_state_dict(safetensors.torch.load_file(path / f"{weights}.safetensors"))
        with torch.inference_mode():
            p = model(common.normalize(data.test_images)).softmax(1)
        np.testing.assert_allclose(p, arrays[which], atol=1e-5)


def test_the_learning_rate_falls_at_the_milestones(tmp_path):
    _, path = run_row("student_baseline", tmp_path, epochs=4, milestones=(1, 3))
    with (path / "history.csv").open() as file:
        assert [float(line["lr"]) for line in csv.DictReader(file)] == pytest.approx([0.01, 0.001, 0.001, 0.0001])


def test_a_finished_run_is_only_printed(tmp_path, monkeypatch):
    first, path = run_row("kd_cutmix", tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    monkeypatch.setattr(common.Run, "data", property(lambda self: pytest.fail("read the data again")))
    assert run_row("kd_cutmix", tmp_path)[0] == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    text = common.summary(first, path)
    assert text.startswith("kd_cutmix --epochs 1 --milestones 1 --train-size 96, protocol smoke, seed 0, digits\n")
    assert "published for the row, CIFAR-100" in text and "74.62%" in text
    for name in ("best", "last"):
        scores = {"epoch": 7, "accuracy": 0.25, "ece": 0.5, "oe": 0.125}
        line = f"{name + ' (epoch 7)':34}   25.00%    0.5000   0.1250"
        assert line in common.summary(first | {name: scores}, path).splitlines()
    assert str(path / "result.json") in text and str(path / "reliability.png") in text
    count, _, confidence = np.loadtxt(path / "reliability.csv", delimiter=",", skiprows=1).T
    ece, oe = errors_by_chance(count, confidence)[:, 0]
    assert f"calibrated, by chance {'':22}{ece:>9.4f}{oe:>9.4f}" in text
    real = first | {"dataset": "cifar100", "protocol": "paper"}
    for about, label in (
        ({"changes": {}, "protocol": "cpu"}, "published, 500 epochs  "),
        ({"changes": {}}, "published   "),
        ({"changes": {"lr": 0.1}}, "published for the row  "),
        ({"changes": {"lr": 0.1}, "protocol": "cpu"}, "published for the row, 500 epochs  "),
    ):
        assert label in common.summary(real | about, path)


def test_a_copy_without_its_repository_can_be_told_its_commit(tmp_path, monkeypatch):
    versions = common.versions.__wrapped__
    here = versions()["commit"]
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert versions()["commit"] == (here or "abc")  # git knows best
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert versions()["commit"] == "abc"
    monkeypatch.delenv("GIT_COMMIT")
    assert versions()["commit"] is None


def test_changed_results_do_not_count_as_changed_code(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        about = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *about, *words], capture_output=True, text=True).stdout.strip()

    files = [tmp_path / name for name in ("results/short/kd_mixup/seed0/result.json", "common.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    for words in (("init",), ("add", "."), ("commit", "-m", "first")):
        git(*words)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    head, commit = git("rev-parse", "HEAD"), lambda: common.versions.__wrapped__()["commit"]
    assert len(head) == 40 and commit() == head
    files[0].unlink()  # as in an image that was built without them
    (tmp_path / "own.py").write_text("")
    assert commit() == head
    files[1].write_text("2")
    assert commit() == head + "+"


def test_the_commit_is_that_of_the_beginning_whatever_is_committed_while_a_run_trains(tmp_path, monkeypatch):
    begun = common.versions()
    evaluate = common.Run.predict

    def commit(*args):
        monkeypatch.setattr(common, "ROOT", tmp_path)
        monkeypatch.setenv("GIT_COMMIT", "later")
        return evaluate(*args)

    monkeypatch.setattr(common.Run, "predict", commit)
    result, _ = run_row("student_baseline", tmp_path, **THREE_STEPS)
    assert result["versions"].items() >= begun.items()


def test_overwrite_starts_this_row_over_but_not_its_teacher(tmp_path):
    first, path = run_row("kd_cutmix", tmp_path)
    teacher = tmp_path / "smoke" / "teacher_cutmix"
    stamps = [(p / "model.safetensors").stat().st_mtime_ns for p in (path, next(teacher.glob("seed*")))]
    second, _ = run_row("kd_cutmix", tmp_path, overwrite=True)
    assert second["last"] == first["last"]
    assert (path / "model.safetensors").stat().st_mtime_ns > stamps[0]
    assert (next(teacher.glob("seed*")) / "model.safetensors").stat().st_mtime_ns == stamps[1]


def test_a_missing_teacher_is_trained_first_and_only_once(tmp_path, monkeypatch, capsys):
    _, path = run_row("kd_mixup", tmp_path, seed=3)
    out = capsys.readouterr().out
    assert "kd_mixup needs teacher_mixup" in out and "teacher_mixup is finished" in out
    teacher = next((tmp_path / "smoke" / "teacher_mixup").glob("seed*"))
    result = json.loads((teacher / "result.json").read_text())
    assert (result["seed"], result["settings"]["train_size"], result["settings"]["epochs"]) == (3, 96, 1)
    assert result["settings"]["lr"] == 0.05  # its own, not the student's
    assert json.loads((path / "result.json").read_text())["sources"] == [str(teacher)]
    run_row("kd_mixup", tmp_path, seed=3, temperature=4.0)
    assert "needs" not in capsys.readouterr().out

    for name in ("model.safetensors", "model.fp16.safetensors"):
        (teacher / name).unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        in_epoch(patch, 1, steps_an_epoch=1)
        run_row("kd_mixup", tmp_path, seed=3, temperature=5.0)
    assert json.loads((teacher / "result.json").read_text()) == result  # nothing computed is lost
    run_row("kd_mixup", tmp_path, seed=3, temperature=5.0)
    assert "kd_mixup needs teacher_mixup" in capsys.readouterr().out


def half_teacher(folder: Path, to: Path, files: Iterable[str] = HALF.values(), **settings) -> Path:
    """What would be published of a finished teacher."""
    _, teacher = run_row("teacher_cutmix", folder, **settings)
    to = to / teacher.relative_to(folder)
    to.mkdir(parents=True)
    for name in ("result.json", *files):
        shutil.copy(teacher / name, to / name)
    return teacher


def test_a_published_teacher_teaches_as_the_one_it_was_made_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "published")
    teacher = half_teacher(tmp_path / "a", tmp_path / "published")
    halves, whole = (safetensors.torch.load_file(teacher / f"model{x}.safetensors") for x in (".fp16", ""))
    assert all(torch.allclose(halves[k].float(), w.float(), rtol=1e-3, atol=1e-6) for k, w in whole.items())
    assert halves["conv1.weight"].dtype == torch.float16
    result, _ = run_row("kd_cutmix", tmp_path / "b")
    assert "needs" not in capsys.readouterr().out
    assert result["sources"] == [str(next((tmp_path / "published").rglob("result.json")).parent)]
    same, _ = run_row("kd_cutmix", tmp_path / "a")
    assert result["last"]["nll"] == pytest.approx(same["last"]["nll"], rel=0.02)
    run_row("kd_cutmix", tmp_path / "b", teacher_from="train", overwrite=True)
    assert "kd_cutmix needs teacher_cutmix" in capsys.readouterr().out
    assert common.Run("kd_cutmix", common.config_type(common.load_recipe("kd_cutmix"))(
        teacher_from="train")).changes == {}  # fmt: skip


def test_published_files_are_taken_by_their_folder_too(tmp_path):
    half_teacher(tmp_path / "a", tmp_path / "published")
    folder = str(next((tmp_path / "published").rglob("result.json")).parent)
    assert run_row("kd_cutmix", tmp_path / "b", teacher=folder)[0]["sources"] == [folder]
    run_row("teacher_ensemble", tmp_path / "b", members=(folder,), weights=(1.0,))


def test_a_teacher_published_with_other_settings_is_not_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "published")
    half_teacher(tmp_path / "a", tmp_path / "published")
    file = next((tmp_path / "published").rglob("result.json"))
    result = json.loads(file.read_text())
    result["settings"]["lr"] = 0.7
    file.write_text(json.dumps(result))
    result, _ = run_row("kd_cutmix", tmp_path / "b")
    assert "kd_cutmix needs teacher_cutmix" in capsys.readouterr().out
    assert result["sources"][0].startswith(str(tmp_path / "b"))


def test_overwrite_is_the_way_out_that_it_is_said_to_be(tmp_path):
    _, path = run_row("student_baseline", tmp_path)
    result = json.loads((path / "result.json").read_text())
    for damage in ({**result, "settings": {**result["settings"], "lr": 0.7}}, []):
        (path / "result.json").write_text(json.dumps(damage))
        with pytest.raises(UserError):
            run_row("student_baseline", tmp_path)
        again, _ = run_row("student_baseline", tmp_path, overwrite=True)
        assert again["last"] == result["last"]


def test_overwrite_says_so_where_it_cannot_delete(tmp_path):
    """A folder that is a link, as to a larger disk: the old numbers must not pass for new ones."""
    _, path = run_row("student_baseline", tmp_path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"seed0.* cannot be deleted \(--overwrite\): .*symbolic link"):
        run_row("student_baseline", tmp_path, overwrite=True)


def test_overwrite_stopped_while_it_deletes_leaves_nothing_that_passes_for_finished(tmp_path, monkeypatch):
    def stop(folder):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    result, path = run_row("student_baseline", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.shutil, "rmtree", stop)
        run_row("student_baseline", tmp_path, overwrite=True)
    again, _ = run_row("student_baseline", tmp_path)
    assert again["last"] == result["last"] and (path / "model.safetensors").is_file()


def test_a_teacher_killed_while_it_is_trained_again_goes_on(tmp_path, monkeypatch, capsys):
    """Its old result is there and its new weights are not the old ones."""
    _, path = run_row("teacher_cutmix", tmp_path)
    (path / "model.safetensors").unlink()
    result = json.loads((path / "result.json").read_text())
    result["files"] = dict.fromkeys(result["files"], "as on other hardware")
    (path / "result.json").write_text(json.dumps(result))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "_finish", lambda *args: die())
        run_row("kd_cutmix", tmp_path, teacher_from="train")
    assert (path / "model.safetensors").is_file()
    run_row("kd_cutmix", tmp_path)
    assert capsys.readouterr().out.count("resuming after epoch 1 of 1") == 1


def test_processes_that_run_together_read_a_folder_before_one_asks_alone(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(common.data_parallel, "size", lambda: 2)
    monkeypatch.setattr(common.data_parallel, "barrier", lambda: None)
    cfg = common.TrainConfig(protocol="smoke", dataset="folder", data_dir=image_folder, results_dir=tmp_path)
    assert "data" in vars(common.Run("student_baseline", cfg))


def test_what_is_evaluated_is_float32_whatever_a_run_trains_in(tmp_path, monkeypatch):
    """The probabilities that are kept are those of the weights that are kept, in float32."""
    result, path = run_row("student_baseline", tmp_path, precision="bf16")
    assert result["precision"] == "bf16"
    model = timm.create_model("shufflenet_v1", num_classes=10).eval()
    model.load_state_dict(load_weights(path / "model.safetensors"))
    data = common.load_dataset("digits", Path())
    with torch.inference_mode():
        expected = model(common.normalize(data.test_images)).softmax(1).numpy()
    assert np.abs(load_probabilities(path / "probabilities.npz")["last"] - expected).max() < 1e-5


def test_arithmetic_is_asked_of_a_teacher_that_is_trained_on_the_way(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    result, path = run_row("kd_mixup", tmp_path, deterministic=True, precision="bf16")
    assert asked == [True, True]
    teacher = read_result(path.parents[1] / "teacher_mixup" / path.name)
    assert teacher["precision"] == result["precision"] == "bf16"
    assert teacher["changes"] == result["changes"]  # so its folder's name ends alike, with no flag for the teacher


@pytest.mark.parametrize("val_size", (None, 40))
@pytest.mark.parametrize("needed", HALF)
def test_published_predictions_make_an_ensemble(needed, val_size, tmp_path, monkeypatch, capsys):
    """So do published weights that are of the epoch that is `best` and `last` at once; of `last` they always do."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "published")
    files = HALF.values() if needed == "probabilities.npz" else [HALF[needed]]
    half_teacher(tmp_path / "a", tmp_path / "published", files, val_size=val_size)
    settings = dict(members=("teacher_cutmix",), weights=(1.0,), val_size=val_size)
    results = [run_row("teacher_ensemble", tmp_path / folder, **settings)[0] for folder in ("a", "b")]
    told = capsys.readouterr().out
    assert "needs teacher_cutmix" not in told
    made = re.search(r"/published/\S+ lacks predictions: making them again with model.fp16.safetensors", told)
    assert bool(made) == (needed == "model.safetensors")  # predictions of `best` are those of `last` here
    for choice in ("best", "last", "selected")[: 3 if val_size else 2]:
        for metric in ("nll", "ece", "brier"):
            assert results[0][choice][metric] == pytest.approx(results[1][choice][metric], rel=2e-3)


def test_of_published_predictions_only_those_of_the_last_epoch_are_made_again(tmp_path):
    _, member = run_row("student_baseline", tmp_path)
    arrays = dict(np.load(member / "probabilities.npz"))
    save_log_probabilities(member, {**arrays, "best": arrays["best"][::-1]})  # as of another epoch
    (member / "probabilities.npz").unlink()
    result = json.loads((member / "result.json").read_text())
    result["files"][HALF["probabilities.npz"]] = sha256(member / HALF["probabilities.npz"])
    result["best"]["epoch"] = 7
    (member / "result.json").write_text(json.dumps(result))
    _, path = run_row("student_ensemble", tmp_path, members=(str(member),), weights=(1.0,))
    mean = load_probabilities(path / "probabilities.npz")
    np.testing.assert_allclose(mean["best"], arrays["best"][::-1], rtol=2e-3)
    np.testing.assert_allclose(mean["last"], arrays["last"], rtol=0.05)  # by weights in half precision
    bins = common.calibration_metrics(mean["best"], mean["labels"]).bins
    assert (path / "reliability.csv").read_text() == csv_text(bins)


def test_recomputed_predictions_are_as_a_run_writes_them_today(tmp_path):
    """Earlier ones had those of `last` as well, and a size that is not published."""
    _, path = run_row("student_baseline", tmp_path)
    file = path / HALF["probabilities.npz"]
    before = [(path / name).read_bytes() for name in (file.name, "result.json", "probabilities.npz")]
    arrays = dict(np.load(file))
    np.savez_compressed(file, last=arrays["best"], **arrays)
    result = json.loads(before[1])
    result["files"][file.name] = sha256(file)
    (path / "result.json").write_text(json.dumps(result))
    rows.recompute(path)
    assert [(path / name).read_bytes() for name in (file.name, "result.json", "probabilities.npz")] == before


def test_weights_that_half_precision_makes_worse_are_not_published(tmp_path, monkeypatch):
    """One of 360 images is more than 0.05 points."""
    real = common.Run._save_half

    def with_another_answer(run, model, probabilities):
        labels, other = run.data.test_labels, probabilities.clone()
        first = (other.argmax(1) == labels).nonzero()[0]
        other[first] = torch.eye(10)[(labels[first] + 1) % 10]
        real(run, model, other)

    monkeypatch.setattr(common.Run, "_save_half", with_another_answer)
    _, path = run_row("student_baseline", tmp_path)
    assert not (path / HALF["model.safetensors"]).exists()
    file, arrays = path / HALF["probabilities.npz"], dict(np.load(path / "probabilities.npz"))
    assert "last" not in load_probabilities(file)  # for they are those of `best`
    save_log_probabilities(path, {**arrays, "best": arrays["best"][::-1]})  # as of another epoch
    assert "last" in load_probabilities(file)  # which no weights make again


def test_weights_beyond_half_precision_are_not_published(tmp_path, monkeypatch):
    """They would be infinite, which changes no prediction but which no reader takes."""
    real = common.Run._save_half

    def with_a_large_variance(run, model, probabilities):
        model.bn1.running_var[0] = 1e6
        real(run, model, run.predict(model, run.data.test_images))

    monkeypatch.setattr(common.Run, "_save_half", with_a_large_variance)
    _, path = run_row("student_baseline", tmp_path)
    assert not (path / HALF["model.safetensors"]).exists()


def test_a_weight_under_two_names_is_kept_under_both(tmp_path):
    layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(2)]
    layers[1].weight = layers[0].weight
    save_weights(tmp_path / "model.safetensors", torch.nn.Sequential(*layers).state_dict())
    loaded = load_weights(tmp_path / "model.safetensors")
    assert loaded.keys() == {"0.weight", "1.weight"}
    assert all(torch.equal(weight, layers[0].weight) for weight in loaded.values())


def test_weights_serve_for_no_predictions_of_other_epochs():
    names = ["probabilities.npz", HALF["probabilities.npz"]]
    weights = ["model.safetensors", HALF["model.safetensors"]]
    result = {"model": "wrn_40_2", "best": {"epoch": 2}, "last": {"epoch": 2}}
    assert files_for("probabilities.npz", result) == names + weights
    assert files_for("model.safetensors", result) == weights
    other = {"last": {"epoch": 3}}, {"selected": {"epoch": 1}}, {"model": None}
    assert all(files_for("probabilities.npz", {**result, **change}) == names for change in other)


def test_a_teacher_by_its_folder(tmp_path):
    _, teacher = run_row("student_baseline", tmp_path)
    result, _ = run_row("kd_cutmix", tmp_path, teacher=str(teacher))
    assert result["sources"] == [str(teacher)]


def test_a_teacher_of_other_images_or_classes_is_refused(tmp_path, image_folder):
    _, teacher = run_row("teacher_baseline", tmp_path / "a", train_size=64)
    with pytest.raises(UserError, match=r"than kd_vanilla is \(--train-size 64, not 96\): name another run"):
        run_row("kd_vanilla", tmp_path / "b", teacher=str(teacher))
    with pytest.raises(UserError, match="knows 10 classes, not the 3 of folder"):
        run_row(
            "kd_vanilla", tmp_path / "b", teacher=str(teacher), dataset="folder", data_dir=image_folder, train_size=None
        )
    assert not (tmp_path / "b").exists()


def test_ensembles_average_their_members_probabilities(tmp_path):
    members = [str(run_row("student_baseline", tmp_path, seed=seed)[1]) for seed in (1, 0)]
    result, path = run_row("teacher_ensemble", tmp_path, members=tuple(members), weights=(3.0, 1.0))
    arrays = [np.load(Path(member) / "probabilities.npz") for member in members]
    for which in ("best", "last"):
        mean = 0.75 * arrays[0][which].astype(float) + 0.25 * arrays[1][which]
        np.testing.assert_allclose(np.load(path / "probabilities.npz")[which], mean, atol=1e-6)
        want = common.calibration_metrics(mean, arrays[0]["labels"]).scores
        assert {k: result[which][k] for k in want} == pytest.approx(want, abs=1e-6)
    assert result["sources"] == members and result["model"] is None


def test_other_images_in_the_same_place_are_refused(tmp_path, image_folder):
    settings = dict(dataset="folder", data_dir=image_folder, train_size=None, batch_size=8)
    run_row("student_baseline", tmp_path / "results", **settings)
    other = shutil.copytree(image_folder, tmp_path / "other")
    shutil.copy(other / "train" / "ant" / "0.png", other / "train" / "ant" / "1.png")
    with pytest.raises(UserError, match="other images: start student_baseline over with --overwrite, or choose"):
        run_row("student_baseline", tmp_path / "results", **{**settings, "data_dir": other})


def test_a_checkpoint_of_other_images_is_refused(tmp_path, image_folder, monkeypatch):
    settings = dict(dataset="folder", data_dir=image_folder, train_size=None, batch_size=8, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        in_epoch(patch, 2)
        run_row("student_baseline", tmp_path / "results", **settings)
    common._shared_dataset.cache_clear()  # as in a process of its own
    shutil.copy(image_folder / "train" / "ant" / "0.png", image_folder / "train" / "ant" / "1.png")
    with pytest.raises(UserError, match="was made with other images"):
        run_row("student_baseline", tmp_path / "results", **settings)


def test_a_student_goes_on_with_the_weights_that_taught_it(tmp_path, monkeypatch):
    (_, teacher), (_, other) = (run_row("teacher_cutmix", tmp_path, seed=seed) for seed in (0, 1))
    settings = dict(teacher=str(teacher), epochs=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        in_epoch(patch, 2, steps_an_epoch=2)
        run_row("kd_cutmix", tmp_path, **settings)
    teacher.rename(tmp_path / "kept")
    shutil.copytree(other, teacher)
    with pytest.raises(UserError, match=r"was made with other weights than are now in .*teacher_cutmix.*--overwrite"):
        run_row("kd_cutmix", tmp_path, **settings)
    shutil.rmtree(teacher)
    (tmp_path / "kept").rename(teacher)
    result, _ = run_row("kd_cutmix", tmp_path, **settings)
    assert result["source_digests"] == [sha256(teacher / "model.safetensors")]


def test_a_rows_own_settings_that_changed_in_its_file_are_noticed(tmp_path, monkeypatch):
    run_row("student_baseline", tmp_path)
    config = common.config_type(common.load_recipe("student_baseline"))
    monkeypatch.setattr(config, "__init__", functools.partialmethod(config.__init__, lr=0.3))
    with pytest.raises(UserError, match=r"was made with lr 0\.01, now 0\.3"):
        run_row("student_baseline", tmp_path)


def write_recipe(folder: Path, name: str, lines: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(f'"""A row of one\'s own."""\n\nimport common\nfrom torch import nn\n{lines}')
    return file


TRAINS = """
from timm.task import ClassificationTask

def main(cfg: common.TrainConfig, run: common.Run) -> None:
    run.fit(ClassificationTask(run.create_model("shufflenet_v1"), nn.CrossEntropyLoss()), common.Standard())
"""
WRONG_RECIPES = {
    "def main(cfg, run): pass": "main has to name its settings, as in main(cfg: common.TrainConfig",
    "class Own(common.TrainConfig):\n    hot: bool = True\n\ndef main(cfg: Own, run): pass": "Own needs @dataclass",
    "from dataclasses import dataclass\n\n@dataclass(kw_only=True)\nclass Own(common.TrainConfig):\n    hot: bool\n\n"
    "def main(cfg: Own, run): pass": "the setting hot of Own needs a default",
    "from dataclasses import dataclass\n\n@dataclass(kw_only=True)\nclass Own(common.TrainConfig):\n"
    "    teacher: common.TeacherName = 'a'\n    second: common.TeacherName = 'b'\n\n"
    "def main(cfg: Own, run): pass": "Own takes one common.TeacherName: several",
    TRAINS.replace("TrainConfig", "Config"): "own cannot train: its settings have to extend common.TrainConfig",
    "def main(cfg: common.TrainConfig, run): pass": "own.py: main ended without a result: it has to call run.fit",
    TRAINS.replace("shufflenet_v1", "shuflenet_v1"): "timm knows no model shuflenet_v1: shufflenet_v1",
}


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(common, "RECIPES", folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    common.load_recipe.cache_clear()


@pytest.mark.parametrize(("lines", "message"), WRONG_RECIPES.items(), ids=WRONG_RECIPES.values())
def test_what_a_recipe_of_ones_own_lacks_is_named(lines, message, recipes, tmp_path, monkeypatch, capsys):
    write_recipe(recipes, "own", lines)
    monkeypatch.setattr(sys, "argv", ["own.py", "--protocol", "smoke", "--results-dir", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as stop:
        common.cli(common.load_recipe("own"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_recipes_share_a_module_beside_them(recipes):
    (recipes / "_shared.py").write_text("epochs = 7\n")
    write_recipe(recipes, "own", "from _shared import epochs\n\ndef main(cfg: common.Config, run): return epochs")
    assert common.load_recipe("own")(None, None) == 7
    with pytest.raises(UserError, match="there is no recipe _shared: it should be one of own, or"):
        common.load_recipe("_shared")
    (recipes / "_shared.py").rename(recipes / "shared.py")
    with pytest.raises(UserError, match=r"shared\.py has no main, .* what recipes share is called _shared\.py"):
        common.load_recipe("shared")


OWN_NETWORK = """
import common
from timm.models import register_model
from timm.task import {task}
from torch import nn

@register_model
def {name}(pretrained=False, num_classes=10, **kwargs):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))

def main(cfg: common.TrainConfig, run: common.Run) -> None:
    run.fit({task}(run.create_model("{name}"){teacher}, nn.CrossEntropyLoss()), common.Standard())
"""


def test_a_network_of_ones_own_learns_from_another(recipes, tmp_path):
    """Plain modules, of which timm has made nothing; the teacher's is known once its recipe is read."""
    (recipes / "own_teacher.py").write_text(OWN_NETWORK.format(task="ClassificationTask", name="own_net", teacher=""))
    cfg = common.TrainConfig(protocol="smoke", epochs=1, train_size=96, results_dir=tmp_path / "results")
    common.run_row("own_teacher", common.load_recipe("own_teacher"), cfg)
    common.load_recipe.cache_clear()
    timm.models._registry._model_entrypoints.pop("own_net")  # as in another process
    folder = common.Run("own_teacher", cfg).path
    teacher = f", run.teacher({str(folder)!r})"
    (recipes / "own_student.py").write_text(
        OWN_NETWORK.format(task="LogitDistillationTask", name="other_net", teacher=teacher)
    )
    cfg = dataclasses.replace(cfg, batch_size=64)  # 64 images and then 32
    result = common.run_row("own_student", common.load_recipe("own_student"), cfg)
    assert (result["model"], result["sources"]) == ("other_net", [str(folder)])
    [line] = read_csv(common.Run("own_student", cfg).path / "history.csv")
    assert line["kd_loss"] > 0 and line["train_loss"] == pytest.approx(line["task_loss"] + line["kd_loss"])


def test_a_network_under_a_name_that_is_taken_is_the_recipes(recipes, tmp_path):
    """As a ResNet-18 for small images may be, whose weights timm's would take too."""
    (recipes / "own.py").write_text(OWN_NETWORK.format(task="ClassificationTask", name="taken_net", teacher=""))
    cfg = common.TrainConfig(protocol="smoke", epochs=1, train_size=96, results_dir=tmp_path / "results")
    common.run_row("own", common.load_recipe("own"), cfg)
    common.load_recipe.cache_clear()

    def taken(num_classes, **kwargs):  # what another process finds under that name
        return torch.nn.Sequential(torch.nn.AdaptiveMaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, num_classes))

    timm.models._registry._model_entrypoints["taken_net"] = taken
    run = common.Run("own", cfg)
    with pytest.warns(UserWarning, match="Overwriting taken_net"):
        model = run.load_model(run.path / "model.safetensors")
    assert isinstance(model[0], torch.nn.AdaptiveAvgPool2d)


def test_a_run_is_what_the_plainest_loop_makes_of_its_images(recipes, tmp_path):
    """Each once an epoch, with its label, in an order and in views by seed and epoch; at the rate the history names."""
    (recipes / "own.py").write_text(OWN_NETWORK.format(task="ClassificationTask", name="plain_net", teacher=""))
    _, path = run_row("own", tmp_path / "results", epochs=3, milestones=(2,), train_size=72, batch_size=32, seed=3)
    data, losses = common.load_dataset("digits", Path()).train_subset(72), []
    common.seed_everything(3, 0)
    model = timm.create_model("plain_net", num_classes=10)
    begin = model[2].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4)
    for epoch, lr in ((1, 0.05), (2, 0.05), (3, 0.005)):
        common.seed_everything(3, epoch)
        optimizer.param_groups[0]["lr"], total = lr, 0.0
        for index in torch.randperm(72).split(32):
            views, labels = common.Standard()(data.train_images[index], data.train_labels[index])
            loss = F.cross_entropy(model(views), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(index)
        losses.append(total / 72)
    trained = load_weights(path / "model.safetensors")["2.weight"]
    torch.testing.assert_close(trained, model[2].weight.detach(), rtol=1e-4, atol=1e-6)
    assert (trained - begin).abs().max() > 0.01
    assert [line["train_loss"] for line in read_csv(path / "history.csv")] == pytest.approx(losses, rel=1e-5)


def test_rows_that_need_each_other_are_named(recipes, tmp_path):
    cfg = common.TrainConfig(protocol="smoke", results_dir=tmp_path / "results")
    for row, needed in (("one", "other"), ("other", "one"), ("alone", "alone")):
        write_recipe(recipes, row, f"def main(cfg: common.TrainConfig, run): run.teacher('{needed}')")
    for row in ("one", "alone"):
        with pytest.raises(UserError, match=f"{row} needs itself: name another teacher or member"):
            common.run_row(row, common.load_recipe(row), cfg)


NO_TEACHER = {
    "run.ensemble(['member'], [1])": "teacher/seed0-.* has a result.json but no model.safetensors",
    "pass": "teacher.py: main ended without a result",
}


@pytest.mark.parametrize(("body", "message"), NO_TEACHER.items(), ids=NO_TEACHER)
def test_a_row_that_leaves_no_model_cannot_teach(body, message, recipes, tmp_path):
    write_recipe(recipes, "member", TRAINS)
    write_recipe(recipes, "teacher", f"def main(cfg: common.TrainConfig, run): {body}")
    write_recipe(recipes, "own", "def main(cfg: common.TrainConfig, run): run.teacher('teacher')")
    cfg = common.TrainConfig(protocol="smoke", epochs=1, train_size=96, results_dir=tmp_path / "results")
    with pytest.raises(UserError, match=message):
        common.run_row("own", common.load_recipe("own"), cfg)


@pytest.mark.parametrize("elsewhere", ["../evil", "{folder}/evil"])
def test_a_teachers_name_is_no_path_to_code(elsewhere, recipes, tmp_path):
    write_recipe(tmp_path, "evil", "raise SystemExit('was run')")
    with pytest.raises(UserError, match=r"there is no recipe .*evil"):
        common.load_recipe(elsewhere.format(folder=tmp_path))


def test_a_recipe_that_was_edited_since_is_not_passed_over_in_silence(recipes, tmp_path, capsys, monkeypatch):
    file = write_recipe(recipes, "own", TRAINS)
    result, _ = run_row("own", tmp_path / "results")
    assert result["versions"]["recipe"] == sha256(file)[:12]
    capsys.readouterr()
    run_row("own", tmp_path / "results")
    out, err = capsys.readouterr()
    assert "seed0-" in out and "was finished before: --overwrite starts it over" in out and not err

    write_recipe(recipes, "own", TRAINS.replace("Standard()", "CutOut()"))
    common.load_recipe.cache_clear()
    run_row("own", tmp_path / "results")
    edited = "warning: the recipe of own was edited since this was made: start own over with --overwrite"
    assert edited in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(Killed):
        in_epoch(patch, 2, steps_an_epoch=1)
        run_row("own", tmp_path / "results", epochs=2)
    write_recipe(recipes, "own", TRAINS)
    common.load_recipe.cache_clear()
    run_row("own", tmp_path / "results", epochs=2)
    assert re.search(r"was begun with recipe \w{12}, now \w{12}: result.json names both", capsys.readouterr().err)


def test_a_teacher_whose_recipe_was_edited_since_is_named(recipes, tmp_path, capsys):
    student = "def main(cfg: common.TrainConfig, run): run.teacher('own')"
    write_recipe(recipes, "student", student)
    write_recipe(recipes, "own", TRAINS)
    run_row("own", tmp_path / "results")
    write_recipe(recipes, "own", TRAINS.replace("Standard()", "CutOut()"))
    common.load_recipe.cache_clear()
    cfg = common.TrainConfig(protocol="smoke", epochs=1, train_size=96, results_dir=tmp_path / "results")
    common.Run("student", cfg).teacher("own")
    assert "the recipe of own was edited since this was made" in capsys.readouterr().err


def test_a_run_whose_teacher_or_member_was_trained_anew_is_named(tmp_path, capsys):
    made = {"kd_vanilla": dict(teacher="student_baseline")}
    made["student_ensemble"] = dict(members=("student_baseline",), weights=(1,))
    (_, source), (_, other) = (run_row("student_baseline", tmp_path, seed=seed) for seed in (0, 1))
    for _ in range(2):
        for row, settings in made.items():
            run_row(row, tmp_path, **settings)
    assert "has changed since" not in capsys.readouterr().err
    shutil.rmtree(source)
    shutil.copytree(other, source)
    for row, settings in made.items():
        run_row(row, tmp_path, **settings)
        message = f"{source} has changed since {row} was made from it: start {row} over with --overwrite"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [1.0, 1.1])
def test_a_temperature_that_cannot_be_fitted_is_named(temperature, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "fit_temperature", lambda *predictions: temperature)
    run_row("student_baseline", tmp_path)
    assert ("metrics of best, last are at temperature 1" in capsys.readouterr().err) == (temperature == 1)


def test_a_batch_that_is_too_large_is_noticed_before_the_teacher_is_trained(tmp_path):
    with pytest.raises(UserError, match="--batch-size must be at most 96"):
        run_row("kd_cutmix", tmp_path, batch_size=97)
    assert not list(tmp_path.iterdir())


def test_the_last_single_image_of_an_epoch_is_left_out(tmp_path):
    result, _ = run_row("teacher_mixup", tmp_path, train_size=65, batch_size=32)
    assert np.isfinite(result["last"]["nll"])


def test_wandb_records_the_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, path = run_row("student_baseline", tmp_path)
    records = list(path.glob("wandb/offline-run-*/*.wandb"))
    assert len(records) == 1 and records[0].stat().st_size > 1000


def test_wandb_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **kwargs: (_ for _ in ()).throw(wandb.errors.CommError("no server")))
    run_row("student_baseline", tmp_path)
    assert "warning: Weights & Biases: not tracked any more: no server" in capsys.readouterr().err


def test_a_long_run_on_a_cpu_says_so(tmp_path, monkeypatch, capsys):
    in_epoch(monkeypatch, 3)  # after six steps of the first epoch
    with pytest.raises(Killed):
        run_row("student_baseline", tmp_path, epochs=500_000, train_size=192, batch_size=32, compile="off")
    assert "student_baseline will take about" in capsys.readouterr().out


def test_what_is_published_can_teach_and_be_a_member():
    """No published run is trained anew, for hours, where an ensemble asks for it."""
    folders = [file.parent for file in common.RESULTS.glob("*/*/*/model.fp16.safetensors")]
    assert folders
    for folder in folders:
        names = files_for("probabilities.npz", result := read_result(folder))
        file = next(filter(Path.is_file, (folder / name for name in names)), None)
        assert file, f"{folder} lacks one of {', '.join(names)}"
        assert sha256(file) == result["files"][file.name], file


def test_a_checkout_has_the_lines_that_recipes_are_known_by(tmp_path):
    """Git for Windows would end them otherwise, and every published run would seem to be of an edited recipe."""
    command = ["git", "-C", ROOT, "check-attr", "text", "recipes/kd_cutmix.py"]
    git = subprocess.run(command, capture_output=True, text=True)
    assert git.returncode or git.stdout.endswith("text: unset\n")
