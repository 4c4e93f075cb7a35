"""The figures of a report, PNG and SVG. Shape and lightness tell rows apart, so they are legible in grey; seeds are
combined, except in `temperatures`.

The same versions draw the same bytes everywhere: no dates, no random names.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image

from consistency import consistency_bars
from questions import TAUGHT_BY
from rows import Row, fitted_temperature, plus_minus
from run_files import atomic_write

BLUE, PALE_BLUE, RED, GREY = "#2c5784", "#9dbbd8", "#b3293f", "0.72"
COLORS = (BLUE, RED, "0.1", "#6a9a5b", "#c98a2b", "0.5")
LINES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (6, 2)))
STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 6.3,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "svg.hashsalt": "calibrated-distillation",
}
FEW = 10  # images of a run: the accuracy of fewer says nothing
WIDTH = 7.0  # inches: the text of a two-column page


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draw every figure that there are results for.

    Args:
        rows: lines of the table, in its order, with their runs; those without runs show in the published points only,
            which are left out where no run is comparable.
        folder: where the files go.

    Returns:
        The names of the files.
    """
    done = [row for row in rows if row.runs]
    with_bins = [row for row in done if all(run.bins for run in row.runs)]
    teachers = [row for row in with_bins if row.row.startswith("teacher")]
    students = [row for row in with_bins if row not in teachers]
    trained = [row for row in done if all(run.history for run in row.runs)]
    beside = rows if any(row.comparable for row in rows) else done
    names = []
    with matplotlib.rc_context(STYLE):
        for name, shown, plot in (
            ("reliability_teachers", teachers, reliability),
            ("reliability_students", students, reliability),
            ("calibration_teachers", teachers, curves),
            ("temperatures", taught(done), temperatures),
            ("accuracy_ece", beside, accuracy_ece),
            ("training_accuracy", trained, lambda shown: training(shown, "accuracy")),
            ("training_ece", trained, lambda shown: training(shown, "ece")),
            ("confidence", with_bins, confidence),
        ):
            if shown:
                names += _save(plot(shown), folder / name)
    return names


