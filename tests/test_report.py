"""report.py on small results folders: statistics against numpy, what belongs to which line, --check, damaged input."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

import figures
import report
from calibration import calibration_metrics, reliability_diagram, scores_of_run
from consistency import consistency_bars, errors_by_chance
from rows import Row, Statistic, number, plus_minus, read_run
from run_files import UserError, read_published, variant, write_csv
from run_files import read_csv as read_numbers

ROOT = Path(report.__file__).parent
MARKED = "before\n<!-- table:begin -->\nold\n<!-- table:end -->\nafter\n"


def make_run(results, row, seed=0, changes=None, protocol="short", dataset="cifar100", images=200, classes=10):
    """A finished run of random predictions, as `common.Run` leaves it; --val-size among the changes is heeded."""
    changes = changes or {}
    folder = results / protocol / row / f"seed{seed}{variant(changes)}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(row), len(changes)])
    labels = np.sort(rng.integers(0, classes, images))
    arrays = {"labels": labels, "val_labels": labels}
    for name in ("best", "last", "selected", "val"):
        logits = rng.normal(size=(images, classes))
        logits[np.arange(images), labels] += 2 + rng.normal()
        arrays[name] = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    if "val_size" not in changes:
        for name in ("selected", "val", "val_labels"):
            del arrays[name]
    np.savez(folder / "probabilities.npz", **arrays)
    about = {"row": row, "protocol": protocol, "seed": seed, "dataset": dataset, "changes": changes}
    about |= {"model": None, "sources": [], "classes": [], "fingerprint": "", "files": {}}
    about |= {"hardware": "abacus", "processes": None, "versions": {}}
    about |= {"settings": {"epochs": 4, "train_size": None}}
    epochs = {"best": 3, "last": 4, "selected": 2}
    result = about | {name: {"epoch": epochs[name], **scores} for name, scores in scores_of_run(arrays).items()}
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    write_csv(folder / "reliability.csv", calibration_metrics(arrays["best"], labels).bins)
    if not row.endswith("ensemble"):
        lines = [
            f"{epoch},{0.1 if epoch < 3 else 0.01},{0.2 * epoch},{0.3 - 0.05 * epoch},{30 * (seed + 1)}"
            for epoch in range(1, 5)
        ]
        (folder / "history.csv").write_text("\n".join(["epoch,lr,accuracy,ece,seconds", *lines]))
    return folder


def edit_result(folder, **values):
    result = json.loads((folder / "result.json").read_text())
    result["best"] |= values
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    return result


def run(results, **settings):
    return report.main(report.Config(results_dir=results, **settings))


def read_csv(results, protocol="short"):
    with open(results / protocol / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def rows_of(results, protocol="short"):
    return report.Report.read(results, protocol).table


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take seconds; tests of other things do without."""
    monkeypatch.setattr(figures, "draw", lambda rows, folder: [])


@pytest.fixture
def results(tmp_path, no_figures):
    """Two seeds of two rows."""
    for row in ("kd_cutmix", "teacher_ensemble"):
        for seed in (0, 1):
            make_run(tmp_path / "results", row, seed)
    return tmp_path / "results"


def test_table_has_mean_and_deviation_over_seeds_and_every_row(results):
    assert run(results) == 0
    lines = read_csv(results)
    assert [line["row"] for line in lines if not line["changes"] and line["epoch"] in ("", "best")] == [
        line["row"] for line in read_published() if not line["changes"]
    ]
    for choice in ("best", "last"):
        [line] = [line for line in lines if line["row"] == "kd_cutmix" and line["epoch"] == choice]
        scores = [json.loads(p.read_text())[choice] for p in results.glob("short/kd_cutmix/*/result.json")]
        assert line["seeds"] == "2"
        for metric in ("accuracy", "ece", "oe", "ece_15", "classwise_ece", "nll"):
            values = [score[metric] for score in scores]
            assert float(line[metric]) == pytest.approx(np.mean(values), abs=1e-6)
            assert float(line[f"{metric}_sd"]) == pytest.approx(np.std(values, ddof=1), abs=1e-6)
        assert float(line["brier_scaled"]) == pytest.approx(np.mean([s["scaled"]["brier"] for s in scores]), abs=1e-6)
        temperatures = np.mean([score["temperatures"] for score in scores], 1)  # of a seed, over the two halves
        assert float(line["temperature"]) == pytest.approx(temperatures.mean(), abs=1e-6)
        assert float(line["temperature_sd"]) == pytest.approx(temperatures.std(ddof=1), abs=1e-6)
        assert float(line["accuracy_difference"]) == pytest.approx(float(line["accuracy"]) - 0.7462, abs=2e-6)
        if choice == "best":
            bins = [
                np.loadtxt(p, delimiter=",", skiprows=1).T
                for p in results.glob("short/kd_cutmix/*/*.csv")
                if "reli" in p.name
            ]
            by_chance = np.mean([errors_by_chance(count, confidence) for count, _, confidence in bins], 0)
            found = [[float(line[f"{metric}_by_chance{sd}"]) for sd in ("", "_sd")] for metric in ("ece", "oe")]
            assert np.allclose(found, by_chance, atol=1e-6)
            shown = [f"| {mean:.4f} ± {sd:.4f} |" for mean, sd in found]
    [empty] = [line for line in lines if line["row"] == "kd_mixup"]
    assert (empty["seeds"], empty["accuracy"], empty["accuracy_published"]) == ("0", "", "0.7448")
    markdown = (results / "short" / "table.md").read_text()
    assert "| `kd_mixup` |  |  | 74.48 |  |  | 0.0399 |" in markdown
    [cutmix] = [line for line in markdown.splitlines() if line.startswith("| `kd_cutmix` | 2 | 3.0 | 74.62 |")]
    assert all(cell in cutmix for cell in shown) and "| `teacher_ensemble` | 2 |  | 80.26 |" in markdown
    assert (line["minutes"], empty["minutes"]) == ("3.0", "") and "run on abacus" in markdown  # 4 * 30 s and 4 * 60 s


