"""The training objectives against their formulas in numpy and scipy."""

import copy

import numpy as np
import pytest
import timm
import torch
from conftest import Linear, RecordingRun
from scipy.special import softmax
from scipy.stats import entropy
from timm.loss import JsdCrossEntropy
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import nn

import common
from run_files import UserError
from training import Trainer


@pytest.fixture
def batch():
    return torch.randn(8, 1, 2, 2), torch.arange(8) % 5


@pytest.mark.parametrize("reduction", ["avg", None])
def test_a_reduction_that_there_is_not_is_none(reduction):
    with pytest.raises(ValueError, match="want a reduction of add, mean, softmax_mean, softmax_sum, got "):
        common.EnsembleDistillationTask(Linear(), common.Teacher(Linear()), reduction)


def test_a_teacher_stays_as_it_is_in_whatever_task():
    class Task(ClassificationTask):
        def __init__(self):
            super().__init__(Linear())
            self.teacher = common.Teacher(timm.create_model("wrn_40_2", num_classes=5))

    task = Task().train()
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    task.teacher(torch.randn(2, 3, 32, 32))
    assert task.trainable_module.training and not any(module.training for module in task.teacher.modules())
    assert any("running_mean" in name for name in before)
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())


def kl(teacher, student):
    """Batch mean of KL(teacher || student) of probabilities (B, K), in nats."""
    return entropy(teacher, student, axis=1).mean()


def expected(student, teachers, labels, reduction, temperature, kd_weight, ce_weight):
    soft = softmax(student / temperature, axis=1)
    soft_teachers = [softmax(t / temperature, axis=1) for t in teachers]
    if reduction == "add":
        kd = sum(kl(t, soft) for t in soft_teachers)
    elif reduction == "mean":
        kd = np.mean([kl(t, soft) for t in soft_teachers])
    elif reduction == "softmax_mean":
        kd = kl(np.mean(soft_teachers, axis=0), soft)
    else:  # the sum is no distribution: sum_k q_k log(q_k / p_k), which scipy would normalise away
        q = np.sum(soft_teachers, axis=0)
        kd = (q * np.log(q / soft)).sum(1).mean()
    ce = -np.log(softmax(student, axis=1)[np.arange(len(labels)), labels]).mean()
    return ce_weight * ce + kd_weight * temperature**2 * kd


@pytest.mark.parametrize("temperature", [1.0, 4.0, 50.0])
@pytest.mark.parametrize("reduction", ["add", "mean", "softmax_mean", "softmax_sum"])
def test_ensemble_distillation(batch, reduction, temperature):
    x, labels = batch
    student, teachers = Linear().double(), [Linear().double() for _ in range(4)]
    task = common.EnsembleDistillationTask(
        student,
        common.Teacher(*teachers),
        reduction,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=0.8,
        task_loss_weight=0.2,
        temperature=temperature,
    )
    x = x.double()
    logits = [model(x).detach().numpy() for model in teachers]
    want = expected(student(x).detach().numpy(), logits, labels, reduction, temperature, 0.8, 0.2)
    assert task(x, labels)["loss"].item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 50.0])
def test_the_four_ensembles_are_one_objective_under_two_weights(batch, temperature):
    x, labels = batch[0].double(), batch[1]
    student, teachers = Linear().double(), common.Teacher(*(Linear().double() for _ in range(4)))

    def gradient(reduction: str, weight: float) -> torch.Tensor:
        task = common.EnsembleDistillationTask(
            student,
            teachers,
            reduction,
            criterion=nn.CrossEntropyLoss(),
            distill_loss_weight=weight,
            task_loss_weight=0.2,
            temperature=temperature,
        )
        return torch.cat([g.flatten() for g in torch.autograd.grad(task(x, labels)["loss"], student.parameters())])

    mean, stronger = gradient("mean", 0.8), gradient("mean", 3.2)
    assert (mean - stronger).norm() > 0.1 * mean.norm()
    for reduction, same in {"softmax_mean": mean, "add": stronger, "softmax_sum": stronger}.items():
        torch.testing.assert_close(gradient(reduction, 0.8), same, rtol=1e-9, atol=1e-12)


def test_a_loss_times_c_trains_as_the_loss_at_c_times_the_learning_rate_and_1_over_c_of_the_decay(batch):
    """So labels have a fifth of the baseline student's step in distillation: results/brief/ has the effect."""
    x, labels = batch[0].double(), batch[1]
    initial, teacher = Linear().double(), common.Teacher(Linear().double())

    def trained(lr: float, weight_decay: float, ce_weight: float, kd_weight: float) -> torch.Tensor:
        student = copy.deepcopy(initial)
        weights = dict(distill_loss_weight=kd_weight, task_loss_weight=ce_weight, temperature=4.0)
        task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), **weights)
        trainer = Trainer(task, torch.device("cpu"), 1, lr=lr, momentum=0.9, weight_decay=weight_decay)
        for _ in range(20):
            trainer.step(x, labels)
        return student.weight.detach()

    taught, untaught = trained(0.01, 5e-4, 0.2, 0), trained(0.01, 5e-4, 1, 0)
    torch.testing.assert_close(taught, trained(0.002, 2.5e-3, 1, 0))
    assert (taught - untaught).norm() > 0.1 * (untaught - initial.weight).norm()
    torch.testing.assert_close(trained(0.01, 5e-4, 0.2, 3.2), trained(0.04, 1.25e-4, 0.05, 0.8))


