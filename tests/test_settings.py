"""Settings, their bounds, the command line, and what makes a run the same run."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ROWS

import common
from run_files import UserError, flags


def config(row: str, **settings):
    return common.config_type(common.load_recipe(row))(**settings)


def test_sixteen_rows_with_their_published_numbers():
    assert len(ROWS) == 16
    for row in ROWS:
        numbers = common.published(row, {})
        doc = common.load_recipe(row).__globals__["__doc__"]
        found = re.search(r"Published: accuracy ([\d.]+) %, ECE ([\d.]+), OE ([\d.]+)(?:, at epoch (\d+))?\.", doc)
        assert [float(found[1]) / 100, float(found[2]), float(found[3])] == pytest.approx(
            [numbers["accuracy"], numbers["ece"], numbers["oe"]]
        )
        assert (found[4] and float(found[4])) == numbers["best_epoch"]


@pytest.mark.parametrize("row", ROWS)
def test_settings_are_the_papers(row):
    cfg = common.resolve(config(row))
    assert (cfg.protocol, cfg.epochs, cfg.milestones, cfg.dataset) == ("paper", 500, (150, 180, 210), "cifar100")
    if row.startswith("teacher_") and row != "teacher_ensemble":
        assert (cfg.batch_size, cfg.lr, cfg.momentum, cfg.weight_decay) == (128, 0.05, 0.9, 5e-4)
    elif not row.endswith("_ensemble"):
        assert (cfg.batch_size, cfg.lr, cfg.momentum, cfg.weight_decay) == (64, 0.01, 0.9, 5e-4)
    if row.startswith("kd_"):
        assert (cfg.temperature, cfg.kd_weight, cfg.ce_weight) == (50, 0.8, 0.2)
    if row.endswith("_ensemble") and not row.startswith("kd_"):
        by_kind = dict(zip((m.split("_")[1] for m in cfg.members), cfg.weights, strict=True))
        assert by_kind == {
            "baseline" if row[0] == "t" else "vanilla": 5,
            "cutmix": 1,
            "cutout": 5,
            "mixup": 1,
            "augmix": 1,
        }
    if row.startswith("kd_ensemble"):
        assert set(cfg.teachers) == {"teacher_mixup", "teacher_cutmix", "teacher_cutout", "teacher_augmix"}


@pytest.mark.parametrize(
    ("settings", "epochs", "milestones"),
    [
        (dict(protocol="short"), 240, (150, 180, 210)),
        (dict(protocol="quick"), 30, (19, 23, 27)),
        (dict(protocol="short", epochs=120), 120, (75, 90, 105)),
        (dict(epochs=1), 1, (1, 1, 1)),  # no milestone before the first epoch
        (dict(epochs=10), 10, (3, 4, 5)),  # the first that is no earlier than in proportion
        (dict(protocol="brief"), 8, (5, 7)),
        (dict(protocol="small"), 40, (25, 30, 35)),
        (dict(protocol="cpu"), 5, (4,)),
        (dict(protocol="smoke"), 4, (3,)),
        (dict(epochs=10, milestones=(5, 10)), 10, (5, 10)),
        (dict(milestones=()), 500, ()),
    ],
)
def test_milestones_keep_their_place(settings, epochs, milestones):
    cfg = common.resolve(config("kd_cutmix", **settings))
    assert (cfg.epochs, cfg.milestones) == (epochs, milestones)
    assert common.resolve(cfg) == cfg  # as a teacher's settings are, handed on


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("kd_cutmix", dict(dataset="folder", image_size=16, batch_size=2, seed=0, epochs=1, kd_weight=0.0)),
        ("kd_cutmix", dict(dataset="folder", image_size=1024)),
        ("teacher_augmix", dict(severity=0.1)),
        ("teacher_augmix", dict(severity=10.0)),
        ("teacher_cutout", dict(hole=1.0)),
        ("teacher_mixup", dict(alpha=0.0)),
    ],
)
def test_a_bound_is_allowed_where_it_says_so(row, settings):
    assert vars(common.resolve(config(row, **settings))).items() >= settings.items()


def test_the_protocols_small_and_cpu_are_of_a_tenth_of_the_images():
    assert common.resolve(config("kd_cutmix", protocol="small")).train_size == 5000
    assert common.resolve(config("kd_cutmix", protocol="cpu")).train_size == 5000
    assert common.resolve(config("kd_cutmix", protocol="cpu", train_size=100)).train_size == 100
    assert common.resolve(config("kd_cutmix", protocol="cpu", dataset="folder")).train_size is None  # not of others
    assert folder(protocol="cpu") == "results/cpu/kd_cutmix/seed0"
    assert folder(protocol="cpu", train_size=5000) == "results/cpu/kd_cutmix/seed0"


def test_the_protocols_brief_and_small_are_in_bf16():
    assert common.resolve(config("kd_cutmix", protocol="brief")).precision == "bf16"
    assert common.resolve(config("kd_cutmix", protocol="small")).precision == "bf16"
    assert common.resolve(config("kd_cutmix", protocol="brief", precision="fp32")).precision == "fp32"
    assert common.resolve(config("kd_cutmix", protocol="brief", dataset="folder")).precision == "auto"  # not of others
    assert common.resolve(config("kd_cutmix", protocol="quick")).precision == "auto"
    assert folder(protocol="brief", precision="bf16") == "results/brief/kd_cutmix/seed0"
    assert folder(protocol="brief", precision="fp32") != "results/brief/kd_cutmix/seed0"


def folder(row="kd_cutmix", **settings) -> str:
    return common.Run(row, config(row, **settings)).path.as_posix()


def test_a_rows_folder_and_its_variants():
    assert folder() == "results/paper/kd_cutmix/seed0"
    assert folder(protocol="short", seed=3, results_dir=Path("other")) == "other/short/kd_cutmix/seed3"
    # the row's own values spelled out, and where it runs, make no variant
    assert folder(epochs=500, milestones=(150, 180, 210), temperature=50.0, dataset="cifar100") == folder()
    assert folder(data_dir=Path("elsewhere"), device="cpu", wandb_mode="disabled", overwrite=True) == folder()
    assert folder(teacher="my/run/") == folder(teacher="my/run") != folder(teacher="my/other")
    members = (folder("teacher_ensemble", members=(name,), weights=(1.0,)) for name in ("my/run/", "my//run"))
    assert next(members) == next(members)
    assert folder(temperature=4) == folder(temperature=4.0)  # Python's callers write either
    assert folder("teacher_ensemble", weights=(1,) * 5) == folder("teacher_ensemble", weights=(1.0,) * 5)
    variants = [
        folder(temperature=4.0), folder(temperature=5.0), folder(epochs=10), folder(lr=0.1), folder(train_size=5000),
        folder(dataset="digits"), folder(teacher="teacher_mixup"), folder(temperature=4.0, lr=0.1),
        folder(kd_weight=0.5), folder(ce_weight=0.5), folder(batch_size=32), folder(momentum=0.5), folder(val_size=9),
        folder(weight_decay=0.1), folder(milestones=(9,)), folder(precision="bf16"), folder(dataset="folder"),
        folder(dataset="folder", image_size=64),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert all(re.fullmatch(r"results/paper/kd_cutmix/seed0-[0-9a-f]{8}", path) for path in variants)


def test_a_variant_has_its_own_published_numbers():
    changes = common.Run("kd_vanilla", config("kd_vanilla", temperature=4.0)).changes
    assert common.published("kd_vanilla", changes)["accuracy"] == 0.7471
    changes = common.Run("teacher_ensemble", config("teacher_ensemble", weights=(1.0,) * 5)).changes
    assert common.published("teacher_ensemble", changes)["accuracy"] == 0.8174
    assert common.published("kd_vanilla", {"temperature": 7})["accuracy"] == 0.7541
    assert common.published("my_row", {}) is None


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("kd_cutmix", dict(teacher="my results/smoke/wrn/seed0", lr=1e-5, epochs=10, milestones=(3, 5))),
        ("kd_ensemble_avg_loss", dict(teachers=("a", "it's"), temperature=4.0, milestones=())),
    ],
)
def test_a_variants_flags_are_those_that_make_it(row, settings):
    changes = common.Run(row, config(row, **settings)).changes
    again = common.parse(common.config_type(common.load_recipe(row)), args=shlex.split(flags(changes)))
    assert common.Run(row, again).changes == changes


WRONG = [
    ("kd_cutmix", "--epochs 0", "--epochs must be 1 or more, not 0"),
    ("kd_cutmix", "--epochs -1", "--epochs must be 1 or more, not -1"),
    ("kd_cutmix", "--epochs two", "--epochs"),
    ("kd_cutmix", "--epochs 1.5", "--epochs"),
    ("kd_cutmix", "--milestones 0 5", "--milestones must be 1 or more, not 0"),
    ("kd_cutmix", "--seed -1", "--seed must be 0 or more, not -1"),
    ("kd_cutmix", "--seed x", "--seed"),
    ("kd_cutmix", "--lr 0", "--lr must be greater than 0 and below 1e6, not 0.0"),
    ("kd_cutmix", "--wandb-project me/mine", "--wandb-project must be a name without any of"),
    ("kd_cutmix", "--lr nan", "--lr must be greater than 0 and below 1e6, not nan"),
    ("kd_cutmix", "--lr inf", "--lr must be greater than 0 and below 1e6, not inf"),
    ("kd_cutmix", "--lr", "--lr"),
    ("kd_cutmix", "--batch-size 1", "--batch-size must be 2 or more, not 1"),
    ("kd_cutmix", "--momentum -0.1", "--momentum must be 0 or more"),
    ("kd_cutmix", "--temperature 1e200", "--temperature must be greater than 0 and below 1e6, not 1e"),
    ("kd_cutmix", "--teacher teacher_ensemble", "teacher_ensemble has no model that could teach"),
    ("kd_ensemble_add_loss", "--teachers", "--teachers takes one row or more"),
    ("kd_cutmix", "--temperature 0", "--temperature must be greater than 0"),
    ("kd_cutmix", "--kd-weight -1", "--kd-weight must be 0 or more"),
    ("kd_cutmix", "--ce-weight nan", "--ce-weight must be 0 or more"),
    ("kd_cutmix", "--protocol long", "'paper', 'short', 'quick', 'brief', 'small', 'cpu', 'smoke'"),
    ("kd_cutmix", "--protocol smok", "--protocol"),
    ("kd_cutmix", "--protocl smoke", "--protocl, smoke (did you mean --protocol?)"),
    ("kd_cutmix", "--teachers teacher_mixup", "--teachers, teacher_mixup (did you mean --teacher?)"),
    ("kd_cutmix", "--dataset cifar10", "cifar100"),
    ("kd_cutmix", "--device tpu", "cuda"),
    ("kd_cutmix", "--wandb-mode maybe", "offline"),
    ("kd_cutmix", "--image-size 8", "--image-size must be from 16 to 1024, not 8"),
    ("kd_cutmix", "--train-size 0", "--train-size must be 1 or more"),
    ("kd_cutmix", "--protocol smoke --train-size 2000", "--train-size must be at most 1437, not 2000"),
    ("kd_cutmix", "--protocol smoke --teacher teacher_cutmx", "no recipe teacher_cutmx: did you mean teacher_cutmix?"),
    ("kd_cutmix", "--protocol smoke --teacher .", ". is not the folder of a finished run: it has no result.json"),
    ("kd_cutmix", "--protocol smoke --val-size 1400 --train-size 96", "at most 37 with --val-size 1400, not 96"),
    ("kd_cutmix", "--dataset folder --data-dir nowhere", "no images in nowhere"),
    ("kd_cutmix", "more", "more"),
    ("kd_cutmix", "--epochs", "--epochs"),
    ("kd_cutmix", "--epochs 1e3", "--epochs"),
    ("kd_cutmix", "--epochs nan", "--epochs"),
    ("kd_cutmix", "--milestones 5 3", "--milestones must rise and end by epoch 500, not 5 3"),
    ("kd_cutmix", "--milestones 5 5", "--milestones must rise and end by epoch 500, not 5 5"),
    ("kd_cutmix", "--epochs 10 --milestones 5 11", "--milestones must rise and end by epoch 10, not 5 11"),
    ("kd_cutmix", "--seed 1.5", "--seed"),
    ("kd_cutmix", "--seed", "--seed"),
    ("kd_cutmix", "--lr -0.1", "--lr must be greater than 0 and below 1e6, not -0.1"),
    ("kd_cutmix", "--lr fast", "--lr"),
    ("kd_cutmix", "--batch-size 0", "--batch-size must be 2 or more, not 0"),
    ("kd_cutmix", "--batch-size 64.0", "--batch-size"),
    ("student_baseline", "--protocol smoke --batch-size 1438", "--batch-size must be at most 1437"),
    ("student_baseline", "--protocol smoke --train-size 1", "training takes 2 images or more, not 1"),
    ("student_baseline", "--weight-decay -1", "--weight-decay must be 0 or more"),
    ("student_baseline", "--momentum inf", "--momentum must be 0 or more"),
    ("student_baseline", "--momentum 9", "--momentum must be 0 or more and below 1, not 9"),
    ("student_baseline", "--temperature 4", "--temperature"),
    ("student_baseline", "--compile maybe", "reduce-overhead"),
    ("student_baseline", "--precision fp16", "bf16"),
    ("student_baseline", "--val-size 0", "--val-size must be 1 or more"),
    ("student_baseline", "--protocol smoke --val-size 1437", "--val-size 1437 cannot be held out"),
    ("student_baseline", "--protocol smoke --val-size 3", "--val-size 3 cannot be held out"),
    ("student_baseline", "--data-dir {here}/../file", "file is a file, and not a folder"),
    ("student_baseline", "--protocol smoke --results-dir {here}/../file", "file is a file, and not a folder"),
    ("student_baseline", "--protocol smoke --results-dir {here}/../file/results", "file is a file, and not a folder"),
    ("student_baseline", "--data-dir . --results-dir results", "--results-dir results must not be inside --data-dir ."),
    ("student_baseline", "--data-dir d --results-dir d", "--results-dir d must not be inside --data-dir d"),
    ("student_baseline", "--deterministic yes", "yes"),
    ("student_baseline", "--overwrite --overwrte", "--overwrte (did you mean --overwrite?)"),
    ("kd_vanilla", "--temperature -4", "--temperature must be greater than 0"),
    ("kd_vanilla", "--temperature hot", "--temperature"),
    ("kd_vanilla", "--kd-weight 0 --ce-weight 0", "--kd-weight and --ce-weight must not all be 0"),
    ("student_baseline", "--image-size 64", "--image-size is for --dataset folder alone, not for cifar100"),
    ("student_baseline", "--protocol smoke --image-size 20", "--image-size is for --dataset folder alone"),
    ("kd_mixup", "--protocol smoke --teacher ../../etc", "there is no recipe ../../etc"),
    ("kd_ensemble_avg_loss", "--protocol smoke --teachers teacher_mixup wrn", "there is no recipe wrn"),
    ("kd_ensemble_avg_loss", "--temperature 0", "--temperature must be greater than 0"),
    ("kd_ensemble_avg_softmax", "--ce-weight -0.2", "--ce-weight must be 0 or more"),
    ("teacher_mixup", "--batch-size 65", "--batch-size must be even and 2 or more, not 65"),
    ("teacher_cutmix", "--batch-size 1", "--batch-size must be even and 2 or more, not 1"),
    ("teacher_mixup", "--alpha nan", "--alpha must be 0 or more"),
    ("teacher_cutout", "--hole 0", "--hole must be above 0 and at most 1"),
    ("teacher_augmix", "--severity 0", "--severity must be from 0.1 to 10"),
    ("teacher_ensemble", "--weights nan 1 1 1 1", "--weights must be 0 or more"),
    ("student_ensemble", "--protocol smoke --members kd_vanilla --weights 1 2", "--weights takes as many"),
    ("student_ensemble", "--protocol smoke --members nobody --weights 1", "there is no recipe nobody"),
    ("kd_ensemble_add_loss", "--reduction median", "softmax_mean"),
    ("teacher_mixup", "--alpha -1", "--alpha must be 0 or more"),
    ("teacher_cutmix", "--alpha 0", "--alpha must be greater than 0"),
    ("teacher_cutout", "--hole 1.5", "--hole must be above 0 and at most 1"),
    ("teacher_augmix", "--severity 11", "--severity must be from 0.1 to 10"),
    ("teacher_ensemble", "--weights -1 1 1 1 1", "--weights must be 0 or more"),
    ("teacher_ensemble", "--weights 1 1", "--weights takes as many numbers as there are --members: 5, not 2"),
    ("teacher_ensemble", "--weights 0 0 0 0 0", "--weights must not all be 0"),
    ("teacher_ensemble", "--members --weights", "--members takes one row or more"),
    ("kd_augmix", "--teacher", "--teacher"),
    ("kd_cutout", "--ce-weight much", "--ce-weight"),
    ("teacher_baseline", "--alpha 1", "--alpha"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"protocol": "fast"}, "--protocol must be one of paper, short, .*, not fast"),
        ({"dataset": "cifar10"}, "--dataset must be one of cifar100, digits, folder, not cifar10"),
        ({"precision": "fp16"}, "--precision must be one of .*, not fp16"),
        ({"compile": "on"}, "--compile must be one of .*, not on"),
        ({"lr": 0.0}, "--lr must be greater than 0"),
    ],
)
def test_settings_are_held_to_their_bounds_in_python_too(setting, message):
    with pytest.raises(UserError, match=message):
        common.resolve(common.TrainConfig(**{"protocol": "smoke", **setting}))


@pytest.mark.parametrize(
    ("row", "arguments", "message"), WRONG, ids=[f"{row} {arguments}" for row, arguments, _ in WRONG]
)
def test_wrong_arguments_end_in_one_line_and_exit_code_2(row, arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", [f"recipes/{row}.py", *arguments.format(here=here).split()])
    with pytest.raises(SystemExit) as stop:
        common.cli(common.load_recipe(row))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(here.iterdir())  # nothing created


def test_the_home_folder_may_be_written_as_a_shell_does(monkeypatch):
    """Shells do not replace it after `--data-dir=`, and a sweep's file has no shell."""
    monkeypatch.setenv("HOME", "/home/me")
    cfg = common.parse(common.TrainConfig, args=["--data-dir=~/data", "--results-dir", "~/results", "--protocol=smoke"])
    assert (cfg.data_dir, cfg.results_dir) == (Path("/home/me/data"), Path("/home/me/results"))


