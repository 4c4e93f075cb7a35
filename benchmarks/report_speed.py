"""How long `calibration_metrics` and a whole report take, on random probabilities of 10,000 images and 100 classes.

    uv run benchmarks/report_speed.py

The metrics are compared with a reference in the style of the published scripts, a Python loop over the bins with
boolean masks, in the same run. The report is `report.py --recompute` over 16 rows and 3 seeds in a process of its own,
with imports, tables and figures. Medians; nothing is left behind.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from calibration import calibration_metrics, calibration_scores
from run_files import read_published

ROOT = Path(__file__).resolve().parent.parent
IMAGES, CLASSES, SEEDS, EPOCHS = 10_000, 100, 3, 240


def random_predictions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    logits = 2 * torch.randn(IMAGES, CLASSES, generator=generator)
    logits[torch.arange(IMAGES), labels] += 6 * torch.rand(IMAGES, generator=generator)
    return logits.softmax(1), labels


def loop_over_bins(probabilities: torch.Tensor, labels: torch.Tensor, n_bins: int = 100) -> tuple[float, float]:
    """ECE and OE as the published scripts compute them."""
    confidence, prediction = probabilities.max(1)
    correct = prediction.eq(labels)
    ece = oe = 0.0
    for b in range(n_bins):
        inside = confidence.gt(b / n_bins) & confidence.le((b + 1) / n_bins)
        share = inside.float().mean()
        if share.item() > 0:
            accuracy, mean = correct[inside].float().mean(), confidence[inside].mean()
            ece += share * (mean - accuracy).abs()
            oe += share * mean * (mean - accuracy).clamp(min=0)
    return float(ece), float(oe)


def milliseconds(function: Callable, repeats: int = 21) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def write_runs(results_dir: Path) -> None:
    """Older runs of all rows, without the metrics that --recompute adds."""
    for line in read_published():
        for seed in range(SEEDS if not line["changes"] else 0):
            folder = results_dir / "short" / line["row"] / f"seed{seed}"
            folder.mkdir(parents=True)
            probabilities, labels = random_predictions(seed)
            np.savez(folder / "probabilities.npz", best=probabilities, last=probabilities, labels=labels)
            scores = {"epoch": EPOCHS, **calibration_metrics(probabilities, labels).scores}
            result = {"row": line["row"], "protocol": "short", "seed": seed, "changes": {}, "dataset": "cifar100"}
            (folder / "result.json").write_text(json.dumps({**result, "best": scores, "last": scores}))
            if not line["row"].endswith("_ensemble"):
                epochs = [f"{epoch},0.1,{epoch / EPOCHS},0.1" for epoch in range(1, EPOCHS + 1)]
                (folder / "history.csv").write_text("\n".join(["epoch,lr,accuracy,ece", *epochs]))


def main() -> None:
    predictions = random_predictions(0)
    ours = milliseconds(lambda: calibration_metrics(*predictions))
    reference = milliseconds(lambda: loop_over_bins(*predictions), 5)
    print(f"calibration_metrics        {ours:8.1f} ms   ({reference / ours:.0f} times the speed of a loop over bins)")
    print(f"calibration_scores         {milliseconds(lambda: calibration_scores(*predictions), 5):8.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder))
        for flags in (["--recompute"], [], ["--check"]):
            command = [sys.executable, str(ROOT / "report.py"), "--results-dir", folder, *flags]
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"report.py {' '.join(flags):16} {time.perf_counter() - started:8.1f} s    (16 rows, {SEEDS} seeds)")


if __name__ == "__main__":
    main()
