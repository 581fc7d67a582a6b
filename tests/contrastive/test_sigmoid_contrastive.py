"""SigLIP's loss against numpy float64 one row at a time, the paper's program, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contrastive_cases import arrays, data, vectors
from contrastive_oracle import pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import as_float64, assert_close

from nce_ext.contrastive import SigmoidContrastiveLoss

B, D, K = 9, 7, 5


def assert_matches(loss_fn: SigmoidContrastiveLoss, operands: dict, given: dict, scale=10.0, bias=-10.0):
    batch, dtype = operands["query"].shape[0], operands["query"].dtype
    weights = torch.ones(batch, dtype=torch.float64)
    if loss_fn.reduction == "mean":
        weights /= max(batch, 1)
    elif loss_fn.reduction == "none":
        weights = torch.randn(batch, dtype=torch.float32).double()
    truth = pairwise(**arrays(operands), **arrays(given), scale=scale, bias=bias, upstream=weights.numpy())
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    loss = loss_fn(**operands, **given)
    assert loss.dtype == compute
    leaves, upstream = dict(operands), None
    if loss_fn.logit_scale is not None:
        leaves |= {"scale": loss_fn.logit_scale, "bias": loss_fn.logit_bias}
    if loss_fn.reduction == "none":
        upstream = weights.to(compute)
        assert_close(loss, truth.loss, compute, "loss", truth.loss_scale)
    else:
        w = weights.numpy()
        assert_close(loss, (w * truth.loss).sum(), compute, "loss", (w * truth.loss_scale).sum())
    for (name, leaf), grad in zip(leaves.items(), torch.autograd.grad(loss, leaves.values(), upstream), strict=True):
        by = scale if name == "scale" else 1.0  # the parameter is its logarithm
        assert grad.dtype == leaf.dtype
        assert_close(grad, by * truth.gradients[name], leaf.dtype, name, by * truth.scales[name])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("names", [(), ("ids",), ("ids", "negative_ids", "negative_mask")])
def test_every_option_matches_the_formula(names, learn, reduction):
    loss_fn = SigmoidContrastiveLoss(3.0, -1.5, learn=learn, reduction=reduction, max_logits=40, dtype=torch.float64)
    extra = K if "negative_ids" in names else None
    assert_matches(loss_fn, vectors(extra=extra), data(*names), 3.0, -1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_storage_types_round_once(dtype, reduction):
    assert_matches(SigmoidContrastiveLoss(learn=False, reduction=reduction), vectors(dtype=dtype), {})


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 12),
    dim=st.integers(1, 9),
    extra=st.one_of(st.none(), st.integers(0, 12)),
    classes=st.integers(1, 8),
    with_ids=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    bias=st.sampled_from([-10.0, 0.0, 7.0]),
    max_logits=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_mask(batch, dim, extra, classes, with_ids, reduction, size, bias, max_logits, seed):
    torch.manual_seed(seed)
    names = () if not with_ids else ("ids",) if extra is None else ("ids", "negative_ids", "negative_mask")
    loss_fn = SigmoidContrastiveLoss(4.0, bias, reduction=reduction, max_logits=max_logits, dtype=torch.float64)
    given = data(*names, batch=batch, extra=extra or 0, classes=classes)
    assert_matches(loss_fn, vectors(batch, dim, extra, scale=size), given, 4.0, bias)


def test_the_papers_program():
    """Zhai et al. 2023, algorithm 1."""
    image, text = np.random.default_rng(3).normal(size=(2, 12, 5))
    t_prime, b = np.log(10.0), -10.0
    zimg, ztxt = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    logits = zimg @ ztxt.T * np.exp(t_prime) + b
    labels = 2 * np.eye(12) - 1
    want = np.logaddexp(0, -labels * logits).sum() / 12
    loss = SigmoidContrastiveLoss(normalize=True)(torch.from_numpy(image), torch.from_numpy(text))
    assert loss.item() == pytest.approx(want, rel=1e-6)  # the parameter is a float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    loss_fn = SigmoidContrastiveLoss(2.0, -1.0, normalize=True, reduction=reduction, max_logits=20, dtype=torch.float64)
    given = data("ids", batch=6, extra=3, classes=4)

    def run(query, key, negatives, *parameters):
        return loss_fn(query, key, negatives=negatives, **given)

    assert torch.autograd.gradcheck(run, (*vectors(6, 4, 3).values(), *loss_fn.parameters()))


def test_keys_of_other_machines_are_negatives():
    """Two halves of a batch, each with the other's keys as negatives, add up to the whole batch."""
    whole = vectors(10, extra=None)
    query, key = whole["query"], whole["key"]
    loss_fn = SigmoidContrastiveLoss(reduction="sum", dtype=torch.float64)
    parts = loss_fn(query[:4], key[:4], negatives=key[4:]) + loss_fn(query[4:], key[4:], negatives=key[:4])
    want = loss_fn(query, key)
    torch.testing.assert_close(parts, want)
    for got, expected in zip(
        torch.autograd.grad(parts, (query, key)), torch.autograd.grad(want, (query, key)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_its_parameters_are_siglips():
    loss_fn = SigmoidContrastiveLoss()
    state = loss_fn.state_dict()
    assert list(state) == ["logit_scale", "logit_bias"]
    assert state["logit_scale"] == pytest.approx(np.log(10))
    assert state["logit_bias"] == -10
    assert "logit_scale=10, logit_bias=-10, learn=True" in repr(loss_fn)
    assert not SigmoidContrastiveLoss(learn=False).state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_far_logits_are_exact(dtype):
    """softplus beyond where exp overflows, and where 1 + exp is 1."""
    query = torch.tensor([[90.0], [-200.0], [20.5], [-20.5]], dtype=dtype, requires_grad=True)
    key = torch.ones(4, 1, dtype=dtype)
    loss = SigmoidContrastiveLoss(1.0, 0.0, learn=False, reduction="none")(query, key)
    z = as_float64(query)[:, 0]
    truth = np.logaddexp(0, -z) + 3 * np.logaddexp(0, z)
    np.testing.assert_allclose(as_float64(loss), truth, rtol=1e-15 if dtype == torch.float64 else 3e-7)
    loss.sum().backward()
    slope = 3 / (1 + np.exp(-z)) - 1 / (1 + np.exp(z))
    np.testing.assert_allclose(as_float64(query.grad)[:, 0], slope, rtol=1e-14 if dtype == torch.float64 else 3e-7)
