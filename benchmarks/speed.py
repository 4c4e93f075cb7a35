"""How fast the recipes train, against a loop in the style of the published scripts, on the same data in the same run.

    python benchmarks/speed.py --data-dir data

Ours is the recipes' own code: their `main` builds the objective and the augmentation, `common.Run` trains. The
reference has worker processes with a PIL transform an image, float32, channels first, eager, SGD without fusing, and
reads the loss at every step. It trains the kit's networks in the same process, so what makes these or the process
faster (their layout in code, glibc's heap) counts for both. Both are timed in turn, repeatedly; the ratio is that of
their medians. Prints a table and writes `benchmarks/<hardware>.md`.
"""

import dataclasses
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.loss import JsdCrossEntropy
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torchvision import transforms

import common
from augmix import TimmAugMix
from calibration import calibration_metrics
from cifar_models import CIFAR_MEAN, CIFAR_STD
from command_line import orderly_end, parse
from run_files import UserError
from training import Compile, Precision

# (name, recipe, what the reference does to a batch, further settings)
ROWS = (
    ("teacher, standard", "teacher_baseline", "plain", {}),
    ("teacher, MixUp", "teacher_mixup", "mixup", {}),
    ("teacher, CutMix", "teacher_cutmix", "cutmix", {}),
    ("teacher, CutOut", "teacher_cutout", "cutout", {}),
    ("teacher, AugMix", "teacher_augmix", "augmix", {}),
    ("student alone", "student_baseline", "plain", {}),
    ("KD, one teacher", "kd_vanilla", "kd", {}),
    ("KD, four teachers", "kd_ensemble_add_loss", "kd", {}),
    ("KD, four teachers, shared", "kd_ensemble_add_loss", "kd", {"share_teachers": True}),
)
# FLOP/s (dense bf16) and bytes/s of memory, from the vendor's data sheets
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12)}


@dataclass
class Config:
    data_dir: Path = Path("data")
    """where CIFAR-100 is"""
    dataset: Literal["cifar100", "digits"] = "cifar100"
    """digits, which come with scikit-learn, is for trying the benchmark itself"""
    seconds: float = 3.0
    """what each timing of each side takes, about"""
    repeats: int = 5
    """timings of each side, in turn; the median counts"""
    workers: int = 2
    """worker processes of the reference"""
    rows: str = ""
    """measure only rows whose name matches this regular expression"""
    compile: Compile = "auto"
    """as the recipes' --compile; auto decides as for a run of the paper's length"""
    precision: Precision = "auto"
    """as the recipes' --precision"""
    out: Path = Path(__file__).parent
    """folder of the report"""


class MeasuredRun(common.Run):
    """A run whose recipe is built as ever, up to `fit`; its teachers have the weights they were born with."""

    def teacher(self, *rows: str) -> common.Teacher:
        self.sources = self.source_digests = list(rows)
        return common.Teacher(*(timm.create_model("wrn_40_2", num_classes=self.num_classes) for _ in rows))

    def fit(self, task, augment) -> None:
        self.task, self.augment = task, augment


def build(row: str, cfg: Config, results_dir: Path = Path("results"), **settings) -> MeasuredRun:
    main = common.load_recipe(row)
    settings |= dict(compile=cfg.compile, precision=cfg.precision)
    run = MeasuredRun(
        row, common.config_type(main)(dataset=cfg.dataset, data_dir=cfg.data_dir, results_dir=results_dir, **settings)
    )
    main(run.cfg, run)
    return run


# The reference loop ----------------------------------------------------------------------------------------


