"""Protocols and settings: what there is to set, within which bounds, and what makes a run another run."""

import dataclasses
import json
import math
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from run_files import UserError, flag

Compile = Literal["auto", "off", "default", "reduce-overhead", "max-autotune-no-cudagraphs"]
Precision = Literal["auto", "fp32", "bf16"]


class Protocol(typing.NamedTuple):
    epochs: int
    milestones: tuple[int, ...]
    """epochs after which the learning rate is divided by 10"""
    dataset: str
    train_size: int | None = None
    precision: Precision = "auto"


PROTOCOLS = {
    "paper": Protocol(500, (150, 180, 210), "cifar100"),
    "short": Protocol(240, (150, 180, 210), "cifar100"),
    "quick": Protocol(30, (19, 23, 27), "cifar100"),
    "brief": Protocol(8, (5, 7), "cifar100", precision="bf16"),
    "small": Protocol(40, (25, 30, 35), "cifar100", train_size=5000, precision="bf16"),
    "cpu": Protocol(5, (4,), "cifar100", train_size=5000),
    "smoke": Protocol(4, (3,), "digits"),
}

# A type's bound, in words and as a test; `resolve` holds every setting to it.
Positive = typing.Annotated[float, "greater than 0 and below 1e6", lambda v: 0 < v < 1e6]
Momentum = typing.Annotated[float, "0 or more and below 1", lambda v: 0 <= v < 1]
NonNegative = typing.Annotated[float, "0 or more and below 1e6", lambda v: 0 <= v < 1e6]
Count = typing.Annotated[int, "1 or more", lambda v: v >= 1]
Seed = typing.Annotated[int, "0 or more", lambda v: v >= 0]
BatchSize = typing.Annotated[int, "2 or more", lambda v: v >= 2]  # batch norm needs two
EvenBatchSize = typing.Annotated[int, "even and 2 or more", lambda v: v >= 2 and v % 2 == 0]  # mixing pairs images
Fraction = typing.Annotated[float, "above 0 and at most 1", lambda v: 0 < v <= 1]
Severity = typing.Annotated[float, "from 0.1 to 10", lambda v: 0.1 <= v <= 10]
Pixels = typing.Annotated[int, "from 16 to 1024", lambda v: 16 <= v <= 1024]
ProjectName = typing.Annotated[
    str, "a name without any of /\\#?%: (an entity goes into WANDB_ENTITY)", lambda v: not {*v} & {*"/\\#?%:"}
]
TeacherName = typing.Annotated[str, tyro.conf.arg(aliases=("--teacher-artifact",))]


@dataclass(kw_only=True)
class Config:
    """Settings that a row hands on to the rows it builds upon."""

    protocol: Literal["paper", "short", "quick", "brief", "small", "cpu", "smoke"] = "paper"
    """how long to train, in epochs: paper 500, short 240, quick 30; brief 8, and small 40 on a tenth of the images,
    both in bf16, for CPUs with AVX512-BF16; cpu 5 on a tenth; smoke 4 on the bundled digits"""
    epochs: Count | None = None
    """number of epochs, if not the protocol's; its milestones then move in proportion"""
    milestones: tuple[Count, ...] | None = None
    """epochs after which the learning rate is divided by 10, if not the protocol's; without a number, never"""
    seed: Seed = 0
    """decides the initial weights, the order of the images and every augmentation"""
    dataset: Literal["cifar100", "digits", "folder"] | None = None
    """images to train on, if not the protocol's; folder is {train,test}/<class>/<image> in --data-dir"""
    data_dir: Path = Path("data")
    """where the images are; CIFAR-100 is downloaded there if missing"""
    image_size: Pixels = 32
    """side to which the images of --dataset folder are resized"""
    train_size: Count | None = None
    """number of training images, if not the protocol's: drawn at random, evenly over the classes; the same for every
    seed, except with --val-size, where each seed holds out different images"""
    val_size: Count | None = None
    """number of training images to hold out; the epoch `selected` and its temperature are chosen on them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes an NVIDIA GPU if torch sees one"""
    results_dir: Path = Path("results")
    """where run folders go: <protocol>/<row>/seed<k>, or seed<k>-<hash> for settings that are not the row's own"""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto obeys WANDB_MODE; without it, online if a key is configured, else offline"""
    precision: Precision | None = None
    """precision of the models in training: bf16 for brief and small, else auto, which is bf16 on a GPU that has it and
    fp32 elsewhere; losses and evaluation are always fp32, with TF32 convolutions on a GPU"""
    deterministic: bool = False
    """make a GPU give the same bits every time, as a CPU does; slower"""
    teacher_from: Literal["results", "train"] = "results"
    """how to get a teacher or member that is not trained yet: results takes the repository's half-precision files, or
    runs its recipe if none fit; train always runs its recipe"""
    share_teachers: bool = False
    """save the teachers' logits in <results-dir>/teacher_outputs/ for all students with the same seed and batch size:
    saves time, gives the same bits (on a GPU with --deterministic), takes 20 MB per epoch and teacher on CIFAR-100.
    Used only with the standard augmentation, the table's distillation tasks and one process"""
    wandb_project: ProjectName | None = None
    """Weights & Biases project, if not WANDB_PROJECT or calibrated-distillation; the entity is WANDB_ENTITY"""
    wandb_charts: Count = 10
    """number of epochs, evenly spaced up to the last, at which calibration curves are logged"""
    wandb_thumbnails: bool = False
    """log pictures of the 64 test images that are most confidently misclassified"""
    overwrite: bool = False
    """start this row over, even if it is finished"""


