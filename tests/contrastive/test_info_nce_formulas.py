"""InfoNCELoss as others write their losses: each formula is a numpy program of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nce_ext.contrastive import InfoNCELoss

B, D, K = 8, 6, 11


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each row, for labels that sum to 1."""
    largest = logits.max(1, keepdims=True)
    log_p = logits - largest - np.log(np.exp(logits - largest).sum(1, keepdims=True))
    return -(labels * log_p).sum(1)


def clip(image, text, temperature):
    """Radford et al. 2021, figure 3."""
    logits = unit(image) @ unit(text).T / temperature
    labels = np.eye(len(image))
    return (cross_entropy(logits, labels).mean() + cross_entropy(logits.T, labels).mean()) / 2


def retrieval_task(query, candidates, temperature, probability, candidate_ids):
    """TensorFlow Recommenders: candidates beyond the queries' number are extra negatives, hits get a huge negative."""
    scores = query @ candidates.T / temperature - np.log(np.clip(probability, 1e-6, 1.0))
    labels = np.eye(len(query), len(candidates))
    duplicate = (candidate_ids[: len(query), None] == candidate_ids).astype(float) - labels
    return cross_entropy(scores + duplicate * np.finfo(np.float32).min / 100, labels).sum()


def two_views(a, b, temperature, tau_plus):
    """Chuang et al. 2020, algorithm 1: 2 B anchors, the 2 B - 2 vectors of the other examples are negatives."""
    out = np.concatenate([a, b])
    batch = len(a)
    example = np.tile(np.arange(batch), 2)
    neg = np.where(example[:, None] != example, np.exp(out @ out.T / temperature), 0.0).sum(1)
    pos = np.tile(np.exp((a * b).sum(1) / temperature), 2)
    n = 2 * batch - 2
    if tau_plus is not None:
        neg = np.maximum((neg - tau_plus * n * pos) / (1 - tau_plus), n * np.exp(-1 / temperature))
    return -np.log(pos / (pos + neg)).mean()


def momentum_contrast(query, key, queue, temperature):
    """He et al. 2020, algorithm 1: the positive first, then the queue."""
    positive = (query * key).sum(1, keepdims=True)
    logits = np.concatenate([positive, query @ queue.T], 1) / temperature
    return cross_entropy(logits, np.eye(1, logits.shape[1]).repeat(len(query), 0)).mean()


def test_clip(rng):
    image, text = rng.normal(size=(2, B, D))
    loss_fn = InfoNCELoss(0.05, learn_temperature=True, symmetric=True, normalize=True, dtype=torch.float64)
    assert loss_fn(tensor(image), tensor(text)).item() == pytest.approx(clip(image, text, 0.05), rel=1e-13)


