"""What W&B gets of a run: read from the files that it writes and from what it sends, not from what was passed to it."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
import wandb
from conftest import ROOT, THREE_STEPS, Killed, in_epoch, run_row
from wandb.util import get_core_path
from wandb_server import serve

import common
import data_parallel
import tracking
from calibration import calibration_metrics
from command_line import Interrupted
from run_files import UserError
from tracking import Tracker


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key of whoever runs the tests, no agent, and wandb's own files where they are deleted."""
    wandb.teardown()  # first: of a service that is up, the address in the environment would come back after its end
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-own"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # nobody listens there
    yield
    wandb.teardown()


def records(folder: Path) -> list[dict]:
    """All records that the processes of a run have written, in order, read by wandb's own reader."""
    wandb.teardown()  # only then it is all on the disk
    lines = []
    for file in sorted(folder.glob("wandb/*run-*/*.wandb")):
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
        lines += subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def of(kind: str, found: list[dict]) -> list[dict]:
    return [record[kind] for record in found if record["type"] == kind]


def rows(found: list[dict]) -> list[dict]:
    """History, an epoch a row."""
    return [item for record in of("history", found) if "epoch" in (item := record["item"])]


def table(folder: Path, row: dict, key: str) -> tuple[list[str], list[list]]:
    file = next(folder.glob(f"wandb/*run-*/files/{row[f'{key}.path']}"))
    content = json.loads(file.read_text())
    return content["columns"], content["data"]


def line(epoch: int, **values: float) -> dict[str, float]:
    numbers = {"accuracy": epoch / 10, "ece": 0.1, "oe": 0.05, "nll": 1.0, "brier": 0.5}
    return {"epoch": epoch, "lr": 0.1, "train_loss": 1 / epoch, **numbers, "seconds": 1.0, **values}


