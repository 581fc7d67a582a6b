"""What the CUDA kernels are measured against, in plain PyTorch, and the check that both sides compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nce_ext
from bench.cases import Problem
from bench.cuda.cases import SOFTMAX_CHUNK, DeviceCase
from bench.cuda.measure import Stopwatch
from bench.eager import SCORES, nce_loss

CHECKED_EXAMPLES = 64
INT32_ELEMENTS = 2**31


def why_eager_cannot(case: DeviceCase, free: int) -> str | None:
    """Rows, their product or gradient, the gradient's values sorted and summed: about five times the gathered rows."""
    elements = case.pairs * case.dim
    if elements >= INT32_ELEMENTS:
        return f"eager left out: B (k + 1) D = {elements:.3g} elements, 2^31 or more"
    needed = 5 * elements * case.dtype.itemsize
    if needed > 0.8 * free:
        return f"eager left out: needs about {needed / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free"
    return None


class Eager:
    """Training steps on a problem's tensors. What can be computed once is computed here, outside of any timing."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        case, device = problem.case, problem.hidden.device
        classes = torch.arange(case.classes, device=device)
        self.correction = problem.noise.log_prob(classes) + math.log(case.negatives)
        self.labels = torch.zeros(case.batch, 1 + case.negatives, device=device)
        self.labels[:, 0] = 1
        self.compiled = torch.compile(nce_loss, dynamic=False)
        self.score_name, self.score = next(iter(SCORES.items()))

    def prepare(self, stopwatch: Stopwatch) -> None:
        """Choose the fastest form of the dot products."""
        seconds = {}
        for name, score in SCORES.items():
            self.score = score
            self.step("sparse")
            seconds[name] = min(stopwatch.seconds(lambda: self.step("sparse")) for _ in range(3))
        self.score_name = min(seconds, key=seconds.__getitem__)
        self.score = SCORES[self.score_name]

    @property
    def note(self) -> str:
        return f"the fastest of three forms of the dot products: {self.score_name}"

    def loss(self, variant: str, seed: Tensor | None = None) -> Tensor:
        problem = self.problem
        negatives = problem.noise.sample((problem.case.batch, problem.case.negatives), seed=seed)
        ids = torch.cat([problem.target[:, None], negatives], 1)
        program = self.compiled if variant == "compiled" else nce_loss
        sparse = variant in ("coalesced", "sparse")  # inductor refuses embeddings with sparse gradients
        return program(problem.hidden, problem.weight, ids, self.correction, self.labels, self.score, sparse)

    def step(self, variant: str) -> None:
        self.loss(variant).backward()
        if variant == "coalesced":
            self.problem.weight.grad = self.problem.weight.grad.coalesce()
        self.problem.drop_gradients()

    def check(self, variant: str) -> None:
        """The same loss as nce_ext's on the whole batch. In bfloat16 eager PyTorch rounds its logits."""
        seed = torch.tensor([3, 14], device=self.problem.hidden.device)
        # With gradients, as it is going to run: without, torch.compile would compile another program.
        ours, theirs = float(self.problem.loss(seed=seed).detach()), float(self.loss(variant, seed).detach())
        assert_close(f"loss of eager, {variant}", theirs, ours, 1e-2 if low_precision(self.problem.weight) else 1e-3)


def low_precision(t: Tensor) -> bool:
    return t.dtype not in (torch.float32, torch.float64)


def assert_close(what: str, value: float, expected: float, tolerance: float) -> None:
    if not abs(value - expected) <= tolerance * abs(expected):  # a NaN is not close
        raise AssertionError(f"{what}: {value:.7g} instead of {expected:.7g}, relative tolerance {tolerance:g}")


def assert_same_values(what: str, value: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((value.double() - expected.double()).norm() / expected.double().norm())
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error:.3g}, tolerance {tolerance:g}")


