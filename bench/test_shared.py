"""A training step whose negatives all examples share, against TensorFlow, eager PyTorch, and its matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nce_ext
from bench.cases import Case, Problem
from bench.tensorflow_step import REQUIREMENT, TensorFlowStep, installed

STEP = "shared negatives, forward and backward, (B, D, k, V) = (4096, 256, 1024, 200k)"
CASE = Case("shared", 4096, 256, 1024, 200_000, {"tensorflow": 2})
LAWS = ("uniform", "log-uniform")
LOSSES = {"nce": nce_ext.functional.nce_loss, "softmax": nce_ext.functional.sampled_softmax_loss}


def make_problem(case: Case, law: str) -> Problem:
    problem = Problem.make(case, "uniform")
    problem.law = law
    if law == "log-uniform":
        problem.noise = nce_ext.noise.LogUniform(case.classes)
    return problem


class Eager:
    """The same loss in plain PyTorch: one gather of the shared rows, and whole matrices of scores."""

    def __init__(self, problem: Problem, name: str, bias: nn.Parameter) -> None:
        self.problem, self.name, self.bias = problem, name, bias

    def loss(self, ids: Tensor) -> Tensor:
        problem, log_k = self.problem, math.log(self.problem.case.negatives)
        rows, of_target = (F.embedding(i, problem.weight, sparse=True) for i in (ids, problem.target))
        elements, of_bias = (torch.gather(self.bias, 0, i, sparse_grad=True) for i in (ids, problem.target))
        positive = (problem.hidden * of_target).sum(1) + of_bias - log_k - problem.noise.log_prob(problem.target)
        negative = problem.hidden @ rows.T + (elements - log_k - problem.noise.log_prob(ids))
        if self.name == "nce":
            return (F.softplus(-positive).sum() + F.softplus(negative).sum()) / problem.case.batch
        negative = negative.masked_fill(ids == problem.target[:, None], -math.inf)
        return (torch.logsumexp(torch.cat([positive[:, None], negative], 1), 1) - positive).mean()

    def step(self) -> None:
        self.loss(self.problem.noise.sample((self.problem.case.negatives,))).backward()
        self.problem.drop_gradients()
        self.bias.grad = None


def products(problem: Problem) -> Callable[[], None]:
    """The three matrix products that no implementation can do without, as PyTorch does them."""
    case = problem.case
    hidden, rows = problem.hidden.detach(), torch.randn(case.negatives, case.dim)
    scores, of_hidden = torch.empty(case.batch, case.negatives), torch.empty(case.batch, case.dim)
    of_rows = torch.empty(case.negatives, case.dim)

    def multiply() -> None:
        torch.mm(hidden, rows.T, out=scores)
        torch.mm(scores, rows, out=of_hidden)
        torch.mm(scores.T, hidden, out=of_rows)

    return multiply


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", LOSSES)
def test_shared(name: str, law: str, quick: bool, stopwatch, rows) -> None:
    problem = make_problem(CASE.smaller() if quick else CASE, law)
    case = problem.case
    bias = nn.Parameter(torch.zeros(case.classes))

    def loss(negatives: Tensor | None = None) -> Tensor:
        return LOSSES[name](
            problem.hidden, problem.weight, problem.target, problem.noise, case.negatives, bias=bias, shared=True,
            sparse=True, negatives=negatives,
        )  # fmt: skip

    def ours() -> None:
        loss().backward()
        problem.drop_gradients()
        bias.grad = None

    ids = problem.noise.sample((case.negatives,))
    eager = Eager(problem, name, bias)
    assert math.isclose(eager.loss(ids).item(), loss(ids).item(), rel_tol=1e-4), "not the same loss"
    baselines: dict[str, Callable[[], object]] = {"eager": eager.step, "products": products(problem)}
    if installed():
        tensorflow = TensorFlowStep(problem)
        log_q = (problem.noise.log_prob(problem.target), problem.noise.log_prob(ids))
        # TensorFlow masks only the last of several equal hits.
        assert math.isclose(tensorflow.loss(name, ids, log_q), loss(ids).item(), rel_tol=1e-3), "not the same loss"
        baselines["tensorflow"] = tensorflow.program(name)
    times = stopwatch.compare(ours, baselines)

    params, work = {**case.sizes(), "noise": law, "loss": name}, f"{name}, {law} noise"
    labels = {"eager": "eager, sparse", "products": "three torch.mm alone", "tensorflow": f"tf.nn.{TENSORFLOW[name]}"}
    note = "" if installed() else f"TensorFlow is not installed: pip install -r {REQUIREMENT}"
    for baseline in sorted(baselines, reverse=True):
        goal = case.at_least.get(baseline) if name == "nce" else None
        rows.append(times.row(STEP, params, baseline, work=work, label=labels[baseline], at_least=goal, note=note))


TENSORFLOW = {"nce": "nce_loss", "softmax": "sampled_softmax_loss"}
