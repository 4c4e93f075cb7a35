"""The answers to the table's questions, by numpy and by hand."""

import numpy as np
import pytest
from conftest import ROWS
from scipy.stats import ttest_1samp

import common
import questions
from questions import ACCURACY, ECE, ECE_SCALED, ECE_THAN_SCALED, QUESTIONS, TAUGHT_BY
from rows import FinishedRun, Row, as_published, sort_into_rows


def runs(**scores: list[float]) -> list[FinishedRun]:
    """Finished runs of the seeds 0, 1, ...: `metric=[...]`, and `scaled_metric=[...]` for after scaling."""
    made = []
    for seed, values in enumerate(zip(*scores.values(), strict=True)):
        last = {"temperatures": [1.0, 1.0], **dict(zip(scores, values, strict=True))}
        last["scaled"] = {name[7:]: last.pop(name) for name in list(last) if name.startswith("scaled_")}
        result = {"row": "", "changes": {}, "seed": seed, "protocol": "short", "last": last}
        made.append(FinishedRun(result, [], [], ""))
    return made


def table(**of_rows: list[FinishedRun]) -> list[Row]:
    rows, _ = sort_into_rows([])
    for row in rows:
        row.runs = of_rows.get(row.row, []) if not row.changes else []
    return rows


def test_rows_are_those_of_the_table_and_taught_as_their_recipes_say():
    assert {name for question in QUESTIONS for name in (*question.rows, question.than)} == set(ROWS)
    for student, teacher in TAUGHT_BY.items():
        assert common.config_type(common.load_recipe(student))().teacher == teacher


def test_differences_are_of_the_seeds_that_both_have():
    a = Row("a", {}, "", "", runs=runs(ece=[0.1, 0.2, 0.4], ece_15=[0.3, 0.6, 0.7], scaled_ece_15=[0.01, 0.02, 0.04]))
    b = Row("b", {}, "", "", runs=runs(ece=[0.5, 0.1], scaled_ece_15=[0.03, 0.05]))
    expected = {
        ECE: [0.1 - 0.5, 0.2 - 0.1],
        ECE_SCALED: [0.01 - 0.03, 0.02 - 0.05],
        ECE_THAN_SCALED: [0.3 - 0.03, 0.6 - 0.05],
    }
    for comparison, differences in expected.items():
        assert questions.ours(a, b, comparison) == pytest.approx(differences)
    assert questions.ours(a, b, ACCURACY) == questions.ours(a, Row("c", {}, "", ""), ECE) == []


def test_of_one_row_what_is_significant_is_so_by_scipys_t_test_of_three_seeds_or_more():
    random, found = np.random.default_rng(0), []
    for n in (3, 4, 5, 20):
        for shift in np.linspace(0, 3, 30):
            differences = list(shift + random.normal(size=n))
            found += questions.significant([differences])
            assert found[-1] == (ttest_1samp(differences, 0).pvalue < 0.05)
    assert 20 < sum(found) < 100
    assert questions.significant([[0.1] * 3]) == [True] and questions.significant([[0.0] * 3]) == [False]
    assert questions.significant([[0.1] * 2]) == [False]


def test_seeds_of_several_rows_are_pooled():
    """By hand: variances of 2, 8 and 2 with a degree of freedom each; a row of one seed is judged by the others'."""
    column = [[19.0, 21.0], [-2.0, 2.0], [4.0, 6.0], [30.0], []]
    sd, free = questions.pooled(column)
    assert sd == pytest.approx(2.0) and free == pytest.approx(3 * 4 / 6)
    # t of two degrees of freedom is 4.30; the means' deviations are 1.41, and 2 of one seed
    assert questions.significant(column) == [True, False, False, True, False]
    assert questions.significant([[19.0, 21.0], [-2.0, 2.0]]) == [False, False]  # two rows of two seeds are too few
    assert questions.significant([[0.1], [0.2], [0.3]]) == [False] * 3


@pytest.mark.parametrize(("rows", "seeds"), [(1, 3), (4, 2), (8, 3)])
def test_degrees_of_freedom_are_those_of_differences_from_one_row(rows, seeds):
    """A variance's relative variance is 2 over its degrees of freedom; and nothing is found too often."""
    values = np.random.default_rng(0).normal(size=(4000, rows + 1, seeds))
    columns = (values[:, 1:] - values[:, :1]).tolist()
    variances = np.array([questions.pooled(column)[0] ** 2 for column in columns])
    assert variances.mean() == pytest.approx(2, rel=0.05)
    assert questions.pooled(columns[0])[1] == pytest.approx(2 * variances.mean() ** 2 / variances.var(), rel=0.1)
    assert 0.01 < np.mean([questions.significant(column) for column in columns[:1000]]) < 0.06


