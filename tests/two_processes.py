"""What test_data_parallel.py has two processes of torchrun do, and then one process: train a few rows."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from conftest import run_row
from torch import nn

import common
import data_parallel

# What keeps them finite without batch norm. The first has its teacher trained before it.
ROWS = {
    "kd_cutmix": dict(lr=0.001, temperature=4.0),
    "teacher_augmix": dict(lr=0.01),
    "student_baseline": dict(lr=0.001),
}
SETTINGS = dict(epochs=2, milestones=(1,), train_size=39, batch_size=16, device="cpu", wandb_mode="disabled")
# Two batches at a rate that leaves the weights where they are
MOVING = {**SETTINGS, "epochs": 1, "milestones": (), "train_size": 32, "lr": 1e-12}


def frozen_batch_norm(trainer):
    """`Run.trainer` for models whose batch norm keeps the statistics of a few images, for shares would differ by it.

    They compute in float64, these statistics too: in float32, rounding alone grows to 1e-4 in six steps.
    """

    def with_frozen(self, task):
        norms = [module for module in task.trainable_module.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            task.trainable_module.double().train()(common.normalize(self.data.train_images[::22]).double())
        for norm in norms:
            norm.running_var.clamp_(min=0.1)  # of channels that are nearly constant
            norm.eval().train = lambda mode=True, norm=norm: norm
        task.trainable_module.register_forward_pre_hook(lambda model, args: (args[0].double(),))
        return trainer(self, task)

    return with_frozen


class Stop(Exception):
    pass


def at_fifth_batch(happens):
    """`Standard.__call__`, but at the fifth batch, the second one of the second epoch, something happens first."""
    augment, calls = common.Standard.__call__, []

    def counting(self, images, labels):
        calls.append(1)
        if len(calls) == 5:
            happens()
        return augment(self, images, labels)

    return counting


def die():
    if data_parallel.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def stop():
    raise Stop


if __name__ == "__main__":
    results, augment = Path(sys.argv[1]), common.Standard.__call__
    run_row("student_baseline", results, **MOVING)
    common.Run.trainer = frozen_batch_norm(common.Run.trainer)
    run_row("kd_cutmix", results, **SETTINGS, **ROWS["kd_cutmix"])
    run_row("teacher_augmix", results, **SETTINGS, **ROWS["teacher_augmix"])
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        common.Standard.__call__ = at_fifth_batch(stop)
        with suppress(Stop):
            run_row("student_baseline", results, seed=1, **SETTINGS, **ROWS["student_baseline"])
        common.Standard.__call__ = augment
        common.Standard.__call__ = at_fifth_batch(die)
    run_row("student_baseline", results, **SETTINGS, **ROWS["student_baseline"])
    print("last line")
    data_parallel.leave()
