"""Calibration of a classifier, in numbers and in a picture."""

import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency import consistency_bars, errors_by_chance
from run_files import CHOICES, atomic_write, write_csv

MAX_TEMPERATURE = 1000.0  # and its inverse: no fit is looked for beyond


@dataclass(frozen=True)
class CalibrationMetrics:
    """What `calibration_metrics` returns. Fractions and nats; the bins are (n_bins,) on the CPU, float64 but for their
    count."""

    accuracy: float
    ece: float
    oe: float
    nll: float
    brier: float
    bin_count: Tensor
    """images in each bin, int64"""
    bin_accuracy: Tensor
    """share of them classified right; 0 in an empty bin"""
    bin_confidence: Tensor
    """their mean confidence; 0 in an empty bin"""

    @property
    def scores(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("accuracy", "ece", "oe", "nll", "brier")}

    @property
    def bins(self) -> list[dict[str, Any]]:
        """The bins, a line of `reliability.csv` each."""
        bins = zip(self.bin_count.tolist(), self.bin_accuracy.tolist(), self.bin_confidence.tolist(), strict=True)
        return [{"count": n, "accuracy": f"{a:.6g}", "confidence": f"{c:.6g}"} for n, a, c in bins]

    def merged(self, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
        """Count, accuracy and confidence, float64 (n_bins,), over wider bins; over its own where `n_bins` does not
        divide their number. Accuracy and confidence are NaN in an empty bin."""
        count = self.bin_count.double()
        n_bins = len(count) if len(count) % n_bins else n_bins
        sums = (count * v for v in (1, self.bin_accuracy, self.bin_confidence))
        n, correct, confident = (values.view(n_bins, -1).sum(1) for values in sums)
        return n, correct / n, confident / n


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: test sets are too small to share, and on a busy machine waiting for a second thread costs
    many times what it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def calibration_metrics(
    probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray, n_bins: int = 100
) -> CalibrationMetrics:
    """Accuracy and calibration of predicted probabilities.

    With confidence max_k p_k and M bins of equal width over (0, 1], each closed above, in bin b n_b of n images with
    accuracy a_b and mean confidence c_b:

    - ECE = sum_b n_b / n * |a_b - c_b| (Guo et al., 2017, eq. 3)
    - OE = sum_b n_b / n * c_b * max(c_b - a_b, 0) (Thulasidasan et al., 2019)
    - NLL = mean of -log p_label, with p no smaller than the smallest normal number of its dtype
    - Brier = mean of sum_k (p_k - [k = label])^2, from 0 to 2 (Brier, 1950)

    Args:
        probabilities: float (n, classes), on any device, rows summing to one within 1e-3.
        labels: integers (n,) in [0, classes).
        n_bins: M, 1 or more.

    Raises:
        ValueError: wrong shapes, no images, NaN, values that are no probabilities, labels out of range, no bins.
    """
    p, labels = _checked(probabilities, labels)
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")

    confidence, prediction = p.max(1)
    confidence, correct = confidence.double().clamp(max=1), (prediction == labels).double()
    p_label = p.gather(1, labels[:, None]).squeeze(1).double()
    sum_of_squares = torch.linalg.vector_norm(p, dim=1, dtype=torch.float64).square()
    edges = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
    bins = torch.bucketize(confidence, edges)
    count = torch.bincount(bins, minlength=n_bins)
    safe = count.clamp(min=1)
    bin_accuracy = torch.bincount(bins, correct, n_bins) / safe
    bin_confidence = torch.bincount(bins, confidence, n_bins) / safe
    gap, weight = bin_confidence - bin_accuracy, count.double() / len(p)
    return CalibrationMetrics(
        accuracy=correct.mean().item(),
        ece=(weight * gap.abs()).sum().item(),
        oe=(weight * bin_confidence * gap.clamp(min=0)).sum().item(),
        nll=-p_label.clamp(min=torch.finfo(p.dtype).tiny).log().mean().item(),
        brier=(sum_of_squares - 2 * p_label + 1).mean().item(),
        bin_count=count,
        bin_accuracy=bin_accuracy,
        bin_confidence=bin_confidence,
    )


def _checked(probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """As tensors on the CPU, the labels int64. A GPU would have other sums every time.

    Raises:
        ValueError: they are not as `calibration_metrics` takes them.
    """
    p, labels = torch.as_tensor(probabilities).cpu(), torch.as_tensor(labels).cpu()
    if p.ndim != 2 or labels.shape != p.shape[:1] or p.numel() == 0:
        raise ValueError(
            f"want probabilities (n, classes) and labels (n,), got {tuple(p.shape)} and {tuple(labels.shape)}"
        )
    if not p.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"want floating-point probabilities and integer labels, got {p.dtype} and {labels.dtype}")
    labels = labels.long()
    total = p.sum(1, dtype=torch.float64)  # sums are in float64, but never over a copy of p, which would take longer
    if not (total.isfinite().all() and p.min() >= 0):
        raise ValueError("probabilities must be finite and not negative")
    if (total - 1).abs().max() > 1e-3:
        raise ValueError(
            f"each row of probabilities must sum to one, got sums from {total.min():.4g} to {total.max():.4g}"
        )
    if labels.min() < 0 or labels.max() >= p.shape[1]:
        raise ValueError(f"labels must be in [0, {p.shape[1]}), got {int(labels.min())} to {int(labels.max())}")
    return p, labels


def adaptive_ece(probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray, n_bins: int = 15) -> float:
    """ECE over bins that hold equally many images: sum_b n_b / n * |a_b - c_b| as in `calibration_metrics`.

    The edges are the quantiles of the confidence (Nguyen & O'Connor, 2015; "AdaECE" of Mukhoti et al., 2020, sec. 2).
    Equal confidences stay in one bin, so that the order of the images makes no difference. Arguments and errors are
    those of `calibration_metrics`.
    """
    probabilities, labels = _checked(probabilities, labels)
    confidence, prediction = probabilities.double().max(1)
    edges = confidence.quantile(torch.arange(1, n_bins, dtype=torch.float64) / n_bins)
    gap = torch.bincount(torch.bucketize(confidence, edges), confidence - (prediction == labels).double())
    return gap.abs().sum().item() / len(labels)  # the sum of a bin's gaps is n_b (c_b - a_b)


def classwise_ece(probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray, n_bins: int = 15) -> float:
    """Classwise ECE (Kull et al., 2019, eq. 2; "static calibration error" of Nixon et al., 2019, eq. 3).

    1 / K * sum_k sum_b n_bk / n * |share of class k - mean p_k|, over the n_bk images whose p_k falls into bin b of
    M bins of equal width over (0, 1]. Unlike ECE it looks at every class's probability, not the largest one's alone.
    Arguments and errors are those of `calibration_metrics`.
    """
    probabilities, labels = _checked(probabilities, labels)
    n, classes = probabilities.shape
    p = probabilities.double()
    edges = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
    bins = torch.bucketize(p, edges).add_(n_bins * torch.arange(classes))
    expected = torch.bincount(bins.flatten(), p.flatten(), n_bins * classes)
    found = torch.bincount(bins.gather(1, labels[:, None]).squeeze(1), minlength=n_bins * classes)
    return (found - expected).abs().sum().item() / (n * classes)


def fit_temperature(probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """The temperature T of softmax(log p / T) with the least NLL (Guo et al., 2017, sec. 4.2), from 0.001 to 1000.

    It is 1, which changes nothing, where the NLL has no minimum there: where every image is classified right, for which
    the sharpest prediction would be the best, or where predictions are no better than chance. Such images, mostly too
    few, say nothing of the confidence in others.

    Softmax outputs do for logits: log p is the logits less a constant of each image, which the softmax takes out
    again. The NLL is convex in 1 / T, so the zero of its derivative there is the minimum:

        d NLL / d(1 / T) = mean of (sum_k q_k log p_k - log p_label),  q = softmax(log p / T)

    Arguments and errors are those of `calibration_metrics`; a probability of 0 counts as the smallest normal number of
    its dtype.
    """
    from scipy.optimize import brentq

    probabilities, labels = _checked(probabilities, labels)
    logits = _log(probabilities)
    target = logits.gather(1, labels[:, None]).mean().item()
    scaled, q = torch.empty_like(logits), torch.empty_like(logits)  # reused: fresh memory costs more than the sums

    def slope(log_temperature: float) -> float:
        torch.div(logits, math.exp(log_temperature), out=scaled)
        torch.softmax(scaled, 1, out=q)
        return torch.linalg.vecdot(q, logits).mean().item() - target

    low, high = -math.log(MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)
    if slope(low) <= 0 or slope(high) >= 0:
        return 1.0
    return math.exp(brentq(slope, low, high, xtol=1e-6))


def scale_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(log p / temperature), float64 of the shape given: p^(1 / T), normalised.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"want a temperature above 0, got {temperature}")
    return _log(probabilities).div_(temperature).softmax(1)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).double().log_()