def predictions(n: int = 40, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return (3 * torch.randn(n, classes)).softmax(1), torch.randint(classes, (n,))


def test_an_offline_run_holds_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_TAGS", "mine,rebuttal")
    settings = dict(epochs=2, train_size=32, wandb_charts=1, wandb_thumbnails=True)
    result, path = run_row("kd_augmix", tmp_path, wandb_mode="offline", **settings)
    found = records(path)

    (run,) = of("run", found)
    teacher = Path(result["sources"][0])
    assert (run["project"], run["job_type"]) == ("calibrated-distillation", "kd")
    name = "kd_augmix-smoke-s0 --epochs 2 --milestones 2 --train-size 32"
    assert (run["display_name"], run["tags"]) == (name, ["smoke", "digits", "mine", "rebuttal"])
    assert run["run_group"] == name.replace("-s0", path.name.removeprefix("seed0"))
    config = run["config"]["update"]
    assert config["temperature"] == 50 and config["teacher"] == "teacher_augmix"
    assert config.items() >= result["settings"].items()
    assert config["published"]["accuracy"] == 0.7572 and config["versions"] == result["versions"]
    assert config["sources"] == [str(teacher)] and config["model"] == "shufflenet_v1"

    with (path / "history.csv").open() as file:
        history = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]
    logged = rows(found)
    assert [row["epoch"] for row in logged] == [row["_step"] for row in logged] == [1, 2]
    for row, want in zip(logged, history, strict=True):
        got = [row[f"test/{name}"] for name in ("accuracy", "ece", "oe", "nll", "brier")]
        assert got == pytest.approx([want[name] for name in ("accuracy", "ece", "oe", "nll", "brier")])
        parts = [row[f"train/{name}"] for name in ("loss", "task_loss", "kd_loss")]
        assert parts == pytest.approx([want[name] for name in ("train_loss", "task_loss", "kd_loss")])
        assert parts[0] == pytest.approx(0.2 * parts[1] + 0.8 * parts[2], rel=1e-5)
        assert row["lr"] == want["lr"] and row["images_per_second"] > 0
    metrics = {metric.get("name") or metric["glob_name"]: metric for metric in of("metric", found)}
    assert metrics["*"]["step_metric"] == "epoch"

    # the curves, at the last epoch alone, are those of its predictions
    assert "calibration/curve_table.path" not in logged[0]
    arrays = np.load(path / "probabilities.npz")
    metrics = calibration_metrics(arrays["last"], arrays["labels"], n_bins=20)
    columns, bins = table(path, logged[1], "calibration/curve_table")
    assert columns == ["confidence", "accuracy", "count", "gap"]
    filled = metrics.bin_count > 0
    want = torch.stack([metrics.bin_confidence, metrics.bin_accuracy, metrics.bin_count], 1)[filled]
    np.testing.assert_allclose(np.array(bins)[:, :3], want, rtol=1e-6)
    assert [row[0] - row[1] for row in bins] == pytest.approx([row[3] for row in bins])
    charts = [
        u for r in of("config", found) for k, u in r["update"].items() if k == "_wandb.visualize.calibration/curve"
    ]
    assert charts[0]["panel_config"]["fieldSettings"].items() >= {"x": "confidence", "y": "accuracy"}.items()
    assert logged[1]["calibration/confidence.values"] == metrics.bin_count.tolist()
    assert next(path.glob(f"wandb/*run-*/files/{logged[1]['calibration/reliability.path']}")).stat().st_size > 5000

    last = of("history", found)[-1]["item"]
    columns, images = table(path, last, "predictions")
    assert columns == ["label", "prediction", "confidence", "correct"] and len(images) == len(arrays["labels"])
    assert np.mean([row[3] for row in images]) == pytest.approx(result["last"]["accuracy"])
    assert [row[0] for row in images[:3]] == [str(label) for label in arrays["labels"][:3]]
    _, worst = table(path, last, "overconfident")
    assert len(worst) == 64 and all(row[1] != row[2] for row in worst)
    assert [row[3] for row in worst] == sorted((row[3] for row in worst), reverse=True)
    assert worst[0][3] == max(row[2] for row in images if not row[3])

    summary = {k: v for update in of("summary", found) for k, v in update["update"].items()}
    for name in ("best", "last"):
        want = {k: v for k, v in result[name].items() if k not in ("scaled", "temperatures")}
        assert {k: summary[f"{name}/{k}"] for k in want} == pytest.approx(want)
        assert summary[f"{name}/temperature"] == pytest.approx(np.mean(result[name]["temperatures"]))
        assert summary[f"{name}/scaled_ece"] == pytest.approx(result[name]["scaled"]["ece"])

    used, made = [a for a in of("artifact", found) if a["type"] == "model"]
    assert made["name"] == "kd_augmix-smoke-s0-" + path.name.split("-")[1] and not made.get("use_after_commit")
    assert json.loads(made["metadata"]) == result
    assert {file["path"] for file in made["manifest"]["contents"]} == {"model.safetensors", "probabilities.npz"}
    # the teacher that is declared is, by its content, the one that its own run has logged
    theirs = records(teacher)
    (theirs_made,) = [a for a in of("artifact", theirs) if a["type"] == "model"]
    assert used["use_after_commit"] and (used["name"], used["digest"]) == (theirs_made["name"], theirs_made["digest"])
    assert of("run", theirs)[0]["job_type"] == "teacher"
    row = rows(theirs)[0]
    assert row["train/loss"] == pytest.approx(row["train/task_loss"] + 12 * row["train/jsd_loss"], rel=1e-5)

    settings |= dict(wandb_mode="disabled", teacher=str(teacher))
    _, untracked = run_row("kd_augmix", tmp_path / "untracked", **settings)
    for name in ("model.safetensors", "probabilities.npz"):
        assert (untracked / name).read_bytes() == (path / name).read_bytes(), "tracking changes the numbers"
    assert not (untracked / "wandb").exists()


