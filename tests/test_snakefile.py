"""The graph of the table: what is built from what, what is built again, and on which GPU."""

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, ROWS

import one_gpu
from run_files import HALF

STUDENTS = {"kd_vanilla", "kd_mixup", "kd_cutmix", "kd_cutout", "kd_augmix"}
FROM_CUTMIX = {"kd_cutmix", "kd_ensemble_add_loss", "kd_ensemble_avg_loss", "kd_ensemble_avg_softmax"}


@pytest.fixture
def snakemake(tmp_path, monkeypatch, capfd):
    """Snakemake's command line, in this process, which has torch imported already. Returns what it printed."""
    cli = pytest.importorskip("snakemake.cli", reason="snakemake is not installed: uv sync --extra table")
    monkeypatch.chdir(tmp_path)

    start = ["--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]

    def run(*args: str, config: str = "seeds=2") -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit):
            cli.main([*start, *args, "--config", "protocol=smoke", "wandb_mode=disabled", *shlex.split(config)])
        return "".join(capfd.readouterr())

    return run


def planned(output: str) -> Counter:
    """Rule -> number of jobs, from a dry run."""
    if "Nothing to be done" in output:
        return Counter()
    table = output.split("Job stats:")[1].split("\n\n")[0]
    jobs = {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", table, re.M)}
    return Counter({name: n for name, n in jobs.items() if name not in {"all", "total"}})


@pytest.fixture
def built(snakemake) -> list[Path]:
    """All files of a table with two seeds, newer than the recipes, and but for the results empty."""
    empty = {"changes": {}, "settings": {}, "sources": [], "classes": [], "files": {}, "fingerprint": ""}
    empty |= {"best": {"epoch": 3}, "last": {"epoch": 3}}
    newest = max(path.stat().st_mtime for path in (ROOT / "recipes").glob("*.py"))
    lines = snakemake("--summary").split("output_file\t")[1].splitlines()[1:]
    files = [Path(line.split("\t")[0]) for line in lines if line.startswith("results/")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "result.json":
            protocol, row, run = file.parts[-4:-1]
            names = {"row": row, "protocol": protocol, "dataset": "digits", "seed": int(run[-1]), "model": "a_model"}
            file.write_text(json.dumps({**empty, **names}))
        file.touch()
        os.utime(file, (newest + 10, newest + 10))
    return files


def test_the_graph_has_every_row_and_what_it_builds_upon(snakemake):
    assert planned(snakemake("-n")) == {"table": 1, **dict.fromkeys(ROWS, 2)}
    dot = snakemake("--rulegraph")
    names = dict(re.findall(r"^\s+(\d+)\[label = \"(\w+)\"", dot, re.M))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", dot) if names[b] != "all"}
    assert {a for a, b in edges if b == "kd_cutmix"} == {"teacher_cutmix"}
    assert {a for a, b in edges if b == "student_ensemble"} == STUDENTS
    assert {b for a, b in edges if a == "teacher_cutmix"} == FROM_CUTMIX | {"teacher_ensemble", "table"}
    assert {a for a, b in edges if b == "table"} == set(ROWS)


def test_what_most_wait_for_is_first(snakemake):
    """Four of the teachers are wanted by eight rows and variants each; students only by their ensemble."""
    found = dict(re.findall(r"rule (\w+):\n(?: +.*\n)*? +priority: (\d+)", snakemake("-n")))
    teachers = {f"teacher_{name}": "8" for name in ("mixup", "cutmix", "cutout", "augmix")} | {"teacher_baseline": "4"}
    assert found == teachers | dict.fromkeys(STUDENTS, "1")


def test_variants_and_settings(snakemake):
    jobs = planned(snakemake("-n", config="seeds=1 variants=true val_size=100"))
    tempered = ("kd_vanilla", "kd_ensemble_add_loss", "kd_ensemble_avg_loss")
    variants = ["teacher_ensemble_weights_1_1_1_1_1", *(f"{row}_temperature_4" for row in tempered)]
    assert jobs == dict.fromkeys(["table", *ROWS, *variants], 1)
    commands = snakemake("-n", "-p", config="seeds=1 variants=true val_size=100")
    assert len(re.findall("recipes/.*--val-size 100.* --seed 0", commands)) == 20
    assert "--config: --val-size must be 1 or more, not 0" in snakemake("-n", config="val_size=0")
    for config in ("seed=1", "seeds=0", "seeds=two"):
        assert "--config: seeds takes a number from 1" in snakemake("-n", config=config)
    for config in ("jobs_per_gpu=0", "jobs_per_gpu=two"):
        assert "--config: jobs_per_gpu takes a number from 1" in snakemake("-n", config=config)
    assert "--config: variants takes only true or false" in snakemake("-n", config="variants=no")
    assert "--config: " in (output := snakemake("-n", config="lr=1")) and "--lr" in output
    for unknown in ("share_teacher=false", "mirror=true"):
        assert f"--config: --{unknown.split('=')[0].replace('_', '-')} is no setting" in snakemake("-n", config=unknown)
    assert "--config: overwrite is for a recipe alone" in snakemake("-n", config="overwrite=true")


def test_a_runs_command_and_the_files_that_it_reads(snakemake):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    plan = snakemake("-n", "-p", config="seeds=1 results_dir='my results' jobs_per_gpu=2")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN  # a cluster's warning is for the run, which takes over:
    run = "exec .*/one_gpu.py 2 .* --results-dir 'my results' .*> 'my results/smoke/.*/run.log' 2>&1"
    assert len(re.findall(run, plan)) == 16
    assert "/report.py --protocol smoke --results-dir 'my results' > 'my results/smoke/report.log' 2>&1" in plan
    inputs = dict(re.findall(r"rule (\w+):\n +input: (.*)", plan))
    assert inputs["student_ensemble"].count("/probabilities.npz") == 5  # published ones serve without their weights
    assert inputs["kd_ensemble_add_loss"].count("/model.safetensors") == 4


def test_a_run_takes_the_processors_that_its_job_has(snakemake):
    """Snakemake itself says one thread to all that it starts."""
    for options, cpus in ("", 1), ("--default-resources cpus_per_task=4", 4), ("--set-threads kd_cutmix=2", 2):
        plan = snakemake("results/smoke/kd_cutmix/seed0/result.json", "-n", "-p", *options.split())
        assert f"OMP_NUM_THREADS={cpus} MKL_NUM_THREADS={cpus} exec " in plan.split("rule kd_cutmix:")[1]


README = re.findall("^uv run .* snakemake .*", (ROOT / "README.md").read_text(), re.M)


@pytest.mark.parametrize("command", README)
def test_commands_of_the_readme_plan_every_row(snakemake, command):
    command = shlex.split(command, comments=True)
    assert command[:5] == ["uv", "run", "--extra", "table", "snakemake"]
    options, config = command[5 : command.index("--config")], command[command.index("--config") + 1 :]
    options = [str(ROOT / word) if word.startswith("profiles/") else word for word in options]
    plan = snakemake("-n", "-p", *options, config=" ".join(config))
    assert planned(plan) == {"table": 1, **dict.fromkeys(ROWS, 3)}
    assert ("--share-teachers" in plan) == ("protocol=smoke" in config)  # of long ones, what is shared fills a disk


def test_what_does_not_train_takes_no_gpu_on_slurm(snakemake):
    plan = snakemake("-n", "--profile", str(ROOT / "profiles" / "slurm"), config="seeds=1 variants=true")
    gpus = dict(re.findall(r"rule (\w+):\n(?: +.*\n)*? +resources: .*\bgpu=(\d)", plan))
    averages = {"teacher_ensemble", "teacher_ensemble_weights_1_1_1_1_1", "student_ensemble"}
    assert {rule for rule, gpu in gpus.items() if gpu == "0"} == averages | {"table"}


def test_a_built_table_is_left_alone(snakemake, built):
    assert len(built) == 2 * (3 * 14 + 2 * 2) + 3
    assert planned(snakemake("-n")) == {}
    assert planned(snakemake("-n", config="seeds=3")) == {"table": 1, **dict.fromkeys(ROWS, 1)}


@pytest.mark.parametrize("left", ["locks/0.output.lock", "incomplete/{}"])
def test_what_a_killed_snakemake_leaves_behind_stops_nothing(snakemake, built, left):
    result = "results/smoke/kd_cutmix/seed0/result.json"
    file = Path(".snakemake", left.format(base64.urlsafe_b64encode(result.encode()).decode()))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{result}\n" if "locks" in left else "{}")
    assert "Nothing to be done" in snakemake("--scheduler", "greedy")  # the default one warns of its library


def test_a_newer_recipe_rebuilds_its_row_and_what_hangs_on_it(snakemake, built):
    for file in built:
        if "teacher_cutmix" in file.parts:
            os.utime(file, (1, 1))
    rebuilt = {"teacher_cutmix", "teacher_ensemble", "student_ensemble", *FROM_CUTMIX}
    assert planned(snakemake("-n")) == {"table": 1, **dict.fromkeys(rebuilt, 2)}


def test_results_without_weights_are_results(snakemake, built):
    """As after `git clone`. Where one has to be built, its seed's teachers are trained again, and what they taught."""
    for file in built:
        if file.suffix in {".safetensors", ".npz"}:
            file.unlink()
    assert planned(snakemake("-n")) == {}
    Path("results/smoke/kd_cutmix/seed1/result.json").unlink()
    jobs = planned(snakemake("-n"))
    assert jobs == dict.fromkeys({"table", *ROWS} - {"student_baseline"}, 1)


def test_damaged_runs_are_named_and_cost_no_table(built):
    """Here all of them are, being empty."""
    table = Path("results/smoke/table.md")
    table.unlink()
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "1"]
    command += ["--config", "protocol=smoke", "wandb_mode=disabled", "seeds=2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert re.search(rf"not whole: {table}: skipped: results/smoke/\S+ is not a whole result", run.stderr)
    assert "0 of 16 rows are there" in table.read_text()


def test_a_damaged_teacher_costs_no_other_row(snakemake, built):
    Path("results/smoke/teacher_cutmix/seed1/result.json").write_text("{")
    for row in ("kd_cutmix", "kd_mixup"):
        Path(f"results/smoke/{row}/seed1/result.json").unlink()
    jobs = planned(snakemake("-n"))
    assert jobs["kd_cutmix"] == jobs["kd_mixup"] == 1 and "teacher_cutmix" not in jobs


def test_published_files_are_built_upon(snakemake, built):
    """In half precision: where only they are there, nobody trains a teacher again, over its published result."""
    for file in built:
        if file.suffix in {".safetensors", ".npz"}:
            file.rename(file.with_name(HALF[file.name]))
    Path("results/smoke/kd_cutmix/seed1/result.json").unlink()
    Path("results/smoke/student_ensemble/seed1/result.json").unlink()
    assert planned(snakemake("-n")) == {"table": 1, "kd_cutmix": 1, "student_ensemble": 1}
    for file in Path("results").rglob(HALF["probabilities.npz"]):
        file.unlink()  # the weights are of the same epoch
    assert planned(snakemake("-n")) == {"table": 1, "kd_cutmix": 1, "student_ensemble": 1}
    jobs = planned(snakemake("-n", config="seeds=2 teacher_from=train"))
    assert jobs["teacher_cutmix"] == 1


@pytest.mark.slow
def test_a_real_build_with_a_row_that_fails(snakemake):
    """The failure is named and the rest built; once mended, only what lacks is run. An outdated row is trained anew."""
    config = "seeds=1 epochs=1 train_size=96 wandb_thumbnails=true"
    plan = snakemake("-n", "-p", config=config)
    assert "--wandb-thumbnails --share-teachers --seed" in plan
    assert "--share-teachers" not in snakemake("-n", "-p", config="share_teachers=false")
    folders = {Path(p).parent.name: Path(p) for p in re.findall(r"> (results/smoke/\S+)/run.log", plan)}
    damaged = folders["student_baseline"] / "checkpoint.safetensors"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no checkpoint")
    targets = [str(folders[row] / "result.json") for row in ("kd_cutmix", "student_baseline")]
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "2", *targets]
    command += ["--config", "protocol=smoke", "wandb_mode=disabled", *config.split()]
    output = subprocess.run(command, capture_output=True, text=True).stderr
    assert (folders["kd_cutmix"] / "result.json").is_file()
    assert re.findall(r"not finished: (\S+): error: .*checkpoint.safetensors is damaged", output) == [
        str(folders["student_baseline"])
    ]
    damaged.unlink()
    assert planned(snakemake("-n", *targets, config=config)) == {"student_baseline": 1}
    before = (folders["kd_cutmix"] / "model.safetensors").stat().st_mtime_ns
    os.utime(folders["kd_cutmix"] / "result.json", (1, 1))  # as if its recipe had been touched
    subprocess.run(command, check=True)
    assert (folders["kd_cutmix"] / "model.safetensors").stat().st_mtime_ns > before
    assert planned(snakemake("-n", *targets, config=config)) == {}


# One GPU a run -------------------------------------------------------------------------------------------


def test_places_are_spread_before_they_are_shared(tmp_path):
    held = [one_gpu.free_place(["0", "3"], 2, tmp_path) for _ in range(4)]
    assert [gpu for gpu, _ in held] == ["0", "3", "0", "3"]
    assert one_gpu.free_place(["0", "3"], 2, tmp_path) is None
    os.close(held[1][1])
    assert one_gpu.free_place(["0", "3"], 2, tmp_path)[0] == "3"


def test_each_run_sees_one_gpu_and_a_killed_one_gives_it_back(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "2,GPU-5a", "TMPDIR": str(tmp_path)}

    def start(command: str) -> subprocess.Popen:
        words = [sys.executable, ROOT / "one_gpu.py", "1", "sh", "-c", f"echo $CUDA_VISIBLE_DEVICES; {command}"]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)

    holding = [start("exec sleep 60"), start("exec sleep 60")]
    gpus = [process.stdout.readline().strip() for process in holding]
    assert sorted(gpus) == ["2", "GPU-5a"]
    waiting = start("true")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.5)
    holding[0].kill()
    assert waiting.communicate(timeout=10)[0].strip() == gpus[0]
    holding[1].kill()


