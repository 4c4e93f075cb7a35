"""Finished runs, read and sorted into the lines of the table: what tables, figures and answers are made from."""

import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from consistency import errors_by_chance
from run_files import (
    CHOICES,
    HALF,
    UserError,
    atomic_write,
    flags,
    full_name,
    load_probabilities,
    read_bins,
    read_csv,
    read_published,
    read_result,
    save_log_probabilities,
    sha256,
    variant,
)
from run_settings import NOT_IDENTITY, Config

PUBLISHED = ("accuracy", "ece", "oe")
SEED_NOISE = {"accuracy": 0.005, "ece": 0.015, "oe": 0.015}  # what one seed may be off by
# Protocols that train long enough to be held against the published numbers, which are of 500 epochs.
COMPARABLE = ("paper", "short")
OTHER = "Other runs"  # the table of those that the published ones do not have
# Settings that a row hands on to its teachers, as `epochs`: where all rows have them alike, they are the table's.
HANDED_ON = {setting.name for setting in dataclasses.fields(Config)} - NOT_IDENTITY
FURTHER = {
    "ece_15": "ECE, 15 bins",
    "adaptive_ece": "adaptive ECE",
    "classwise_ece": "classwise ECE",
    "nll": "NLL",
    "brier": "Brier",
}


# 1. Runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its `result.json`, the epochs of its `history.csv` and the bins of its `reliability.csv`.

    Either of the latter is empty where there is no such file: an ensemble has no history, an older run no bins.
    """

    result: dict[str, Any]
    history: list[dict[str, float]]
    bins: list[dict[str, float]]
    digest: str
    """SHA-256 of the three files"""


def read_run(path: Path) -> FinishedRun:
    """Read the run in a folder.

    Raises:
        UserError: a file is damaged, or lacks what a report needs; it names the file.
    """
    result, file = read_result(path), path / "result.json"
    try:
        whole = all(map(_whole_scores, (result[choice] for choice in CHOICES if choice in result)))
        kinds = {"versions": dict, "hardware": str, "precision": str | None, "processes": int | None}  # None: ensembles
        whole = whole and all(isinstance(result.get(name), kind) for name, kind in kinds.items())
        whole = whole and bool(trained_on(result))
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is not a whole result: start this row over with --overwrite")
    name = f"seed{result['seed']}{variant(result['changes'])}"
    if Path(os.path.abspath(path)).parts[-3:] != (result["protocol"], result["row"], name):
        raise UserError(
            f"{file} is the result of {result['protocol']}/{result['row']}/{name}: it lies in the wrong folder, move it"
        )
    digest = hashlib.sha256(file.read_bytes())
    tables = []
    for name, read in {"history.csv": read_csv, "reliability.csv": read_bins}.items():
        there = (path / name).is_file()
        digest.update((path / name).read_bytes() if there else b"")
        tables.append(read(path / name) if there else [])
    return FinishedRun(result, *tables, digest.hexdigest())


def _whole_scores(scores: dict[str, Any]) -> bool:
    """Whether those of one choice of epoch are numbers, and all there but for what older runs lack."""
    further = [scores[metric] for metric in FURTHER if metric in scores]
    further += [*scores["scaled"].values(), fitted_temperature(scores)]
    return all(0 <= scores[metric] <= 1 for metric in PUBLISHED) and all(map(math.isfinite, further))


def trained_on(result: dict[str, Any]) -> str:
    """How much a run, or an ensemble's members, trained."""
    settings = result["settings"]
    images = f"{settings['train_size']:,} images" if settings["train_size"] else "all"
    images += f" but {settings['val_size']:,}" if settings.get("val_size") and images == "all" else ""
    return f"{settings['epochs']} epoch{'s' * (settings['epochs'] > 1)} on {images} of {result['dataset']}"


def run_folders(results_dir: Path, protocol: str) -> list[Path]:
    """Folders of the finished runs, in the order of their names."""
    return sorted(file.parent for file in results_dir.glob(f"{protocol}/*/seed*/result.json"))


def recompute(path: Path) -> None:
    """Compute a finished run's metrics anew from its probabilities and write them, its reliability diagram and what of
    its predictions can be published, where `common.Run` does.

    Raises:
        UserError: the probabilities or the result are missing or damaged.
    """
    from calibration import calibration_metrics, scores_of_run, write_reliability

    result = read_run(path).result
    try:
        arrays = load_probabilities(path / "probabilities.npz")
    except UserError as error:
        raise UserError(f"{error}, so this run keeps the metrics it has") from None
    scores, metrics = scores_of_run(arrays), calibration_metrics(arrays["best"], arrays["labels"])
    for choice, values in scores.items():
        result[choice] = {"epoch": result.get(choice, {}).get("epoch"), **values}
    write_reliability(path, metrics, full_name(result["row"], result["changes"]), result["best"]["epoch"])
    if (half := HALF["probabilities.npz"]) in result["files"]:
        save_log_probabilities(path, arrays)
        result["files"][half] = sha256(path / half)
    with atomic_write(path / "result.json") as file:
        file.write(json.dumps(result, indent=2).encode())