def test_a_weight_that_is_the_only_one_may_be_0():
    assert config("teacher_augmix", jsd_weight=0.0).jsd_weight == 0


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU"):
        common.Run("kd_cutmix", config("kd_cutmix", device="cuda"))


@pytest.mark.parametrize("row", ROWS)
def test_help_explains_every_setting(row, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [row, "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    main = common.load_recipe(row)
    with pytest.raises(SystemExit) as stop:
        common.cli(main)
    assert stop.value.code == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "Published: accuracy" in text
    for field in dataclasses.fields(common.config_type(main)):
        flag = f"--{field.name.replace('_', '-')}"
        explained = re.search(rf"{flag} [^(]*?[a-z]{{3,}} [^(]*\(", text)
        assert explained, f"{flag} is not explained"


def test_a_notebooks_backend_for_figures_is_not_asked_for():
    code = "from command_line import orderly_end\nwith orderly_end():\n    import matplotlib"
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_modules_without_the_clone_say_how_to_install_it(tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    done = subprocess.run([sys.executable, "report.py"], cwd=tmp_path, capture_output=True, text=True)
    missing = tmp_path / "results" / "published.csv"
    assert done.returncode == 2 and re.fullmatch(f"error: {missing} is not there: .*pip install -e .\n", done.stderr)
