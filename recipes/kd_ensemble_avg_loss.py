"""ShuffleNetV1 distilled from four calibrated teachers at once, the four distillation losses averaged.

Published: accuracy 75.71 %, ECE 0.0752, OE 0.0563.
"""

from dataclasses import dataclass

from torch import nn

import common


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    lr: common.Positive = 0.01
    batch_size: common.BatchSize = 64
    teachers: tuple[str, ...] = ("teacher_mixup", "teacher_cutmix", "teacher_cutout", "teacher_augmix")
    """rows that teach, or folders of finished runs"""
    reduction: common.Reduction = "mean"
    """how the teachers come together: their losses add up or are averaged, or their softmaxes are"""
    temperature: common.Positive = 50.0
    """softens both distributions; the distillation loss is scaled by its square"""
    kd_weight: common.NonNegative = 0.8
    """of the distillation loss"""
    ce_weight: common.NonNegative = 0.2
    """of the cross-entropy with the labels"""


def main(cfg: Config, run: common.Run) -> None:
    teachers = run.teacher(*cfg.teachers)
    student = run.create_model("shufflenet_v1")
    task = common.EnsembleDistillationTask(
        student,
        teachers,
        cfg.reduction,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=cfg.kd_weight,
        task_loss_weight=cfg.ce_weight,
        temperature=cfg.temperature,
    )
    run.fit(task, common.Standard())


if __name__ == "__main__":
    common.cli(main)
