"""Teachers' outputs shared between students: nothing but time may change."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Killed, in_epoch, run_row

import common
from teacher_outputs import EpochOutputs

# Three steps an epoch, the last one shorter than the others
TWO_EPOCHS = dict(epochs=2, train_size=80, batch_size=32)
ONE = ("kd_mixup", dict(teacher="teacher_baseline"))
TWO = ("kd_ensemble_avg_loss", dict(teachers=("teacher_baseline", "teacher_cutmix")))


def asked(monkeypatch) -> list[int]:
    """Grows by the number of images that teachers are shown."""
    images, real = [], common.Teacher.forward

    def forward(self, views, return_features=False):
        before = len(self.outputs.recorded) if self.outputs else -1
        logits = real(self, views, return_features)
        if self.outputs is None or len(self.outputs.recorded) > before:
            images.append(len(views))
        return logits

    monkeypatch.setattr(common.Teacher, "forward", forward)
    return images


def history(path):
    lines = list(csv.DictReader((path / "history.csv").open()))
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same_bits(a, b) -> bool:
    files = ("model.safetensors", "best.safetensors", "probabilities.npz")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files) and history(a) == history(b)


@pytest.mark.slow
def test_students_that_share_give_the_same_bits_and_ask_a_teacher_once(tmp_path, monkeypatch):
    def run(settings, **more):
        row, settings = settings
        return run_row(row, tmp_path / "results", **settings, **TWO_EPOCHS, **more)[1]

    def kept(path):
        return path.rename(tmp_path / path.parent.name)

    unshared = [kept(run(ONE)), kept(run(TWO))]
    images = asked(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        in_epoch(patch, 2)
        run(TWO, share_teachers=True)
    files = sorted((tmp_path / "results" / "teacher_outputs").glob("*/*"))
    assert [file.name for file in files] == ["epoch001.npz"] * 2  # whole epochs only
    assert same_bits(run(TWO, share_teachers=True), unshared[1])
    assert sum(images) == 80 + 32 + 80
    assert same_bits(run(ONE, share_teachers=True), unshared[0])
    assert sum(images) == 80 + 32 + 80  # its teacher had said it all before

    files[0].write_bytes(files[0].read_bytes()[:-500])
    damaged = bytearray(files[1].read_bytes())
    damaged[2000] ^= 1
    files[1].write_bytes(damaged)
    assert same_bits(run(TWO, share_teachers=True, overwrite=True), unshared[1])
    assert sum(images) == 80 + 32 + 80 + 80  # the first epoch again, the second as it was


def test_only_the_same_views_are_shared(tmp_path):
    def files(augment=None, epoch=1, teachers=("digest",), precision="fp32", mode="off", **settings):
        cfg = common.config_type(common.load_recipe("kd_mixup"))(protocol="smoke", share_teachers=True, **settings)
        run = common.Run("kd_mixup", cfg)
        run.teachers = teachers
        task = SimpleNamespace(teacher=SimpleNamespace(outputs=None))
        trainer = SimpleNamespace(task=task, precision=precision, compile=mode)
        outputs = run._share_outputs(trainer, augment or STANDARD, epoch, 80)
        assert task.teacher.outputs is outputs
        return outputs and [file.as_posix() for file in outputs.files]

    STANDARD = common.Standard()
    same = files()
    assert same[0].startswith("results/teacher_outputs/") and same == files(temperature=4.0, lr=0.1, epochs=7)
    assert files(teachers=("digest", "other")) == [*same, *files(teachers=("other",))]
    seen = [dict(epoch=2), dict(seed=1), dict(batch_size=32), dict(train_size=80), dict(val_size=20)]
    by = [
        dict(teachers=("other",)),
        dict(precision="bf16"),
        dict(mode="default"),
        dict(deterministic=True),
        dict(augment=common.Standard(degrees=0.0)),
    ]
    others = [files(**other) for other in (*seen, *by)]
    assert len({name for names in (same, *others) for name in names}) == 1 + len(others)
    assert files(augment=common.CutOut()) is None and files(teachers=()) is None


@pytest.mark.parametrize("content", [b"", b"no zip", "other size", "float64", "other name", "pickle"])
def test_what_is_no_such_file_is_computed_anew(tmp_path, content):
    file = tmp_path / "epoch001.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        arrays = {
            "other size": dict(logits=np.zeros((5, 3), np.float32)),
            "float64": dict(logits=np.zeros((6, 3))),
            "other name": dict(logit=np.zeros((6, 3), np.float32)),
            "pickle": dict(logits=np.array([{}] * 6)),
        }[content]
        np.savez(file, **arrays)
    outputs = EpochOutputs([file], 6, torch.device("cpu"))
    views = torch.arange(18.0).view(6, 3)
    assert torch.equal(torch.cat([outputs.step(lambda x: x + 1, part) for part in views.split(4)]), views + 1)
    outputs.save()
    outputs = EpochOutputs([file], 6, torch.device("cpu"))
    assert torch.equal(torch.cat([outputs.step(None, part) for part in views.split(4)]), views + 1)


def test_several_teachers_have_a_file_each(tmp_path):
    files, views = [tmp_path / "a.npz", tmp_path / "b.npz"], torch.arange(18.0).view(6, 3)
    outputs = EpochOutputs(files, 6, torch.device("cpu"))
    for part in views.split(3):
        outputs.step(lambda x: torch.stack([x + 1, x * 2]), part)
    outputs.save()
    for chosen, want in ((files, [views + 1, views * 2]), (files[1:], [views * 2])):
        outputs = EpochOutputs(chosen, 6, torch.device("cpu"))
        said = torch.cat([outputs.step(None, part) for part in views.split(4)], dim=-2)
        assert torch.equal(said, torch.stack(want) if len(want) > 1 else want[0])
