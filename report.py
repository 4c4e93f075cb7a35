"""Turn results/ into tables, figures and answers.

Every finished run of a protocol goes into results/<protocol>/table.md, table.csv and the terminal; runs with the
table's own settings go into results/<protocol>/figures/ too. Of the tables on CIFAR-100, the one with the most rows
(then the longest training) goes into README.md, between its two markers. table.md includes results/<protocol>/note.md.
"""

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import questions
from command_line import orderly_end, parse
from rows import (
    FURTHER,
    PUBLISHED,
    FinishedRun,
    Row,
    Statistic,
    as_published,
    best_settings,
    markdown_table,
    number,
    plus_minus,
    read_run,
    recompute_all,
    run_folders,
    settings_of_most,
    sort_into_rows,
    trained_on,
)
from run_files import CHOICES, UserError, atomic_write, csv_text, read_published
from run_settings import PROTOCOLS

ROOT = Path(__file__).resolve().parent
MARKERS = ("<!-- table:begin -->", "<!-- table:end -->")


@dataclass(kw_only=True)
class Config:
    protocol: str | None = None
    """report this protocol only; without it, all that have results"""
    results_dir: Path = Path("results")
    """where the run folders are, and where tables and figures go"""
    recompute: bool = False
    """first recompute the metrics in every run's result.json from its probabilities.npz"""
    check: bool = False
    """write nothing; name rows whose tables, figures or README.md are out of date, and exit with 1 if there are any"""
    readme: Path | None = None
    """file whose table is refreshed; by default README.md, and only for the repository's own results"""
    wandb: str | None = None
    """entity/project in Weights & Biases: build a report of its runs there, with the table of --protocol or else of
    README.md"""


# 1. Tables -----------------------------------------------------------------------------------------------


def _short(metric: str, statistic: Statistic | None) -> str:
    """`plus_minus` for narrow columns: 0.1104±.0012."""
    text = plus_minus(metric, statistic)
    return text if metric == "accuracy" else text.replace("±0.", "±.")


def _seeds(row: Row) -> str:
    time = f", {row.minutes:,.1f} min" if row.minutes else ""
    return f"{len(row.runs)} seed{'s' * (len(row.runs) > 1)}{time}" if row.runs else ""


def markdown_main_table(rows: Sequence[Row]) -> str:
    """The main table in Markdown: published and ours at every choice of epoch, with the difference, and by chance."""
    choices = [choice for choice in CHOICES if any(choice in row.choices for row in rows)]
    numbers = ["published"] * any(row.published for row in rows) + choices
    errors = numbers + ["by chance"] * any(row.by_chance for row in rows)
    columns = {"accuracy": numbers, "ece": errors, "oe": errors}
    titles = {"accuracy": "Accuracy, %", "ece": "ECE", "oe": "OE"}
    header = ["Recipe", "Seeds"] + ["Minutes"] * bool(choices)
    header += [f"{titles[metric]}: {name}" for metric, names in columns.items() for name in names]
    lines = []
    for row in rows:
        cells = [f"`{row.label}`", str(len(row.runs) or "")]
        cells += [f"{row.minutes:,.1f}" if row.minutes else ""] * bool(choices)
        lines.append(cells + [_cell(row, metric, name) for metric, names in columns.items() for name in names])
    return markdown_table(header, lines)


def _cell(row: Row, metric: str, name: str) -> str:
    if name == "by chance":
        return plus_minus(metric, row.by_chance.get(metric), " ± ")
    if name == "published":
        return "" if row.published.get(metric) is None else number(metric, row.published[metric])
    if name not in row.choices:
        return ""
    text = plus_minus(metric, row.statistic(name, metric), " ± ")
    if difference := row.difference(name, metric):
        text += f" ({number(metric, difference[0], '+')})"
        return f"**{text}**" if difference[1] else text
    return text


