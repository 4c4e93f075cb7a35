"""Files that somebody made, or that broke: each is refused in one line, and nothing in them is ever run."""

import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run_row
from PIL import EpsImagePlugin, Image

import checkpoint
import common
from image_data import read_image
from run_files import HALF, UserError, load_probabilities, load_weights, read_result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished teacher."""
    os.environ["WANDB_MODE"] = "disabled"
    return run_row("student_baseline", tmp_path_factory.mktemp("finished"))[1]


@pytest.fixture
def teacher(finished, tmp_path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(finished, tmp_path / "teacher")


def teach(teacher: Path, tmp_path: Path) -> None:
    run_row("kd_vanilla", tmp_path / "results", teacher=str(teacher))


def average(member: Path, tmp_path: Path) -> None:
    run_row("teacher_ensemble", tmp_path / "results", members=(str(member),), weights=(1.0,))


def write_weights(teacher: Path, weights: dict) -> None:
    """Replace the weights, and the digest with them."""
    safetensors.torch.save_file(weights, teacher / "model.safetensors")
    result = json.loads((teacher / "result.json").read_text())
    result["files"]["model.safetensors"] = common.sha256(teacher / "model.safetensors")
    (teacher / "result.json").write_text(json.dumps(result))


WEIGHTS = {
    "missing key": (lambda w: {k: v for k, v in w.items() if k != "conv1.weight"}, "does not fit .*_v1: Missing"),
    "extra key": (lambda w: {**w, "evil": torch.zeros(1)}, "does not fit shufflenet_v1: Unexpected"),
    "wrong shape": (lambda w: {**w, "conv1.weight": torch.zeros(1)}, "does not fit shufflenet_v1: size mismatch"),
    "other classes": (lambda w: {**w, "linear.weight": torch.zeros(7, 960)}, "does not fit .*_v1: size mismatch"),
    "nan": (lambda w: {**w, "conv1.weight": w["conv1.weight"] * float("nan")}, "it has weights that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_the_models(kind, teacher, tmp_path):
    change, message = WEIGHTS[kind]
    write_weights(teacher, change(safetensors.torch.load_file(teacher / "model.safetensors")))
    with pytest.raises(UserError, match=message) as error:
        teach(teacher, tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "results").exists()


@pytest.mark.parametrize(("name", "use"), [("model.safetensors", teach), ("probabilities.npz", average)])
def test_a_finished_run_whose_files_were_damaged_is_noticed(name, use, teacher, tmp_path):
    data = bytearray((teacher / name).read_bytes())
    data[len(data) // 2] ^= 1
    (teacher / name).write_bytes(data)
    again = "delete it, and if student_baseline is named as a row, --teacher-from train trains it again"
    with pytest.raises(UserError, match=rf"{name} is damaged: .*; {again}"):
        use(teacher, tmp_path)
    for file in (*HALF, *HALF.values()):  # any of them would do for an ensemble
        (teacher / file).unlink()
    with pytest.raises(UserError, match=f"has a result.json but no {name}: name another run, or a row to train"):
        use(teacher, tmp_path)


RESULTS = {
    "not JSON": ("{", "is damaged"),
    "deep": ("[" * 100_000, "is damaged"),
    "a list": ("[1, 2]", "is no result, for its row"),
    "null": ("null", "is no result, for its row"),
    "a model that is a path": ({"model": "../../evil"}, "model that timm does not know"),
    "a model from the hub": ({"model": "hf-hub:evil/model"}, "model that timm does not know"),
    "no model": ({"model": None}, "model that timm does not know"),
    "another model": ({"model": "resnet18"}, "does not fit resnet18"),
    "classes that are a number": ({"classes": 10}, "is no result, for its classes"),
    "other classes": ({"classes": ["a", "b"]}, "knows 2 classes, not the 10 of digits: it has never seen 0, 1"),
    "other images": ({"fingerprint": "0"}, "was trained on other images"),
    "seed as text": ({"seed": "../../.."}, "is no result, for its seed"),
    "no digests": ({"files": {}}, "is damaged: its SHA-256 is not that in result.json"),
    "digests that are a list": ({"files": [1]}, "is no result, for its files"),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_absurd_results(kind, teacher, tmp_path):
    content, message = RESULTS[kind]
    file = teacher / "result.json"
    file.write_text(content if isinstance(content, str) else json.dumps({**json.loads(file.read_text()), **content}))
    with pytest.raises(UserError, match=message) as error:
        teach(teacher, tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "results").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


FOREIGN = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Evil(), protocol=2)),
    "torch's zip": lambda path: torch.save({"model": {"w": Evil()}}, path),
    "text": lambda path: path.write_text("404: Not Found"),
    "empty": lambda path: path.write_bytes(b""),
    "not there": lambda path: None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_hold_no_weights_are_refused_and_nothing_in_them_runs(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FOREIGN[kind](tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors (cannot be used: .|is not there)") as error:
        load_weights(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value) and not Path("executed").exists()


def predictions(**changes) -> dict[str, np.ndarray]:
    p = np.full((6, 3), 1 / 3, np.float32)
    return {"best": p, "last": p, "labels": np.arange(6) % 3, **changes}


PREDICTIONS = {
    "pickled": (predictions(best=np.array([Evil()], object)), "allow_pickle"),
    "not finite": (predictions(best=np.full((6, 3), np.nan, np.float32)), "no probabilities"),
    "not summing to one": (predictions(last=np.ones((6, 3), np.float32)), "no probabilities"),
    "other numbers": (predictions(last=np.full((5, 3), 1 / 3)), "do not fit together"),
    "whole numbers": (predictions(last=np.ones((6, 3), int)), "do not fit together"),
    "labels out of range": (predictions(labels=np.arange(6)), "do not fit together"),
    "no labels": ({"best": predictions()["best"]}, "cannot be used"),
    "nothing": ({}, "it lacks predictions"),
    "of one image": ({name: array[:1] for name, array in predictions().items()}, "it lacks predictions"),
    "negative": (predictions(best=np.array([[-1, 1, 1]] * 6, np.float32)), "no probabilities"),
    "almost summing to one": (predictions(last=predictions()["last"] * np.float32(1.00105)), "no probabilities"),
    "selected on no images": (predictions(selected=predictions()["best"]), "it lacks predictions"),
    "bomb": (predictions(best=np.zeros((3_000_000, 3), np.float32)), "far more than predictions do"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_that_are_none(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays, message = PREDICTIONS[kind]
    np.savez_compressed("probabilities.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_probabilities(Path("probabilities.npz"))
    assert not Path("executed").exists()


def test_predictions_that_are_right(finished, tmp_path):
    """In half precision too, where there is no `last` if its weights are."""
    whole, half = (load_probabilities(finished / name) for name in ("probabilities.npz", HALF["probabilities.npz"]))
    assert whole.keys() == {"best", "last", "labels"} and half.keys() == {"best", "labels"}
    assert all(np.allclose(half[name], whole[name], rtol=2e-3) for name in half)
    file = tmp_path / HALF["probabilities.npz"]
    logarithms = {"best": np.zeros((6, 1), np.float16), "last": np.log(predictions()["last"]).astype(np.float16)}
    np.savez_compressed(file, **predictions(**logarithms, labels=np.zeros(6, int)))
    assert load_probabilities(file)["last"].shape == (6, 3)


def test_predictions_of_a_collapsed_model_are_never_taken_for_a_bomb(finished):
    with zipfile.ZipFile(finished / "probabilities.npz") as archive:
        assert all(entry.compress_size == entry.file_size for entry in archive.infolist())


def mutations(data: bytes, count: int):
    """The file with bytes changed, cut off, repeated or put in, all drawn from one seed."""
    draw = random.Random(0)
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(draw.choice((1, 1, 4, 64))):
            at = draw.randrange(len(mutated) or 1)
            kind = draw.randrange(5)
            if kind == 0:
                mutated[at : at + 1] = bytes([draw.randrange(256)])
            elif kind == 1:
                del mutated[at:]
            elif kind == 2:
                mutated[at:at] = draw.randbytes(draw.randrange(1, 20))
            elif kind == 3:
                mutated[at:at] = mutated[at : at + draw.randrange(1, 200)]
            else:
                mutated[at : at + 8] = draw.choice((b"\xff" * 8, b"\x00" * 8, b"1e999", b"null", b"-1", b'"../'))
        yield bytes(mutated)


def read_checkpoint(path: Path) -> None:
    checkpoint.load(path.parent)


READERS = {
    "result.json": lambda path: read_result(path.parent),
    "probabilities.npz": load_probabilities,
    "model.safetensors": load_weights,
    checkpoint.NAMES[0]: read_checkpoint,
}


@pytest.mark.parametrize("name", READERS)
def test_readers_of_mutated_files_raise_nothing_but_our_own_error(name, finished, tmp_path):
    path, state = tmp_path / name, {"model": {"w": torch.randn(20, 3), "b": torch.zeros(3)}, "history": [{"a": 1.5}]}
    if name == "model.safetensors":
        safetensors.torch.save_file(state["model"], path)
    elif name == checkpoint.NAMES[0]:
        checkpoint.save(tmp_path, state)
    else:
        shutil.copy(finished / name, path)
    refused = 0
    count = int(os.environ.get("MUTATIONS", 300))
    for data in mutations(path.read_bytes(), count):
        path.write_bytes(data)
        try:
            READERS[name](path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > count / 4


@pytest.mark.filterwarnings("ignore")  # PIL's, of what it reads all the same
def test_a_photo_with_damaged_exif_data_is_read_or_named(tmp_path):
    """PIL lets errors of any kind through when it rewrites the data of a photo that it turns."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", (72, 1)
    whole, random_, file = exif.tobytes(), random.Random(0), tmp_path / "photo.png"
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(2):
            damaged[random_.randrange(6, len(damaged))] = random_.randrange(256)
        Image.new("RGB", (4, 4)).save(file, exif=bytes(damaged))
        try:
            read_image(file, 4)
        except UserError as error:
            assert str(file) in str(error)


def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """PostScript, whatever it is called: Pillow would hand it to Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: (tmp_path / "executed").touch())
    (tmp_path / "cat.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"cannot read the image .*cat\.png"):
        read_image(tmp_path / "cat.png", 16)
    assert not (tmp_path / "executed").exists()