def test_a_resumed_offline_run_is_one_run(tmp_path, monkeypatch):
    """Killed twice; what the first process wrote last is torn off, as by a power cut. Then sent by `wandb sync`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for epoch in (3, 1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            in_epoch(patch, epoch)
            run_row("student_baseline", tmp_path, **THREE_STEPS)
        wandb.teardown()
        if epoch == 3:
            (first,) = tmp_path.rglob("*.wandb")
            content = first.read_bytes()
            first.write_bytes(content[: content.rindex(b"test/brier")])
    _, path = run_row("student_baseline", tmp_path, **THREE_STEPS)
    files = sorted(path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1 and first.with_suffix(".torn").is_file()
    assert files[0].name == f"run-{(path / 'wandb' / 'id').read_text()}.wandb"
    found = records(path)
    assert [row["epoch"] for row in rows(found)] == [1, 2, 3]
    with (path / "history.csv").open() as file:
        want = [float(line["ece"]) for line in csv.DictReader(file)]
    assert [row["test/ece"] for row in rows(found)] == pytest.approx(want)

    with serve() as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
        command = [sys.executable, "-m", "wandb", "sync", "--yes", str(path / "wandb")]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    (run,) = server.runs.values()
    assert [row["epoch"] for row in run["history"] if "epoch" in row] == [1, 2, 3] and run["done"] == 0
    group, _, variant = run["groupName"].partition(" ")
    assert re.fullmatch("student_baseline-smoke-[0-9a-f]{8}", group) and "--batch-size 32" in variant
    assert run["jobType"] == "student"
    assert {"best/accuracy", "last/ece"} <= run["summary"].keys() and run["config"]["lr"] == 0.01


@pytest.mark.parametrize("left", [0, 7])
def test_a_run_killed_before_its_first_record_can_be_sent(tmp_path, left):
    """W&B writes its file's head at once and the records seconds later; `wandb sync` refuses a run with such a file."""
    tracker = Tracker(tmp_path, mode="offline", epochs=2)
    tracker.log([line(1)])
    tracker._close(1)
    wandb.teardown()
    (first,) = tmp_path.rglob("*.wandb")
    first.write_bytes(first.read_bytes()[:left])
    time.sleep(1)  # folders are named by the second
    tracker = Tracker(tmp_path, mode="offline", epochs=2)
    tracker.log([line(1), line(2)])
    tracker._close(0)
    wandb.teardown()
    with serve() as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
        command = [sys.executable, "-m", "wandb", "sync", "--yes", str(tmp_path / "wandb")]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    (run,) = server.runs.values()
    assert [row["epoch"] for row in run["history"] if "epoch" in row] == [1, 2] and run["done"] == 0


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()
        yield server
        wandb.teardown()


def test_an_online_run_resumes_where_the_server_has_it(tmp_path, server):
    first = Tracker(tmp_path, epochs=4, group="row", config={"lr": 0.1}, charts=1)
    first.log([line(1)])
    first.log([line(1), line(2)])
    first.preempted(143)
    (run,) = server.runs.values()
    assert [row["epoch"] for row in run["history"]] == [1, 2] and run["preempting"] and run["done"] == 143
    second = Tracker(tmp_path, epochs=4, group="row", config={"lr": 0.1}, charts=1)
    second.log([line(1), line(2), line(3)])  # as a run that was killed before it could log its second epoch
    second.log([line(1), line(2), line(3), line(4, accuracy=0.1)])
    second._close(0)
    assert len(server.runs) == 1 and run["done"] == 0
    assert [row["epoch"] for row in run["history"]] == [row["_step"] for row in run["history"]] == [1, 2, 3, 4]
    assert run["summary"]["best/epoch"] == 3 and run["summary"]["last/accuracy"] == 0.1