def markdown_further_table(rows: Sequence[Row]) -> str:
    """What reviewers ask for besides, before and after temperature scaling, in Markdown."""
    lines = []
    for row in rows:
        for choice in row.choices:
            cells = [f"`{row.label}`", choice]
            for metric in FURTHER:
                pair = [plus_minus(metric, row.statistic(choice, metric, scaled), " ± ") for scaled in (False, True)]
                cells.append(" → ".join(filter(None, pair)))
            lines.append([*cells, plus_minus("temperature", row.temperature(choice), " ± ")])
    return markdown_table(["Recipe", "Epoch", *FURTHER.values(), "Temperature"], lines, left=2)


def markdown_best_settings(rows: Sequence[Row]) -> str:
    """What each row does at the settings that held-out images chose for it; empty where none had a choice."""
    names = list(dict.fromkeys(row.row for row in rows))
    lines = []
    for row, tried in sorted(best_settings(rows), key=lambda pair: names.index(pair[0].row)):
        cells = [f"`{row.label}`", str(tried), str(len(row.runs))]
        cells.append(plus_minus("accuracy", Statistic.of([*row.held_out.values()]), " ± "))
        cells += [plus_minus(metric, row.statistic("selected", metric), " ± ") for metric in PUBLISHED]
        scaled = plus_minus("ece_15", row.statistic("selected", "ece_15", scaled=True), " ± ")
        lines.append([*cells, scaled, plus_minus("temperature", row.temperature("selected"), " ± ")])
    header = ["Recipe", "Settings tried", "Seeds", "Accuracy, %: held out", "Accuracy, %", "ECE", "OE"]
    return markdown_table([*header, "ECE, 15 bins, scaled", "Temperature"], lines) if lines else ""


BEST_SETTINGS = """\
For each row, the settings that had the best accuracy on held-out images, of those tried with `--val-size`, over the
seeds that all its settings have. The other numbers are on the test images, which chose nothing, at the *selected*
epoch. Compare only rows with equally many settings tried. Multiplying a loss by a number acts like multiplying the
learning rate by it, so at one learning rate for all, rows also differ in step size.
"""
BRACKETS = """\
In brackets: ours minus the published number, in bold where that is more than two standard deviations or, with one seed,
more than 0.5 points of accuracy or 0.015 of ECE or OE. Even for the same epochs, chance alone makes 35 % of cells bold
with two seeds, 23 % with three and 9 % with ten, because the published number is a single run too; *last* and shorter
protocols differ by more than chance.
"""
FIGURES = """\
[Figures](figures) show reliability diagrams, the teachers' calibration curves, the temperatures that teachers and
students need, accuracy against ECE, how confident each row is, and accuracy and ECE over the epochs.
"""
LEGEND = """\
Mean ± standard deviation over the seeds. ECE, the expected calibration error, and OE, the overconfidence error, have
100 bins; lower is better. *best* is the epoch with the best test accuracy, as published; *last* is the last epoch;
*selected*, for runs with `--val-size`, is the best on held-out training images; an ensemble averages its members'
predictions, each at its own epoch of that name. *By chance*: the ECE or OE of a perfectly calibrated model with the
confidences of *best*, on as many test images, ± its standard deviation between test sets. Minutes: training and
evaluation of one run, mean over the seeds; not comparable if runs shared machines.
"""


def _computed_on(result: dict[str, Any]) -> str:
    processes = result.get("processes") or 1
    several = f"{processes} processes" if processes > 1 else None
    return ", ".join(filter(None, [result["hardware"], result.get("precision"), several]))


def notes(protocol: str, rows: Sequence[Row]) -> str:
    """What a reader has to know of the protocol before the numbers."""
    results = [run.result for row in rows for run in row.runs]
    lines = as_published(rows)
    there = sum(bool(row.runs) for row in lines)
    there = f"{there} of {len(lines)} rows are there" if there or not results else "rows of one's own"
    text = f"Protocol `{protocol}`: {there}"
    if not results:
        return f"{text}."
    computed = [result for result in results if result.get("precision")] or results  # ensembles compute nothing
    training = " and ".join(sorted({trained_on(result) for result in results}))
    hardware = " and ".join(sorted({_computed_on(result) for result in computed}))
    text += f", {training}, run on {hardware}."
    if adopted := [f"`{row.label}`" for row in rows if any("adopted" in run.result for run in row.runs)]:
        text += f" Trained elsewhere, so *best* and *last* are the weights as they came: {', '.join(adopted)}."
    if unlike := [f"`{row.label}` ({', '.join(row.unlike)})" for row in rows if row.unlike]:
        text += f" Runs of one row were not made alike: {'; '.join(unlike)}."
    if not any(row.comparable for row in rows):
        text += " Not comparable with the published numbers, which are of 500 epochs on all of cifar100."
    return text