@pytest.mark.parametrize("extra", [0, K])
def test_retrieval_task_of_tensorflow_recommenders(rng, extra):
    query, candidates = rng.normal(size=(B, D)), rng.normal(size=(B + extra, D))
    ids, probability = rng.integers(9, size=B + extra), rng.uniform(0, 0.3, size=B + extra)
    probability[1] = 1e-8  # clipped
    log_q = tensor(np.log(np.clip(probability, 1e-6, 1)))
    given = {"ids": tensor(ids[:B]), "log_q": log_q[:B]}
    if extra:
        given |= {"negatives": tensor(candidates[B:]), "negative_ids": tensor(ids[B:]), "negative_log_q": log_q[B:]}
    loss = InfoNCELoss(0.3, reduction="sum")(tensor(query), tensor(candidates[:B]), **given)
    assert float(loss) == pytest.approx(retrieval_task(query, candidates, 0.3, probability, ids), rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("tau_plus", [None, 0.01, 0.1, 0.4])
def test_two_views_plain_and_debiased(rng, tau_plus, temperature):
    a, b = (unit(x) for x in rng.normal(size=(2, B, D)))
    b = unit(a + 0.3 * b)  # near, so that some rows meet the floor
    loss_fn = InfoNCELoss(temperature, debias=tau_plus or 0.0)
    both, swapped = tensor(np.concatenate([a, b])), tensor(np.concatenate([b, a]))
    loss = loss_fn(both, swapped, ids=torch.arange(B).repeat(2))
    assert float(loss) == pytest.approx(two_views(a, b, temperature, tau_plus), rel=1e-12)


def test_momentum_contrast(rng):
    query, key, queue = unit(rng.normal(size=(B, D))), unit(rng.normal(size=(B, D))), unit(rng.normal(size=(K, D)))
    loss = InfoNCELoss(0.07, in_batch=False)(tensor(query), tensor(key), negatives=tensor(queue))
    assert float(loss) == pytest.approx(momentum_contrast(query, key, queue, 0.07), rel=1e-13)


def test_a_constant_in_log_q_cancels(rng):
    query, key, log_q = tensor(rng.normal(size=(B, D))), tensor(rng.normal(size=(B, D))), tensor(rng.normal(size=B))
    loss_fn = InfoNCELoss(0.3)
    torch.testing.assert_close(loss_fn(query, key, log_q=log_q), loss_fn(query, key, log_q=log_q + 5))


def test_log_q_undoes_the_sampling(rng):
    """Keys drawn by q and corrected by log q estimate the softmax over all classes, and not without."""
    classes, draws = 40, 20000
    weight, hidden = rng.normal(size=(classes, D)), rng.normal(size=(1, D))
    q = rng.dirichlet(np.ones(classes))
    ids = rng.choice(classes, size=draws, p=q)
    target = 3
    exact = cross_entropy(hidden @ weight.T, np.eye(classes)[[target]])[0]
    given = {
        "negatives": tensor(weight[ids]),
        "ids": torch.tensor([target]),
        "negative_ids": tensor(ids),
        # Each class is expected draws * q times among the columns; the target is there once.
        "log_q": torch.tensor([np.log(1 / draws)]),
        "negative_log_q": tensor(np.log(q[ids])),
    }
    loss_fn = InfoNCELoss(1.0, in_batch=False)
    corrected = float(loss_fn(tensor(hidden), tensor(weight[[target]]), **given))
    del given["log_q"], given["negative_log_q"]
    plain = float(loss_fn(tensor(hidden), tensor(weight[[target]]), **given))
    assert corrected == pytest.approx(exact, abs=0.05)
    assert abs(plain - exact) > 1


def bound(query, key, temperature, hit=None, negatives=None):
    """van den Oord et al. 2018, section 2.3, a row at a time."""
    columns = key if negatives is None else np.concatenate([key, negatives])
    bounds = []
    for i in range(len(query)):
        logits = columns @ query[i] / temperature
        left = logits if hit is None else logits[~hit[i]]
        bounds.append(np.log(len(left)) + logits[i] - np.log(np.exp(left).sum()))
    return np.mean(bounds)


@pytest.mark.parametrize("max_logits", [1, 20, 2**22])
def test_the_bound_counts_the_candidates_that_are_left(rng, max_logits):
    query, key, negatives = rng.normal(size=(B, D)), rng.normal(size=(B, D)), rng.normal(size=(K, D))
    ids, negative_ids, mask = rng.integers(4, size=B), rng.integers(4, size=K), rng.random(K) > 0.3
    hit = ids[:, None] == np.concatenate([ids, negative_ids])
    hit[:, B:] |= ~mask
    np.fill_diagonal(hit, False)
    loss_fn = InfoNCELoss(0.4, max_logits=max_logits)
    t = [tensor(x) for x in (query, key, negatives, ids, negative_ids, mask)]
    names = ("negatives", "ids", "negative_ids", "negative_mask")
    got = loss_fn.mutual_information_bound(*t[:2], **dict(zip(names, t[2:], strict=True)))
    assert float(got) == pytest.approx(bound(query, key, 0.4, hit, negatives), rel=1e-12)
    got = loss_fn.mutual_information_bound(t[0].requires_grad_(), t[1])
    assert float(got) == pytest.approx(bound(query, key, 0.4), rel=1e-12)
    assert float(got) == pytest.approx(np.log(B) - loss_fn(*t[:2]).item(), rel=1e-12)
    assert not got.requires_grad
    both = InfoNCELoss(0.4, symmetric=True).mutual_information_bound(*t[:2])
    want = (bound(query, key, 0.4) + bound(key, query, 0.4)) / 2
    assert float(both) == pytest.approx(want, rel=1e-12)
    assert InfoNCELoss().mutual_information_bound(t[0][:0], t[1][:0]) == 0


def test_the_bound_finds_the_mutual_information_of_two_gaussians(rng):
    """The score is the log density ratio, up to what is constant in a row, so the bound is nearly tight."""
    rho, batch = 0.8, 4000
    x = rng.normal(size=batch)
    y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=batch)
    query = np.stack([rho * x / (1 - rho**2), np.ones(batch)], 1)
    key = np.stack([y, -(rho**2) * y**2 / (2 * (1 - rho**2))], 1)
    truth = -0.5 * np.log(1 - rho**2)
    got = float(InfoNCELoss(1.0).mutual_information_bound(tensor(query), tensor(key)))
    assert got == pytest.approx(truth, abs=0.03)
    shuffled = float(InfoNCELoss(1.0).mutual_information_bound(tensor(query), tensor(rng.permutation(key))))
    assert shuffled < 0.02
    few = InfoNCELoss(0.01).mutual_information_bound(tensor(query[:4]), tensor(query[:4]))
    assert float(few) <= np.log(4)
