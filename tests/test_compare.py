"""Two runs compared over their test images: by formulas, refitted resamples and what the runs say of themselves."""

import json
import math
import shutil
import statistics

import numpy as np
import pytest
import torch
from conftest import run_row
from scipy.stats import binomtest

import compare
import verify
from calibration import calibration_metrics, calibration_scores, fit_temperature, scale_temperature
from run_files import HALF, UserError, save_log_probabilities


def outputs(noise: float, n: int = 600, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax outputs that are right on some images, the same ones but for the noise."""
    labels = torch.arange(n) % classes
    logits = torch.randn(n, classes, generator=torch.Generator().manual_seed(1))
    logits += noise * torch.randn(n, classes, generator=torch.Generator().manual_seed(2))
    logits[torch.arange(n), labels] += 1
    logits[0, 1:] += 200  # whose own class underflows to 0
    return logits.softmax(1), labels


def test_metrics_are_those_of_a_run_and_scaled_by_the_temperature_of_all_images():
    p, labels = outputs(0.3)
    found = {metric: values[0].item() for metric, values in metrics_of(p, labels, torch.ones(1, 600)).items()}
    scores = calibration_scores(p, labels, validation=(p, labels))
    for metric in ("accuracy", "nll", "ece_15"):
        assert found[metric] == pytest.approx(scores[metric], abs=1e-6)
    for metric in ("nll", "ece_15"):
        assert found[f"{metric}_scaled"] == pytest.approx(scores["scaled"][metric], abs=1e-6)
    assert found["temperature"] == pytest.approx(fit_temperature(p, labels), rel=1e-4)
    logits = np.log(np.maximum(p.double().numpy(), np.finfo(np.float32).tiny))
    assert found["logits"] == pytest.approx(math.sqrt(((logits - logits.mean(1, keepdims=True)) ** 2).mean()))


def metrics_of(p, labels, counts) -> dict[str, torch.Tensor]:
    return compare.statistics(p, labels, counts.double() / len(labels))


def test_a_resample_has_the_metrics_of_its_images():
    p, labels = outputs(0.3)
    draw = torch.randint(600, (600,), generator=torch.Generator().manual_seed(3))
    found = metrics_of(p, labels, torch.bincount(draw, minlength=600)[None])
    scores = calibration_scores(p[draw], labels[draw], validation=(p, labels))
    for metric in ("accuracy", "nll", "ece_15"):
        assert found[metric].item() == pytest.approx(scores[metric], abs=1e-6)
        if metric != "accuracy":
            assert found[f"{metric}_scaled"].item() == pytest.approx(scores["scaled"][metric], abs=1e-6)
    change = fit_temperature(p[draw], labels[draw]) - fit_temperature(p, labels)
    assert abs(change) > 0.01  # so that a Newton step is seen to follow it
    assert found["temperature"].item() - fit_temperature(p, labels) == pytest.approx(change, rel=0.1)
    fixed, refitted = (
        scale_temperature(p[draw], fit_temperature(*on)).max(1).values.mean() - scores["accuracy"]
        for on in ((p, labels), (p[draw], labels[draw]))
    )
    assert abs(refitted - fixed) > 0.005
    assert found["overconfidence_scaled"].item() - fixed == pytest.approx((refitted - fixed).item(), rel=0.1)


def test_the_spread_of_accuracy_is_that_of_paired_images():
    (p, labels), (other, _) = outputs(0), outputs(0.3)
    right, other_right = (q.argmax(1) == labels for q in (p, other))
    difference = (right.double() - other_right.double()).numpy()
    found = {metric: both for metric, *both in compare.compare(p, other, labels)}
    values, spreads = found["accuracy"]
    assert values[0] - values[1] == pytest.approx(values[2]) == pytest.approx(difference.mean())
    paired = 1.96 * difference.std() / math.sqrt(len(labels))
    alone = 1.96 * math.hypot(*(float(r.double().std()) for r in (right, other_right))) / math.sqrt(len(labels))
    assert spreads[2] == pytest.approx(paired, rel=0.1) and paired < 0.8 * alone
    for q, spread in zip((p, other), found["overconfidence"][1], strict=False):
        gap = q.max(1).values - (q.argmax(1) == labels).double()
        assert spread == pytest.approx(1.96 * gap.std().item() / math.sqrt(len(labels)), rel=0.1)
    assert all(spread[2] == 0 and a == b for _, (a, b, _), spread in compare.compare(p, p, labels))


def test_chance_is_what_labels_drawn_from_the_predictions_make():
    p, labels = outputs(0.3)
    generator = torch.Generator().manual_seed(4)
    eces = [calibration_metrics(p, torch.multinomial(p, 1, generator=generator)[:, 0], 15).ece for _ in range(200)]
    mean, deviation = (float(word) for word in compare.by_chance(p, labels).split(" ± "))
    assert (mean, deviation) == pytest.approx((statistics.mean(eces), statistics.stdev(eces)), rel=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student with two seeds."""
    folder = tmp_path_factory.mktemp("results")
    return [run_row("student_baseline", folder, seed=seed, epochs=2, wandb_mode="disabled")[1] for seed in (0, 1)]


@pytest.fixture
def runs(trained, tmp_path):
    return [shutil.copytree(run, tmp_path / "results" / run.relative_to(run.parents[2])) for run in trained]


def compared(runs, capsys) -> str:
    capsys.readouterr()
    verify.predict.cache_clear()
    assert compare.main(compare.Config(runs=tuple(runs))) == 0
    return capsys.readouterr().out


def test_runs_are_compared_at_their_last_epoch_from_predictions_or_weights(runs, capsys):
    text = compared(runs, capsys)
    said = [json.loads((run / "result.json").read_text())["last"] for run in runs]
    for title, metric, scale in (("accuracy, %", "accuracy", 100), ("NLL", "nll", 1)):
        [line] = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
        cells = [cell.split()[0] for cell in line.split("|")[2:4]]
        assert [float(cell) for cell in cells] == pytest.approx([scale * last[metric] for last in said], abs=0.006)
    arrays = [np.load(run / "probabilities.npz") for run in runs]
    right = [array["last"].argmax(1) == array["labels"] for array in arrays]
    alone = [int((a & ~b).sum()) for a, b in (right, right[::-1])]
    assert f"{alone[0]} of 360 test images are right by the first run alone, {alone[1]} by the second alone" in text
    assert f"p = {binomtest(alone[0], sum(alone)).pvalue:.2g} " in text
    for run in runs:
        (run / "probabilities.npz").unlink()
        (run / "log_probabilities.fp16.npz").unlink()
    assert compared(runs, capsys) == text


def test_predictions_of_another_epoch_are_not_taken_for_those_of_the_last(runs, capsys):
    text = compared(runs, capsys)
    for run in runs:
        arrays, result = dict(np.load(run / "probabilities.npz")), json.loads((run / "result.json").read_text())
        (run / "probabilities.npz").unlink()
        save_log_probabilities(run, {**arrays, "best": arrays["best"][::-1]})
        half = dict(np.load(run / HALF["probabilities.npz"]))
        half.pop("last", None)  # there where half precision would change the weights' accuracy
        np.savez(run / HALF["probabilities.npz"], **half)
        result["best"]["epoch"], result["last"]["epoch"] = 1, 2
        (run / "result.json").write_text(json.dumps(result))
    assert compared(runs, capsys) == text


def test_where_no_temperature_can_be_fitted_none_is_named(runs, capsys):
    arrays = dict(np.load(runs[0] / "probabilities.npz"))
    wrong = (arrays["labels"] + 1) % 10  # worse than chance
    arrays["last"] = np.where(np.arange(10) == wrong[:, None], 0.19, 0.09).astype(np.float32)
    np.savez(runs[0] / "probabilities.npz", **arrays)
    lines = compared(runs, capsys).splitlines()
    for title, bound in (("temperature", 0), ("confidence - accuracy, scaled", -1)):
        [line] = [line for line in lines if line.startswith(f"| {title} |")]
        ours, theirs, difference = (cell.strip() for cell in line.split("|")[2:5])
        assert ours == difference == "none fits" and float(theirs.split()[0]) > bound


def test_what_cannot_be_compared_is_said_in_a_line(runs, capsys):
    with pytest.raises(UserError, match="nowhere is not the folder of a finished run"):
        compared([runs[0], runs[1].parent / "nowhere"], capsys)
    arrays = dict(np.load(runs[1] / "probabilities.npz"))
    np.savez(runs[1] / "probabilities.npz", **{**arrays, "labels": arrays["labels"][::-1]})
    with pytest.raises(UserError, match="the two runs were not tested on the same images"):
        compared(runs, capsys)
    np.savez(runs[1] / "probabilities.npz", **arrays)
    result = json.loads((runs[1] / "result.json").read_text())
    (runs[1] / "result.json").write_text(json.dumps(result | {"classes": result["classes"][::-1]}))
    with pytest.raises(UserError, match="the two runs were not tested on the same images"):
        compared(runs, capsys)
    settings = result["settings"] | {"image_size": 16}  # their pixels may sort otherwise
    (runs[1] / "result.json").write_text(json.dumps(result | {"settings": settings}))
    with pytest.raises(UserError, match="the two runs were not tested on the same images"):
        compared(runs, capsys)
    (runs[1] / "result.json").write_text(json.dumps(result))
    for file in runs[0].glob("*.[ns][pa]*"):
        file.unlink()
    with pytest.raises(UserError, match="has neither predictions of its last epoch nor weights: train it again"):
        compared(runs, capsys)
