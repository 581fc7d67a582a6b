"""The rows of the README's table "to reproduce X, write Y" that compare two batches of vectors, against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from formulas import softmax_cross_entropy

from nce_ext import contrastive

B, D, TEMPERATURE, TAU = 7, 5, 0.4, 0.1
FLOAT_MIN = float(np.finfo(np.float32).min)


@pytest.fixture
def problem():
    """Vectors of any length, half the pairs close; how often an item is drawn; ids of which one occurs three times."""
    random = np.random.default_rng(2)
    item = random.permutation(50)[:B]
    item[[3, 5]] = item[0]
    query, key = random.normal(size=(2, B, D))
    key[: B // 2] = query[: B // 2] + 0.2 * key[: B // 2]
    return {
        "query": query,
        "key": key,
        "extra": random.normal(size=(4, D)),
        "probability": random.dirichlet(np.ones(B)),
        "extra_probability": random.uniform(0.01, 0.2, 4),
        "item": item,
        "extra_item": np.array([item[1], 60, item[0], 61]),
    }


def tensors(problem):
    return {name: torch.from_numpy(value) for name, value in problem.items()}


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def tensorflow_recommenders(problem):
    t = tensors(problem)
    loss_fn = contrastive.InfoNCELoss(TEMPERATURE, reduction="sum")
    return loss_fn(t["query"], t["key"], ids=t["item"], log_q=t["probability"].log())


def test_tensorflow_recommenders(problem):
    """tasks.Retrieval: scores / temperature - log p, accidental hits + float32.min / 100, summed cross-entropy."""
    z = problem["query"] @ problem["key"].T / TEMPERATURE - np.log(np.clip(problem["probability"], 1e-6, 1))
    duplicate = (problem["item"][:, None] == problem["item"]) - np.eye(B)
    assert duplicate.sum() == 6
    wanted = softmax_cross_entropy(z + duplicate * FLOAT_MIN / 100, np.eye(B)).sum()
    np.testing.assert_allclose(tensorflow_recommenders(problem).numpy(), wanted, rtol=1e-12)


def test_tensorflow_recommenders_with_extra_candidates(problem):
    """Candidates beyond the batch are negatives of every query, with probabilities and ids of their own."""
    t = tensors(problem)
    got = contrastive.InfoNCELoss(TEMPERATURE, reduction="sum")(
        t["query"], t["key"], negatives=t["extra"], ids=t["item"], negative_ids=t["extra_item"],
        log_q=t["probability"].log(), negative_log_q=t["extra_probability"].log(),
    )  # fmt: skip
    candidates = np.concatenate([problem["key"], problem["extra"]])
    p = np.clip(np.concatenate([problem["probability"], problem["extra_probability"]]), 1e-6, 1)
    label = np.eye(B, B + 4)
    duplicate = (problem["item"][:, None] == np.concatenate([problem["item"], problem["extra_item"]])) - label
    assert duplicate[:, B:].sum() == 4
    z = problem["query"] @ candidates.T / TEMPERATURE - np.log(p) + duplicate * FLOAT_MIN / 100
    np.testing.assert_allclose(got.numpy(), softmax_cross_entropy(z, label).sum(), rtol=1e-12)


def clip(problem):
    t = tensors(problem)
    return contrastive.InfoNCELoss(TEMPERATURE, symmetric=True, normalize=True)(t["query"], t["key"])


def test_clip(problem):
    """Half the cross-entropy of images to texts and half that of texts to images, of cosines times a scale."""
    z = unit(problem["query"]) @ unit(problem["key"]).T / TEMPERATURE
    wanted = (softmax_cross_entropy(z, np.eye(B)).mean() + softmax_cross_entropy(z.T, np.eye(B)).mean()) / 2
    np.testing.assert_allclose(clip(problem).numpy(), wanted, rtol=1e-12)


def test_clip_learns_the_logarithm_of_its_scale(problem):
    """open_clip's logit_scale: its exponential multiplies the cosines, and it starts at log(1 / 0.07)."""
    t = tensors(problem)
    loss_fn = contrastive.InfoNCELoss(learn_temperature=True, symmetric=True, normalize=True, dtype=torch.float64)
    loss = loss_fn(t["query"], t["key"])
    loss.backward()
    cosines = unit(problem["query"]) @ unit(problem["key"]).T

    def wanted(logit_scale):
        z = np.exp(logit_scale) * cosines
        return (softmax_cross_entropy(z, np.eye(B)).mean() + softmax_cross_entropy(z.T, np.eye(B)).mean()) / 2

    start = np.log(1 / 0.07)
    np.testing.assert_allclose(loss.detach().numpy(), wanted(start), rtol=1e-12)
    slope = (wanted(start + 1e-5) - wanted(start - 1e-5)) / 2e-5
    np.testing.assert_allclose(loss_fn.state_dict()["logit_scale"].numpy(), start, rtol=1e-12)
    np.testing.assert_allclose(loss_fn.logit_scale.grad.numpy(), slope, rtol=1e-8)


