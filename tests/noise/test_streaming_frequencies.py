"""Frequencies estimated on the fly: exact against a plain loop, unbiased, tracking, and never silently another law."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from allocations import Allocations
from scipy import stats

from nce_ext import noise as noises

SEED = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])
ESTIMATORS = ("counts", "interval")


def estimate(noise: noises.Streaming, ids=None) -> np.ndarray:
    ids = torch.arange(noise.n_classes) if ids is None else ids
    return noise.log_frequency(ids, dtype=torch.float64).exp().numpy()


def random_batches(n_classes: int, steps: int) -> list[torch.Tensor]:
    """Batches of several shapes and types, empty ones and padding among them, and many repetitions."""
    shapes = [(7,), (2, 3), (0,), (1, 4, 2), ()]
    batches = [torch.randint(n_classes, shapes[i % len(shapes)]) for i in range(steps)]
    batches[0][:2] = -100
    return [batch.int() if i % 2 else batch for i, batch in enumerate(batches)]


# The recursions, class by class
def test_counts_decay_as_the_formula_says():
    n_classes, half_life, prior = 9, 3.5, 0.7
    noise = noises.Streaming(n_classes, half_life=half_life, prior=prior)
    counts, total = np.zeros(n_classes), 0.0
    for batch in random_batches(n_classes, 60):
        noise.update(batch)
        counts *= 2 ** (-1 / half_life)
        total *= 2 ** (-1 / half_life)
        for y in batch.flatten().tolist():
            if y != -100:
                counts[y] += 1
                total += 1
        expected = (counts + prior / n_classes) / (total + prior)
        np.testing.assert_allclose(estimate(noise), expected, rtol=1e-13)
        assert abs(estimate(noise).sum() - 1) < 1e-13


def test_plain_counting_is_exact():
    noise = noises.Streaming(5, half_life=math.inf, prior=1e-9)
    ids = torch.randint(5, (40, 25))
    for batch in ids:
        noise.update(batch)
    expected = (np.bincount(ids.flatten().numpy(), minlength=5) + 2e-10) / (1000 + 1e-9)
    np.testing.assert_allclose(estimate(noise), expected, rtol=1e-15)


def interval_by_loop(batches: list[torch.Tensor], n_classes: int, rate: float) -> np.ndarray:
    b, a = np.zeros(n_classes), np.zeros(n_classes)
    for t, batch in enumerate(batches, 1):
        for y in set(batch.flatten().tolist()) - {-100}:
            b[y] = t if a[y] == 0 else (1 - rate) * b[y] + rate * (t - a[y])
            a[y] = t
    return 1 / np.where(a == 0, len(batches) + 1, b)


def test_intervals_average_as_the_formula_says():
    n_classes, rate = 30, 0.3
    noise = noises.Streaming(n_classes, estimator="interval", rate=rate)
    batches = random_batches(n_classes, 60)
    for t, batch in enumerate(batches, 1):
        noise.update(batch)
        np.testing.assert_allclose(estimate(noise), interval_by_loop(batches[:t], n_classes, rate), rtol=1e-13)


# Bias: replicas are blocks of classes of one noise, so that one run holds REPLICAS independent ones.
REPLICAS, CLASSES = 200, 20
ZIPF = 1 / np.arange(1, CLASSES + 1) / (1 / np.arange(1, CLASSES + 1)).sum()


def replicated(p: np.ndarray, batch: int, steps: int, seed: int) -> torch.Tensor:
    """ids [steps, REPLICAS, batch]: class y of replica r is r * CLASSES + y."""
    generator = np.random.default_rng(seed)
    ids = generator.choice(CLASSES, (steps, REPLICAS, batch), p=p)
    return torch.from_numpy(ids + CLASSES * np.arange(REPLICAS)[:, None])


def z_scores(samples: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Of the mean over replicas of [REPLICAS * CLASSES] samples, for every class."""
    means = samples.reshape(REPLICAS, CLASSES).mean(0)
    return (means - mean) / np.sqrt(variance / REPLICAS)


def counts_z(noise: noises.Streaming, p: np.ndarray, batch: int, weights: np.ndarray) -> np.ndarray:
    """Counts are sums over batches of independent binomials with weights: mean p n sum(w), p (1 - p) n sum(w^2).

    The prior is REPLICAS * CLASSES classes' share of one example, known exactly.
    """
    total = batch * REPLICAS * weights.sum()
    mean = (batch * weights.sum() * p + noise.prior / noise.n_classes) / (total + noise.prior)
    variance = batch * (weights**2).sum() * p * (1 - p) / (total + noise.prior) ** 2
    return z_scores(estimate(noise), mean, variance)


