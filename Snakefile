"""The whole table as one graph, for Snakemake: each run is a job, with its teachers or members for input.

    uv run --extra table snakemake --cores 2 --config protocol=smoke seeds=3

`--config` takes `seeds` (how many, from 0), `variants=true` for the published variants too, `jobs_per_gpu`, and every
setting that a row hands on (`protocol`, `data_dir`, `val_size`, ...: `common.Config`). What a row builds upon is in its
recipe: the fields `teacher`, `teachers` and `members` of its settings are asked. docs/cluster.md has the rest.
"""

import dataclasses
import re
import shlex
import signal
import sys
from collections import Counter
from contextlib import suppress

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a cluster's warning is for the run, not for the Snakemake around it
sys.path.insert(0, workflow.basedir)

import common
from command_line import parse as parse_flags  # `parse` is a name of Snakemake's own, as `report` is
from rows import sort_into_rows
from run_files import UserError, files_for, flag, flags as flags_of, read_result

OWN = {"seeds", "variants", "jobs_per_gpu"}
config.update({name: value == "true" for name, value in config.items() if value in ("true", "false")})
config.setdefault("share_teachers", config.get("protocol") in ("brief", "small", "cpu", "smoke"))  # under 1 GB


def words(name, value):
    """A setting as words of a command line."""
    if isinstance(value, bool):
        return [flag(name)] * value
    return [flag(name), *map(str, value if isinstance(value, list) else [value])]


FLAGS = [word for name, value in config.items() if name not in OWN for word in words(name, value)]
for name in config.keys() - OWN - {field.name for field in dataclasses.fields(common.Config)}:
    raise WorkflowError(f"--config: {flag(name)} is no setting that all rows have: see docs/cluster.md")
if not re.fullmatch(r"[1-9]\d*", str(config.get("seeds", 3))) or "seed" in config:
    raise WorkflowError("--config: seeds takes a number from 1 (3: seeds 0, 1, 2); for one seed, use a recipe's --seed")
if not re.fullmatch(r"[1-9]\d*", str(config.get("jobs_per_gpu", 1))):
    raise WorkflowError("--config: jobs_per_gpu takes a number from 1, such as 2: two runs on each GPU")
if config.get("variants", False) not in (True, False):
    raise WorkflowError("--config: variants takes only true or false")
if "overwrite" in config:  # it would delete the log that a run is writing to
    raise WorkflowError("--config: overwrite is for a recipe alone; here, -R kd_cutmix starts it over, -F all rows")
SEEDS = range(int(config.get("seeds", 3)))
ONE_GPU = [sys.executable, str(common.ROOT / "one_gpu.py"), str(config.get("jobs_per_gpu", 1))]
WEIGHTS, PROBABILITIES = "model.safetensors", "probabilities.npz"
NEEDED = {"teacher": WEIGHTS, "teachers": WEIGHTS, "members": PROBABILITIES}  # setting: which of their files is used


def recipe(row):
    return str(common.RECIPES / f"{row}.py")


def configured(row, variant=""):
    """A row's run with seed 0, and its folder with any."""
    cfg = parse_flags(common.config_type(common.load_recipe(row)), args=[*FLAGS, *shlex.split(variant)])
    run = common.Run(row, dataclasses.replace(cfg, device="cpu"))  # only asked: the GPU may be another machine's
    return run, str(run.path.with_name(run.path.name.replace("seed0", "seed{seed}", 1)))


def needed(run):
    """What this run reads of others: (row, or a run's folder, and the file in it)."""
    for setting, file in NEEDED.items():
        rows = getattr(run.cfg, setting, ())
        yield from [(row, file) for row in ([rows] if isinstance(rows, str) else rows)]


def inputs(run):
    """The files of other runs that this one reads, for its seed: where only some that serve for them are there, as in
    published results, these."""
    def files(wildcards):
        for row, file in needed(run):
            named = Path(row, "result.json").is_file()
            folder = Path(row if named else configured(row)[1].format(seed=wildcards.seed))
            finished = (folder / "result.json").is_file() and run.cfg.teacher_from == "results"
            names = ()
            if finished:
                with suppress(UserError):  # a damaged one costs the rows that need it, not all
                    names = files_for(file, read_result(folder))
            yield str(folder / next((name for name in names if (folder / name).is_file()), file))

    return files


try:
    variants = [(line.row, flags_of(line.changes)) for line in sort_into_rows([])[0] if line.changes]
    JOBS = {(row, flags): configured(row, flags) for row, flags in [(row, "") for row in common.recipe_names()] + variants}
except UserError as error:
    raise WorkflowError("--config: " * (not str(error).startswith(str(common.RECIPES))) + str(error))

IN_TABLE = [path for (_, flags), (_, path) in JOBS.items() if not flags or config.get("variants")]
RESULTS = [f"{path.format(seed=seed)}/result.json" for path in IN_TABLE for seed in SEEDS]
WAITING = Counter(row for run, _ in JOBS.values() for row, _ in needed(run))
ANY = next(run.cfg for run, _ in JOBS.values())
REPORT = ANY.results_dir / ANY.protocol
REPORT_FLAGS = ["--protocol", ANY.protocol, "--results-dir", str(ANY.results_dir)]


wildcard_constraints:
    seed=r"\d+",


rule all:  # results by name: Snakemake builds what a target lacks, but not what a table was once made from
    input:
        RESULTS,
        REPORT / "table.md",


rule table:
    input:
        RESULTS,
    output:
        REPORT / "table.md",
        REPORT / "table.csv",
        REPORT / "figures" / "sources.json",
    log:
        REPORT / "report.log",
    params:
        command=shlex.join([sys.executable, f"{common.ROOT}/report.py", *REPORT_FLAGS]),
    shell:
        "{params.command} > {log:q} 2>&1"


for (row, flags), (run, path) in JOBS.items():
    rule:
        name:
            re.sub(r"\W+", "_", row + flags)
        input:
            recipe(row),
            inputs(run),
        output:
            [f"{path}/{name}" for name in ("result.json", PROBABILITIES, *[WEIGHTS] * hasattr(run.cfg, "lr"))],
        priority:
            WAITING[row]  # else a teacher may be left for last, and one core alone be busy with it
        log:
            f"{path}/run.log",
        params:
            command=shlex.join([*ONE_GPU, sys.executable, recipe(row), *FLAGS, *shlex.split(flags)]),
            # for Snakemake sets both to 1, whatever a cluster gives to the job; torch heeds the smaller one
            cpus=lambda wildcards, threads, resources: resources.get("cpus_per_task", threads),
        shell:
            "OMP_NUM_THREADS={params.cpus} MKL_NUM_THREADS={params.cpus} "
            "exec {params.command} --seed {wildcards.seed} > {log:q} 2>&1"


def last_line(log):
    return (log.read_text().splitlines() or [""])[-1]


onerror:
    for path, seed in [(path, seed) for _, path in JOBS.values() for seed in SEEDS]:
        folder = Path(path.format(seed=seed))
        if (folder / "run.log").is_file() and not (folder / "result.json").is_file():
            print(f"not finished: {folder}: {last_line(folder / 'run.log')}", file=sys.stderr)
    if all(Path(result).is_file() for result in RESULTS) and (REPORT / "report.log").is_file():
        print(f"not whole: {REPORT / 'table.md'}: {last_line(REPORT / 'report.log')}", file=sys.stderr)
