"""The metrics beside the published ones, against netcal, torchmetrics, scipy, plain loops and cases done by hand."""

import math

import numpy as np
import pytest
import torch
from netcal.metrics import ECE
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from torchmetrics.classification import MulticlassCalibrationError

from calibration import (
    adaptive_ece,
    calibration_metrics,
    calibration_scores,
    classwise_ece,
    fit_temperature,
    scale_temperature,
    scores_of_run,
)
from consistency import errors_by_chance


def predictions(n=1000, classes=10, sharpness=3.0, seed=0):
    """Logits (n, classes) float64, overconfident where sharpness is above 1, and labels (n,)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # the labels follow softmax(logits) exactly
    return sharpness * logits, labels


def tensors(logits, labels):
    return torch.from_numpy(softmax(logits, 1)), torch.from_numpy(labels)


@pytest.fixture
def predicted():
    return tensors(*predictions())


@pytest.fixture
def calibrated():
    """Of these some bins are too confident and some not enough: where all err alike, any bins give the same ECE. And so
    many that no quantile of fifteen is an image's own, for netcal's bins are closed below and ours above."""
    return tensors(*predictions(n=1002, sharpness=1.0))


def test_ece_at_15_bins_is_that_of_torchmetrics(calibrated):
    oracle = MulticlassCalibrationError(num_classes=10, n_bins=15, norm="l1")(calibrated[0].float(), calibrated[1])
    assert calibration_scores(*calibrated)["ece_15"] == pytest.approx(oracle.item(), abs=1e-6)


def test_adaptive_ece_is_that_of_netcal_and_of_a_loop_over_quantiles(calibrated):
    p, labels = (t.numpy() for t in calibrated)
    oracle = ECE(15, equal_intervals=False).measure(p, labels)
    assert adaptive_ece(*calibrated) == pytest.approx(oracle, abs=1e-6)
    assert calibration_scores(*calibrated)["adaptive_ece"] == pytest.approx(oracle, abs=1e-6)
    confidence, correct = p.max(1), p.argmax(1) == labels
    total = 0.0
    for members in np.array_split(confidence.argsort(), 15):
        total += len(members) / len(p) * abs(confidence[members].mean() - correct[members].mean())
    assert adaptive_ece(*calibrated) == pytest.approx(total, abs=2e-3)  # bins differ by an image at an edge


def test_adaptive_ece_by_hand():
    # two bins of two images: accuracy 1/2 at confidence 0.65, and 1 at 0.9
    p = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9], [0.1, 0.9]], dtype=torch.float64)
    assert adaptive_ece(p, torch.tensor([0, 1, 1, 1]), n_bins=2) == pytest.approx(0.5 * 0.15 + 0.5 * 0.1)


def test_adaptive_ece_knows_no_order_of_equal_confidences():
    p = torch.tensor([[0.9, 0.1]] * 10)
    for labels in ([0] * 5 + [1] * 5, [0, 1] * 5):
        assert adaptive_ece(p, torch.tensor(labels), n_bins=3) == pytest.approx(0.4, abs=1e-6)


def test_classwise_ece_is_that_of_a_loop_over_classes_and_bins(predicted):
    p, labels = (t.numpy() for t in predicted)
    total = 0.0
    for k in range(10):
        for b in range(15):
            inside = (p[:, k] > b / 15) & (p[:, k] <= (b + 1) / 15)
            if inside.any():
                total += inside.mean() * abs(p[inside, k].mean() - (labels[inside] == k).mean())
    assert classwise_ece(*predicted) == pytest.approx(total / 10, abs=1e-12)


def test_classwise_ece_by_hand():
    # class 0: p 0.8 twice, right once -> 0.3; class 1: p 0.2 twice, right once -> 0.3
    p, labels = torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1])
    assert classwise_ece(p, labels) == pytest.approx(0.3, abs=1e-6)
    assert classwise_ece(torch.eye(3), torch.arange(3)) == 0


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0, 12.0])
def test_temperature_is_that_of_scipys_minimiser_on_the_logits(sharpness):
    logits, labels = predictions(sharpness=sharpness)

    def nll(log_temperature):
        return -log_softmax(logits / math.exp(log_temperature), 1)[np.arange(len(labels)), labels].mean()

    oracle = math.exp(minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8}).x)
    assert fit_temperature(*tensors(logits, labels)) == pytest.approx(oracle, rel=1e-5)
    assert oracle == pytest.approx(sharpness, rel=0.1)  # the labels were drawn at sharpness 1


def test_temperature_from_stored_float32_is_that_from_float64(predicted):
    p, labels = predicted
    assert fit_temperature(p.float(), labels) == pytest.approx(fit_temperature(p, labels), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 1], [1, 0]])
def test_without_a_minimum_the_temperature_is_left_alone(labels):
    """All right, where the least NLL would make a certainty of every prediction; or all wrong."""
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert fit_temperature(p, torch.tensor(labels)) == 1


def test_temperature_of_certainties_is_found():
    """Two right of three: softmax((0, log tiny) / T) should be (2 / 3, 1 / 3)."""
    expected = -math.log(torch.finfo(torch.float32).tiny) / math.log(2)
    assert fit_temperature(torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, 1])) == pytest.approx(expected, rel=1e-4)


def test_scaling_probabilities_is_scaling_logits():
    logits, labels = predictions()
    p, _ = tensors(logits, labels)
    assert torch.allclose(scale_temperature(p, 2.5), torch.from_numpy(softmax(logits / 2.5, 1)), atol=1e-12)
    assert torch.allclose(scale_temperature(p, 1.0), p, atol=1e-12)


def test_cross_fitting_scales_each_half_by_the_temperature_of_the_other(predicted):
    p, labels = predicted
    order = np.argsort(labels.numpy(), kind="stable")
    folds = [torch.from_numpy(order[0::2].copy()), torch.from_numpy(order[1::2].copy())]
    temperatures = [fit_temperature(p[i], labels[i]) for i in folds]
    scores = calibration_scores(p, labels)
    assert scores["temperatures"] == temperatures[::-1]
    scaled = torch.cat([scale_temperature(p[i], t) for i, t in zip(folds, temperatures[::-1], strict=True)])
    whole = calibration_scores(scaled, labels[torch.cat(folds)])  # all images are measured together
    names = {"accuracy", "ece", "oe", "nll", "brier", "ece_15", "adaptive_ece", "classwise_ece"}
    assert scores["scaled"].keys() == names
    for name in names - {"accuracy"}:
        assert scores["scaled"][name] == pytest.approx(whole[name], abs=1e-12)
        assert scores["scaled"][name] < scores[name]  # they were three times too sharp
    assert scores["scaled"]["accuracy"] == scores["accuracy"]


def test_of_calibrated_predictions_scaling_leaves_what_chance_makes():
    p, labels = tensors(*predictions(n=10_000, sharpness=1.0))
    metrics = calibration_metrics(p, labels)
    mean, sd = errors_by_chance(metrics.bin_count, metrics.bin_confidence)[0]
    assert abs(calibration_scores(p, labels)["scaled"]["ece"] - mean) < 2 * sd


def test_halves_hold_each_class_whatever_the_order_of_the_images(predicted):
    p, labels = predicted
    by_label = labels.argsort(stable=True)
    sorted_scores = calibration_scores(p[by_label], labels[by_label])
    assert sorted_scores["temperatures"] == pytest.approx(calibration_scores(p, labels)["temperatures"])
    assert sorted_scores["temperatures"] == pytest.approx([3, 3], rel=0.15)


def test_validation_images_decide_the_temperature_where_there_are_some(predicted):
    validation = tensors(*predictions(sharpness=2.0, seed=1))
    scores = calibration_scores(*predicted, validation)
    assert scores["temperatures"] == [fit_temperature(*validation)]
    expected = calibration_scores(scale_temperature(predicted[0], scores["temperatures"][0]), predicted[1])
    assert scores["scaled"]["nll"] == pytest.approx(expected["nll"], abs=1e-12)
    assert scores["scaled"]["classwise_ece"] == pytest.approx(expected["classwise_ece"], abs=1e-12)


def test_scores_of_run_takes_what_the_file_holds(predicted, tmp_path):
    p, labels = predicted
    other = tensors(*predictions(sharpness=2.0, seed=1))
    arrays = {"best": p, "last": p.flip(0), "labels": labels}
    assert scores_of_run(arrays).keys() == {"best", "last"}
    np.savez(tmp_path / "p.npz", **arrays, selected=p, val=other[0], val_labels=other[1])
    with np.load(tmp_path / "p.npz") as stored:
        scores = scores_of_run(stored)
    assert scores["best"] == calibration_scores(p, labels)
    assert scores["last"] == calibration_scores(p.flip(0), labels)
    assert scores["selected"] == calibration_scores(p, labels, other)


@pytest.mark.parametrize("metric", [calibration_scores, adaptive_ece, classwise_ece, fit_temperature])
def test_bad_probabilities_are_refused(metric, predicted):
    p, labels = predicted
    with pytest.raises(ValueError, match="sum to one"):
        metric(p * 2, labels)
    with pytest.raises(ValueError, match=r"got \(1000, 10\) and \(999,\)"):
        metric(p, labels[1:])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_is_above_0(temperature, predicted):
    with pytest.raises(ValueError, match="want a temperature above 0, got "):
        scale_temperature(predicted[0], temperature)