def test_counts_are_unbiased_at_head_and_tail_and_follow_a_change():
    batch, half_life = 16, 10.0
    noise = noises.Streaming(REPLICAS * CLASSES, half_life=half_life)
    for ids in replicated(ZIPF, batch, 150, seed=1):
        noise.update(ids)
    weights = 2 ** (-np.arange(150) / half_life)
    assert np.abs(counts_z(noise, ZIPF, batch, weights)).max() < 4.5
    slightly_wrong = ZIPF**0.9 / (ZIPF**0.9).sum()
    assert np.abs(counts_z(noise, slightly_wrong, batch, weights)).max() > 10

    changed = ZIPF[::-1]
    for ids in replicated(changed, batch, 150, seed=2):
        noise.update(ids)
    weights = 2 ** (-np.arange(300) / half_life)  # the old law keeps 2^-15
    assert np.abs(counts_z(noise, changed, batch, weights)).max() < 4.5
    assert np.abs(counts_z(noise, ZIPF, batch, weights))[[0, -1]].min() > 100


def interval_z(p_hat: np.ndarray, p: np.ndarray, batch: int, rate: float) -> np.ndarray:
    """B is an average of geometric intervals, of mean 1 / P and variance (1 - P) / P^2, P = 1 - (1 - p)^batch.

    The weights rate (1 - rate)^j have the sum 1 and the sum of squares rate / (2 - rate).
    """
    occurs = 1 - (1 - p) ** batch
    return z_scores(1 / p_hat, 1 / occurs, rate / (2 - rate) * (1 - occurs) / occurs**2)


def interval_of(ids: torch.Tensor, rate: float, since_last: bool) -> np.ndarray:
    """1 / B by a second program. Without the time of the last occurrence it is a defect that circulates."""
    b, a = np.zeros(REPLICAS * CLASSES), np.zeros(REPLICAS * CLASSES)
    for t, batch in enumerate(ids.numpy(), 1):
        y = np.unique(batch)
        elapsed = t - a[y] if since_last else t
        b[y] = np.where(a[y] == 0, t, (1 - rate) * b[y] + rate * elapsed)
        a[y] = t
    return 1 / b


def test_intervals_are_unbiased_at_head_and_tail_and_follow_a_change():
    batch, rate, steps = 8, 0.1, 1500
    noise = noises.Streaming(REPLICAS * CLASSES, estimator="interval", rate=rate)
    first = replicated(ZIPF, batch, steps, seed=3)
    for ids in first:
        noise.update(ids)
    # The rarest class occurs in 0.1 of the batches, so that its first interval keeps 0.9^150 of the weight.
    assert np.abs(interval_z(estimate(noise), ZIPF, batch, rate)).max() < 4.5
    assert np.abs(interval_z(interval_of(first, rate, True), ZIPF, batch, rate)).max() < 4.5
    assert np.abs(interval_z(interval_of(first, rate, False), ZIPF, batch, rate)).min() > 100
    slightly_wrong = ZIPF**0.9 / (ZIPF**0.9).sum()
    assert np.abs(interval_z(estimate(noise), slightly_wrong, batch, rate)).max() > 4.5

    # 1 / B itself is above P, by the convexity of 1 / B: rate / (2 - rate) (1 - P) of it to first order.
    occurs = 1 - (1 - ZIPF) ** batch
    excess = estimate(noise).reshape(REPLICAS, CLASSES).mean(0)[-1] / occurs[-1] - 1
    assert 0.01 < excess < 0.09

    changed = ZIPF[::-1].copy()
    for ids in replicated(changed, batch, steps, seed=4):
        noise.update(ids)
    assert np.abs(interval_z(estimate(noise), changed, batch, rate)).max() < 4.5


def test_intervals_saturate_where_counts_do_not():
    interval, counts = (noises.Streaming(4, estimator=name, prior=1e-6) for name in ESTIMATORS[::-1])
    for _ in range(50):
        for noise in (interval, counts):
            noise.update(torch.tensor([0, 0, 0, 0, 0, 1, 2, 0]))
    assert estimate(interval).tolist() == [1.0, 1.0, 1.0, 1 / 51]
    np.testing.assert_allclose(estimate(counts)[:3], [6 / 8, 1 / 8, 1 / 8], rtol=1e-6)