def test_every_cell_is_of_its_column_and_its_epoch(results):
    assert run(results) == 0
    text = (results / "short" / "table.md").read_text()
    runs = [json.loads(file.read_text()) for file in results.glob("short/kd_cutmix/*/result.json")]
    main = {"Accuracy, %": ("accuracy", 0.7462), "ECE": ("ece", 0.0552), "OE": ("oe", 0.0357)}
    further = {"ECE, 15 bins": "ece_15", "adaptive ECE": "adaptive_ece", "classwise ECE": "classwise_ece"}
    further |= {"NLL": "nll", "Brier": "brier"}

    def lines(header: str) -> list[dict[str, str]]:
        table = text[text.index(header) :].split("\n\n")[0].splitlines()
        titles, *cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
        return [dict(zip(titles, line, strict=True)) for line in cells if line[0] == "`kd_cutmix`"]

    def shown(metric: str, values: list[float], than: float | None = None) -> str:
        statistic = Statistic.of(values)
        difference = "" if than is None else f" ({number(metric, statistic.mean - than, '+')})"
        return plus_minus(metric, statistic, " ± ") + difference

    [line] = lines("| Recipe | Seeds |")
    for choice, more in zip(("best", "last"), lines("| Recipe | Epoch |"), strict=True):
        scores = [result[choice] for result in runs]
        for title, (metric, published) in main.items():
            cell = shown(metric, [score[metric] for score in scores], than=published)
            assert line[f"{title}: {choice}"].strip("*") == cell
        for title, metric in further.items():
            pair = [shown(metric, [score[metric] for score in of]) for of in (scores, [s["scaled"] for s in scores])]
            assert more[title] == " → ".join(pair)
        assert more["Epoch"] == choice
        assert more["Temperature"] == shown("temperature", [np.mean(score["temperatures"]) for score in scores])


@pytest.mark.parametrize(
    ("accuracies", "outside"),
    [([0.7502], False), ([0.7522], True), ([0.7415], False), ([0.7402], True),  # one seed: 0.5 points from 0.7462
     ([0.76, 0.77], True), ([0.76, 0.78], False), ([0.7463, 0.7463], True)],  # more: two standard deviations
)  # fmt: skip
def test_difference_is_marked_outside_what_chance_explains(results, accuracies, outside):
    shutil.rmtree(results / "short" / "kd_cutmix")
    for seed, accuracy in enumerate(accuracies):
        edit_result(make_run(results, "kd_cutmix", seed), accuracy=accuracy)
    [row] = [row for row in rows_of(results) if row.row == "kd_cutmix"]
    difference, marked = row.difference("best", "accuracy")
    assert difference == pytest.approx(np.mean(accuracies) - 0.7462)
    assert marked is outside
    run(results)
    line = next(s for s in (results / "short" / "table.md").read_text().splitlines() if s.startswith("| `kd_cutmix`"))
    assert line.split("|")[5].strip().startswith("**") is outside


def test_calibration_is_marked_beyond_0_015_with_one_seed(tmp_path, no_figures):
    folder = make_run(tmp_path, "kd_cutmix")
    for metric, published in (("ece", 0.0552), ("oe", 0.0357)):
        for value, outside in ((published + 0.014, False), (published - 0.016, True)):
            edit_result(folder, **{metric: value})
            [row] = [row for row in rows_of(tmp_path) if row.row == "kd_cutmix"]
            assert row.difference("best", metric)[1] is outside


def test_variants_are_lines_of_their_own(results, capsys):
    published = make_run(results, "kd_vanilla", changes={"temperature": 4.0})
    make_run(results, "kd_cutmix", changes={"epochs": 2, "teacher": "teacher_cutmix"})
    make_run(results, "my_own_row", dataset="folder")  # which takes no published number from the others
    assert run(results) == 0
    seeds = {(line["row"], line["changes"], line["table"]): line["seeds"] for line in read_csv(results)}
    assert seeds["kd_vanilla", '{"temperature": 4}', "Individual KD"] == "1"
    assert seeds["kd_vanilla", "", "Individual KD"] == "0"
    assert seeds["kd_cutmix", "", "Individual KD"] == "2"
    assert seeds["kd_cutmix", '{"epochs": 2, "teacher": "teacher_cutmix"}', "Other runs"] == "1"
    assert seeds["my_own_row", "", "Other runs"] == "1"
    table, others = (results / "short" / "table.md").read_text().split("## Other runs")
    assert "| `kd_vanilla --temperature 4` | 1 | 2.0 | 74.71 |" in table
    assert "my_own_row" not in table and "my_own_row" in others
    assert "`kd_cutmix --epochs 2 --teacher teacher_cutmix`" in others
    assert "Other runs" in capsys.readouterr().out
    assert published.name.startswith("seed0-")


