"""What holds for any input: metrics, augmentations, settings and run folders."""

import dataclasses
import json
import typing

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
from calibration import adaptive_ece, calibration_metrics

few = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def predictions(draw):
    """Probabilities float64 (n, classes), in any degree of certainty, and labels."""
    n, classes = draw(st.integers(1, 40)), draw(st.integers(2, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(size=(n, classes)) * draw(st.sampled_from([0, 1e-3, 1, 30, 1e4]))
    return torch.from_numpy(logits).softmax(1), torch.from_numpy(random.integers(0, classes, n))


@few
@given(predictions(), st.integers(1, 120))
def test_metrics_stay_in_their_bounds(data, n_bins):
    p, labels = data
    metrics = calibration_metrics(p, labels, n_bins)
    scores = metrics.scores
    assert scores["accuracy"] == (p.argmax(1) == labels).double().mean().item()
    assert 0 <= scores["oe"] <= scores["ece"] + 1e-12 <= 1 + 1e-12  # OE weighs one half of ECE by confidence
    assert 0 <= scores["brier"] <= 2 + 1e-12 and scores["nll"] >= 0
    assert scores["ece"] >= abs(p.max(1).values.mean().item() - scores["accuracy"]) - 1e-9  # the gap of a single bin
    assert 0 <= adaptive_ece(p, labels, n_bins) <= 1


@few
@given(predictions(), st.randoms(use_true_random=False))
def test_metrics_know_neither_the_order_of_images_nor_that_of_classes(data, random):
    p, labels = data
    rows, columns = (random.sample(range(size), size) for size in p.shape)
    if len(p.max(1).values.unique()) < len(p) or (p == p.max(1, keepdim=True).values).sum() > len(p):
        return  # ties are broken by order
    expected = calibration_metrics(p, labels).scores
    other = calibration_metrics(p[rows][:, columns], torch.tensor(columns).argsort()[labels[rows]]).scores
    for name, value in expected.items():
        np.testing.assert_allclose(other[name], value, atol=1e-9, err_msg=name)


@st.composite
def batches(draw):
    n, side = draw(st.integers(2, 12)), draw(st.sampled_from([16, 19, 32]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8), torch.randint(10, (n,))


AUGMENTATIONS = {
    "standard": common.Standard,
    "mixup": lambda: common.Mix(10, mixup_alpha=0.3),
    "cutmix": lambda: common.Mix(10, cutmix_alpha=1.0),
    "cutout": common.CutOut,
    "augmix": common.AugMix,
}


@few
@given(batches(), st.sampled_from(sorted(AUGMENTATIONS)))
def test_augmentations_leave_the_images_alone_and_make_targets_of_weight_one(batch, name):
    images, labels = batch
    before = images.clone(), labels.clone()
    inputs, targets = AUGMENTATIONS[name]()(images, labels)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    low, high = common.normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 1, 1))
    kept = len(images) // 2 * 2 if name in ("mixup", "cutmix") else len(images)
    assert inputs.shape == ((3 if name == "augmix" else 1) * kept, *images.shape[1:]) and inputs.dtype == torch.float32
    if name == "cutout":
        low, high = low.clamp(max=0), high.clamp(min=0)
    assert (inputs >= low - 1e-5).all() and (inputs <= high + 1e-5).all()
    if name in ("mixup", "cutmix"):
        assert targets.shape == (kept, 10) and (targets >= 0).all()
        torch.testing.assert_close(targets.double().sum(1), torch.ones(kept, dtype=torch.float64))
    else:
        assert torch.equal(targets, labels)


CONFIG = common.config_type(common.load_recipe("kd_ensemble_add_loss"))
HINTS = typing.get_type_hints(CONFIG)
VALUES = {
    "temperature": st.floats(1e-3, 1e3),
    "lr": st.floats(1e-6, 10),
    "kd_weight": st.floats(0.1, 10),
    "epochs": st.none() | st.integers(1, 600),
    "seed": st.integers(0, 2**40),
    "train_size": st.none() | st.integers(1, 50_000),
    "protocol": st.sampled_from(sorted(common.PROTOCOLS)),
    "dataset": st.none() | st.sampled_from(["cifar100", "digits"]),
    "teachers": st.lists(st.sampled_from(["teacher_mixup", "teacher_cutout"]), min_size=1, max_size=4).map(tuple),
    "reduction": st.sampled_from(["add", "mean"]),
    "precision": st.sampled_from(["auto", "bf16", "fp32"]),
    "deterministic": st.booleans(),
    "overwrite": st.booleans(),
}
configs = st.fixed_dictionaries({}, optional=VALUES).map(lambda chosen: CONFIG(**chosen))


@few
@given(configs)
def test_settings_survive_json(cfg):
    stored = json.loads(json.dumps(common.settings(cfg)))
    assert stored.keys() == {field.name for field in dataclasses.fields(cfg)}
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    assert {name: str(getattr(cfg, name)) for name in tuples} == {name: str(value) for name, value in tuples.items()}
    assert common.settings(CONFIG(**{n: HINTS[n](v) if n.endswith("_dir") else v for n, v in tuples.items()})) == stored


@few
@given(configs, configs)
def test_two_runs_share_a_folder_only_where_their_numbers_would_be_the_same(a, b):
    runs = [common.Run("kd_ensemble_add_loss", cfg) for cfg in (a, b)]
    same = [(run.cfg.protocol, run.cfg.seed, common.identity(run.cfg)) for run in runs]
    assert (runs[0].path == runs[1].path) == (same[0] == same[1])
    assert all(run.path.is_relative_to(run.cfg.results_dir) for run in runs)
    again = common.Run("kd_ensemble_add_loss", dataclasses.replace(a, overwrite=not a.overwrite, device="cpu"))
    assert again.path == runs[0].path