def test_counts_forget_a_class_that_has_gone_and_intervals_do_not():
    for name in ESTIMATORS:
        noise = noises.Streaming(3, estimator=name, half_life=5, prior=1e-3)
        for step in range(200):
            noise.update(torch.tensor([0, 1] if step < 100 else [0]))
        gone = estimate(noise)[1]
        assert gone < 0.01 if name == "counts" else gone == 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_was_never_seen_has_a_finite_log_frequency(name):
    noise = noises.Streaming(1000, estimator=name)
    assert torch.isfinite(noise.log_frequency(torch.arange(1000))).all()
    expected = 1 / 1000 if name == "counts" else 1
    np.testing.assert_allclose(estimate(noise), expected, rtol=1e-14)
    for _ in range(9):
        noise.update(torch.tensor([3, 4]))
    log_p = noise.log_frequency(torch.arange(1000))
    assert log_p.dtype == torch.float32
    assert torch.isfinite(log_p).all()
    assert (log_p <= 0).all()
    unseen = 0.1 if name == "interval" else 0.001 / (2 * (2 ** (-np.arange(9) / 1000)).sum() + 1)
    np.testing.assert_allclose(estimate(noise, torch.tensor([7])), unseen, rtol=1e-12)


# The law
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_law_changes_with_rebuild_alone(name):
    noise, uniform = noises.Streaming(50, estimator=name, power=0.75), torch.full((50,), -math.log(50))
    everything = torch.arange(50)
    torch.testing.assert_close(noise.log_prob(everything), uniform)
    before = noise.sample((10, 10), seed=SEED)
    for _ in range(100):
        noise.update((50 * torch.rand(16) ** 3).long())
    assert torch.equal(noise.log_prob(everything), noises.Unigram([1] * 50).log_prob(everything))
    assert torch.equal(noise.sample((10, 10), seed=SEED), before)

    noise.rebuild()
    law = estimate(noise) ** 0.75
    rebuilt = noise.log_prob(everything, dtype=torch.float64)
    np.testing.assert_allclose(rebuilt.exp().numpy(), law / law.sum(), rtol=1e-7)
    noise.update(torch.zeros(1000, dtype=torch.int64))
    noise.log_frequency(everything)
    assert torch.equal(noise.log_prob(everything, dtype=torch.float64), rebuilt)
    observed = np.bincount(noise.sample((1000, 200), seed=SEED).numpy().ravel(), minlength=50)
    assert stats.chisquare(observed, 2e5 * rebuilt.exp().numpy()).pvalue > 1e-4


def test_rebuild_writes_the_table_in_place():
    """A captured graph or a compiled program that holds the table must see the new law."""
    noise = noises.Streaming(20)
    table = noise.table
    noise.update(torch.tensor([3] * 100))
    noise.rebuild()
    assert noise.table is table
    assert float(noise.log_prob(torch.tensor([3])).exp()) > 0.9


# Cost and state
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_update_touches_the_batch_alone(name):
    n_classes, ids = 100_000, torch.tensor([5, 99_999, 5, 7])
    noise = noises.Streaming(n_classes, estimator=name)
    noise.update(torch.arange(0, n_classes, 2))
    before = {key: value.clone() for key, value in noise.state_dict().items()}
    with Allocations(noise.buffers()) as allocations:
        noise.update(ids)
        noise.log_frequency(ids)
    assert 0 < allocations.largest <= len(ids)
    untouched = torch.ones(n_classes + 1, dtype=torch.bool)
    untouched[ids] = False
    for key in ("values", "last_step"):
        after = noise.state_dict()[key]
        assert torch.equal(after[untouched], before[key][untouched])
        assert not (after == before[key])[~untouched].any()
    with Allocations(noise.buffers()) as allocations:
        noise.rebuild()
    assert allocations.largest >= n_classes  # the probe does see what is as large as the vocabulary


