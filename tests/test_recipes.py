"""All 16 rows: what their recipes build, and end to end, in the order in which they need each other."""

import json

import pytest
from conftest import ROWS, RecordingRun, run_row
from timm.loss import JsdCrossEntropy, SoftTargetCrossEntropy
from timm.task import LogitDistillationTask
from torch import nn

import common
from augmix import BatchedAugMix, TimmAugMix

STANDARD = dict(augment=common.Standard, padding=1 / 8, degrees=15.0, criterion=nn.CrossEntropyLoss, smoothing=0.0)
TEACHER = dict(model="wrn_40_2", **STANDARD)
STUDENT = dict(model="shufflenet_v1", **STANDARD)
MIX = {**TEACHER, "augment": common.Mix, "criterion": SoftTargetCrossEntropy, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
AUGMIX = {**TEACHER, "augment": common.AugMix, "criterion": JsdCrossEntropy}
KD = {**STUDENT, "temperature": 50.0, "task_loss_weight": 0.2, "distill_loss_weight": 0.8}
FOUR = {"teacher_mixup", "teacher_cutmix", "teacher_cutout", "teacher_augmix"}
BUILT = {
    "teacher_baseline": TEACHER,
    "teacher_mixup": {**MIX, "mixup_alpha": 0.3},
    "teacher_cutmix": {**MIX, "cutmix_alpha": 1.0},
    "teacher_cutout": {**TEACHER, "augment": common.CutOut, "size": 0.5},
    "teacher_augmix": {**AUGMIX, "severity": 3.0, "backend": BatchedAugMix, "alpha": 12.0},
    "student_baseline": STUDENT,
    "kd_vanilla": {**KD, "teachers": {"teacher_baseline"}},
    "kd_mixup": {**KD, "teachers": {"teacher_mixup"}},
    "kd_cutmix": {**KD, "teachers": {"teacher_cutmix"}},
    "kd_cutout": {**KD, "teachers": {"teacher_cutout"}},
    "kd_augmix": {**KD, "teachers": {"teacher_augmix"}},
    "kd_ensemble_add_loss": {**KD, "teachers": FOUR, "reduction": "add"},
    "kd_ensemble_avg_loss": {**KD, "teachers": FOUR, "reduction": "mean"},
    "kd_ensemble_avg_softmax": {**KD, "teachers": FOUR, "reduction": "softmax_mean"},
}
# For each setting, a value that no recipe has by itself, and what is then other in what is built
CHANGED = {
    "temperature": (7.0, {"temperature": 7.0}),
    "kd_weight": (0.3, {"distill_loss_weight": 0.3}),
    "ce_weight": (0.6, {"task_loss_weight": 0.6}),
    "reduction": ("softmax_sum", {"reduction": "softmax_sum"}),
    "teacher": ("my_row", {"teachers": {"my_row"}}),
    "teachers": (("my_row", "another"), {"teachers": {"my_row", "another"}}),
    "hole": (0.25, {"size": 0.25}),
    "severity": (5.0, {"severity": 5.0}),
    "jsd_weight": (3.0, {"alpha": 3.0}),
    "augmix": ("timm", {"backend": TimmAugMix}),
}
ALPHA = {"teacher_mixup": (0.7, {"mixup_alpha": 0.7}), "teacher_cutmix": (0.7, {"cutmix_alpha": 0.7})}


def built(row: str, **settings) -> dict:
    """What of a row's recipe differs from others', as its task and its augmentation have it."""
    main, run = common.load_recipe(row), RecordingRun()
    main(common.config_type(main)(**settings), run)
    task, augment = run.task, run.augment
    found = dict(model=run.model, augment=type(augment), criterion=type(task.criterion))
    if hasattr(run, "teachers"):
        found["teachers"] = set(run.teachers)
        assert isinstance(task, LogitDistillationTask) and task.teacher.model is not task.trainable_module
    for of, names in (
        (task, ("temperature", "task_loss_weight", "distill_loss_weight", "reduction")),
        (getattr(augment, "mixup", None), ("mixup_alpha", "cutmix_alpha")),
        (augment, ("size", "padding", "degrees")),
    ):
        found |= {name: getattr(of, name) for name in names if hasattr(of, name)}
    if isinstance(augment, common.AugMix):
        backend = augment.augmix
        severity = backend.severity if isinstance(backend, BatchedAugMix) else backend.augmix.ops[0].magnitude
        found |= dict(backend=type(backend), severity=severity, alpha=task.criterion.alpha)
    of_labels = getattr(task.criterion, "cross_entropy_loss", task.criterion)
    found["smoothing"] = getattr(of_labels, "smoothing", getattr(of_labels, "label_smoothing", 0.0))
    return found


@pytest.mark.parametrize("row", BUILT)
def test_recipe_builds_the_published_row(row):
    assert built(row) == BUILT[row]


@pytest.mark.parametrize("row", BUILT)
def test_every_setting_of_a_recipe_reaches_what_it_builds(row):
    names = common.config_type(common.load_recipe(row)).__annotations__.keys() - {"lr", "batch_size"}
    for name in names:
        value, change = ALPHA[row] if name == "alpha" else CHANGED[name]
        assert built(row, **{name: value}) == {**BUILT[row], **change}


def test_those_are_all_rows_that_train():
    assert sorted(BUILT) == [row for row in ROWS if row not in ("teacher_ensemble", "student_ensemble")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("row", sorted(ROWS, key=lambda row: (row == "student_ensemble", row[0] != "t", row)))
def test_row(row, results):
    result, path = run_row(row, results)
    assert result["row"] == row and path.is_relative_to(results / "smoke" / row)
    assert 0 <= result["last"]["accuracy"] <= 1 and 0 <= result["last"]["oe"] <= result["last"]["ece"] <= 1
    assert result["published"] == common.published(row, {})
    kind = row.split("_")[0]
    assert result["model"] == (
        None
        if row.endswith("_ensemble")
        else {"teacher": "wrn_40_2", "kd": "shufflenet_v1", "student": "shufflenet_v1"}[kind]
    )
    assert {p.name for p in path.iterdir()} >= {"result.json", "reliability.png", "probabilities.npz"}


def test_teachers_were_shared(results):
    """16 trained or evaluated rows and no run twice: one folder a row, all of the same seed and data."""
    folders = sorted(path.parent for path in results.rglob("result.json"))
    assert sorted(folder.parent.name for folder in folders) == ROWS
    assert len({json.loads((folder / "result.json").read_text())["fingerprint"] for folder in folders}) == 1
