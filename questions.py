"""What the table is asked, and what it answers, in differences between rows of the same seed.

Rows of one seed share their images, their order and, where the model is the same, their first weights; so differences
are taken seed by seed. All are of the last epoch, which nobody chose.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rows import Row, Statistic, as_published, fitted_temperature, markdown_table, number, plus_minus


class Comparison(NamedTuple):
    """A metric of one row minus that of another; which of them has a temperature fitted to it first."""

    title: str
    metric: str
    scaled: bool = False
    than_scaled: bool = False


class Question(NamedTuple):
    text: str
    rows: tuple[str, ...]
    than: str
    """the row that each of `rows` is compared with"""
    comparisons: tuple[Comparison, ...]
    remark: str = ""
    """on the answer, below it"""


ACCURACY = Comparison("accuracy, points", "accuracy")
ECE = Comparison("ECE", "ece")
ECE_SCALED = Comparison("ECE, 15 bins, both scaled", "ece_15", scaled=True, than_scaled=True)
NLL_SCALED = Comparison("NLL, both scaled", "nll", scaled=True, than_scaled=True)
ECE_THAN_SCALED = Comparison("ECE, 15 bins, `student_baseline` scaled", "ece_15", than_scaled=True)

TAUGHT_BY = {
    "kd_vanilla": "teacher_baseline",
    "kd_mixup": "teacher_mixup",
    "kd_cutmix": "teacher_cutmix",
    "kd_cutout": "teacher_cutout",
    "kd_augmix": "teacher_augmix",
}
CALIBRATED = tuple(TAUGHT_BY)[1:]
ORDERS = {"temperature": "temperature", "ece": "ECE, which is the same for too much confidence and too little"}
PASSING = "Does a teacher's calibration pass to a student that never sees the augmentation?"
OF_SEVERAL = ("kd_ensemble_add_loss", "kd_ensemble_avg_loss", "kd_ensemble_avg_softmax")
QUESTIONS = (
    Question(
        "Does augmentation calibrate the teacher?",
        tuple(TAUGHT_BY[row] for row in CALIBRATED), "teacher_baseline", (ECE, ECE_SCALED),
    ),
    Question(
        PASSING, CALIBRATED, "kd_vanilla", (ECE, ECE_SCALED),
    ),
    Question(
        "Is a distilled student better than the baseline student with one temperature fitted to it?",
        (*TAUGHT_BY, *OF_SEVERAL), "student_baseline", (ACCURACY, ECE_THAN_SCALED, ECE_SCALED, NLL_SCALED),
    ),
    Question("Are four augmented teachers better than the plain one?", OF_SEVERAL, "kd_vanilla", (ACCURACY, ECE)),
    Question(
        "Averaged softmaxes and averaged losses have the same gradient: how far does rounding move them apart?",
        ("kd_ensemble_avg_softmax",), "kd_ensemble_avg_loss", (ACCURACY, ECE, ECE_SCALED),
        "The two rows are one training, computed in two ways: where only one is bold above, that is chance.",
    ),
    Question("Is the mean of five teachers better?", ("teacher_ensemble",), "teacher_baseline", (ACCURACY, ECE)),
    Question("Is the mean of five students better?", ("student_ensemble",), "kd_vanilla", (ACCURACY, ECE)),
)  # fmt: skip

INTRODUCTION = """\
Differences between rows with the same seed, at the last epoch: mean ± standard deviation over the seeds. Bold means
p < 0.05 in a t-test. If all rows are equally noisy, 2 to 5 % of differences that are really zero are bold by chance; of
a row that is two or three times as noisy as the others, up to 20 %. The noise between seeds is estimated from all rows
of a column together, because the two or three seeds of one row may be alike by chance. This needs two seeds of three
rows, or three of one; with fewer, nothing is bold. All seeds share the test images, so bold holds for these images: on
others, a small difference may come out differently. *Scaled*: after temperature scaling, with the 15 bins of Guo et al.
(2017), because with 100 bins chance hides the small errors that remain. Lower ECE is better."""


def _by_seed(row: Row, metric: str, scaled: bool = False) -> dict[int, float]:
    last = {run.result["seed"]: run.result["last"] for run in row.runs}
    if metric == "temperature":
        return {seed: fitted_temperature(scores) for seed, scores in last.items()}
    last = {seed: scores["scaled"] if scaled else scores for seed, scores in last.items()}
    return {seed: scores[metric] for seed, scores in last.items() if metric in scores}


def ours(row: Row, than: Row, comparison: Comparison) -> list[float]:
    """The differences, one for each seed that both rows have."""
    values = _by_seed(row, comparison.metric, comparison.scaled)
    others = _by_seed(than, comparison.metric, comparison.than_scaled)
    shared = sorted(values.keys() & others.keys())
    return [values[seed] - others[seed] for seed in shared]


def pooled(column: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Standard deviation over seeds of the differences from one row, pooled over several rows, and its degrees of
    freedom (Satterthwaite 1946; math.nan and 0.0 where no row has two seeds).

    n seeds of k rows do not have k (n - 1) of them, as all differences move with the one row. Where all rows are
    equally noisy, two differences correlate by 1/2, their sample variances by 1/4, and 4 k (n - 1) / (k + 3) are left.
    """
    several = [values for values in column if len(values) > 1]
    free = sum(len(values) - 1 for values in several)
    if not free:
        return math.nan, 0.0
    squares = sum((len(values) - 1) * statistics.variance(values) for values in several)
    return math.sqrt(squares / free), 4 * free / (len(several) + 3)


