"""Sparse gradients of all forms in nce_ext.optim: uncoalesced, strided, empty, dense in between; and their cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import Allocations
from optim_cases import (
    ALL,
    CASES,
    F32,
    F64,
    ROWWISE,
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

import nce_ext
from nce_ext import noise as noises
from nce_ext import optim

STEPS = 6


@pytest.fixture(autouse=True)
def _kernels(backend, monkeypatch):
    use(backend, monkeypatch)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_several_backward_passes(name):
    """Of an embedding and a loss that share the table: uncoalesced, and the same step as of the coalesced one."""
    results = []
    for coalesce in (False, True):
        torch.manual_seed(4)
        loss_fn = nce_ext.NCELoss(5, 12, noises.Uniform(12), 4, sparse=True)
        table = torch.nn.Embedding(12, 5, sparse=True, _weight=loss_fn.weight)
        optimizer = make(name, [*table.parameters(), loss_fn.bias])
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                ids = torch.randint(12, (6,))
                loss_fn(table(ids), torch.randint(12, (6,))).backward()
            for p in (table.weight, loss_fn.bias):
                assert p.grad.is_sparse
                if coalesce:
                    p.grad = p.grad.double().coalesce().to(p.dtype)
            optimizer.step()
        results.append((table.weight.detach().clone(), loss_fn.bias.detach().clone()))
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted, F32, "weight")


@pytest.mark.parametrize("values", ["expanded", "transposed", "every second column"])
@pytest.mark.parametrize("coalesced", [False, True])
def test_values_of_any_strides(values, coalesced):
    made = {
        "expanded": torch.randn(1, 1).expand(3, 5), "transposed": torch.randn(5, 3).T,
        "every second column": torch.randn(3, 10)[:, ::2],
    }[values]  # fmt: skip
    p = parameter(7, 5)
    q = torch.nn.Parameter(p.detach().clone())
    mine, theirs = optim.Adam([p], lr=0.1), optim.Adam([q], lr=0.1)
    for _ in range(2):
        p.grad = sparse([1, 2, 4], made, 7, coalesced)
        q.grad = sparse([1, 2, 4], made.contiguous(), 7, coalesced)
        mine.step()
        theirs.step()
    assert torch.equal(p, q)


def test_rows_may_lie_apart():
    wide = torch.randn(7, 8)
    p, q = torch.nn.Parameter(wide[:, 1:6]), torch.nn.Parameter(wide[:, 1:6].clone())
    assert p.stride() == (8, 1)
    outside = wide[:, [0, 6, 7]].clone()
    mine, theirs = optim.AdamW([p], weight_decay=0.5), optim.AdamW([q], weight_decay=0.5)
    for _ in range(3):
        p.grad = random_gradient(p, [1, 6])
        q.grad = p.grad.clone()
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.catch_up()
    assert torch.equal(p, q)
    assert torch.equal(wide[:, [0, 6, 7]], outside)


def test_gradient_of_a_transposed_use_of_an_embedding():
    table = torch.nn.Embedding(7, 5, sparse=True)
    ids, x = torch.tensor([1, 1, 4]), torch.randn(2, 5)
    optimizer = optim.SGD(table.parameters(), lr=1.0)
    wanted = table.weight.detach().clone().requires_grad_()
    (x @ wanted[ids].T).pow(2).sum().backward()
    (x @ table(ids).T).pow(2).sum().backward()
    optimizer.step()
    torch.testing.assert_close(table.weight, wanted - wanted.grad)


@pytest.mark.parametrize("name", ALL)
def test_gradient_without_rows_counts_as_a_step(name):
    p = parameter(7, 5)
    before = p.detach().clone()
    optimizer = make(name, [p])
    for _ in range(2):
        p.grad = random_gradient(p, [])
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0,), (0, 2, 3)])
@pytest.mark.parametrize("name", ALL)
def test_empty_parameters(name, size):
    p = parameter(*size)
    optimizer = make(name, [p])
    for _ in range(2):
        p.grad = random_gradient(p, [1] if size[0] else [])
        optimizer.step()
    optimizer.catch_up()
    assert optimizer.state[p]["step"] == 2


def test_scalars_beside_tables():
    """As a learned log_z is; row-wise Adagrad has it as one row of one element."""
    for name in ALL:
        scalar, vector = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor([2.0]))
        optimizer = make(name, [scalar, vector])
        for _ in range(2):
            scalar.grad, vector.grad = torch.tensor(0.5), torch.tensor([0.5])
            optimizer.step()
        assert scalar == vector
        assert scalar != 2.0


@pytest.mark.parametrize("first", ["sparse", "dense"])
@pytest.mark.parametrize("size", [(6, 5), (6,), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_now_sparse_now_dense(name, size, first):
    """With all rows touched these are all steps of one rule, torch's, whatever the state began as."""
    ours, truth = pair(parameter(*size, dtype=F64))
    mine, theirs = make(name, [ours]), torch_twin(name, [truth])
    for step in range(STEPS):
        give_all_rows(ours, truth)
        if (step // 2 % 2 == 0) == (first == "dense"):
            ours.grad = truth.grad.clone()
        mine.step()
        theirs.step()
        assert_close(ours, truth, F64, f"weight after step {step}")


def test_momentum_that_is_switched_on():
    """A row's buffer begins with its first gradient under momentum, as torch's does."""
    ours, truth = pair(parameter(6, 5, dtype=F64))
    mine, theirs = optim.SGD([ours], lr=0.1), torch.optim.SGD([truth], lr=0.1)
    for step in range(STEPS):
        give_all_rows(ours, truth)
        for optimizer in (mine, theirs):
            optimizer.param_groups[0].update(momentum=0.9 if step > 1 else 0, dampening=0.5)
            optimizer.step()
        assert_close(ours, truth, F64, f"weight after step {step}")


@pytest.mark.parametrize("name", ALL)
def test_dense_gradients_of_a_parameter_stepped_by_rows(name):
    """They touch all rows, whatever their strides."""
    p = parameter(6, 4, 3, dtype=F64)
    optimizer, oracle = make(name, [p]), Oracle(ALL[name][0], p.detach().reshape(6, -1).numpy(), **ALL[name][1])
    dense = [torch.randn(4, 6, 3, dtype=F64).transpose(0, 1), torch.randn(1, 4, 1, dtype=F64).expand(6, 4, 3)]
    for gradient in [random_gradient(p, [1, 3]), *dense, random_gradient(p, [0, 3]), *dense]:
        p.grad = gradient
        optimizer.step()
        assert p.grad is gradient
        rows = gradient.to_dense().reshape(6, -1).numpy()
        touched = gradient._indices()[0].tolist() if gradient.is_sparse else range(6)
        oracle.step({row: rows[row] for row in touched})
        assert_close(p.view(6, -1), oracle.weight, F64, "weight")


@pytest.mark.parametrize("name", ROWWISE)
def test_row_wise_adagrad_of_dense_gradients(name):
    p = parameter(4, 3, dtype=F64)
    optimizer, oracle = make(name, [p]), Oracle("RowwiseAdagrad", p.detach().numpy(), **ALL[name][1])
    for _ in range(3):
        p.grad = torch.randn(4, 3, dtype=F64)
        optimizer.step()
        oracle.step(dict(enumerate(p.grad.numpy())))
    assert_close(p, oracle.weight, F64, "weight")


# Cost.


class SparseAllocations(Allocations):
    """Of a sparse tensor its elements count, not its size."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_sparse:
            self.largest = max(self.largest, result._values().numel())
            return result
        return super().__torch_dispatch__(lambda: result, types)


@pytest.mark.parametrize("name", ALL)
def test_a_step_costs_what_its_rows_cost(name):
    """After the first step nothing of the size of the table, or of one column, is made."""
    p = parameter(50_000, 4)
    optimizer = make(name, [p])
    p.grad = random_gradient(p, range(0, 50_000, 7))
    optimizer.step()
    known = [p, *(value for value in optimizer.state[p].values() if torch.is_tensor(value))]
    for _ in range(2):
        p.grad = random_gradient(p, [5, 7, 5, 49_999])
        with SparseAllocations(known) as allocations:
            optimizer.step()
        assert 4 <= allocations.largest <= 4 * 4


def test_without_the_compiled_kernels(backend):
    """Where they were never loaded, in a process of its own."""
    if backend == "fused":
        pytest.skip("the reference alone")
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from optim_cases import ALL, make, parameter, random_gradient
from nce_ext import build_info
assert build_info()["backends"] == ["reference"]
for name in ALL:
    torch.manual_seed(1)
    p, narrow = parameter(7, 5), parameter(7, 5, dtype=torch.bfloat16)
    optimizer = make(name, [p, narrow])
    for _ in range(3):
        p.grad, narrow.grad = random_gradient(p, [1, 3, 1]), random_gradient(narrow, [2])
        optimizer.step()
    print(name, p.sum().item(), narrow.sum().item(), sep="|")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(root / "tests" / "support")], cwd=root,
        capture_output=True, text=True, env={**os.environ, "NCE_EXT_DISABLE_NATIVE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert printed.keys() == ALL.keys()
    for name in ALL:
        torch.manual_seed(1)
        p, narrow = parameter(7, 5), parameter(7, 5, dtype=torch.bfloat16)
        optimizer = make(name, [p, narrow])
        for _ in range(3):
            p.grad, narrow.grad = random_gradient(p, [1, 3, 1]), random_gradient(narrow, [2])
            optimizer.step()
        assert printed[name] == f"{p.sum().item()}|{narrow.sum().item()}"