def test_runs_with_held_out_images_show_all_three_epochs(results):
    make_run(results, "kd_cutmix", changes={"val_size": 5000})
    run(results)
    [row] = [row for row in rows_of(results) if row.changes.get("val_size")]
    assert row.choices == ["best", "last", "selected"] and row.published["accuracy"] == 0.7462
    lines = (results / "short" / "table.md").read_text().splitlines()
    assert "Accuracy, %: published | Accuracy, %: best | Accuracy, %: last | Accuracy, %: selected" in lines[4]
    [without, with_val] = [i for i, line in enumerate(lines) if line.startswith("| `kd_cutmix")][:2]
    assert with_val == without + 1 and "`kd_cutmix --val-size 5000`" in lines[with_val]
    assert [line["epoch"] for line in read_csv(results) if "val_size" in line["changes"]] == row.choices


def test_terminal_fits_100_columns_and_says_what_the_files_say(results, capsys):
    make_run(results, "kd_ensemble_avg_softmax", changes={"val_size": 5000, "teachers": ["teacher_mixup"] * 4})
    make_run(results, "kd_ensemble_avg_softmax", changes={"val_size": 5000})
    run(results)
    out = capsys.readouterr().out
    tables = out[: out.index("written: ")]
    assert max(map(len, tables.splitlines())) <= 100
    header = next(line for line in tables.splitlines() if "ECE, 100 bins" in line)
    best, last = (line for line in read_csv(results) if line["row"] == "kd_cutmix")
    for line in (best, last):
        accuracy = f"{100 * float(line['accuracy']):.2f}±{100 * float(line['accuracy_sd']):.2f}"
        [printed] = [text for text in tables.splitlines() if line["epoch"] in text and accuracy in text]
        for metric, title in (("ece", "ECE, 100 bins"), ("oe", "OE, 100 bins")):
            cell = f"{float(line[metric]):.4f}±{float(line[f'{metric}_sd']):.4f}".replace("±0.", "±.")
            assert printed[: header.index(title) + len(title)].endswith(cell)
    assert f"{float(best['adaptive_ece_scaled']):.4f}" in tables


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "\0\1\2",
     lambda text: text.replace('"best"', '"worst"'), lambda text: text.replace('"seed": 1', '"seed": 7'),
     lambda text: re.sub(r'"accuracy": [\d.]+', '"accuracy": null', text),
     lambda text: text.replace('"train_size": null', '"train_size": "all"'),
     lambda text: re.sub(r'"nll": [\d.]+', '"nll": NaN', text),
     lambda text: re.sub(r'"nll": [\d.]+', '"nll": "x"', text),
     lambda text: re.sub(r'"temperatures": \[[^]]+\]', '"temperatures": "x"', text),
     lambda text: re.sub(r'"scaled": \{[^}]+\}', '"scaled": [1]', text),
     lambda text: text.replace('"abacus"', "5"), lambda text: text.replace('"versions": {}', '"versions": "x"'),
     lambda text: text.replace('"processes": null', '"processes": "x"')],
)  # fmt: skip
def test_damaged_result_is_named_and_left_out(results, capsys, damage):
    file = results / "short" / "kd_cutmix" / "seed1" / "result.json"
    file.write_text(damage(file.read_text()))
    assert run(results) == 1
    assert str(file) in capsys.readouterr().err
    seeds = {line["row"]: line["seeds"] for line in read_csv(results) if not line["changes"]}
    assert (seeds["kd_cutmix"], seeds["teacher_ensemble"]) == ("1", "2")


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:-3] + ",x,1", lambda text: text.replace("accuracy", "x"), lambda text: text.rstrip() + "1e999"],
)
@pytest.mark.parametrize("name", ["history.csv", "reliability.csv"])
def test_damaged_curves_are_named_and_left_out(results, capsys, name, damage):
    file = results / "short" / "kd_cutmix" / "seed1" / name
    file.write_text(damage(file.read_text()))
    assert run(results) == 1
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [lambda lines: lines[:-1], lambda lines: [*lines[:-1], "5,0.5,1.5"], lambda lines: [*lines[:-1], "5,-0.1,0.9"],
     lambda lines: [*lines[:-1], "-5,0.5,0.9"], lambda lines: [*lines[:-1], "5.5,0.5,0.9"],
     lambda lines: [*lines[:-1], "1e300,0.5,0.9"], lambda lines: [lines[0], *["0,0,0"] * 100]],
)  # fmt: skip
def test_bins_that_are_none_are_damaged(results, capsys, damage):
    file = results / "short" / "kd_cutmix" / "seed1" / "reliability.csv"
    file.write_text("\n".join(damage(file.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=rf"{file} is damaged: delete it, and report.py --recompute writes it anew"):
        read_run(file.parent)
    file.unlink()
    assert run(results, recompute=True) == 0 and read_run(file.parent).bins


def test_a_run_is_found_from_within_its_row(results, monkeypatch):
    monkeypatch.chdir(results / "short" / "kd_cutmix")
    assert read_run(Path("seed1")).result["seed"] == 1


def test_a_copy_of_a_run_is_no_further_seed(results, capsys):
    folder = results / "short" / "kd_cutmix"
    shutil.copytree(folder / "seed1", folder / "seed1-backup")
    assert run(results) == 1
    assert "seed1-backup/result.json is the result of short/kd_cutmix/seed1: it lies in the" in capsys.readouterr().err
    assert {line["row"]: line["seeds"] for line in read_csv(results)}["kd_cutmix"] == "2"


def test_runs_of_a_row_that_were_not_made_alike_are_named(results, capsys):
    settings = {"epochs": 4, "train_size": None, "lr": 0.01, "compile": "off"}
    for seed, lr in enumerate((0.01, 1e-6)):
        file = results / "short" / "kd_cutmix" / f"seed{seed}" / "result.json"
        made = {
            "settings": settings | {"lr": lr, "compile": "auto"},
            "versions": {"recipe": f"{seed}", "commit": "c0ffee12+"},
            "precision": ("fp32", "bf16")[seed],
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | made))
    assert run(results) == 0
    printed, markdown = capsys.readouterr().out, (results / "short" / "table.md").read_text()
    for text in (printed, markdown):
        assert "Runs of one row were not made alike: `kd_cutmix` (lr, precision, recipe)." in " ".join(text.split())
    assert "Commits: None, c0ffee1+." in markdown


def test_of_rows_of_ones_own_alone_the_published_table_is_left_out(tmp_path, capsys):
    make_run(tmp_path, "my_row", dataset="folder")
    make_run(tmp_path, "kd_cutmix", changes={"dataset": "folder"}, dataset="folder")
    assert run(tmp_path) == 0
    markdown = (tmp_path / "short" / "table.md").read_text()
    for text in (capsys.readouterr().out, markdown):
        assert "1 of 16 rows are there, 4 epochs on all of folder" in " ".join(text.split())
        assert "my_row" in text and "kd_mixup" not in text and "ublished epoch" not in text and "74.62" not in text
    assert "| `my_row` | 1 |" in markdown and "| `kd_cutmix --dataset folder` | 1 |" in markdown
    assert markdown.index("`kd_cutmix") < markdown.index("## Other runs") < markdown.index("`my_row")
    assert "In brackets" not in markdown
    assert [line["row"] for line in read_csv(tmp_path)] == ["kd_cutmix", "kd_cutmix", "my_row", "my_row"]
    assert run(tmp_path, check=True) == 0
    shutil.rmtree(tmp_path / "short" / "kd_cutmix")
    assert run(tmp_path) == 0
    markdown = (tmp_path / "short" / "table.md").read_text()
    assert "rows of one's own, 4 epochs on all of folder" in markdown
    assert markdown.count("| Recipe |") == 2 and "## Other runs" not in markdown


def test_a_variant_is_labelled_by_the_flags_that_make_it():
    changes = {"flips": True, "share": False, "lr": 0.1, "weights": [1.0, 5.0], "name": "a b"}
    changes |= {"temperature": 37.28491823, "train_size": 1281167}  # as a sweep draws them, and to the last digit
    assert Row("kd_cutmix", changes, "", "").label == (
        "kd_cutmix --flips --no-share --lr 0.1 --weights 1 5 --name 'a b' --temperature 37.28491823 "
        "--train-size 1281167"
    )


def test_a_history_with_a_loss_that_came_later_is_whole(tmp_path):
    lines = [{"epoch": epoch, "lr": 0.1, "accuracy": 0.5, "ece": 0.1} for epoch in (1, 2, 3)]
    lines[1]["kd_loss"] = 0.5
    write_csv(tmp_path / "history.csv", lines)
    assert read_numbers(tmp_path / "history.csv") == lines


def test_results_are_read_without_torch():
    code = "import sys, report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_to_report_says_what_to_run_first(tmp_path, results, monkeypatch, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"uv run recipes/teacher_baseline.py"):
            run(folder)
    with pytest.raises(UserError, match=rf"is of one protocol: --results-dir {results} --protocol short"):
        run(results / "short")
    with pytest.raises(UserError, match=r"no results in"):
        run(tmp_path / "nowhere", check=True)
    with pytest.raises(UserError, match=r"protocol quick.*found: short"):
        run(results, protocol="quick")
    for flag, value in {"recompute": True, "wandb": "me/project"}.items():
        with pytest.raises(UserError, match=f"--check writes nothing and --{flag} does"):
            run(results, check=True, **{flag: value})
    monkeypatch.setattr("sys.argv", ["report.py", "--results-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        report.cli()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_names_the_rows_that_are_out_of_date(tmp_path, results, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    assert run(results, readme=readme) == 0
    for file in results.rglob("*"):
        os.utime(file, (0, 0))  # a checkout has no file times
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert run(results, readme=readme, check=True) == 0

    edit_result(results / "short" / "kd_cutmix" / "seed1", accuracy=0.5)
    capsys.readouterr()
    assert run(results, readme=readme, check=True) == 1
    err = capsys.readouterr().err
    for name in ("table.md", "table.csv", "figures", "README.md"):
        assert re.search(rf"{name} (is|are) older than the results of kd_cutmix:", err), err
    assert "teacher_ensemble" not in err

    assert run(results, readme=readme) == 0 and run(results, readme=readme, check=True) == 0
    make_run(results, "kd_mixup")
    assert run(results, readme=readme, check=True) == 1
    assert "kd_mixup" in capsys.readouterr().err
    assert {file for file in tmp_path.rglob("*") if file.is_file()} - before.keys() == {
        results / "short" / "kd_mixup" / "seed0" / name
        for name in ("result.json", "probabilities.npz", "reliability.csv", "history.csv")
    }  # checking has written nothing


def test_check_without_results_holds_readme_to_the_published_table(tmp_path, no_figures):
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    assert run(tmp_path, readme=readme, check=True) == 1
    with pytest.raises(UserError):
        run(tmp_path, readme=readme)
    assert "| `kd_cutmix` |  | 74.62 | 0.0552 | 0.0357 |" in readme.read_text()
    assert run(tmp_path, readme=readme, check=True) == 0


def test_readme_shows_the_table_with_most_rows_and_nothing_else_changes(tmp_path, results, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    for row in ("kd_cutmix", "kd_mixup", "kd_vanilla"):
        make_run(results, row, protocol="smoke", dataset="digits")
    make_run(results, "kd_mixup", protocol="paper")
    make_run(results, "kd_vanilla", changes={"temperature": 4.0}, protocol="paper")
    run(results, readme=readme, protocol="short")
    assert "Protocol `short`: 2 of 16 rows are there" in readme.read_text()

    make_run(results, "student_baseline", protocol="paper")  # as many rows: the longer training
    run(results, readme=readme, protocol="short")
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:begin -->\n") and text.endswith("\n<!-- table:end -->\nafter\n")
    assert (
        "Protocol `paper`: 2 of 16 rows are there, 4 epochs on all of cifar100" in text
        and "old" not in text.split("begin")[1].split("\n")[1]
    )
    assert not (results / "paper" / "table.md").exists()

    shutil.rmtree(results / "paper")
    make_run(results, "my_row", protocol="paper", dataset="folder")  # nobody's table, but one of own images
    run(results, readme=readme)
    assert "Protocol `short`" in readme.read_text()
    shutil.rmtree(results / "short")
    run(results, readme=readme)
    assert "The published numbers" in readme.read_text()

    readme.write_text("no markers\n")
    assert run(results, readme=readme) == 0
    assert readme.read_text() == "no markers\n" and "left as it is" in capsys.readouterr().err


def test_a_damaged_result_of_the_readmes_table_is_named_whichever_protocol_is_reported(tmp_path, results, capsys):
    make_run(results, "kd_mixup", protocol="smoke", dataset="digits")
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    assert run(results, readme=readme, protocol="smoke") == 0
    damaged = results / "short" / "kd_cutmix" / "seed0" / "result.json"
    damaged.write_text(damaged.read_text()[:-100])
    for check in (True, False):
        assert run(results, readme=readme, protocol="smoke", check=check) == 1
        assert capsys.readouterr().err.count(f"{damaged} is damaged") == 1


def test_the_table_in_wandb_is_that_of_the_protocol_that_is_asked_for(results, monkeypatch, capsys):
    make_run(results, "kd_mixup", protocol="smoke", dataset="digits")
    publish = SimpleNamespace(publish=lambda target, protocol, rows: f"{protocol}: {sum(bool(r.runs) for r in rows)}")
    monkeypatch.setitem(sys.modules, "wandb_report", publish)
    assert run(results, wandb="me/project") == run(results, wandb="me/project", protocol="smoke") == 0
    out = capsys.readouterr().out
    assert "report: short: 2\n" in out and "report: smoke: 1\n" in out


def test_of_each_row_the_settings_are_shown_that_held_out_images_chose(tmp_path, no_figures):
    def tried(row, held_out, lr=None, seed=0, val_size=5000, epochs=4):
        changes = {"epochs": epochs} if epochs != 4 else {}
        changes |= ({"lr": lr} if lr else {}) | {"val_size": val_size}
        folder = make_run(tmp_path, row, seed, changes)
        result = json.loads((folder / "result.json").read_text())
        result["settings"] |= {"val_size": val_size, "epochs": epochs}
        result["fingerprint"] = f"with the images of seed {seed} held out"
        (folder / "result.json").write_text(json.dumps(result))
        lines = (folder / "history.csv").read_text().splitlines()
        values = ["val_accuracy", 0.99, held_out, 0.99, 0.99]  # the epoch that was chosen is the second
        (folder / "history.csv").write_text("\n".join(f"{e},{v}" for e, v in zip(lines, values, strict=True)))
        return result["selected"]

    tried("kd_mixup", 0.5)  # nothing to choose from
    tried("kd_cutmix", 0.9, val_size=500)  # not the same images
    tried("kd_cutmix", 0.9, epochs=8)  # not as long a training
    tried("kd_cutmix", 0.59)
    tried("kd_cutmix", 0.9, seed=7)  # a seed that not all have
    chosen = [tried("kd_cutmix", 0.6 + 0.02 * seed, lr=0.02, seed=seed) for seed in (0, 1, 2)]
    tried("kd_cutmix", 0.58, lr=0.04)
    for lr, seed, held_out in ((None, 0, 0.9), (None, 1, 0.5), (0.02, 1, 0.6), (0.02, 2, 0.1)):  # seed 1 decides
        tried("kd_augmix", held_out, lr=lr, seed=seed)
    tried("student_baseline", 0.4)
    tried("student_baseline", 0.3, lr=0.02)
    make_run(tmp_path, "student_baseline", changes={"lr": 0.04})  # without held-out images
    assert run(tmp_path) == 0
    text = (tmp_path / "short" / "table.md").read_text()
    lines = text[text.index("## Each row at its best settings") :].split("\n\n")[2].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| `student_baseline --val-size 5000`",  # in the order of the table
        "| `kd_cutmix --lr 0.02 --val-size 5000`",
        "| `kd_augmix --lr 0.02 --val-size 5000`",
    ]
    values = [100 * scores["accuracy"] for scores in chosen]
    assert f"| 3 | 3 | 62.00 ± 2.00 | {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} |" in lines[3]
    values = [scores["scaled"]["ece_15"] for scores in chosen]
    assert f"| {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} |" in lines[3]
    values = [scores["temperatures"][0] for scores in chosen]
    assert lines[3].endswith(f"| {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} |")
    shutil.rmtree(tmp_path / "short" / "kd_cutmix")
    shutil.rmtree(tmp_path / "short" / "student_baseline")
    shutil.rmtree(tmp_path / "short" / "kd_augmix")
    run(tmp_path)
    assert "best settings" not in (tmp_path / "short" / "table.md").read_text()


def test_a_table_with_held_out_images_is_a_table(tmp_path):
    for row in ("teacher_baseline", "teacher_cutmix"):
        for seed in (0, 1):
            folder = make_run(tmp_path, row, seed, changes={"val_size": 5000}, protocol="short")
            result = json.loads((folder / "result.json").read_text())
            result["settings"]["val_size"] = 5000
            result |= {"precision": "bf16", "processes": 1 + seed, "versions": {"commit": "0123456789"}}
            (folder / "result.json").write_text(json.dumps(result))
    assert run(tmp_path) == 0
    text = (tmp_path / "short" / "table.md").read_text()
    assert (
        "2 of 16 rows are there, 4 epochs on all but 5,000 of cifar100, run on abacus, bf16 and abacus, bf16, 2" in text
    )
    assert "2 processes. Commits: 0123456." in text
    assert "Does augmentation calibrate the teacher?" in text
    assert (tmp_path / "short" / "figures" / "reliability_teachers.png").is_file()


def test_where_runs_are_not_comparable_no_difference_to_the_published_is_taken(tmp_path, capsys):
    folder = make_run(tmp_path, "kd_cutmix", protocol="cpu")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"settings": {"epochs": 5, "train_size": 5000}}))
    make_run(tmp_path, "kd_vanilla", changes={"temperature": 4.0}, protocol="cpu")
    make_run(tmp_path, "kd_mixup", changes={"lr": 1.0}, protocol="cpu")
    assert run(tmp_path) == 0
    printed, markdown = capsys.readouterr().out, (tmp_path / "cpu" / "table.md").read_text()
    for text in (printed, markdown):
        text = " ".join(text.split())
        assert "Not comparable" in text and "5 epochs on 5,000 images of cifar100" in text
    assert "In brackets" not in markdown and "published, *" not in printed
    assert {line["accuracy_difference"] for line in read_csv(tmp_path, "cpu")} == {""}
    accuracy = json.loads((folder / "result.json").read_text())["best"]["accuracy"]
    assert f"| `kd_cutmix` | 1 | 2.0 | 74.62 | {accuracy:.2%}".rstrip("%") + " |" in markdown
    texts = {file.stem: file.read_text() for file in (tmp_path / "cpu" / "figures").glob("*.svg")}
    assert len(texts) == 5 and not any("ublished" in text for text in texts.values())
    assert run(tmp_path, check=True) == 0


