"""Two processes of torchrun do what one does."""

import csv
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import ROOT, run_row
from two_processes import MOVING, ROWS, SETTINGS, frozen_batch_norm

import common
import data_parallel


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Results of two processes, one of which was killed once."""
    results = tmp_path_factory.mktemp("together")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, ROOT / "tests" / "two_processes.py", results]
    return results, subprocess.run(command, capture_output=True, text=True, timeout=200)


def read(folder: Path) -> tuple[dict, list[dict], dict, dict]:
    """Result, history without times, weights and probabilities."""
    history = [{**line, "seconds": ""} for line in csv.DictReader((folder / "history.csv").open())]
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    return json.loads((folder / "result.json").read_text()), history, weights, np.load(folder / "probabilities.npz")


def assert_close(ours: Path, expected: Path) -> None:
    """The same run but for the order in which floating-point numbers were added up."""
    result, history, weights, probabilities = read(ours)
    _, expected_history, expected_weights, expected_probabilities = read(expected)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=1e-9, rtol=1e-6)
    begin = common.timm.create_model(result["model"], num_classes=10).state_dict()
    assert max((weights[name] - begin[name]).abs().max() for name in begin) > 1e-3
    for lines in zip(history, expected_history, strict=True):
        numbers, expected_numbers = ({k: float(v) for k, v in line.items() if v} for line in lines)
        assert numbers == pytest.approx(expected_numbers, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(probabilities["last"], expected_probabilities["last"], atol=1e-6)


@pytest.fixture
def one_process(monkeypatch):
    """`run_row` as two_processes.py has it."""
    monkeypatch.setattr(common.Run, "trainer", frozen_batch_norm(common.Run.trainer))
    return lambda row, results, **settings: run_row(row, results, **SETTINGS, **ROWS.get(row, {}), **settings)[1]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["kd_cutmix", "teacher_augmix"])
def test_two_processes_take_the_steps_of_one(together, one_process, tmp_path, row):
    """Same order of the images, same augmentation, and the gradient of the whole batch: 16, 16 and 7 or, mixed, 6."""
    results, done = together
    assert done.returncode == 0, done.stderr
    alone = one_process(row, tmp_path)
    if row == "kd_cutmix":  # and its teacher, trained by both before it
        (teacher,) = (alone.parent.parent / "teacher_cutmix").glob("seed0*")
        assert_close(results / teacher.relative_to(tmp_path), teacher)
    assert_close(results / alone.relative_to(tmp_path), alone)


@pytest.mark.slow
def test_running_means_are_those_of_all_shares(together, tmp_path):
    """Of the first batch norm, whose inputs do not depend on another one's share; variances within shares are other."""
    _, alone = run_row("student_baseline", tmp_path, **MOVING)
    means = [read(results / alone.relative_to(tmp_path))[2]["bn1.running_mean"] for results in (together[0], tmp_path)]
    torch.testing.assert_close(*means, atol=1e-6, rtol=1e-3)
    assert means[0].abs().max() > 0.01


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_goes_on(together, one_process, tmp_path):
    results, done = together
    assert "exitcode: -9" in done.stderr
    assert done.stdout.count("resuming after epoch 1 of 2") == done.stdout.count("last line") == 1  # of two processes
    alone = one_process("student_baseline", tmp_path)
    again = results / alone.relative_to(tmp_path)
    assert_close(again, alone)
    assert json.loads((again / "result.json").read_text())["processes"] == 2 and not list(again.glob("checkpoint*"))


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(together, one_process, tmp_path, capsys):
    results, _ = together
    resumed = one_process("student_baseline", results, seed=1)
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out
    assert_close(resumed, one_process("student_baseline", tmp_path, seed=1))
    assert json.loads((resumed / "result.json").read_text())["processes"] == 1


@pytest.mark.parametrize(("n", "processes"), [(7, 2), (8, 3), (2, 4), (1, 2), (64, 8)])
@pytest.mark.parametrize("views", [1, 3])
def test_shares_are_the_batch(monkeypatch, n, processes, views):
    """Every image once, and weights by which the average of the shares' means is the batch's mean."""
    inputs = torch.arange(float(views * n)).view(-1, 1, 1, 1)
    monkeypatch.setattr(data_parallel, "size", lambda: processes)
    total, seen = 0.0, []
    for rank in range(processes):
        monkeypatch.setattr(data_parallel, "rank", lambda rank=rank: rank)
        x, y, weight = data_parallel.share(inputs, torch.arange(n))
        assert x.shape[0] == views * len(y) > 0
        assert (x.view(views, -1) == y + n * torch.arange(views).view(-1, 1)).all()
        total += weight * x.mean().item() / processes
        seen += y.tolist() if weight else []
    assert total == pytest.approx(inputs.mean().item()) and seen == list(range(n))


@pytest.mark.parametrize("n", [0, 1, 5, 6])
def test_what_is_dealt_comes_back_in_order(monkeypatch, n):
    monkeypatch.setattr(data_parallel, "size", lambda: 3)
    hands = []
    for rank in range(3):
        monkeypatch.setattr(data_parallel, "rank", lambda rank=rank: rank)
        hands.append(data_parallel.shard(torch.arange(n).split(1) if n else ()))

    def all_gather(dealt, mine):
        assert all(item.untyped_storage().nbytes() == item.nbytes for item in mine)  # not with all that it is a view of
        dealt[:] = hands

    monkeypatch.setattr(data_parallel.dist, "all_gather_object", all_gather)
    assert [int(item) for item in data_parallel.gather(hands[0])] == list(range(n))


@pytest.mark.parametrize(("local", "order"), [("0", ["body", "barrier"]), ("1", ["barrier", "body"])])
def test_a_machines_first_process_downloads_before_its_others(local, order, monkeypatch):
    done = []
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setenv("RANK", f"{2 + int(local)}")  # of the second machine
    monkeypatch.setattr(data_parallel, "barrier", lambda: done.append("barrier"))
    with data_parallel.one_after_all():
        done.append("body")
    assert done == order


def test_only_the_first_process_computes_what_all_of_them_get(monkeypatch):
    monkeypatch.setattr(data_parallel, "size", lambda: 2)
    monkeypatch.setattr(data_parallel, "rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda result: result.__setitem__(0, "what the first has"))
    assert data_parallel.from_first(lambda: pytest.fail("computed")) == "what the first has"


@pytest.mark.parametrize("machines", [1, 2])
def test_processes_meet_anew_at_each_start_and_wait_for_a_teacher(machines, monkeypatch):
    """On one machine: machines do not count restarts alike."""
    joined, store = {}, dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(data_parallel, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: joined.update(how))
    names = dict(TORCHELASTIC_RUN_ID="run", TORCHELASTIC_RESTART_COUNT="3", GROUP_WORLD_SIZE=f"{machines}")
    for name, value in {**names, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert data_parallel.join.__wrapped__("cpu") == torch.device("cpu")
    joined["store"].set("key", "value")
    assert store.get("start 3/key" if machines == 1 else "key") == b"value"
    assert (joined["rank"], joined["world_size"]) == (0, 2) and joined["timeout"] > timedelta(days=1)
