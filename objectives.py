"""What is trained on, as timm's tasks: distillation from one teacher or several, and AugMix's divergence.

A single teacher's distillation is timm's own `LogitDistillationTask`.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from teacher_outputs import EpochOutputs


class Teacher(DistillationTeacher):
    """One frozen teacher, or several whose logits are stacked: (B, 3, H, W) -> (B, K) or (teachers, B, K).

    Several are asked one after the other, since stacked weights are no faster: `torch.vmap` over four WRN-40-2 took 1.8
    times as long on a CPU.
    """

    def __init__(self, *models: nn.Module):
        super().__init__(nn.ModuleList(fold_batch_norm(model.eval().requires_grad_(False)) for model in models))
        self.outputs: list[EpochOutputs] = []  # of each model, where this epoch's logits are shared with other students

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the task around it does."""
        return super().train(False)

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        if return_features:
            raise NotImplementedError("a Teacher says logits only: timm's DistillationTeacher has features too")
        if self.outputs:
            logits = [of.step(model, input) for of, model in zip(self.outputs, self.model, strict=True)]
        else:
            logits = [model(input) for model in self.model]
        return torch.stack(logits) if len(logits) > 1 else logits[0]

    def compile(self, compile_model: bool = True, compile_features: bool = False, **how) -> "Teacher":
        """Each model on its own, so that one may be asked without the others."""
        self.model = nn.ModuleList(torch.compile(model, **how) for model in self.model)
        return self

    def normalize_input(self, input: Tensor, student_mean=None, student_std=None) -> Tensor:
        """All models here share one normalisation; timm's comparison would stall a GPU at every step."""
        return input


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are in the convolutions before them, where there is one; the model itself where torch.fx
    cannot trace it."""
    try:
        return fuse(model)
    except Exception:  # of many kinds, by what its forward pass asks that a symbol cannot answer
        return model


Reduction = Literal["add", "mean", "softmax_mean", "softmax_sum"]


class EnsembleDistillationTask(LogitDistillationTask):
    """Distillation from several teachers at once.

    With KL_k = KL(softmax(z_k / T) || softmax(z / T)), a batch mean, the distillation loss is T^2 times

    - `add`: sum_k KL_k
    - `mean`: the mean of KL_k
    - `softmax_mean`: KL of the mean of the softened teachers
    - `softmax_sum`: the same with their sum for a target, which is no distribution, as the original script has it

    The published report names the first three; each reduces to `LogitDistillationTask` for one teacher.

    They are one objective under two weights: an image's gradient of KL_k in z is (softmax(z / T) - softmax(z_k / T)) /
    T (Hinton et al., 2015, eq. 2), affine in the teacher's softmax. So, but for rounding, `softmax_mean` trains as
    `mean` does, and `add` and `softmax_sum` as `mean` with a weight as many times larger as there are teachers. Their
    losses differ by constants as well: T^2 times the Jensen-Shannon divergence of the teachers between the two means,
    T^2 n log(n) for n added softmaxes.

    Where T is large beside the logits, as 50 is, T^2 KL_k is |z - z_k|^2 / 2K of centred logits (ibid., eq. 4): the
    student is drawn to the logits of its teacher, or to the mean of theirs, and takes over how large they are.

    Further settings are those of timm's task.

    Raises:
        ValueError: no such reduction.
    """

    def __init__(self, student_model: nn.Module, teacher_model: Teacher, reduction: Reduction, **kwargs):
        if reduction not in get_args(Reduction):
            raise ValueError(f"want a reduction of {', '.join(get_args(Reduction))}, got {reduction!r}")
        super().__init__(student_model, teacher_model, **kwargs)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) and labels (B,) to the student's logits, (B, K), its loss and the loss's two parts before
        their weights, scalars in nats."""
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        with torch.no_grad():
            logits = self.teacher(input).view(-1, *output.shape)  # (teachers, B, K), of one teacher too
            teachers = F.softmax(logits / self.temperature, dim=-1)
            if self.reduction == "softmax_mean":
                teachers = teachers.mean(0, keepdim=True)
            elif self.reduction == "softmax_sum":
                teachers = teachers.sum(0, keepdim=True)
        student = F.log_softmax(output / self.temperature, dim=-1)
        kd_loss = sum(F.kl_div(student, teacher, reduction="batchmean") for teacher in teachers) * self.temperature**2
        if self.reduction == "mean":
            kd_loss = kd_loss / len(teachers)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


class JsdTask(ClassificationTask):
    """timm's `ClassificationTask` with its `JsdCrossEntropy`, which returns that loss's two parts as well."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (3B, 3, H, W) and labels (B,) to logits, (3B, K), the loss and its parts before their weights, scalars
        in nats."""
        result = super().forward(input, target)
        with torch.no_grad():
            clean = result["output"][: len(target)]
            task_loss = self.criterion.cross_entropy_loss(clean, target)
            jsd_loss = (result["loss"] - task_loss) / max(self.criterion.alpha, 1e-12)
        return {**result, "task_loss": task_loss, "jsd_loss": jsd_loss}
