"""A training step of sampled softmax with negatives of each example's own, against plain PyTorch and against NCE."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nce_ext
from bench.cases import STEPS, Case, Problem, describe

STEP = "sampled softmax, forward and backward (B, D, k, V)"


def eager_loss(problem: Problem, log_q: Tensor, seed: Tensor | None = None) -> Tensor:
    negatives = problem.noise.sample((problem.case.batch, problem.case.negatives), seed=seed)
    ids = torch.cat([problem.target[:, None], negatives], 1)
    rows = F.embedding(ids, problem.weight, sparse=True)
    scores = torch.bmm(problem.hidden[:, None], rows.mT)[:, 0] - log_q[ids]
    hits = F.pad(negatives == problem.target[:, None], (1, 0))
    return F.cross_entropy(scores.masked_fill(hits, -math.inf), torch.zeros_like(problem.target))


@pytest.mark.parametrize("case", STEPS, ids=describe)
def test_softmax_step(case: Case, quick: bool, stopwatch, rows) -> None:
    problem = Problem.make(case.smaller() if quick else case, "uniform")
    log_q = problem.noise.log_prob(torch.arange(problem.case.classes))

    def loss(seed: Tensor | None = None) -> Tensor:
        return nce_ext.functional.sampled_softmax_loss(
            problem.hidden,
            problem.weight,
            problem.target,
            problem.noise,
            problem.case.negatives,
            sparse=True,
            seed=seed,
        )

    def step(program) -> None:
        program().backward()
        problem.drop_gradients()

    seed = torch.tensor([3, 14])
    torch.testing.assert_close(loss(seed), eager_loss(problem, log_q, seed), rtol=1e-5, atol=0)
    times = stopwatch.compare(
        lambda: step(loss), {"eager": lambda: step(lambda: eager_loss(problem, log_q)), "nce": problem.step}
    )
    params, work = problem.params(), describe(problem.case)
    rows.append(times.row(STEP, params, "eager", work=work, label="eager, sparse"))
    rows.append(times.row(STEP, params, "nce", work=work, label="our NCE"))
