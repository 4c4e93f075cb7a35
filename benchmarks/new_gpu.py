"""Does a GPU that is new to the kit compute correctly, and which settings are fastest? Run this before a long run.

    python benchmarks/new_gpu.py --data-dir data

Each answer is printed at once, so a time limit costs only the remaining answers. An error costs only its row (and makes
the exit status 1), unless the process loses its GPU, as after an error in a kernel. The questions for --ask are views
and models (the same as on the CPU?), losses (the same in float32, bf16 and compiled?), waiting (does a step wait for
the device?), speed (seconds an epoch of each kind of row, memory, hours for all rows), kernels (which are fastest?) and
deterministic (does --deterministic hold?). The code is the recipes' own; the teachers are untrained.
"""

import gc
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import speed
import timm
import torch
import torch._inductor.config
from speed import MeasuredRun, images_per_second, self_times
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import common
from cifar_models import CIFAR_STD
from command_line import orderly_end, parse
from run_files import UserError
from training import Trainer, auto_compile, autocast

TEACHERS = ("teacher_baseline", "teacher_mixup", "teacher_cutmix", "teacher_cutout", "teacher_augmix")
KINDS = ("teacher_baseline", "teacher_augmix", "student_baseline", "kd_vanilla", "kd_ensemble_add_loss")
COUNT = {"teacher_baseline": 4, "kd_vanilla": 5, "kd_ensemble_add_loss": 3}  # rows of a kind in the table; else 1
MODELS = {"wrn_40_2": 128, "shufflenet_v1": 64}  # their batch sizes
Question = Literal["views", "models", "losses", "waiting", "speed", "kernels", "deterministic", "compiled"]
ROWS = {  # for which each is asked
    "views": TEACHERS,
    "models": tuple(MODELS),
    "losses": ("teacher_baseline", "student_baseline"),
    "waiting": (*TEACHERS, *KINDS[2:]),
    "speed": KINDS,
    "kernels": tuple(MODELS),
    "deterministic": KINDS,
}


@dataclass
class Config:
    data_dir: Path = Path("data")
    """where CIFAR-100 is"""
    dataset: Literal["cifar100", "digits"] = "cifar100"
    """digits, which come with scikit-learn, is for trying this file itself: they are 16 x 16, and their speeds not
    CIFAR-100's"""
    ask: tuple[Question, ...] = get_args(Question)
    """what to find out, in this order; compiled is speed, losses and deterministic once more, and last, for it takes
    minutes"""
    steps: int = 200
    """training steps whose losses are compared"""
    seconds: float = 2.0
    """what each timing takes, about"""


