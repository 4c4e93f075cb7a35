"""Calibration of a classifier, in numbers and in a picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CalibrationMetrics:
    """What `calibration_metrics` returns. Fractions and nats; the bins are float64 (n_bins,) on the CPU."""

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

    Raises:
        ValueError: wrong shapes, no images, NaN, values that are no probabilities, labels out of range.
    """
    p, labels = torch.as_tensor(probabilities), torch.as_tensor(labels)
    if p.ndim != 2 or labels.shape != p.shape[:1] or p.numel() == 0:
        raise ValueError(
            f"want probabilities (n, classes) and labels (n,), got {tuple(p.shape)} and {tuple(labels.shape)}"
        )
    if not p.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"want floating-point probabilities and integer labels, got {p.dtype} and {labels.dtype}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    smallest, p, labels = torch.finfo(p.dtype).tiny, p.double(), labels.to(p.device).long()
    total = p.sum(1)
    if not (total.isfinite().all() and p.min() >= 0):
        raise ValueError("probabilities must be finite and not negative")
    if (total - 1).abs().max() > 1e-3:
        raise ValueError(
            f"each row of probabilities must sum to one, got sums from {total.min():.4g} to {total.max():.4g}"
        )
    if labels.min() < 0 or labels.max() >= p.shape[1]:
        raise ValueError(f"labels must be in [0, {p.shape[1]}), got {int(labels.min())} to {int(labels.max())}")

    confidence, prediction = p.max(1)
    correct = (prediction == labels).double()
    p_label = p.gather(1, labels[:, None]).squeeze(1)
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=p.device) / n_bins
    bins = torch.bucketize(confidence, edges)
    count = torch.bincount(bins, minlength=n_bins)
    safe = count.clamp(min=1)
    bin_accuracy = torch.bincount(bins, correct, n_bins) / safe
    bin_confidence = torch.bincount(bins, confidence, n_bins) / safe
    gap, weight = bin_confidence - bin_accuracy, count / len(p)
    return CalibrationMetrics(
        accuracy=correct.mean().item(),
        ece=(weight * gap.abs()).sum().item(),
        oe=(weight * bin_confidence * gap.clamp(min=0)).sum().item(),
        nll=-p_label.clamp(min=smallest).log().mean().item(),
        brier=(p.square().sum(1) - 2 * p_label + 1).mean().item(),
        bin_count=count.cpu(),
        bin_accuracy=bin_accuracy.cpu(),
        bin_confidence=bin_confidence.cpu(),
    )


def reliability_diagram(metrics: CalibrationMetrics, title: str = "", path: Path | None = None, drawn_bins: int = 20):
    """Reliability diagram (Guo et al., 2017, fig. 1) over a histogram of confidence.

    Args:
        metrics: from `calibration_metrics`; ECE and OE are shown as they are there.
        path: file to write (PNG, SVG or PDF by its ending).
        drawn_bins: bars; neighbouring bins are merged to this number where it divides theirs.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no state, safe in any thread

    count = metrics.bin_count.double()
    if len(count) % drawn_bins:
        drawn_bins = len(count)
    sums = (count * v for v in (1, metrics.bin_accuracy, metrics.bin_confidence))
    n, correct, confident = (values.view(drawn_bins, -1).sum(1) for values in sums)
    filled = n > 0
    width = 1 / drawn_bins
    centers = ((torch.arange(drawn_bins) + 0.5) * width)[filled].numpy()
    accuracy, confidence = (correct[filled] / n[filled]).numpy(), (confident[filled] / n[filled]).numpy()

    figure = Figure(figsize=(3.6, 4.9), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bar = dict(width=width, linewidth=0.5)
    top.bar(centers, accuracy, color="#3b6ea5", edgecolor="white", label="accuracy", **bar)
    gap = dict(facecolor="#d1495b40", edgecolor="#d1495b", hatch="////", label="gap to confidence")
    top.bar(centers, confidence - accuracy, bottom=accuracy, **gap, **bar)
    top.plot([0, 1], [0, 1], "--", color="0.3", linewidth=1)
    top.text(
        0.97, 0.05, f"ECE {metrics.ece:.4f}\nOE {metrics.oe:.4f}", transform=top.transAxes, ha="right", va="bottom",
        bbox=dict(facecolor="white", edgecolor="0.8", boxstyle="round,pad=0.4"),
    )  # fmt: skip
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="Accuracy", title=title)
    bottom.bar(centers, (n[filled] / n.sum()).numpy(), color="0.55", edgecolor="white", **bar)
    bottom.axvline(metrics.accuracy, color="#3b6ea5", linewidth=1.2, label="mean accuracy")
    mean_confidence = (confident.sum() / n.sum()).item()
    bottom.axvline(mean_confidence, color="#d1495b", linewidth=1.2, linestyle="--", label="mean confidence")
    bottom.set(xlabel="Confidence", ylabel="Share of images")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    if path:
        figure.savefig(path, dpi=200)
    return figure
