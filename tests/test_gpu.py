"""Every trained row on a GPU that is not there: torch's fake tensors have a device and a shape, and no numbers.

So an operation that mixes devices fails as it would on the card; and so does whatever needs a number, for which a real
card would make the loop wait. Not seen: whether the results are right, the backward pass, bf16, compilation.
"""

import pytest
import torch
from conftest import ROWS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import common

GPU = torch.device("cuda", 0)
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class FakeGpu(TorchFunctionMode):
    """What is put on the GPU, or made there, is fake from then on; what stays on the CPU is real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.backward:  # autograd would look for the card: the gradients are made here
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            return None
        if function is torch._fused_sgd_:  # has no fake
            return None
        if any(str(value).startswith("cuda") for value in (*args, *kwargs.values()) if not torch.is_tensor(value)):
            with FAKE:
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def epoch_on_fake_gpu(row: str, tmp_path, monkeypatch, **settings) -> tuple[int, int]:
    """Train a row's task for an epoch, until the first number is wanted; then predict, and restore a checkpoint.

    Its teachers are untrained, for only their place matters here. Returns the batches done and those there are.
    """
    main = common.load_recipe(row)
    settings |= dict(protocol="smoke", train_size=100, precision="fp32")  # autocast is off where there is no GPU
    cfg = common.config_type(main)(results_dir=tmp_path, **settings)
    run, done = common.Run(row, cfg), []
    monkeypatch.setattr(
        run, "teacher", lambda *rows: common.Teacher(*(run.create_model("wrn_40_2") for _ in rows)), raising=False
    )

    def fit(task, augment):
        with FakeGpu() as gpu:
            run.device = GPU
            run.data = run.data.to(GPU)
            trainer = run.trainer(task)
            gpu.parameters = list(trainer.model.parameters())
            real = trainer.step

            def step(*batch):
                done.append(real(*batch))
                return done[-1]

            def is_channels_last(module, inputs):
                assert inputs[0].is_contiguous(memory_format=torch.channels_last), module

            for module in trainer.model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.register_forward_pre_hook(is_channels_last)
            monkeypatch.setattr(trainer, "step", step)
            assert {tensor.device for tensor in trainer.model.state_dict().values()} == {GPU}
            with tqdm(disable=True) as bar, pytest.raises(DataDependentOutputException):
                run.train_epoch(trainer, augment, 1, bar)
            probabilities = run.predict(trainer.model, run.data.test_images)
            assert probabilities.shape == (360, 10) and probabilities.device.type == "cpu"
            state = {name: torch.zeros(tensor.shape) for name, tensor in trainer.model.state_dict().items()}
            trainer.restore(state, {name: state[name] for name, _ in trainer.model.named_parameters()})
            assert {tensor.device for tensor in trainer.momentum().values()} == {GPU}

    monkeypatch.setattr(run, "fit", fit)
    main(run.cfg, run)
    assert all(loss.device == GPU and loss.shape == () for loss in done)
    return len(done), -(-100 // cfg.batch_size)


# Students of one teacher share their code, and those of four theirs
ONE_OF_EACH = [row for row in ROWS if not row.startswith("kd_") and not row.endswith("_ensemble")]
ONE_OF_EACH += ["kd_vanilla", "kd_ensemble_add_loss"]


@pytest.mark.parametrize("row", ONE_OF_EACH)
def test_a_row_mixes_no_devices_and_waits_for_none_before_its_epoch_is_over(row, tmp_path, monkeypatch):
    done, batches = epoch_on_fake_gpu(row, tmp_path, monkeypatch, batch_size=32)
    assert done == batches == 4


def test_what_waits_or_mixes_devices_would_be_seen(tmp_path, monkeypatch):
    plain = common.Standard.__call__

    def waits(self, images, labels):
        return plain(self, images, labels) if labels.max().item() >= 0 else None

    def mixes(self, images, labels):
        return plain(self, images, torch.zeros_like(labels, device="cpu"))

    monkeypatch.setattr(common.Standard, "__call__", waits)
    assert epoch_on_fake_gpu("student_baseline", tmp_path, monkeypatch)[0] == 0
    monkeypatch.setattr(common.Standard, "__call__", mixes)
    with pytest.raises(RuntimeError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        epoch_on_fake_gpu("student_baseline", tmp_path, monkeypatch)
