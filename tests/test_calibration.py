"""`calibration_metrics` against torchmetrics, netcal, scikit-learn and numbers worked out by hand."""

import numpy as np
import pytest
import torch
from netcal.metrics import ECE
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from calibration import calibration_metrics, reliability_diagram
from consistency import consistency_bars, errors_by_chance


def random_case(n=2000, classes=100, sharpness=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * sharpness
    labels = torch.where(
        torch.rand(n, generator=generator) < 0.6,
        logits.argmax(1),
        torch.randint(0, classes, (n,), generator=generator),
    )
    return logits.softmax(1), labels


@pytest.mark.parametrize("n_bins", [1, 15, 100])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_ece_agrees_with_torchmetrics_and_netcal(n_bins, classes):
    for seed, sharpness in enumerate((0.3, 1, 3, 10)):
        p, labels = random_case(classes=classes, sharpness=sharpness, seed=seed)
        metrics = calibration_metrics(p, labels, n_bins)
        reference = multiclass_calibration_error(p.double(), labels, classes, n_bins)
        assert metrics.ece == pytest.approx(reference.item(), abs=1e-6)
        if classes > 2:  # of two, netcal bins the probability of the second instead of the confidence
            assert metrics.ece == pytest.approx(ECE(n_bins).measure(p.double().numpy(), labels.numpy()), abs=1e-6)


def test_other_scores_agree_with_their_definitions():
    p, labels = random_case()
    metrics = calibration_metrics(p, labels)
    assert metrics.accuracy == pytest.approx((p.argmax(1) == labels).float().mean().item())
    assert metrics.nll == pytest.approx(log_loss(labels, p.double(), labels=range(100)), rel=1e-5)
    assert metrics.brier == pytest.approx(((p - torch.eye(100)[labels]) ** 2).sum(1).mean().item(), rel=1e-5)


def test_by_hand():
    """Ten bins. (0.5, 0.6]: two of confidence 0.6, one right. (0.8, 0.9]: three of 0.9 and one of 0.85, two right."""
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.15, 0.85]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 1, 1, 1])
    metrics = calibration_metrics(p, labels, n_bins=10)
    assert metrics.accuracy == pytest.approx(3 / 6)
    assert metrics.bin_count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 4, 0]
    assert metrics.bin_accuracy[[5, 8]].tolist() == pytest.approx([0.5, 0.5])
    assert metrics.bin_confidence[[5, 8]].tolist() == pytest.approx([0.6, 3.55 / 4])
    gap = 3.55 / 4 - 0.5
    assert metrics.ece == pytest.approx(2 / 6 * 0.1 + 4 / 6 * gap)
    assert metrics.oe == pytest.approx(2 / 6 * 0.6 * 0.1 + 4 / 6 * 3.55 / 4 * gap)


def test_oe_ignores_underconfidence():
    metrics = calibration_metrics(torch.full((10, 2), 0.5), torch.zeros(10, dtype=torch.long))
    assert metrics.ece == pytest.approx(0.5) and metrics.oe == 0