def test_what_is_clear_is_bold_and_what_was_published_but_is_not_seen_is_named():
    text = questions.markdown(
        table(
            teacher_baseline=runs(ece=[0.10, 0.11, 0.12]),
            teacher_mixup=runs(ece=[0.03, 0.05, 0.04]),  # -0.07 ± 0.01: as published
            teacher_cutmix=runs(ece=[0.01, 0.10, 0.11]),  # -0.037 ± 0.046: nothing
            teacher_cutout=runs(ece=[0.20, 0.21, 0.22]),  # +0.1 ± 0: the other way
        )
    )
    assert "| minus `teacher_baseline` | ECE: published | ECE | ECE, 15 bins, both scaled |" in text
    assert "| `teacher_mixup` | -0.0753 | **-0.0700 ± 0.0100** |  |" in text
    assert "| `teacher_cutmix` | -0.0789 | -0.0367 ± 0.0462 |  |" in text
    assert "| `teacher_cutout` | -0.0329 | **+0.1000 ± 0.0000** |  |" in text
    unseen = "`teacher_cutmix`, ECE (may be chance); `teacher_cutout`, ECE (the other way)"
    assert f"not reproduced at our last epoch: {unseen}." in text
    assert text.count("### ") == 1 and "teacher_augmix" not in text  # what did not run is not answered


@pytest.mark.parametrize(("seeds", "text"), [(1, "-60.00"), (2, "-60.00 ± 0.00")])
def test_one_seed_or_two_of_one_row_make_nothing_clear(seeds, text):
    rows = table(student_baseline=runs(accuracy=[0.7] * seeds), kd_vanilla=runs(accuracy=[0.1] * seeds))
    assert f"| {text} |" in questions.markdown(rows)


def test_without_comparable_numbers_nothing_is_said_of_the_published():
    rows = table(student_baseline=runs(accuracy=[0.7]), kd_vanilla=runs(accuracy=[0.6]))
    assert "accuracy, points: published" in questions.markdown(rows)
    for row in rows:
        for run in row.runs:
            run.result["protocol"] = "quick"
    text = questions.markdown(rows)
    assert "-10.00" in text and "ublished" not in text
    assert questions.markdown(table()) == ""


def sorted_runs(*runs_of: tuple[str, dict, float]) -> list[Row]:
    """The table of runs of that row, changes and accuracy."""
    made = [(row, changes, *runs(accuracy=[accuracy])) for row, changes, accuracy in runs_of]
    for row, changes, run in made:
        run.result.update(row=row, changes=changes, dataset="cifar100")
    return sort_into_rows([run for *_, run in made])[0]


@pytest.mark.parametrize("settings", [{"val_size": 5000}, {"epochs": 60, "val_size": 500}, {"dataset": "folder"}])
def test_settings_that_most_rows_have_are_those_of_the_table_that_answers(settings):
    untaught, taught = ("student_baseline", settings, 0.7), ("kd_vanilla", settings, 0.6)
    temperature = ("kd_vanilla", settings | {"temperature": 4.0}, 0.5)
    assert questions.markdown(sorted_runs(untaught, temperature)) == ""
    rows = sorted_runs(untaught, taught, temperature, ("student_baseline", {}, 0.9))
    assert "| -10.00 |" in questions.markdown(rows)
    assert [row.changes for row in rows if row.row == "kd_vanilla"] == [settings, settings | {"temperature": 4.0}]
    assert all(row.published for row in rows)
    assert any(row.comparable for row in rows if row.changes) == (settings.keys() == {"val_size"})
    assert questions.markdown(sorted_runs(("student_baseline", {}, 0.7), taught)) == ""  # never the two mixed


def test_settings_of_a_search_are_never_those_of_the_table():
    rows = sorted_runs(*[(row, {"lr": 0.1}, 0.6) for row in ROWS], ("kd_vanilla", {}, 0.5))
    assert [row.row for row in as_published(rows) if row.runs] == ["kd_vanilla"]
    assert all(row.runs == [] or row.changes == {} for row in rows)


def test_rows_with_as_many_held_out_images_as_most_answer_together():
    held_out = [("kd_vanilla", {"val_size": 5000}, 0.6)]
    held_out += [("student_baseline", {"val_size": n}, 0.7) for n in (20000, 5000, 500)]
    for order in (held_out, held_out[::-1]):
        chosen = [row for row in as_published(sorted_runs(*order)) if row.runs]
        assert {row.row: row.changes["val_size"] for row in chosen} == {"kd_vanilla": 5000, "student_baseline": 5000}


