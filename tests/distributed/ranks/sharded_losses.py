"""Run by each rank: every case of the sharded loss against one process with the whole table, and against the oracle.

Arguments: the backend, "one process" or "formula", and n, to run every n-th case.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
from cases import Result, leaf
from objective_cases import assert_result
from ranks.sharded_cases import CASES, SIZES, Problem, part, problem
from ranks.sharded_run import run_all, start, together
from tolerances import as_float64
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nce_ext.distributed import shard


def dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def one_process(whole: Problem) -> tuple[Result, Tensor | None]:
    """Loss and gradients of the unsharded loss on all examples."""
    loss_fn = whole.loss_fn(backend="reference")
    given = {name: leaf(v) if name in ("log_z", "sample_weight") else v for name, v in whole.given.items()}
    hidden = leaf(whole.case.hidden)
    loss = loss_fn(hidden, whole.case.target, **given)
    loss.backward(whole.upstream)
    log_z = given.get("log_z", loss_fn.log_z)
    weights = given.get("sample_weight")
    return Result(
        loss.detach(), hidden.grad, dense(loss_fn.weight.grad),
        None if loss_fn.bias is None else dense(loss_fn.bias.grad),
        log_z.grad if isinstance(log_z, Tensor) else None,
    ), None if weights is None else weights.grad  # fmt: skip


def all_ranks(whole: Problem, mesh: DeviceMesh, backend: str) -> tuple[Result, Tensor | None]:
    """Loss and gradients of the sharded loss, put together from all ranks."""
    loss_fn = shard(whole.loss_fn(backend=backend), mesh)
    lead, rank = whole.case.lead, dist.get_rank()
    sizes = SIZES[dist.get_world_size()] if lead[0] else [0] * dist.get_world_size()
    bounds = lead, sum(sizes[:rank]), sum(sizes[: rank + 1])
    own = {name: part(value, *bounds) for name, value in whole.given.items()}
    own = {name: leaf(v) if name in ("log_z", "sample_weight") else v for name, v in own.items()}
    hidden = leaf(part(whole.case.hidden, *bounds))
    loss = loss_fn(hidden, part(whole.case.target, *bounds), **own)
    loss.backward(None if whole.upstream is None else part(whole.upstream, *bounds))
    assert loss_fn.weight.shape == (loss_fn.last - loss_fn.first, whole.case.dim)
    sparse = whole.options.get("sparse", False)
    for parameter in (loss_fn.weight, loss_fn.bias):
        if parameter is not None:
            assert parameter.grad.is_sparse == bool(sparse)
            assert parameter.grad.shape == parameter.shape
            assert sparse is not True or parameter.grad.is_coalesced()
    log_z = own.get("log_z", loss_fn.log_z)
    weights = own.get("sample_weight")
    *parts, of_weights = together(
        [
            loss.detach(), hidden.grad, dense(loss_fn.weight.grad),
            None if loss_fn.bias is None else dense(loss_fn.bias.grad),
            log_z.grad if isinstance(log_z, Tensor) else None, None if weights is None else weights.grad,
        ]
    )  # fmt: skip
    return Result(*parts), of_weights


def assert_same(got: Tensor | None, expected: Tensor | None, what: str) -> None:
    """To 1e-12 of the largest number."""
    assert (got is None) == (expected is None), what
    if got is None or expected is None:
        return
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, f"{what}: {got.shape}, {expected.shape}"
    if got.numel():
        error = (got - expected).abs().max()
        assert error <= 1e-12 * expected.abs().max(), f"{what}: {error} of {expected.abs().max()}"


def compare(name: str, variant: str, mesh: DeviceMesh, backend: str) -> None:
    """In float64, with the unsharded loss."""
    whole = problem(name, variant, torch.float64)
    (got, of_weights), (expected, of_expected_weights) = all_ranks(whole, mesh, backend), one_process(whole)
    for field in Result.__dataclass_fields__:
        assert_same(getattr(got, field), getattr(expected, field), field)
    assert_same(of_weights, of_expected_weights, "sample_weight")


def compare_with_the_formula(name: str, variant: str, mesh: DeviceMesh, backend: str) -> None:
    """In the case's own dtype, with the oracle."""
    whole = problem(name, variant)
    got, _ = all_ranks(whole, mesh, backend)
    if dist.get_rank() == 0:
        shared = any(whole.options.get(option) for option in ("shared", "unique"))
        assert_result(whole.case, got, whole.truth(), apart=shared or "negatives" in whole.given)
        assert as_float64(got.loss).shape == (whole.case.lead if whole.upstream is not None else ())


if __name__ == "__main__":
    backend, check, every = sys.argv[1:]
    of_all_ranks, run = start(), {"one process": compare, "formula": compare_with_the_formula}[check]
    chosen = CASES[:: int(every)]
    run_all({f"{name}/{variant}": partial(run, name, variant, of_all_ranks, backend) for name, variant in chosen})