@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_resumes_exactly(name):
    batches = random_batches(30, 60)
    noise = noises.Streaming(30, estimator=name, half_life=7)
    for i, batch in enumerate(batches):
        if i == 25:
            noise.rebuild()
        if i == 40:
            resumed = noises.Streaming(30, estimator=name, half_life=7)
            resumed.load_state_dict(copy.deepcopy(noise.state_dict()))
        for each in (noise,) if i < 40 else (noise, resumed):
            each.update(batch)
    everything = torch.arange(30)
    assert torch.equal(resumed.sample(100, seed=SEED), noise.sample(100, seed=SEED))
    assert torch.equal(resumed.log_frequency(everything), noise.log_frequency(everything))
    resumed.rebuild()
    noise.rebuild()
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in noise.state_dict().items())
    assert sorted(noise.state_dict()) == ["last_step", "step", "table", "total", "values"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_to_dtype_rounds_nothing(name):
    noise = noises.Streaming(30, estimator=name, half_life=7)
    for batch in random_batches(30, 20):
        noise.update(batch)
    before = estimate(noise)
    moved = torch.nn.ModuleList([copy.deepcopy(noise)]).to(torch.bfloat16)[0]
    assert (estimate(moved) == before).all()
    assert noise.to("meta").values.device.type == "meta"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_update_and_log_frequency_compile_as_one_graph(name):
    eager, compiled = (noises.Streaming(30, estimator=name, half_life=7) for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(ids):
        compiled.update(ids)
        return compiled.log_frequency(ids)

    for _ in range(3):
        ids = torch.randint(30, (12,))
        eager.update(ids)
        torch.testing.assert_close(step(ids), eager.log_frequency(ids))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_cuda_gives_the_same_and_waits_for_nothing(name, cuda):
    here, there = noises.Streaming(30, estimator=name), noises.Streaming(30, estimator=name, device=cuda)
    for batch in random_batches(30, 20):
        here.update(batch)
        batch = batch.to(cuda)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            there.update(batch)
            there.log_frequency(batch.clamp_min(0))
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    everything = torch.arange(30)
    torch.testing.assert_close(there.log_frequency(everything.to(cuda)).cpu(), here.log_frequency(everything))
    there.update(torch.tensor([3, 30, -1, 2**40], device=cuda))
    here.update(torch.tensor([3]))
    torch.testing.assert_close(there.log_frequency(everything.to(cuda)).cpu(), here.log_frequency(everything))
    assert torch.isnan(there.log_frequency(torch.tensor([30, -1], device=cuda))).all()


# Refusals
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_classes": 0}, ValueError, r"n_classes must be in 1 \.\. 2\^31 - 1, got 0"),
        ({"n_classes": 3.0}, TypeError, r"n_classes must be an int, got float 3\.0"),
        ({"estimator": "ema"}, ValueError, r"estimator must be 'counts' or 'interval', got 'ema'"),
        ({"half_life": 0}, ValueError, r"half_life must be > 0, got 0"),
        ({"half_life": math.nan}, ValueError, r"half_life must be > 0, got nan"),
        ({"half_life": "1"}, TypeError, r"half_life must be a number, got str '1'"),
        ({"rate": 0.0}, ValueError, r"rate must be in \(0, 1\], got 0\.0"),
        ({"rate": 1.5}, ValueError, r"rate must be in \(0, 1\], got 1\.5"),
        ({"prior": 0}, ValueError, r"prior must be finite and > 0, got 0"),
        ({"prior": math.inf}, ValueError, r"prior must be finite and > 0, got inf"),
        ({"prior": True}, TypeError, r"prior must be a number, got"),
        ({"power": -1}, ValueError, r"power must be a finite number >= 0, got -1"),
    ],
)
def test_bad_options_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        noises.Streaming(**{"n_classes": 5, **arguments})


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 2], TypeError, r"ids must be an int64 or int32 tensor, got list"),
        (torch.tensor([1.0]), TypeError, r"ids must be an int64 or int32 tensor, got a float32 tensor"),
        (torch.tensor([1, 5]), ValueError, r"ids must be in 0 \.\. 4( or ignore_index = -100)?, got 5"),
        (torch.tensor([-1, 2]), ValueError, r"ids must be in 0 \.\. 4( or ignore_index = -100)?, got -1"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, r"ids must be on the module's device cpu, got"),
    ],
)
def test_bad_ids_are_refused_and_change_nothing(name, ids, error, message):
    noise = noises.Streaming(5, estimator=name)
    before = {key: value.clone() for key, value in noise.state_dict().items()}
    for method in (noise.update, noise.log_frequency):
        with pytest.raises(error, match=message):
            method(ids)
    assert all(torch.equal(noise.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(ValueError, match=r"ids must be in 0 \.\. 4, got -100"):
        noise.log_frequency(torch.tensor([-100]))
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64, got"):
        noise.log_frequency(torch.tensor([0]), dtype=torch.bfloat16)