def _commits(rows: Sequence[Row]) -> str:
    """Of which the runs are; with a + where files had been changed since."""
    found = {str(run.result["versions"].get("commit")) for row in rows for run in row.runs}
    return f"Commits: {', '.join(sorted({commit[:7] + '+' * commit.endswith('+') for commit in found}))}."


def markdown(protocol: str, rows: Sequence[Row], others: Sequence[Row], note: str = "") -> str:
    """The whole of table.md. `note` is what a person has to say of these runs."""
    legend = LEGEND + BRACKETS * any(row.comparable for row in rows)
    about = f"{notes(protocol, rows or others)} {_commits([*rows, *others])}"
    parts = [f"# Results, protocol {protocol}", about, *filter(None, [note.strip()])]
    parts += [markdown_main_table(rows or others), legend.strip(), FIGURES.strip()]
    parts += filter(None, [questions.markdown(rows) if rows else ""])
    if best := markdown_best_settings([*rows, *others]):
        parts += ["## Each row at its best settings", BEST_SETTINGS.strip(), best]
    parts += ["## Further metrics, before → after temperature scaling", markdown_further_table(rows or others)]
    parts.append(
        "Each half of the test images (stratified) is scaled by the temperature with the lowest NLL on the other; "
        "*selected* by that of the held-out images. Adaptive and classwise ECE have 15 bins; NLL is the negative "
        "log-likelihood."
    )
    if rows and others:
        parts += ["## Other runs", "Rows and settings that the published table does not have."]
        parts += [markdown_main_table(others), markdown_further_table(others)]
    return "\n\n".join(parts) + "\n"


def readme_block(protocol: str | None, rows: Sequence[Row]) -> str:
    """What stands between the two markers of README.md: published and ours, or without a protocol published alone."""
    if protocol is None:
        return f"The published numbers; `uv run report.py` puts ours beside them.\n\n{markdown_main_table(rows)}"
    legend = LEGEND + BRACKETS * any(row.comparable for row in rows)
    more = f"Further metrics and figures: [results/{protocol}/table.md](results/{protocol}/table.md)."
    return "\n\n".join([notes(protocol, rows), markdown_main_table(rows), legend + more])


def csv_table(rows: Sequence[Row]) -> str:
    """All statistics as fractions, one line for each row and choice of epoch; rows without runs have one line."""
    lines = []
    for row in rows:
        for choice in row.choices or [""]:
            line: dict[str, Any] = {
                "row": row.row,
                "changes": json.dumps(row.changes) if row.changes else "",
                "table": row.table,
                "technique": row.technique,
                "epoch": choice,
                "seeds": len(row.runs),
                "minutes": row.minutes,
            }
            by_chance = row.by_chance if choice == "best" else {}
            for metric in PUBLISHED:
                line[f"{metric}_published"] = row.published.get(metric)
                line |= _csv_cells(metric, row.statistic(choice, metric))
                difference, outside = row.difference(choice, metric) or (None, None)
                line |= {f"{metric}_difference": difference, f"{metric}_outside": outside}
                line |= _csv_cells(f"{metric}_by_chance", by_chance.get(metric)) if metric != "accuracy" else {}
            for metric in FURTHER:
                line |= _csv_cells(metric, row.statistic(choice, metric))
            line |= _csv_cells("temperature", row.temperature(choice))
            for metric in (*PUBLISHED, *FURTHER):
                if metric != "accuracy":
                    line |= _csv_cells(f"{metric}_scaled", row.statistic(choice, metric, scaled=True))
            lines.append({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()})
    return csv_text(lines)


