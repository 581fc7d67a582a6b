"""What the theory promises, measured: unbiasedness, the maximum-likelihood limit, and recovery of distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises

F64 = torch.float64


@pytest.fixture
def one_thread(known_state):
    """Hundreds of tiny steps, whose threads would only wait for each other."""
    torch.set_num_threads(1)


def zipf(n: int) -> torch.Tensor:
    return 1 / torch.arange(1, n + 1, dtype=F64)


@pytest.mark.parametrize("correction", ["log_kq", "log_q", "none"])
@pytest.mark.parametrize("remove_hits", [False, True])
def test_the_gradient_estimate_is_unbiased(correction, remove_hits, backend):
    """Each example draws its own negatives, so one batch of equal examples is a sample of the gradient estimate.

    E[dloss/dx] = (sigmoid(z_y) - 1) w_y + k sum_c q_c sigmoid(z_c) w_c, without c = y where hits are removed.
    """
    n, classes, dim, k = 40_000, 20, 4, 5
    weight, bias, x, y = (
        torch.randn(classes, dim, dtype=F64),
        torch.randn(classes, dtype=F64),
        torch.randn(dim, dtype=F64),
        1,
    )
    noise = noises.Unigram(zipf(classes), power=1.0)
    hidden = x.expand(n, dim).clone().requires_grad_()
    table = weight.clone().requires_grad_()
    functional.nce_loss(
        hidden, table, torch.full((n,), y), noise, k, bias=bias, correction=correction, remove_hits=remove_hits,
        reduction="sum", backend=backend,
    ).backward()  # fmt: skip

    q = zipf(classes) / zipf(classes).sum()
    z = weight @ x + bias - {"log_kq": torch.log(k * q), "log_q": torch.log(q), "none": 0 * q}[correction]
    row = k * q * torch.sigmoid(z)
    if remove_hits:
        row[y] = 0
    row[y] += torch.sigmoid(z[y]) - 1

    samples = hidden.grad
    score = (samples.mean(0) - row @ weight) / (samples.std(0) / math.sqrt(n))
    assert score.abs().max() < 4.5, f"d loss / d hidden: z-scores {score.tolist()}"
    # The row of class c gets sigmoid(z_c) x for each of about n k q_c draws: a binomial count.
    draws = n * k * q * (1 - q)
    spread = torch.sigmoid(z) * draws.sqrt() * x.norm()
    if remove_hits:
        spread[y] = 1e-6 * n / 4.5  # nothing random is left but the rounding of log q to float32
    score = ((table.grad - n * row[:, None] * x) @ x / x.norm()) / spread
    assert score.abs().max() < 4.5, f"d loss / d weight: z-scores {score.tolist()}"


@pytest.mark.slow
def test_the_gradient_tends_to_that_of_maximum_likelihood(backend):
    """At a normalised model the NCE gradient of an example differs from (p - e_y) by O(1 / sqrt(k))."""
    classes, dim = 30, 6
    weight = 0.5 * torch.randn(classes, dim, dtype=F64)
    x = torch.randn(dim, dtype=F64)
    bias = torch.log(zipf(classes))
    bias -= torch.logsumexp(weight @ x + bias, 0)
    p = torch.exp(weight @ x + bias)
    assert abs(float(p.sum()) - 1) < 1e-12
    noise = noises.Unigram(zipf(classes), power=1.0)
    errors = {}
    for k in (1, 10, 100, 1000):
        n = max(400, 20_000 // k)
        target = torch.multinomial(p, n, replacement=True)
        hidden = x.expand(n, dim).clone().requires_grad_()
        functional.nce_loss(hidden, weight, target, noise, k, bias=bias, reduction="sum", backend=backend).backward()
        exact = p @ weight - weight[target]
        errors[k] = float((hidden.grad - exact).square().sum(1).mean().sqrt() / exact.square().sum(1).mean().sqrt())
    slope = np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]
    assert -0.65 < slope < -0.35, f"errors {errors}, slope {slope:.3f}"
    assert errors[1000] < 0.1
    assert errors[1] > 0.3


def contexts_and_law(classes: int = 50, contexts: int = 4) -> torch.Tensor:
    """p(class | context), [contexts, classes], far from the noise and from each other."""
    generator = torch.Generator().manual_seed(7)
    return torch.softmax(1.5 * torch.randn(contexts, classes, dtype=F64, generator=generator), 1)


def kl(p: torch.Tensor, log_model: torch.Tensor) -> float:
    return float((p * (p.log() - log_model)).sum(1).max())


class Population:
    """Every (context, class) pair once, weighted by its probability: the data without sampling error."""

    def __init__(self) -> None:
        self.p = contexts_and_law()
        contexts, classes = self.p.shape
        self.context = torch.arange(contexts).repeat_interleave(classes)
        self.target = torch.arange(classes).repeat(contexts)
        self.hidden = torch.nn.functional.one_hot(self.context, contexts).to(F64)
        self.sample_weight = self.p.flatten()


def train(loss_fn: nce_ext.NCELoss | nce_ext.NegativeSamplingLoss, data: Population, steps: int = 1200) -> None:
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2 + 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(data.hidden, data.target, sample_weight=data.sample_weight).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.slow
def test_training_recovers_the_distribution_and_log_z_near_zero(backend, one_thread):
    data = Population()
    contexts, classes = data.p.shape
    noise = noises.Unigram(data.p.mean(0), power=1.0)
    loss_fn = nce_ext.NCELoss(contexts, classes, noise, 50, bias=False, dtype=F64, backend=backend)
    before = kl(data.p, loss_fn.log_prob(torch.eye(contexts, dtype=F64)).detach())
    train(loss_fn, data)
    after = kl(data.p, loss_fn.log_prob(torch.eye(contexts, dtype=F64)).detach())
    log_z = torch.logsumexp(loss_fn.logits(torch.eye(contexts, dtype=F64)), 1)
    assert before > 0.5
    assert after < 0.005, f"KL {before:.3f} -> {after:.4f}"
    assert log_z.abs().max() < 0.05, f"log Z {log_z.tolist()}"


@pytest.mark.slow
def test_negative_sampling_recovers_it_only_after_correction(backend, one_thread):
    """Its optimum is log p - log(k q), which the check above tells from log p."""
    data = Population()
    contexts, classes = data.p.shape
    noise = noises.Unigram(data.p.mean(0), power=1.0)
    loss_fn = nce_ext.NegativeSamplingLoss(contexts, classes, noise, 50, bias=False, dtype=F64, backend=backend)
    train(loss_fn, data)
    scores = loss_fn.logits(torch.eye(contexts, dtype=F64)).detach()
    assert kl(data.p, torch.log_softmax(scores, 1)) > 0.1
    corrected = scores + math.log(50) + noise.log_prob(torch.arange(classes), dtype=F64)
    assert kl(data.p, torch.log_softmax(corrected, 1)) < 0.005


def test_learned_log_z_finds_the_partition_function(backend, one_thread):
    """The table is the data's law times e^3.7 and frozen: only log_z is left to make it a law."""
    data = Population()
    contexts, classes = data.p.shape
    loss_fn = nce_ext.NCELoss(
        contexts, classes, noises.Uniform(classes), 50, bias=False, log_z="learned", dtype=F64, backend=backend
    )
    with torch.no_grad():
        loss_fn.weight.copy_((data.p.log() + 3.7).t())
    loss_fn.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([loss_fn.log_z], lr=1.0)
    history = []
    for step in range(300):
        optimizer.zero_grad()
        loss_fn(data.hidden, data.target, sample_weight=data.sample_weight).backward()
        optimizer.step()
        if step >= 150:
            history.append(loss_fn.log_z.item())
    assert loss_fn.weight.grad is None
    assert abs(np.mean(history) - 3.7) < 0.02, f"log_z {np.mean(history):.4f}"


def test_log_z_per_context_finds_each_partition_function(backend, one_thread):
    """A normaliser per example that is itself a parameter, as a network of the context would give."""
    data = Population()
    contexts, classes = data.p.shape
    offsets = torch.tensor([-2.0, 0.0, 1.0, 4.0], dtype=F64)
    weight = (data.p.log() + offsets[:, None]).t().contiguous()
    log_z = torch.zeros(contexts, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([log_z], lr=0.1)
    history = []
    for step in range(300):
        optimizer.zero_grad()
        functional.nce_loss(
            data.hidden, weight, data.target, noises.Uniform(classes), 50, log_z=log_z[data.context],
            sample_weight=data.sample_weight, backend=backend,
        ).backward()  # fmt: skip
        optimizer.step()
        if step >= 150:
            history.append(log_z.detach().clone())
    assert (torch.stack(history).mean(0) - offsets).abs().max() < 0.03
