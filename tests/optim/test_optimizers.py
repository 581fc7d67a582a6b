"""nce_ext.optim against torch's optimizers where all rows are touched, and against the lazy rules where few are."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import (
    ALL,
    CASES,
    F32,
    F64,
    assert_same,
    give_all_rows,
    make,
    pair,
    parameter,
    random_gradient,
    sparse,
    torch_twin,
    use,
)
from optim_oracle import Oracle
from tolerances import assert_close

from nce_ext import optim

STEPS = 6


@pytest.fixture(autouse=True)
def _kernels(backend, monkeypatch):
    use(backend, monkeypatch)


# Every row at every step: torch's own rule.


@pytest.mark.parametrize("size", [(7,), (7, 1), (3, 67), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_torch(name, dtype, size):
    ours, truth = pair(parameter(*size, dtype=dtype))
    mine, theirs = make(name, [ours]), torch_twin(name, [truth])
    before = truth.detach().clone()
    for step in range(STEPS):
        give_all_rows(ours, truth)
        mine.step()
        theirs.step()
        assert_close(ours, truth, dtype, f"weight after step {step}")
    assert (truth - before).abs().max() > 0.05
    for key, value in theirs.state[truth].items():
        got = mine.state[ours][key]
        if key == "step":
            assert got == value
        elif value is not None:
            assert_close(got.reshape(truth.shape), value, dtype, key)


@pytest.mark.parametrize("name", CASES)
def test_groups_schedules_and_rates_that_are_tensors(name):
    pairs = [pair(parameter(*size, dtype=F64)) for size in [(7, 5), (4,), (3, 2)]]

    def optimizer(build, which):
        groups = [{"params": [pairs[0][which], pairs[1][which]]}, {"params": [pairs[2][which]], "lr": 0.03}]
        built = build(name, groups)
        built.param_groups[0]["lr"] = torch.tensor(0.2, dtype=F64)
        return built, torch.optim.lr_scheduler.LambdaLR(built, lambda epoch: 0.7**epoch)

    (mine, my_schedule), (theirs, their_schedule) = optimizer(make, 0), optimizer(torch_twin, 1)
    for _ in range(STEPS):
        for ours, truth in pairs:
            give_all_rows(ours, truth)
        for part in (mine, theirs, my_schedule, their_schedule):
            part.step()
    assert mine.param_groups[1]["lr"] == pytest.approx(0.03 * 0.7**STEPS)
    for ours, truth in pairs:
        assert_close(ours, truth, F64, "weight")


@pytest.mark.parametrize("name", CASES)
def test_dense_parameters_are_the_affair_of_torch(name):
    """Bit for bit, beside sparse ones in the same group, and with nothing of ours in their state."""
    dense, table, other = parameter(4, 3), parameter(7, 5), parameter(3)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in (dense, other)]
    mine, theirs = make(name, [dense, table, other]), torch_twin(name, copies)
    for _ in range(STEPS):
        for p, copied in zip((dense, other), copies, strict=True):
            p.grad = torch.randn_like(p)
            copied.grad = p.grad.clone()
        table.grad = random_gradient(table, [1, 4])
        gradient = table.grad
        mine.step()
        theirs.step()
        assert table.grad is gradient
    for p, copied in zip((dense, other), copies, strict=True):
        assert torch.equal(p, copied)
        assert_same(dict(mine.state[p]), dict(theirs.state[copied]))


def test_differentiable_steps_on_dense_parameters_stay_so():
    start, gradient = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    p = start.clone()
    optimizer = optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, weight_decay=0.5, differentiable=True)
    optimizer.param_groups[0]["params"] = [p]
    p.grad = gradient
    optimizer.step()
    p.sum().backward()
    torch.testing.assert_close(start.grad, torch.full((3, 4), 0.75))


# A few rows at a step: the lazy rules.

TOUCHED = [[1, 4], [4], [], [0, 1, 4, 5], [6], [1], [], [1, 4, 6], [4]]


@pytest.mark.parametrize("size", [(7,), (7, 67), (7, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_lazy_rules(name, dtype, size):
    p = parameter(*size, dtype=dtype)
    optimizer, oracle = make(name, [p]), Oracle(ALL[name][0], p.detach().reshape(7, -1).numpy(), **ALL[name][1])
    rows = p.detach().view(7, -1)
    for step, touched in enumerate(TOUCHED):
        oracle.options["lr"] = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step % 3)
        p.grad = random_gradient(p, touched)
        untouched = [row for row in range(7) if row not in touched]
        kept = rows[untouched].clone()
        values = p.grad._values().reshape(len(touched), rows.shape[1]).double().numpy()
        optimizer.step()
        oracle.step(dict(zip(touched, values, strict=True)))
        assert torch.equal(rows[untouched], kept)
        assert_close(rows, oracle.weight, dtype, f"weight after step {step}")
    state = optimizer.state[p]
    for key, truth in {"momentum_buffer": oracle.first, "exp_avg": oracle.first, "exp_avg_sq": oracle.second}.items():
        if key in state:
            assert_close(state[key].view(7, -1), truth, dtype, key)
    if ALL[name][0] == "Adagrad":
        assert_close(state["sum"].view(7, -1), oracle.second, dtype, "sum")
    if ALL[name][0] == "RowwiseAdagrad":
        assert state["sum"].shape == (7,)
        assert_close(state["sum"], oracle.row_second, dtype, "sum")
    if "row_step" in state:
        assert state["row_step"].tolist() == oracle.touches.tolist()
    assert state["step"] == len(TOUCHED)
    if hasattr(optimizer, "catch_up"):
        optimizer.catch_up()
        oracle.catch_up()
        assert_close(rows, oracle.weight, dtype, "weight, caught up")


@pytest.mark.parametrize("name", ALL)
def test_state_of_untouched_rows_stays(name):
    p = parameter(7, 5)
    optimizer = make(name, [p])
    p.grad = random_gradient(p, range(7))
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items() if torch.is_tensor(value) and value.dim()}
    p.grad = random_gradient(p, [2, 5])
    optimizer.step()
    untouched = [0, 1, 3, 4, 6]
    for key, value in before.items():
        assert torch.equal(optimizer.state[p][key][untouched], value[untouched]), key
        assert not torch.equal(optimizer.state[p][key][[2, 5]], value[[2, 5]]), key


def test_first_steps_of_rare_rows_in_both_bias_corrections():
    """By its own touches a row's first step is lr in size; by all steps it is larger, up to the docstring's bound."""
    sizes = {}
    for correction in ("row", "global"):
        p = torch.nn.Parameter(torch.zeros(3, 2, dtype=F64))
        optimizer = optim.Adam([p], lr=0.1, eps=0, bias_correction=correction)
        p.grad = random_gradient(p, [0])
        optimizer.step()
        optimizer.state[p]["step"] += 100_000
        p.grad = sparse([1], torch.tensor([[3.0, -0.01]], dtype=F64), 3)
        optimizer.step()
        sizes[correction] = p.detach()[1]
    torch.testing.assert_close(sizes["row"], torch.tensor([-0.1, 0.1], dtype=F64))
    torch.testing.assert_close(sizes["global"], sizes["row"] * 0.1 / 0.001**0.5)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_decay_of_all_rows_is_that_of_torch(dtype):
    """AdamW's decay alone, of changing rates: gradient zero somewhere at each step, and late for most rows."""
    ours, truth = pair(parameter(6, 5, dtype=dtype))
    mine, theirs = optim.AdamW([ours], weight_decay=0.5), torch.optim.AdamW([truth], weight_decay=0.5)
    factor = 1.0
    start = truth.detach().clone()
    for step in range(STEPS):
        for optimizer in (mine, theirs):
            optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)
        factor *= 1 - 0.15 / (1 + step)
        ours.grad, truth.grad = (
            sparse([step, 5] if step < 5 else [5], torch.zeros(2 - step // 5, 5, dtype=dtype), 6),
            None,
        )
        truth.grad = torch.zeros_like(truth)
        mine.step()
        theirs.step()
    assert (ours[0] - truth[0]).abs().max() > 0.01  # not yet
    mine.catch_up()
    assert_close(ours, truth, dtype, "weight")
    assert_close(ours, start * factor, dtype, "weight")
    once = ours.detach().clone()
    mine.catch_up()
    assert torch.equal(ours, once)


@pytest.mark.parametrize("name", ALL)
def test_catching_up_changes_nothing_else(name):
    p, dense = parameter(6, 5), parameter(3, 3)
    optimizer = make(name, [p, dense])
    optimizer.catch_up()
    for _ in range(3):
        p.grad, dense.grad = random_gradient(p, [1, 2]), torch.randn(3, 3)
        optimizer.step()
    before, kept = p.detach().clone(), dense.detach().clone()
    moments = {key: value.clone() for key, value in optimizer.state[p].items() if torch.is_tensor(value)}
    optimizer.catch_up()
    decays = optimizer.param_groups[0].get("decoupled_weight_decay", False)
    assert torch.equal(p, before) != decays
    assert torch.equal(p[[1, 2]], before[[1, 2]])  # they were up to date
    assert torch.equal(dense, kept)
    for key in moments.keys() - {"decayed"}:
        assert torch.equal(optimizer.state[p][key], moments[key]), key


def test_infinite_weights_stay_what_they_are(backend):
    """A weight decay of 0 is none: 0 times infinity would be NaN."""
    p = torch.nn.Parameter(torch.full((3, 4), math.inf))
    optimizer = optim.AdamW([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (3, 4), check_invariants=False)
    optimizer.step()
    optimizer.catch_up()
    assert torch.equal(p, torch.full((3, 4), math.inf))


def test_autograd_sees_that_the_weight_has_changed(backend):
    """What has saved the weight for its backward must not use the new one unnoticed."""
    p = torch.nn.Parameter(torch.randn(3, 4))
    score = (p * p).sum()
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (3, 4), check_invariants=False)
    optim.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()
