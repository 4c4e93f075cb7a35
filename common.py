"""What the recipes share. Read it top to bottom: recipes, run, facts, command line.

A recipe (`recipes/<row>.py`) says what is trained and on what objective. This module knows how: it puts the images on
the device, augments whole batches there, trains, evaluates after every epoch, and leaves a folder of results that the
same command resumes, reprints or builds upon.
"""

import bisect
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.task import LogitDistillationTask, TrainingTask
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cifar_models  # registers its models with timm
import data_parallel
from augmentation import AugMix, CutOut, Mix, Standard, normalize  # noqa: F401 recipes use common.Mix
from calibration import calibration_metrics, scores_of_run, write_reliability
from command_line import device_errors, orderly_end, parse
from consistency import errors_by_chance
from image_data import Dataset, load_dataset
from objectives import EnsembleDistillationTask, JsdTask, Reduction, Teacher  # noqa: F401 recipes use common.JsdTask
from run_files import (
    CHOICES,
    HALF,
    UserError,
    atomic_write,
    files_for,
    flag,
    flags,
    full_name,
    load_probabilities,
    load_weights,
    locked,
    read_bins,
    read_published,
    read_result,
    save_log_probabilities,
    save_weights,
    sha256,
    variant,
    write_csv,
)
from run_settings import (  # noqa: F401 recipes use common.Positive
    PROTOCOLS,
    BatchSize,
    Config,
    Count,
    EvenBatchSize,
    Fraction,
    NonNegative,
    Positive,
    Severity,
    TeacherName,
    TrainConfig,
    changes,
    identity,
    resolve,
    settings,
)
from teacher_outputs import EpochOutputs
from tracking import ARTIFACT, Tracker, fetch_artifact, in_sweep
from training import Trainer

ROOT = Path(__file__).resolve().parent
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "results"  # those that came with the code

# What later runs and reports build upon: `result.json` has the SHA-256 of each.
NEEDED_LATER = ("best.safetensors", "selected.safetensors", *HALF, *HALF.values())


# 1. Recipes ----------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """The rows in `recipes/`; a file whose name begins with `_` is what rows share."""
    return sorted(path.stem for path in RECIPES.glob("[!_]*.py"))


@functools.cache
def load_recipe(row: str) -> Callable:
    """The `main` of `recipes/<row>.py`."""
    known = recipe_names()
    if row not in known:  # not a path to elsewhere either: what it names would be run
        if Path(row).is_dir():
            raise UserError(f"{row} is not the folder of a finished run: it has no result.json (try its seed0)")
        near = difflib.get_close_matches(row, known, 1)
        all_of_them = f"it should be one of {', '.join(known)}, or a run's folder, or entity/project/name:v0"
        raise UserError(f"there is no recipe {row}: {f'did you mean {near[0]}?' if near else all_of_them}")
    path = RECIPES / f"{row}.py"
    if str(RECIPES) not in sys.path:  # where a recipe finds what it shares with others, as `recipes/_shared.py`
        sys.path.append(str(RECIPES))
    spec = importlib.util.spec_from_file_location(f"recipes.{row}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "main"):
        raise UserError(f"{path} has no main, which a row needs: what recipes share is called _{row}.py")
    return module.main


def config_type(main: Callable) -> type[Config]:
    """The settings a recipe's `main` takes.

    Raises:
        UserError: it does not say so, they lack `@dataclass` or a default, or two name a teacher.
    """
    config, file = typing.get_type_hints(main).get("cfg"), main.__code__.co_filename
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise UserError(f"{file}: main has to name its settings, as in main(cfg: common.TrainConfig, run: common.Run)")
    fields = dataclasses.fields(config)
    if missing := typing.get_type_hints(config).keys() - {field.name for field in fields}:
        raise UserError(f"{file}: {config.__name__} needs @dataclass(kw_only=True) to have a setting {min(missing)}")
    if bare := [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]:
        raise UserError(f"{file}: the setting {bare[0]} of {config.__name__} needs a default")
    if [*typing.get_type_hints(config, include_extras=True).values()].count(TeacherName) > 1:  # its alias is one flag's
        raise UserError(f"{file}: {config.__name__} takes one common.TeacherName: several go in a tuple, teachers")
    return config


def run_row(row: str, main: Callable, cfg: Config) -> dict[str, Any]:
    """Train or evaluate one row, unless it is finished. Returns what its `result.json` holds."""
    advice = (
        "try a smaller --batch-size or --image-size (each is a new run); with fewer runs at once, the same command "
        "resumes after the last finished epoch"
    )
    with device_errors(advice):
        run = Run(row, cfg, main)
        run.sweep = in_sweep()
        finished = None if cfg.overwrite else data_parallel.from_first(run.load_result)
        result = finished or run.complete(main)
    if finished:
        print(f"{run.path} was finished before: --overwrite starts it over")
        run.warn_of_edits(result)
        if run.sweep:
            run.report(result)
    return result


# 2. Run --------------------------------------------------------------------------------------------------


def seed_everything(seed: int, epoch: int) -> None:
    """Seed torch, numpy and random from the pair alone, so that an epoch is the same however the run came to it."""
    random_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


@functools.lru_cache(maxsize=1)
def _shared_dataset(
    name: str, data_dir: Path, image_size: int, train_size: int | None, val: tuple | None, device: torch.device
) -> Dataset:
    """What the runs of one process train on: read and moved to the device once. `val` is (size, seed)."""
    with data_parallel.one_after_all():
        dataset = load_dataset(name, data_dir, image_size)
    if val:
        dataset = dataset.hold_out(*val)
    if train_size and train_size > len(dataset.train_labels):
        left = f" with --val-size {val[0]}" if val else ""
        raise UserError(f"--train-size must be at most {len(dataset.train_labels)}{left}, not {train_size}")
    return (dataset.train_subset(train_size) if train_size else dataset).to(device)


def check_folders(cfg: Config) -> None:
    """Refuse a folder that is a file, and results inside the folder of the images."""
    for name in ("data_dir", "results_dir"):
        folder = getattr(cfg, name)
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"{flag(name)} {folder}: {existing} is a file, and not a folder")
    if cfg.dataset != "digits" and cfg.data_dir.resolve() in (cfg.results_dir / "_").resolve().parents:
        raise UserError(f"--results-dir {cfg.results_dir} must not be inside --data-dir {cfg.data_dir}")


