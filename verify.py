"""Check the numbers in results/ against the weights beside them.

Each finished run predicts the test images again with the weights of its last epoch, in half precision where no others
were published; an ensemble is the mean of its members' predictions. The numbers in result.json and those found now are
printed side by side, with `differs` where they differ by more than rounding. Nothing is written, nothing is trained.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import common
from calibration import calibration_metrics
from command_line import device_errors, orderly_end, parse
from rows import number, read_run, run_folders
from run_files import UserError, files_for, read_result

# What half precision may move: accuracy as far as `common.Run` publishes such weights; NLL hardly (where it was tried,
# by 0.0002), ECE and OE more (by 0.0023), for some images then fall into another bin.
TOLERANCE = {"accuracy": 0.0005, "ece": 0.005, "oe": 0.005, "nll": 0.001}
TITLES = {"accuracy": "accuracy, %", "ece": "ECE", "oe": "OE", "nll": "NLL"}


@dataclass(kw_only=True, frozen=True)
class Config:
    protocol: str | None = None
    """verify only the runs of this protocol; without it, all"""
    rows: tuple[str, ...] = ()
    """verify only these rows; without any, all"""
    results_dir: Path = Path("results")
    """where the run folders are"""
    data_dir: Path = Path("data")
    """where the images are; CIFAR-100 is downloaded there if missing"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes an NVIDIA GPU if torch sees one"""


def trained(cfg: Config, folder: Path) -> common.Run:
    """A `common.Run` with the images and the device of a finished run, to load and ask its model."""
    result = read_result(folder)
    about = {name: result[name] for name in ("protocol", "seed", "dataset")}
    about |= {name: result["settings"][name] for name in ("train_size", "val_size", "image_size")}
    here = {"data_dir": cfg.data_dir, "results_dir": cfg.results_dir, "device": cfg.device}
    return common.Run(result["row"], common.Config(**about, **here))


def member_of(cfg: Config, source: str, digest: str | None) -> Path | None:
    """The folder of an ensemble's member, among these results or where it was: the one that has the averaged file."""
    for folder in (cfg.results_dir.joinpath(*Path(source).parts[-3:]), Path(source)):
        if (folder / "result.json").is_file() and digest in (None, *read_result(folder)["files"].values()):
            return folder
    return None


@functools.cache
def predict(cfg: Config, folder: Path) -> Tensor | None:
    """Softmax outputs of a finished run for the test images, (N, classes) float32; None if its weights, or those of an
    ensemble's members in their mean, are not here.

    Raises:
        UserError: weights or images are not those of the run.
    """
    result = read_result(folder)
    if result["model"] is None:
        weights, mean = result["settings"].get("weights"), 0
        if weights is None:  # written into a recipe of one's own
            return None
        digests = result.get("source_digests") or [None] * len(weights)  # which older results lack
        for source, digest, weight in zip(result["sources"], digests, weights, strict=True):
            member = member_of(cfg, source, digest)
            if member is None or (probabilities := predict(cfg, member)) is None:
                return None
            mean = mean + probabilities.double() * (weight / sum(weights))
        return mean.float()
    file = next(filter(Path.is_file, (folder / name for name in files_for("model.safetensors", result))), None)
    if file is None:
        return None
    run = trained(cfg, folder)
    run.check_source(str(folder), file)
    model = run.load_model(file).to(run.device, memory_format=torch.channels_last)
    return run.predict(model, run.data.test_images)


def main(cfg: Config) -> int:
    """Verify as the settings say. Returns the exit status: 1 if a number is not what the weights say."""
    folders = run_folders(cfg.results_dir, "*")
    folders = [f for f in folders if cfg.protocol in (None, f.parts[-3]) and (not cfg.rows or f.parts[-2] in cfg.rows)]
    if not folders:
        raise UserError(f"no finished run in {cfg.results_dir}: check --results-dir, --protocol and --rows")
    wrong, finished = 0, {}
    for folder in folders:
        try:
            result = read_run(folder).result
            if result["protocol"] not in common.PROTOCOLS:
                raise UserError(f"{folder}: there is no protocol {result['protocol']} any more")
            finished[folder] = result["last"]
        except UserError as error:
            print(error)
            wrong += 1
    print(f"{'in result.json → found now':45}" + "".join(f"{title:>19}" for title in TITLES.values()))
    right, without = 0, 0
    for folder, said in finished.items():
        labels = trained(cfg, folder).data.test_labels.cpu()  # without the images there is nothing to go on with
        try:
            probabilities = predict(cfg, folder)
        except UserError as error:
            print(error)
            wrong += 1
            continue
        if probabilities is None:
            without += 1
            continue
        found = calibration_metrics(probabilities, labels).scores
        pairs = {metric: (said[metric], found[metric]) for metric in TITLES}
        holds = all(abs(a - b) <= TOLERANCE[metric] for metric, (a, b) in pairs.items())
        cells = (f"{number(metric, a)} → {number(metric, b)}" for metric, (a, b) in pairs.items())
        print(f"{'/'.join(folder.parts[-3:]):45}" + "".join(f"{c:>19}" for c in cells) + "  differs" * (not holds))
        right, wrong = right + holds, wrong + (not holds)
    more = f"; of {without} more the weights are not here" if without else ""
    print(f"{right} of {right + wrong} runs are what their weights say{more}")
    return int(wrong > 0)


if __name__ == "__main__":
    with orderly_end():
        cfg = parse(Config, __doc__)
        with device_errors("use --device cpu, or a machine with more"):
            sys.exit(main(cfg))