def test_confidence_of_one_belongs_to_the_last_bin():
    metrics = calibration_metrics(np.eye(3), np.array([0, 1, 0]))
    assert metrics.bin_count.tolist() == [0] * 99 + [3]
    assert metrics.ece == pytest.approx(1 / 3) and metrics.oe == pytest.approx(1 / 3)
    assert np.isfinite(metrics.nll)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_least_confidence_possible(classes):
    metrics = calibration_metrics(np.full((classes, classes), 1 / classes), np.arange(classes))
    assert metrics.accuracy == pytest.approx(1 / classes) and metrics.ece == pytest.approx(0, abs=1e-12)
    assert metrics.bin_count[100 // classes - 1] == classes  # each bin is closed above


def test_perfectly_calibrated():
    """In each bin, exactly as many right as the confidence says."""
    p, labels = [], []
    for right in range(50, 101):
        p += [[right / 100, 1 - right / 100]] * 100
        labels += [0] * right + [1] * (100 - right)
    metrics = calibration_metrics(np.array(p), np.array(labels))
    assert metrics.ece == pytest.approx(0, abs=1e-12) and metrics.oe == pytest.approx(0, abs=1e-12)


def test_one_image():
    metrics = calibration_metrics(torch.tensor([[0.3, 0.7]]), torch.tensor([0]))
    assert metrics.accuracy == 0 and metrics.ece == pytest.approx(0.7) and metrics.oe == pytest.approx(0.49)
    assert metrics.nll == pytest.approx(-np.log(0.3), rel=1e-6) and metrics.brier == pytest.approx(2 * 0.49)


def test_arrays_tensors_and_dtypes_agree():
    p, labels = random_case()
    reference = calibration_metrics(p, labels)
    assert calibration_metrics(p.numpy(), labels.numpy()).scores == reference.scores
    assert calibration_metrics(p, labels.int()).scores == reference.scores
    assert calibration_metrics(p.half(), labels).ece == pytest.approx(reference.ece, abs=2e-3)
    assert reference.bin_count.sum() == len(labels) and reference.bin_count.dtype == torch.int64


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        ([[0.5, 0.6]], [0], "sum to one"),
        ([[0.5, 0.4985]], [0], "sum to one"),
        ([[float("nan"), 1.0]], [0], "finite"),
        ([[float("inf"), 0.0]], [0], "finite"),
        ([[1.5, -0.5]], [0], "not negative"),
        ([[0.5, 0.5]], [2], r"labels must be in \[0, 2\)"),
        ([[0.5, 0.5]], [-1], r"labels must be in \[0, 2\)"),
        ([[0.5, 0.5]], [0, 1], r"got \(1, 2\) and \(2,\)"),
        ([0.5, 0.5], [0, 1], r"got \(2,\) and \(2,\)"),
        (np.empty((0, 2)), np.empty(0, int), "got"),
        ([[0.5, 0.5]], [0.0], "integer labels"),
        ([[0, 1]], [0], "floating-point probabilities"),
    ],
)
def test_wrong_input_is_named(p, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration_metrics(np.array(p), np.array(labels))


def test_of_rows_that_sum_to_more_by_rounding_no_confidence_is_above_1():
    bins = calibration_metrics(np.array([[1.0005, 0.0], [0.0, 1.0009]]), np.arange(2))
    assert bins.ece == 0 and not errors_by_chance(bins.bin_count, bins.bin_confidence).any()


def test_no_bins():
    with pytest.raises(ValueError, match="n_bins"):
        calibration_metrics(np.eye(2), np.arange(2), n_bins=0)


def test_reliability_diagram_draws_the_metrics():
    p, labels = random_case(n=500)
    metrics = calibration_metrics(p, labels)
    figure = reliability_diagram(metrics, "a title")
    top, bottom = figure.axes
    ece, oe = (f"{m:.4f} ± {sd:.4f}" for m, sd in errors_by_chance(metrics.bin_count, metrics.bin_confidence))
    assert top.get_title() == (f"a title\nECE {metrics.ece:.4f}, by chance {ece}\nOE {metrics.oe:.4f}, by chance {oe}")
    bars = calibration_metrics(p, labels, n_bins=20)  # what merging 100 bins by fives must give
    filled = bars.bin_count > 0
    accuracy, gap = top.containers
    for bar, left in zip(accuracy, np.arange(20)[filled.numpy()] / 20, strict=True):
        assert (bar.get_x(), bar.get_width()) == pytest.approx((left, 0.05))
    assert [bar.get_height() for bar in accuracy] == pytest.approx(bars.bin_accuracy[filled].tolist())
    assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx(bars.bin_confidence[filled].tolist())
    ends = [segment[:, 1] for segment in top.collections[0].get_segments()]
    want = consistency_bars(bars.bin_count[filled].numpy(), bars.bin_confidence[filled].numpy())
    assert np.allclose(ends, np.stack(want, 1))
    histogram = [(bar.get_x(), bar.get_height()) for bar in bottom.containers[0]]
    assert np.allclose(histogram, np.stack([np.arange(20) / 20, bars.bin_count / 500], 1))
    means = [line.get_xdata()[0] for line in bottom.lines]
    assert means == pytest.approx([metrics.accuracy, p.max(1).values.mean().item()])
    assert top.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]  # the diagonal
    assert (*top.get_xlim(), *top.get_ylim()) == (0, 1, 0, 1)


def test_reliability_diagram_with_bins_that_do_not_merge():
    p, labels = random_case(n=500)
    figure = reliability_diagram(calibration_metrics(p, labels, n_bins=15))
    assert len(figure.axes[0].containers[0]) <= 15


@pytest.mark.parametrize(
    ("title", "broken"),
    [
        (
            "kd_ensemble_avg_loss --lr 0.04 --weight-decay 0.0005" + 5 * " --alpha 0.2",
            "kd_ensemble_avg_loss --lr 0.04\n--weight-decay 0.0005 --alpha 0.2\n",
        ),
        (
            "kd_vanilla --lr 0.08 --teacher results/small/teacher_baseline/seed0, epoch 37",
            "kd_vanilla --lr 0.08\n--teacher\nresults/small/teacher_baseline/seed0,\nepoch 37\n",
        ),
    ],
)
def test_a_long_title_stays_within_the_reliability_diagram(title, broken):
    figure = reliability_diagram(calibration_metrics(*random_case(n=500)), title)
    figure.draw_without_rendering()
    box = figure.axes[0].title.get_window_extent()
    assert broken in figure.axes[0].get_title()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