def test_what_a_task_would_not_train_or_keep_is_refused():
    def trainer(task):
        return Trainer(task, torch.device("cpu"), 1, lr=0.1, momentum=0, weight_decay=0)

    task = LogitDistillationTask(Linear(), DistillationTeacher(Linear()), nn.CrossEntropyLoss())  # it is not frozen
    trainer(task)
    task.mixing = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"LogitDistillationTask cannot be trained here.*; mixing is outside it"):
        trainer(task)
    task.mixing.requires_grad_(False)
    trainer(task)
    student, teacher = (timm.create_model("shufflenet_v1", num_classes=5) for _ in range(2))
    with pytest.raises(UserError, match=r"FeatureDistillationTask cannot be trained here.*give logits$"):
        trainer(FeatureDistillationTask(student, teacher, nn.CrossEntropyLoss()))
    model = nn.ModuleDict({"a/b": Linear()})
    with pytest.raises(UserError, match=r"a/b.* cannot be the name of a part of the network"):
        trainer(ClassificationTask(model, nn.CrossEntropyLoss()))


class Logits(nn.Module):
    """A model whose logits are its parameters."""

    pretrained_cfg = Linear().pretrained_cfg

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.mark.parametrize("reduction", ["mean", "softmax_mean"])
def test_at_50_degrees_the_student_is_drawn_to_the_mean_of_the_centred_logits(reduction):
    student, *teachers = (Logits(3 * torch.randn(8, 100, dtype=torch.float64)) for _ in range(5))
    weights = dict(distill_loss_weight=1.0, task_loss_weight=0.0, temperature=50.0)
    teacher = common.Teacher(*teachers)
    task = common.EnsembleDistillationTask(student, teacher, reduction, criterion=nn.CrossEntropyLoss(), **weights)
    task(torch.zeros(8), torch.arange(8))["loss"].backward()
    towards = student.logits.detach() - torch.stack([model.logits.detach() for model in teachers]).mean(0)
    expected = (towards - towards.mean(1, keepdim=True)) / 100 / 8  # of a batch mean
    assert (student.logits.grad - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("reduction", ["add", "mean", "softmax_mean", "softmax_sum"])
def test_one_teacher_is_timms_task(batch, reduction):
    x, labels = batch
    student, teacher = Linear(), common.Teacher(Linear())
    weights = dict(distill_loss_weight=0.8, task_loss_weight=0.2, temperature=50.0)
    timms = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), **weights)(x, labels)
    ours = common.EnsembleDistillationTask(student, teacher, reduction, criterion=nn.CrossEntropyLoss(), **weights)
    ours = ours(x, labels)
    for name in ("loss", "kd_loss", "task_loss"):
        torch.testing.assert_close(ours[name], timms[name], rtol=2e-4, atol=0)


def test_augmix_objective_is_the_papers():
    """Cross-entropy of the clean view + 12 x the Jensen-Shannon divergence of three (Hendrycks et al., 2020, eq. 1)."""
    task = common.load_recipe("teacher_augmix")
    run = RecordingRun()
    task(common.config_type(task)(), run)
    logits, labels = torch.randn(3 * 6, 10), torch.arange(6)
    p = softmax(logits.numpy(), axis=1).reshape(3, 6, 10)
    ce = -np.log(p[0, np.arange(6), labels]).mean()
    js = np.mean([kl(view, p.mean(0)) for view in p])
    assert run.task.criterion(logits, labels).item() == pytest.approx(ce + 12 * js, rel=1e-5)


def test_parts_of_the_augmix_loss_are_the_two_terms():
    task = common.JsdTask(Linear(), JsdCrossEntropy(alpha=3.0, smoothing=0))
    x, labels = torch.randn(3 * 5, 1, 2, 2), torch.arange(5)
    result = task(x, labels)
    p = softmax(result["output"].detach().numpy(), axis=1).reshape(3, 5, 5)
    assert result["task_loss"].item() == pytest.approx(-np.log(p[0, np.arange(5), labels]).mean(), rel=1e-5)
    assert result["jsd_loss"].item() == pytest.approx(np.mean([kl(view, p.mean(0)) for view in p]), rel=1e-4)
