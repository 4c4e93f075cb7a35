"""Is a GPU that the kit has not seen right, and how is it fastest? To be asked before the first long run.

    python benchmarks/new_gpu.py --data-dir data

Each answer is printed as soon as it is known, so that a time limit costs only the rest: whether views and models are
the CPU's; losses in float32, bf16 and compiled; whether a step waits for the device; seconds an epoch of each kind of
row, and the memory it takes; which kernels are fastest; whether --deterministic holds. All of it is the recipes' own
code, with teachers that know nothing.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import speed
import timm
import torch
from speed import MeasuredRun, images_per_second
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import common
from cifar_models import CIFAR_STD
from command_line import orderly_end, parse
from training import Trainer, autocast

TEACHERS = ("teacher_baseline", "teacher_mixup", "teacher_cutmix", "teacher_cutout", "teacher_augmix")
KINDS = ("teacher_baseline", "teacher_augmix", "student_baseline", "kd_vanilla", "kd_ensemble_add_loss")
COUNT = {"teacher_baseline": 4, "kd_vanilla": 5, "kd_ensemble_add_loss": 3}  # rows of a kind in the table; else 1
MODELS = {"wrn_40_2": 128, "shufflenet_v1": 64}  # their batch sizes
Question = Literal["views", "models", "losses", "waiting", "speed", "kernels", "deterministic", "compiled"]


@dataclass
class Config:
    data_dir: Path = Path("data")
    """where CIFAR-100 is"""
    dataset: Literal["cifar100", "digits"] = "cifar100"
    """digits, which come with scikit-learn, is for trying this file itself"""
    ask: tuple[Question, ...] = get_args(Question)
    """what to find out, in this order; compiled is last, for it takes minutes"""
    steps: int = 200
    """training steps whose losses are compared"""
    seconds: float = 2.0
    """what each timing takes, about"""


class Bench:
    """The recipes' runs on the device at hand, a batch at a time."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
        batches = torch.randperm(len(run.data.train_labels)).to(self.device).split(run.cfg.batch_size)
        while True:
            for index in batches[: len(run.data.train_labels) // run.cfg.batch_size]:  # whole ones
                yield run.augment(run.data.train_images[index], run.data.train_labels[index])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Right? ----------------------------------------------------------------------------------------------

    def views(self) -> None:
        """Grey levels by which a batch's views differ from those the CPU makes of the same draws."""
        for row in TEACHERS:
            run, made = self.build(row), []
            for device in (self.device, torch.device("cpu")):
                common.seed_everything(0, 1)
                images, labels = (t[:256].to(device) for t in (run.data.train_images, run.data.train_labels))
                made.append([t.cpu().double() for t in run.augment(images, labels)])
            (inputs, targets), (inputs_cpu, targets_cpu) = made
            levels = (inputs - inputs_cpu).abs() * 255 * torch.tensor(CIFAR_STD).double().view(3, 1, 1)
            print(
                f"views     {row:22} largest difference {levels.max():.3f} grey levels, "
                f"{(levels > 0.01).double().mean():.4%} of the pixels differ; "
                f"targets by {(targets - targets_cpu).abs().max():.1e}"
            )

    def models(self) -> None:
        """Distance of the logits from those of the CPU in float64, relative to their length."""
        x = torch.randn(64, 3, 32, 32)
        for name in MODELS:
            model = timm.create_model(name, num_classes=100).eval()
            with torch.inference_mode():
                expected = model.double()(x.double())
                model = model.float().to(self.device, memory_format=torch.channels_last)
                views = x.to(self.device, memory_format=torch.channels_last)
                errors = {"fp32": model(views)}
                autocast(model, self.device, in_eval=True)
                errors["bf16"] = model(views)
            errors = {k: (v.cpu() - expected).norm() / expected.norm() for k, v in errors.items()}
            print(f"models    {name:22} " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))

    def losses(self, compile: str = "off") -> None:
        """The mean loss of each quarter of the steps: the same in all precisions, but for noise."""
        for row in ("teacher_baseline", "student_baseline"):
            for precision in ("fp32", "bf16") if compile == "off" else ("bf16",):
                run, trainer = self.trainer(row, compile, precision)
                batches, steps = self.batches(run), max(self.cfg.steps // 4, 1)
                quarters = [torch.stack([trainer.step(*next(batches)) for _ in range(steps)]).mean() for _ in range(4)]
                values = " ".join(f"{loss.item():.4f}" for loss in quarters)
                print(f"losses    {row:22} {precision}, compile {compile}: {values}")

    def waiting(self) -> None:
        """Whether anything in a step, augmentation included, makes the CPU wait for the device."""
        if self.device.type != "cuda":
            return print("waiting   there is no GPU to wait for")
        for row in (*TEACHERS, *KINDS[2:]):
            run, trainer = self.trainer(row)
            batches = self.batches(run)
            trainer.step(*next(batches))
            torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.step(*next(batches))
                found = "nothing"
            except RuntimeError as error:
                found = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            print(f"waiting   {row:22} {found}")

    def deterministic(self) -> None:
        """Whether two runs of five steps end at the same weights, bit for bit."""
        for row in KINDS:
            ends = []
            try:
                for _ in range(2):
                    run, trainer = self.trainer(row, deterministic=True)
                    batches = self.batches(run)
                    for _ in range(5):
                        trainer.step(*next(batches))
                    ends.append([t.cpu() for t in trainer.model.state_dict().values()])
                answer = "same bits" if all(map(torch.equal, *ends)) else "OTHER bits"
            except RuntimeError as error:
                answer = str(error).splitlines()[0]
            finally:
                torch.use_deterministic_algorithms(False)
            print(f"determin. {row:22} {answer}")

    # Fast? -----------------------------------------------------------------------------------------------

    def speed(self, compile: str = "off", rows: tuple[str, ...] = KINDS) -> None:
        """Images a second, seconds that an epoch and its evaluation take, and peak memory of each kind of row, alone
        on the device."""
        total = 0.0
        for row in rows:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run, trainer = self.trainer(row, compile)
            batches, started = self.batches(run), time.perf_counter()

            def step(run=run, trainer=trainer, batches=batches) -> int:
                trainer.step(*next(batches))
                return run.cfg.batch_size

            def evaluate(run=run, trainer=trainer) -> int:
                part = slice(500 if self.device.type == "cpu" else None)
                return len(run.predict(trainer.model, run.data.test_images[part]))

            for _ in range(3):  # warm up, compile, record
                step()
            self.synchronize()
            first = time.perf_counter() - started
            rate = images_per_second(step, self.cfg.seconds, self.device)
            epoch, evaluation = 50_000 / rate, 10_000 / images_per_second(evaluate, self.cfg.seconds, self.device)
            total += (epoch + evaluation) * COUNT.get(row, 1)
            memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else float("nan")
            print(
                f"speed     {row:22} compile {compile}: {rate:9,.0f} images/s, {epoch:7.1f} s an epoch, "
                f"{evaluation:.2f} s its evaluation, {memory:.2f} GiB, first three steps {first:.1f} s"
            )
        if rows == KINDS:
            hours = {name: total * common.PROTOCOLS[name].epochs / 3600 for name in ("quick", "short", "paper")}
            print("speed     all 14 rows, one after the other: " + ", ".join(
                f"{name} {value:.1f} h" for name, value in hours.items()))  # fmt: skip

    def kernels(self) -> None:
        """The device's time for forward and backward, without what launching takes: by memory format and cuDNN's
        choice of algorithms."""
        activity = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
        clock = f"self_{'device' if self.device.type == 'cuda' else 'cpu'}_time_total"
        for name, size in MODELS.items():
            for layout in (torch.channels_last, torch.contiguous_format):
                for benchmark in (False, True):
                    with cudnn_benchmark(benchmark):
                        model = timm.create_model(name, num_classes=100).to(self.device, memory_format=layout)
                        autocast(model, self.device)
                        x = torch.randn(size, 3, 32, 32, device=self.device).contiguous(memory_format=layout)
                        steps = 10 if self.device.type == "cuda" else 1
                        for _ in range(3):
                            forward_and_backward(model, x)
                        with profile(activities=[activity], acc_events=True) as profiler:
                            for _ in range(steps):
                                forward_and_backward(model, x)
                            self.synchronize()
                    milliseconds = sum(getattr(event, clock) for event in profiler.key_averages()) / steps / 1000
                    how = f"{str(layout)[6:]:18} cudnn.benchmark {benchmark!s:5}"
                    print(f"kernels   {name:22} {how} {milliseconds:8.2f} ms")

    def compiled(self) -> None:
        """The same losses and the speed with CUDA graphs. It takes minutes the first time."""
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.losses(mode)
        self.speed(mode, ("teacher_baseline", "student_baseline", "kd_vanilla"))


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
        print(f"{common.hardware(bench.device)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
        for question in cfg.ask:
            getattr(bench, question)()
            print(f"          ({time.perf_counter() - started:.0f} s so far)")


if __name__ == "__main__":
    main()
