"""Tell whether two runs differ by more than the choice of test images explains.

The test images are resampled 1,000 times, the same for both runs (paired bootstrap), with the predictions of the last
epoch: ± is 1.96 standard deviations of a run's value, or of the difference (first run minus second). This holds for
these two trained models only; report.py compares rows over several seeds.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import verify
from calibration import calibration_metrics, fit_temperature, scale_temperature
from command_line import device_errors, orderly_end, parse
from consistency import errors_by_chance
from rows import markdown_table, number, read_run
from run_files import HALF, UserError, full_name, load_probabilities

RESAMPLES = 1000
METRICS = {
    "accuracy": "accuracy, %",
    "overconfidence": "confidence - accuracy",
    "overconfidence_scaled": "confidence - accuracy, scaled",
    "nll": "NLL",
    "nll_scaled": "NLL, scaled",
    "ece_15": "ECE, 15 bins",
    "ece_15_scaled": "ECE, 15 bins, scaled",
    "temperature": "temperature",
    "logits": "size of logits",
}


@dataclass(kw_only=True)
class Config:
    runs: tyro.conf.Positional[tuple[Path, Path]]
    """folders of two finished runs, such as results/brief/kd_cutmix/seed0"""
    data_dir: Path = Path("data")
    """where the images are, for a run that has weights but no predictions"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes an NVIDIA GPU if torch sees one"""