def _save(figure: Figure, path: Path) -> list[str]:
    names = []
    for suffix, options in ((".png", {"dpi": 200}), (".svg", {"metadata": {"Date": None}})):
        buffer = BytesIO()
        figure.savefig(buffer, format=suffix[1:], **options)
        with atomic_write(path.with_suffix(suffix)) as file:
            if suffix == ".png":  # 256 colours are plenty, and a third of the bytes
                Image.open(buffer).convert("RGB").quantize(dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
            else:
                file.write(buffer.getvalue())
        names.append(path.name + suffix)
        figure.set_layout_engine("none")  # the layout is found once, and takes as long as drawing
    return names


def _panels(rows: Sequence[Row], columns: int, height: float, plot: Callable[[Axes, Row], None]) -> Figure:
    """One panel a row of the table, at most `columns` side by side and `height` inches each, axis labels on the outside
    only."""
    n_lines = -(-len(rows) // columns)
    columns = -(-len(rows) // n_lines)  # lines about as full as one another
    width = WIDTH * max(columns, 2) / max(columns, 4)
    figure = Figure(figsize=(width, n_lines * height + 0.45), layout="constrained")
    panels = figure.subplots(n_lines, columns, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(panels.flat):
        if i >= len(rows):
            axes.remove()
            continue
        axes.set_title(rows[i].row)
        plot(axes, rows[i])
        axes.tick_params(labelbottom=i + columns >= len(rows))
    return figure


def _legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    columns = int(figure.get_figwidth() / 1.4)  # an entry's inches: few panels make a narrow figure
    figure.legend(handles=handles, loc="outside upper center", ncols=min(columns, len(handles)))


def _mean_sd(row: Row, metric: str) -> str:
    return plus_minus(metric, row.statistic("best", metric), " ± ")


def _pooled_bins(row: Row) -> np.ndarray:
    """Counts, right answers and summed confidence (3, 20) over the test images of all seeds at the best epoch."""
    total = 0
    for run in row.runs:
        count, accuracy, confidence = (np.array([b[k] for b in run.bins]) for k in ("count", "accuracy", "confidence"))
        total = total + np.stack([count, count * accuracy, count * confidence])
    return total.reshape(3, 20, -1).sum(2)


def reliability(rows: Sequence[Row]) -> Figure:
    """Reliability diagrams (Guo et al., 2017, fig. 1) side by side: accuracy over confidence in 20 bins, pale where few
    images are, with the consistency bars of one run, for its seeds have the same test images."""

    def plot(axes: Axes, row: Row) -> None:
        bins = _pooled_bins(row)
        filled = bins[0] > 0
        centers = ((np.arange(len(filled)) + 0.5) / len(filled))[filled]
        count, correct, confident = bins[:, filled]
        accuracy, confidence = correct / count, confident / count
        bar = {"width": 1 / len(filled), "linewidth": 0.4}
        axes.bar(centers, accuracy, color=PALE_BLUE, edgecolor="white", **bar)
        gap = {"facecolor": "none", "edgecolor": RED, "hatch": "//////"}
        axes.bar(centers, confidence - accuracy, bottom=accuracy, **gap, **bar)
        of_one_run = np.ceil(count / len(row.runs))
        strength = np.where(count < FEW * len(row.runs), 0.3, 1.0)
        for patch, alpha in zip(axes.patches, np.tile(strength, 2), strict=True):
            patch.set_alpha(alpha)
        axes.vlines(centers, *consistency_bars(of_one_run, confidence), color="0.1", linewidth=0.6, alpha=strength)
        axes.plot([0, 1], [0, 1], "--", color="0.2", linewidth=0.8)
        axes.set_title(f"{row.row}\nECE {_mean_sd(row, 'ece')}\nOE {_mean_sd(row, 'oe')}")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))

    figure = _panels(rows, *((5, 1.7) if len(rows) > 6 else (3, 2.0)), plot)
    figure.supxlabel("Confidence", fontsize=8)
    figure.supylabel("Accuracy", fontsize=8)
    handles = [
        Patch(facecolor=PALE_BLUE, label="accuracy"),
        Patch(facecolor="none", edgecolor=RED, hatch="//////", label="gap to confidence"),
        Line2D([], [], color="0.1", linewidth=0.6, label="calibrated, 95 %"),
        Line2D([], [], color="0.2", linestyle="--", linewidth=0.8, label="perfect calibration"),
        Patch(facecolor=PALE_BLUE, alpha=0.3, label=f"under {FEW} images a run"),
    ]
    _legend_above(figure, handles)
    return figure


def _style(i: int) -> dict[str, str]:
    """The mark of the i-th teacher, or of its student."""
    return {"marker": "os^Dvx"[i % 6], "color": COLORS[i % 6]}


def curves(rows: Sequence[Row]) -> Figure:
    """Accuracy over confidence in 20 bins, all rows in one panel: what W&B overlays from the table of bins."""
    figure = Figure(figsize=(4.0, 5.1), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":", label="perfect calibration")
    names = list(dict.fromkeys([*TAUGHT_BY.values(), *(row.row for row in rows)]))
    for row in rows:
        count, correct, confident = _pooled_bins(row)
        filled = count >= FEW * len(row.runs)
        style = _style(names.index(row.row)) | {"linestyle": LINES[names.index(row.row) % 6]}
        label = f"{row.row}, ECE {_mean_sd(row, 'ece')}"
        x, y = confident[filled] / count[filled], correct[filled] / count[filled]
        axes.plot(x, y, **style, markersize=3, label=label, clip_on=False)
    label = f"Confidence; bins of {FEW} images a run or more"
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=label, ylabel="Accuracy", aspect="equal")
    figure.legend(loc="outside lower center")
    return figure


def taught(rows: Sequence[Row]) -> list[Row]:
    """The five pairs of teacher and student, as far as both have temperatures, and the baseline student; or nothing."""
    found = {row.row: row for row in rows if row.temperature("last")}
    pairs = [(teacher, student) for student, teacher in TAUGHT_BY.items() if {teacher, student} <= found.keys()]
    return [found[name] for pair in (*pairs, ("student_baseline",)) for name in pair if name in found] if pairs else []


def temperatures(rows: Sequence[Row]) -> Figure:
    """The temperature that each student needs over that which its teacher does, a mark for each seed: on the diagonal
    where calibration is passed on, on the level of the baseline student where it is not."""
    fitted = {row.row: {run.result["seed"]: fitted_temperature(run.result["last"]) for run in row.runs} for row in rows}
    figure = Figure(figsize=(4.0, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.axline((1, 1), slope=1, color="0.6", linewidth=0.8, linestyle=":", label="the same temperature")
    if baseline := [*fitted.get("student_baseline", {}).values()]:
        level = float(np.mean(baseline))
        axes.axhline(level, color="0.4", linewidth=0.8, linestyle="--", label=f"student_baseline, {level:.2f}")
        axes.axhspan(min(baseline), max(baseline), color="0.92", linewidth=0)
    axes.axhline(1, color="0.85", linewidth=0.8, zorder=0, label="calibrated")
    axes.axvline(1, color="0.85", linewidth=0.8, zorder=0)
    for i, (student, teacher) in enumerate(TAUGHT_BY.items()):
        if seeds := fitted.get(student, {}).keys() & fitted.get(teacher, {}).keys():
            points = [(fitted[teacher][seed], fitted[student][seed]) for seed in sorted(seeds)]
            axes.plot(*zip(*points, strict=True), **_style(i), linestyle="", markersize=4, alpha=0.8, label=student)
    axes.set(xlabel="Temperature that calibrates the teacher", ylabel="Temperature that calibrates its student")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.1)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def confidence(rows: Sequence[Row]) -> Figure:
    """How confident each row is: the share of test images over confidence, beside mean confidence and accuracy."""

    def plot(axes: Axes, row: Row) -> None:
        count, correct, confident = _pooled_bins(row)
        edges = np.linspace(0, 1, len(count) + 1)
        axes.stairs(count / count.sum(), edges, fill=True, color=GREY)
        axes.axvline(correct.sum() / count.sum(), color=BLUE, linewidth=1.3)
        axes.axvline(confident.sum() / count.sum(), color=RED, linewidth=1.3, linestyle=(0, (2, 1)))
        axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))

    figure = _panels(rows, 4, 1.25, plot)
    figure.supxlabel("Confidence", fontsize=8)
    figure.supylabel("Share of images", fontsize=8)
    handles = [
        Patch(color=GREY, label="images"),
        Line2D([], [], color=BLUE, linewidth=1.3, label="mean accuracy"),
        Line2D([], [], color=RED, linewidth=1.3, linestyle=(0, (2, 1)), label="mean confidence"),
    ]
    _legend_above(figure, handles)
    return figure


