"""InfoNCE against numpy float64 one row at a time: every option, storage type, chunk and upstream gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contrastive_cases import B, D, K, arrays, data, vectors
from contrastive_oracle import pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from nce_ext.contrastive import InfoNCELoss


def assert_matches(loss_fn: InfoNCELoss, operands: dict, given: dict, **oracle_options):
    """Loss and all gradients, for the loss function's reduction; with "none" under a random upstream gradient."""
    batch, dtype = operands["query"].shape[0], operands["query"].dtype
    weights = torch.ones(batch, dtype=torch.float64)
    if loss_fn.reduction == "mean":
        weights /= max(batch, 1)
    elif loss_fn.reduction == "none":
        weights = torch.randn(batch, dtype=torch.float32).double()
    truth = pairwise(
        **arrays(operands), **arrays(given), scale=1 / float(loss_fn.temperature), in_batch=loss_fn.in_batch,
        debias=loss_fn.debias, upstream=weights.numpy(), **oracle_options,
    )  # fmt: skip
    leaves = dict(operands)
    if loss_fn.logit_scale is not None:
        leaves["scale"] = loss_fn.logit_scale
    loss = loss_fn(**operands, **given)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == compute
    if loss_fn.reduction == "none":
        assert_close(loss, truth.loss, compute, "loss", truth.loss_scale)
    else:
        w = weights.numpy()
        assert_close(loss, (w * truth.loss).sum(), compute, "loss", (w * truth.loss_scale).sum())
    upstream = weights.to(compute) if loss_fn.reduction == "none" else None
    for (name, leaf), grad in zip(leaves.items(), torch.autograd.grad(loss, leaves.values(), upstream), strict=True):
        want, size = truth.gradients[name], truth.scales[name]
        if name == "scale":  # the parameter is its logarithm
            want, size = want / float(loss_fn.temperature), size / float(loss_fn.temperature)
        assert grad.dtype == leaf.dtype
        assert_close(grad, want, leaf.dtype, f"gradient of {name}", size)


