"""Chi-square tests of 10^7 draws against the law, at head and tail, and proof that they reject wrong laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from nce_ext import noise as noises

SEED = torch.tensor([31415926535, 27182818284])
DRAWS = (10_000, 1_000)  # examples, slots: 10^7 draws
ACCEPT = 1e-4


def edges(n: int) -> np.ndarray:
    """Bins: each of the first 100 ids alone, then 60 ranges of geometrically growing width up to n."""
    head = np.arange(min(n, 100) + 1)
    tail = np.unique(np.geomspace(101, n, 60).astype(np.int64)) if n > 101 else np.array([n])
    return np.unique(np.concatenate([head, tail, [n]]))


def p_values(ids: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """Chi-square p of all bins, of the head alone, and of the tail alone (each given its own total)."""
    cuts = edges(len(q))
    observed = np.histogram(ids, cuts)[0].astype(np.float64)
    cumulative = np.concatenate([[0.0], np.cumsum(q)])
    expected = np.diff(cumulative[cuts])
    bins = {"all": slice(None), "head": slice(0, 100), "tail": slice(100, None)}
    result = {}
    for name, part in bins.items():
        o, e = observed[part], expected[part]
        if len(o) > 1:
            assert o.sum() * e.min() / e.sum() > 20, "too few draws in a bin for the chi-square approximation"
            result[name] = stats.chisquare(o, o.sum() * e / e.sum()).pvalue
    return result


def unigram_counts(n: int) -> torch.Tensor:
    return 1e6 / (torch.arange(n).double() + 2.7) ** 1.05


def law_of(name: str, n: int) -> tuple[noises.Noise, np.ndarray]:
    """A noise, and its law written down again in numpy."""
    y = np.arange(n, dtype=np.float64)
    if name == "uniform":
        return noises.Uniform(n), np.full(n, 1 / n)
    if name == "log-uniform":
        return noises.LogUniform(n), np.log1p(1 / (y + 1)) / math.log1p(n)
    weights = (1e6 / (y + 2.7) ** 1.05) ** 0.75
    return noises.Unigram(unigram_counts(n), 0.75), weights / weights.sum()


@pytest.mark.slow
@pytest.mark.parametrize("n", [7, 50_000])
@pytest.mark.parametrize("name", ["uniform", "log-uniform", "unigram"])
def test_draws_follow_the_law(name, n):
    noise, q = law_of(name, n)
    ids = noise.sample(DRAWS, seed=SEED).numpy().ravel()
    for part, p in p_values(ids, q).items():
        assert p > ACCEPT, f"{name} over {n} classes: chi-square of {part} has p = {p:.2e}"


@pytest.mark.slow
def test_the_same_check_rejects_laws_that_are_slightly_wrong():
    n = 50_000
    _, unigram = law_of("unigram", n)
    ids = noises.Unigram(unigram_counts(n), power=0.74).sample(DRAWS, seed=SEED).numpy().ravel()
    wrong = p_values(ids, unigram)
    assert wrong["all"] < 1e-12
    assert wrong["tail"] < ACCEPT

    # A published sampler rounds exp(U log N) to the nearest integer where the log-uniform law takes the floor.
    _, log_uniform = law_of("log-uniform", n)
    u = np.random.default_rng(1).random(10**7)
    rounded = np.rint(np.exp(u * math.log(n))).astype(np.int64) - 1
    wrong = p_values(rounded, log_uniform)
    assert wrong["all"] < 1e-12
    assert wrong["head"] < 1e-12

    # A remainder instead of a multiplication: 2^16 values cannot fall evenly on 50000 classes.
    folded = np.random.default_rng(2).integers(0, 2**16, 10**7) % n
    assert p_values(folded, law_of("uniform", n)[1])["all"] < 1e-12


@pytest.mark.parametrize("name", ["uniform", "log-uniform", "unigram"])
def test_neighbouring_draws_are_independent(name):
    """Contingency tables of a draw with those of the next slot, in and out of one Philox call, and the next example."""
    noise, q = law_of(name, 1000)
    ids = noise.sample((4000, 500), seed=SEED).numpy()
    cuts = np.searchsorted(np.cumsum(q), np.arange(1, 10) / 10)
    cell = np.digitize(ids, cuts)
    pairs = {
        "same Philox call": (cell[:, 0::2], cell[:, 1::2]),
        "next call": (cell[:, 1:-1:2], cell[:, 2::2]),
        "next example": (cell[:-1], cell[1:]),
    }
    for which, (first, second) in pairs.items():
        table = np.histogram2d(first.ravel(), second.ravel(), bins=[len(cuts) + 1] * 2)[0]
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        p = stats.chi2_contingency(table).pvalue
        assert p > ACCEPT, f"{name}, {which}: p = {p:.2e}"


@pytest.mark.parametrize("name", ["uniform", "log-uniform", "unigram"])
def test_seeds_give_independent_draws(name):
    """One draw from each of many consecutive seeds still follows the law."""
    noise, q = law_of(name, 7)
    ids = torch.cat([noise.sample(1, seed=torch.tensor([s, 0])) for s in range(20_000)]).numpy()
    p = p_values(ids, q)["all"]
    assert p > ACCEPT
