"""A table in pinned host memory gives what it gives on the GPU; what needs no GPU is in test_pinned_table."""

from __future__ import annotations

import pytest
import torch
from operator_arguments import forward_arguments
from torch import Tensor, nn

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises

pytestmark = pytest.mark.usefixtures("cuda")
CPU = torch.device("cpu")


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor.clone()


@pytest.fixture
def problem(cuda) -> dict:
    counts = torch.arange(1, 301)
    return {
        "hidden": torch.randn(64, 100), "weight": torch.randn(300, 100) / 10, "target": torch.randint(300, (64,)),
        "noise": noises.Unigram(counts).to(cuda), "num_negatives": 20, "bias": torch.randn(300),
        "seed": torch.tensor([3, 4]),
    }  # fmt: skip


def both(problem: dict, device: torch.device, function=functional.nce_loss, **options) -> list[list[Tensor]]:
    """Loss and gradients, with the tables in host memory and on the device."""
    results = []
    for where in (lambda t: pin(t, device), lambda t: t.to(device, copy=True)):
        given = {**problem, **options}
        for name in ("hidden", "target", "seed", "negatives"):
            if isinstance(given.get(name), Tensor):
                given[name] = given[name].to(device, copy=True)
        for name in ("weight", "bias"):
            given[name] = where(given[name]).requires_grad_()
        given["hidden"].requires_grad_()
        losses = function(**given)
        losses.backward(torch.linspace(-1, 1, losses.numel(), device=device, dtype=losses.dtype).view_as(losses))
        gradients = [given[name].grad for name in ("weight", "bias")]
        assert [g.device for g in gradients] == [given[name].device for name in ("weight", "bias")]
        results.append([losses.detach(), given["hidden"].grad, *(g.to_dense() for g in gradients)])
    return results


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sparse", [True, "padded"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function", [functional.nce_loss, functional.sampled_softmax_loss])
def test_options(function, reduction, sparse, shared, problem, cuda):
    host, device = both(problem, cuda, function, reduction=reduction, sparse=sparse, shared=shared)
    for ours, theirs in zip(host[:2], device[:2], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(host[2:], device[2:], strict=True):  # padded ones have rows yet to be added up
        torch.testing.assert_close(ours, theirs.cpu())


@pytest.mark.parametrize("dim", [1, 5, 64, 300, 4096, 16_384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows(dtype, dim, problem, cuda):
    problem["hidden"], problem["weight"] = torch.randn(64, dim, dtype=dtype), torch.randn(300, dim, dtype=dtype)
    problem["bias"] = problem["bias"].to(dtype)
    host, device = both(problem, cuda, reduction="none", sparse=True)
    for ours, theirs in zip(host, device, strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


def test_part_of_a_pinned_table(problem, cuda):
    whole = pin(torch.randn(304, 107), cuda)
    part = whole[2:302, 3:103]
    given = {name: t.to(cuda) if isinstance(t, Tensor) else t for name, t in problem.items() if name != "bias"}
    losses = [functional.nce_loss(**{**given, "weight": weight}) for weight in (part, part.to(cuda))]
    assert torch.equal(*losses)


def test_training_moves_no_table(cuda):
    """The GPU holds the pairs, never the table; the steps are those of a table on the GPU."""
    classes, dim = 200_000, 256
    tables = torch.randn(classes, dim) / 16
    trained, peaks = [], []
    for where in (lambda t: pin(t, cuda), lambda t: t.to(cuda, copy=True)):
        torch.manual_seed(5)
        weight = nn.Parameter(where(tables))
        optimizer = nce_ext.optim.Adagrad([weight], lr=0.1)
        if cuda.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda.type == "cuda" else 0
        for step in range(5):
            hidden = torch.randn(256, dim).to(cuda).requires_grad_()
            target, seed = torch.randint(classes, (256,)).to(cuda), torch.tensor([step, 0], device=cuda)
            noise = noises.LogUniform(classes).to(cuda)
            functional.nce_loss(hidden, weight, target, noise, 20, sparse=True, seed=seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before if cuda.type == "cuda" else 0)
        trained.append(weight.detach().cpu())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(trained[0], tables)
    assert peaks[0] < tables.nbytes // 4


def test_a_module(cuda):
    loss_fn = nce_ext.NCELoss(64, 1000, noises.LogUniform(1000), 10, sparse=True, log_z="learned")
    if cuda.type == "cuda":
        loss_fn.pin_weight()
    model = nn.Sequential(nn.Linear(64, 64), loss_fn).to(cuda)
    hidden, target = torch.randn(32, 64, device=cuda), torch.randint(1000, (32,), device=cuda)
    loss_fn(model[0](hidden), target).backward()
    assert loss_fn.weight.device == loss_fn.weight.grad.device == CPU
    assert loss_fn.weight.grad.is_coalesced()
    assert loss_fn.log_z.grad.device.type == model[0].weight.grad.device.type == cuda.type
    with torch.no_grad():
        loss_fn(model[0](hidden), target)
    assert cuda.type == "cpu" or torch.cuda.current_stream().query()


def test_compiled(problem, cuda):
    torch.use_deterministic_algorithms(False)
    function = torch.compile(functional.nce_loss, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    compiled, _ = both(problem, cuda, function, sparse=True)
    eager, _ = both(problem, cuda, sparse=True)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_operator_refuses_pageable_memory(cuda):
    if cuda.type == "cpu":
        pytest.skip("all memory is the CPU's")
    tables = (1, 2)
    given = [t.to(cuda) if isinstance(t, Tensor) and i not in tables else t for i, t in enumerate(forward_arguments())]
    with pytest.raises(RuntimeError, match=r"weight must be on the same device .* or in pinned host memory"):
        torch.ops.nce_ext.sampled_loss(*given)
    given[1] = given[1].pin_memory()
    with pytest.raises(RuntimeError, match=r"bias must be on the same device .* or in pinned host memory"):
        torch.ops.nce_ext.sampled_loss(*given)
    given[2] = given[2].to(cuda)
    with pytest.raises(RuntimeError, match=r"bias must be on the same device as the other tensors"):
        torch.ops.nce_ext.sampled_loss(*given)
