"""The sweeps: every file a valid one, and an agent that runs the program as W&B would have it."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, ROWS
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_server import serve

import common
from run_files import UserError, read_result
from tracking import TEST_METRICS

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


def choices(parameter: dict) -> list:
    """All values of a parameter that the sweep names: of a range its ends."""
    assert parameter.keys() <= {"value", "values", "distribution", "min", "max"}
    values = parameter.get("values") or [parameter[key] for key in ("value", "min", "max") if key in parameter]
    assert values
    return values


def read(row: str, values: dict) -> common.Config:
    """The settings that a recipe reads from an agent's command line."""
    words = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
    return common.resolve(common.parse(common.config_type(common.load_recipe(row)), args=words))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_one_that_runs(path):
    sweep = yaml.safe_load(path.read_text())
    assert sweep.keys() <= {"program", "project", "name", "method", "metric", "early_terminate", "parameters"}
    assert (ROOT / sweep["program"]).is_file() and sweep["project"] == "calibrated-distillation"
    parameters = dict(sweep["parameters"])
    rows = choices(parameters.pop("row"))
    assert set(rows) <= set(ROWS)
    for row in rows:
        for name, parameter in parameters.items():
            for value in choices(parameter):
                assert getattr(read(row, {name: value}), name) == value, f"--{name} {value} of {row}"
    if sweep["method"] == "grid":
        assert all(parameter.keys() & {"value", "values"} for parameter in parameters.values())
    if "early_terminate" in sweep or sweep["method"] == "bayes":
        assert sweep["metric"]["goal"] == "maximize"
    if "metric" in sweep:  # held-out images choose, never the test set
        kind, name = sweep["metric"]["name"].split("/")
        assert kind == "val" and name in TEST_METRICS and parameters["val_size"] == {"value": 5000}


def test_the_sweeps_that_there_should_be():
    assert [path.stem for path in SWEEPS] == ["kd", "lr", "mixup", "rows", "student"]
    sweeps = {path.stem: yaml.safe_load(path.read_text())["parameters"] for path in SWEEPS}
    assert sweeps["mixup"]["alpha"]["values"] == [0, 0.1, 0.25, 0.4, 1]
    assert {"temperature", "kd_weight", "ce_weight"} <= sweeps["kd"].keys()
    assert {"lr", "batch_size"} <= sweeps["student"].keys()
    assert set(sweeps["rows"]["row"]["values"]) == set(ROWS)
    students = {row for row in ROWS if row.startswith(("kd_", "student_"))} - {"student_ensemble"}
    assert set(sweeps["lr"]["row"]["values"]) == students and 0.01 in sweeps["lr"]["lr"]["values"]
    for row in ROWS:  # the sweep of distillation is for any row that distils
        if row.startswith("kd_"):
            assert read(row, {"temperature": 7.0, "kd_weight": 0.5, "ce_weight": 0.25}).temperature == 7


def test_an_agents_words_are_understood():
    settings = {"weights": [1, 2.5, 1, 1, 1], "members": ["a", "b"], "overwrite": True, "wandb_thumbnails": False}
    cfg = read("teacher_ensemble", settings)
    assert (cfg.weights, cfg.members, cfg.overwrite, cfg.wandb_thumbnails) == (
        (1, 2.5, 1, 1, 1),
        ("a", "b"),
        True,
        False,
    )
    assert read("student_baseline", {"milestones": [1, 2], "val_size": None}).milestones == (1, 2)
    with pytest.raises(UserError, match="--milestones"):
        read("student_baseline", {"milestones": ["x"]})


@pytest.mark.parametrize("value", [True, False])
def test_an_agents_switch_is_what_it_says_whatever_the_default(value):
    @dataclass
    class Settings:
        on: bool = True
        turned_off: bool = False
        name: str = ""

    cfg = common.parse(Settings, args=[f"--on={value}", f"--turned_off={str(value).lower()}", f"--name={value}"])
    assert (cfg.on, cfg.turned_off, cfg.name) == (value, value, str(value))


@pytest.mark.parametrize(("words", "message"), [(["--row", "kd_nope"], "no recipe kd_nope"), ([], "given by --row")])
def test_a_sweeps_program_names_a_wrong_row(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["row.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "sweeps" / "row.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(("ends", "code"), [(143, 0), (130, 0), (75, 0), (0, 0), (2, 2), (74, 74)])
def test_a_run_that_is_ended_early_has_not_failed(ends, code, monkeypatch):
    """Else an agent whose runs Hyperband ends would give up."""
    monkeypatch.setattr(common, "cli", lambda recipe: sys.exit(ends))
    monkeypatch.setattr(sys, "argv", ["row.py", "--row", "kd_cutmix"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "sweeps" / "row.py"), run_name="__main__")
    assert stop.value.code == code


@pytest.mark.slow
def test_an_agent_runs_two_settings(tmp_path):
    """`wandb sweep` and `wandb agent` themselves, with a server of ours. The second run is finished already, by the
    first, and is reported all the same; the teacher that is trained on the way is no run of the sweep."""
    values = dict(row="kd_vanilla", protocol="smoke", epochs=2, train_size=96, val_size=60, milestones=[1, 2])
    values |= dict(wandb_thumbnails=False, results_dir=str(tmp_path / "results"), kd_weight=0.5)
    args = {name: {"value": value} for name, value in values.items()}
    with serve() as server:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "NETRC": str(tmp_path / "netrc")}
        environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        environment |= {name: str(tmp_path) for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
        environment |= {"WANDB_DATA_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        run = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        done = subprocess.run([sys.executable, "-m", "wandb", "sweep", "sweeps/kd.yaml"], **run)
        assert done.returncode == 0, done.stderr
        config = json.loads(server.sweep) if server.sweep.startswith("{") else yaml.safe_load(server.sweep)
        assert config["parameters"]["val_size"] == {"value": 5000}
        command = {"type": "run", "program": config["program"], "args": args}
        server.commands = [{**command, "run_id": name} for name in ("first1", "second2")]
        code = "import wandb.wandb_agent as agent; agent.Agent.POLL_INTERVAL = 0.2; agent.agent('me/any/swp')"
        done = subprocess.run([sys.executable, "-c", code], **run)
        assert done.returncode == 0, done.stderr
    runs = {name: run for name, run in server.runs.items() if run.get("sweep")}
    assert runs.keys() == {"first1", "second2"} and all(run["sweep"] == "swp" for run in runs.values()), done.stderr
    (result,) = [read_result(p.parent) for p in tmp_path.glob("results/smoke/kd_vanilla/*/result.json")]
    for run in runs.values():
        assert run["done"] == 0 and run["config"]["kd_weight"] == 0.5
        assert run["displayName"].startswith("kd_vanilla-smoke-s0 ") and "--kd-weight 0.5" in run["displayName"]
        assert [row["epoch"] for row in run["history"] if "epoch" in row] == [1, 2]
        assert run["summary"]["val/accuracy"] == run["history"][1]["val/accuracy"]
        assert run["summary"]["selected/accuracy"] == pytest.approx(result["selected"]["accuracy"])
    (teacher,) = [run for name, run in server.runs.items() if name not in runs]
    assert teacher["jobType"] == "teacher" and teacher["done"] == 0