def recompute_all(paths: Sequence[Path]) -> list[str]:
    """`recompute` for many runs, one to a processor; returns what went wrong, a line each."""

    def problem(path: Path) -> str | None:
        try:
            recompute(path)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for line in pool.map(problem, paths) if line]


# 2. Rows -------------------------------------------------------------------------------------------------


class Statistic(NamedTuple):
    mean: float
    sd: float | None
    """standard deviation over seeds, of the sample; None with one seed"""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def beyond_seed_noise(self, metric: str, expected: float) -> bool:
        """Whether it differs by more than two standard deviations or, with one seed, 0.005 of accuracy, 0.015 else."""
        return abs(self.mean - expected) > (SEED_NOISE[metric] if self.sd is None else 2 * self.sd)


def fitted_temperature(scores: dict[str, Any]) -> float:
    """The mean of those of the two halves of the test images, or the one of the held-out images."""
    return statistics.fmean(scores["temperatures"])


def number(metric: str, value: float, sign: str = "") -> str:
    """A metric's value as text: accuracy in percent, temperatures and correlations to two decimals, others to four."""
    if metric == "accuracy":
        return f"{100 * value:{sign}z.2f}"
    return f"{value:{sign}z.{2 if metric in ('temperature', 'correlation') else 4}f}"


def plus_minus(metric: str, statistic: Statistic | None, sep: str = "±", sign: str = "") -> str:
    """Mean and, where there is one, deviation; nothing for None. `sign` is the mean's."""
    if statistic is None:
        return ""
    text = number(metric, statistic.mean, sign)
    return text if statistic.sd is None else f"{text}{sep}{number(metric, statistic.sd)}"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Cells as a table in Markdown; all columns but the first `left` are aligned to the right."""
    rule = [":--"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


@dataclass
class Row:
    """A line of the table: one row, or one variant of it, with its runs over seeds."""

    row: str
    changes: dict[str, Any]
    table: str
    technique: str
    published: dict[str, float | None] = field(default_factory=dict)
    runs: list[FinishedRun] = field(default_factory=list)

    @property
    def unlike(self) -> list[str]:
        """Settings that are not the same in all runs, and `recipe` where its lines are not."""
        made = [
            {**r["settings"], "precision": r.get("precision"), "recipe": r["versions"].get("recipe")}
            for r in (run.result for run in self.runs)
        ]
        names = set().union(*made) - NOT_IDENTITY
        values = {name: {json.dumps(m[name]) for m in made if m.get(name) is not None} for name in names}
        return sorted(name for name in names if len(values[name]) > 1)

    @property
    def label(self) -> str:
        return full_name(self.row, self.changes)

    @property
    def choices(self) -> list[str]:
        """Which epochs the runs report, of `best`, `last` and `selected`."""
        return [choice for choice in CHOICES if self.runs and all(choice in run.result for run in self.runs)]

    @property
    def minutes(self) -> float | None:
        """What a run's epochs took with their evaluation, the mean over the seeds; None for an ensemble."""
        seconds = [sum(epoch.get("seconds", math.nan) for epoch in run.history) for run in self.runs if run.history]
        return statistics.fmean(seconds) / 60 if seconds and math.isfinite(sum(seconds)) else None

    def values(self, choice: str, metric: str, scaled: bool = False) -> list[float] | None:
        """A metric over the seeds, raw or after temperature scaling; None unless every run has it."""
        scores = [run.result[choice] for run in self.runs]
        values = [(score["scaled"] if scaled else score).get(metric) for score in scores]
        return None if None in values or not values else values

    def statistic(self, choice: str, metric: str, scaled: bool = False) -> Statistic | None:
        values = self.values(choice, metric, scaled)
        return values and Statistic.of(values)

    def temperature(self, choice: str) -> Statistic | None:
        """The fitted temperature over the seeds; None without runs."""
        return Statistic.of([fitted_temperature(run.result[choice]) for run in self.runs]) if self.runs else None

    @property
    def held_out(self) -> dict[int, float]:
        """Seed -> accuracy on its held-out images at the epoch that they chose, of runs that have it."""
        found = {}
        for run in self.runs:
            by_epoch = {epoch.get("epoch"): epoch.get("val_accuracy") for epoch in run.history}
            found[run.result["seed"]] = by_epoch.get(run.result.get("selected", {}).get("epoch"))
        return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}

    @property
    def by_chance(self) -> dict[str, Statistic]:
        """ECE and OE of perfectly calibrated models with the confidences of the best epochs, and their deviations
        between test sets, each the mean over the seeds; empty unless every run has its bins."""
        bins = [[[b[name] for b in run.bins] for name in ("count", "confidence")] for run in self.runs if run.bins]
        if not bins or len(bins) < len(self.runs):
            return {}
        errors = np.array([errors_by_chance(*columns) for columns in bins]).mean(0)
        return {metric: Statistic(*map(float, pair)) for metric, pair in zip(("ece", "oe"), errors, strict=True)}

    @property
    def as_its_protocol(self) -> bool:
        """Whether there are runs, trained as their protocol says, but for images held out and precision."""
        return bool(self.runs) and not self.changes.keys() & HANDED_ON - {"val_size", "precision"}

    @property
    def comparable(self) -> bool:
        """Whether there are runs, and all of them trained long enough to be held against the published numbers."""
        return self.as_its_protocol and all(run.result["protocol"] in COMPARABLE for run in self.runs)

    def difference(self, choice: str, metric: str) -> tuple[float, bool] | None:
        """Ours minus the published number, where they are comparable, and whether that is `beyond_seed_noise`."""
        ours, theirs = self.statistic(choice, metric), self.published.get(metric)
        if ours is None or theirs is None or not self.comparable:
            return None
        return ours.mean - theirs, ours.beyond_seed_noise(metric, theirs)


