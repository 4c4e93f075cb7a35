"""One training step, as fast as its device does it: the same mathematics as the plain loop, to which tests hold it."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data_parallel
from run_files import UserError, first_line
from run_settings import Compile, Precision

# For `deterministic`. cuBLAS reads it once, at its first product, which may be that of a model before this one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Where torch has no oneDNN, as on a Mac, it would convolve batches of 16 and more with NNPACK, several times as slowly.
torch.backends.nnpack.set_flags(False)

# glibc would return a step's activations to the system, to be given and zeroed anew in the next, page by page: a tenth
# of ShuffleNetV1's step on a CPU. So blocks of any size come from the heap, which is kept.
with suppress(OSError, AttributeError):  # another C library
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(parameter, 2**31 - 1)


class Trainer:
    """A task on its device with its optimiser, SGD.

    Everything is channels last and the optimiser fused. On a GPU a step never waits for the device. Where there are
    several processes, each trains on its share of a batch; on GPUs, batch norm then has the statistics of the whole
    batch, for which it does wait.

    Args:
        task: what is trained; its modules are moved, and wrapped for precision and compilation.
        images: how many the whole run trains on, which decides whether `auto` compiles. Of the whole run, so that one
            that resumes goes on with the same arithmetic.
        compile: a mode of `torch.compile`, or `off`; its results are cached between runs.
        precision: `bf16` is autocast, for all models of the task while they train or teach. Losses are always computed
            in float32, and so is the trained model in eval mode. `auto` takes `bf16` on a GPU that has it; on a CPU,
            where it can be faster too, torch 2.11 has a wrong gradient: docs/scaling.md. The convolutions of `fp32` are
            TF32 on a GPU, which is torch's default.
        deterministic: only operations that give the same bits every time, for the whole process.

    Attributes:
        model: the trained module, not compiled, so that its names are the files'.
        compile, precision: what `auto` came to.
        parts: of the last step's loss, each before its weight: task_loss, kd_loss, jsd_loss; on the device.
    """

    def __init__(
        self, task: TrainingTask, device: torch.device, images: int, *, lr: float, momentum: float, weight_decay: float,
        compile: Compile = "auto", precision: Precision = "auto", deterministic: bool = False,
    ):  # fmt: skip
        check_trainable(task)
        if deterministic:
            torch.use_deterministic_algorithms(True)
            # Would be a quarter of a step's operations, and no step reads what nobody wrote: tests/test_speed.py
            torch.utils.deterministic.fill_uninitialized_memory = False
        if data_parallel.size() > 1 and device.type == "cuda":
            task.trainable_module = convert_sync_batchnorm(task.trainable_module)  # timm's keeps fused activations
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" and has_bf16("cuda") else "fp32"
        elif precision == "bf16" and not has_bf16(device.type):
            # Measured where torch and oneDNN were told not to use what the CPU has
            how_slow = "on CPUs without AVX-512 8 to 13 times, on other CPUs up to 2.4; " * (device.type == "cpu")
            print(
                f"warning: this {device.type} emulates bf16, so it is slower than fp32: {how_slow}--precision fp32 "
                "makes a variant (docs/scaling.md)",
                file=sys.stderr,
            )
        if compile == "auto":
            compile = auto_compile(device.type, images)
        elif compile != "off" and data_parallel.size() > 1 and device.type == "cuda":
            raise UserError(f"--compile {compile}: one run on several GPUs is not compiled: use --compile off")
        elif compile != "off" and not can_compile(device.type, compile):
            raise UserError(f"--compile {compile}: torch.compile fails here, as said above: use --compile off")
        teacher = getattr(task, "teacher", None)
        if teacher and precision == "bf16":  # cast once: of frozen weights, autocast would not keep what it casts
            for module in teacher.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.bfloat16()
        self.task = task.to(device, memory_format=torch.channels_last)
        self.model = task.trainable_module
        self.parts: dict[str, Tensor] = {}
        self.shape: torch.Size | None = None  # of the first inputs, for which the models are compiled
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)
        self.compile, self.precision = compile, precision
        if precision == "bf16":
            autocast(self.model, device)
            if teacher:  # timm's has one model, ours a list
                for model in teacher.model if isinstance(teacher.model, nn.ModuleList) else [teacher.model]:
                    autocast(model, device, in_eval=True)
        if compile != "off":
            torch.compiler.reset()  # of the models before in this process, which count towards a limit of eight
            task.compile(mode=compile, dynamic=False)
        if data_parallel.size() > 1:
            task.prepare_distributed([device] if device.type == "cuda" else None, broadcast_buffers=False)
            if not isinstance(task.trainable_module, DistributedDataParallel):
                raise UserError(f"{type(task).__name__}.prepare_distributed has to wrap its trainable_module")

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step on a batch of normalised images. Returns its mean loss, on the device."""
        inputs, targets, weight = data_parallel.share(inputs, targets)
        self.shape = self.shape or inputs.shape
        plain = nullcontext()
        if self.compile != "off" and inputs.shape != self.shape:
            plain = torch.compiler.set_stance("force_eager")  # an epoch's last batch is not worth compiling for
        if self.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with plain:
            result = self.task(inputs.contiguous(memory_format=torch.channels_last), targets)
            (result["loss"] * weight).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # at the end: CUDA graphs write the next gradients to the same place
        losses = {k: data_parallel.mean(v.detach() * weight) for k, v in result.items() if k.endswith("loss")}
        loss = losses.pop("loss")
        self.parts = losses
        return loss

    def momentum(self) -> dict[str, Tensor]:
        """The optimiser's state, by the parameters' names. Empty before the first step, and with --momentum 0."""
        state = self.optimizer.state
        named = {name: state[p].get("momentum_buffer") for name, p in self.model.named_parameters() if p in state}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def restore(self, weights: dict[str, Tensor], momentum: dict[str, Tensor]) -> None:
        """Put a checkpoint's weights and momenta in place."""
        self.model.load_state_dict(weights)
        parameters = dict(self.model.named_parameters())
        for name, tensor in momentum.items():  # laid out in memory as its parameter is, which the fused step relies on
            parameter = parameters[name]
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(tensor)

    def is_finite(self) -> bool:
        """Whether the norm of all weights and running statistics is."""
        tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        return bool(nn.utils.get_total_norm(tensors).isfinite())