def significant(column: Sequence[Sequence[float]]) -> list[bool]:
    """For the differences of each row from one and the same, whether they are not zero but for chance.

    By Student's t-test, p < 0.05, with the `pooled` standard deviation and at least two degrees of freedom. With
    4 to 8 equally noisy rows it finds one of two standard deviations of a difference in 38 to 48 % of cases with two
    seeds, in 79 to 83 % with three (each row tested alone: 18 and 47 %). It finds one where there is none in 2 to 4 %
    (alone: 5), in 5 to 7 % where the row that is subtracted is twice as noisy as the others, and of a row that is
    itself two or three times as noisy in 5 to 15 % with two seeds, 11 to 21 % with three (benchmarks/chance.py).
    """
    from scipy.stats import t

    sd, free = pooled(column)
    if free < 2:
        return [False] * len(column)
    bound = t.ppf(0.975, free) * sd
    return [bool(abs(sum(values)) > bound * math.sqrt(len(values))) for values in column]


def published(row: Row, than: Row, comparison: Comparison) -> float | None:
    """The same of the published numbers, which know nothing of scaling; None where ours do not compare with them."""
    numbers = [r.published.get(comparison.metric) for r in (row, than)]
    if None in numbers or comparison.scaled or comparison.than_scaled or not (row.comparable and than.comparable):
        return None
    return numbers[0] - numbers[1]


def rank_correlation(rows: dict[str, Row], metric: str) -> tuple[Statistic | None, float | None]:
    """Spearman's, of a metric of the five teachers and that of their students: ours over the seeds that have one, and
    the published one."""
    from scipy.stats import spearmanr

    def spearman(values: dict[str, float | None]) -> float | None:
        """None where one of the ten is missing, or five are equal, which have no order."""
        teachers, students = ([values[row] for row in names] for names in (TAUGHT_BY.values(), TAUGHT_BY))
        if None in teachers + students or 1 in (len(set(teachers)), len(set(students))):
            return None
        return spearmanr(teachers, students).statistic

    by_row = {name: _by_seed(row, metric) for name, row in rows.items()}
    seeds = set().union(*by_row.values())
    found = [spearman({name: values.get(seed) for name, values in by_row.items()}) for seed in seeds]
    found = [correlation for correlation in found if correlation is not None]
    theirs = spearman({name: row.published.get(metric) if row.comparable else None for name, row in rows.items()})
    return Statistic.of(found) if found else None, theirs


def markdown(table: Sequence[Row]) -> str:
    """The questions that there are runs for, a table each; empty where there are none."""
    rows = {row.row: row for row in as_published(table)}
    parts = [part for question in QUESTIONS for part in _answer(question, rows)]
    return "\n\n".join(["## What the table says", INTRODUCTION, *parts]) if parts else ""


def _answer(question: Question, rows: dict[str, Row]) -> Iterator[str]:
    """Heading, table, and which published differences are not seen in ours; nothing where there are no runs."""
    than = rows[question.than]
    asked = [row for row in map(rows.get, question.rows) if any(ours(row, than, c) for c in question.comparisons)]
    if not asked:
        return
    header, lines, unseen = [f"minus `{than.row}`"], [[f"`{row.row}`"] for row in asked], []
    for comparison in question.comparisons:
        metric, theirs = comparison.metric, [published(row, than, comparison) for row in asked]
        column = [ours(row, than, comparison) for row in asked]
        header += [f"{comparison.title}: published"] * any(theirs) + [comparison.title]
        for line, expected, differences, clear in zip(lines, theirs, column, significant(column), strict=True):
            if any(theirs):
                line.append("" if expected is None else number(metric, expected, "+"))
            if not differences:
                line.append("")
                continue
            difference = Statistic.of(differences)
            text = plus_minus(metric, difference, " ± ", "+")
            line.append(f"**{text}**" if clear else text)
            if expected and not (clear and difference.mean * expected > 0):
                unseen.append(f"{line[0]}, {comparison.title} ({'the other way' if clear else 'may be chance'})")
    yield f"### {question.text}"
    yield markdown_table(header, lines)
    if unseen:
        yield f"Published, but not reproduced at our last epoch: {'; '.join(unseen)}."
    if question.remark:
        yield question.remark
    if question.text == PASSING:
        yield from _side_by_side(rows)


def _side_by_side(rows: dict[str, Row]) -> Iterator[str]:
    """Each teacher beside the student that it alone taught, below them the baseline student; how their order agrees."""

    def cells(row: Row) -> list[str]:
        found = {"accuracy": row.statistic("last", "accuracy"), "temperature": row.temperature("last")}
        return [f"`{row.row}`", *(plus_minus(metric, statistic, " ± ") for metric, statistic in found.items())]

    pairs = [(rows[teacher], rows[student]) for student, teacher in TAUGHT_BY.items()]
    lines = [[*cells(teacher), *cells(student)] for teacher, student in pairs if teacher.runs and student.runs]
    if lines and rows["student_baseline"].runs:
        lines.append(["none", "", "", *cells(rows["student_baseline"])])
    if lines:
        yield "The temperature that calibrates each model (above 1: it is overconfident):"
        numbers = ["accuracy, %", "temperature"]
        yield markdown_table(["teacher", *numbers, "its student", *numbers], lines)
    found = []
    for metric, title in ORDERS.items():
        correlation, theirs = rank_correlation(rows, metric)
        if correlation:
            found.append(f"of their {title}: {plus_minus('correlation', correlation, ' ± ')}")
            found[-1] += "" if theirs is None else f" (published: {number('correlation', theirs)})"
    if found:
        yield (
            "Spearman's rank correlation between the five teachers and their students (1: the same order), "
            f"{'; '.join(found)}."
        )
