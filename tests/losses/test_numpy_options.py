"""Sizes and options as numpy scalars: taken wherever Python's numbers are, and the same to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises

V, D, K = 20, 8, 5
SEED = torch.tensor([3, 4])
HIDDEN, TARGET = torch.randn(6, D), torch.tensor([1, 2, 3, 0, 19, -7])
WEIGHT = torch.randn(V, D)
NUMPY = {int: np.int64, float: np.float32, bool: np.bool_}  # every float here is one of float32, too


def as_numpy(options: dict) -> dict:
    return {name: NUMPY.get(type(value), lambda same: same)(value) for name, value in options.items()}


LAWS = {
    "Uniform": (noises.Uniform, {"n_classes": V}),
    "LogUniform": (noises.LogUniform, {"n_classes": V}),
    "Unigram": (noises.Unigram, {"counts": range(1, V + 1), "power": 0.75}),
    "Streaming": (noises.Streaming, {"n_classes": V, "half_life": 8.0, "prior": 0.5, "power": 0.75}),
    "Streaming by intervals": (noises.Streaming, {"n_classes": V, "estimator": "interval", "rate": 0.25}),
}
LOSSES = {
    "NCE": (nce_ext.NCELoss, functional.nce_loss, {"log_z": 0.5, "remove_hits": True}),
    "NCE, sparse": (nce_ext.NCELoss, functional.nce_loss, {"sparse": True, "shared": True}),
    "NCE, unique": (nce_ext.NCELoss, functional.nce_loss, {"unique": True, "sparse": False}),
    "negative sampling": (
        nce_ext.NegativeSamplingLoss, functional.negative_sampling_loss,
        {"margin": 0.5, "adversarial_temperature": 2.0},
    ),
    "gBCE": (
        nce_ext.NegativeSamplingLoss, functional.negative_sampling_loss, {"calibration": 0.75, "log_z": 1}
    ),
    "softmax": (
        nce_ext.SampledSoftmaxLoss, functional.sampled_softmax_loss,
        {"label_smoothing": 0.125, "correct_positive": False, "remove_hits": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_laws(name):
    law, options = LAWS[name]
    plain, given = law(**options), law(**as_numpy(options))
    assert repr(given) == repr(plain)
    assert {key: type(value) for key, value in vars(given).items()} == {k: type(v) for k, v in vars(plain).items()}
    assert torch.equal(given.sample((np.int64(3), np.int32(4)), seed=SEED), plain.sample((3, 4), seed=SEED))
    assert torch.equal(given.sample(np.int64(4), seed=SEED), plain.sample(4, seed=SEED))
    ids, trials = given.sample_distinct(np.int64(4), seed=SEED)
    assert torch.equal(ids, plain.sample_distinct(4, seed=SEED)[0])
    assert torch.equal(given.log_inclusion(ids, np.int64(9)), plain.log_inclusion(ids, 9))
    assert torch.equal(
        given.log_expected_count_tf(ids, np.int64(4), trials), plain.log_expected_count_tf(ids, 4, trials)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, backend):
    module, function, options = LOSSES[name]
    options = {**options, "ignore_index": -7, "bias": True}
    torch.manual_seed(0)
    plain = module(D, V, noises.Uniform(V), K, backend=backend, **options)
    torch.manual_seed(0)
    given = module(np.int64(D), np.int32(V), noises.Uniform(V), np.int64(K), backend=backend, **as_numpy(options))
    assert repr(given) == repr(plain)
    expected = plain(HIDDEN, TARGET, seed=SEED)
    assert torch.equal(given(HIDDEN, TARGET, seed=SEED), expected)
    given(HIDDEN, TARGET, seed=SEED).backward()
    del options["bias"]
    options.pop("remove_hits", None)
    expected = function(HIDDEN, WEIGHT, TARGET, noises.Uniform(V), K, seed=SEED, backend=backend, **options)
    got = function(
        HIDDEN, WEIGHT, TARGET, noises.Uniform(V), np.int64(K), seed=SEED, backend=backend, **as_numpy(options)
    )
    assert torch.equal(got, expected)


def test_hogwild():
    weights = [WEIGHT.clone() for _ in range(2)]
    for weight, rate in zip(weights, (0.25, np.float32(0.25)), strict=True):
        functional.hogwild_sgd_(HIDDEN, weight, TARGET, noises.Uniform(V), K, rate, ignore_index=-7, seed=SEED)
    assert torch.equal(*weights)


def test_evaluation():
    layer, target = torch.nn.Linear(D, V), TARGET.clamp_min(-7)
    for reduction in ("mean", "none"):
        expected = nce_ext.evaluate.nll(layer, HIDDEN, target, ignore_index=-7, reduction=reduction, max_logits=40)
        got = nce_ext.evaluate.nll(
            layer, HIDDEN, target, ignore_index=np.int64(-7), reduction=reduction, max_logits=np.int64(40)
        )
        assert torch.equal(got, expected)
    for got, expected in zip(
        nce_ext.evaluate.topk(layer, HIDDEN, np.int64(3)), nce_ext.evaluate.topk(layer, HIDDEN, 3), strict=True
    ):
        assert torch.equal(got, expected)
    loss_fn = nce_ext.NCELoss(D, V, noises.Uniform(V), K, ignore_index=-7)
    got = nce_ext.evaluate.diagnose(loss_fn, HIDDEN, TARGET, draws=np.int64(3), seed=np.int64(1))
    assert repr(got) == repr(nce_ext.evaluate.diagnose(loss_fn, HIDDEN, TARGET, draws=3, seed=1))


def test_what_is_refused_is_named_in_pythons_words():
    with pytest.raises(ValueError, match=r"^n_classes must be in 1 \.\. 2\^31 - 1, got 0$"):
        noises.Uniform(np.int64(0))
    with pytest.raises(ValueError, match=r"^power must be a finite number >= 0, got nan$"):
        noises.Unigram([1, 2], power=np.float32("nan"))
    with pytest.raises(TypeError, match=r"^num_negatives must be an int, got float 3\.0$"):
        nce_ext.NCELoss(D, V, noises.Uniform(V), np.float64(3))
