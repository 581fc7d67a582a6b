"""Each row of the README's table "to reproduce X, write Y", against numpy written from X's own formula."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from formulas import softmax_cross_entropy

import nce_ext
from nce_ext import functional

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


def without_hits(problem, z):
    """z with -infinity for the negatives that are the example's target, and which those are."""
    hit = problem["negatives"] == problem["target"][:, None]
    return np.concatenate([z[:, :1], np.where(hit, -np.inf, z[:, 1:])], 1), hit


def test_tensorflow_sampled_softmax(problem):
    """Scores less log of the expected count, here k q of draws with replacement, hits removed, cross-entropy."""
    ids, s = scores(problem)
    z, hit = without_hits(problem, s - np.log(K * law(problem["counts"])[ids]))
    assert hit.any()
    np.testing.assert_allclose(layer(problem, nce_ext.SampledSoftmaxLoss), softmax_cross_entropy(z), rtol=2e-6)


def test_tensorflow_sampled_softmax_of_distinct_ids(problem):
    """One set of different ids for the batch, two true classes, and expected counts that the caller gives."""
    random = np.random.default_rng(1)
    sampled = random.permutation(CLASSES)[:K]
    target = np.stack([random.permutation(CLASSES)[:2] for _ in range(BATCH)])
    target[0, 1], target[0, 0] = sampled[2], (sampled[2] + 1) % CLASSES
    true_count, sampled_count = random.uniform(0.1, 1, (BATCH, 2)), random.uniform(0.1, 1, K)
    ids = np.concatenate([target, np.broadcast_to(sampled, (BATCH, K))], 1)
    count = np.concatenate([true_count, np.broadcast_to(sampled_count, (BATCH, K))], 1)
    z = np.einsum("bd,bcd->bc", problem["x"], problem["w"][ids]) + problem["b"][ids] - np.log(count)
    hit = (target[:, :, None] == sampled).any(1)
    assert hit.any()
    assert not hit.all()
    z[:, 2:] = np.where(hit, -np.inf, z[:, 2:])
    wanted = softmax_cross_entropy(z, np.concatenate([np.full((BATCH, 2), 0.5), np.zeros((BATCH, K))], 1))
    x, w, b = (torch.from_numpy(problem[name]) for name in "xwb")
    got = functional.sampled_softmax_loss(
        x, w, torch.from_numpy(target), nce_ext.noise.LogUniform(CLASSES), K, bias=b,
        negatives=torch.from_numpy(sampled),
        log_q=(torch.from_numpy(true_count).log(), torch.from_numpy(sampled_count).log()),
        positive_label="uniform", reduction="none",
    )  # fmt: skip
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tensorflow_sampled_softmax_that_draws_itself(problem, seed):
    """log_uniform_candidate_sampler(unique=True): the first k different ids of the draws, as many as that took.

    A class is expected k q times if it took k draws, else 1 - (1 - q)^draws.
    """
    noise = nce_ext.noise.LogUniform(CLASSES)
    q = np.log((np.arange(CLASSES) + 2) / (np.arange(CLASSES) + 1)) / np.log(CLASSES + 1)
    seed = torch.tensor([seed, 0])
    sampled, tries = [], 0
    for tries, drawn in enumerate(noise.sample(10_000, seed=seed).tolist(), 1):  # noqa: B007
        if drawn not in sampled:
            sampled.append(drawn)
        if len(sampled) == K:
            break
    count = K * q if tries == K else 1 - (1 - q) ** tries
    ids = np.concatenate([problem["target"][:, None], np.broadcast_to(sampled, (BATCH, K))], 1)
    z = np.einsum("bd,bcd->bc", problem["x"], problem["w"][ids]) + problem["b"][ids] - np.log(count[ids])
    z[:, 1:] = np.where(problem["target"][:, None] == sampled, -np.inf, z[:, 1:])
    loss_fn = nce_ext.SampledSoftmaxLoss(DIM, CLASSES, noise, K, unique="tf", reduction="none", dtype=torch.float64)
    tables = {"weight": torch.from_numpy(problem["w"]), "bias": torch.from_numpy(problem["b"])}
    loss_fn.load_state_dict(tables, strict=False)
    got = loss_fn(torch.from_numpy(problem["x"]), torch.from_numpy(problem["target"]), seed=seed)
    np.testing.assert_allclose(got.detach().numpy(), softmax_cross_entropy(z), rtol=2e-6)


def gbce(problem, t=0.75):
    return layer(
        problem, nce_ext.NegativeSamplingLoss, calibration=t, candidate_reduction="mean", power=0.0, bias=False
    )


