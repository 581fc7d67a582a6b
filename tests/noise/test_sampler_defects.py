"""Errors of published samplers: each check here rejects the defect and accepts the distributions of this library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from allocations import Allocations

from nce_ext import noise as noises
from nce_ext import reference

SEED = torch.tensor([31415926535, 27182818284])
DRAWS = 1_000_000


def z_scores(ids: np.ndarray, q: np.ndarray, classes: list[int]) -> np.ndarray:
    """Of the binomial counts of these classes among the ids."""
    counts = np.array([(ids == y).sum() for y in classes])
    return (counts - len(ids) * q[classes]) / np.sqrt(len(ids) * q[classes] * (1 - q[classes]))


def test_the_first_classes_are_drawn_as_often_as_claimed():
    """Rounding exp(u log N) to the nearest integer draws class 0 at 0.585 and class 1 at 1.26 of the claimed law."""
    n = 10_000
    noise = noises.LogUniform(n)
    q = noise.log_prob(torch.arange(n), dtype=torch.float64).exp().numpy()
    ids = noise.sample((DRAWS // 100, 100), seed=SEED).numpy().ravel()
    assert np.abs(z_scores(ids, q, [0, 1, 2, 3, 10])).max() < 4

    rounded = np.rint(np.exp(np.random.default_rng(1).random(DRAWS) * math.log(n))).astype(np.int64) - 1
    ratio = [(rounded == y).mean() / q[y] for y in (0, 1)]
    np.testing.assert_allclose(ratio, [0.585, 1.26], atol=0.01)
    assert np.abs(z_scores(rounded, q, [0, 1])).min() > 50


def test_every_class_of_five_million_has_its_probability():
    """In float32, log((y + 2) / (y + 1)) errs by 20 percent there, and a difference of two logs is 0 for half of it."""
    n = 5_000_000
    ids = torch.arange(n)
    exact = np.log1p(1 / (np.arange(n) + 1.0)) / math.log1p(n)
    q = noises.LogUniform(n).log_prob(ids).double().exp().numpy()
    assert np.abs(q / exact - 1).max() < 1.5e-6  # a float32 log q of -18
    assert abs(q.sum() - 1) < 1e-6

    y = ids.float()
    ratio = (torch.log((y + 2) / (y + 1)) / math.log1p(n)).double().numpy()
    difference = ((torch.log(y + 2) - torch.log(y + 1)) / math.log1p(n)).double().numpy()
    assert np.abs(ratio / exact - 1).max() > 0.1
    assert (difference == 0).mean() > 0.4


def test_the_tail_serves_as_negatives():
    """unique()[:n] of twice as many draws keeps the smallest ids, so no id of the upper half is ever a negative."""
    n, k = 1_000_000, 1000
    noise = noises.LogUniform(n)
    upper = math.log((n + 1) / (n // 2 + 1)) / math.log1p(n)  # law of the upper half
    seeds = [torch.tensor([7, i]) for i in range(20)]
    batches = [noise.sample_distinct(k, seed=seed)[0] for seed in seeds]
    found = sum(int((ids >= n // 2).sum()) for ids in batches)
    assert all(len(set(ids.tolist())) == k for ids in batches)
    # At least k independent draws each, in which a class of the upper half is hardly ever repeated.
    assert found > 20 * k * upper - 4 * math.sqrt(20 * k * upper)
    truncated = [noise.sample(2 * k, seed=seed).unique()[:k] for seed in seeds]
    assert max(int(ids.max()) for ids in truncated) < n // 2


@pytest.mark.parametrize("law", [noises.Uniform, noises.LogUniform])
def test_more_classes_than_float32_counts(law):
    """Ids held in float32 are even above 2^24 and multiples of 128 near 2^31; multinomial refuses so many."""
    n = 2**31 - 1
    ids = law(n).sample((2000, 500), seed=SEED).flatten()
    large = ids[ids >= 2**30]
    assert len(large) > 30_000
    odd = (large % 2).double().mean()
    assert abs(odd - 0.5) < 4 * 0.5 / math.sqrt(len(large))
    assert (torch.bincount(large % 128, minlength=128) > 0).all()
    assert (large.float().long() % 64 == 0).all()
    with pytest.raises(RuntimeError, match=r"2\^24"):
        torch.multinomial(torch.ones(1, dtype=torch.float32).expand(2**24 + 1), 1, replacement=True)


@pytest.mark.parametrize("kind", ["uniform", "log-uniform", "unigram", "mixture", "streaming"])
def test_a_draw_costs_the_same_whatever_the_vocabulary(kind):
    """Nothing of the size of the vocabulary is made or passed over; torch.multinomial reads all of it per draw."""
    n, k = 200_000, 10
    uniform = noises.Uniform(n)
    noise = {
        "uniform": lambda: uniform,
        "log-uniform": lambda: noises.LogUniform(n),
        "unigram": lambda: noises.Unigram(1 / torch.arange(1, n + 1)),
        "mixture": lambda: noises.Mixture([uniform, noises.LogUniform(n)], [1, 2]),
        "streaming": lambda: noises.Streaming(n),
    }[kind]()
    with Allocations([noise.table]) as allocations:
        ids = reference.draw(noise.kind, n, noise.table, SEED, 1, k)
        reference.log_q(noise.kind, n, noise.table, ids)
        noise.sample(k, seed=SEED)
        noise.log_inclusion(ids, k)
    assert 0 < allocations.largest <= 2 * k
    with Allocations() as allocations:
        noise.log_prob(torch.arange(n))
    assert allocations.largest >= n  # the probe does see what is as large as the vocabulary