OPTIONS = {
    "in batch alone": ({}, (), None),
    "explicit too": ({}, (), K),
    "explicit alone": ({"in_batch": False}, (), K),
    "ids": ({}, ("ids",), None),
    "ids of all": ({}, ("ids", "negative_ids"), K),
    "ids, negatives without": ({}, ("ids",), K),
    "ids, explicit alone": ({"in_batch": False}, ("ids", "negative_ids"), K),
    "mask": ({}, ("negative_mask",), K),
    "mask, explicit alone": ({"in_batch": False}, ("negative_mask", "ids", "negative_ids"), K),
    "log q": ({}, ("log_q",), None),
    "log q of all": ({}, ("ids", "negative_ids", "log_q", "negative_log_q"), K),
    "log q, explicit alone": ({"in_batch": False}, ("log_q", "negative_log_q"), K),
    "soft labels": ({}, ("target",), K),
    "soft labels and log q": ({}, ("target", "log_q", "negative_log_q"), K),
    "soft labels, explicit alone": ({"in_batch": False}, ("target",), K),
    "debiased": ({"debias": 0.02}, (), K),
    "debiased, always the floor": ({"debias": 0.9}, ("ids",), None),
    "debiased, explicit alone": ({"debias": 0.1, "in_batch": False}, ("ids", "negative_ids", "negative_mask"), K),
    "learned temperature": ({"learn_temperature": True}, ("ids",), K),
    "learned temperature, debiased": ({"learn_temperature": True, "debias": 0.02}, ("ids",), K),
    "learned temperature, the floor": ({"learn_temperature": True, "debias": 0.9}, ("ids",), K),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matches_the_formula(name, reduction):
    options, names, extra = OPTIONS[name]
    loss_fn = InfoNCELoss(0.4, reduction=reduction, max_logits=40, dtype=torch.float64, **options)
    assert_matches(loss_fn, vectors(extra=extra), data(*names, in_batch=loss_fn.in_batch))


def test_labels_go_with_masks_where_the_masked_have_none():
    given = data("ids", "negative_ids", "negative_mask", "target")
    hit = given["ids"][:, None] == torch.cat([given["ids"], given["negative_ids"]])
    hit[:, B:] |= ~given["negative_mask"]
    hit[:, :B].fill_diagonal_(False)
    given["target"][hit] = 0
    given["target"][3] = 0
    for reduction in ("mean", "none"):
        assert_matches(InfoNCELoss(0.7, reduction=reduction), vectors(), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["explicit too", "log q of all", "soft labels", "debiased", "explicit alone"])
def test_storage_types_round_once(name, dtype):
    options, names, extra = OPTIONS[name]
    for reduction in ("sum", "none"):
        loss_fn = InfoNCELoss(0.25, reduction=reduction, max_logits=50, **options)
        given = data(*names, in_batch=loss_fn.in_batch)
        given = {name: v.float() if v.dtype == torch.float64 else v for name, v in given.items()}
        assert_matches(loss_fn, vectors(extra=extra, dtype=dtype), given)


def test_dtypes_may_differ_and_each_gets_its_own_gradient():
    operands = vectors(dtype=torch.float32)
    operands["key"] = operands["key"].detach().bfloat16().requires_grad_()
    operands["negatives"] = operands["negatives"].detach().half().requires_grad_()
    assert_matches(InfoNCELoss(0.3), operands, {})


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 12),
    dim=st.integers(1, 9),
    extra=st.one_of(st.none(), st.integers(0, 12)),
    in_batch=st.booleans(),
    names=st.sets(st.sampled_from(["ids", "negative_ids", "negative_mask", "log_q"])),
    classes=st.integers(1, 8),
    debias=st.sampled_from([0.0, 0.0, 0.05, 0.5, 0.95]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    size=st.sampled_from([0.1, 1.0, 10.0]),
    max_logits=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_mask(batch, dim, extra, in_batch, names, classes, debias, reduction, size, max_logits, seed):
    torch.manual_seed(seed)
    in_batch |= extra is None
    if extra is None:
        names -= {"negative_ids", "negative_mask"}
    if "ids" not in names:
        names -= {"negative_ids"}
    if "log_q" in names:
        names |= {"negative_log_q"} if extra is not None else set()
        debias = 0.0
    loss_fn = InfoNCELoss(0.8, in_batch=in_batch, reduction=reduction, debias=debias, max_logits=max_logits)
    given = data(*sorted(names), batch=batch, extra=extra or 0, in_batch=in_batch, classes=classes)
    assert_matches(loss_fn, vectors(batch, dim, extra, scale=size if not debias else 0.3), given)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"debias": 0.1}, {"symmetric": True}, {"in_batch": False}])
def test_the_chunk_changes_nothing(options, reduction):
    operands, given = vectors(23, dtype=torch.float64), data("ids", "negative_ids", batch=23)
    results = []
    for max_logits in (1, 28, 29, 100, 10**6):
        loss = InfoNCELoss(0.3, reduction=reduction, max_logits=max_logits, **options)(**operands, **given)
        weights = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape)
        results.append([loss.detach(), *torch.autograd.grad(loss, operands.values(), weights)])
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


GRADCHECKS = {
    "plain": {},
    "explicit alone": {"in_batch": False},
    "symmetric": {"symmetric": True},
    "normalized": {"normalize": True},
    "debiased": {"debias": 0.05, "normalize": True},
    "debiased, the floor": {"debias": 0.9, "normalize": True, "learn_temperature": True},
    "all at once": {"debias": 0.05, "normalize": True, "symmetric": True, "learn_temperature": True},
    "learned": {"learn_temperature": True},
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name, reduction):
    """By finite differences, so that normalisation, both directions and the temperature are checked as one."""
    loss_fn = InfoNCELoss(0.5, reduction=reduction, max_logits=30, dtype=torch.float64, **GRADCHECKS[name])
    operands = vectors(6, 4, 3)
    given = data("ids", "negative_ids", batch=6, extra=3, classes=4)

    def run(query, key, negatives, *parameters):
        return loss_fn(query, key, negatives=negatives, **given)

    assert torch.autograd.gradcheck(run, (*operands.values(), *loss_fn.parameters()))