def _csv_cells(name: str, statistic: Statistic | None) -> dict[str, float | None]:
    mean, sd = statistic or (None, None)
    return {name: mean, f"{name}_sd": sd}


def terminal(protocol: str, rows: Sequence[Row], others: Sequence[Row], note: str = "") -> str:
    """Both tables, at most 100 columns wide."""

    def block(row: Row, lines: Sequence[str]) -> Iterator[str]:
        names = [*textwrap.wrap(row.label, 23, subsequent_indent="  "), _seeds(row)]
        for name, line in zip_longest(filter(None, names), lines, fillvalue=""):
            yield f"{name[:23]:23} {line}".rstrip()

    def main_lines(row: Row) -> Iterator[str]:
        if row.published:
            yield f"{'published':9}" + "".join(
                f"{'' if row.published[metric] is None else number(metric, row.published[metric]):>{width}} {'':8}"
                for metric, width in zip(PUBLISHED, (11, 13, 13), strict=True)
            )
        for choice in row.choices:
            line = f"{choice:9}"
            for metric, width in zip(PUBLISHED, (11, 13, 13), strict=True):
                difference = row.difference(choice, metric)
                delta = f"{number(metric, difference[0], '+')}{'*' * difference[1]}" if difference else ""
                line += f"{_short(metric, row.statistic(choice, metric)):>{width}} {delta:8}"
            yield line
        if by_chance := row.by_chance:
            yield f"{'by chance':9}{'':20}" + "".join(f"{_short(m, v):>13} {'':8}" for m, v in by_chance.items())

    def further_lines(row: Row) -> Iterator[str]:
        for choice in row.choices:
            temperature = row.temperature(choice)
            for scaled in (False, True) if temperature else (False,):
                line = f"  T {temperature.mean:5.2f}" if scaled else choice
                cells = (_short(m, row.statistic(choice, m, scaled)) for m in FURTHER)
                yield f"{line:9}" + "".join(f" {cell:>12}" for cell in cells)

    rows, others = (rows, others) if rows else (others, [])
    out = textwrap.wrap(notes(protocol, rows), 100) + textwrap.wrap(note, 100)
    out.append(f"\n{'':33}{'accuracy, %':>11} {'':8}{'ECE, 100 bins':>13} {'':8}{'OE, 100 bins':>13}")
    for row in rows:
        out += block(row, list(main_lines(row)))
    explained = "Mean±standard deviation over the seeds"
    if any(row.comparable and row.published for row in rows):
        explained += "; then ours minus the published, * where that is more than two standard deviations or, with one "
        explained += "seed, than 0.5 points of accuracy or 0.015 of ECE or OE"
    explained += ". By chance: what a perfectly calibrated model with the confidences of `best` would have, and its "
    explained += "deviation between test sets"
    out += textwrap.wrap(f"{explained}.", 100)
    out.append(f"\n{'':33}" + "".join(f" {title:>12}" for title in FURTHER.values()))
    for row in rows:
        if row.runs:
            out += block(row, list(further_lines(row)))
    out.append("Below each: the same after temperature scaling by T, the mean of the fitted temperatures.")
    if others:
        out.append("\nOther runs, with settings that the published table does not have")
        for row in others:
            out += block(row, [*main_lines(row), *further_lines(row)])
    return "\n".join(out)


