"""Each row of the README's table "to reproduce X, write Y", against numpy written from X's own formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import nce_ext

BATCH, DIM, CLASSES, K = 6, 8, 30, 7


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(BATCH, DIM)),
        "w": random.normal(size=(CLASSES, DIM)),
        "b": random.normal(size=CLASSES),
        "target": random.integers(0, CLASSES, BATCH),
        "negatives": random.integers(0, CLASSES, (BATCH, K)),
        "counts": random.integers(1, 100, CLASSES).astype(float),
    }


def layer(problem, cls=nce_ext.NCELoss, *, power=1.0, **options):
    noise = nce_ext.noise.Unigram(problem["counts"], power)
    loss_fn = cls(DIM, CLASSES, noise, K, reduction="none", dtype=torch.float64, **options)
    with torch.no_grad():
        loss_fn.weight.copy_(torch.from_numpy(problem["w"]))
        if loss_fn.bias is not None:
            loss_fn.bias.copy_(torch.from_numpy(problem["b"]))
    loss = loss_fn(
        torch.from_numpy(problem["x"]),
        torch.from_numpy(problem["target"]),
        negatives=torch.from_numpy(problem["negatives"]),
    )
    return loss.detach().numpy()


def scores(problem, bias=True):
    ids = np.concatenate([problem["target"][:, None], problem["negatives"]], 1)
    s = np.einsum("bd,bcd->bc", problem["x"], problem["w"][ids])
    return ids, s + problem["b"][ids] * bias


def sigmoid_cross_entropy(z):
    label = np.zeros_like(z)
    label[:, 0] = 1
    probability = 1 / (1 + np.exp(-z))
    return -(label * np.log(probability) + (1 - label) * np.log(1 - probability))


def law(counts, power=1.0):
    return counts**power / (counts**power).sum()


def test_textbook_nce(problem):
    """P(data | y) = e^s / (e^s + k q), summed over the target and the k noise samples (Gutmann and Hyvarinen 2010)."""
    ids, s = scores(problem)
    kq = K * law(problem["counts"])[ids]
    from_data = np.exp(s) / (np.exp(s) + kq)
    wanted = -np.log(from_data[:, 0]) - np.log(1 - from_data[:, 1:]).sum(1)
    np.testing.assert_allclose(layer(problem), wanted, rtol=2e-6)


def test_pytorch_nce(problem):
    """Scores less norm_term = ln V, less log p of the noise, less ln k."""
    ids, s = scores(problem)
    z = s - math.log(CLASSES) - np.log(law(problem["counts"])[ids]) - math.log(K)
    wanted = sigmoid_cross_entropy(z).sum(1)
    np.testing.assert_allclose(layer(problem, log_z=math.log(CLASSES)), wanted, rtol=2e-6)


def test_word2vec(problem):
    """Sigmoid of the raw scores, no bias, no log q."""
    _, s = scores(problem, bias=False)
    wanted = sigmoid_cross_entropy(s).sum(1)
    np.testing.assert_allclose(layer(problem, nce_ext.NegativeSamplingLoss, power=0.75, bias=False), wanted, rtol=1e-12)


def test_blog_formula(problem):
    """Scores less log q, averaged over the N = k + 1 candidates."""
    ids, s = scores(problem)
    z = s - np.log(law(problem["counts"])[ids])
    wanted = sigmoid_cross_entropy(z).sum(1) / (K + 1)
    np.testing.assert_allclose(layer(problem, correction="log_q", candidate_reduction="mean"), wanted, rtol=2e-6)


def test_formulas_differ(problem):
    """So that no two rows of the table could pass each other's test."""
    losses = [
        layer(problem),
        layer(problem, log_z=math.log(CLASSES)),
        layer(problem, nce_ext.NegativeSamplingLoss, power=0.75, bias=False),
        layer(problem, correction="log_q", candidate_reduction="mean"),
    ]
    for i, first in enumerate(losses):
        for second in losses[:i]:
            assert np.abs(first - second).max() > 1e-2
