"""Numbers that are what the weights say pass; others, and weights that are not the run's, do not."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_row

import verify
from run_files import HALF, UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher in full precision, two students in half, and an ensemble of these."""
    folder = tmp_path_factory.mktemp("results")
    run_row("teacher_baseline", folder, wandb_mode="disabled")
    students = [run_row("student_baseline", folder, seed=seed, wandb_mode="disabled")[1] for seed in (0, 1)]
    run_row("student_ensemble", folder, members=tuple(map(str, students)), weights=(3, 1), wandb_mode="disabled")
    for file in folder.glob("smoke/student*/*/*"):
        if file.name not in ("result.json", HALF["model.safetensors"]):
            file.unlink()
    return folder


@pytest.fixture
def results(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "results")


def edit(results, row, change) -> None:
    file = next(results.glob(f"smoke/{row}/*/result.json"))
    result = json.loads(file.read_text())
    change(result)
    file.write_text(json.dumps(result))


def verified(results, capsys, **settings) -> tuple[int, list[str]]:
    """Exit status and lines but for the header."""
    capsys.readouterr()
    verify.predict.cache_clear()
    status = verify.main(verify.Config(results_dir=results, **settings))
    return status, [line for line in capsys.readouterr().out.splitlines() if "accuracy, %" not in line]


def test_numbers_are_those_of_the_weights_in_either_precision(results, capsys):
    before = {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}
    status, lines = verified(results, capsys)
    assert status == 0 and lines[-1].startswith("4 of 4 runs are what their weights say")
    teacher = json.loads(next(results.glob("smoke/teacher_baseline/*/result.json")).read_text())["last"]
    [line] = [line for line in lines if "teacher_baseline" in line]
    assert line.split()[1:4] == [f"{100 * teacher['accuracy']:.2f}", "→", f"{100 * teacher['accuracy']:.2f}"]
    assert line.split()[-3:] == [f"{teacher['nll']:.4f}", "→", f"{teacher['nll']:.4f}"]
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("metric", "more"),
    [("accuracy", 0.00075), ("ece", 0.0075), ("oe", 0.0075), ("nll", 0.0015), ("nll", -0.0015)],
)
def test_a_number_that_is_not_what_the_weights_say_is_named(metric, more, results, capsys):
    edit(results, "student_ensemble", lambda result: result["last"].update({metric: result["last"][metric] + more}))
    status, lines = verified(results, capsys)
    assert status == 1 and lines[-1].startswith("3 of 4")
    assert [line.split("/")[1] for line in lines if "differs" in line] == ["student_ensemble"]


def test_an_older_result_does_without_digests_of_its_sources(results, capsys):
    edit(results, "student_ensemble", lambda result: result.pop("source_digests"))
    status, lines = verified(results, capsys)
    assert status == 0 and lines[-1].startswith("4 of 4")


def test_a_run_with_held_out_images_is_verified(tmp_path, capsys):
    run_row("student_baseline", tmp_path, val_size=40, wandb_mode="disabled")
    assert verified(tmp_path, capsys)[0] == 0


def test_other_weights_are_refused_and_the_rest_verified(results, capsys):
    first, other = sorted(results.glob("smoke/student_baseline/*/*.safetensors"))
    first.write_bytes(other.read_bytes())
    status, lines = verified(results, capsys)
    assert status == 1 and lines[-1].startswith("2 of 4")  # of the students the second, and the teacher
    assert "is damaged" in lines[0] and "differs" not in "".join(lines)


def test_a_damaged_result_costs_no_other(results, capsys):
    file = next(results.glob("smoke/teacher_baseline/*/result.json"))
    file.write_text(file.read_text()[:-200])
    status, lines = verified(results, capsys)
    assert status == 1 and lines[-1].startswith("3 of 4") and "result.json is damaged" in "".join(lines)


def test_what_cannot_be_verified_costs_no_other(results, capsys):
    """An ensemble whose weights are in its recipe, and a run of a protocol that is no more."""
    edit(results, "student_ensemble", lambda result: result["settings"].pop("weights"))
    shutil.copytree(results / "smoke" / "teacher_baseline", results / "old" / "teacher_baseline")
    for file in results.glob("old/*/*/result.json"):
        file.write_text(file.read_text().replace('"protocol": "smoke"', '"protocol": "old"'))
    status, lines = verified(results, capsys)
    assert status == 1 and lines[-1] == "3 of 4 runs are what their weights say; of 1 more the weights are not here"
    assert "there is no protocol old" in "".join(lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"device": "cuda"}, "--device cuda: torch sees no GPU"), ({"data_dir": Path("a_file/no")}, "--data-dir")],
)
def test_what_is_wrong_with_the_command_is_said_once(settings, message, results, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("")
    with pytest.raises(UserError, match=message):
        verify.main(verify.Config(results_dir=results, **settings))


def test_members_are_those_that_were_averaged(trained, results, capsys):
    """Among these results or where they were, and never others of the same name."""

    def found() -> bool:
        lines = verified(results, capsys, rows=("student_ensemble",))[1]
        assert lines[-1].startswith(("1 of 1", "0 of 0"))
        return lines[-1].startswith("1 of 1")

    def elsewhere(result) -> None:
        result["sources"] = [source.replace(str(trained), "elsewhere") for source in result["sources"]]

    members = results / "smoke" / "student_baseline"
    shutil.rmtree(members)
    assert found()  # where they were
    edit(results, "student_ensemble", elsewhere)
    assert not found()
    shutil.copytree(trained / "smoke" / "student_baseline", members)
    assert found()
    edit(results, "student_baseline", lambda result: result.update(files={"model.safetensors": "0" * 64}))
    assert not found()  # it was trained again, to other bits


def test_what_is_not_here_is_counted(results, capsys):
    next(results.glob("smoke/student_baseline/seed1*/*.safetensors")).unlink()
    status, lines = verified(results, capsys, rows=("student_baseline", "student_ensemble"))
    assert (status, lines[-1]) == (0, "1 of 1 runs are what their weights say; of 2 more the weights are not here")
    with pytest.raises(UserError, match="no finished run in"):
        verified(results, capsys, rows=("kd_vanilla",))
    with pytest.raises(UserError, match="no finished run in"):
        verified(results, capsys, protocol="")