@_one_thread()
def calibration_scores(
    probabilities: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """All that a run reports of one set of predictions, as they are and after temperature scaling.

    Without `validation`, scaling is cross-fitted: of every second image of each class the temperature is fitted on the
    others, so that none has a part in its own. With it, one temperature is fitted there. Either way all images are
    measured together, as they are before scaling, for an error in bins depends on how many fall into them.

    Args:
        probabilities: float (n, classes), n at least 2; float32 as stored, so that they give the same numbers later.
        labels: integers (n,).
        validation: probabilities and labels likewise, of images that were not trained on.

    Returns:
        accuracy, ece and oe (100 bins), nll, brier, ece_15, adaptive_ece and classwise_ece (15 bins);
        `temperatures`, the two fitted ones or the one; and `scaled`, the same metrics after scaling.

    Raises:
        ValueError: as `calibration_metrics`.
    """
    probabilities, labels = _checked(probabilities, labels)
    if validation:
        temperatures = [fit_temperature(*validation)]
        scaled = scale_temperature(probabilities, *temperatures)
    else:
        order = labels.argsort(stable=True)
        halves = order[::2], order[1::2]
        temperatures = [fit_temperature(probabilities[half], labels[half]) for half in reversed(halves)]
        scaled = probabilities.new_empty(probabilities.shape, dtype=torch.float64)
        for half, temperature in zip(halves, temperatures, strict=True):
            scaled[half] = scale_temperature(probabilities[half], temperature)
    return {
        **_all_scores(probabilities, labels),
        "temperatures": temperatures,
        "scaled": _all_scores(scaled, labels),
    }


def scores_of_run(arrays: Mapping[str, Tensor | np.ndarray]) -> dict[str, dict[str, Any]]:
    """`calibration_scores` of every set of predictions in a run's `probabilities.npz`.

    Args:
        arrays: `labels` and test probabilities under `best` and `last`; with --val-size also under `selected`, and
            the validation images' at the same epoch in `val` and `val_labels`, which that one is scaled by.

    Raises:
        ValueError: as `calibration_metrics`.
    """
    arrays = {name: torch.as_tensor(arrays[name]) for name in arrays}
    validation = (arrays["val"], arrays["val_labels"]) if "selected" in arrays else None
    return {
        name: calibration_scores(arrays[name], arrays["labels"], validation if name == "selected" else None)
        for name in CHOICES
        if name in arrays
    }


def _all_scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        **calibration_metrics(probabilities, labels).scores,
        "ece_15": calibration_metrics(probabilities, labels, n_bins=15).ece,
        "adaptive_ece": adaptive_ece(probabilities, labels),
        "classwise_ece": classwise_ece(probabilities, labels),
    }


