"""Make a finished run of weights that were trained elsewhere, such as the original's or another project's teachers.

The row's recipe builds the network; where it would train it, the weights are read and evaluated on the test images.
Reports, ensembles, students and comparisons then take the folder for that of any other run: give them the same
--results-dir and --protocol. result.json and the table say that it was trained elsewhere.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
import tyro
from timm.task import TrainingTask
from torch import Tensor

import common
from command_line import device_errors, orderly_end, parse
from run_files import UserError, first_line, save_weights, sha256


@dataclass(kw_only=True)
class Config:
    row: tyro.conf.Positional[str]
    """row whose network it is, and whose folder it gets: one that trains without teachers, such as teacher_mixup"""
    weights: tyro.conf.Positional[Path]
    """file with them, safetensors or torch's: a state dict, or a checkpoint with one as `state_dict` or `model`"""
    protocol: Literal["paper", "short", "quick", "brief", "small", "cpu", "smoke"] = "paper"
    """the recipes' protocol that the training was like"""
    epochs: common.Count | None = None
    """number of epochs of the training, if not the protocol's; the run is then a variant"""
    seed: int = 0
    """tells several of one row apart"""
    dataset: Literal["cifar100", "digits", "folder"] | None = None
    """test images, if not the protocol's; the network's classes have to be in the order of their names"""
    data_dir: Path = Path("data")
    """where the images are; CIFAR-100 is downloaded there if missing"""
    image_size: int = 32
    """side to which the images of --dataset folder are resized"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes an NVIDIA GPU if torch sees one"""
    results_dir: Path = Path("adopted")
    """where the run's folder goes; one of its own keeps it apart from what recipes trained"""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: as for recipes"""
    overwrite: bool = False
    """replace a run that is there already"""


class AdoptedRun(common.Run):
    """A run whose recipe gets weights to evaluate where it would train."""

    def __init__(self, row: str, cfg: common.Config, weights: Path):
        super().__init__(row, cfg)
        self.weights, self.digest = weights, sha256(weights)

    def teacher(self, *rows: str) -> None:
        raise UserError(f"{self.row} learns from teachers, which weights do not name: adopt them as student_baseline")

    def ensemble(self, rows: Sequence[str], weights: Sequence[float]) -> None:
        raise UserError(f"{self.row} averages rows, and has no weights of its own: adopt its members")

    def fit(self, task: TrainingTask, augment: Callable) -> None:
        """Read the weights into the task's model, evaluate it, and write the run's folder."""
        model = task.trainable_module
        state = read_weights(self.weights)
        common.fill(model, state, self.model_name, self.weights)
        model.to(self.device, memory_format=torch.channels_last)
        with self._turn() as mine:
            if mine:
                predictions, test, _ = self._evaluate(model)
                if test["accuracy"] < 2 / self.num_classes:
                    print(
                        f"warning: only {test['accuracy']:.2%} of the test images are classified right: the classes "
                        "should be in the order of their names, and inputs normalised by CIFAR_MEAN and CIFAR_STD",
                        file=sys.stderr,
                    )
                save_weights(self.path / "model.safetensors", model.state_dict())
                self._save_half(model, predictions["probabilities"])
                choice = {"epoch": None, **predictions}
                adopted = {"adopted": {"file": self.weights.name, "sha256": self.digest}}
                with self._tracker() as tracker:
                    speed = {"train_seconds": 0.0, "images_per_second": None}
                    self._finish({"best": choice, "last": choice}, speed | adopted, tracker)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a file, as timm finds it, without the prefixes that wrappers put before its names.

    Raises:
        UserError: there is none, it is not finite, or among objects that only running the file's code would bring back.
    """
    try:
        state = timm.models.load_state_dict(str(file))
        finite = all(tensor.isfinite().all() for tensor in state.values())
    except OSError:
        raise
    except Exception as error:  # torch, pickle and safetensors have many kinds
        reason = first_line(error)[:120]
        text = f"{file} has no weights that can be read safely ({reason}): save its state_dict alone"
        raise UserError(text) from None
    if not finite:
        raise UserError(f"{file} has weights that are not finite: take those of an earlier epoch")
    return state


def main(cfg: Config) -> None:
    """Adopt as the settings say."""
    if not cfg.weights.is_file():
        raise UserError(f"{cfg.weights} is not a file with weights")
    recipe = common.load_recipe(cfg.row)
    shared = {field.name for field in dataclasses.fields(common.Config)} & vars(cfg).keys()
    row_cfg = common.config_type(recipe)(**{name: getattr(cfg, name) for name in shared})
    run = AdoptedRun(cfg.row, row_cfg, cfg.weights)
    result = None if cfg.overwrite else run.load_result()
    if result and result.get("adopted", {}).get("sha256") != run.digest:
        raise UserError(f"{run.path} is another run: --overwrite replaces it, another --seed or --results-dir does not")
    if result:
        print(f"{run.path} was finished before: --overwrite starts it over")
    print(common.summary(result or run.complete(recipe), run.path))


if __name__ == "__main__":
    with orderly_end():
        cfg = parse(Config, __doc__)
        with device_errors("use --device cpu, or a machine with more"):
            main(cfg)
