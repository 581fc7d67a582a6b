"""A fused optimizer's steps against gradients, clipping and the optimizer's own steps."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from cases import Case
from fused_cases import Twins, batches, loss_of, rows_of
from objective_cases import is_softmax, truth
from optim_cases import ALL, BF16, F16, F32, F64, assert_same, make, snapshot, torch_twin
from optim_oracle import Oracle
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

from nce_ext import optim
from nce_ext._ops import library

NAMES = ["nce", "negative sampling", "adversarial", "softmax"]
OPTIMIZERS = [
    "SGD", "SGD, decay, maximize", "SGD, momentum, dampening, decay", "SGD, nesterov, decay", "Adagrad, all",
    "row-wise Adagrad, all", "Adam, all", "Adam, global", "AdamW, all",
]  # fmt: skip


# The case, options of the constructor, and what differs in the call.
VARIANTS = {
    "plain": ({}, {}, ()),
    "odd sizes": ({"lead": (13,), "dim": 33, "negatives": 41, "classes": 300}, {}, ()),
    "one class": ({"classes": 1, "dim": 1}, {"remove_hits": False}, ()),
    "several targets": ({"lead": (11,), "positives": 3, "pad": True}, {}, ()),
    "ignored": ({"lead": (5, 3), "pad": True}, {}, ()),
    "shared": ({"lead": (11,)}, {"shared": True}, ()),
    "unique": ({}, {"unique": True}, ()),
    "reference": ({}, {"backend": "reference"}, ()),
    "learned log z": ({}, {"log_z": "learned"}, ()),
    "learned log z, shared": ({}, {"log_z": "learned", "shared": True}, ()),
    "no bias": ({"with_bias": False}, {}, ()),
    "no bias, shared": ({"with_bias": False}, {"shared": True}, ()),
    "float64": ({"dtype": F64}, {}, ()),
    "bfloat16 hidden": ({"hidden_dtype": BF16}, {}, ()),
    "sum": ({}, {"reduction": "sum"}, ()),
    "none": ({"lead": (3, 4)}, {"reduction": "none"}, ("upstream",)),
    "none, shared": ({"lead": (3, 4)}, {"reduction": "none", "shared": True}, ("upstream",)),
    "weighted": ({}, {}, ("sample_weight",)),
    "weighted sum, several targets": ({"positives": 2}, {"reduction": "sum"}, ("sample_weight",)),
    "hidden learns nothing": ({}, {}, ("frozen",)),
    "hidden learns nothing, shared": ({}, {"shared": True}, ("frozen",)),
    "ids of each": ({}, {}, ("negatives",)),
    "nothing": ({"lead": (0,)}, {}, ()),
    "nothing, shared": ({"lead": (0,)}, {"shared": True}, ()),
}


def call_of(case: Case, given: tuple[str, ...]) -> dict:
    made = {
        "upstream": torch.randn(case.lead), "sample_weight": torch.rand(case.lead) + 0.1,
        "negatives": torch.randint(case.classes, (*case.lead, case.negatives)),
    }  # fmt: skip
    call = {name: value for name, value in made.items() if name in given}
    return {**call, "learns": False} if "frozen" in given else call


# Every optimizer with every loss, and every third of these pairs with the other variants, in turn.
ALWAYS = ("plain", "shared", "reference")
GRID = [
    (optimizer, name, variant)
    for i, optimizer in enumerate(OPTIMIZERS)
    for j, name in enumerate(NAMES)
    for k, variant in enumerate(VARIANTS)
    if (variant in ALWAYS or (i + j + k) % 3 == 0) and not (is_softmax(name) and "log_z" in VARIANTS[variant][1])
]


@pytest.mark.parametrize(("optimizer", "name", "variant"), GRID)
def test_steps_are_those_of_the_gradient(optimizer, name, variant):
    """To the last bit, as it is the same arithmetic."""
    sizes, options, given = VARIANTS[variant]
    case = Case(**sizes)
    twins = Twins(name, case, optimizer, **options)
    for seed in range(3):
        call = {**call_of(case, given), "seed": torch.tensor([seed, 7])}
        twins.both(case.hidden, case.target, **call)
    assert twins.moved() or case.hidden.numel() == 0 or case.classes == 1
    twins.assert_same()


@pytest.mark.parametrize("name", ["nce", "adversarial", "smoothed"])
@pytest.mark.parametrize("optimizer", ALL)
def test_steps_are_those_of_the_formulas(optimizer, name, backend):
    """Loss and rule in numpy float64, neither by PyTorch."""
    case = Case(dtype=F64, lead=(6,), classes=30)
    case.options = {"reduction": "none"}
    loss_fn = loss_of(name, case, backend=backend)
    stepper = make(optimizer, loss_fn.parameters())
    loss_fn.fuse_optimizer(stepper)
    rule, options = ALL[optimizer]
    oracles = [Oracle(rule, p.detach().reshape(30, -1).numpy(), **options) for p in rows_of(loss_fn)]
    for _ in range(4):
        case.weight, case.bias = (p.detach().clone() for p in rows_of(loss_fn))
        case.seed = torch.randint(2**62, (2,))
        upstream = torch.randn(6, dtype=F64)
        exact = truth(name, case, upstream).value
        loss_fn(case.hidden, case.target, seed=case.seed).backward(upstream)
        ids = np.union1d(case.target.numpy(), case.noise.sample((6, case.negatives), seed=case.seed).numpy())
        for p, oracle, gradient in zip(rows_of(loss_fn), oracles, (exact.weight, exact.bias), strict=True):
            oracle.step({int(row): np.atleast_1d(np.asarray(gradient)[row]) for row in ids})
            assert_close(p.reshape(30, -1), oracle.weight, F32, "weight")  # errors of the gradient grow in a few steps
    for p, oracle in zip(rows_of(loss_fn), oracles, strict=True):
        assert stepper.state[p]["step"] == oracle.steps == 4
        if "row_step" in stepper.state[p]:
            assert stepper.state[p]["row_step"].tolist() == oracle.touches.tolist()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_of_16_bit_weights_are_not_rounded_on_the_way(optimizer, dtype, native):
    """The step is that of float32 weights of the same values; then there is one rounding."""
    case, wide = Case(dtype=dtype), Case()
    wide.weight, wide.bias = case.weight.float(), case.bias.float()
    hidden = case.hidden.float()
    stepped = {}
    for rounding in ("nearest", "master", "none"):
        loss_fn = loss_of("nce", wide if rounding == "none" else case)
        stepper = make(optimizer, loss_fn.parameters(), **({} if rounding == "none" else {"rounding": rounding}))
        loss_fn.fuse_optimizer(stepper)
        loss_fn(hidden, case.target, seed=case.seed).backward()
        stepped[rounding] = rows_of(loss_fn)
        if rounding == "master":
            masters = [stepper.state[p]["master"].view_as(p) for p in rows_of(loss_fn)]
    for i, master in enumerate(masters):
        assert master.dtype == F32
        if i == 0:  # the gradient of the bias is rounded once
            assert_close(master, stepped["none"][i], F32, "weight in full")
        assert torch.equal(stepped["master"][i], master.to(dtype))
        assert torch.equal(stepped["nearest"][i], master.to(dtype))


def test_16_bit_weights_are_rounded_at_random():
    """By bits of the optimizer's generator: rows that get the same step part."""
    case = Case(dtype=BF16, lead=(400,), dim=64)
    weights = []
    for seed in (1, 1, 2):
        loss_fn = loss_of("nce", case)
        optimizer = optim.SGD(loss_fn.parameters(), lr=0.01, generator=torch.Generator().manual_seed(seed))
        loss_fn.fuse_optimizer(optimizer)
        loss_fn(case.hidden, case.target, seed=case.seed).backward()
        weights.append(loss_fn.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_version_of_the_weight_is_counted():
    """Or autograd could not tell that what a graph has saved is gone."""
    case = Case()
    twins = Twins("nce", case)
    logits = twins.fused.logits(case.hidden.requires_grad_())
    twins.fused(case.hidden, case.target).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


# Clipping.


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"bias": False}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping(optimizer, options):
    case = Case(dtype=F64, with_bias=options.get("bias", True), classes=20)
    twins = Twins("nce", case, optimizer, fuse={"max_norm": 0.05}, **options)
    unclipped = Twins("nce", case, optimizer, **options)
    for each in batches(case, 7, 5):
        twins.both(**each, exact=False)
        unclipped.both(**each)
    twins.assert_close()
    assert not torch.allclose(twins.fused.weight, unclipped.fused.weight)


