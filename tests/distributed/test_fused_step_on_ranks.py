"""Fused steps on several ranks: all copies stay alike to the last bit, and are those of one process on all examples."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.distributed as dist
from cases import Case
from fused_cases import batches, loss_of, rows_of
from optim_cases import F64, make
from torch import nn
from torchrun import torchrun

import nce_ext

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package"),
]

# Batch sizes: a list for each pass, a number for each of two or three ranks.
EVEN = {2: [[4, 4]] * 3, 3: [[4, 4, 4]] * 3}
UNEVEN = {2: [[7, 2], [1, 5], [0, 6]], 3: [[3, 0, 5], [1, 2, 9], [0, 0, 4]]}
RUNS = {
    "even": {"optimizer": "AdamW, all", "sizes": EVEN},
    "even, float32": {"optimizer": "AdamW", "sizes": EVEN, "dtype": "float32"},
    "uneven": {"optimizer": "row-wise Adagrad, all", "sizes": UNEVEN},
    "softmax, no bias": {"optimizer": "SGD, nesterov, decay", "sizes": UNEVEN, "loss": "softmax", "with_bias": False},
    "clipped": {"optimizer": "Adam, all", "sizes": UNEVEN, "max_norm": 0.05},
    "accumulated": {"optimizer": "Adagrad, all", "sizes": UNEVEN, "accumulate": 2},
}
RANKS = (2, pytest.param(3, marks=pytest.mark.slow))


@functools.cache
def results(size: int) -> list:
    runs = {name: {**run, "sizes": run["sizes"][size]} for name, run in RUNS.items()}
    return torchrun("fused_train.py", size, json.dumps(runs))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", RANKS)
def test_all_ranks_have_the_same_weights_and_states(name, size):
    of_ranks = [result[name]["bits"] for result in results(size)]
    assert all(other == of_ranks[0] for other in of_ranks)


def alone(size: int, *, optimizer: str, sizes: dict, with_bias: bool = True, **options) -> list[torch.Tensor]:
    """One process with gradients: of the mean of the ranks' losses, as DistributedDataParallel has it."""
    torch.manual_seed(3)
    case = Case(dtype=getattr(torch, options.get("dtype", "float64")), with_bias=with_bias, classes=20)
    loss_fn = loss_of(options.get("loss", "nce"), case)
    encoder = nn.Linear(16, 16, dtype=case.dtype)
    parameters = [*loss_fn.parameters(), *encoder.parameters()]
    stepper, every = make(optimizer, parameters), options.get("accumulate", 1)
    for i, group in enumerate(sizes[size]):
        for each in batches(case, *group):
            hidden = each.pop("hidden")
            (loss_fn(hidden if every > 1 else encoder(hidden), **each) / size).backward()
        if (i + 1) % every == 0 or i + 1 == len(sizes[size]):
            if "max_norm" in options:
                nce_ext.utils.clip_grad_norm_(rows_of(loss_fn), options["max_norm"])
            stepper.step()
            stepper.zero_grad()
    return parameters


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", RANKS)
def test_the_steps_are_those_of_the_averaged_gradient(name, size):
    got = results(size)[0][name]["parameters"]
    tolerance = 2e-6 if RUNS[name].get("dtype") == "float32" else 1e-12
    for values, p in zip(got, alone(size, **RUNS[name]), strict=True):
        torch.testing.assert_close(torch.tensor(values, dtype=p.dtype), p.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", RANKS)
def test_equal_batches_are_one_large_batch(size):
    """The mean of means is the mean."""
    torch.manual_seed(3)
    case = Case(dtype=F64, classes=20)
    loss_fn, encoder = loss_of("nce", case, reduction="none"), nn.Linear(16, 16, dtype=F64)
    parameters = [*loss_fn.parameters(), *encoder.parameters()]
    stepper = make("AdamW, all", parameters)
    for group in EVEN[size]:
        made = batches(case, *group)
        torch.cat([loss_fn(encoder(each.pop("hidden")), **each) for each in made]).mean().backward()
        stepper.step()
        stepper.zero_grad()
    for values, p in zip(results(size)[0]["even"]["parameters"], parameters, strict=True):
        torch.testing.assert_close(torch.tensor(values, dtype=F64), p.detach(), rtol=1e-12, atol=1e-12)


def test_refusals_reach_every_rank():
    """Or the others would wait for ever."""
    first, second = (result["errors"] for result in results(2))
    assert [message[:13] for message in first] == ["process_group"] + ["target must h"] * 2 + ["process_group"]
    assert "process_group must be given to fuse_optimizer where 2 processes train" in first[0]
    assert "on all ranks, got T + k = (6, 7)" in first[1]
    assert "on all ranks, got T + k = (6, -1)" in first[2]
    assert "process_group must be None in fuse_optimizer with tied weights" in first[3]
    assert first == second


def test_a_rank_without_a_batch_joins_by_step():
    """And a step for which no rank has anything is none."""
    first, second = (result["absent"] for result in results(2))
    assert first["bits"] == second["bits"]
    assert first["steps"] == second["steps"] == [1, 1]
    torch.manual_seed(3)
    case = Case(hidden_dtype=torch.bfloat16, classes=20)
    loss_fn = loss_of("nce", case)
    stepper = make("AdamW, all", loss_fn.parameters())
    (loss_fn(case.hidden, case.target, seed=case.seed) / 2).backward()
    stepper.step()
    for values, p in zip(first["parameters"], rows_of(loss_fn), strict=True):
        torch.testing.assert_close(torch.tensor(values), p.detach(), rtol=1e-6, atol=1e-6)
