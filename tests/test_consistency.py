"""What a calibrated model shows by chance, against simulated test sets and sums over all outcomes."""

import re
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import beta, binom

from calibration import calibration_metrics
from consistency import consistency_bars, errors_by_chance


@pytest.mark.parametrize(("n", "n_bins"), [(100, 15), (10_000, 100)])
def test_errors_by_chance_are_those_of_simulated_calibrated_models(n, n_bins):
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.dirichlet(np.full(10, 0.2), n))
    cumulated, found = p.numpy().cumsum(1), []
    for _ in range(400):
        labels = (rng.random((n, 1)) > cumulated).sum(1).clip(max=9)  # drawn from the predictions themselves
        metrics = calibration_metrics(p, labels, n_bins)
        found.append((metrics.ece, metrics.oe))
    expected = errors_by_chance(metrics.bin_count, metrics.bin_confidence)
    mean, sd = np.mean(found, axis=0), np.std(found, axis=0)
    assert (abs(mean - expected[:, 0]) < 4 * sd / len(found) ** 0.5 + 0.01 * mean).all()
    assert sd == pytest.approx(expected[:, 1], rel=0.15) and mean[0] > 0.005


def test_errors_by_chance_are_sums_over_all_outcomes():
    count, confidence = [0, 1, 4, 10, 25, 3], [0, 0.3, 0.5, 0.55, 0.999, 1]
    ece = oe = variance = 0
    for n, c in zip(count, confidence, strict=True):
        p, k = binom.pmf(range(n + 1), n, c), np.arange(n + 1)
        ece += p @ abs(k - n * c) / 43
        oe += p @ (n * c - k).clip(min=0) * c / 43
        variance += (p @ (k - n * c) ** 2 - (p @ abs(k - n * c)) ** 2) / 43**2
    found = errors_by_chance(count, confidence)
    assert found[:, 0] == pytest.approx([ece, oe]) and found[0, 1] == pytest.approx(variance**0.5)


@pytest.mark.parametrize("bins", [([], []), ([0, 0], [0, 0]), ([2.5], [0.5]), ([-1, 3], [0.5, 0.5]), ([3], [1.01])])
def test_what_are_no_bins_of_images_is_refused(bins):
    with pytest.raises(ValueError, match="want whole numbers of images, not all 0, and confidences from 0 to 1"):
        errors_by_chance(*bins)


def test_of_models_that_are_always_sure_nothing_is_left_to_chance():
    assert not errors_by_chance([0, 50], [0, 1]).any()


def test_consistency_bars_hold_95_of_100_simulated_accuracies():
    count, confidence = np.array([1, 20, 500]), np.array([0.6, 0.3, 0.9])
    low, high = consistency_bars(count, confidence)
    accuracy = np.random.default_rng(0).binomial(count, confidence, (20_000, 3)) / count
    inside = ((accuracy >= low) & (accuracy <= high)).mean(0)
    assert (inside >= 0.945).all() and inside[2] < 0.97  # of few images, outcomes come in steps
    assert (low[0], high[0]) == (0, 1)


def test_a_calibrated_cifar100_model_has_the_errors_that_the_readme_says():
    edges, found = np.linspace(0, 1, 101), []
    for a, b in ((3, 0.9), (2, 0.6), (1.5, 0.45), (1, 0.3), (0.8, 0.24)):
        confidence = beta(a, b).ppf((np.arange(10_000) + 0.5) / 10_000)
        assert confidence.mean() == pytest.approx(0.77, abs=0.001)
        count, _ = np.histogram(confidence, edges)
        total, _ = np.histogram(confidence, edges, weights=confidence)
        errors = errors_by_chance(count, total / count.clip(min=1))
        found.append([*errors[:, 0], (confidence > 0.95).mean()])
        assert f"{errors[0, 1]:.3f}" == "0.002"
    low, high = np.min(found, 0), np.max(found, 0)
    assert [f"{v:.3f}" for v in (*low[:2], *high[:2])] == ["0.023", "0.006", "0.026", "0.008"]
    assert (f"{low[2]:.0%}", f"{high[2]:.0%}") == ("18%", "45%")


@pytest.mark.slow
def test_the_documents_cite_what_chance_makes(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "chance.py"), run_name="__main__")
    out = capsys.readouterr().out
    cited = " ".join(((ROOT / "README.md").read_text() + (ROOT / "results" / "README.md").read_text()).split())
    eces = re.search(r"ECE ([\d.]+) to ([\d.]+)", out).groups()
    assert "ECE of {:.3f} to {:.3f}".format(*map(float, eces)) in cited
    errors = [100 * float(found) for line in re.findall(r"error (0\.\d+) to (0\.\d+)", out) for found in line]
    few, few_most, some, some_most, _, many = (f"{error:.0f}" for error in errors)
    assert f"error is {some} to {some_most} %; {few} to {few_most} % with 100 images, {many} % with 1,000" in cited