class Pictures(Dataset):
    """PIL images with a transform each, as torchvision's CIFAR100 gives them."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable):
        self.images, self.labels = images.permute(0, 2, 3, 1).cpu().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def reference_transform(kind: str, side: int) -> Callable:
    to_tensor = [transforms.ToTensor(), transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
    if kind == "test":
        return transforms.Compose(to_tensor)
    geometry = [
        transforms.RandomCrop(side, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(15),
    ]
    if kind != "augmix":
        return transforms.Compose([*geometry, *to_tensor])
    standard, to_tensor = transforms.Compose(geometry), transforms.Compose(to_tensor)
    augmix = TimmAugMix(severity=3).augmix

    def three_views(picture):
        picture = standard(picture)
        return torch.stack([to_tensor(p) for p in (picture, augmix(picture), augmix(picture))])

    return three_views


class ReferenceLoop:
    """The plain training loop for a row, on weights of its own."""

    def __init__(self, run: MeasuredRun, kind: str, workers: int):
        task, self.kind, self.device = run.task, kind, run.device
        dataset = Pictures(
            run.data.train_images, run.data.train_labels, reference_transform(kind, run.data.train_images.shape[-1])
        )
        self.loader = DataLoader(dataset, run.cfg.batch_size, shuffle=True, num_workers=workers, drop_last=True)
        self.model = timm.create_model(run.model_name, num_classes=run.num_classes).to(self.device)
        count = len(getattr(run.cfg, "teachers", ["one"])) if kind == "kd" else 0
        self.teachers = [
            timm.create_model("wrn_40_2", num_classes=run.num_classes).to(self.device) for _ in range(count)
        ]
        for teacher in self.teachers:
            teacher.eval()
        hyper = dict(lr=run.cfg.lr, momentum=run.cfg.momentum, weight_decay=run.cfg.weight_decay)
        self.optimizer = torch.optim.SGD(self.model.parameters(), **hyper, foreach=False)
        self.cfg, self.jsd, self.batches = run.cfg, JsdCrossEntropy(alpha=12, smoothing=0), None
        self.num_classes = task.trainable_module.num_classes

    def next_batch(self) -> tuple[Tensor, Tensor]:
        self.batches = self.batches or iter(self.loader)
        batch = next(self.batches, None)
        if batch is None:
            self.batches = None
            return self.next_batch()
        return tuple(t.to(self.device) for t in batch)

    def step(self) -> int:
        images, labels = self.next_batch()
        self.model.train()
        if self.kind == "augmix":
            images = images.transpose(0, 1).flatten(0, 1).contiguous()
            output = self.model(images)
            loss = self.jsd(output, labels)
        elif self.kind == "kd":
            output = self.model(images)
            loss, t = 0.2 * F.cross_entropy(output, labels), self.cfg.temperature
            for teacher in self.teachers:
                with torch.no_grad():
                    soft = F.softmax(teacher(images) / t, 1)
                loss = loss + 0.8 * t**2 * F.kl_div(F.log_softmax(output / t, 1), soft, reduction="batchmean")
        else:
            targets = F.one_hot(labels, self.num_classes).float()
            images, targets = self.mix(images, targets)
            output = self.model(images)
            loss = F.cross_entropy(output, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
        return len(labels)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "mixup":
            lam, partner = np.random.beta(0.3, 0.3), torch.randperm(len(images))
            return lam * images + (1 - lam) * images[partner], lam * targets + (1 - lam) * targets[partner]
        for i in range(len(images)) if self.kind in ("cutmix", "cutout") else ():
            y, x = np.random.randint(32, size=2)
            side = 16 if self.kind == "cutout" else int(32 * np.sqrt(np.random.rand()))
            (top, bottom), (left, right) = ((max(c - side // 2, 0), min(c + side // 2, 32)) for c in (y, x))
            if self.kind == "cutout":
                images[i, :, top:bottom, left:right] = 0
            else:
                partner = np.random.randint(len(images))
                share = (bottom - top) * (right - left) / 32**2
                images[i, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
                targets[i] = (1 - share) * targets[i] + share * targets[partner]
        return images, targets


def reference_evaluation(model: nn.Module, run: MeasuredRun, workers: int) -> None:
    """Loader, forward, and calibration counted an image at a time."""
    loader = DataLoader(
        Pictures(run.data.test_images, run.data.test_labels, reference_transform("test", 32)), 100, num_workers=workers
    )
    model.eval()
    bins = np.zeros((101, 3))
    with torch.no_grad():
        for images, labels in loader:
            confidences, predictions = F.softmax(model(images.to(run.device)), 1).max(1)
            for confidence, prediction, label in zip(
                confidences.tolist(), predictions.tolist(), labels.tolist(), strict=True
            ):
                bins[int(confidence * 100)] += 1, prediction == label, confidence


# Timing ----------------------------------------------------------------------------------------------------


def images_per_second(step: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Do steps, at least one, until the time is up; a first one does not count. `step` returns the images it did."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        done += step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return done / (time.perf_counter() - started)


def alternate(cfg: Config, run: MeasuredRun, loop: "ReferenceLoop | None", **sides: Callable[[], int]) -> dict:
    """Median images/s of each side, timed in turn. The loop's workers rest while it is not its turn: they would fill
    their queue at the cost of the other side, and live off it in their own."""
    speeds = {name: [] for name in sides}
    for _ in range(cfg.repeats):
        for name, step in sides.items():
            speeds[name].append(images_per_second(step, cfg.seconds, run.device))
            if loop:
                loop.batches = None
    return {name: statistics.median(values) for name, values in speeds.items()}


def our_steps(run: MeasuredRun) -> Callable[[], int]:
    """The run's own epoch, some steps at a time."""
    trainer, size = run.trainer(run.task), run.cfg.batch_size
    whole = run.data
    steps = 1 if run.device.type == "cpu" else min(50, (len(whole.train_labels) - 1) // size)
    bar = SimpleNamespace(update=lambda n: None, set_postfix=lambda **_: None, write=lambda text: None)

    some = torch.randperm(len(whole.train_labels))[: steps * size].to(run.device)
    few = dataclasses.replace(whole, train_images=whole.train_images[some], train_labels=whole.train_labels[some])

    def step() -> int:
        run.data = few
        run.train_epoch(trainer, run.augment, 2, bar)
        run.data = whole
        return steps * size

    return step


def ratios(cfg: Config) -> list[dict]:
    lines = []

    def add(name: str, speeds: dict[str, float], size: int = 50_000, **more) -> None:
        lines.append({"name": name, **speeds, "seconds": size / speeds["ours"], **more})
        ours, theirs = speeds["ours"], speeds["reference"]
        print(f"{name:24}{ours:>12,.0f}{theirs:>12,.0f}{ours / theirs:>8.2f}", flush=True)

    print(f"{'images/s':24}{'ours':>12}{'reference':>12}{'ratio':>8}")
    shared = tempfile.TemporaryDirectory()  # teachers' outputs: a first step writes them, the measured ones read
    for name, row, kind, settings in ROWS:
        if re.search(cfg.rows, name):
            run = build(row, cfg, Path(shared.name), **settings)
            work = None if settings else count_work(run)  # what is shared is not computed
            reference, ours = ReferenceLoop(run, kind, cfg.workers), our_steps(run)
            speeds = alternate(cfg, run, reference, ours=ours, reference=reference.step)
            add(name, speeds, work=work, split=time_split(ours, run.device))
    for name, row, kind in (
        ("input, standard", "teacher_baseline", "plain"),
        ("input, AugMix", "teacher_augmix", "augmix"),
    ):
        if re.search(cfg.rows, name):
            run = build(row, cfg)
            reference = ReferenceLoop(run, kind, cfg.workers)
            data, size = run.data, run.cfg.batch_size

            def ours(run=run, data=data, size=size) -> int:
                index = torch.randint(len(data.train_labels), (size,)).to(run.device)
                run.augment(data.train_images[index], data.train_labels[index])
                return size

            sides = dict(ours=ours, reference=lambda reference=reference: len(reference.next_batch()[1]))
            add(name, alternate(cfg, run, reference, **sides))
    if re.search(cfg.rows, "evaluation"):
        run = build("student_baseline", cfg)
        part = slice(0, 2000 if run.device.type == "cpu" else None)
        run.data = dataclasses.replace(
            run.data, test_images=run.data.test_images[part], test_labels=run.data.test_labels[part]
        )
        plain = timm.create_model("shufflenet_v1", num_classes=run.num_classes).to(run.device)
        model = run.trainer(run.task).model

        def evaluate() -> int:
            calibration_metrics(run.predict(model, run.data.test_images), run.data.test_labels)
            return len(run.data.test_labels)

        def evaluate_plainly() -> int:
            reference_evaluation(plain, run, cfg.workers)
            return len(run.data.test_labels)

        add("evaluation, student", alternate(cfg, run, None, ours=evaluate, reference=evaluate_plainly), 10_000)
    return lines


class CountWork(TorchDispatchMode):
    """Floating-point operations of matrix products and convolutions, and the bytes these read and write, as if all else
    were fused into them."""

    flops = bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function.overloadpacket):
            if function.overloadpacket is torch.ops.aten.convolution_backward:  # torch's formula forgets groups
                gradient, images, weight, *_, wanted = args
                self.flops += sum(wanted[:2]) * conv_flop_count(images.shape, weight.shape, gradient.shape)
            else:
                self.flops += formula(*args, **(kwargs or {}), out_val=result)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def count_work(run: MeasuredRun) -> tuple[float, float]:
    """Floating-point operations and, in float32, bytes of training on one image, teachers' included."""
    inputs, targets = run.augment(run.data.train_images[:8], run.data.train_labels[:8])
    task = run.task.to(run.device).train()
    with CountWork() as work:
        task(inputs, targets)["loss"].backward()
    task.zero_grad()
    return work.flops / 8, work.bytes / 8


