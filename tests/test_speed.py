"""Every fast path against the plain one it stands for."""

import gc
import platform
import random
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import JsdCrossEntropy
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

import augmentation
import common
import training
from augmentation import CutMix
from run_files import UserError
from training import Trainer, auto_compile, can_compile

sys.path.insert(0, str(Path(common.__file__).parent / "benchmarks"))
import new_gpu
import speed


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 40)], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.05])  # so small an alpha draws lambdas that are exactly 1
def test_cutmix_gives_what_timms_loop_gives(size, alpha):
    ones = 0
    for seed in range(20):
        images, labels = torch.randn(30, 3, *size), torch.randint(10, (30,))
        np.random.seed(seed)
        timm = Mixup(0.0, alpha, mode="elem", label_smoothing=0.0, num_classes=10)
        expected = timm(images.clone(), labels)
        following = np.random.rand()
        np.random.seed(seed)
        ours = CutMix(alpha, 10)(images.clone(), labels)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
        assert np.random.rand() == following  # nothing more and nothing less was drawn
        ones += (expected[1].amax(1) == 1).sum()
    assert alpha == 1 or ones > 0


@pytest.mark.parametrize("size", [32, 16])
def test_cutout_gives_what_timms_loop_gives_on_the_images(size):
    images, labels = torch.randint(256, (40, 3, size, size), dtype=torch.uint8), torch.arange(40)
    random.seed(0), torch.manual_seed(0)
    ours, _ = common.CutOut(0.5)(images, labels)
    following = random.random()
    random.seed(0), torch.manual_seed(0)
    plain, _ = common.Standard()(images, labels)
    hole = size // 2
    area = hole**2 / (size + hole - 1) ** 2
    erase = RandomErasing(1.0, area, area, min_aspect=1.0, max_aspect=1.0, device="cpu")
    before, after = hole // 2, hole - 1 - hole // 2
    expected = erase(F.pad(plain, (before, after, before, after)))[..., before : before + size, before : before + size]
    assert torch.equal(ours, expected) and not torch.equal(ours, plain)
    assert random.random() == following  # nothing more and nothing less was drawn


def make_task(kind: str, seed: int = 0) -> TrainingTask:
    """The tasks of the recipes, from the same weights each time."""
    torch.manual_seed(seed)
    student = timm.create_model("wrn_40_2" if kind.startswith("wrn") else "shufflenet_v1", num_classes=10)
    criterion = JsdCrossEntropy(alpha=12, smoothing=0) if kind == "wrn jsd" else nn.CrossEntropyLoss()
    if kind.startswith("kd"):
        teachers = common.Teacher(*(trained_looking("wrn_40_2") for _ in range(int(kind[-1]))))
        weights = dict(distill_loss_weight=0.8, task_loss_weight=0.2, temperature=4.0)
        if kind == "kd 1":
            return LogitDistillationTask(student, teachers, criterion, **weights)
        return common.EnsembleDistillationTask(student, teachers, "add", criterion=criterion, **weights)
    return ClassificationTask(student, criterion)


def trained_looking(name: str) -> nn.Module:
    """A model whose batch norms have been somewhere, so that folding them changes something."""
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def losses(
    kind: str, steps: int, lr: float, plain: bool = False, dtype=torch.float32, **settings
) -> tuple[list[float], nn.Module]:
    """The loss of each step, the last one on a smaller batch: by `Trainer`, or by the plainest loop."""
    task, views = make_task(kind), 3 if kind == "wrn jsd" else 1
    torch.manual_seed(1)
    sizes = [8] * (steps - 1) + [6]
    batches = [(torch.randn(size * views, 3, 16, 16).to(dtype), torch.randint(10, (size,))) for size in sizes]
    hyper = dict(lr=lr, momentum=0.8, weight_decay=5e-4)
    task.to(dtype).train()
    if not plain:
        trainer = Trainer(task, torch.device("cpu"), 1000, **hyper, **settings)
        task.train()
        return [trainer.step(*batch).item() for batch in batches], trainer.model
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), **hyper, foreach=False)
    values = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = task(inputs, targets)["loss"]
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, task.trainable_module


