"""Weights trained elsewhere become a run with the numbers that they have, which serves as any other does."""

import json

import pytest
import safetensors.torch
import torch
from conftest import run_row

import adopt
import report
import verify
from run_files import UserError, load_weights, sha256

OFFLINE = dict(protocol="smoke", wandb_mode="disabled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher as its recipe leaves it, with few test images right so that temperatures can be fitted."""
    return run_row("teacher_mixup", tmp_path_factory.mktemp("results"), wandb_mode="disabled")


def as_the_original(weights, file):
    """As the scripts of the original save one."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 5e-5, "params": [0]}]}
    facts = {"acc": 76.98, "ece": torch.tensor(0.0351), "epoch": 499, "rng_state": torch.get_rng_state()}
    torch.save({"state_dict": weights, "optimizer": optimizer, **facts}, file)


def as_repdistiller(weights, file):
    """As RepDistiller's do, here of a model in nn.DataParallel."""
    torch.save({"epoch": 240, "model": {f"module.{k}": v for k, v in weights.items()}, "best_acc": 75.6}, file)


def as_safetensors(weights, file):
    safetensors.torch.save_file(weights, file.with_suffix(".safetensors"))
    return file.with_suffix(".safetensors")


def adopted(tmp_path, file, row="teacher_mixup", **settings) -> dict:
    adopt.main(adopt.Config(row=row, weights=file, results_dir=tmp_path / "adopted", **OFFLINE, **settings))
    [file] = tmp_path.glob(f"adopted/smoke/{row}/seed0*/result.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("save", [as_the_original, as_repdistiller, as_safetensors])
def test_its_numbers_are_those_of_the_weights(save, trained, tmp_path, capsys):
    there, folder = trained
    file = tmp_path / "ckpt-499"
    file = save(load_weights(folder / "model.safetensors"), file) or file
    result = adopted(tmp_path, file)
    assert {**result["last"], "epoch": 1} == there["last"] == {**result["best"], "epoch": 1}
    assert result["adopted"] == {"file": file.name, "sha256": sha256(file)}
    assert verify.main(verify.Config(results_dir=tmp_path / "adopted")) == 0
    assert "1 of 1 runs are what their weights say" in capsys.readouterr().out


def test_it_teaches_is_a_member_and_is_named_in_the_table(trained, tmp_path):
    as_the_original(load_weights(trained[1] / "model.safetensors"), tmp_path / "ckpt")
    adopted(tmp_path, tmp_path / "ckpt", epochs=1)
    [folder] = tmp_path.glob("adopted/smoke/teacher_mixup/seed0-*")
    like = dict(results_dir=tmp_path / "adopted", train_size=None, wandb_mode="disabled")
    student, _ = run_row("kd_mixup", **like)  # which would train its teacher, were it not there
    assert student["sources"] == [str(folder)]
    ensemble, _ = run_row("teacher_ensemble", **like, members=("teacher_mixup",), weights=(1.0,))
    assert ensemble["best"]["accuracy"] == trained[0]["last"]["accuracy"]
    text = report.notes("smoke", report.sort_into_rows([report.read_run(folder)])[0])
    assert text.count("as they came: `teacher_mixup --epochs 1 --milestones 1`.") == 1


def test_a_run_that_is_there_is_printed_and_others_weights_do_not_replace_it(trained, tmp_path, capsys):
    weights = load_weights(trained[1] / "model.safetensors")
    as_the_original(weights, tmp_path / "ckpt")
    first = adopted(tmp_path, tmp_path / "ckpt")
    assert adopted(tmp_path, tmp_path / "ckpt") == first
    assert "was finished before" in capsys.readouterr().out
    as_the_original({**weights, "fc.bias": weights["fc.bias"] + torch.arange(10.0)}, tmp_path / "other")
    with pytest.raises(UserError, match="seed0 is another run: --overwrite replaces it"):
        adopted(tmp_path, tmp_path / "other")
    assert adopted(tmp_path, tmp_path / "other", overwrite=True)["last"]["nll"] != first["last"]["nll"]


def nothing(weights, file):
    pass


WRONG = {
    "another network": (lambda w, file: torch.save({"fc.bias": w["fc.bias"]}, file), "does not fit wrn_40_2: Missing"),
    "a list": (lambda w, file: torch.save([1], file), "has no weights that can be read safely"),
    "a module": (lambda w, file: torch.save(torch.nn.ReLU(), file), r"read safely .*\): save its state_dict alone"),
    "infinity": (lambda w, file: as_the_original({**w, "fc.bias": w["fc.bias"] / 0}, file), "that are not finite"),
    "no checkpoint": (lambda w, file: file.write_text("hello"), "has no weights that can be read safely"),
    "no file": (nothing, "is not a file with weights"),
    "kd_mixup": (as_the_original, "kd_mixup learns from teachers"),
    "teacher_ensemble": (as_the_original, "teacher_ensemble averages rows"),
    "teacher_mixer": (as_the_original, "there is no recipe teacher_mixer: did you mean teacher_mixup"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_adopted_leaves_nothing(case, trained, tmp_path):
    save, message = WRONG[case]
    row = case if "_" in case else "teacher_mixup"
    save(load_weights(trained[1] / "model.safetensors"), tmp_path / "ckpt")
    with pytest.raises(UserError, match=message):
        adopted(tmp_path, tmp_path / "ckpt", row)
    assert not list(tmp_path.glob("adopted/smoke/*/seed0"))


def test_weights_that_are_right_by_chance_only_are_warned_of(trained, tmp_path, capsys):
    weights = load_weights(trained[1] / "model.safetensors")
    bias = torch.zeros(10)
    bias[3] = 1e6
    as_the_original({**weights, "fc.bias": bias}, tmp_path / "ckpt")
    adopted(tmp_path, tmp_path / "ckpt")
    assert "the classes should be in the order of their names" in capsys.readouterr().err