# 2. Files ------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What the results of one protocol say.

    `problems` are what had to be left out; `note` is what results/<protocol>/note.md says, for table.md to begin with.
    """

    protocol: str
    table: list[Row]
    others: list[Row]
    problems: list[str]
    note: str = ""

    @classmethod
    def read(cls, results_dir: Path, protocol: str) -> "Report":
        runs, problems = [], []
        for path in run_folders(results_dir, protocol):
            try:
                runs.append(read_run(path))
            except UserError as error:
                problems.append(str(error))
        note = results_dir / protocol / "note.md"
        try:
            text = note.read_text(encoding="utf-8") if note.is_file() else ""
        except UnicodeDecodeError:
            raise UserError(f"{note} is not in UTF-8: save it in that encoding") from None
        table, others = sort_into_rows(runs)
        if others and not any(row.runs for row in table):
            table = []  # rows or images of one's own alone: nothing to set beside the published table
        return cls(protocol, table, others, problems, text)

    @property
    def runs(self) -> list[FinishedRun]:
        return [run for row in self.table + self.others for run in row.runs]

    @property
    def lacking(self) -> list[str]:
        """Runs from before there were bins, or one of the further metrics."""
        return [
            f"{run.result['row']}/seed{run.result['seed']}"
            for run in self.runs
            if not run.bins or not FURTHER.keys() <= run.result["best"].keys()
        ]

    def texts(self) -> dict[str, str]:
        """File name -> content, in results/<protocol>."""
        rows = self.table + self.others
        return {"table.md": markdown(self.protocol, self.table, self.others, self.note), "table.csv": csv_table(rows)}

    @property
    def drawn(self) -> list[Row]:
        """What the figures show: the rows as published, then those of one's own with the same settings; no variants."""
        alike = settings_of_most(self.table or self.others)
        rows = as_published(self.table) if self.table else []
        return rows + [row for row in self.others if row.changes == alike]

    def sources(self) -> dict[str, str]:
        """What the figures are drawn from: run -> its digest."""
        return {f"{row.row}/seed{run.result['seed']}": run.digest for row in self.drawn for run in row.runs}