@dataclass(kw_only=True)
class TrainConfig(Config):
    """Settings of a row that trains. The optimiser is SGD, with weight decay on every parameter."""

    lr: Positive = 0.05
    """learning rate at the start"""
    batch_size: BatchSize = 128
    """images per step"""
    momentum: Momentum = 0.9
    """momentum, without Nesterov's"""
    weight_decay: NonNegative = 5e-4
    """L2 penalty"""
    compile: Compile = "auto"
    """mode of torch.compile; auto compiles long runs on a single GPU"""


def resolve(cfg: Config) -> Config:
    """Fill in what the protocol decides, and hold every setting to its type's bound.

    Raises:
        UserError: a value out of bounds; it names the flag and what it takes.
    """

    def bounds(hint) -> Iterator[tuple[str, Callable[[Any], bool]]]:
        if len(getattr(hint, "__metadata__", ())) == 2:
            yield hint.__metadata__
        if typing.get_origin(hint) is Literal:  # which only a command line is held to
            choices = typing.get_args(hint)
            yield f"one of {', '.join(map(str, choices))}", choices.__contains__
        for part in typing.get_args(hint):
            yield from bounds(part)

    for name, hint in typing.get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, name)
        for text, holds in bounds(hint):
            for v in value if isinstance(value, tuple) else (value,):
                if v is not None and not holds(v):
                    raise UserError(f"{flag(name)} must be {text}, not {v}")
    weights = {name: value for name, value in vars(cfg).items() if name.endswith("_weight")}
    if len(weights) > 1 and not any(weights.values()):
        raise UserError(f"{' and '.join(flag(name) for name in weights)} must not all be 0")
    protocol = PROTOCOLS[cfg.protocol]
    epochs = cfg.epochs or protocol.epochs
    in_proportion = tuple(math.ceil(m * epochs / protocol.epochs) for m in protocol.milestones)
    milestones = in_proportion if cfg.milestones is None else cfg.milestones
    # In proportion they may fall together, where epochs are few; by hand that would be a slip.
    if milestones != in_proportion and list(milestones) != sorted({m for m in milestones if m <= epochs}):
        raise UserError(f"--milestones must rise and end by epoch {epochs}, not {' '.join(map(str, milestones))}")
    dataset = cfg.dataset or protocol.dataset
    own_images = dataset == protocol.dataset
    if dataset != "folder" and cfg.image_size != type(cfg).image_size:
        raise UserError(f"--image-size is for --dataset folder alone, not for {dataset}")
    decided = {  # a folder has one name, with or without the slash that a shell puts there
        name: os.path.normpath(value) if isinstance(value, str) else tuple(map(os.path.normpath, value))
        for name, value in vars(cfg).items()
        if name in ("teacher", "teachers", "members")
    }
    for name, hint in typing.get_type_hints(type(cfg)).items():  # 4 from Python is 4.0 on the command line: one folder
        value = getattr(cfg, name)
        if float in (hint, *typing.get_args(hint)) and value is not None:
            decided[name] = tuple(map(float, value)) if isinstance(value, tuple) else float(value)
    decided |= {
        "epochs": epochs,
        "milestones": milestones,
        "dataset": dataset,
        "train_size": cfg.train_size or (protocol.train_size if own_images else None),
        "precision": cfg.precision or (protocol.precision if own_images else "auto"),
    }
    return dataclasses.replace(cfg, **decided)


# Settings that leave a run the same run: where it happens, and what at most moves the last bits of its numbers.
NOT_IDENTITY = {
    "protocol",
    "seed",
    "data_dir",
    "device",
    "results_dir",
    "overwrite",
    "teacher_from",
    "share_teachers",
    "compile",
    "deterministic",
    "wandb_mode",
    "wandb_project",
    "wandb_charts",
    "wandb_thumbnails",
}


def settings(cfg: Config) -> dict[str, Any]:
    """The settings as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def identity(cfg: Config) -> dict[str, Any]:
    """The settings that decide a run's numbers, beside protocol, row and seed."""
    return {k: v for k, v in settings(cfg).items() if k not in NOT_IDENTITY}


def changes(cfg: Config) -> dict[str, Any]:
    """What of a resolved `cfg`'s identity is not the row's own under the same protocol."""
    own = identity(resolve(type(cfg)(protocol=cfg.protocol)))
    return {k: v for k, v in identity(cfg).items() if v != own[k]}