@pytest.mark.parametrize(
    "changes", [{"precision": "fp32"}, {"val_size": 5000}, {"precision": "bf16", "val_size": 5000}]
)
def test_neither_precision_nor_images_held_out_make_a_row_incomparable(tmp_path, changes):
    make_run(tmp_path, "kd_cutmix", changes=changes)
    [row] = [row for row in rows_of(tmp_path) if row.runs]
    assert row.difference("best", "accuracy")
    make_run(tmp_path, "kd_cutmix", changes={**changes, "epochs": 60}, protocol="paper")
    [row] = [row for row in rows_of(tmp_path, "paper") if row.runs]
    assert row.published and not row.comparable


def test_of_other_images_the_published_numbers_are_left_out(tmp_path, no_figures, capsys):
    make_run(tmp_path, "kd_cutmix", protocol="smoke", dataset="digits")
    run(tmp_path)
    for text in (capsys.readouterr().out, (tmp_path / "smoke" / "table.md").read_text()):
        assert "Not comparable" in " ".join(text.split()) and "74.62" not in text
    assert {line["accuracy_published"] for line in read_csv(tmp_path, "smoke")} == {""}


def test_other_images_have_no_place_in_a_table_of_cifar100(tmp_path, no_figures):
    for row in ("teacher_baseline", "kd_vanilla"):
        make_run(tmp_path, row, changes={"epochs": 60, "dataset": "folder"}, dataset="folder")
    make_run(tmp_path, "teacher_baseline")
    found = report.Report.read(tmp_path, "short")
    assert [row.label for row in found.table if row.runs] == ["teacher_baseline"]
    assert [row.changes for row in found.table if row.row == "teacher_baseline"] == [{}]
    assert [row.row for row in found.others] == ["kd_vanilla", "teacher_baseline"]
    assert not any(row.published for row in found.others)


