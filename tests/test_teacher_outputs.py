"""Teachers' outputs shared between students: nothing but time may change."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Killed, Linear, in_epoch, run_row
from timm.task import ClassificationTask, LogitDistillationTask
from torch import Tensor, nn
from tqdm import tqdm

import common
from teacher_outputs import EpochOutputs

# Three steps an epoch, the last one shorter than the others
TWO_EPOCHS = dict(epochs=2, train_size=80, batch_size=32)
ONE = ("kd_mixup", dict(teacher="teacher_baseline"))
TWO = ("kd_ensemble_avg_loss", dict(teachers=("teacher_baseline", "teacher_cutmix")))


def asked(monkeypatch) -> list[int]:
    """Grows by the number of images that a teacher is shown."""
    images, real = [], EpochOutputs.step

    def step(self, teacher, views):
        def counted(views):
            images.append(len(views))
            return teacher(views)

        return real(self, counted, views)

    monkeypatch.setattr(EpochOutputs, "step", step)
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
        run(ONE, share_teachers=True)
    files = list((tmp_path / "results" / "teacher_outputs").glob("*/*"))
    assert [file.name for file in files] == ["epoch001.npz"]  # whole epochs only
    assert sum(images) == 80 + 32
    assert same_bits(run(TWO, share_teachers=True), unshared[1])
    assert sum(images) == 80 + 32 + 3 * 80  # the second epoch of the one that was asked before, both of the other
    assert same_bits(run(ONE, share_teachers=True), unshared[0])
    assert sum(images) == 80 + 32 + 3 * 80  # its teacher had said it all before

    files = sorted((tmp_path / "results" / "teacher_outputs").glob("*/*"))
    files[0].write_bytes(files[0].read_bytes()[:-500])
    damaged = bytearray(files[1].read_bytes())
    damaged[2000] ^= 1
    files[1].write_bytes(damaged)
    assert same_bits(run(TWO, share_teachers=True, overwrite=True), unshared[1])
    assert sum(images) == 80 + 32 + 5 * 80  # what was damaged, and nothing else


def test_what_a_model_draws_while_it_trains_changes_no_views():
    class Seen(common.Standard):
        def __call__(self, images, labels):
            views, labels = super().__call__(images, labels)
            seen.append(views)
            return views, labels

    epochs = []
    for dropout in (0.0, 0.5):
        seen = []
        run = common.Run("student_baseline", common.TrainConfig(protocol="smoke", train_size=96, batch_size=32))
        layers = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(12, 10))
        run.train_epoch(run.trainer(ClassificationTask(nn.Sequential(*layers))), Seen(), 1, tqdm(disable=True))
        epochs.append(torch.cat(seen))
    assert len(epochs[0]) == 96 and torch.equal(*epochs)


class Own(LogitDistillationTask):
    """A task of one's own: who knows how often it asks."""


def test_only_the_same_views_are_shared(monkeypatch):
    def files(
        augment=None,
        epoch=1,
        teachers=("digest",),
        precision="fp32",
        mode="off",
        kind=LogitDistillationTask,
        **settings,
    ):
        cfg = common.config_type(common.load_recipe("kd_mixup"))(protocol="smoke", share_teachers=True, **settings)
        run = common.Run("kd_mixup", cfg)
        run.sources = run.source_digests = list(teachers)
        task = kind(Linear(), common.Teacher(*(Linear() for _ in teachers)))
        trainer = SimpleNamespace(task=task, precision=precision, compile=mode)
        outputs = run._share_outputs(trainer, augment or STANDARD, epoch, 80)
        assert task.teacher.outputs == outputs
        return [of.file.as_posix() for of in outputs]

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
    for name, value in (("hardware", lambda device: "another"), ("torch.__version__", "2.99")):
        monkeypatch.setattr(f"common.{name}", value)
        others.append(files())
        monkeypatch.undo()
    assert len({name for names in (same, *others) for name in names}) == 1 + len(others)
    assert files(augment=common.CutOut()) == [] and files(kind=Own) == []
    monkeypatch.setattr(common.data_parallel, "size", lambda: 2)  # where each process sees but its share of a step
    assert files() == []


def test_a_task_of_ones_own_shares_nothing_and_trains():
    task = ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)))
    cfg = common.TrainConfig(protocol="smoke", train_size=96, batch_size=32, share_teachers=True)
    run = common.Run("student_baseline", cfg)
    run.sources = run.source_digests = ["digest"]  # of a teacher that it uses in a way of its own
    losses = run.train_epoch(run.trainer(task), common.Standard(), 1, tqdm(disable=True))
    assert losses["train_loss"] > 0


@pytest.mark.parametrize("content", [b"", b"no zip", "version of zip", "other size", "float64", "other name", "pickle"])
def test_what_is_no_such_file_is_computed_anew(tmp_path, content):
    file = tmp_path / "epoch001.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "version of zip":
        np.savez(file, logits=np.zeros((6, 3), np.float32))
        file.write_bytes(file.read_bytes().replace(b"\x2d\x00", b"\x6d\x00"))
    else:
        arrays = {
            "other size": dict(logits=np.zeros((5, 3), np.float32)),
            "float64": dict(logits=np.zeros((6, 3))),
            "other name": dict(logit=np.zeros((6, 3), np.float32)),
            "pickle": dict(logits=np.array([{}] * 6)),
        }[content]
        np.savez(file, **arrays)
    outputs = EpochOutputs(file, 6, torch.device("cpu"))
    views = torch.arange(18.0).view(6, 3)
    assert torch.equal(torch.cat([outputs.step(lambda x: x + 1, part) for part in views.split(4)]), views + 1)
    outputs.save()
    outputs = EpochOutputs(file, 6, torch.device("cpu"))
    assert torch.equal(torch.cat([outputs.step(None, part) for part in views.split(4)]), views + 1)


def test_what_a_teacher_says_to_the_same_place_each_time_is_kept(tmp_path):
    """As CUDA graphs do."""
    file, place, views = tmp_path / "epoch001.npz", torch.empty(2, 3), torch.arange(12.0).view(4, 3)
    outputs = EpochOutputs(file, 4, torch.device("cpu"))
    for part in views.split(2):
        outputs.step(place.copy_, part)
    outputs.save()
    assert torch.equal(EpochOutputs(file, 4, torch.device("cpu")).step(None, views), views)


def test_several_teachers_say_the_same_whichever_of_them_are_asked(tmp_path):
    def said(known: str) -> Tensor:
        teacher.outputs = [EpochOutputs(tmp_path / f"{name}.npz", 7, torch.device("cpu")) for name in "abc"]
        assert "".join(of.file.stem for of in teacher.outputs if of.known is not None) == known
        logits = torch.cat([teacher(part) for part in views.split(4)], dim=1)
        for of in teacher.outputs:
            of.save()
        return logits

    teacher, views = common.Teacher(*(Linear() for _ in range(3))), torch.randn(7, 1, 2, 2)
    first = said(known="")
    assert torch.equal(first, torch.stack([model(views) for model in teacher.model]))
    (tmp_path / "b.npz").unlink()
    assert torch.equal(said(known="ac"), first)
    assert torch.equal(said(known="abc"), first)