KINDS = ["wrn", "wrn jsd", "shufflenet", "kd 1", "kd 4"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_plain_loops(kind):
    """In float64, where nothing but the mathematics can make a difference: float32's rounding, which depends on the
    memory format, moves these models' first gradients by a percent, whatever computes them."""
    lr = 1e-3 if kind.startswith("wrn") else 1e-5
    fast, model = losses(kind, 6, lr, dtype=torch.float64)
    plain, plain_model = losses(kind, 6, lr, plain=True, dtype=torch.float64)
    assert fast == pytest.approx(plain, rel=1e-8)
    for ours, theirs in zip(model.state_dict().values(), plain_model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_in_float32_give_the_plain_loops_losses(kind):
    """With steps so small that rounding has no time to grow."""
    lr = 1e-5 if kind.startswith("wrn") else 1e-8
    fast, plain = losses(kind, 20, lr)[0], losses(kind, 20, lr, plain=True)[0]
    assert fast == pytest.approx(plain, rel=1e-5)
    assert len(set(plain)) == 20


@pytest.mark.slow
def test_compiled_gives_the_eager_losses():
    if not can_compile("cpu", "default"):
        pytest.skip("needs a C++ compiler")
    kind = "kd 4"
    compiled, model = losses(kind, 20, 1e-8, compile="default")
    eager, _ = losses(kind, 20, 1e-8, compile="off")
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert list(model.state_dict()) == list(make_task(kind).trainable_module.state_dict())  # files keep their names


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_memory_that_nobody_wrote(kind):
    """So --deterministic need not fill it beforehand: filled with NaN, it makes no difference to a bit."""
    try:
        left, model = losses(kind, 3, 1e-3, deterministic=True)
        assert not torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
        filled, filled_model = losses(kind, 3, 1e-3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert left == filled
    assert all(map(torch.equal, model.state_dict().values(), filled_model.state_dict().values()))


def test_bf16_is_near_fp32_with_losses_and_weights_in_fp32():
    fast, model = losses("kd 1", 5, 1e-7, precision="bf16")
    full, _ = losses("kd 1", 5, 1e-7, precision="fp32")
    assert fast != full and fast == pytest.approx(full, rel=0.03)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    images, rounded = torch.randn(2, 3, 16, 16), lambda logits: torch.equal(logits, logits.bfloat16().float())
    assert rounded(model.train()(images)) and model(images).dtype == torch.float32
    assert not rounded(model.eval()(images))
    plain = timm.create_model("shufflenet_v1", num_classes=10).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), plain(images))


def test_in_bf16_a_cpu_has_strided_depthwise_convolutions_in_fp32():
    task, found = make_task("shufflenet"), Counter()
    for module in task.trainable_module.modules():
        if isinstance(module, nn.Conv2d):
            slow = module.groups == module.in_channels and module.stride == (2, 2)
            module.register_forward_hook(lambda conv, _, out, slow=slow: found.update([(slow, out.dtype)]))
    trainer = Trainer(task, torch.device("cpu"), 1000, lr=0.1, momentum=0, weight_decay=0, precision="bf16")
    task.train()
    trainer.step(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert found == {(True, torch.float32): 3, (False, torch.bfloat16): 46}


def test_gradients_reach_batch_norm_in_one_piece():
    """A slice of a concatenation's gradient would have torch's batch norm of a CPU take several times as long."""
    model, seen = timm.create_model("shufflenet_v1").to(memory_format=torch.channels_last), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, out: out.register_hook(seen.append) and None)
    model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()
    assert len(seen) == 49 and all(grad.is_contiguous(memory_format=torch.channels_last) for grad in seen)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_that_is_freed_is_not_taken_from_the_system_again():
    """In a process of its own, for a worker of pytest may run its tests in another thread, which has smaller heaps."""
    program = """
import resource, torch, training
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, or 16,384 pages of 4 KiB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    python = [sys.executable, "-c", program]
    answer = subprocess.run(python, cwd=common.ROOT, capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 1000


@pytest.mark.parametrize("cpu", [{"avx512_bf16": True}, {"avx2": True, "avx512_bf16": False}, {"bf16": True}])
def test_bf16_that_is_emulated_is_warned_of(monkeypatch, capsys, cpu):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    for precision in ("auto", "fp32", "bf16"):
        assert not capsys.readouterr().err
        Trainer(make_task("wrn"), torch.device("cpu"), 0, lr=0.1, momentum=0, weight_decay=0, precision=precision)
    emulated = "avx2" in cpu
    assert ("--precision fp32" in capsys.readouterr().err) == emulated


@pytest.mark.parametrize("kind", ["kd 1", "kd 4"])
def test_a_teacher_cast_once_says_what_autocast_has_it_say(kind):
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    task = make_task(kind).to(memory_format=torch.channels_last).eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = task.teacher(images).float()
    Trainer(task, torch.device("cpu"), 1000, lr=0.1, momentum=0, weight_decay=0, precision="bf16")
    assert torch.equal(task.teacher(images), expected)
    products = [module for module in task.teacher.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert {module.weight.dtype for module in products} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["wrn_40_2", "shufflenet_v1"])
def test_folded_teacher_gives_the_models_logits(name):
    model = trained_looking(name).eval()
    images = torch.randn(32, 3, 16, 16)
    expected = model(images)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = common.Teacher(model)
    folded = sum(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    assert folded < sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (teacher(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())  # the model itself is as it was
    both = common.Teacher(model, model)(images)
    torch.testing.assert_close(both, torch.stack([teacher(images)] * 2))


@pytest.mark.parametrize("ask", [lambda x: len(x), lambda x: [None for _ in range(x.shape[2])]])
def test_a_network_that_cannot_be_traced_teaches_as_it_is(ask):
    class Untraceable(nn.Sequential):
        def forward(self, x):
            ask(x)
            return super().forward(x)

    model, images = Untraceable(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)
    assert torch.equal(common.Teacher(model)(images), model.eval()(images))


def test_auto_compiles_long_runs_on_a_single_gpu(monkeypatch):
    graphs = "reduce-overhead"
    monkeypatch.setattr(training, "can_compile", lambda device, mode: mode == graphs)
    assert auto_compile("cuda", 2_000_000) == graphs and auto_compile("cuda", 1_999_999) == "off"
    assert auto_compile("cpu", 10**9) == "off"
    monkeypatch.setattr(training, "can_compile", lambda device, mode: False)
    assert auto_compile("cuda", 10**9) == "off"
    monkeypatch.setattr(training, "can_compile", lambda device, mode: True)
    monkeypatch.setattr(training.data_parallel, "size", lambda: 2)
    assert auto_compile("cuda", 10**9) == "off"


def test_compile_is_what_was_asked_for(monkeypatch):
    def chosen(**settings) -> tuple[str, str]:
        hyper = dict(lr=0.1, momentum=0, weight_decay=0)
        trainer = Trainer(make_task("wrn"), torch.device("cpu"), 10**9, **hyper, **settings)
        return trainer.compile, trainer.precision

    monkeypatch.setattr(training, "can_compile", lambda device, mode: True)
    assert chosen() == ("off", "fp32") and chosen(precision="bf16") == ("off", "bf16")
    assert chosen(compile="default", precision="bf16") == ("default", "bf16")
    monkeypatch.setattr(training, "can_compile", lambda device, mode: False)
    with pytest.raises(UserError, match=r"--compile default: torch.compile fails here, .*: use --compile off"):
        chosen(compile="default")


def test_one_run_on_several_gpus_is_not_compiled(monkeypatch):
    monkeypatch.setattr(training.data_parallel, "size", lambda: 2)
    with pytest.raises(UserError, match="--compile default: one run on several GPUs is not compiled"):
        Trainer(make_task("wrn"), torch.device("cuda"), 1, lr=0.1, momentum=0, weight_decay=0, compile="default")


def test_each_run_of_a_process_is_compiled_once(monkeypatch):
    """Dynamo compiles one function for so many models and then stays eager, which student_ensemble would come to; and
    an epoch's last batch, which is smaller, is not compiled for."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, backend, mode, **kwargs: real(model, backend="eager", **kwargs))
    monkeypatch.setattr(training, "can_compile", lambda device, mode: True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    inputs, targets = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    for width in range(1, 5):
        model = nn.Sequential(nn.Conv2d(3, width, 8), nn.Flatten(), nn.Linear(width, 10))
        task = ClassificationTask(model, nn.CrossEntropyLoss())
        hyper = dict(lr=0.1, momentum=0.9, weight_decay=0.0)
        trainer = Trainer(task, torch.device("cpu"), 1, **hyper, compile="default")
        for size in (2, 1, 2):
            assert trainer.step(inputs[:size], targets[:size]).isfinite()


def test_a_compiler_that_fails_is_noticed_and_named(monkeypatch, capsys):
    def fail(function, **settings):
        raise RuntimeError("fatal error: Python.h: No such file or directory")

    can_compile.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", fail)
        assert not can_compile("cpu", "default")
    assert "torch.compile fails here: fatal error: Python.h" in capsys.readouterr().err
    can_compile.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rows nothing", "--rows nothing is found in the name of no row"),
        ("--rows [", r"--rows \[ is not a regular expression"),
        ("--repeats 0", "--repeats must be 1 or more"),
        ("--workers -1", "--workers 0 or more"),
    ],
)
def test_a_benchmark_of_nothing_is_refused(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--dataset", "digits", "--out", str(tmp_path), *arguments.split()])
    with pytest.raises(UserError, match=message):
        speed.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_benchmark_measures_the_recipes(monkeypatch, tmp_path):
    """Not how fast they are, but that every kind of line can be measured, and the table written."""
    monkeypatch.setattr(speed, "start_up", lambda repeats: (2.0, 1.0))
    monkeypatch.setattr(common, "hardware", lambda device: "NVIDIA H200")
    cfg = speed.Config(
        dataset="digits", rows="AugMix$|shared|eval", seconds=0.0, repeats=1, workers=0, compile="off", out=tmp_path
    )
    monkeypatch.setattr(speed, "parse", lambda *_: cfg)
    speed.main()
    text = (tmp_path / "nvidia-h200-compile-off.md").read_text()
    ratios, work, floors = (
        [line.strip("| ").split(" | ") for line in part.splitlines()[2:] if line.startswith("| ")]
        for part in text.split("\n| | ")[1:]
    )
    assert [line[0] for line in ratios] == [
        "teacher, AugMix", "KD, four teachers, shared", "input, AugMix", "evaluation, student"
    ]  # fmt: skip
    assert all(float(number.replace(",", "")) > 0 for line in ratios for number in line[1:])
    # Three views of 16 x 16 pixels: WRN-40-2 has 82 million multiplications forward, as many twice backward
    assert [line[0] for line in work] == [line[0] for line in floors] == ["teacher, AugMix"]
    assert float(work[0][1]) == pytest.approx(3 * 3 * 2 * 0.0820, rel=0.01) and "convolution" in work[0][3]
    assert float(floors[0][2]) == pytest.approx(float(work[0][1]) * 1e9 * 50_000 / 989e12, abs=0.01)


def test_work_is_that_of_matrix_products_and_convolutions():
    layer, images = nn.Linear(30, 20), torch.randn(8, 30)
    with speed.CountWork() as work:
        layer(images).relu()
    assert work.flops == 2 * 8 * 30 * 20 and work.bytes == 4 * (8 * 30 + 30 * 20 + 20 + 8 * 20)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_a_convolutions_work_is_three_times_its_forward_pass_with_groups_too(groups):
    layer, images = nn.Conv2d(12, 24, 3, padding=1, groups=groups), torch.randn(8, 12, 5, 7, requires_grad=True)
    with speed.CountWork() as work:
        layer(images).sum().backward()
    assert work.flops == 3 * 2 * 8 * (5 * 7) * 24 * (12 // groups) * 9


def test_time_on_a_gpu_is_that_of_its_kernels_and_counted_once(monkeypatch):
    def event(name: str, device: DeviceType, microseconds: int, **more) -> FunctionEvent:
        return FunctionEvent(0, name, 0, 0, microseconds, stack=[], use_device="cuda", device_type=device, **more)

    operation = event("aten::mm", DeviceType.CPU, 500)
    operation.append_kernel("gemm", 0, 60)
    kernels = [event("gemm", DeviceType.CUDA, 60), event("triton_poi_fused_add_0", DeviceType.CUDA, 20)]
    kernels += [event("triton_red_fused_mean_1", DeviceType.CUDA, 20)]
    annotation = event("Optimizer.step#SGD.step", DeviceType.CUDA, 900, is_user_annotation=True)
    events = EventList([operation, *kernels, annotation], use_device="cuda")
    events._build_tree()
    assert {e.key: e.self_device_time_total for e in events.key_averages()}["aten::mm"] == 60  # once more
    monkeypatch.setattr(speed, "profile", lambda **how: nullcontext(events))
    assert speed.time_split(int, torch.device("cuda")) == "`gemm` 60%, `fused by the compiler` 40%"


def test_the_start_that_is_timed_is_a_recipes():
    exec(speed.OUR_START, {})


@pytest.fixture
def bench(monkeypatch) -> new_gpu.Bench:
    """Questions about as little as there can be."""
    monkeypatch.setitem(new_gpu.MODELS, "shufflenet_v1", 2)
    rows = dict(views="teacher_cutmix", models="shufflenet_v1", losses="student_baseline", kernels="shufflenet_v1")
    rows |= dict(speed="kd_vanilla", deterministic="student_baseline", waiting="kd_vanilla")
    for question, row in rows.items():
        monkeypatch.setitem(new_gpu.ROWS, question, (row,))
    build = speed.build
    monkeypatch.setattr(speed, "build", lambda *args, **settings: build(*args, batch_size=16, **settings))
    return new_gpu.Bench(new_gpu.Config(dataset="digits", steps=4, seconds=0.0))


@pytest.mark.slow
def test_what_is_asked_of_a_new_gpu_is_answered(bench, monkeypatch, capsys):
    """On the CPU, which agrees with itself; of views drawn anew and momenta that are lost, it would be seen."""
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    for question in bench.cfg.ask:
        bench.answer(question)
    answers = capsys.readouterr().out
    assert not bench.failed
    assert "0.000 grey levels, 0.0000% of the pixels differ; targets by 0.0e+00" in answers
    errors = [float(error) for error in re.search("models .* fp32 (.*), bf16 (.*)", answers).groups()]
    assert errors[0] < 1e-5 < errors[1] < 0.1
    losses = re.findall(r"losses +student_baseline .*: ([\d.]+)", answers)
    assert len(losses) == 3 and [float(loss) for loss in losses] == pytest.approx([float(losses[0])] * 3, abs=0.1)
    speeds = re.findall(r"speed .* ([\d,]+) images/s, +([\d,.]+) s an epoch, ([\d.]+) s its", answers)
    assert len(speeds) == answers.count("hours         all 14 rows ") == 2
    for rate, epoch, evaluation in speeds:
        assert float(epoch) == pytest.approx(50_000 / float(rate), rel=0.02) and float(evaluation) > 0
    assert answers.count("kernels   ") == 4
    bits = re.findall("([a-z_]+) +compile (.*): again same bits, restored same bits(.*)", answers)
    assert bits == [("student_baseline", "off", ", filled same bits"), ("kd_vanilla", "default", "")]

    monkeypatch.setattr(common, "seed_everything", lambda seed, epoch: None)
    bench.answer("views")
    assert "0.0000%" not in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "restore", lambda self, weights, momentum: self.model.load_state_dict(weights))
    assert "again same bits, restored OTHER bits, filled same bits" in next(bench.deterministic("student_baseline"))


def test_hours_are_those_of_all_rows_with_what_compiling_each_takes(bench, capsys, monkeypatch):
    monkeypatch.setattr(training, "can_compile", lambda device, mode: True)
    bench.device = torch.device("cuda")
    bench.seconds = {"off": {"kd_vanilla": (0.0, 2.0)}, "reduce-overhead": {"kd_vanilla": (720.0, 1.0)}}  # of five rows
    for compile in bench.seconds:
        bench.hours(compile)
    answers = capsys.readouterr().out
    assert "compile off: quick 0.1 h (auto), short 0.7 h, paper 1.4 h\n" in answers
    assert "compile reduce-overhead: quick 1.0 h, short 1.3 h (auto), paper 1.7 h (auto)\n" in answers


def test_an_error_costs_a_new_gpu_no_other_answer(bench, monkeypatch, capsys):
    monkeypatch.setitem(new_gpu.ROWS, "models", ("no_model", "shufflenet_v1"))
    monkeypatch.setattr(sys, "argv", ["new_gpu.py", "--dataset", "digits", "--ask", "models", "views"])
    with pytest.raises(SystemExit) as stop:
        new_gpu.main()
    assert stop.value.code == "error: no answer for models no_model"  # which is status 1
    answers = capsys.readouterr().out
    assert re.search(r"models +no_model +FAILED at new_gpu.py:\d+, RuntimeError: Unknown model", answers)
    assert re.search(r"models +shufflenet_v1 +fp32", answers) and re.search(r"views +teacher_cutmix +largest", answers)


def test_a_gpu_that_an_error_has_cost_is_not_asked_further(bench, monkeypatch, capsys):
    def lost(self):
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(new_gpu.Bench, "synchronize", lost)
    monkeypatch.setitem(new_gpu.ROWS, "models", ("no_model", "shufflenet_v1"))
    monkeypatch.setattr(sys, "argv", ["new_gpu.py", "--dataset", "digits", "--ask", "models", "views"])
    with pytest.raises(SystemExit) as stop:
        new_gpu.main()
    assert stop.value.code == 2
    answers, errors = capsys.readouterr()
    assert "no_model" in answers and "shufflenet_v1" not in answers and "views" not in answers
    assert errors.startswith("error: the GPU is lost to this process") and errors.count("\n") == 1


def test_a_row_of_a_new_gpu_leaves_nothing_to_the_next_even_if_it_fails(bench, monkeypatch, capsys):
    real, alive = bench.trainer, []

    def trainer(*args):
        alive.append(sum(type(thing) is Trainer for thing in gc.get_objects()))
        return real(*args)

    def full(step, *args):
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    monkeypatch.setattr(bench, "trainer", trainer)
    monkeypatch.setattr(new_gpu, "images_per_second", full)
    monkeypatch.setitem(new_gpu.ROWS, "speed", ("student_baseline", "kd_vanilla"))
    bench.answer("speed")
    assert alive == [0, 0] and bench.failed == ["speed student_baseline", "speed kd_vanilla"]
    answers = capsys.readouterr().out
    assert answers.count(", OutOfMemoryError: CUDA out of memory\n") == 2
    assert "not known, for want of student_baseline, kd_vanilla" in answers


def test_where_a_step_waits_for_a_gpu_is_named(bench, monkeypatch):
    bench.device, modes = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    lines = Path(augmentation.__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "torch.randint(" in text)
    errors = {"called a synchronizing CUDA operation": f"WAITS at augmentation.py:{line}", "CUDA error: other": None}
    for message, answer in errors.items():
        draws = [torch.zeros(2, 16, dtype=torch.int64), RuntimeError(message)]  # of a first step, and of a second
        monkeypatch.setattr(torch, "randint", Mock(side_effect=draws))
        with nullcontext() if answer else pytest.raises(RuntimeError, match=message):
            assert list(bench.waiting("kd_vanilla")) == [answer]
    assert modes == ["error", "default"] * 2


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # mkldnn.flags sets what only Intel's GPUs have
def test_convolutions_without_onednn_are_not_nnpacks():
    convolution, images = torch.nn.Conv2d(3, 8, 3, padding=1), torch.randn(16, 3, 8, 8)
    with torch.backends.mkldnn.flags(enabled=False), torch.profiler.profile(acc_events=True) as profile:
        convolution(images)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_slow_conv2d_forward" in names and "aten::_nnpack_spatial_convolution" not in names