def test_own_readme_is_not_touched_for_results_elsewhere(results):
    before = (ROOT / "README.md").read_bytes()
    run(results)
    assert (ROOT / "README.md").read_bytes() == before


def test_runs_without_a_metric_that_was_added_since_are_named(results, monkeypatch, capsys):
    monkeypatch.setitem(report.FURTHER, "my_metric", "mine")
    assert run(results) == 0
    assert re.search(r"without further metrics \(.*kd_cutmix/seed0", capsys.readouterr().out)


def test_recomputed_metrics_of_a_run_from_before_a_metric_are_those_of_a_fresh_one(results, capsys):
    folder = results / "short" / "kd_cutmix" / "seed0"
    fresh = (folder / "result.json").read_bytes(), (folder / "reliability.csv").read_bytes()
    (folder / "reliability.png").write_bytes(b"older")
    result = json.loads(fresh[0])
    for choice in ("best", "last"):
        del result[choice]["ece_15"], result[choice]["scaled"]["ece_15"]
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    (folder / "reliability.csv").unlink()
    assert run(results) == 0
    assert "kd_cutmix/seed0" in capsys.readouterr().out
    assert run(results, recompute=True) == 0
    assert ((folder / "result.json").read_bytes(), (folder / "reliability.csv").read_bytes()) == fresh
    with np.load(folder / "probabilities.npz") as arrays:
        metrics = calibration_metrics(arrays["best"], arrays["labels"])
    reliability_diagram(metrics, "kd_cutmix, epoch 3").savefig(results / "drawn.png", dpi=200)
    assert (folder / "reliability.png").read_bytes() == (results / "drawn.png").read_bytes()


