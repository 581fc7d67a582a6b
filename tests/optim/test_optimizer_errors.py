"""Refusals of nce_ext.optim: of constructors, of groups, and of steps, which then have changed nothing."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import BF16, assert_same, parameter, random_gradient, snapshot, sparse, use
from refusals import assert_tested, messages
from test_optimizer_state import parameters, train

from nce_ext import optim
from nce_ext.optim import row_optimizer


@pytest.fixture(autouse=True)
def _kernels(backend, monkeypatch):
    use(backend, monkeypatch)


OPTIONS = {
    "rounding": ("SGD", {"rounding": "up"}, r"rounding must be one of 'stochastic', 'nearest', 'master', got 'up'"),
    "bias_correction": ("AdamW", {"bias_correction": "none"}, r"bias_correction must be 'row' or 'global', got 'none'"),
    "lr negative": ("RowwiseAdagrad", {"lr": -1.0}, r"lr must be finite and >= 0, got -1\.0"),
    "lr_decay infinite": ("RowwiseAdagrad", {"lr_decay": math.inf}, r"lr_decay must be finite and >= 0, got inf"),
    "decay": ("RowwiseAdagrad", {"weight_decay": math.nan}, r"weight_decay must be finite and >= 0, got nan"),
    "accumulator": ("RowwiseAdagrad", {"initial_accumulator_value": -1}, r"initial_accumulator_value must be .* -1"),
    "eps": ("RowwiseAdagrad", {"eps": -1e-8}, r"eps must be finite and >= 0, got -1e-08"),
    "lr of torch": ("AdamW", {"lr": -1.0}, r"Invalid learning rate"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_refusals_of_the_constructor(name):
    rule, options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        getattr(optim, rule)([parameter(2, 2)], **options)


@pytest.mark.parametrize("name", ["rounding", "bias_correction"])
def test_refusals_of_groups(name):
    rule, options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        getattr(optim, rule)([{"params": [parameter(2, 2)], **options}])
    optimizer = getattr(optim, rule)([parameter(2, 2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(2, 2)], **options})
    assert len(optimizer.param_groups) == 1


def two_sparse_dimensions(p):
    return torch.sparse_coo_tensor([[1], [2]], [3.0], p.shape, check_invariants=True)


def table(p):
    return sparse([1, 3], torch.randn(2, *p.shape[1:]).to(p.dtype), p.shape[0])


def untyped():
    """A parameter that takes gradients of any type."""
    p = parameter(7, 5, dtype=BF16)
    p.grad_dtype = None
    return p


ADAMS, TORCHS = ("Adam", "AdamW"), ("SGD", "Adagrad", "Adam", "AdamW")
EVERY = (*TORCHS, "RowwiseAdagrad")
CONTIGUOUS = r"parameter must have contiguous rows for sparse gradients, got strides"
# name -> rules, the last parameter, its gradient, options of its group, error, message
REFUSALS = {
    "amsgrad": (ADAMS, parameter(7, 5), table, {"amsgrad": True}, ValueError, r"amsgrad must be False for sparse"),
    "differentiable": (
        TORCHS, parameter(7, 5), table, {"differentiable": True}, ValueError,
        r"differentiable must be False for sparse gradients, got True",
    ),
    "two sparse dimensions": (
        EVERY, parameter(7, 5), two_sparse_dimensions, {}, ValueError,
        r"gradient must be dense or sparse in its first dimension alone, got 2 sparse dimensions .* shape \[7, 5\]",
    ),
    "complex": (
        EVERY, torch.nn.Parameter(torch.zeros(7, 5, dtype=torch.complex64)), table, {}, TypeError,
        r"parameter must be of a real floating-point type for sparse gradients, got torch\.complex64",
    ),
    "gradient of another type": (
        EVERY, untyped(), lambda p: table(p.float()), {}, TypeError,
        r"gradient must be of its parameter's type torch\.bfloat16, got torch\.float32",
    ),
    "transposed": (EVERY, torch.nn.Parameter(torch.randn(5, 7).T), table, {}, ValueError, CONTIGUOUS),
    "rows transposed": (EVERY, torch.nn.Parameter(torch.randn(7, 5, 2).mT), table, {}, ValueError, CONTIGUOUS),
    "rows that overlap": (EVERY, torch.nn.Parameter(torch.randn(1, 5).expand(7, 5)), table, {}, ValueError, CONTIGUOUS),
    "decay of 1": (
        ("AdamW",), parameter(7, 5), table, {"lr": 2.0, "weight_decay": 0.5}, ValueError,
        r"lr \* weight_decay must be below 1, got 1\.0",
    ),
    "decay not a number": (
        ("AdamW",), parameter(7, 5), table, {"lr": math.nan}, ValueError,
        r"lr \* weight_decay must be below 1, got nan",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for name, row in REFUSALS.items() for rule in row[0]])
def test_refused_steps_change_nothing(name, rule):
    _, last, gradient, options, error, message = REFUSALS[name]
    params = parameters(BF16)
    optimizer = getattr(optim, rule)([{"params": params}])
    train(optimizer, 2)
    optimizer.add_param_group({"params": [last], **options})
    for p in params[:2]:
        p.grad = random_gradient(p, [0, 2])
    params[2].grad, last.grad = torch.randn(3).to(BF16), gradient(last)
    before, random, gradients = snapshot(optimizer), torch.get_rng_state(), [p.grad for p in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert last not in optimizer.state or not optimizer.state[last].get("by_rows")
    assert torch.equal(torch.get_rng_state(), random)
    for p, kept in zip(params, gradients, strict=True):
        assert p.grad is kept
    optimizer.param_groups[1]["params"] = []
    optimizer.step()


def test_every_refusal_in_the_source_is_tested():
    assert_tested([optim, row_optimizer], messages(OPTIONS, REFUSALS))
