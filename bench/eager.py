"""The same loss in plain PyTorch, as well as one can write it: what nce_ext is measured against.

Noise ids come from the same nce_ext sampler and log q from a table looked up by id, so that only the loss differs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import SOFTMAX_CHUNK, Problem

Score = Callable[[Tensor, Tensor], Tensor]

# rows [B, C, D], hidden [B, D] -> [B, C]. Which one is fastest depends on the shape, the BLAS and the processor.
SCORES: dict[str, Score] = {
    "bmm": lambda rows, hidden: torch.bmm(hidden[:, None], rows.mT)[:, 0],
    "einsum": lambda rows, hidden: torch.einsum("bcd,bd->bc", rows, hidden),
    "multiply": lambda rows, hidden: (rows * hidden[:, None]).sum(-1),
}

VARIANTS = ("coalesced", "sparse", "dense", "compiled")
LABELS = {
    "coalesced": "eager, sparse, coalesced",
    "sparse": "eager, sparse",
    "dense": "eager, dense",
    "compiled": "torch.compile, dense",
}


def nce_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    correction: Tensor,
    labels: Tensor,
    score: Score,
    sparse: bool,
) -> Tensor:
    """The mean NCE loss of candidates ``ids`` [B, 1 + k], the target in column 0."""
    rows = F.embedding(ids, weight, sparse=sparse)
    logits = score(rows, hidden) - correction[ids]
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / hidden.shape[0]


class EagerStep:
    """Training steps on a problem's tensors. What can be computed once is computed here, outside of any timing."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        case = problem.case
        self.correction = problem.noise.log_prob(torch.arange(case.classes)) + math.log(case.negatives)
        self.labels = torch.zeros(case.batch, 1 + case.negatives)
        self.labels[:, 0] = 1
        self.score_name = self._fastest_score()
        self.score = SCORES[self.score_name]
        self._compiled = torch.compile(nce_loss, dynamic=False)

    def loss(self, variant: str, *, seed: Tensor | None = None, score: Score | None = None) -> Tensor:
        problem = self.problem
        negatives = problem.noise.sample((problem.case.batch, problem.case.negatives), seed=seed)
        ids = torch.cat([problem.target[:, None], negatives], 1)
        program = self._compiled if variant == "compiled" else nce_loss
        sparse = variant in ("coalesced", "sparse")  # inductor refuses embeddings with sparse gradients
        return program(problem.hidden, problem.weight, ids, self.correction, self.labels, score or self.score, sparse)

    def backward(self, variant: str, *, seed: Tensor | None = None, score: Score | None = None) -> float:
        """Leaves gradients in the problem's tensors; returns the loss."""
        loss = self.loss(variant, seed=seed, score=score)
        loss.backward()
        weight = self.problem.weight
        if variant == "coalesced":
            weight.grad = weight.grad.coalesce()
        return float(loss.detach())

    def step(self, variant: str) -> None:
        self.backward(variant)
        self.problem.drop_gradients()

    def _fastest_score(self) -> str:
        seconds = {}
        for name, score in SCORES.items():
            runs = []
            for _ in range(2):
                start = time.perf_counter()
                self.backward("sparse", score=score)
                self.problem.drop_gradients()
                runs.append(time.perf_counter() - start)
            seconds[name] = min(runs)
        return min(seconds, key=seconds.__getitem__)


def assert_same_loss(problem: Problem, eager: EagerStep, variants: tuple[str, ...]) -> None:
    """No timing counts unless both sides compute the same loss and gradients from the same draws."""
    seed = torch.tensor([3, 14])
    loss = problem.loss(seed=seed)
    loss.backward()
    expected = float(loss.detach()), problem.hidden.grad, problem.weight.grad.coalesce()
    problem.drop_gradients()
    for variant in variants:
        value = eager.backward(variant, seed=seed)
        hidden_grad, weight_grad = problem.hidden.grad, problem.weight.grad
        problem.drop_gradients()
        options = {"rtol": 1e-3, "atol": 1e-6}
        torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(hidden_grad, expected[1], **options)
        if weight_grad.is_sparse:
            weight_grad = weight_grad.coalesce()
            torch.testing.assert_close(weight_grad.indices(), expected[2].indices())
            torch.testing.assert_close(weight_grad.values(), expected[2].values(), **options)
        else:
            rows = expected[2].indices()[0]
            torch.testing.assert_close(weight_grad[rows], expected[2].values(), **options)
            assert int(weight_grad.any(1).sum()) <= len(rows)


def full_softmax(hidden: Tensor, weight: Tensor, target: Tensor, chunked: bool) -> Tensor:
    """The exact loss over all classes; ``chunked`` never holds the [B, V] logits.

    Without options F.linear_cross_entropy is F.cross_entropy of F.linear. The chunk size is set by hand, because the
    automatic one cuts a large vocabulary's batch into single examples, which on a CPU is several times slower.
    """
    if chunked:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=SOFTMAX_CHUNK)
        return F.linear_cross_entropy(hidden, weight, target, options=options)
    return F.cross_entropy(F.linear(hidden, weight), target)