def predictions(cfg: Config, folder: Path, result: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A finished run's softmax outputs for the test images at its last epoch, float (n, classes), and the labels, int64
    (n,): the outputs that it left or, without these, what its weights predict now.

    Raises:
        UserError: the folder has neither.
    """
    for file in (folder / "probabilities.npz", folder / HALF["probabilities.npz"]):
        arrays = load_probabilities(file) if file.is_file() else {}
        same = "best" in arrays and result["best"]["epoch"] == result["last"]["epoch"]
        if (p := arrays.get("last", arrays["best"] if same else None)) is not None:
            return torch.from_numpy(p), torch.from_numpy(arrays["labels"]).long()
    here = verify.Config(results_dir=folder.resolve().parents[2], data_dir=cfg.data_dir, device=cfg.device)
    p = verify.predict(here, folder)
    if p is None:
        raise UserError(f"{folder} has neither predictions of its last epoch nor weights: train it again")
    return p, verify.trained(here, folder).data.test_labels.cpu()


def statistics(p: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The `METRICS` of predictions, (n, classes), and labels, (n,), each (resamples,), as float64.

    `weights` are those of the images, (resamples, n), each row summing to one. *Scaled* is by the one temperature that
    all images have. Resampled, the temperature itself is a Newton step from that one (`fit_temperature`: its derivative
    in 1 / T; the second one is the variance of log p under q), and scaled confidence follows it to first order (else
    its spread would be a third too wide); both are NaN where none can be fitted. NLL is least there and does not move,
    and ECE hardly does. The size of logits, which softmax outputs know up to a constant for each image, is the root
    mean square of log p less its mean over the classes: divided by the temperature it is the size that would be
    calibrated.
    """
    temperature = fit_temperature(p, labels)
    p, q = (scale_temperature(p, t) for t in (1.0, temperature))  # in float64, without a 0
    logits, right = p.log(), (p.argmax(1) == labels).double()
    target = logits.gather(1, labels[:, None]).squeeze(1)
    mean = (q * logits).sum(1)
    variance = (q * logits.square()).sum(1) - mean.square()
    step = (weights @ (target - mean)) / (weights @ variance)  # of 1 / T
    if temperature == 1:  # no minimum, from which a step would mean something
        step = torch.full_like(step, math.nan)
    found = {"accuracy": weights @ right, "temperature": 1 / (1 / temperature + step)}
    found |= {"logits": (weights @ logits.var(1, correction=0)).sqrt()}
    for name, probabilities in {"": p, "_scaled": q}.items():
        confidence = probabilities.max(1).values
        found[f"overconfidence{name}"] = weights @ (confidence - right)
        bins = torch.bucketize(confidence, torch.arange(1, 15, dtype=torch.float64) / 15)
        gaps = torch.nn.functional.one_hot(bins, 15) * (confidence - right)[:, None]
        found[f"ece_15{name}"] = (weights @ gaps).abs().sum(1)
        found[f"nll{name}"] = -weights @ probabilities.gather(1, labels[:, None]).squeeze(1).log()
    found["overconfidence_scaled"] += step * (weights @ (q.max(1).values * (logits.max(1).values - mean)))
    return found


def compare(p: Tensor, other: Tensor, labels: Tensor) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """Of each metric its name, its value for either run and their difference, and 1.96 standard deviations of each.

    Args:
        p, other: softmax outputs for the same images, float (n, classes).
        labels: int64 (n,).
    """
    n, generator = len(labels), torch.Generator().manual_seed(0)
    draws = (torch.randint(n, (n,), generator=generator) for _ in range(RESAMPLES))
    counts = torch.stack([torch.ones(n), *(torch.bincount(draw, minlength=n) for draw in draws)])  # first as they are
    ours, theirs = (statistics(probabilities, labels, counts.double() / n) for probabilities in (p, other))
    found = {m: torch.stack([ours[m], theirs[m], ours[m] - theirs[m]]) for m in METRICS}
    return [(m, tuple(v[:, 0].tolist()), tuple((1.96 * v[:, 1:].std(1)).tolist())) for m, v in found.items()]


def by_chance(p: Tensor, labels: Tensor) -> str:
    """The ECE in 15 bins, ± its standard deviation, that a calibrated model with the confidences of `p` would have."""
    bins = calibration_metrics(p, labels, n_bins=15)
    mean, deviation = errors_by_chance(bins.bin_count, bins.bin_confidence)[0]
    return f"{number('ece', mean)} ± {number('ece', deviation)}"


def main(cfg: Config) -> int:
    """Compare as the settings say."""
    from scipy.stats import binomtest

    for folder in cfg.runs:
        if not (folder / "result.json").is_file():
            raise UserError(f"{folder} is not the folder of a finished run: it has no result.json (try its seed0)")
    a, b = (read_run(folder).result for folder in cfg.runs)
    images = [(r["dataset"], r["classes"], r["settings"]["image_size"]) for r in (a, b)]  # sorted by their pixels
    if images[0] == images[1]:  # else before any is downloaded
        (p, labels), (other, other_labels) = (predictions(cfg, *run) for run in zip(cfg.runs, (a, b), strict=True))
    if images[0] != images[1] or not torch.equal(labels, other_labels):
        raise UserError("the two runs were not tested on the same images: name runs with one dataset and --image-size")
    lines = []
    for metric, values, spreads in compare(p, other, labels):
        cells = zip(values, spreads, ("", "", "+"), strict=True)
        texts = (
            "none fits" if math.isnan(v) else f"{number(metric, v, sign)} ± {number(metric, s)}" for v, s, sign in cells
        )
        lines.append([METRICS[metric], *texts])
    names = [f"`{full_name(r['row'], r['changes'])}`, {r['protocol']}, seed {r['seed']}" for r in (a, b)]
    print(markdown_table(["", *names, "difference"], lines))
    right, other_right = (probabilities.argmax(1) == labels for probabilities in (p, other))
    alone, other_alone = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    chance = binomtest(alone, alone + other_alone).pvalue if alone + other_alone else 1.0
    print(
        f"\n{alone:,} of {len(labels):,} test images are right by the first run alone, {other_alone:,} by the second "
        f"alone: p = {chance:.2g} (McNemar's exact test).\n\n"
        "± is 1.96 standard deviations over resampled test images, for these two models; report.py compares seeds.\n"
        f"By chance, calibrated models with these confidences have an ECE in 15 bins of {by_chance(p, labels)} and "
        f"{by_chance(other, labels)} (one standard deviation).\n"
        "An ECE near these values is biased upwards, and its difference from a higher ECE too small. Confidence minus "
        "accuracy has no such bias, but over- and underconfident bins cancel in it.\n"
        "Scaled: by the temperature fitted on all test images. Size of logits / temperature: the size if calibrated."
    )
    return 0


if __name__ == "__main__":
    with orderly_end():
        cfg = parse(Config, __doc__)
        with device_errors("use --device cpu, or a machine with more"):
            sys.exit(main(cfg))