class Run:
    """One row with one seed: what a recipe's `main` builds its experiment with.

    Attributes:
        cfg: the settings, resolved.
        recipe: the beginning of its file's SHA-256; None where a run is only asked for its files.
        path: the run's folder.
        device: where everything lives.
    """

    def __init__(self, row: str, cfg: Config, main: Callable | None = None):
        self.row, self.cfg = row, resolve(cfg)
        self.recipe = main and sha256(Path(main.__code__.co_filename))[:12]  # the commit does not tell of one's own
        self.changes = changes(self.cfg)
        self.path = cfg.results_dir / cfg.protocol / row / f"seed{cfg.seed}{variant(self.changes)}"
        check_folders(self.cfg)
        if cfg.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here: check nvidia-smi, or use --device cpu")
        self.device = data_parallel.join("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.model_name: str | None = None  # what is trained; an ensemble trains nothing
        self.sources: list[str] = []  # the teachers or members: folders, or artifacts in W&B
        self.source_digests: list[str] = []  # SHA-256 of their weights or predictions
        self.sweep = False  # whether it is the run that a W&B agent asked for, not one that is trained on its way
        self.needed = "result.json"  # the file for want of which it is trained
        self.wanted_by: list[Path] = []  # by which runs, that wait for it
        if data_parallel.size() > 1 and self.cfg.dataset == "folder":
            _ = self.data  # read by all processes now: later the first one may ask alone, and would wait for the others

    @functools.cached_property
    def data(self) -> Dataset:
        """The images, on the device."""
        cfg = self.cfg
        val = (cfg.val_size, cfg.seed) if cfg.val_size else None
        return _shared_dataset(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.train_size, val, self.device)

    @property
    def num_classes(self) -> int:
        """How many the dataset has."""
        return len(self.data.classes)

    # What a recipe calls ---------------------------------------------------------------------------------

    def create_model(self, name: str) -> nn.Module:
        """A fresh timm model for the dataset's classes; its initial weights depend on the seed alone."""
        if not timm.is_model(name):
            near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 4)) or "another of timm.list_models()"
            raise UserError(f"timm knows no model {name}: {near}? For a network of your own, add @register_model")
        seed_everything(self.cfg.seed, 0)
        self.model_name = name
        model = timm.create_model(name, num_classes=self.num_classes)
        if not hasattr(model, "pretrained_cfg"):  # one that timm did not build: its distillation asks for these
            model.pretrained_cfg = {"mean": cifar_models.CIFAR_MEAN, "std": cifar_models.CIFAR_STD}
        return model

    def teacher(self, *rows: str) -> Teacher:
        """The trained models of these rows, frozen, at their last epoch.

        A row that is not there yet is trained first, by its own recipe, under this run's protocol, seed and data.
        Instead of a row, the folder of a finished run will do, or one in W&B as entity/project/name:alias.

        Raises:
            UserError: no such row, or trained on other classes or images.
        """
        if not rows:
            raise UserError("--teachers takes one row or more")
        return Teacher(*(self.load_model(file) for file in self._files_of(rows, "model.safetensors")))

    def fit(self, task: TrainingTask, augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Train `task.trainable_module`, evaluating it after every epoch, and write the run's folder."""
        self._check_can_train()
        with self._turn() as mine:
            if mine:
                self._train(task, augment)

    def ensemble(self, rows: Sequence[str], weights: Sequence[float]) -> None:
        """Evaluate the weighted mean of the softmax outputs of finished rows: `best` of their best epochs, `last` of
        their last, `selected` of those. Members that are not there yet are trained first, as `teacher` does."""
        if len(rows) != len(weights):
            raise UserError(f"--weights takes as many numbers as there are --members: {len(rows)}, not {len(weights)}")
        if not rows:
            raise UserError("--members takes one row or more")
        if sum(weights) <= 0:
            raise UserError("--weights must not all be 0")
        members = self._files_of(rows, "probabilities.npz")
        with self._turn() as mine:
            if mine:
                self._average(members, weights)

    # Training --------------------------------------------------------------------------------------------

    def _check_can_train(self) -> None:
        if not isinstance(self.cfg, TrainConfig):
            raise UserError(f"{self.row} cannot train: its settings have to extend common.TrainConfig")
        n = len(self.data.train_labels)
        if n < 2:
            raise UserError(f"training takes 2 images or more, not {n}: raise --train-size or lower --val-size")
        if "batch_size" in self.changes and self.cfg.batch_size > n:
            raise UserError(f"--batch-size must be at most {n}, the number of training images")

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Lock the run's folder. Yields whether there is still something to do: another process may have finished the
        run while this one waited for the lock."""

        def something_to_do() -> bool:
            if self.cfg.overwrite and self.path.exists():
                try:
                    if not self.path.is_symlink():  # which rmtree refuses
                        checkpoint.remove(self.path)  # both first, so that what a kill leaves does not pass for a run
                        (self.path / "result.json").unlink(missing_ok=True)
                    shutil.rmtree(self.path)
                except OSError as error:
                    reason = error if error.errno else error.args[0]  # Python 3.13 spoils the text of a link's error
                    raise UserError(f"{self.path} cannot be deleted (--overwrite): {reason}") from None
            return self.load_result() is None or not (self.path / self.needed).is_file()

        first = data_parallel.rank() == 0  # it holds the folder for all processes of a data-parallel run
        with locked(self.path) if first else nullcontext():
            yield data_parallel.from_first(something_to_do)
            if first:
                checkpoint.remove(self.path)
        data_parallel.barrier()

    def _train(self, task: TrainingTask, augment: Callable) -> None:
        cfg, trainer, n = self.cfg, self.trainer(task), len(self.data.train_labels)
        state = self._resume(trainer)
        tracker = self._tracker()
        predictions = None
        if trainer.compile != "off":
            print("compiling the models before the first step: minutes, but only the first time on this machine")
        if state["history"]:
            print(f"resuming after epoch {len(state['history'])} of {cfg.epochs}")
        done, hidden = len(state["history"]), data_parallel.rank() > 0 or None
        bar = tqdm(total=cfg.epochs * n, initial=done * n, unit="img", unit_scale=True, disable=hidden)
        with tracker:
            with bar:
                for epoch in range(done + 1, cfg.epochs + 1):
                    predictions = self._epoch(trainer, augment, epoch, state, bar, tracker)
            if predictions is None:  # killed between the last epoch and its result
                predictions, _, _ = self._evaluate(trainer.model)
                tracker.log(state["history"])
            self._write(trainer, state, predictions, tracker)

    def _resume(self, trainer: Trainer) -> dict[str, Any]:
        """What the last checkpoint holds, its weights and momenta put in place; or a fresh start."""
        origin = {**self._versions(), "hardware": hardware(self.device)}
        state = data_parallel.from_first(lambda: checkpoint.load(self.path))
        if state is None:
            about = {"settings": settings(self.cfg), "fingerprint": self.data.fingerprint, "origins": [origin]}
            return {**about, "source_digests": self.source_digests, "history": [], "train_seconds": 0.0}
        digests = state.setdefault("source_digests")  # None in checkpoints from before they were kept
        self._check_identity(state["settings"], state["fingerprint"], self.data.fingerprint, digests)
        shapes = [{k: v.shape for k, v in w.items()} for w in (state["model"], trainer.model.state_dict())]
        if shapes[0] != shapes[1]:
            raise UserError(f"{self.path} was begun with another network: start {self.row} over with --overwrite")
        trainer.restore(state.pop("model"), state.pop("momentum"))
        if changed := [f"{k} {v}, now {origin[k]}" for k, v in state["origins"][-1].items() if v != origin[k]]:
            print(f"warning: {self.path} was begun with {'; '.join(changed)}: result.json names both", file=sys.stderr)
            state["origins"].append(origin)
        return state

    def trainer(self, task: TrainingTask) -> Trainer:
        """The task with its optimiser, on the device, compiled where that pays over the whole run."""
        names = ("lr", "momentum", "weight_decay", "compile", "precision", "deterministic")
        images = self.cfg.epochs * len(self.data.train_labels)
        return Trainer(task, self.device, images, **{name: getattr(self.cfg, name) for name in names})

    def _epoch(
        self, trainer: Trainer, augment: Callable, epoch: int, state: dict[str, Any], bar: tqdm, tracker: Tracker
    ) -> dict[str, Tensor]:
        """Train for one epoch, evaluate, and put both into `state` and the checkpoint. Returns the predictions."""
        cfg, started = self.cfg, time.perf_counter()
        lr = cfg.lr / 10 ** bisect.bisect_left(cfg.milestones, epoch)
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        bar.set_description(f"epoch {epoch}/{cfg.epochs}")
        losses = self.train_epoch(trainer, augment, epoch, bar)
        trained = time.perf_counter()
        predictions, test, val = self._evaluate(trainer.model)
        for name, scores in {"best": test, "selected": val}.items():
            if scores and (name not in state or scores["accuracy"] > state[name]["accuracy"]):
                weights = {k: v.cpu().clone() for k, v in trainer.model.state_dict().items()}
                state[name] = {"epoch": epoch, "accuracy": scores["accuracy"], "model": weights, **predictions}
        columns = {**test, **{f"val_{k}": v for k, v in val.items()}}
        columns |= {"seconds": time.perf_counter() - started}
        state["history"].append({"epoch": epoch, "lr": lr, **losses, **columns})
        state["train_seconds"] += trained - started
        if data_parallel.rank() == 0:
            checkpoint.save(self.path, {**state, "model": trainer.model.state_dict(), "momentum": trainer.momentum()})
            write_csv(self.path / "history.csv", state["history"])
        speed = len(self.data.train_labels) / (trained - started)
        bar.write(
            f"epoch {epoch:3d}/{cfg.epochs}  lr {lr:<7.2g} loss {losses['train_loss']:<8.4g} "
            f"accuracy {test['accuracy']:6.2%}  ECE {test['ece']:.4f}  OE {test['oe']:.4f}  {speed:,.0f} images/s"
        )
        tracker.log(state["history"], speed, predictions["probabilities"], self.data.test_labels)
        return predictions

    def train_epoch(self, trainer: Trainer, augment: Callable, epoch: int, bar: tqdm) -> dict[str, float]:
        """One pass over the training images in random order; returns the means of `train_loss` and its parts."""
        seed_everything(self.cfg.seed, epoch)
        trainer.task.train()
        images, labels = self.data.train_images, self.data.train_labels
        batches = torch.randperm(len(labels)).to(self.device).split(self.cfg.batch_size)
        if len(batches[-1]) == 1:  # batch norm and mixing need two
            batches = batches[:-1]
        outputs = self._share_outputs(trainer, augment, epoch, sum(map(len, batches)))
        losses, parts = torch.zeros(len(batches), device=self.device), {}
        started = time.perf_counter()
        for step, index in enumerate(batches, 1):
            batch = augment(images[index], labels[index])
            with torch.random.fork_rng(devices=()):  # dropout is not to change the views to come, which others share
                losses[step - 1] = loss = trainer.step(*batch)
            for name, value in trainer.parts.items():
                parts[name] = parts.get(name, 0) + value * len(index)
            bar.update(len(index))
            if self.device.type == "cpu":  # on a GPU, reading the loss would stall it
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if not math.isfinite(loss):
                    break
                hours = (time.perf_counter() - started) / step * len(batches) * self.cfg.epochs / 3600
                if epoch == 1 and step == 5 and hours > 1:
                    bar.write(f"{self.row} will take about {hours:,.1f} h on this CPU; --protocol smoke takes minutes")
        data_parallel.average_batch_norm(trainer.model)
        losses = losses.cpu()
        self._check_finite(trainer, losses, epoch)
        try:
            for of_teacher in outputs:
                of_teacher.save()
        except OSError as error:  # it would have saved time, no more
            print(f"warning: teachers' outputs are not shared: {error}", file=sys.stderr)
        sizes = torch.tensor([len(index) for index in batches])
        means = {name: value.item() / sizes.sum().item() for name, value in parts.items()}
        return {"train_loss": float(losses @ sizes.float() / sizes.sum()), **means}

    def _share_outputs(self, trainer: Trainer, augment: Callable, epoch: int, images: int) -> list[EpochOutputs]:
        """With --share-teachers, have the task's teachers read this epoch's logits from files, or record them there.
        None are shared for an augmentation or a task of one's own, nor by one run on several GPUs."""
        cfg, task = self.cfg, trainer.task
        if not cfg.share_teachers or type(augment) is not Standard or data_parallel.size() > 1:
            return []
        if type(task) not in (LogitDistillationTask, EnsembleDistillationTask):  # others may ask a teacher otherwise
            return []
        if not isinstance(task.teacher, Teacher) or len(task.teacher.model) != len(self.sources):
            return []
        views = [self.data.fingerprint, cfg.seed, cfg.batch_size, vars(augment)]
        how = [hardware(self.device), torch.__version__, trainer.precision, trainer.compile, cfg.deterministic]
        names = [json.dumps([digest, *views, *how]) for digest in self.source_digests]
        shared = cfg.results_dir / "teacher_outputs"
        folders = [shared / hashlib.sha256(name.encode()).hexdigest()[:16] for name in names]
        outputs = [EpochOutputs(folder / f"epoch{epoch:03}.npz", images, self.device) for folder in folders]
        task.teacher.outputs = outputs
        return outputs

    @staticmethod
    def _check_finite(trainer: Trainer, losses: Tensor, epoch: int) -> None:
        """Refuse to go on from an epoch with a loss, or with weights, that are not finite. `losses` are on the CPU."""
        finite = losses.isfinite()
        if not finite.all():
            step = int(finite.int().argmin()) + 1  # the first one
            what = f"the loss is {losses[step - 1].item()}"
        elif not trainer.is_finite():
            step, what = len(losses), "the weights are no longer finite"
        else:
            return
        lr = trainer.optimizer.param_groups[0]["lr"]
        good = f" (a new run); the checkpoint of epoch {epoch - 1} is still good" if epoch > 1 else ""
        raise UserError(f"{what} at step {step} of epoch {epoch}, at learning rate {lr:g}: try a smaller --lr{good}")

    def _evaluate(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
        """Predictions, the scores of those for the test images and, with --val-size, for the held-out ones."""
        data, predictions, val = self.data, {"probabilities": self.predict(model, self.data.test_images)}, {}
        if self.cfg.val_size:
            predictions["val_probabilities"] = self.predict(model, data.val_images)
        if not all(probabilities.isfinite().all() for probabilities in predictions.values()):
            raise UserError("the model's outputs are no longer finite: try a smaller --lr")
        test = calibration_metrics(predictions["probabilities"], data.test_labels).scores
        if self.cfg.val_size:
            val = calibration_metrics(predictions["val_probabilities"], data.val_labels).scores
        return predictions, test, val

    @torch.inference_mode()
    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Softmax outputs for uint8 (N, 3, H, W) images: float32 (N, classes), on the CPU."""
        model.eval()
        batch_size = 500 if self.device.type == "cuda" else 100  # 500 are no faster on a CPU
        batches = (normalize(batch) for batch in data_parallel.shard(images.split(batch_size)))
        logits = [model(batch.contiguous(memory_format=torch.channels_last)).float() for batch in batches]
        own = torch.cat(logits).softmax(1).cpu().split(batch_size) if logits else ()
        return torch.cat(data_parallel.gather(own))

    def _write(self, trainer: Trainer, state: dict[str, Any], predictions: dict[str, Tensor], tracker: Tracker) -> None:
        """What a trained run leaves: history, weights and, at last, its result. `predictions` are the last epoch's."""
        cfg, first = self.cfg, data_parallel.rank() == 0  # which writes
        if first:
            write_csv(self.path / "history.csv", state["history"])
            save_weights(self.path / "model.safetensors", trainer.model.state_dict())
        self._save_half(trainer.model, predictions["probabilities"])
        if not first:
            return
        choices = {"best": state["best"], "last": {"epoch": cfg.epochs, **predictions}}
        if cfg.val_size:
            choices["selected"] = state["selected"]
            save_weights(self.path / "selected.safetensors", state["selected"]["model"])
        save_weights(self.path / "best.safetensors", state["best"]["model"])
        images, seconds = len(self.data.train_labels) * cfg.epochs, state["train_seconds"]
        speed = {"train_seconds": seconds, "images_per_second": images / seconds}
        speed |= {"compile": trainer.compile, "precision": trainer.precision, "processes": data_parallel.size()}
        self._finish(choices, speed, tracker, state["origins"][:-1])

    def _save_half(self, model: nn.Module, probabilities: Tensor) -> None:
        """Weights in half precision, small enough to publish; the model is left with them. Not where they would change
        the test accuracy by 0.05 points or more, or are beyond its 65,504, as a channel's variance may be."""
        weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.load_state_dict(weights)
        predictions = (p.argmax(1) for p in (probabilities, self.predict(model, self.data.test_images)))
        labels = self.data.test_labels.cpu()
        accuracies = [(p == labels).double().mean().item() for p in predictions]
        file = self.path / HALF["model.safetensors"]
        if data_parallel.rank() == 0:
            file.unlink(missing_ok=True)
            finite = all(v.isfinite().all() for v in weights.values())
            if finite and abs(accuracies[1] - accuracies[0]) < 0.0005:
                save_weights(file, weights)

    # An ensemble -----------------------------------------------------------------------------------------

    def _average(self, members: Sequence[Path], weights: Sequence[float]) -> None:
        mean, names = {}, (*CHOICES, "val") if self.cfg.val_size else CHOICES[:2]
        for file, weight in zip(members, weights, strict=True):
            arrays = self._predictions(file, names)
            for key in names:
                mean[key] = mean.get(key, 0) + arrays[key].astype(np.float64) * (weight / sum(weights))
        mean = {key: torch.from_numpy(value).float() for key, value in mean.items()}
        choices = {key: {"epoch": None, "probabilities": mean[key]} for key in names if key != "val"}
        if self.cfg.val_size:
            choices["selected"]["val_probabilities"] = mean["val"]
        speed = {"train_seconds": 0.0, "images_per_second": None}
        if data_parallel.rank() == 0:
            with self._tracker() as tracker:
                self._finish(choices, speed, tracker)

    def _predictions(self, file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
        """A finished run's predictions of these names: what was not published its weights predict again."""
        arrays = load_probabilities(file) if file.suffix == ".npz" else {}
        result = read_result(file.parent)
        if arrays and result["best"].get("epoch") == result["last"].get("epoch"):
            arrays.setdefault("last", arrays["best"])
        if not arrays.keys() >= set(names):
            weights = file.with_name(HALF["model.safetensors"]) if arrays else file
            self.check_source(str(file.parent), weights)
            print(f"{file.parent} lacks predictions: making them again with {weights.name}")
            model = self.load_model(weights).to(self.device, memory_format=torch.channels_last)
            made = dict.fromkeys(CHOICES, self.predict(model, self.data.test_images).numpy())
            if self.cfg.val_size and "val" not in arrays:
                made["val"] = self.predict(model, self.data.val_images).numpy()
            arrays = {**made, **arrays}
        return arrays

    # The result ------------------------------------------------------------------------------------------

    def _finish(
        self, choices: dict[str, dict[str, Any]], speed: dict[str, Any], tracker: Tracker, earlier: Sequence[dict] = ()
    ) -> None:
        """Write probabilities, diagram and, once all else is there, `result.json`.

        `choices` are the epochs that are reported: `best` on the test images, as published, `last` and, with
        --val-size, `selected`. Each has `epoch` and `probabilities`, the last one `val_probabilities` too. `earlier`
        are versions and hardware of the run before it was resumed with others.
        """
        arrays = {name: choice["probabilities"] for name, choice in choices.items()}
        arrays["labels"] = self.data.test_labels
        if "selected" in choices:
            arrays["val"], arrays["val_labels"] = choices["selected"]["val_probabilities"], self.data.val_labels
        arrays = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}  # labels are on the device
        scores = scores_of_run(arrays)
        if unfitted := [name for name in scores if 1.0 in scores[name]["temperatures"]]:
            print(
                f"warning: the `scaled` metrics of {', '.join(unfitted)} are at temperature 1: it cannot be fitted "
                "where every image is classified right, or hardly more images than by chance",
                file=sys.stderr,
            )
        metrics = calibration_metrics(arrays["best"], arrays["labels"])
        with atomic_write(self.path / "probabilities.npz") as file:
            np.savez(file, **arrays)  # compressed, a collapsed model's would look like a zip bomb to their reader
        save_log_probabilities(self.path, arrays)
        write_reliability(self.path, metrics, full_name(self.row, self.changes), choices["best"]["epoch"])
        result = {
            "row": self.row,
            "protocol": self.cfg.protocol,
            "seed": self.cfg.seed,
            "dataset": self.cfg.dataset,
            "model": self.model_name,
            "sources": self.sources,
            "source_digests": self.source_digests,
            "changes": self.changes,
            **{name: {"epoch": choice["epoch"], **scores[name]} for name, choice in choices.items()},
            "published": published(self.row, self.changes),
            **speed,
            "hardware": hardware(self.device),
            "versions": self._versions(),
            "earlier_versions": list(earlier),
            "files": {name: sha256(self.path / name) for name in NEEDED_LATER if (self.path / name).is_file()},
            "settings": settings(self.cfg),
            "classes": list(self.data.classes),
            "fingerprint": self.data.fingerprint,
        }
        with atomic_write(self.path / "result.json") as file:
            file.write(json.dumps(result, indent=2).encode())
        images = self.data.test_images if self.cfg.wandb_thumbnails else None
        tracker.finish(result, self.data.classes, images)

    def load_result(self, path: Path | None = None) -> dict[str, Any] | None:
        """What `result.json` holds, in this run's folder or in another one of the same run. None if the run is not
        finished; while there is a checkpoint, it is being trained again.

        Raises:
            UserError: the result is damaged, or was made with other settings or images.
        """
        path = path or self.path
        if not (path / "result.json").is_file() or (path / checkpoint.NAMES[0]).is_file():
            return None
        result = read_result(path)
        fingerprint = self.data.fingerprint if self.cfg.dataset == "folder" else result["fingerprint"]
        self._check_identity(result["settings"], result["fingerprint"], fingerprint)
        return result

    def _check_identity(
        self, other: dict[str, Any], other_fingerprint: str, fingerprint: str, digests: list[str] | None = None
    ) -> None:
        differ = [f"{k} {other[k]}, now {v}" for k, v in identity(self.cfg).items() if other.get(k, v) != v]
        if other_fingerprint != fingerprint:
            differ.append("other images")
        if digests not in (None, self.source_digests):
            differ.append(f"other weights than are now in {', '.join(self.sources)}")
        if differ:
            raise UserError(
                f"{self.path} was made with {'; '.join(differ)}: start {self.row} over with --overwrite, or choose "
                "another --results-dir"
            )

    # Runs that this one builds upon ----------------------------------------------------------------------

    def _files_of(self, rows: Sequence[str], needed: str) -> list[Path]:
        """The file `needed` of each of these rows, or one that serves for it. Rows are trained if need be; instead of a
        row, the folder of a finished run or an artifact will do."""
        for row in rows:  # a wrong name is found before any row is trained
            if not ARTIFACT.fullmatch(row) and not (Path(row) / "result.json").is_file():
                trains = issubclass(config_type(load_recipe(row)), TrainConfig)
                if needed == "model.safetensors" and not trains:
                    raise UserError(f"{row} has no model that could teach (it averages rows): name a row that trains")
        if needed == "model.safetensors":  # for a student
            self._check_can_train()
        files = []
        for row in rows:
            file = self._file_of(row, needed)
            source = row if ARTIFACT.fullmatch(row) else str(file.parent)
            self.source_digests.append(self.check_source(source, file))
            self.sources.append(source)
            files.append(file)
        return files

    def _file_of(self, row: str, needed: str) -> Path:
        """`_files_of` for one row, not checked yet."""
        artifact = ARTIFACT.fullmatch(row)
        folder = fetch_artifact(row, self.cfg.results_dir / "artifacts") if artifact else Path(row)
        if artifact or (folder / "result.json").is_file():
            files = [folder / name for name in files_for(needed, read_result(folder))]
            return next(filter(Path.is_file, files), files[0])
        main = load_recipe(row)
        handed_on = {field.name: getattr(self.cfg, field.name) for field in dataclasses.fields(Config)}
        run = Run(row, config_type(main)(**{**handed_on, "overwrite": False}), main)
        if file := data_parallel.from_first(lambda: run.find(needed)):
            run.warn_of_edits(read_result(file.parent))
            if file.parent != run.path:
                print(f"{self.row} takes {row} from {file.parent} (--teacher-from train trains it)")
            return file
        run.wanted_by = [*self.wanted_by, self.path]
        if run.path in run.wanted_by:
            raise UserError(f"{row} needs itself: name another teacher or member")
        print(f"{self.row} needs {row}, which is not in {run.path} yet: training it first")
        run.needed = needed
        run.complete(main)  # not run_row: a result whose files are gone stays until the new one is whole
        print(f"{row} is finished: back to {self.row}")
        return run.path / needed

    def complete(self, main: Callable) -> dict[str, Any]:
        """Run the recipe. Returns the result that it leaves.

        Raises:
            UserError: it left no result.
        """
        main(self.cfg, self)
        result = data_parallel.from_first(self.load_result)
        if result is None:
            file = main.__code__.co_filename
            raise UserError(f"{file}: main ended without a result: it has to call run.fit, or run.ensemble")
        return result

    def find(self, needed: str) -> Path | None:
        """The file of this run that another run needs, or one that serves for it: from its own folder, else from the
        results that came with the code. None if the run has to be trained first."""
        own = self.load_result()
        files = [self.path / name for name in files_for(needed, own)] if own else []
        elsewhere = RESULTS / self.path.relative_to(self.cfg.results_dir)
        with suppress(UserError):  # published with settings or images that are not this run's
            if theirs := self.load_result(elsewhere):
                files += [elsewhere / name for name in files_for(needed, theirs)]
        if self.cfg.teacher_from == "train":
            files = [file for file in files if file.name == needed]
        return next(filter(Path.is_file, files), None)

    def check_source(self, source: str, file: Path) -> str:
        """Refuse a finished run's file that is missing or damaged, or was trained on other classes or images. Returns
        its SHA-256."""
        result = read_result(file.parent)
        if not file.is_file():
            raise UserError(f"{source} has a result.json but no {file.name}: name another run, or a row to train")
        if result["classes"] != list(self.data.classes):
            new = [name for name in self.data.classes if name not in result["classes"]]
            raise UserError(
                f"{source} knows {len(result['classes'])} classes, not the {self.num_classes} of {self.cfg.dataset}: "
                + (f"it has never seen {', '.join(new[:5])}" if new else "it has more")
            )
        if result["fingerprint"] != self.data.fingerprint:
            names = ("dataset", "image_size", "train_size", "val_size", *["seed"] * bool(self.cfg.val_size))
            theirs, ours = result["settings"], vars(self.cfg)
            differ = [f"{flag(k)} {theirs.get(k)}, not {ours[k]}" for k in names if theirs.get(k) != ours[k]]
            raise UserError(
                f"{source} was trained on other images than {self.row} is ({'; '.join(differ) or 'other files'}): name "
                "another run, or a row to train"
            )
        digest = sha256(file)
        if digest != result["files"].get(file.name):
            raise UserError(
                f"{file} is damaged: its SHA-256 is not that in result.json; delete it, and if {result['row']} is "
                "named as a row, --teacher-from train trains it again"
            )
        return digest

    def warn_of_edits(self, result: dict[str, Any]) -> None:
        """Say so where a finished run was made by other lines than its recipe has now, or of other weights than its
        teachers or members have."""
        recipe = result.get("versions", {}).get("recipe")
        if recipe not in (None, self.recipe):
            print(
                f"warning: the recipe of {self.row} was edited since this was made: start {self.row} over with "
                "--overwrite, if the edit changes the training",
                file=sys.stderr,
            )
        for source, digest in zip(result["sources"], result.get("source_digests") or [], strict=False):
            with suppress(OSError, UserError):  # one that is not here, as an artifact, cannot be asked
                if digest not in read_result(Path(source))["files"].values():
                    print(
                        f"warning: {source} has changed since {self.row} was made from it: start {self.row} over with "
                        "--overwrite",
                        file=sys.stderr,
                    )

    def load_model(self, file: Path) -> nn.Module:
        """The model of a finished run with these weights of it, on this run's device.

        Raises:
            UserError: the weights are damaged, or not the model's.
        """
        result = read_result(file.parent)
        name = result["model"]
        with suppress(UserError):
            load_recipe(result["row"])  # which may register it, under a name of timm's too
        if not name or not timm.is_model(name):
            raise UserError(
                f"{file.parent} is of a model that timm does not know here: {str(name)[:100]}; put its file in recipes/"
            )
        model = timm.create_model(name, num_classes=self.num_classes)
        fill(model, load_weights(file), name, file)
        return model

    # Weights & Biases ------------------------------------------------------------------------------------

    def _tracker(self) -> Tracker:
        cfg, all_seeds = self.cfg, f"{self.row}-{self.cfg.protocol}"
        kind = "teacher" if self.row.startswith("teacher") else "student"
        facts = {"row": self.row, "model": self.model_name, "sources": self.sources}
        facts |= {"published": published(self.row, self.changes), "versions": self._versions()}
        return Tracker(
            self.path,
            mode=cfg.wandb_mode,
            project=cfg.wandb_project,
            sweep=self.sweep,
            epochs=cfg.epochs,
            charts=cfg.wandb_charts,
            sources=self.sources,
            group=f"{all_seeds}{variant(self.changes)} {flags(self.changes)}"[:128].strip(),  # W&B takes no more
            job_type="ensemble" if not self.model_name else "kd" if self.sources else kind,
            name=f"{all_seeds}-s{cfg.seed} {flags(self.changes)}"[:128].strip(),
            tags=[cfg.protocol, cfg.dataset, *filter(None, os.environ.get("WANDB_TAGS", "").split(","))],
            config={**settings(cfg), **facts},
        )

    def report(self, result: dict[str, Any]) -> None:
        """Tell W&B of a run that is finished already, for a sweep that asked for it."""
        self.model_name, self.sources = result["model"], result["sources"]
        self._tracker().report(result)

    def _versions(self) -> dict[str, str | None]:
        return {**versions(), "recipe": self.recipe}


def fill(model: nn.Module, state: dict[str, Tensor], name: str, file: Path) -> None:
    """Put the weights of a file into the model of that name.

    Raises:
        UserError: they are not this model's.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"{file} does not fit {name}: {' '.join(lines[1:] or lines)[:200]}") from None


# 3. Facts about a run ------------------------------------------------------------------------------------


def published(row: str, changes: dict[str, Any]) -> dict[str, float | None] | None:
    """The published numbers of a row, from `results/published.csv`; those of its variant where it has some."""
    lines = {json.dumps(line["changes"]): line for line in read_published() if line["row"] == row}
    line = next((line for line in lines.values() if line["changes"] == changes), lines.get("{}"))
    return line and {name: line[name] for name in ("accuracy", "ece", "oe", "best_epoch")}


def hardware(device: torch.device) -> str:
    """The name of what the run was computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    n = torch.get_num_threads()
    return f"{model[1] if model else platform.processor() or platform.machine()}, {n} thread{'s' * (n > 1)}"


@functools.cache  # the process goes on with the code that it began with, whatever is committed meanwhile
def versions() -> dict[str, str | None]:
    """What the numbers depend on: interpreter, libraries, and the commit (`+` where files but results differ from it).
    Where the code is no repository, as in a copy on another machine, GIT_COMMIT may say which commit it is."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), "--git-dir", ".git", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        if commit and git("status", "--porcelain", "--untracked-files=no", ":(exclude,glob)results/*/**"):
            commit += "+"
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    commit = commit or os.environ.get("GIT_COMMIT")
    libraries = {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__}
    return {"python": platform.python_version(), **libraries, "cuda": torch.version.cuda, "commit": commit}


# 4. Command line -----------------------------------------------------------------------------------------


def cli(main: Callable[[Config, Run], None]) -> None:
    """Run a recipe's `main` as the row its file is named for, with settings from the command line."""
    row = Path(main.__code__.co_filename).stem
    with orderly_end(": the same command goes on after the last finished epoch (without --overwrite)"):
        cfg = parse(config_type(main), main.__globals__["__doc__"])
        print(summary(run_row(row, main, cfg), Run(row, cfg).path))
    data_parallel.leave()


def _published_label(result: dict[str, Any]) -> str:
    """`published`, and what the numbers are of where that is not what was run."""
    borrowed = result["changes"] and result["published"] == published(result["row"], {})  # a variant without its own
    training = "CIFAR-100" if result["dataset"] != "cifar100" else "500 epochs" if result["protocol"] != "paper" else ""
    return ", ".join(filter(None, ["published for the row" if borrowed else "published", training]))


def summary(result: dict[str, Any], path: Path) -> str:
    """The row as people read it: accuracy in percent, published and ours, the errors that a perfectly calibrated model
    would have by chance, and where the files are."""
    run = full_name(result["row"], result["changes"])
    lines = [f"{run}, protocol {result['protocol']}, seed {result['seed']}, {result['dataset']}"]
    lines.append(f"{'':34}{'accuracy':>10}{'ECE':>9}{'OE':>9}")
    for name in ("published", *CHOICES):
        numbers = result.get(name)
        if numbers and (name, result["dataset"]) != ("published", "folder"):
            label = _published_label(result) if name == "published" else name
            epoch = numbers.get("best_epoch" if label == "published" else "epoch")
            label += f" (epoch {epoch:.0f})" if epoch else ""
            lines.append(f"{label:34}{numbers['accuracy']:>9.2%} {numbers['ece']:>9.4f}{numbers['oe']:>9.4f}")
    if (file := path / "reliability.csv").is_file():
        bins = read_bins(file)
        by_chance = errors_by_chance(*([b[name] for b in bins] for name in ("count", "confidence")))
        for label, (ece, oe) in zip(("calibrated, by chance", "  ± between test sets"), by_chance.T, strict=True):
            lines.append(f"{label:44}{ece:>9.4f}{oe:>9.4f}")
    return "\n".join([*lines, f"result   {path / 'result.json'}", f"diagram  {path / 'reliability.png'}"])