def test_a_note_on_the_runs_of_a_protocol_is_in_its_table(results, capsys):
    assert run(results) == 0
    (results / "short" / "note.md").write_text("A fault of these runs.\n")
    assert run(results, check=True) == 1
    assert run(results) == 0
    assert "\n\nA fault of these runs.\n\n| Recipe |" in (results / "short" / "table.md").read_text()
    assert "\nA fault of these runs.\n" in capsys.readouterr().out
    assert run(results, check=True) == 0
    (results / "short" / "table.md").write_bytes(b"\xff\xfe")
    assert run(results, check=True) == 1
    (results / "short" / "note.md").write_bytes("± und ü".encode("latin-1"))
    with pytest.raises(UserError, match=r"note\.md is not in UTF-8"):
        run(results)


def test_recompute_names_probabilities_that_are_damaged_or_not_there(results, capsys):
    cut, gone = (results / "short" / "kd_cutmix" / f"seed{seed}" / "probabilities.npz" for seed in (0, 1))
    cut.write_bytes(cut.read_bytes()[:1000])
    gone.unlink()
    before = [(file.parent / "result.json").read_bytes() for file in (cut, gone)]
    assert run(results, recompute=True) == 1
    err = capsys.readouterr().err
    assert f"{cut} cannot be used: " in err and f"{gone} is not there" in err
    assert [(file.parent / "result.json").read_bytes() for file in (cut, gone)] == before
    assert {line["row"]: line["seeds"] for line in read_csv(results)}["kd_cutmix"] == "2"


