"""ShuffleNetV1 distilled (Hinton et al., 2015) from the CutMix teacher. The student sees standard augmentation only.

Published: accuracy 74.62 %, ECE 0.0552, OE 0.0357.
"""

from dataclasses import dataclass

from timm.task import LogitDistillationTask
from torch import nn

import common


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    lr: common.Positive = 0.01
    batch_size: common.BatchSize = 64
    teacher: common.TeacherName = "teacher_cutmix"
    """row that teaches, the folder of a finished run, or one in Weights & Biases: entity/project/name:alias"""
    temperature: common.Positive = 50.0
    """softens both distributions; the distillation loss is scaled by its square"""
    kd_weight: common.NonNegative = 0.8
    """of the distillation loss"""
    ce_weight: common.NonNegative = 0.2
    """of the cross-entropy with the labels"""


def main(cfg: Config, run: common.Run) -> None:
    teacher = run.teacher(cfg.teacher)
    student = run.create_model("shufflenet_v1")
    task = LogitDistillationTask(
        student,
        teacher,
        nn.CrossEntropyLoss(),
        distill_loss_weight=cfg.kd_weight,
        task_loss_weight=cfg.ce_weight,
        temperature=cfg.temperature,
    )
    run.fit(task, common.Standard())


if __name__ == "__main__":
    common.cli(main)