def training(rows: Sequence[Row], metric: str) -> Figure:
    """A test metric over the epochs: each row's mean and range over its seeds, before all the others in grey."""
    by_row = {}
    for row in rows:
        n_epochs = min(len(run.history) for run in row.runs)
        by_row[row.label] = np.array([[epoch[metric] for epoch in run.history[:n_epochs]] for run in row.runs])
    scale = 100 if metric == "accuracy" else 1

    def plot(axes: Axes, row: Row) -> None:
        for label, values in by_row.items():
            if label != row.label:
                axes.plot(np.arange(1, values.shape[1] + 1), scale * values.mean(0), color="0.82", linewidth=0.5)
        values = scale * by_row[row.label]
        epochs = np.arange(1, values.shape[1] + 1)
        lr = [epoch["lr"] for epoch in row.runs[0].history]
        for epoch in range(1, len(epochs)):
            if lr[epoch] != lr[epoch - 1]:
                axes.axvline(epoch + 0.5, color="0.6", linewidth=0.5, linestyle=":")
        axes.fill_between(epochs, values.min(0), values.max(0), color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(epochs, values.mean(0), color=BLUE)
        if row.comparable and (published := row.published.get(metric)) is not None:
            axes.axhline(scale * published, color=RED, linewidth=0.8, linestyle="--")
        axes.xaxis.get_major_locator().set_params(integer=True)

    figure = _panels(rows, 5, 1.3, plot)
    figure.supxlabel("Epoch", fontsize=8)
    figure.supylabel("Test accuracy, %" if metric == "accuracy" else "Test ECE, 100 bins", fontsize=8)
    several = any(len(row.runs) > 1 for row in rows)
    handles = [
        Line2D([], [], color=BLUE, label="mean and range over seeds" if several else "one seed"),
        Line2D([], [], color="0.75", linewidth=0.8, label="other rows"),
        Line2D([], [], color="0.6", linewidth=0.8, linestyle=":", label="learning rate / 10"),
    ]
    if any(row.comparable and row.published for row in rows):
        handles.append(Line2D([], [], color=RED, linewidth=0.8, linestyle="--", label="published, best epoch"))
    _legend_above(figure, handles)
    return figure


def accuracy_ece(rows: Sequence[Row]) -> Figure:
    """Accuracy against ECE: hollow marks are published, filled ones ours at the best epoch, an arrow from one to the
    other, a grey dash what chance makes of ours. Numbers stand for the rows, for names would not find room."""
    tables = list(dict.fromkeys(row.table for row in rows))
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    axes = figure.subplots()
    points, labels, handles = [], [], []
    comparable = any(row.comparable for row in rows)
    for i, row in enumerate(rows, 1):
        style = {"marker": "o^sDv"[tables.index(row.table) % 5], "markersize": 4.5, "color": BLUE, "linestyle": ""}
        numbers = [row.published.get(metric) for metric in ("accuracy", "ece")]
        theirs = None if None in numbers or not comparable else (100 * numbers[0], numbers[1])
        if theirs:
            axes.plot(*theirs, **style, markerfacecolor="white", markeredgewidth=0.8, zorder=3)
            points.append(theirs)
        if row.runs:
            accuracy, ece = (row.statistic("best", metric) for metric in ("accuracy", "ece"))
            ours = (100 * accuracy.mean, ece.mean)
            bars = {"xerr": 100 * accuracy.sd, "yerr": ece.sd} if accuracy.sd is not None else {}
            axes.errorbar(*ours, **bars, **style, elinewidth=0.6, zorder=4)
            points.append(ours)
            if by_chance := row.by_chance:
                axes.plot(ours[0], by_chance["ece"].mean, marker="_", color="0.55", zorder=2)
            if theirs:
                arrow = {"arrowstyle": "-|>", "mutation_scale": 6, "linewidth": 0.5, "color": "0.55", "shrinkB": 3}
                axes.annotate("", ours, theirs, arrowprops=arrow, zorder=2)
        labels.append((str(i), points[-1]))
        handles.append(Line2D([], [], **style, label=f"{i}  {row.row}"))
        if not row.runs:
            handles[-1].set_markerfacecolor("white")
    axes.margins(0.06)
    axes.set(xlabel="Test accuracy, %", ylabel="ECE, 100 bins")
    axes.grid(color="0.92", linewidth=0.5)
    axes.set_axisbelow(True)
    title = "hollow: published\nfilled: ours, best epoch" if comparable else "best epoch"
    title += "\nbars: ± s.d. over seeds" * any(len(row.runs) > 1 for row in rows)
    title += "\ngrey dash: by chance" * any(row.by_chance for row in rows)
    figure.legend(handles=handles, loc="outside right upper", title=title, alignment="left", labelspacing=0.6)
    _place_labels(figure, axes, labels, points)
    return figure


def _place_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[str, tuple]], points: Sequence[tuple]) -> None:
    """Write each label where it is clear of all marks and of the labels before it: near its point, or led to it."""
    figure.draw_without_rendering()  # constrained layout moves the axes; after that, pixels mean something
    to_pixels, pixel = axes.transData, figure.dpi / 72
    taken = [to_pixels.transform(point) for point in points]
    angles = np.pi / 4 * np.array([1, 3, 7, 5, 2, 0, 4, 6])
    for text, point in labels:
        origin = to_pixels.transform(point)
        spots = [origin + r * pixel * np.array([np.cos(a), np.sin(a)]) for r in (8, 14, 21, 30, 40) for a in angles]
        spot = max(spots, key=lambda spot: min([np.hypot(*(spot - other)) for other in taken] + [8 * pixel]))
        taken.append(spot)
        offset = (spot - origin) / pixel
        far = np.hypot(*offset) > 10
        lead = {"arrowstyle": "-", "linewidth": 0.4, "color": "0.3", "shrinkA": 0, "shrinkB": 2} if far else None
        axes.annotate(
            text, point, offset, textcoords="offset points", ha="center", va="center", fontsize=6.5, arrowprops=lead,
            zorder=5, path_effects=[withStroke(linewidth=1.8, foreground="white")],
        )  # fmt: skip
