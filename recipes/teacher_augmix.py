"""WRN-40-2 trained with AugMix (Hendrycks et al., 2020): predictions that agree over three views of an image.

Published: accuracy 76.66 %, ECE 0.0437, OE 0.0300, at epoch 204.
"""

from dataclasses import dataclass
from typing import Literal

from timm.loss import JsdCrossEntropy

import common


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    lr: common.Positive = 0.05
    batch_size: common.BatchSize = 128
    severity: common.Severity = 3.0
    """largest level of an operation, out of 10; each call draws one from 0.1 up to it"""
    augmix: Literal["batched", "timm"] = "batched"
    """batched augments on the device; timm goes through PIL, an image at a time"""
    jsd_weight: common.NonNegative = 12.0
    """of the Jensen-Shannon divergence of the three views, beside the cross-entropy of the clean one"""


def main(cfg: Config, run: common.Run) -> None:
    model = run.create_model("wrn_40_2")
    task = common.JsdTask(model, JsdCrossEntropy(alpha=cfg.jsd_weight, smoothing=0))
    run.fit(task, common.AugMix(cfg.severity, cfg.augmix))


if __name__ == "__main__":
    common.cli(main)
