"""WRN-40-2 trained with MixUp (Zhang et al., 2018): pairs of images and of labels, averaged.

Published: accuracy 76.98 %, ECE 0.0351, OE 0.0027, at epoch 287.
"""

from dataclasses import dataclass

from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask

import common


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    lr: common.Positive = 0.05
    batch_size: common.EvenBatchSize = 128
    alpha: common.NonNegative = 0.3
    """of the Beta distribution that the mixing weight is drawn from, one a batch; 0 mixes nothing"""


def main(cfg: Config, run: common.Run) -> None:
    model = run.create_model("wrn_40_2")
    task = ClassificationTask(model, SoftTargetCrossEntropy())
    run.fit(task, common.Mix(run.num_classes, mixup_alpha=cfg.alpha))


if __name__ == "__main__":
    common.cli(main)
