"""The README's commands, its own row and its table, as a stranger would use them; the tables and links in results/."""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import ROOT, run_row

import adopt
import common
from calibration import calibration_metrics
from command_line import parse
from run_files import HALF

README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


PAGES = [path.relative_to(ROOT) for pages in ("*.md", "docs/*.md", "results/**/*.md") for path in ROOT.glob(pages)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def load_my_row(folder: Path):
    code = re.search(r"```python\n# my_row.py\n(.*?)```", README, re.DOTALL)[1]
    (folder / "my_row.py").write_text(code)
    spec = importlib.util.spec_from_file_location("my_row", folder / "my_row.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == [["uv", "run", "recipes/kd_cutmix.py", "--protocol", "smoke"], ["uv", "run", "pytest"]]


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS[2:] if re.match(r"recipes/|my_row", command[2])],
    ids=" ".join,
)
def test_command(command, results, tmp_path, image_folder, monkeypatch):
    """Each with its own arguments, at the smallest size: an epoch over a few digits, or a few images of one's own."""
    assert command[:2] == ["uv", "run"]
    script, arguments = Path(command[2]), command[3:]
    main = load_my_row(tmp_path) if script.stem == "my_row" else common.load_recipe(script.stem)
    assert script.stem == "my_row" or (ROOT / script).is_file()
    if "--help" in arguments:
        with pytest.raises(SystemExit):
            common.parse(common.config_type(main), args=arguments)
        return
    cfg = common.parse(common.config_type(main), args=arguments)
    tiny = dict(protocol="smoke", epochs=1, train_size=96, results_dir=results)
    if cfg.dataset == "folder":
        monkeypatch.chdir(tmp_path)
        shutil.copytree(image_folder, cfg.data_dir)
        tiny |= dict(train_size=None, val_size=6, results_dir=tmp_path / "results")
    result = common.run_row(script.stem, main, dataclasses.replace(cfg, **tiny))
    assert result["dataset"] == ("folder" if cfg.dataset else "digits")


def test_what_is_adopted_is_a_row_and_where_the_next_commands_look():
    adopted = [parse(adopt.Config, args=command[3:]) for command in COMMANDS if command[2] == "adopt.py"]
    assert {cfg.row for cfg in adopted} == {"teacher_baseline", "teacher_mixup"} <= {*common.recipe_names()}
    then = [command[-2:] for command in COMMANDS if "--results-dir" in command and command[-1] != "mine"]
    assert then == 3 * [["--results-dir", str(adopted[0].results_dir)]]


def test_its_predictions_are_calibrated_as_the_runs_were(tmp_path, image_folder, monkeypatch, capsys):
    settings = dict(dataset="folder", data_dir=image_folder, image_size=20, train_size=None, batch_size=6, val_size=6)
    result, path = run_row("student_baseline", tmp_path / "results", **settings)
    code = re.search(r"```python\n# predict.py\n(.*?)```", README, re.DOTALL)[1]
    files = sorted(map(str, image_folder.glob("test/*/*")))
    monkeypatch.setattr(sys, "argv", ["predict.py", str(path), *files])
    space = {}
    exec(code, space)
    lines = capsys.readouterr().out.splitlines()[-len(files) :]
    assert [line.rpartition(":")[0] for line in lines] == files
    assert all(re.fullmatch(r".*: (ant|bee|cat), \d+% sure", line) for line in lines)
    ours = calibration_metrics(space["probabilities"], torch.arange(3).repeat_interleave(4))
    assert ours.nll == pytest.approx(result["selected"]["scaled"]["nll"], abs=1e-5)


def test_files_and_modules_that_it_names_exist():
    for name in re.findall(
        r"^(\S+)  +\S", re.search(r"## The code\n\n```\n(.*?)```", README, re.DOTALL)[1], re.MULTILINE
    ):
        assert (ROOT / name).exists(), name
    table = re.search(r"## What a run leaves behind(.*?)## The code", README, re.DOTALL)[1]
    for name in ("result.json", "history.csv", "reliability.png", "probabilities.npz", "model.safetensors"):
        assert f"`{name}`" in table


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        file, _, heading = link.partition("#")
        if not file.startswith("https:"):
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), link
            if heading:
                titles = re.findall(r"^#+ (.*)", target.read_text().lower(), re.MULTILINE)
                assert heading in [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles], link


def test_what_it_says_of_wandb():
    section = re.search(r"## Weights & Biases\n(.*?)\n## ", README, re.DOTALL)[1]
    for name in re.findall(r"`(\w+\.yaml)`", section):
        assert (ROOT / "sweeps" / name).is_file()
    picture = ROOT / re.search(r"!\[.*\]\((.*)\)", section)[1]
    assert picture.stat().st_size < 100_000
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(common.TrainConfig)}
    used = set(re.findall(r"--wandb-(?!report)[a-z]+", section))
    assert {"--wandb-mode", "--wandb-charts", "--wandb-thumbnails"} <= used <= flags


def test_git_adds_what_is_published_of_a_run_and_nothing_else():
    """As results/README.md says."""
    kept = {"result.json", "history.csv", "reliability.png", "reliability.csv", *HALF.values()}
    folder = "results/short/kd_cutmix/seed0"
    paths = "\n".join(f"{folder}/{name}" for name in (*kept, *HALF, "checkpoint.safetensors", "wandb/id"))
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, cwd=ROOT, input=paths, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not in a git repository")
    assert set(paths.splitlines()) - set(done.stdout.splitlines()) == {f"{folder}/{name}" for name in kept}


def test_environment_installs_the_project_from_pyproject():
    text = (ROOT / "environment.yml").read_text()
    assert re.search(r"pip:\n\s+- -e \.\n", text) and "torch" not in text


def test_typed_numbers_are_those_of_the_runs_that_their_lines_link_to():
    """On the protocols' pages, at the last epoch."""
    columns = {
        "accuracy, %": lambda last: 100 * last["accuracy"],
        "ECE": lambda last: last["ece"],
        "ECE, 15 bins": lambda last: last["ece_15"],
        "OE": lambda last: last["oe"],
        "OE, 100 bins": lambda last: last["oe"],
        "temperature": lambda last: mean(last["temperatures"]),
        "ECE, scaled": lambda last: last["scaled"]["ece"],
        "ECE, 15 bins, scaled": lambda last: last["scaled"]["ece_15"],
        "NLL, scaled": lambda last: last["scaled"]["nll"],
        "size of logits": None,  # of compare.py, as the next two
        "confidence - accuracy": None,
        "confidence - accuracy, scaled": None,
    }
    checked = 0
    for page in ROOT.glob("results/*/README.md"):
        for table in re.findall(r"^(?:\|.*\n)+", page.read_text(), re.MULTILINE):
            header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
            for link, *cells in lines:
                if file := re.search(r"\((\S+/result\.json)\)$", link):
                    last = json.loads((page.parent / file[1]).read_text())["last"]
                    for name, cell in zip(header[1:], cells, strict=True):
                        if number := columns[name]:
                            assert f"{number(last):.{len(cell.partition('.')[2])}f}" == cell, f"{name} of {link}"
                            checked += 1
    assert checked > 50