def test_a_small_norm_is_not_clipped():
    case = Case()
    twins = Twins("nce", case, fuse={"max_norm": 1e3})
    twins.max_norm = None
    for each in batches(case, 7, 5):
        twins.both(**each)
    twins.assert_same()


# What makes a step.


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation(optimizer, options):
    """Groups of three, of batches of any size, the last one not full."""
    case = Case(dtype=F64, classes=20)
    twins = Twins("nce", case, optimizer, fuse={"accumulate": 3, "max_norm": 0.5}, **options)
    before = twins.fused.weight.detach().clone()
    for i, each in enumerate(batches(case, 4, 9, 1, 0, 2, 8, 3, 5)):
        twins.backward_both(**each, exact=False)
        if i % 3 == 2:
            assert not torch.equal(before, twins.fused.weight)
            before = twins.fused.weight.detach().clone()
            twins.step_plain()
        elif options == {} and library.fused_available(torch.device("cpu")):
            assert torch.equal(before, twins.fused.weight)
            assert all(p.grad is None for p in rows_of(twins.fused))
    twins.handle.step()
    twins.step_plain()
    twins.assert_close()
    assert twins.optimizers[0].state[twins.fused.weight]["step"] == 3
    after = snapshot(twins.optimizers[0])
    twins.handle.step()  # nothing is left
    assert_same(after, snapshot(twins.optimizers[0]))


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_calls_in_one_pass_are_one_step(optimizer, options):
    case = Case(dtype=F64, classes=20)
    twins = Twins("nce", case, optimizer, **options)
    for _ in range(2):
        calls = batches(case, 6, 3)
        for which, loss_fn in enumerate((twins.fused, twins.plain)):
            sum(loss_fn(**each) * (i + 1) for i, each in enumerate(calls)).backward()
            twins.step(which)
    twins.assert_close()
    assert twins.optimizers[0].state[twins.fused.weight]["step"] == 2