def test_a_sweeps_run_is_the_agents_and_has_every_epoch(tmp_path, monkeypatch):
    """A run that is trained on its way is not, though the agent's words are there for it too."""
    agent = dict(WANDB_SWEEP_ID="swp", WANDB_RUN_ID="agents")
    for name, value in {**agent, "WANDB_MODE": "offline", "WANDB_PROJECT": "mine"}.items():
        monkeypatch.setenv(name, value)
    for sweep in (False, True):
        tracker = Tracker(tmp_path, epochs=2, sweep=sweep)
        tracker.log([line(1), line(2)])
        tracker._close(0)
    assert os.environ.items() >= agent.items()  # the next run needs them still
    found, own = records(tmp_path), (tmp_path / "wandb" / "id").read_text()
    told = [(run["run_id"], run.get("sweep_id"), run["project"]) for run in of("run", found)]
    assert sorted(told) == sorted([(own, None, "mine"), ("agents", "swp", "mine")])
    assert [row["epoch"] for row in rows(found)] == [1, 2, 1, 2]


def test_the_table_of_images_is_of_the_last_epoch_and_the_summary_of_all_that_are_reported(tmp_path):
    p, labels = predictions()
    np.savez(tmp_path / "probabilities.npz", best=p.flip(0), last=p, labels=labels)
    choices = {
        name: {"epoch": 2, "accuracy": i / 10, "scaled": {"nll": i}, "temperatures": [i, 2 * i]}
        for i, name in enumerate(("best", "last", "selected"))
    }
    tracker = Tracker(tmp_path, mode="offline", epochs=2)
    tracker.finish({"row": "r", "protocol": "p", "seed": 0, "changes": {}, "model": "m", **choices}, list("abcd"))
    found = records(tmp_path)
    _, images = table(tmp_path, of("history", found)[-1]["item"], "predictions")
    assert [row[:2] for row in images] == [["abcd"[i], "abcd"[j]] for i, j in zip(labels, p.argmax(1), strict=True)]
    summary = {k: v for update in of("summary", found) for k, v in update["update"].items()}
    assert [summary[f"{name}/accuracy"] for name in choices] == [0, 0.1, 0.2]
    assert [summary[f"{name}/scaled_nll"] for name in choices] == [0, 1, 2]
    assert [summary[f"{name}/temperature"] for name in choices] == [0, 1.5, 3]


@pytest.mark.parametrize("trouble", ["down", "slow", "refuses"])
def test_a_server_in_trouble_costs_a_warning(tmp_path, monkeypatch, capsys, trouble):
    """The run never waits, and its notes are kept for `wandb sync`."""
    monkeypatch.setattr(tracking, "PATIENCE", {"init_timeout": 2, "finish_timeout": 2})
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with serve() as server:
        server.delay, server.status = (10, 200) if trouble == "slow" else (0, 401)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1" if trouble == "down" else server.url)
        wandb.teardown()
        started = time.perf_counter()
        tracker = Tracker(tmp_path, epochs=1)
        tracker.log([line(1)])
        assert time.perf_counter() - started < 0.5
        tracker._close(0)
        wandb.teardown()
    assert "warning: Weights & Biases: " in capsys.readouterr().err
    assert [row["epoch"] for row in rows(records(tmp_path))] == [1]
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_server_that_goes_away_costs_no_training(tmp_path, monkeypatch, server, capsys):
    monkeypatch.setattr(tracking, "PATIENCE", {"init_timeout": 10, "finish_timeout": 2})
    tracker = Tracker(tmp_path, epochs=2)
    tracker.log([line(1)])
    tracker._thread.submit(int).result()
    (run,) = server.runs.values()
    while not run["history"]:
        time.sleep(0.1)
    server.status = 503
    started = time.perf_counter()
    tracker.log([line(1), line(2)])
    assert time.perf_counter() - started < 0.5
    tracker._close(0)
    assert time.perf_counter() - started < 15
    said = capsys.readouterr()
    assert f"Weights & Biases: {server.url}/me/calibrated-distillation/runs/" in said.out
    assert "warning: Weights & Biases: not tracked any more: " in said.err
    assert [row["epoch"] for row in rows(records(tmp_path))] == [1, 2]  # on the disk, for wandb sync
    server.status = 200
    command = said.err.split("; wandb ")[1].removesuffix(" sends it anew\n").split()
    subprocess.run([sys.executable, "-m", "wandb", *command], check=True, capture_output=True)
    assert {row["epoch"] for row in run["history"]} == {1, 2} and run["done"] == 0


