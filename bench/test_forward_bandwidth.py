"""The share of the memory system's random-row speed that the forward pass reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nce_ext
from bench import random_rows
from bench.cases import GATHER_BATCH, GATHER_DIMS, GATHER_NEGATIVES, TABLE_FLOATS
from nce_ext._tables.pages import empty_table

GOAL = 0.85


@pytest.fixture(scope="module")
def table_memory(quick: bool) -> Tensor:
    """One block that every row length views as its table, in such pages as the modules' own."""
    return empty_table(1, TABLE_FLOATS // (8 if quick else 1), None, torch.float32)[0].uniform_(-0.1, 0.1)


@pytest.mark.skipif(random_rows.compiler() is None, reason="no C++ compiler for the plain read")
@pytest.mark.parametrize("dim", GATHER_DIMS)
def test_forward_bandwidth(dim: int, quick: bool, table_memory: Tensor, stopwatch, rows) -> None:
    classes, batch = table_memory.numel() // dim, GATHER_BATCH // (8 if quick else 1)
    weight = table_memory[: classes * dim].view(classes, dim).requires_grad_()
    hidden = torch.randn(batch, dim, requires_grad=True)
    noise = nce_ext.noise.Uniform(classes)
    target, seed = noise.sample((batch,)), torch.tensor([1, 2])
    negatives = noise.sample((batch, GATHER_NEGATIVES), seed=seed)
    ids = torch.cat([target[:, None], negatives], 1)

    def forward(**options) -> Tensor:
        return nce_ext.functional.nce_loss(
            hidden, weight, target, noise, GATHER_NEGATIVES, sparse=True, seed=seed, **options
        )

    @torch.no_grad()
    def evaluate() -> Tensor:
        return forward()

    assert torch.equal(evaluate(), forward(negatives=negatives).detach())  # so both sides read the same rows
    prefetch = random_rows.fastest(weight, ids, rounds=1 if quick else 7)
    read = random_rows.sum_rows(weight, ids, prefetch)
    assert read == pytest.approx(float(weight.detach()[ids].double().sum()), rel=1e-2, abs=10)

    programs = {"read": lambda: random_rows.sum_rows(weight, ids, prefetch), "training": forward}
    times = stopwatch.compare(evaluate, programs, least_rounds=10)
    gigabytes = ids.numel() * dim * weight.element_size() / 1e9
    name = "forward, share of the speed of a plain random-row read"
    # The goal is about reading. With gradients the pass also writes them, to memory that is new on every call.
    for ours, kind, goal in (("nce_ext", "no_grad", GOAL), ("training", "with gradients", None)):
        row = times.row(
            name,
            {"D": dim, "pass": kind, "B": batch, "k": GATHER_NEGATIVES, "V": classes},
            "read",
            work=f"D={dim}, {kind}",
            ours=ours,
            label="GB/s plain read",
            unit="GB/s",
            per_second=gigabytes,
            shown_as="limit",
            at_least=goal,
            note=f"plain read at its fastest: {prefetch}",
        )
        rows.append(row)