def write(report: Report, folder: Path) -> None:
    """Write tables and figures of one protocol."""
    from figures import draw

    for name, text in report.texts().items():
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    manifest = folder / "figures" / "sources.json"
    drawn = draw(report.drawn, manifest.parent)
    for name in set(_read_manifest(manifest)["figures"]) - set(drawn):
        (manifest.parent / name).unlink(missing_ok=True)
    with atomic_write(manifest) as file:
        file.write(json.dumps({"figures": drawn, "runs": report.sources()}, indent=2).encode())


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
        return {"figures": list(manifest["figures"]), "runs": dict(manifest["runs"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"figures": [], "runs": {}}


def stale(report: Report, folder: Path) -> list[str]:
    """What of a protocol's tables and figures is not that of its results, in a line each that names the rows."""
    lines = []
    for name, text in report.texts().items():
        old = (folder / name).read_bytes().decode(errors="replace") if (folder / name).is_file() else ""
        lines += _compare(folder / name, old, text)
    manifest, sources = _read_manifest(folder / "figures" / "sources.json"), report.sources()
    changed = {key for key in manifest["runs"].keys() | sources.keys() if manifest["runs"].get(key) != sources.get(key)}
    if changed:
        rows = sorted({key.split("/")[0] for key in changed})
        lines.append(f"{folder / 'figures'} are older than the results of {', '.join(rows)}")
    for name in manifest["figures"]:
        if not (folder / "figures" / name).is_file():
            lines.append(f"{folder / 'figures' / name} is missing")
    return lines


def _compare(path: Path, old: str, new: str) -> list[str]:
    """Nothing, or a line that says which rows differ. A table's line begins with its row."""
    if old == new:
        return []
    differ = set(old.splitlines()) ^ set(new.splitlines())
    known = {line["row"] for line in read_published()}
    names = {match[1] for line in differ if (match := re.match(r"(?:\| `)?(\w+)(?:[` ][^,]*\||,)", line))}
    rows = sorted(names & known) + sorted(names - known - {"row"})
    return [f"{path} is older than the results of {', '.join(rows)}" if rows else f"{path} is not up to date"]


def for_readme(reports: dict[str, Report]) -> str | None:
    """The protocol on CIFAR-100 that has the most rows and, of these, trains longest; None where none has any."""
    names = [name for name in PROTOCOLS if name in reports and PROTOCOLS[name].dataset == "cifar100"]  # longest first
    rows = {name: sum(row.as_its_protocol for row in as_published(reports[name].table)) for name in names}
    return max(filter(rows.get, rows), key=rows.get, default=None)


def refresh_readme(path: Path, block: str, check: bool) -> list[str]:
    """Put the block between the markers of README.md; checking, only say what is not up to date, as `stale` does."""
    try:
        old = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not in UTF-8"
        raise UserError(f"{path} cannot be read: {reason} (--readme)") from None
    begin, end = (old.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        print(f"{path} has no {' and '.join(MARKERS)}: it is left as it is", file=sys.stderr)
        return []
    new = f"{old[: begin + len(MARKERS[0])]}\n{block}\n{old[end:]}"
    if check:
        return _compare(path, old, new)
    if old != new:
        with atomic_write(path) as file:
            file.write(new.encode())
        print(f"{path}: the table is refreshed")
    return []


# 3. Command line -----------------------------------------------------------------------------------------


def main(cfg: Config) -> int:
    """Report as the settings say. Returns the exit status: 1 if something is damaged or, checking, out of date."""
    found = sorted({file.parts[-4] for file in cfg.results_dir.glob("*/*/seed*/result.json")})
    found.sort(key=[*PROTOCOLS, *found].index)
    if cfg.protocol and cfg.protocol not in found:
        raise UserError(
            f"no results of protocol {cfg.protocol} in {cfg.results_dir} (found: {', '.join(found) or 'none'}): "
            "check --protocol and --results-dir, or run a row"
        )
    if cfg.check and (cfg.recompute or cfg.wandb):
        raise UserError(
            f"--check writes nothing and {'--recompute' if cfg.recompute else '--wandb'} does: give one of them"
        )
    problems, outdated = [], []
    chosen = [cfg.protocol] if cfg.protocol else found
    if cfg.recompute:
        problems += recompute_all([path for protocol in chosen for path in run_folders(cfg.results_dir, protocol)])
    reports = {protocol: Report.read(cfg.results_dir, protocol) for protocol in found}
    for protocol in chosen:
        report, folder = reports[protocol], cfg.results_dir / protocol
        problems += [problem for problem in report.problems if problem not in problems]
        if cfg.check:
            outdated += stale(report, folder)
            continue
        write(report, folder)
        print(terminal(protocol, report.table, report.others, report.note))
        if report.lacking:
            lacking = textwrap.shorten(", ".join(report.lacking), 200)
            print(f"without further metrics ({lacking}): --recompute adds them, from probabilities.npz")
        print(f"written: {folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'figures'}\n")

    shown = for_readme(reports)
    rows = reports[shown].table if shown else sort_into_rows([])[0]
    own = cfg.results_dir.resolve() == ROOT / "results"
    if readme := cfg.readme or (ROOT / "README.md" if own else None):
        outdated += refresh_readme(readme, readme_block(shown, rows), cfg.check)
        problems += [problem for problem in reports[shown].problems if problem not in problems] if shown else []

    if cfg.wandb:
        from wandb_report import publish

        published = (cfg.protocol, reports[cfg.protocol].table) if cfg.protocol else (shown, rows)
        print(f"report: {publish(cfg.wandb, *published)}")
    for line in problems:
        print(f"skipped: {line}", file=sys.stderr)
    for line in outdated:
        print(f"{line}: this command without --check updates it", file=sys.stderr)
    if any(cfg.results_dir.glob("*/seed*/result.json")):
        folder = cfg.results_dir.resolve()
        raise UserError(f"{folder} is of one protocol: --results-dir {folder.parent} --protocol {folder.name} reads it")
    if not found and not (cfg.check and cfg.results_dir.is_dir()):
        raise UserError(
            f"there are no results in {cfg.results_dir} (--results-dir): run a row first, for example "
            "uv run recipes/teacher_baseline.py --protocol smoke, which takes two minutes"
        )
    return 1 if problems or outdated else 0


def cli() -> None:
    with orderly_end():
        sys.exit(main(parse(Config, __doc__)))


if __name__ == "__main__":
    cli()
