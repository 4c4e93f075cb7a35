"""WRN-40-2 trained with CutMix (Yun et al., 2019): a box of another image pasted in, labels by area.

Published: accuracy 78.54 %, ECE 0.0315, OE 0.0186, at epoch 498.
"""

from dataclasses import dataclass

from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask

import common


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    lr: common.Positive = 0.05
    batch_size: common.EvenBatchSize = 128
    alpha: common.Positive = 1.0
    """of the Beta distribution that the box's area is drawn from, one an image"""


def main(cfg: Config, run: common.Run) -> None:
    model = run.create_model("wrn_40_2")
    task = ClassificationTask(model, SoftTargetCrossEntropy())
    run.fit(task, common.Mix(run.num_classes, cutmix_alpha=cfg.alpha))


if __name__ == "__main__":
    common.cli(main)