def test_teachers_stand_beside_the_students_that_they_taught_with_their_temperatures():
    rows = table(
        teacher_mixup=runs(ece=[0.1, 0.1], accuracy=[0.5, 0.6], temperatures=[[0.7, 0.9], [1.0, 1.0]]),
        kd_mixup=runs(ece=[0.1, 0.1], accuracy=[0.4, 0.4], temperatures=[[0.8, 0.8], [0.8, 0.9]]),
        teacher_cutmix=runs(ece=[0.1], accuracy=[0.5], temperatures=[[0.7, 0.9]]),  # whose student did not run
        kd_vanilla=runs(ece=[0.1], accuracy=[0.4], temperatures=[[0.8, 0.8]]),  # whose teacher did not
        student_baseline=runs(accuracy=[0.3], temperatures=[[1.1, 1.2]]),
    )
    text = questions.markdown(rows)
    [heading] = [i for i, line in enumerate(text.splitlines()) if line.startswith("| teacher |")]
    assert text.splitlines()[heading + 2 :][:3] == [
        "| `teacher_mixup` | 55.00 ± 7.07 | 0.90 ± 0.14 | `kd_mixup` | 40.00 ± 0.00 | 0.83 ± 0.04 |",
        "| none |  |  | `student_baseline` | 30.00 | 1.15 |",
        "",
    ]


def test_rank_correlation_is_one_minus_the_squared_differences_of_ranks():
    def spearman(a, b) -> float:
        ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
        return 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (5 * (25 - 1))

    random = np.random.default_rng(0)
    teachers, students = random.random((5, 3)), random.random((5, 3))
    of_rows = {row: runs(ece=list(values)) for row, values in zip(TAUGHT_BY, students, strict=True)}
    of_rows |= {row: runs(ece=list(values)) for row, values in zip(TAUGHT_BY.values(), teachers, strict=True)}
    rows = {row.row: row for row in table(**of_rows) if not row.changes}
    ours, theirs = questions.rank_correlation(rows, "ece")
    expected = [spearman(*pair) for pair in zip(teachers.T, students.T, strict=True)]
    assert ours.mean == pytest.approx(np.mean(expected)) and ours.sd == pytest.approx(np.std(expected, ddof=1))
    published = [[rows[name].published["ece"] for name in names] for names in (TAUGHT_BY.values(), TAUGHT_BY)]
    assert theirs == pytest.approx(spearman(*published)) == pytest.approx(0.9)
    text = questions.markdown(rows.values())
    assert f"too little: {ours.mean:.2f} ± {ours.sd:.2f} (published: 0.90)." in text


def test_a_seed_whose_teachers_or_students_are_all_equal_has_no_rank_correlation():
    eces = [0.1, 0.2, 0.3, 0.4, 0.5]
    # seed 0: the same order; seed 1: equal teachers; seed 2: equal students; seed 3: one teacher is missing
    teachers = {name: runs(ece=[ece, 0.1, ece, ece]) for name, ece in zip(TAUGHT_BY.values(), eces, strict=True)}
    students = {name: runs(ece=[ece, ece, 0.1, ece]) for name, ece in zip(TAUGHT_BY, eces, strict=True)}
    teachers["teacher_mixup"].pop()
    rows = {row.row: row for row in table(**teachers, **students) if not row.changes}
    assert questions.rank_correlation(rows, "ece")[0] == (pytest.approx(1), None)
    assert "too little: 1.00 (published: 0.90)." in questions.markdown(rows.values())
    for row in rows.values():
        row.runs = row.runs[1:]
    assert questions.rank_correlation(rows, "ece")[0] is None
    assert "rank correlation" not in questions.markdown(rows.values())


def test_rank_correlation_of_temperatures_knows_too_much_confidence_from_too_little():
    """ECE sees teachers and students in the same order; what they need is the opposite."""
    eces, needed = [0.1, 0.2, 0.3, 0.4, 0.5], [1.1, 1.2, 1.3, 1.4, 1.5]
    of_rows = {}
    for i, (student, teacher) in enumerate(TAUGHT_BY.items()):
        of_rows[teacher] = runs(ece=[eces[i]], temperatures=[[needed[i], needed[i]]])
        of_rows[student] = runs(ece=[eces[i]], temperatures=[[1 / needed[i], 1 / needed[i]]], accuracy=[0.5])
    rows = {row.row: row for row in table(**of_rows) if not row.changes}
    assert questions.rank_correlation(rows, "temperature") == ((pytest.approx(-1), None), None)
    assert "of their temperature: -1.00; of their ECE" in " ".join(questions.markdown(rows.values()).split())


def test_of_two_rows_that_are_one_training_the_table_says_so():
    rows = table(kd_ensemble_avg_loss=runs(accuracy=[0.5]), kd_ensemble_avg_softmax=runs(accuracy=[0.51]))
    text = questions.markdown(rows)
    assert text.index("| +1.00 |") < text.index("The two rows are one training")
    assert "one training" not in questions.markdown(table(kd_ensemble_avg_loss=runs(accuracy=[0.5])))