def test_a_loss_that_is_looked_at_is_no_step():
    case = Case()
    twins = Twins("nce", case)
    before = snapshot(twins.optimizers[0])
    twins.fused(case.hidden.requires_grad_(), case.target)
    with torch.no_grad():
        twins.fused(case.hidden, case.target)
    assert_same(before, snapshot(twins.optimizers[0]))
    twins.both(case.hidden, case.target, seed=case.seed)
    twins.assert_same()


# Tied weights.

TIES = ("sparse embedding", "dense embedding", "linear", "sparse embedding and linear")


def other_uses(tie: str, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A number that also depends on the weight."""
    used = torch.zeros((), dtype=weight.dtype)
    if "embedding" in tie:
        used = used + F.embedding(ids, weight, sparse="sparse" in tie).square().sum()
    if "linear" in tie:
        used = used + F.linear(torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype), weight).cos().sum()
    return used


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_tied_weights(tie, options, max_norm):
    """SGD with decay, for which it makes no difference whether a gradient of a row is 0 or absent but for the decay."""
    case = Case(dtype=F64, classes=20)
    twins = Twins("nce", case, "SGD", fuse={"max_norm": max_norm}, **options)
    for each in batches(case, 6, 5, 1):
        ids = torch.randint(20, (4,))
        for which, loss_fn in enumerate((twins.fused, twins.plain)):
            (loss_fn(**each) + 0.1 * other_uses(tie, loss_fn.weight, ids)).backward()
            twins.step(0) if which == 0 else twins.step_plain()
        assert twins.fused.weight.grad is None
    twins.assert_close()


@pytest.mark.parametrize("optimizer", ["SGD, nesterov, decay", "Adagrad, all", "Adam, all", "AdamW, all"])
def test_tied_to_a_linear_layer_the_rule_is_that_of_torch(optimizer):
    """Every row is touched at every step, so torch's optimizer on dense gradients does the same."""
    case = Case(dtype=F64, classes=20)
    fused, dense = loss_of("nce", case), loss_of("nce", case, sparse=False)
    mine, theirs = make(optimizer, [fused.weight, fused.bias]), torch_twin(optimizer, dense.parameters())
    fused.fuse_optimizer(mine)
    for each in batches(case, 6, 5, 7):
        for loss_fn in (fused, dense):
            (loss_fn(**each) + other_uses("linear", loss_fn.weight, each["target"]) + loss_fn.bias.sum()).backward()
        theirs.step()
        theirs.zero_grad()
    for p, q in zip(rows_of(fused), rows_of(dense), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_what_is_in_grad_before_joins_the_step(layout):
    case = Case(dtype=F64, classes=20)
    twins = Twins("nce", case, "SGD")
    stale = torch.zeros(20, 16, dtype=F64).index_fill_(0, torch.tensor([3, 8]), 1.5)
    for loss_fn in (twins.fused, twins.plain):
        loss_fn.weight.grad = stale.to_sparse(1) if layout == "sparse" else stale.clone()
    (each,) = batches(case, 6)
    twins.both(**each)
    twins.assert_close()


def test_a_gradient_of_the_weight_alone_is_no_step_of_the_bias():
    case = Case(dtype=F64, classes=20)
    twins = Twins("nce", case, "Adam, global")
    for which, loss_fn in enumerate((twins.fused, twins.plain)):
        other_uses("sparse embedding", loss_fn.weight, torch.tensor([3, 4, 3])).backward()
        if which == 0:
            twins.handle.step()
        twins.step(which)
    twins.assert_same()
    twins.both(case.hidden, case.target, seed=case.seed)
    twins.assert_same()


# The rest of the training loop.


@pytest.mark.parametrize("options", [{}, {"shared": True}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_steps_on_the_other_parameters(optimizer, options):
    case = Case()
    twins = Twins("nce", case, optimizer, encoder=nn.Linear(3, 16), log_z="learned", **options)
    for seed in range(3):
        hidden = torch.randn(7, 3)
        twins.backward(0, hidden, case.target, seed=torch.tensor([seed, 1]))
        kept = [p.detach().clone() for p in rows_of(twins.fused)]
        moving = [p.detach().clone() for p in (*twins.encoders[0].parameters(), twins.fused.log_z)]
        twins.step(0)
        assert_same(kept, [p.detach() for p in rows_of(twins.fused)])
        for p, before in zip((*twins.encoders[0].parameters(), twins.fused.log_z), moving, strict=True):
            assert not torch.equal(p, before)
        twins.backward(1, hidden, case.target, seed=torch.tensor([seed, 1]))
        twins.step_plain()
    twins.assert_same()


@pytest.mark.parametrize("options", [{}, {"shared": True}], ids=str)
def test_schedules_and_groups(options):
    """The bias has a learning rate of its own, and both change from step to step; nobody calls optimizer.step()."""
    case = Case()
    twins = Twins("nce", case, "AdamW, all", **options)
    built = []
    for loss_fn in (twins.fused, twins.plain):
        groups = [{"params": [loss_fn.weight]}, {"params": [loss_fn.bias], "lr": 0.5, "betas": (0.1, 0.2)}]
        built.append(make("AdamW, all", groups))
    twins.optimizers = built
    twins.handle = twins.fused.fuse_optimizer(built[0])
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda epoch: 0.5**epoch) for each in built]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a schedule that finds no step before its own warns
        for each in batches(case, 6, 5, 7):
            for which in (0, 1):
                twins.backward(which, **each)
                if which == 1:
                    twins.step_plain()
                schedules[which].step()
    twins.assert_same()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_moves_between_the_ways(optimizer):
    """Steps with gradients go on where fused ones have stopped, and the other way round, through a state_dict."""
    case = Case()
    twins = Twins("nce", case, optimizer)
    for i, each in enumerate(batches(case, 6, 5, 7, 4)):
        twins.both(**each)
        state = copy.deepcopy(twins.optimizers[0].state_dict())
        twins.optimizers[0] = make(optimizer, twins.fused.parameters())
        twins.optimizers[0].load_state_dict(state)
        if i % 2:
            twins.fused.fuse_optimizer(twins.optimizers[0])
        else:
            twins.fused.unfuse_optimizer()
            hidden = case.hidden.requires_grad_()
            for which, loss_fn in enumerate((twins.fused, twins.plain)):
                loss_fn(hidden, case.target, seed=case.seed).backward()
                assert loss_fn.weight.grad.is_sparse
                twins.step(which)
            twins.fused.fuse_optimizer(twins.optimizers[0])
    twins.assert_same()