def test_figures_are_drawn_from_what_there_is_and_always_the_same(tmp_path):
    for row in ("kd_cutmix", "teacher_ensemble", "teacher_mixup"):
        make_run(tmp_path, row)
    assert run(tmp_path) == 0
    folder = tmp_path / "short" / "figures"
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    stems = (
        "reliability_teachers",
        "reliability_students",
        "calibration_teachers",
        "accuracy_ece",
        "training_accuracy",
        "training_ece",
        "confidence",
    )
    assert first.keys() == {"sources.json"} | {stem + suffix for stem in stems for suffix in (".png", ".svg")}
    for name in first:
        if name.endswith(".png"):
            assert min(Image.open(folder / name).size) > 300
    assert run(tmp_path) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first

    (folder / "confidence.svg").unlink()
    assert run(tmp_path, check=True) == 1
    shutil.rmtree(tmp_path / "short" / "kd_cutmix")
    assert run(tmp_path) == 0
    assert not (folder / "reliability_students.png").exists()  # there is nothing left to draw it from


def test_figures_show_rows_of_ones_own_with_the_tables_settings(tmp_path):
    at_60 = {"epochs": 60}
    for row in ("teacher_mixup", "kd_mixup", "teacher_my_row"):
        make_run(tmp_path, row, changes=at_60)
    for changes in ({}, at_60 | {"alpha": 0.5}):
        make_run(tmp_path, "my_row", changes=changes)
    made = report.Report.read(tmp_path, "short")
    assert [row.row for row in made.drawn if row.runs] == ["teacher_mixup", "kd_mixup", "teacher_my_row"]
    assert run(tmp_path) == 0
    texts = {file.stem: file.read_text() for file in (tmp_path / "short" / "figures").glob("*.svg")}
    shown = {name for name, text in texts.items() if "teacher_my_row" in text}
    assert shown == texts.keys() - {"reliability_students", "temperatures"}
    assert run(tmp_path, check=True) == 0
    make_run(tmp_path, "teacher_my_row", seed=1, changes=at_60)
    assert made.sources() != report.Report.read(tmp_path, "short").sources()


def test_figures_of_rows_of_ones_own_alone_are_of_these(tmp_path):
    make_run(tmp_path, "my_row")
    assert run(tmp_path) == 0
    text = (tmp_path / "short" / "figures" / "accuracy_ece.svg").read_text()
    assert "my_row" in text and "kd_vanilla" not in text