class Bench:
    """The recipes' runs on the device at hand, a batch at a time."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.failed: list[str] = []
        torch._inductor.config.triton.cudagraph_or_error = True  # a graph that is only skipped would go unnoticed
        self.seconds: dict[str, dict[str, tuple[float, float]]] = {}  # by compile and row: to start, and an epoch

    def answer(self, question: Question) -> None:
        if question == "compiled":
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.ask("speed", ROWS["speed"], mode)
            self.hours(mode)
            self.ask("losses", ROWS["losses"], mode)
            self.ask("deterministic", ("kd_vanilla",), mode)
        elif question == "waiting" and self.device.type != "cuda":
            print(f"{question:13} there is no GPU to wait for")
        else:
            self.ask(question, ROWS[question])
            if question == "speed":
                self.hours("off")

    def ask(self, question: str, rows: Sequence[str], *how: str) -> None:
        """Print the answers for each row, on a device that holds nothing of the one before."""
        for row in rows:
            try:
                gc.collect()
                torch.compiler.reset()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                for answer in getattr(self, question)(row, *how):
                    print(f"{question:13} {row:22} {answer}")
            except UserError:  # images that are not there are there for no row
                raise
            except Exception as error:
                self.failed.append(" ".join((question, row, *how)))
                reason = " ".join(str(error).split())[:200]
                print(f"{question:13} {row:22} FAILED at {place(error)}, {type(error).__name__}: {reason}")
                try:
                    self.synchronize()
                except Exception:
                    raise UserError(
                        "the GPU is lost to this process: ask the other questions in a new one (--ask); with "
                        "CUDA_LAUNCH_BLOCKING=1, the line named above is the one that failed"
                    ) from None

    def build(self, row: str, compile: str = "off", precision: str = "auto", **settings) -> MeasuredRun:
        cfg = speed.Config(data_dir=self.cfg.data_dir, dataset=self.cfg.dataset, compile=compile, precision=precision)
        common.seed_everything(0, 0)  # for the teachers
        return speed.build(row, cfg, **settings)

    def trainer(self, *args, **settings) -> tuple[MeasuredRun, Trainer]:
        run = self.build(*args, **settings)
        run.task.train()
        return run, run.trainer(run.task)

    def batches(self, run: MeasuredRun) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches without end, the same ones each time. Their indices are on the device beforehand."""
        common.seed_everything(0, 1)
        batches = torch.randperm(len(run.data.train_labels)).to(run.device).split(run.cfg.batch_size)
        while True:
            for index in batches[: len(run.data.train_labels) // run.cfg.batch_size]:  # whole ones
                yield run.augment(run.data.train_images[index], run.data.train_labels[index])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Right? ----------------------------------------------------------------------------------------------

    def views(self, row: str) -> Iterator[str]:
        """Grey levels by which a batch's views differ from those the CPU makes of the same draws."""
        run, made = self.build(row), []
        for device in (self.device, torch.device("cpu")):
            common.seed_everything(0, 1)
            spread = slice(None, None, len(run.data.train_labels) // 256)  # over the classes, by which they are sorted
            images, labels = (t[spread].to(device) for t in (run.data.train_images, run.data.train_labels))
            made.append([t.cpu().double() for t in run.augment(images, labels)])
        (inputs, targets), (inputs_cpu, targets_cpu) = made
        levels = (inputs - inputs_cpu).abs() * 255 * torch.tensor(CIFAR_STD).double().view(3, 1, 1)
        yield (
            f"largest difference {levels.max():.3f} grey levels, {(levels > 0.01).double().mean():.4%} of the pixels "
            f"differ; targets by {(targets - targets_cpu).abs().max():.1e}"
        )

    def models(self, name: str) -> Iterator[str]:
        """Distance of the logits from those of the CPU in float64, relative to their length."""
        x = torch.randn(64, 3, 32, 32)
        model = timm.create_model(name, num_classes=100).eval()
        with torch.inference_mode():
            expected = model.double()(x.double())
            model = model.float().to(self.device, memory_format=torch.channels_last)
            views = x.to(self.device, memory_format=torch.channels_last)
            errors = {"fp32": model(views)}
            autocast(model, self.device, in_eval=True)
            errors["bf16"] = model(views)
        errors = {k: (v.cpu() - expected).norm() / expected.norm() for k, v in errors.items()}
        yield ", ".join(f"{k} {v:.1e}" for k, v in errors.items())

    def losses(self, row: str, compile: str = "off") -> Iterator[str]:
        """The mean loss of each quarter of the steps: the same in all precisions, but for noise."""
        for precision in ("fp32", "bf16") if compile == "off" else ("bf16",):
            run, trainer = self.trainer(row, compile, precision)
            batches, steps = self.batches(run), max(self.cfg.steps // 4, 1)
            quarters = [torch.stack([trainer.step(*next(batches)) for _ in range(steps)]).mean() for _ in range(4)]
            yield f"{precision}, compile {compile}: " + " ".join(f"{loss.item():.4f}" for loss in quarters)

    def waiting(self, row: str) -> Iterator[str]:
        """What in a step, augmentation included, makes the CPU wait for the device, if anything does."""
        run, trainer = self.trainer(row)
        batches = self.batches(run)
        trainer.step(*next(batches))
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(*next(batches))
            yield "nothing"
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            yield f"WAITS at {place(error)}"
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def deterministic(self, row: str, compile: str = "off") -> Iterator[str]:
        """Whether six steps end at the same weights, bit for bit: a second time; restored halfway, as from a
        checkpoint; and, not compiled, with memory filled with NaN before anybody writes to it."""
        ways = ["again", "restored"] + ["filled"] * (compile == "off")
        try:
            first, *ends = [self.six_steps(row, compile, way) for way in ("first", *ways)]
        finally:
            torch.use_deterministic_algorithms(False)
        bits = ["same" if all(map(torch.equal, first, end)) else "OTHER" for end in ends]
        answers = ", ".join(f"{way} {which} bits" for way, which in zip(ways, bits, strict=True))
        yield f"compile {compile}: {answers}"

    def six_steps(self, row: str, compile: str, way: str) -> list[Tensor]:
        run, trainer = self.trainer(row, compile, deterministic=True)
        torch.utils.deterministic.fill_uninitialized_memory = way == "filled"
        for step, batch in enumerate(list(islice(self.batches(run), 6))):  # drawn before a fresh trainer draws
            if way == "restored" and step == 3:
                states = trainer.model.state_dict(), trainer.momentum()
                _, trainer = self.trainer(row, compile, deterministic=True)
                trainer.restore(*states)
            trainer.step(*batch)
        return [tensor.cpu() for tensor in trainer.model.state_dict().values()]

    # Fast? -----------------------------------------------------------------------------------------------

    def speed(self, row: str, compile: str = "off") -> Iterator[str]:
        """Images a second, seconds that an epoch and its evaluation take, and peak memory, alone on the device."""
        run, trainer = self.trainer(row, compile)
        batches, started = self.batches(run), time.perf_counter()

        def step() -> int:
            trainer.step(*next(batches))
            return run.cfg.batch_size

        def evaluate() -> int:
            part = slice(500 if self.device.type == "cpu" else None)
            return len(run.predict(trainer.model, run.data.test_images[part]))

        for _ in range(3):  # warm up, compile, record
            step()
        self.synchronize()
        first = time.perf_counter() - started
        rate = images_per_second(step, self.cfg.seconds, self.device)
        epoch, evaluation = 50_000 / rate, 10_000 / images_per_second(evaluate, self.cfg.seconds, self.device)
        self.seconds.setdefault(compile, {})[row] = first, epoch + evaluation
        memory = ""
        if self.device.type == "cuda":
            used, reserved = (f() / 2**30 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
            memory = f", {used:.2f} GiB of {reserved:.2f} reserved"
        yield (
            f"compile {compile}: {rate:9,.0f} images/s, {epoch:7.1f} s an epoch, {evaluation:.2f} s its evaluation, "
            f"first three steps {first:.1f} s{memory}"
        )

    def hours(self, compile: str) -> None:
        """What a table takes at these speeds, each row with its first steps, in which it is compiled."""
        seconds = self.seconds.get(compile, {})
        if missing := [row for row in ROWS["speed"] if row not in seconds]:
            return print(f"{'hours':13} not known, for want of {', '.join(missing)}")
        hours = []
        for name in ("quick", "short", "paper"):
            epochs = common.PROTOCOLS[name].epochs
            total = sum(COUNT.get(row, 1) * (first + epochs * epoch) for row, (first, epoch) in seconds.items())
            auto = compile == auto_compile(self.device.type, epochs * 50_000)
            hours.append(f"{name} {total / 3600:.1f} h" + " (auto)" * auto)
        print(f"{'hours':13} {'all 14 rows':22} one after the other, compile {compile}: {', '.join(hours)}")

    def kernels(self, name: str) -> Iterator[str]:
        """The device's time for forward and backward, without what launching takes: by memory format and cuDNN's
        choice of algorithms."""
        activity = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
        for layout in (torch.channels_last, torch.contiguous_format):
            for benchmark in (False, True):
                with cudnn_benchmark(benchmark):
                    model = timm.create_model(name, num_classes=100).to(self.device, memory_format=layout)
                    autocast(model, self.device)
                    x = torch.randn(MODELS[name], 3, 32, 32, device=self.device).contiguous(memory_format=layout)
                    steps = 10 if self.device.type == "cuda" else 1
                    for _ in range(3):
                        forward_and_backward(model, x)
                    with profile(activities=[activity], acc_events=True) as profiler:
                        for _ in range(steps):
                            forward_and_backward(model, x)
                        self.synchronize()
                milliseconds = self_times(profiler, self.device).total() / steps / 1000
                yield f"{str(layout)[6:]:18} cudnn.benchmark {benchmark!s:5} {milliseconds:8.2f} ms"


def place(error: Exception) -> str:
    """File and line of the last call in this repository on the way to an error."""
    ours = {*common.ROOT.glob("*.py"), *common.ROOT.glob("[!.]*/*.py")}  # and not what is installed in .venv
    frame = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() in ours][-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def forward_and_backward(model: nn.Module, x: Tensor) -> None:
    model(x).logsumexp(1).mean().backward()
    model.zero_grad()


@contextmanager
def cudnn_benchmark(on: bool):
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    with orderly_end():
        cfg = parse(Config, __doc__)
        bench, started = Bench(cfg), time.perf_counter()
        versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
        print(f"{common.hardware(bench.device)}, {versions}, {cfg.dataset}")
        for question in cfg.ask:
            bench.answer(question)
            print(f"{'':13} ({time.perf_counter() - started:.0f} s so far)")
        if bench.failed:
            sys.exit(f"error: no answer for {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