def reliability_diagram(metrics: CalibrationMetrics, title: str = ""):
    """Reliability diagram (Guo et al., 2017, fig. 1) with consistency bars (Bröcker & Smith, 2007) over a histogram of
    confidence.

    There are 20 bars where that divides the number of bins, else a bar for each; ECE and OE are those of `metrics`,
    with those that a perfectly calibrated model would have by chance. Returns the `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no state, safe in any thread
    from matplotlib.patches import Patch

    n, accuracy, confidence = (values.numpy() for values in metrics.merged(20))
    filled, width = n > 0, 1 / len(n)
    centers = ((np.arange(len(n)) + 0.5) * width)[filled]
    count, accuracy, confidence = n[filled], accuracy[filled], confidence[filled]
    mean_confidence = (count * confidence).sum() / n.sum()
    by_chance = errors_by_chance(metrics.bin_count, metrics.bin_confidence)

    figure = Figure(figsize=(3.6, 5.3), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    blue, red = "#3b6ea5", "#d1495b"
    bar = dict(width=width, linewidth=0.5)
    gap = dict(facecolor=(red, 0.25), edgecolor=red, hatch="////")
    top.bar(centers, accuracy, color=blue, edgecolor="white", **bar)
    top.bar(centers, confidence - accuracy, bottom=accuracy, **gap, **bar)
    bars = top.vlines(
        centers, *consistency_bars(count, confidence), color="0.15", linewidth=1, label="calibrated, 95 %"
    )
    top.plot([0, 1], [0, 1], "--", color="0.3", linewidth=1)
    ece, oe = (f"{mean:.4f} ± {sd:.4f}" for mean, sd in by_chance)
    text = f"ECE {metrics.ece:.4f}, by chance {ece}\nOE {metrics.oe:.4f}, by chance {oe}"
    whole = re.sub(" (?!--|epoch )", "\N{NO-BREAK SPACE}", title)  # a flag and its value stay together, if they can
    pieces = textwrap.wrap(whole, 38, break_on_hyphens=False, break_long_words=False)
    spaced = (piece.replace("\N{NO-BREAK SPACE}", " ") for piece in pieces)
    lines = [line for piece in spaced for line in textwrap.wrap(piece, 38, break_on_hyphens=False)]
    top.set_title("\n".join([*lines, text]), fontsize="medium")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="Accuracy")
    bottom.bar((np.arange(len(n)) + 0.5) * width, n / n.sum(), color="0.55", edgecolor="white", **bar)
    bottom.axvline(metrics.accuracy, color=blue, linewidth=1.2, label="mean accuracy")
    bottom.axvline(mean_confidence, color=red, linewidth=1.2, linestyle="--", label="mean confidence")
    bottom.set(xlabel="Confidence", ylabel="Share")
    patches = [Patch(facecolor=blue, label="accuracy"), Patch(**gap, label="gap to confidence")]
    figure.legend(
        handles=[*patches, bars, *bottom.lines], loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_reliability(folder: Path, metrics: CalibrationMetrics, label: str, epoch: int | None) -> None:
    """Write a run's `reliability.png`, titled by its label, and the bins that it is drawn from, `reliability.csv`."""
    write_csv(folder / "reliability.csv", metrics.bins)
    with atomic_write(folder / "reliability.png") as file:
        reliability_diagram(metrics, f"{label}, epoch {epoch}" if epoch else label).savefig(file, dpi=200)