def test_places_are_of_one_user_and_one_slurm_job(tmp_path, monkeypatch):
    """For which GPUs are numbered. Names of parts of one may have slashes."""
    held = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-5a/1/0")
    monkeypatch.setattr(one_gpu.tempfile, "gettempdir", lambda: tmp_path)
    monkeypatch.setattr(one_gpu.time, "sleep", lambda seconds: pytest.fail("waits"))
    monkeypatch.setattr(os, "set_inheritable", lambda file, inheritable: held.append(file))
    monkeypatch.setattr(os, "execvp", lambda *command: None)
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        one_gpu.main(1, ["true"])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-GPU-5a/1/0"
    for file in held:
        os.close(file)
    assert {folder.name for folder in tmp_path.iterdir()} == {f"gpus-{os.getuid()}-{job}" for job in ("7", "8")}


@pytest.mark.parametrize(("names", "gpus"), [("", []), ("-1", []), ("2,-1,3", ["2"]), ("GPU-5a,0", ["GPU-5a", "0"])])
def test_gpus_are_those_that_cuda_sees(names, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert one_gpu.visible_gpus() == gpus


def test_parts_of_a_gpu_are_no_gpus(tmp_path, monkeypatch):
    listed = [
        "GPU 0: NVIDIA H200 (UUID: GPU-5a)",
        "  MIG 1g.18gb Device 0: (UUID: MIG-1)",
        "GPU 1: NVIDIA H200 (UUID: GPU-5b)",
    ]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "\n".join(f"echo '{line}'" for line in listed))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert one_gpu.visible_gpus() == ["0", "1"]


def test_without_a_gpu_the_command_simply_runs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    words = [sys.executable, ROOT / "one_gpu.py", "1", "echo", "ran"]
    assert subprocess.run(words, capture_output=True, text=True).stdout == "ran\n"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "required: jobs_per_gpu"),
        (["1"], "and a command"),
        (["0", "true"], "a number from 1"),
        (["two", "true"], "invalid int value: 'two'"),
        (["1", "no-such-command"], "no-such-command: No such file"),
        (["1", "true"], "gpus-.*: File exists"),
    ],
)
def test_bad_words_are_refused_in_a_line(words, reason, tmp_path):
    (tmp_path / f"gpus-{os.getuid()}-7").touch()
    gpu = "0" if words == ["1", "true"] else "-1"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)}
    command = [sys.executable, ROOT / "one_gpu.py", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and re.search(rf"^one_gpu.py: error: .*{reason}", done.stderr.splitlines()[-1])


def test_a_place_that_somebody_else_made_a_link_is_refused(tmp_path):
    (tmp_path / "0-0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        one_gpu.free_place(["0"], 1, tmp_path)
    assert not (tmp_path / "elsewhere").exists()