def test_nowhere_to_write_costs_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb").write_text("a file where a folder should be, which stops even root")
    tracker = Tracker(tmp_path, epochs=1)
    tracker.log([line(1)])
    tracker.finish({}, [])
    assert capsys.readouterr().err.count("warning: Weights & Biases: not tracked any more") == 1


def test_an_id_that_a_full_disk_left_empty_is_made_anew(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("")
    tracker = Tracker(tmp_path, mode="offline", epochs=1)
    tracker.log([line(1)])
    tracker._close(0)
    assert [row["epoch"] for row in rows(records(tmp_path))] == [1]
    assert of("run", records(tmp_path))[0]["run_id"] == (tmp_path / "wandb" / "id").read_text()


@pytest.mark.parametrize(
    ("key", "variable", "flag", "mode"),
    [
        (False, None, "auto", "offline"), (True, None, "auto", "online"), (True, "offline", "auto", "offline"),
        (False, "online", "auto", "offline"), (True, "online", "offline", "offline"),
        (True, "offline", "online", "online"), (False, None, "online", "offline"), (True, "online", "auto", "online"),
        (True, "disabled", "auto", None), (False, "disabled", "offline", "offline"), (True, None, "disabled", None),
        (True, "", "auto", "online"), (False, "Offline", "auto", "offline"), (True, "Disabled", "auto", None),
    ],
)  # fmt: skip
def test_which_mode_wins(tmp_path, monkeypatch, key, variable, flag, mode):
    modes = []
    monkeypatch.setattr(wandb, "init", lambda **about: modes.append(about["mode"]) or SimpleNamespace(starting_step=0))
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    wandb.teardown()
    tracker = Tracker(tmp_path, mode=flag)
    if tracker._thread:
        tracker._thread.shutdown()
    assert modes == ([mode] if mode else [])


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_what_cannot_be_a_key_costs_a_warning(tmp_path, monkeypatch, capsys, mode):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.setenv("WANDB_PROJECT", "")
    wandb.teardown()
    tracker = Tracker(tmp_path, mode=mode, epochs=1)
    tracker.log([line(1)])
    tracker._close(0)
    assert "WANDB_API_KEY invalid" in capsys.readouterr().err
    found = records(tmp_path)
    assert [row["epoch"] for row in rows(found)] == [1] and of("run", found)[0]["project"] == tracking.PROJECT
    with pytest.raises(UserError, match="--wandb me/project needs Weights & Biases: WANDB_API_KEY invalid"):
        tracking.log_in("--wandb me/project")


def test_only_the_first_rank_talks(tmp_path, monkeypatch):
    monkeypatch.setattr(data_parallel, "rank", lambda: 1)
    tracker = Tracker(tmp_path, mode="offline", epochs=1)
    tracker.log([line(1)], 1.0, *predictions())
    tracker.finish({}, [])
    tracker.preempted(1)
    assert not list(tmp_path.iterdir())


def test_nothing_waits_for_wandb(tmp_path, monkeypatch):
    """However long W&B takes to start: an epoch costs what its bins cost."""
    over, in_time = threading.Event(), []
    monkeypatch.setattr(wandb, "init", lambda **about: in_time.append(over.wait(30)))
    big = predictions(10_000, 100)
    calibration_metrics(*big)
    started = time.perf_counter()
    tracker = Tracker(tmp_path, mode="offline", epochs=5, charts=5)
    for epoch in range(1, 6):
        tracker.log([line(e) for e in range(1, epoch + 1)], 1.0, *big)
    assert time.perf_counter() - started < 0.5
    over.set()
    tracker._thread.shutdown()
    assert in_time == [True], "it was waited for"


@pytest.mark.parametrize(("epochs", "charts"), [(500, 10), (240, 10), (30, 10), (8, 10), (1, 10), (500, 1), (30, 7)])
def test_the_epochs_of_the_curves(epochs, charts):
    tracker = Tracker(Path(), mode="disabled", epochs=epochs, charts=charts)
    due = [epoch for epoch in range(1, epochs + 1) if tracker.due(epoch)]
    assert due[-1] == epochs and len(due) == min(epochs, charts)
    if charts == 10 and epochs >= 10:
        assert due == [epochs * part // 10 for part in range(1, 11)]


@pytest.mark.parametrize(("code", "sweep", "preempted"), [(143, False, True), (143, True, False), (130, False, False)])
def test_a_run_that_is_stopped_is_preempted_unless_a_person_or_a_sweep_stops_it(code, sweep, preempted, tmp_path):
    tracker = Tracker(tmp_path, mode="offline", epochs=2, sweep=sweep)
    tracker.log([line(1)])
    tracker.preempted(code)
    found = records(tmp_path)
    assert of("preempting", found) == [{}] * preempted and of("exit", found)[0]["exit_code"] == code
    assert [row["epoch"] for row in rows(found)] == [1]


def test_a_signal_while_the_run_is_closed_is_that_signal(tmp_path):
    """Not an error of what is closed already."""
    with pytest.raises(Interrupted) as stop, Tracker(tmp_path, mode="offline") as tracker:
        shutdown = tracker._thread.shutdown

        def interrupted() -> None:
            shutdown()
            raise Interrupted("SIGTERM")

        tracker._thread.shutdown = interrupted
        tracker._close(0)
    assert stop.value.exit_code == 143


def test_a_run_that_fails_is_recorded_as_failed(tmp_path):
    with pytest.raises(RuntimeError), Tracker(tmp_path, mode="offline", epochs=2) as tracker:
        tracker.log([line(1)])
        raise RuntimeError
    found = records(tmp_path)
    assert of("exit", found)[0]["exit_code"] == 1 and not of("preempting", found)


def test_a_killed_process_loses_no_epoch(tmp_path):
    """SIGKILL, right after an epoch is logged and has been written."""
    code = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tracking import Tracker
tracker, line = Tracker(pathlib.Path(sys.argv[1]), mode='offline', epochs=3), {line(1)!r}
tracker.log([line])
tracker.log([line, {{**line, 'epoch': 2}}])
tracker._thread.submit(int).result()
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    tracker = Tracker(tmp_path, mode="offline", epochs=3)
    tracker.log([line(1), line(2), line(3)])
    tracker._close(0)
    assert [row["epoch"] for row in rows(records(tmp_path))] == [1, 2, 3]


class FakeApi:
    """W&B's public API, with the artifacts of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, **_):
        return self

    def artifact(self, name: str):
        if "other" in name:
            raise wandb.errors.CommError("artifact not found")
        if "offline" in name:
            raise Exception("the network is gone")

        def entry(file: Path):
            def download(root: str) -> None:
                with pytest.raises(TimeoutError):  # nobody else brings it at the same time
                    filelock.FileLock(Path(root).with_name(f".{Path(root).name}.lock")).acquire(blocking=False)
                os.makedirs(root, exist_ok=True)
                shutil.copy(file, root)

            return SimpleNamespace(download=download)

        entries = {"model.safetensors": entry(self.folder / "model.safetensors"), "evil.pkl": None}
        metadata = json.loads((self.folder / "result.json").read_text())
        name = name.replace("latest", "v3")
        return SimpleNamespace(qualified_name=name, metadata=metadata, manifest=SimpleNamespace(entries=entries))


def test_a_teacher_from_wandb(tmp_path, monkeypatch, image_folder):
    _, teacher = run_row("student_baseline", tmp_path / "there", wandb_mode="disabled")
    local, _ = run_row("kd_vanilla", tmp_path / "there", teacher=str(teacher), wandb_mode="disabled")
    monkeypatch.setattr(wandb, "Api", FakeApi(teacher))
    name = "me/calibrated-distillation/student_baseline-smoke-s0:latest"
    here = dict(wandb_mode="disabled")
    with pytest.raises(UserError, match="log in first, with wandb login"):
        run_row("kd_vanilla", tmp_path / "here", teacher=name, **here)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.teardown()
    arguments = ["--teacher-artifact", name, "--protocol", "smoke"]
    cfg = common.parse(common.config_type(common.load_recipe("kd_vanilla")), args=arguments)
    assert cfg.teacher == name
    result, _ = run_row("kd_vanilla", tmp_path / "here", teacher=cfg.teacher, **here)
    assert result["last"] == local["last"] and result["sources"] == [name]
    assert not list((tmp_path / "here").rglob("student_baseline"))
    fetched = tmp_path / "here" / "artifacts" / "me-calibrated-distillation-student_baseline-smoke-s0-v3"
    assert {file.name for file in fetched.iterdir()} == {"model.safetensors", "result.json"}

    with pytest.raises(UserError, match="cannot be fetched from Weights & Biases: artifact not found"):
        run_row("kd_vanilla", tmp_path / "here", teacher="me/project/other:v1", **here)
    with pytest.raises(UserError, match="cannot be fetched from Weights & Biases: the network is gone"):
        run_row("kd_vanilla", tmp_path / "here", teacher="me/project/offline:v1", **here)
    other = dict(dataset="folder", data_dir=image_folder, train_size=None, batch_size=8)
    with pytest.raises(UserError, match="knows 10 classes, not the 3 of folder"):
        run_row("kd_vanilla", tmp_path / "here", teacher=name, **other, **here)
    changed = json.loads((teacher / "result.json").read_text())
    (teacher / "result.json").write_text(json.dumps({**changed, "model": "no_such_model"}))
    with pytest.raises(UserError, match="of a model that timm does not know here: no_such_model"):
        run_row("kd_vanilla", tmp_path / "there", teacher=name, **here)
    (teacher / "result.json").write_text(json.dumps({**changed, "model": "wrn_40_2"}))
    with pytest.raises(UserError, match=r"model\.safetensors does not fit wrn_40_2"):
        run_row("kd_vanilla", tmp_path / "there", teacher=name, **here)


def test_an_ensemble_declares_its_members(tmp_path, server):
    members = [str(run_row("student_baseline", tmp_path, seed=seed, wandb_mode="disabled")[1]) for seed in (0, 1)]
    run_row("teacher_ensemble", tmp_path, members=tuple(members), weights=(1.0, 1.0))
    (name,) = [name for name, run in server.runs.items() if run["jobType"] == "ensemble"]
    wandb.teardown()
    assert {artifact.split("-")[2] for run, artifact in server.used if run == name} == {"s0", "s1"}
    (made,) = [a for n, a in server.artifacts.items() if n.startswith("teacher_ensemble-smoke-s0-")]
    assert made["artifactTypeName"] == "ensemble" and json.loads(made["metadata"])["row"] == "teacher_ensemble"
    assert server.artifacts[server.used[0][1]]["artifactTypeName"] == "model"
    assert server.runs[name]["history"][-1]["calibration/curve_table"]["nrows"] > 0


def test_a_mode_that_wandb_does_not_know_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE=ofline: set it to online, offline or disabled"):
        run_row("student_baseline", tmp_path)