def test_no_text_overlaps_in_the_figures(tmp_path):
    for row in read_published():
        if not row["changes"]:
            for seed in (0, 1):
                make_run(tmp_path, row["row"], seed)
    rows = [row for row in rows_of(tmp_path) if not row.changes]
    with matplotlib.rc_context(figures.STYLE):
        for figure in (figures.accuracy_ece(rows), figures.reliability(rows[6:]), figures.confidence(rows)):
            figure.draw_without_rendering()
            texts = [axes.title for axes in figure.axes] + [text for axes in figure.axes for text in axes.texts]
            boxes = [text.get_window_extent() for text in texts if text.get_text()]
            assert len(boxes) >= 10
            overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
            assert not overlaps
        few = [rows[6:], rows[6:10], rows[6:9], rows[6:8], rows[6:7]]
        drawn = [plot(shown) for shown in few for plot in (figures.reliability, figures.confidence)]
        drawn += [figures.training(shown, "ece") for shown in few]
        drawn.append(figures.temperatures(rows))
        for figure in (figures.curves(rows[:6]), figures.accuracy_ece(rows), *drawn):
            figure.draw_without_rendering()
            for legend in figure.legends:
                box = legend.get_window_extent()
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_a_students_temperature_is_drawn_over_its_teachers_seed_by_seed(tmp_path):
    for row, seeds in {"teacher_mixup": 3, "kd_mixup": 2, "kd_vanilla": 1, "student_baseline": 2}.items():
        for seed in range(seeds):
            make_run(tmp_path, row, seed)
    rows = {row.row: row for row in rows_of(tmp_path) if row.runs}
    fitted = {name: [np.mean(run.result["last"]["temperatures"]) for run in row.runs] for name, row in rows.items()}
    shown = figures.taught(rows.values())
    assert [row.row for row in shown] == ["teacher_mixup", "kd_mixup", "student_baseline"]  # of kd_vanilla's none ran
    diagonal, level, *calibrated, marks = figures.temperatures(shown).axes[0].lines
    assert [line.get_xydata().tolist() for line in calibrated] == [[[0, 1], [1, 1]], [[1, 0], [1, 1]]]
    assert diagonal.get_slope() == 1 and diagonal.get_xy1() == (1, 1)
    assert level.get_ydata() == pytest.approx([np.mean(fitted["student_baseline"])] * 2)
    assert marks.get_xydata() == pytest.approx(np.transpose([fitted["teacher_mixup"][:2], fitted["kd_mixup"]]))
    assert marks.get_label() == "kd_mixup"
    assert figures.taught([rows["kd_mixup"], rows["student_baseline"]]) == []


def test_figures_show_the_numbers_of_their_row(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "kd_cutmix", seed)
    [row] = rows = [row for row in rows_of(tmp_path) if row.runs]
    accuracy, ece, oe = (row.statistic("best", metric) for metric in ("accuracy", "ece", "oe"))
    runs = [np.array([[b[name] for b in run.bins] for name in ("count", "accuracy", "confidence")]) for run in row.runs]
    pooled = sum(np.stack([n, n * a, n * c]) for n, a, c in runs).reshape(3, 20, 5).sum(2)
    count, correct, confident = pooled[:, pooled[0] > 0]

    panel = figures.reliability(rows).axes[0]
    assert [bar.get_height() for bar in panel.containers[0]] == pytest.approx(correct / count)
    ends = [segment[:, 1] for segment in panel.collections[0].get_segments()]
    assert np.allclose(ends, np.stack(consistency_bars(np.ceil(count / 2), confident / count), 1))
    errors = [f"{name} {plus_minus('ece', of, ' ± ')}" for name, of in (("ECE", ece), ("OE", oe))]
    assert panel.get_title() == "\n".join(["kd_cutmix", *errors])
    means = [line.get_xdata()[0] for line in figures.confidence(rows).axes[0].lines]
    assert means == pytest.approx([correct.sum() / 400, confident.sum() / 400])
    axes = figures.accuracy_ece(rows).axes[0]
    assert axes.containers[0].lines[0].get_xydata() == pytest.approx(np.array([[100 * accuracy.mean, ece.mean]]))
    [published] = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert published.get_xydata() == pytest.approx(np.array([[74.62, 0.0552]]))
    for metric, values, theirs in (("accuracy", [20, 40, 60, 80], 74.62), ("ece", [0.25, 0.2, 0.15, 0.1], 0.0552)):
        falls, mean, published = figures.training(rows, metric).axes[0].lines
        assert falls.get_xdata()[0] == 2.5 and mean.get_xydata() == pytest.approx(np.stack([[1, 2, 3, 4], values], 1))
        assert published.get_ydata()[0] == pytest.approx(theirs)


def test_bins_of_few_images_show_by_their_bars_what_they_are_worth(tmp_path):
    folder = make_run(tmp_path, "kd_cutmix")
    counts = [0] * 100
    counts[30], counts[60], counts[97] = figures.FEW - 1, figures.FEW, 181
    lines = [f"{n},0.5,{(i + 0.5) / 100}" for i, n in enumerate(counts)]
    (folder / "reliability.csv").write_text("\n".join(["count,accuracy,confidence", *lines]))
    rows = [row for row in rows_of(tmp_path) if row.runs]
    panel = figures.reliability(rows).axes[0]
    assert [bar.get_x() for bar in panel.patches] == pytest.approx([0.3, 0.6, 0.95] * 2)  # accuracy, and the gap on it
    ends = [segment[:, 1] for segment in panel.collections[0].get_segments()]
    want = [
        binom.ppf([0.025, 0.975], n, c) / n for n, c in ((figures.FEW - 1, 0.305), (figures.FEW, 0.605), (181, 0.975))
    ]
    assert np.allclose(ends, want)
    _, curve = figures.curves(rows).axes[0].lines  # a line through them would say too much
    assert list(curve.get_xdata()) == pytest.approx([0.605, 0.975])
    [dash] = [line for line in figures.accuracy_ece(rows).axes[0].lines if line.get_marker() == "_"]
    assert dash.get_ydata() == pytest.approx([rows[0].by_chance["ece"].mean])