def siglip(problem):
    t = tensors(problem)
    return contrastive.SigmoidContrastiveLoss(normalize=True, dtype=torch.float64)(t["query"], t["key"])


def test_siglip(problem):
    """-sum_ij log sigmoid(y_ij (t x_i . y_j + b)) / B, y_ij = 1 on the diagonal and -1 elsewhere; t = 10, b = -10."""
    y = 2 * np.eye(B) - 1
    z = 10 * unit(problem["query"]) @ unit(problem["key"]).T - 10
    wanted = -np.log(1 / (1 + np.exp(-y * z))).sum() / B
    np.testing.assert_allclose(siglip(problem).detach().numpy(), wanted, rtol=1e-12)


def two_views(problem):
    t = tensors(problem)
    return torch.cat([t["query"], t["key"]]), torch.cat([t["key"], t["query"]]), torch.arange(B).repeat(2)


def nt_xent(problem):
    a, b, ids = two_views(problem)
    return contrastive.InfoNCELoss(TEMPERATURE, normalize=True)(a, b, ids=ids)


def test_nt_xent(problem):
    """SimCLR's: each of 2 B views against the other view of its example and the 2 B - 2 views of others."""
    views = unit(np.concatenate([problem["query"], problem["key"]]))
    z = views @ views.T / TEMPERATURE
    np.fill_diagonal(z, -np.inf)
    label = np.roll(np.eye(2 * B), B, 1)
    np.testing.assert_allclose(nt_xent(problem).numpy(), softmax_cross_entropy(z, label).mean(), rtol=1e-12)


def debiased(problem, tau=TAU):
    a, b, ids = two_views(problem)
    return contrastive.InfoNCELoss(TEMPERATURE, normalize=True, debias=tau)(a, b, ids=ids)


@pytest.mark.parametrize(("tau", "on_the_floor"), [(0.0, 0), (TAU, 0), (0.5, 11)])
def test_debiased_contrastive(problem, tau, on_the_floor):
    """DCL of two views: Ng = max((sum of e^negative - N tau e^positive) / (1 - tau), N e^(-1 / T)), N = 2 B - 2."""
    a, b = unit(problem["query"]), unit(problem["key"])
    views = np.concatenate([a, b])
    other = np.tile(np.arange(B), 2)[:, None] != np.tile(np.arange(B), 2)
    negative = np.exp(views @ views.T / TEMPERATURE)[other].reshape(2 * B, 2 * B - 2)
    positive = np.tile(np.exp((a * b).sum(1) / TEMPERATURE), 2)
    n = 2 * B - 2
    mass, floor = (negative.sum(1) - n * tau * positive) / (1 - tau), n * np.exp(-1 / TEMPERATURE)
    assert (mass < floor).sum() == on_the_floor
    wanted = -np.log(positive / (positive + np.maximum(mass, floor))).mean()
    np.testing.assert_allclose(debiased(problem, tau).numpy(), wanted, rtol=1e-12)


ROWS = {
    "TensorFlow Recommenders": lambda problem: tensorflow_recommenders(problem) / B,
    "CLIP": clip,
    "SigLIP": siglip,
    "NT-Xent": nt_xent,
    "debiased contrastive": debiased,
}


def test_formulas_differ(problem):
    """So that no two rows of the table could pass each other's test."""
    losses = {name: float(row(problem)) for name, row in ROWS.items()}
    for first, second in itertools.combinations(losses, 2):
        assert abs(losses[first] - losses[second]) > 1e-2, f"{first} and {second}"