@pytest.mark.parametrize("names", [("log_q", "negative_log_q"), ("target",)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_with_data(names, reduction):
    loss_fn = InfoNCELoss(0.5, reduction=reduction, learn_temperature=True, dtype=torch.float64)
    given = data(*names, batch=6, extra=3)

    def run(query, key, negatives, *parameters):
        return loss_fn(query, key, negatives=negatives, **given)

    assert torch.autograd.gradcheck(run, (*vectors(6, 4, 3).values(), *loss_fn.parameters()))


def test_symmetric_is_the_mean_of_both_directions():
    operands, given = vectors(), data("ids", "negative_ids", "log_q", "negative_log_q")
    query_log_q = torch.randn(B, dtype=torch.float64)
    one = InfoNCELoss(0.2, reduction="none")
    there = one(**operands, **given)
    back = one(operands["key"], operands["query"], ids=given["ids"], log_q=query_log_q)
    both = InfoNCELoss(0.2, reduction="none", symmetric=True)(**operands, **given, query_log_q=query_log_q)
    torch.testing.assert_close(both, (there + back) / 2, rtol=1e-14, atol=0)


def test_only_the_gradients_that_are_asked_for():
    """Every subset of leaves, with a sum and with single rows: the same numbers, and None for the rest."""
    operands = {name: value.detach() for name, value in vectors().items()}
    for reduction in ("mean", "none"):
        for in_batch in (True, False):
            loss_fn = InfoNCELoss(0.3, reduction=reduction, in_batch=in_batch)
            wanted = {n: v.clone().requires_grad_() for n, v in operands.items()}
            loss_fn(**wanted).sum().backward()
            for bits in range(1, 8):
                some = {n: v.clone().requires_grad_(bool(bits >> i & 1)) for i, (n, v) in enumerate(operands.items())}
                loss_fn(**some).sum().backward()
                for name, value in some.items():
                    assert (value.grad is None) != value.requires_grad
                    if value.requires_grad:
                        np.testing.assert_allclose(value.grad, wanted[name].grad, rtol=1e-13, atol=1e-16)


def test_the_temperature_is_a_parameter_like_clips():
    loss_fn = InfoNCELoss(0.07, learn_temperature=True)
    assert list(loss_fn.state_dict()) == ["logit_scale"]
    assert loss_fn.state_dict()["logit_scale"] == pytest.approx(np.log(1 / 0.07))
    assert float(loss_fn.temperature) == pytest.approx(0.07)
    assert "temperature=0.07, learn_temperature=True" in repr(loss_fn)
    fixed = InfoNCELoss(0.07)
    assert fixed.temperature == pytest.approx(0.07, rel=1e-15)
    assert not list(fixed.parameters())
    assert not fixed.state_dict()


def test_the_limit_of_the_temperature():
    """Above the limit 1 / T stays there; the gradient that pushes on is 0 and the one that leads back is whole."""
    clip = InfoNCELoss(0.01, learn_temperature=True, dtype=torch.float64)
    with torch.no_grad():
        clip.logit_scale.fill_(np.log(150))
    assert float(clip.temperature) == pytest.approx(0.01)
    query = torch.nn.functional.normalize(torch.randn(B, D, dtype=torch.float64), dim=1)
    aligned = clip(query, query)  # a higher scale lowers this loss
    torch.testing.assert_close(aligned, InfoNCELoss(0.01)(query, query))
    aligned.backward()
    assert clip.logit_scale.grad == 0
    clip.logit_scale.grad = None
    clip(query, query.roll(1, 0)).backward()
    leaf = torch.tensor(np.log(100), dtype=torch.float64, requires_grad=True)
    z = leaf.exp() * query @ query.roll(1, 0).T
    torch.nn.functional.cross_entropy(z, torch.arange(B)).backward()
    torch.testing.assert_close(clip.logit_scale.grad, leaf.grad)
    assert leaf.grad > 0