def self_times(profiler: profile, device: torch.device) -> Counter:
    """Microseconds of each operation; on a GPU of each kernel, for what launches one is given its time once more."""
    times = Counter()
    for event in profiler.key_averages():
        if device.type == "cpu":
            times[event.key] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            times[event.key] += event.self_device_time_total
    return times


def time_split(step: Callable[[], int], device: torch.device) -> str:
    """The six kinds of operation in which a step's time goes, on a GPU those of kernel."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        step()
    times = Counter()
    for name, microseconds in self_times(profiler, device).items():
        fused = "CompiledFxGraph" in name or name.startswith("triton_")
        times["fused by the compiler" if fused else name[:60]] += microseconds
    return ", ".join(f"`{name}` {time / times.total():.0%}" for name, time in times.most_common(6))


OUR_START = (
    "import common; main = common.load_recipe('student_baseline');"
    "run = common.Run('student_baseline', common.config_type(main)(protocol='smoke', train_size=64, epochs=1));"
    "batch = lambda augment: augment(run.data.train_images, run.data.train_labels);"
    "run.fit = lambda task, augment: run.trainer(task).step(*batch(augment)).item();"
    "main(run.cfg, run)"
)
BARE_START = (
    "import timm, torch; model = timm.create_model('resnet18', num_classes=10);"
    "optimizer = torch.optim.SGD(model.parameters(), 0.1);"
    "model(torch.randn(64, 3, 16, 16)).logsumexp(1).sum().backward(); optimizer.step()"
)


def start_up(repeats: int) -> tuple[float, float]:
    """Median seconds from the command to the first step done, on the digits, without compilation: of a recipe, and of
    nothing but torch and timm."""
    seconds = {OUR_START: [], BARE_START: []}
    for _ in range(repeats):
        for code, times in seconds.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=common.ROOT)
            times.append(time.perf_counter() - started)
    return tuple(map(statistics.median, seconds.values()))


def report(lines: list[dict], starts: tuple[float, float], cfg: Config) -> str:
    """The table in Markdown."""
    run, versions = build("student_baseline", cfg), common.versions()
    name, chosen = common.hardware(run.device), run.trainer(run.task)
    text = [
        f"# Speed on {name}",
        "",
        f"`python benchmarks/speed.py`, {time.strftime('%Y-%m-%d')}, commit {(versions['commit'] or 'unknown')[:12]}, "
        f"torch {versions['torch']}, timm {versions['timm']}; --compile {chosen.compile}, "
        f"--precision {chosen.precision}; {cfg.workers} workers for the reference, which is float32; "
        f"medians of {cfg.repeats} alternated timings.",
        "",
        "| | images/s | reference, images/s | ratio | s for all images |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        ours, theirs = line["ours"], line["reference"]
        text.append(f"| {line['name']} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} | {line['seconds']:,.1f} |")
    text += ["", "All images are 50,000, for evaluation 10,000. Shared: the teachers' outputs are there already."]
    text += ["", f"Start to first step: {starts[0]:.1f} s; with torch and timm alone {starts[1]:.1f} s."]
    text += ["", "| | GFLOP an image | MB an image, fp32 | where a step's time goes |", "|---|---|---|---|"]
    trained = [line for line in lines if line.get("work")]
    for line in trained:
        flops, moved = line["work"]
        text.append(f"| {line['name']} | {flops / 1e9:.2f} | {moved / 1e6:.1f} | {line['split']} |")
    if peak := next((key for key in PEAKS if key in name), None):
        text += [
            "",
            "| | share of peak FLOP/s | floor by operations, s | floor by bytes in bf16, s |",
            "|---|---|---|---|",
        ]
        for line in trained:
            flops, seconds = line["work"][0], (line["work"][0] / PEAKS[peak][0], line["work"][1] / 2 / PEAKS[peak][1])
            floors = " | ".join(f"{50_000 * s:.2f}" for s in seconds)
            text.append(f"| {line['name']} | {line['ours'] * flops / PEAKS[peak][0]:.1%} | {floors} |")
    return "\n".join(text) + "\n"


def main() -> None:
    cfg = parse(Config, __doc__)
    if cfg.repeats < 1 or cfg.workers < 0:
        raise UserError("--repeats must be 1 or more, and --workers 0 or more")
    try:
        re.compile(cfg.rows)
    except re.error as error:
        raise UserError(f"--rows {cfg.rows} is not a regular expression: {error}") from None
    cfg.out.mkdir(parents=True, exist_ok=True)
    if not (lines := ratios(cfg)):
        raise UserError(f"--rows {cfg.rows} is found in the name of no row")
    print(text := report(lines, start_up(cfg.repeats), cfg))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = common.hardware(device) + (f" compile {cfg.compile}" if cfg.compile != "auto" else "")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (cfg.out / f"{slug}.md").write_text(text)
    print(f"written to {cfg.out / slug}.md")


if __name__ == "__main__":
    with orderly_end():
        main()