def check(problem: Problem, gradients: tuple[bool | str, ...] = (True,)) -> None:
    """No timing counts unless loss and gradients of some examples are eager PyTorch's, in float32 on the same draws."""
    case, noise = problem.case, problem.noise
    n = min(CHECKED_EXAMPLES, case.batch)
    target, seed = problem.target[:n], torch.tensor([3, 14], device=problem.hidden.device)
    ids = torch.cat([target[:, None], noise.sample((n, case.negatives), seed=seed)], 1)
    hidden = problem.hidden.detach()[:n].float().requires_grad_()
    rows = problem.weight.detach()[ids].float().requires_grad_()
    logits = (rows * hidden[:, None]).sum(-1) - noise.log_prob(ids) - math.log(case.negatives)
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / n
    expected.backward()
    classes, position = ids.unique(return_inverse=True)
    summed = torch.zeros(len(classes), case.dim, device=ids.device)
    summed.index_add_(0, position.view(-1), rows.grad.view(-1, case.dim))

    tolerance = 1e-2 if low_precision(problem.weight) else 1e-3
    for sparse in gradients:
        ours = problem.hidden.detach()[:n].requires_grad_()
        loss = nce_ext.functional.nce_loss(
            ours, problem.weight, target, noise, case.negatives, sparse=sparse, seed=seed
        )
        assert_close(f"loss, sparse={sparse}", float(loss.detach()), float(expected.detach()), 1e-3)
        loss.backward()
        grad = problem.weight.grad
        problem.drop_gradients()
        values = grad.coalesce() if grad.is_sparse else grad[classes]
        if grad.is_sparse:
            values = rows_of(values, classes)
        assert_same_values(f"gradient of the rows, sparse={sparse}", values, summed, tolerance)
        assert_same_values(f"gradient of hidden, sparse={sparse}", ours.grad, hidden.grad, tolerance)


def rows_of(grad: Tensor, classes: Tensor) -> Tensor:
    """The rows of a coalesced gradient at ``classes``; all others must be zero."""
    at = torch.searchsorted(grad.indices()[0], classes)
    values = grad.values()
    others = torch.ones(len(values), dtype=torch.bool, device=values.device)
    others[at] = False
    assert bool((grad.indices()[0][at] == classes).all()), "rows are missing in the gradient"
    assert not bool(values[others].any()), "the gradient has rows of classes that are no candidates"
    return values[at]


class ChunkedSoftmax(torch.autograd.Function):
    """The mean of the exact loss, a chunk of examples at a time, its gradients computed in the forward pass.

    So a chunk's logits are computed once and never kept: three matrix products, the fewest there can be.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = hidden[start : start + chunk]
            at = target[start : start + chunk, None]
            slope = torch.softmax(part @ weight.T, 1)
            total -= slope.gather(1, at).float().log().sum()
            slope.scatter_add_(1, at, torch.full_like(at, -1, dtype=slope.dtype))
            torch.mm(slope, weight, out=grad_hidden[start : start + chunk])
            grad_weight.addmm_(slope.T, part, alpha=1 / len(hidden))
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad / len(grad_hidden)), grad_weight.mul_(grad), None, None


def softmax_losses(problem: Problem, free: int) -> dict[str, Callable[[], Tensor]]:
    """The ways to the exact loss that this torch and this memory allow."""
    hidden, weight, target = problem.hidden, problem.weight, problem.target
    losses: dict[str, Callable[[], Tensor]] = {
        "chunked, 3 GEMMs": lambda: ChunkedSoftmax.apply(hidden, weight, target, SOFTMAX_CHUNK)
    }
    if hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=SOFTMAX_CHUNK)
        losses["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, target, options=options)
    # Logits, their log-softmax and two gradients are alive at once. Of 2^31 elements a kernel may lose count.
    logits = len(hidden) * len(weight)
    if logits < INT32_ELEMENTS and 5 * logits * weight.element_size() < 0.8 * free:
        losses["F.cross_entropy"] = lambda: F.cross_entropy(F.linear(hidden, weight), target)
    return losses