@pytest.mark.parametrize("t", [0.0, 0.25, 0.75, 1.0])
def test_gbce(problem, t):
    """gSASRec's: log(1 / (sigmoid(s)^-beta - 1)) for the positive score, then the mean of 1 + K cross-entropies."""
    _, s = scores(problem, bias=False)
    alpha = K / (CLASSES - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    positive_probability = 1 / (1 + np.exp(-s[:, 0]))
    s[:, 0] = np.log(1 / (positive_probability**-beta - 1))
    # The transformation loses digits where the sigmoid is near 1.
    np.testing.assert_allclose(gbce(problem, t), sigmoid_cross_entropy(s).mean(1), rtol=1e-9)


ALPHA, MARGIN = 0.5, 2.0


def nssa(problem):
    options = {"adversarial_temperature": ALPHA, "margin": MARGIN, "power": 0.0, "bias": False}
    return layer(problem, nce_ext.NegativeSamplingLoss, **options)


def terms_of_nssa(problem):
    """-log sigmoid(margin + s_0) and -sum_j p_j log sigmoid(-s_j - margin), p = softmax(alpha s): RotatE, (5), (6)."""
    _, s = scores(problem, bias=False)
    p = np.exp(ALPHA * s[:, 1:])
    p /= p.sum(1, keepdims=True)
    positive = -np.log(1 / (1 + np.exp(-(MARGIN + s[:, 0]))))
    return positive, -(p * np.log(1 / (1 + np.exp(s[:, 1:] + MARGIN)))).sum(1)


def test_nssa(problem):
    """Self-adversarial negative sampling as the paper has it: the sum of the two terms, d(h, t) = -s."""
    positive, negative = terms_of_nssa(problem)
    np.testing.assert_allclose(nssa(problem), positive + negative, rtol=1e-12)


def test_nssa_of_pykeen(problem):
    """PyKEEN's, as RotatE's own program: half the sum of two means over the batch."""
    positive, negative = terms_of_nssa(problem)
    np.testing.assert_allclose(nssa(problem).mean() / 2, 0.5 * (positive.mean() + negative.mean()), rtol=1e-12)


def shifted_negatives(problem):
    """Scores of the target; of the negatives less log Q', Q' = q / (1 - q_target); the negatives that are no hits."""
    ids, s = scores(problem)
    q = law(problem["counts"])[ids]
    z, hit = without_hits(problem, np.concatenate([s[:, :1], s[:, 1:] - np.log(q[:, 1:] / (1 - q[:, :1]))], 1))
    return z[:, 0], z[:, 1:], ~hit


def test_corrected_log_q(problem):
    """arXiv:2507.09331 as a cross-entropy: the target's score as it is, those of the n negatives less log(n Q')."""
    positive, negatives, kept = shifted_negatives(problem)
    n = kept.sum(1)
    assert n.min() < n.max()
    wanted = -positive + np.log(np.exp(positive) + np.exp(negatives - np.log(n)[:, None]).sum(1))
    np.testing.assert_allclose(layer(problem, nce_ext.SampledSoftmaxLoss, correct_positive=False), wanted, rtol=2e-6)


def test_corrected_log_q_has_the_gradient_of_its_weighted_form(problem):
    """arXiv:2507.09331: -(1 - P) (s_0 - logsumexp(s_j - log Q')), in which 1 - P counts as a constant.

    P is the estimated probability of the target; the gradients are central differences in float64.
    """
    positive, negatives, kept = shifted_negatives(problem)
    factor = 1 - np.exp(positive) / (np.exp(positive) + np.exp(negatives).sum(1) / kept.sum(1))

    def weighted(problem):
        positive, negatives, _ = shifted_negatives(problem)
        return (-factor * (positive - np.log(np.exp(negatives).sum(1)))).sum()

    x, w, b = (torch.from_numpy(problem[name]).requires_grad_() for name in "xwb")
    functional.sampled_softmax_loss(
        x, w, torch.from_numpy(problem["target"]), nce_ext.noise.Unigram(problem["counts"], 1.0), K, bias=b,
        correct_positive=False, negatives=torch.from_numpy(problem["negatives"]), reduction="sum",
    ).backward()  # fmt: skip
    for name, gradient in (("x", x.grad), ("w", w.grad), ("b", b.grad)):
        differences = np.zeros_like(problem[name])
        for index in np.ndindex(differences.shape):
            for step in (1e-5, -1e-5):
                moved = problem[name].copy()
                moved[index] += step
                differences[index] += weighted({**problem, name: moved}) / (2 * step)
        # Our log q is kept in float32, which is 2^-24 of at most 6.
        np.testing.assert_allclose(gradient.numpy(), differences, rtol=0, atol=1e-6 * np.abs(differences).max())


# The rows of which the class has an output layer; the others are in test_published_contrastive_losses.py.
ROWS = {
    "NCE": layer,
    "Pytorch-NCE": lambda problem: layer(problem, log_z=math.log(CLASSES)),
    "word2vec": lambda problem: layer(problem, nce_ext.NegativeSamplingLoss, power=0.75, bias=False),
    "the formula of tutorials": lambda problem: layer(problem, correction="log_q", candidate_reduction="mean"),
    "tf.nn.sampled_softmax_loss": lambda problem: layer(problem, nce_ext.SampledSoftmaxLoss),
    "corrected log Q": lambda problem: layer(problem, nce_ext.SampledSoftmaxLoss, correct_positive=False),
    "gBCE": gbce,
    "NSSA": nssa,
    "NSSA of PyKEEN": lambda problem: nssa(problem) / 2,
}


def test_formulas_differ(problem):
    """So that no two rows of the table could pass each other's test."""
    losses = {name: row(problem) for name, row in ROWS.items()}
    for first, second in itertools.combinations(losses, 2):
        assert np.abs(losses[first] - losses[second]).max() > 1e-2, f"{first} and {second}"