def sort_into_rows(runs: Sequence[FinishedRun]) -> tuple[list[Row], list[Row]]:
    """The lines of the table, in the published order; and other runs' lines.

    A table's rows may have settings of their own, all alike (`settings_of_most`). Below them are those that hold out
    another number of images. Rows have their published numbers, unless no run is of CIFAR-100; without runs they are
    empty lines, which images of one's own do without. Beside runs of CIFAR-100, those of other images are others.
    """
    lines: dict[str, Row] = {}
    for run in sorted(runs, key=lambda run: run.result["seed"]):
        row = Row(run.result["row"], run.result["changes"], OTHER, "")
        lines.setdefault(row.label, row).runs.append(run)
    published, table = read_published(), []
    names = {line["row"] for line in published}
    elsewhere = bool(runs) and all(run.result["dataset"] != "cifar100" for run in runs)
    fitting = [row for row in lines.values() if elsewhere or row.runs[0].result["dataset"] == "cifar100"]
    of_most = settings_of_most(row for row in fitting if row.row in names)
    for line in published:
        numbers = {} if elsewhere else {metric: line[metric] for metric in PUBLISHED}
        changes = of_most | line["changes"]
        like = [row for row in fitting if row.row == line["row"] and _but_for(of_most, row) == line["changes"]]
        if not any(row.changes == changes for row in like) and (numbers or not changes):
            like.append(Row(line["row"], changes, "", ""))
        for row in sorted(like, key=lambda row: (row.changes != changes, row.label)):
            added = {name: value for name, value in row.changes.items() if name not in line["changes"]}
            row.technique, row.table = f"{line['technique']} {flags(added)}".strip(), line["table"]
            row.changes, row.published = row.changes | line["changes"], numbers  # 4 as published, where a run says 4.0
            table.append(row)
    others = [row for row in lines.values() if row.table == OTHER]
    return table, sorted(others, key=lambda row: (row.row, row.label))


def settings_of_most(rows: Iterable[Row]) -> dict[str, Any]:
    """What the rows of a table have otherwise than their protocol, as after `snakemake --config epochs=60`: of settings
    that rows hand on to their teachers, what most rows have; {} where as many have nothing."""
    counts = Counter(json.dumps(row.changes) for row in rows if row.runs and row.changes.keys() <= HANDED_ON)
    most = min(counts, key=lambda changes: (-counts[changes], len(json.loads(changes)), changes), default="{}")
    return json.loads(most)


def _but_for(of_most: dict[str, Any], row: Row) -> dict[str, Any]:
    """What a row has otherwise than the table's rows, but for images held out."""
    return {k: v for k, v in row.changes.items() if k != "val_size" and (k, v) not in of_most.items()}


def best_settings(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """The settings with the best held-out accuracy, and how many were tried, for each row with more than one.

    Settings compete only where their runs have the same epochs, images and number of held-out images. They are compared
    over the seeds that all of them have, since each seed holds out other images.
    """
    tried: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.held_out:
            result = row.runs[0].result
            images = [result["settings"].get(name) for name in ("val_size", "image_size")]
            tried.setdefault((row.row, trained_on(result), *images), []).append(row)
    found = []
    for group in tried.values():
        seeds = set.intersection(*(set(row.held_out) for row in group))
        if len(group) > 1 and seeds:
            best = max(group, key=lambda row: statistics.fmean(row.held_out[seed] for seed in seeds))
            found.append((best, len(group)))
    return found


def as_published(table: Sequence[Row]) -> list[Row]:
    """A line for each row of the published table, without variants: all with the same settings and images."""
    of_most = settings_of_most(table)
    there = {row.row: row for row in table if row.changes == of_most}
    lines = [line for line in read_published() if not line["changes"]]
    return [there.get(line["row"]) or Row(line["row"], of_most, line["table"], line["technique"]) for line in lines]