def check_trainable(task: TrainingTask) -> None:
    """Refuse a task that has more to train than the model whose logits are evaluated, as the projection of timm's
    `FeatureDistillationTask`: optimiser, checkpoint and weights are of that model alone.

    Raises:
        UserError: it names the parameter, where there is one.
    """
    model, teacher = task.trainable_module, getattr(task, "teacher", None)
    trained = {*model.parameters(), *(teacher.parameters() if teacher else ())}
    outside = [name for name, p in task.named_parameters() if p.requires_grad and p not in trained]
    if outside or task.get_eval_model() is not model:
        raise UserError(
            f"{type(task).__name__} cannot be trained here: only a task's trainable_module is trained and saved, "
            f"and it has to give logits{f'; {outside[0]} is outside it' if outside else ''}"
        )
    if slash := next((name for name in model.state_dict() if "/" in name), None):  # it separates names in checkpoints
        raise UserError(f"{slash} cannot be the name of a part of the network: it must have no slash")


def autocast(model: nn.Module, device: torch.device, in_eval: bool = False) -> None:
    """Have `model` compute in bfloat16 where that is safe, and return float32.

    By default only while it trains, for what is evaluated for its calibration should not be rounded: bfloat16 has 8
    bits, so that logits of 8 to 16 come in steps of 1/16. Measured on CIFAR-100, five epochs in, it changed one or two
    predictions in a hundred, and for as many images the first two classes came out equal.
    """
    forward = model.forward
    if device.type == "cpu" and not in_eval:
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and max(module.stride) > 1:
                module.forward = in_fp32(module.forward)

    def forward_in_bf16(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=model.training or in_eval):
            return forward(x).float()

    model.forward = forward_in_bf16


def in_fp32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`forward` without a CPU's autocast: for strided depthwise convolutions, whose backward pass takes torch 2.11 some
    16 times as long in bf16 as in fp32. ShuffleNetV1's three were a fifth of its step on an EPYC core."""

    def forward_in_fp32(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    return forward_in_fp32


def has_bf16(device: str) -> bool:
    """Whether torch computes in bfloat16 by instructions that `device`, cpu or cuda, has for it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()  # the second is Arm's
    return torch.backends.mkldnn.is_available() and any(cpu.get(name, False) for name in ("avx512_bf16", "bf16"))


def auto_compile(device: str, images: int) -> Compile:
    """What `--compile auto` is for a run of so many training images: on a GPU, from so many on that the minutes of
    compilation are won back many times over, CUDA graphs, for the models' kernels are so short that launching them one
    by one takes longer. Not measured yet. Off on a CPU, for compiled, ShuffleNetV1 trains at 0.9 of its speed on an
    EPYC core, in fp32 and in bf16; and for one run on several GPUs."""
    pays = device == "cuda" and data_parallel.size() == 1 and images >= 2_000_000
    return "reduce-overhead" if pays and can_compile(device, "reduce-overhead") else "off"


@functools.cache
def can_compile(device: str, mode: str) -> bool:
    """Whether `torch.compile` finds what it needs here, a C++ compiler and Python's headers among it, to train in this
    mode. It is tried, for three steps: CUDA graphs are recorded in the second and replayed in the third."""
    try:
        with torch.random.fork_rng(devices=()):
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).to(device)
        compiled = torch.compile(model, mode=mode, dynamic=False)
        for _ in range(3):
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            compiled(torch.zeros(2, 3, 8, 8, device=device)).sum().backward()
            model.zero_grad()
    except Exception as error:  # whatever it is that is missing
        reason = first_line(error)[:200]
        print(f"warning: training is slower, because torch.compile fails here: {reason}", file=sys.stderr)
        return False
    return True
