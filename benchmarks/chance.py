"""What chance alone makes of the kit's numbers: the simulations behind README, results/README and questions.py.

    python benchmarks/chance.py

Half a minute of one CPU core.
"""

import statistics
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import beta, t

from calibration import calibration_metrics, calibration_scores, fit_temperature
from consistency import errors_by_chance
from questions import significant
from run_files import HALF, load_probabilities

RESULTS = Path(__file__).resolve().parent.parent / "results"
IMAGES = 10_000


def between(values: list[float], digits: int = 4) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def calibrated_models() -> None:
    """Confidences have a beta distribution with mean 0.77, and 18 or 45 % of them are above 0.95."""
    places = (np.arange(IMAGES) + 0.5) / IMAGES
    rng, eces, deviations, oes, shifted = np.random.default_rng(0), [], [], [], []
    for above in (0.18, 0.45):
        size = brentq(lambda s, above=above: beta.sf(0.95, 0.77 * s, 0.23 * s) - above, 0.5, 50)
        confidence = beta.ppf(places, 0.77 * size, 0.23 * size).clip(0.002)  # so that the first class is predicted
        p = torch.tensor((1 - confidence) / 999)[:, None].repeat(1, 1000)
        p[:, 0] = torch.tensor(confidence)
        bins = calibration_metrics(p, torch.zeros(IMAGES, dtype=torch.long))
        (ece, deviation), (oe, _) = errors_by_chance(bins.bin_count, bins.bin_confidence)
        wrong = [torch.tensor(rng.random(IMAGES) > confidence - 0.01).long() for _ in range(100)]
        shifted.append(statistics.mean(calibration_metrics(p, labels).scores["ece"] for labels in wrong))
        eces, deviations, oes = [*eces, ece], [*deviations, deviation], [*oes, oe]
    print(
        f"A calibrated model that is right on 77 % of 10,000 images: ECE {between(eces)}, ± {between(deviations)} "
        f"between test sets, OE {between(oes)}; if its confidence is 0.010 too high, ECE {between(shifted)}."
    )


def floors_of_brief() -> None:
    """Labels are drawn from the committed predictions, which are calibrated then."""
    generator, found = torch.Generator().manual_seed(0), {"adaptive_ece": [], "classwise_ece": []}
    for file in sorted(RESULTS.glob(f"brief/*/seed0/{HALF['probabilities.npz']}")):
        p = torch.from_numpy(load_probabilities(file)["best"])
        scores = [calibration_scores(p, torch.multinomial(p, 1, generator=generator)[:, 0]) for _ in range(10)]
        for metric, means in found.items():
            means.append(statistics.mean(score[metric] for score in scores))
    text = ", ".join(f"{metric} {between(means)}" for metric, means in found.items())
    print(f"Calibrated models with the predictions of {len(means)} runs of brief: {text}.")


def fitted_temperatures() -> None:
    """Logits are normal, of the size that makes a calibrated model right on 78 % of the images."""
    generator = torch.Generator().manual_seed(0)
    for n in (100, 500, 1000):
        errors = []
        for classes in (10, 100):
            logits = torch.randn(20_000, classes, generator=generator)
            size = brentq(lambda s, z=logits: (s * z).softmax(1).max(1).values.mean().item() - 0.78, 1, 30)
            p, found = (size * logits).softmax(1), []
            for _ in range(300):
                drawn = p[torch.randint(len(p), (n,), generator=generator)]
                found.append(fit_temperature(drawn, torch.multinomial(drawn, 1, generator=generator)[:, 0]))
            errors.append(np.log(found).std())
        print(f"The temperature fitted on {n:,} images, right on 78 %: standard error {between(errors, 3)}.")


def bold_cells() -> None:
    """A difference is bold beyond two of our standard deviations, and the published number is a single run."""
    shares = [2 * t.sf(2 / (1 + 1 / n) ** 0.5, n - 1) for n in (2, 3, 10)]
    print(
        f"Bold by chance against the published number, with 2, 3 and 10 seeds: {', '.join(f'{s:.0%}' for s in shares)}."
    )


def significant_differences() -> None:
    """All rows have noise of 1, and so differences one of 2 ** 0.5, but where a row is noisier."""
    rng = np.random.default_rng(0)

    def share(rows: int, seeds: int, effect: float = 0, own: float = 1, reference: float = 1) -> float:
        """How often the first row's difference, of `effect` standard deviations, is found."""
        hits = 0
        for _ in range(2000):
            noise = rng.normal(size=(rows, seeds)) * np.array([own] + [1] * (rows - 1))[:, None]
            differences = noise - reference * rng.normal(size=seeds)
            differences[0] += effect * 2**0.5
            hits += significant(differences.tolist())[0]
        return hits / 2000

    cases: dict[str, list[dict[str, float]]] = {
        "A difference of two standard deviations": [{"effect": 2}],
        "No difference": [{}],
        "No difference from a row twice as noisy": [{"reference": 2}],
        "No difference of a row two or three times as noisy": [{"own": 2}, {"own": 3}],
    }
    for name, ways in cases.items():
        texts = [between([share(rows, seeds, **way) for rows in (4, 8) for way in ways], 2) for seeds in (2, 3)]
        print(f"{name} is bold with two seeds in {texts[0]} of cases, with three in {texts[1]}.")


if __name__ == "__main__":
    for simulate in (calibrated_models, floors_of_brief, fitted_temperatures, bold_cells, significant_differences):
        simulate()
