"""Kills, signals, full disks, damaged checkpoints, two at once: nothing is lost, and the same command goes on."""

import csv
import errno
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, THREE_STEPS, Killed, die, in_epoch, run_row

import checkpoint
import common
from command_line import orderly_end
from run_files import UserError, atomic_write, locked


def killed_run(tmp_path, monkeypatch, epoch: int = 3, **settings) -> Path:
    """A run that died in an epoch. Returns its folder."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        in_epoch(patch, epoch)
        run_row("student_baseline", tmp_path, **{**THREE_STEPS, **settings})
    return next(tmp_path.glob("smoke/*/seed*"))


def files(path: Path) -> dict[str, object]:
    """What a run has left, without its times."""
    found = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    found["history.csv"] = [
        {**line, "seconds": None} for line in csv.DictReader(found["history.csv"].decode().splitlines())
    ]
    result = json.loads(found["result.json"])
    found["result.json"] = {k: v for k, v in result.items() if k not in ("train_seconds", "images_per_second")}
    found["result.json"]["settings"]["results_dir"] = None
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, object]:
    """What the run that the tests below disturb leaves when it is left alone."""
    os.environ["WANDB_MODE"] = "disabled"
    return files(run_row("student_baseline", tmp_path_factory.mktemp("whole"), **THREE_STEPS)[1])


@pytest.mark.slow
def test_kill_9_at_random_moments():
    command = [sys.executable, ROOT / "benchmarks" / "kills.py", "--kills", "4", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert re.match(r"4 kills, \d of them in the middle of a write", done.stdout)


def test_a_log_has_an_epoch_when_it_is_over(tmp_path):
    command = [sys.executable, ROOT / "recipes" / "student_baseline.py", "--protocol", "smoke", "--epochs", "500"]
    command += ["--train-size", "96", "--results-dir", tmp_path]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert re.match("epoch +1/500", run.stdout.readline())
        history = next(tmp_path.glob("smoke/*/seed*/history.csv")).read_text()
        run.kill()
    assert len(history.splitlines()) < 20  # a buffer would have been full after some 80


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_signal_ends_the_run_within_the_step_and_it_resumes(name, code, tmp_path, monkeypatch, capsys, whole):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        in_epoch(patch, 2, do=lambda: os.kill(os.getpid(), getattr(signal, name)))
        patch.setattr(sys, "argv", ["student_baseline", "--protocol", "smoke", "--results-dir", str(tmp_path), *FLAGS])
        common.cli(common.load_recipe("student_baseline"))
    assert stop.value.code == code and signal.getsignal(signal.SIGTERM) == handler
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stopped by {name}: the same command goes on after the last finished epoch")
    folder = next(tmp_path.glob("smoke/*/seed*"))
    assert len(checkpoint.load(folder)["history"]) == 1
    assert files(run_row("student_baseline", tmp_path, **THREE_STEPS)[1]) == whole


def test_a_signal_is_no_error_to_be_passed_over_and_a_second_one_kills():
    with pytest.raises(SystemExit) as stop, orderly_end():
        try:
            with suppress(Exception):  # as around W&B
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
        finally:
            handlers = {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    assert stop.value.code == 143 and handlers == {signal.SIG_DFL}


FLAGS = ["--epochs", "3", "--train-size", "96", "--batch-size", "32"]


def test_a_signal_closes_wandb_as_preempted(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(common.Tracker, "preempted", lambda self, code: calls.append(code))
    in_epoch(monkeypatch, 1, do=lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit), orderly_end():
        run_row("student_baseline", tmp_path, **THREE_STEPS)
    assert calls == [75]


@pytest.mark.parametrize("row", ["student_baseline", "student_ensemble"])
def test_so_does_one_that_comes_while_the_result_is_written(row, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(common.Tracker, "preempted", lambda self, code: calls.append(code))
    settings = THREE_STEPS if row == "student_baseline" else {"members": ("student_baseline",), "weights": (1.0,)}
    if row == "student_ensemble":
        run_row("student_baseline", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit), orderly_end():
        patch.setattr(common, "scores_of_run", lambda arrays: os.kill(os.getpid(), signal.SIGTERM))
        run_row(row, tmp_path, **settings)
    assert calls == [143]
    assert run_row(row, tmp_path, **settings)[0]["row"] == row  # and the same command goes on


def test_a_kill_between_the_last_checkpoint_and_its_line_in_the_history_loses_no_line(tmp_path, monkeypatch, whole):
    def write(path, lines):
        die() if len(lines) == 3 else real(path, lines)

    real = common.write_csv
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common, "write_csv", write)
        run_row("student_baseline", tmp_path, **THREE_STEPS)
    logged = []
    monkeypatch.setattr(common.Tracker, "log", lambda self, history, *_: logged.append(len(history)))
    assert files(run_row("student_baseline", tmp_path, **THREE_STEPS)[1]) == whole
    assert logged == [3]


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


DAMAGE = {
    "cut": lambda data: data[:5000],
    "empty": lambda data: b"",
    "bit": flip_a_bit,
    "number": lambda data: data.replace(b'"epoch\\": 2', b'"epoch\\": 3', 1),
    "shape": lambda data: re.sub(rb"\[(\d+),(\d+),3,3\]", rb"[\2,\1,3,3]", data, count=1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, tmp_path, monkeypatch, capsys, whole):
    folder = killed_run(tmp_path, monkeypatch)
    path = folder / checkpoint.NAMES[0]
    whole_bytes = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole_bytes))
    assert path.read_bytes() != whole_bytes
    assert files(run_row("student_baseline", tmp_path, **THREE_STEPS)[1]) == whole
    out, err = capsys.readouterr()
    assert f"warning: {path} is damaged (" in err and "going on from the one before" in err
    assert "resuming after epoch 1 of 3" in out


def test_a_damaged_checkpoint_never_becomes_the_one_before(tmp_path):
    path = tmp_path / checkpoint.NAMES[0]
    checkpoint.save(tmp_path, {"epoch": 1, "w": torch.ones(9)})
    for epoch in (2, 3):
        checkpoint.save(tmp_path, {"epoch": epoch, "w": torch.ones(9)})
        path.write_bytes(path.read_bytes()[:-1])
        assert checkpoint.load(tmp_path)["epoch"] == 1


def test_with_both_checkpoints_damaged_nothing_starts_over(tmp_path, monkeypatch):
    folder = killed_run(tmp_path, monkeypatch)
    contents = []
    for name in checkpoint.NAMES:
        (folder / name).write_bytes(flip_a_bit((folder / name).read_bytes()))
        contents.append((folder / name).read_bytes())
    with pytest.raises(UserError, match=rf"{checkpoint.NAMES[0]} is damaged .* and .* delete {folder} to start"):
        run_row("student_baseline", tmp_path, **THREE_STEPS)
    assert [(folder / name).read_bytes() for name in checkpoint.NAMES] == contents


def test_a_kill_between_the_two_renames_costs_an_epoch(tmp_path, monkeypatch, whole):
    folder = killed_run(tmp_path, monkeypatch)
    os.replace(*(folder / name for name in checkpoint.NAMES))
    assert files(run_row("student_baseline", tmp_path, **THREE_STEPS)[1]) == whole


def test_a_kill_while_checkpoints_are_removed_leaves_the_last_one(tmp_path, monkeypatch):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, {"epoch": epoch})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", lambda path, **_: os.remove(path) or die())
        checkpoint.remove(tmp_path)
    assert checkpoint.load(tmp_path)["epoch"] == 2


def test_checkpoints_hold_nested_states_exactly(tmp_path):
    shared = torch.randn(3, 2)
    state = {"a": {"b": {"w.x": shared, "n": 1 / 3}, "c": shared}, "list": [{"loss": float("inf")}], "none": None}
    assert checkpoint.load(tmp_path) is None
    checkpoint.save(tmp_path, state)
    checkpoint.save(tmp_path, {**state, "none": 2})
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(loaded["a"]["b"].pop("w.x"), shared) and torch.equal(loaded["a"].pop("c"), shared)
    assert loaded == {"a": {"b": {"n": 1 / 3}}, "list": [{"loss": float("inf")}], "none": 2}
    (tmp_path / checkpoint.NAMES[0]).unlink()
    assert checkpoint.load(tmp_path)["none"] is None
    checkpoint.remove(tmp_path)
    with pytest.raises(ValueError, match="has no slash: 'w/x'"):
        checkpoint.save(tmp_path, {"a": {"w/x": shared}})
    assert not list(tmp_path.iterdir())


def test_atomic_write_leaves_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(Killed), atomic_write(path) as file:
        file.write(b"half of the new")
        die()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_content_is_on_the_disk_before_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    """Else a power cut leaves a name of nothing, or the file of the epoch before."""
    done, replace = [], os.replace

    def fsync(file: int) -> None:
        about = os.fstat(file)
        done.append("folder" if stat.S_ISDIR(about.st_mode) else f"{about.st_size} bytes")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("name") or replace(*names))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert done == ["3 bytes", "name", "folder"]


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_folders_that_cannot_be_synced_are_no_failure_but_a_broken_disk_is(reason, tmp_path, monkeypatch):
    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "fsync", fsync)
    fails = pytest.raises(OSError, match="Input/output") if reason == errno.EIO else nullcontext()
    with fails, atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


# Disks ---------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, megabytes: int):
    """A file system of its own, in memory, at `folder`."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], capture_output=True)
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def cover(folder: Path) -> None:
    """Mount an empty file system over it that cannot be written to."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_full_disk_costs_the_epoch_it_fell_in(tmp_path, capsys, whole):
    disk = tmp_path / "disk"
    with mounted(disk, 30):  # room for two checkpoints of 11 MB
        with pytest.raises(SystemExit) as stop, orderly_end():
            run_row("student_baseline", disk, **THREE_STEPS)
        assert stop.value.code == 74
        error = capsys.readouterr().err.splitlines()
        [name] = re.findall("^error: (.*): No space left on device; what was finished before is intact$", *error)
        assert Path(name).is_relative_to(disk)
        assert len(checkpoint.load(next(disk.glob("smoke/*/seed*")))["history"]) == 2
        assert not list(disk.rglob("*.tmp"))
        remount(disk, "size=100m")
        assert files(run_row("student_baseline", disk, **THREE_STEPS)[1]) == whole


def test_a_drive_that_goes_away_is_one_line(tmp_path, monkeypatch, capsys, whole):
    disk = tmp_path / "disk"
    with mounted(disk, 100):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop, orderly_end():
            in_epoch(
                patch, 2, do=lambda: subprocess.run([*["mount", "-t", "tmpfs", "-o", "ro", "none"], disk], check=True)
            )
            run_row("student_baseline", disk, **THREE_STEPS)
        subprocess.run(["umount", disk], check=True)
        assert stop.value.code == 74
        assert re.fullmatch(r"error: \S+: Read-only file system; what was .* is intact\n", capsys.readouterr().err)
        assert files(run_row("student_baseline", disk, **THREE_STEPS)[1]) == whole
        assert "resuming after epoch 1 of 3" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    monkeypatch.setattr(common.Run, "_train", lambda *args: pytest.fail("trained"))
    with mounted(folder, 1):
        remount(folder, "ro")
        with pytest.raises(SystemExit) as stop, orderly_end():
            run_row("student_baseline", folder)
    assert stop.value.code == 74 and "Read-only file system" in capsys.readouterr().err


# Two at once ---------------------------------------------------------------------------------------------


def test_the_second_waits_says_for_whom_and_takes_the_result(tmp_path, capsys, monkeypatch):
    _, folder = run_row("student_baseline", tmp_path)
    result = (folder / "result.json").rename(tmp_path / "result.json")  # not finished yet
    code = f"import run_files, pathlib\nwith run_files.locked(pathlib.Path({str(folder)!r})): print('held'); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pool = ThreadPoolExecutor(1)
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(common.Run, "_train", lambda *args: pytest.fail("trained a second time"))
        second = pool.submit(run_row, "student_baseline", tmp_path)
        out = ""
        while "waiting" not in out:
            assert not second.done()
            time.sleep(0.05)
            out += capsys.readouterr().out
        assert re.search(rf"process {holder.pid} on \S+ is at work in {folder}: waiting for it", out)
        result.rename(folder / "result.json")
    finally:
        holder.kill()  # a dead process holds no lock
        holder.wait()
    assert second.result(60)[1] == folder
    with locked(folder):
        assert (folder.parent / f".{folder.name}.lock").read_text().startswith(f"{os.getpid()}\n")


def test_a_lock_is_for_everybody_who_may_write_there(tmp_path):
    """It stays, and another user of a shared folder could not even open it."""
    before = os.umask(0o022)
    try:
        with locked(tmp_path / "run"):
            assert stat.S_IMODE((tmp_path / ".run.lock").stat().st_mode) == 0o666
    finally:
        os.umask(before)


@pytest.mark.slow
def test_two_students_at_once_train_their_teacher_once(tmp_path):
    command = [sys.executable, ROOT / "recipes" / "kd_mixup.py", "--protocol", "smoke", "--epochs", "1"]
    command += ["--train-size", "96", "--results-dir", tmp_path]
    students = [
        subprocess.Popen([*command, "--temperature", t], stdout=subprocess.PIPE, text=True) for t in ("4", "20")
    ]
    outs = [student.communicate()[0] for student in students]
    assert [student.returncode for student in students] == [0, 0]
    assert len(re.findall("^epoch", "".join(outs), re.MULTILINE)) == 3  # a teacher's and two students'


# Training gone wrong -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_at_once(tmp_path):
    message = r"the loss is (nan|inf) at step \d of epoch 1, at learning rate 900000: try a smaller --lr$"
    with pytest.raises(UserError, match=message):
        run_row("student_baseline", tmp_path, lr=9e5, weight_decay=9e5, epochs=3, batch_size=32)
    assert not list(tmp_path.glob("smoke/*/seed*"))


@pytest.mark.parametrize(
    "tensors, value, message",
    [
        ("parameters", math.inf, "the weights are no longer finite at step 3 of epoch 2, .* of epoch 1 is still good"),
        ("buffers", math.inf, "the weights are no longer finite at step 3 of epoch 2, .* of epoch 1 is still good"),
        ("parameters", 1e15, "the model's outputs are no longer finite: try a smaller --lr"),
    ],
)
def test_a_model_that_is_not_finite_is_never_saved(tensors, value, message, tmp_path, monkeypatch):
    folder = killed_run(tmp_path, monkeypatch, epoch=2)
    before = (folder / checkpoint.NAMES[0]).read_bytes()
    real, steps = common.Trainer.step, []

    def step(trainer, *batch):
        loss = real(trainer, *batch)
        steps.append(loss)
        if len(steps) == 3:  # after the last loss of epoch 2
            for tensor in getattr(trainer.model, tensors)():
                if tensor.is_floating_point():
                    tensor.data.fill_(value)
        return loss

    monkeypatch.setattr(common.Trainer, "step", step)
    with pytest.raises(UserError, match=message):
        run_row("student_baseline", tmp_path, **THREE_STEPS)
    assert (folder / checkpoint.NAMES[0]).read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),  # since cuDNN 9
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),  # oneDNN's, where `ulimit -v` leaves it too little
        MemoryError("Unable to allocate 30.0 TiB for an array"),
    ],
    ids=str,
)
def test_out_of_memory_names_the_flag(error, tmp_path, monkeypatch):
    def step(*args):
        raise error

    monkeypatch.setattr(common.Trainer, "step", step)
    with pytest.raises(UserError, match=r"^out of memory: try a smaller --batch-size"):
        run_row("student_baseline", tmp_path, **THREE_STEPS)


def test_a_gpu_that_torch_cannot_use_is_named(tmp_path, monkeypatch):
    def step(*args):
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nCUDA ker")

    monkeypatch.setattr(common.Trainer, "step", step)
    with pytest.raises(UserError, match=r"the GPU cannot be used .*on the device.: see README, or use --device cpu"):
        run_row("student_baseline", tmp_path, **THREE_STEPS)


def test_a_network_that_was_edited_in_between_is_named(tmp_path, monkeypatch):
    killed_run(tmp_path, monkeypatch)
    create = common.timm.create_model
    monkeypatch.setattr(common.timm, "create_model", lambda name, **kwargs: create("wrn_40_2", **kwargs))
    with pytest.raises(UserError, match="was begun with another network: start student_baseline over with --overwrite"):
        run_row("student_baseline", tmp_path, **THREE_STEPS)


def test_another_fault_of_the_device_is_not_taken_for_it(tmp_path, monkeypatch):
    def step(*args):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")

    monkeypatch.setattr(common.Trainer, "step", step)
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        run_row("student_baseline", tmp_path, **THREE_STEPS)


def test_where_shared_outputs_cannot_be_kept_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def save(outputs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(common.EpochOutputs, "save", save)
    run_row("kd_cutmix", tmp_path, share_teachers=True)
    assert "warning: teachers' outputs are not shared: [Errno 28] No space left" in capsys.readouterr().err


def test_other_versions_than_at_the_start_are_named_and_both_recorded(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(common, "versions", lambda: {**real_versions, "torch": "2.10.0"})
        killed_run(tmp_path, monkeypatch)
    result, _ = run_row("student_baseline", tmp_path, **THREE_STEPS)
    assert f"begun with torch 2.10.0, now {torch.__version__}: result.json names both" in capsys.readouterr().err
    assert result["versions"].items() >= real_versions.items()
    [earlier] = result["earlier_versions"]
    assert earlier == {**result["versions"], "torch": "2.10.0", "hardware": result["hardware"]}


real_versions = common.versions()


def test_signs_that_a_locale_lacks_are_no_reason_to_fail():
    code = "from command_line import orderly_end\nwith orderly_end():\n    print('1 → 2 ± 3')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert run.stdout == b"1 ? 2 ? 3\n"
