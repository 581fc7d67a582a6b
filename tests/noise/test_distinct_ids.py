"""Sampling without replacement: exact inclusion probabilities, and TensorFlow's expected counts beside them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nce_ext import noise as noises
from nce_ext import reference
from nce_ext.noise import laws

SEED = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])
DATA = np.load(Path(__file__).parents[1] / "data" / "tf_candidate_sampling.npz")
UNIQUE = sorted({key.split("/")[0] for key in DATA if "_unique_" in key})
REPLACED = sorted({key.split("/")[0] for key in DATA if "_replace_" in key})


def zipf(n: int) -> torch.Tensor:
    return 1 / torch.arange(1, n + 1, dtype=torch.float64)


def seeds(n: int, generator: int = 1):
    words = np.random.default_rng(generator).integers(-(2**63), 2**63 - 1, (n, 2))
    return torch.from_numpy(words)


def log_uniform(n: int) -> np.ndarray:
    return np.log1p(1 / (np.arange(n) + 1.0)) / math.log1p(n)


# Inclusion probabilities
class Given(noises.Uniform):
    """Class i has the log-probability log_q[i], whatever the draws do."""

    def __init__(self, log_q: np.ndarray) -> None:
        super().__init__(len(log_q))
        self.log_q = torch.from_numpy(log_q)

    def _log_prob64(self, ids: torch.Tensor) -> torch.Tensor:
        return self.log_q[ids]


@pytest.mark.parametrize("trials", [1, 2, 10, 1000, 10**6, 2**33])
def test_log_inclusion_keeps_its_digits(trials):
    """Against 80-bit floats, q from 1e-12 to 1 - 1e-12; float32 results are right to 1e-6."""
    q = np.concatenate([np.geomspace(1e-12, 0.5, 50), 1 - np.geomspace(1e-12, 0.5, 50)]).astype(np.longdouble)
    noise, ids = Given(np.log(q).astype(np.float64)), torch.arange(len(q))
    missed = trials * np.log1p(-q)
    exact = np.where(missed > -0.69, np.log(-np.expm1(missed)), np.log1p(-np.exp(missed)))
    # Near q = 1 the float64 log q fixes 1 - q to eps / (1 - q) only, which the power multiplies by trials.
    keep = np.abs(missed) < 80
    assert keep.sum() > 15
    single, double = noise.log_inclusion(ids, trials), noise.log_inclusion(ids, trials, dtype=torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    np.testing.assert_allclose(single.numpy()[keep], exact[keep].astype(np.float64), rtol=1e-6)
    np.testing.assert_allclose(double.numpy()[keep], exact[keep].astype(np.float64), rtol=1e-11)
    assert (single.numpy()[~keep] <= 0).all()
    assert (single.numpy()[~keep] > -1e-30).all()


def test_a_naive_formula_fails_the_same_check():
    q = np.float32(1e-12)
    assert np.float32(1) - (np.float32(1) - q) ** 10 == 0
    assert noises.LogUniform(2**31 - 1).log_inclusion(torch.tensor([2**31 - 2]), 10).exp() > 2e-10


@pytest.mark.parametrize(
    "noise",
    [noises.Uniform(1000), noises.LogUniform(1000), noises.LogUniform(2**31 - 1), noises.Unigram(zipf(1000))],
    ids=repr,
)
@pytest.mark.parametrize("trials", [1, 7, 5000])
def test_log_inclusion_of_the_laws(noise, trials):
    ids = torch.cat([torch.arange(500), torch.arange(noise.n_classes - 500, noise.n_classes)]).view(10, 100)
    log_q = noise.log_prob(ids, dtype=torch.float64).numpy()
    exact = np.log(-np.expm1(trials * np.log1p(-np.exp(log_q))))
    single = noise.log_inclusion(ids, trials).numpy()
    # A table's log q is rounded to float32, and moves the result by as much at most.
    rounding = 2.0**-24 * np.abs(log_q) if noise.kind == reference.ALIAS else 0
    assert (np.abs(single - exact) <= rounding * 1.01 + 2.0**-24 * np.abs(exact) * 1.01 + 1e-15).all()
    double = noise.log_inclusion(ids, trials, dtype=torch.float64).numpy()
    np.testing.assert_allclose(double, exact, rtol=1e-12, atol=1e-14)
    assert torch.equal(noise.log_inclusion(ids.int(), torch.tensor(trials)), torch.from_numpy(single))
    assert torch.equal(noise.log_inclusion(ids, torch.tensor(trials, dtype=torch.int32)), torch.from_numpy(single))


def test_log_inclusion_at_the_ends():
    certain = noises.Unigram([0, 5])
    ids = torch.tensor([0, 1])
    for trials in (1, 3, torch.tensor(10**9)):
        assert certain.log_inclusion(ids, trials).tolist() == [-math.inf, 0]
        assert certain.log_inclusion(ids, trials, dtype=torch.float64).tolist() == [-math.inf, 0]
    assert certain.log_inclusion(ids, 0).tolist() == [-math.inf, -math.inf]
    assert noises.Uniform(1).log_inclusion(torch.tensor([0]), torch.tensor(0)).item() == -math.inf
    assert noises.Uniform(5).log_inclusion(torch.empty((0, 2), dtype=torch.int64), 4).shape == (0, 2)


@pytest.mark.parametrize(("n", "trials"), [(50, 10), (50, 100), (2000, 64)])
@pytest.mark.parametrize("law", [noises.LogUniform, lambda n: noises.Unigram(zipf(n))], ids=["log-uniform", "unigram"])
def test_the_mean_of_sampled_over_inclusion_is_one(law, n, trials):
    """1[y among the draws] / inclusion(y) has mean 1 and variance (1 - inclusion) / inclusion, at head and tail."""
    noise, batches = law(n), 40_000
    draws = noise.sample((batches, trials), seed=SEED)
    head_and_tail = torch.tensor([0, 1, 2, n // 2, n - 3, n - 2, n - 1])
    inclusion = noise.log_inclusion(head_and_tail, trials, dtype=torch.float64).exp().numpy()
    sampled = np.array([(draws == y).any(1).double().mean() for y in head_and_tail])
    z = (sampled / inclusion - 1) / np.sqrt((1 - inclusion) / inclusion / batches)
    assert np.abs(z).max() < 4, z
    expected_count = trials * noise.log_prob(head_and_tail, dtype=torch.float64).exp().numpy()
    assert np.abs(sampled[0] / expected_count[0] - 1) > 0.2  # the count of draws is no inclusion probability


# k distinct ids
def distinct_by_loop(noise: noises.Noise, k: int, seed: torch.Tensor, draws: int) -> tuple[list[int], int]:
    found: dict[int, None] = {}
    trials = 0
    for y in noise.sample(draws, seed=seed).tolist():
        if len(found) == k:
            break
        trials += 1
        found[y] = None
    assert len(found) == k
    return list(found), trials


LAWS = {
    "uniform": noises.Uniform(60),
    "log-uniform": noises.LogUniform(60),
    "unigram": noises.Unigram(zipf(60)),
    "holes": noises.Unigram([0, 1] * 60),
    "large": noises.LogUniform(2**31 - 1),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("k", [0, 1, 2, 17, 60])
def test_distinct_ids_in_order_of_first_appearance(name, k):
    noise = LAWS[name]
    for seed in seeds(20):
        ids, trials = noise.sample_distinct(k, seed=seed)
        assert (ids.dtype, trials.dtype, ids.shape, trials.shape) == (torch.int64, torch.int64, (k,), ())
        assert (ids.tolist(), int(trials)) == distinct_by_loop(noise, k, seed, 20_000)
        for block in (1, 3, 16, 1000):
            others, count = noise._distinct(k, seed, block)
            assert torch.equal(others, ids)
            assert torch.equal(count, trials)


def test_distinct_ids_of_both_backends(native, monkeypatch):
    fused = {name: noise.sample_distinct(17, seed=SEED) for name, noise in LAWS.items()}
    monkeypatch.setattr(laws, "sample", lambda seed, table, kind, n, *size: reference.draw(kind, n, table, seed, *size))
    for name, (ids, trials) in fused.items():
        again, count = LAWS[name].sample_distinct(17, seed=SEED)
        assert torch.equal(again, ids)
        assert torch.equal(count, trials)


def test_distinct_ids_follow_the_generator():
    noise = noises.LogUniform(1000)
    first, _ = noise.sample_distinct(20, generator=torch.Generator().manual_seed(3))
    again, _ = noise.sample_distinct(20, generator=torch.Generator().manual_seed(3))
    other, _ = noise.sample_distinct(20, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# TensorFlow
@pytest.mark.parametrize("case", UNIQUE)
def test_expected_counts_of_tensorflow(case):
    """The number of draws was not recorded, but exactly one number reproduces all the counts of a batch."""
    sampled, labels = (torch.from_numpy(DATA[f"{case}/{name}"]) for name in ("sampled", "labels"))
    noise, k = noises.LogUniform(len(DATA["weight"])), len(sampled)
    assert len(set(sampled.tolist())) == k

    def error(trials: int) -> float:
        counts = noise.log_expected_count_tf(sampled, k, torch.tensor(trials)).exp().numpy()
        return float(np.abs(counts / DATA[f"{case}/sampled_ec"] - 1).max())

    fitting = [trials for trials in range(k, 400) if error(trials) < 1e-6]
    assert len(fitting) == 1
    for trials in (fitting[0], torch.tensor(fitting[0])):
        counts = noise.log_expected_count_tf(labels, k, trials).exp().numpy()
        np.testing.assert_allclose(counts, DATA[f"{case}/true_ec"], rtol=1e-6)


@pytest.mark.parametrize("case", REPLACED)
def test_expected_counts_of_tensorflow_with_replacement(case):
    noise = noises.LogUniform(len(DATA["weight"]))
    for ids, counts in (("labels", "true_ec"), ("sampled", "sampled_ec")):
        ids = torch.from_numpy(DATA[f"{case}/{ids}"])
        k = len(DATA[f"{case}/sampled"])
        for trials in (k, torch.tensor(k)):
            got = noise.log_expected_count_tf(ids, k, trials).exp().numpy()
            np.testing.assert_allclose(got, DATA[f"{case}/{counts}"], rtol=1e-6)


def inclusion_of_the_first_k_distinct(q: np.ndarray, k: int, y: int) -> float:
    """Exact: give class i an exponential clock of rate q_i; the first k distinct ids are the k earliest clocks.

    P(y is among them) = integral of q_y e^(-q_y t) P(fewer than k of the others have rung by t) dt, in
    u = 1 - e^(-q_y t), by Gauss-Legendre.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    u = (nodes + 1) / 2
    t = -np.log1p(-u) / q[y]
    rung = np.zeros((k, len(t)))  # rung[j]: probability that exactly j of the others have rung
    rung[0] = 1
    for rate in np.delete(q, y):
        p = -np.expm1(-rate * t)
        rung[1:] = rung[1:] * (1 - p) + rung[:-1] * p
        rung[0] *= 1 - p
    return float(weights / 2 @ rung.sum(0))


def test_the_bias_of_tensorflow_at_the_head_and_its_absence_here():
    """V = 50, k = 10, log-uniform: class 0 is among the ids in 0.906 of the batches; its mean count is 0.99."""
    n, k, batches = 50, 10, 6000
    q, noise = log_uniform(n), noises.LogUniform(n)
    ids, trials = zip(*(noise.sample_distinct(k, seed=seed) for seed in seeds(batches)), strict=True)
    ids, trials = torch.stack(ids), torch.stack(trials)
    probed = torch.tensor([0, 1, 49])
    exact = np.array([inclusion_of_the_first_k_distinct(q, k, int(y)) for y in probed])
    np.testing.assert_allclose(exact, [0.9065, 0.7608, 0.0663], atol=1e-4)
    sampled = np.array([(ids == y).any(1).double().mean() for y in probed])
    assert (np.abs(sampled - exact) < 4 * np.sqrt(exact * (1 - exact) / batches)).all()

    counts = torch.stack([noise.log_expected_count_tf(probed, k, n_draws).exp() for n_draws in trials]).double().numpy()
    spread = counts.std(0) / math.sqrt(batches)
    bias = counts.mean(0) - exact
    assert (bias[:2] > 10 * spread[:2]).all()
    assert bias[0] > 0.07
    assert abs(bias[2]) < 0.001  # the tail is served well

    # Above 1 where 10 draws were 10 different ids: the elementary symmetric polynomial of q, times 10!.
    polynomial = np.zeros(k + 1)
    polynomial[0] = 1
    for probability in q:
        polynomial[1:] += polynomial[:-1] * probability
    unbroken = polynomial[k] * math.factorial(k)
    assert 0.08 < unbroken < 0.085
    assert abs((counts[:, 0] > 1).mean() - unbroken) < 4 * math.sqrt(unbroken / batches)
    assert ((counts[:, 0] > 1) == (trials == k).numpy()).all()

    fixed = noise.sample((batches, k), seed=SEED)
    inclusion = noise.log_inclusion(probed, k).exp().double().numpy()
    sampled = np.array([(fixed == y).any(1).double().mean() for y in probed])
    assert (np.abs(sampled - inclusion) < 4 * np.sqrt(inclusion * (1 - inclusion) / batches)).all()


def test_corrections_compile_as_one_graph():
    noise = noises.Unigram(zipf(50))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def corrections(ids, trials):
        return (
            noise.log_inclusion(ids, 10),
            noise.log_inclusion(ids, trials),
            noise.log_expected_count_tf(ids, 5, trials),
        )

    ids = torch.arange(50)
    for trials in (5, 9):
        expected = (
            noise.log_inclusion(ids, 10), noise.log_inclusion(ids, trials), noise.log_expected_count_tf(ids, 5, trials)
        )  # fmt: skip
        for got, want in zip(corrections(ids, torch.tensor(trials)), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_corrections_on_cuda_wait_for_nothing(cuda):
    noise = noises.Unigram(zipf(50), device=cuda)
    ids, here = torch.arange(50, device=cuda), noises.Unigram(zipf(50))
    found, trials = noise.sample_distinct(20, seed=SEED.to(cuda))
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = noise.log_inclusion(ids, trials), noise.log_expected_count_tf(ids, 20, trials)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    expected, count = here.sample_distinct(20, seed=SEED)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(trials.cpu(), count)
    torch.testing.assert_close(got[0].cpu(), here.log_inclusion(ids.cpu(), count))
    torch.testing.assert_close(got[1].cpu(), here.log_expected_count_tf(ids.cpu(), 20, count))


# Refusals
@pytest.mark.parametrize(
    ("noise", "k", "error", "message"),
    [
        (noises.Uniform(5), 6, ValueError, r"k must be in 0 \.\. 5 = n_classes, got 6"),
        (noises.Uniform(5), -1, ValueError, r"k must be in 0 \.\. 5 = n_classes, got -1"),
        (noises.Uniform(5), 2.0, TypeError, r"k must be an int, got float 2\.0"),
        (noises.Uniform(5), True, TypeError, r"k must be an int, got"),
        (noises.Unigram([1, 0, 2, 0]), 3, ValueError, r"k must be at most 2, the classes that can be drawn, got 3"),
    ],
)
def test_bad_numbers_of_distinct_ids_are_refused(noise, k, error, message):
    with pytest.raises(error, match=message):
        noise.sample_distinct(k)
    with pytest.raises(ValueError, match=r"seed must have shape \[2\], got \[3\]"):
        noise.sample_distinct(1, seed=torch.zeros(3, dtype=torch.int64))


def test_too_improbable_classes_are_refused(monkeypatch):
    monkeypatch.setattr(laws, "_DRAWS", 1000)
    with pytest.raises(
        RuntimeError, match=r"found 2 different ids in 1000 draws, not 3: the others are too improbable"
    ):
        noises.Unigram([1, 1, 1e-12]).sample_distinct(3, seed=SEED)


@pytest.mark.parametrize(
    ("trials", "error", "message"),
    [
        (-1, ValueError, r"trials must be >= 0, got -1"),
        (torch.tensor(-3), ValueError, r"trials must be >= 0, got -3"),
        (torch.tensor([3]), ValueError, r"trials must be a scalar, got shape \[1\]"),
        (torch.tensor(3, device="meta"), ValueError, r"trials must be on cpu, got meta"),
        (torch.tensor(3.0), TypeError, r"trials must be an int or an integer scalar tensor, got a float32 tensor"),
        (2.0, TypeError, r"trials must be an int or an integer scalar tensor, got float 2\.0"),
        (True, TypeError, r"trials must be an int or an integer scalar tensor, got"),
        (None, TypeError, r"trials must be an int or an integer scalar tensor, got NoneType"),
    ],
)
def test_bad_trials_are_refused(trials, error, message):
    noise, ids = noises.Uniform(5), torch.tensor([1, 2])
    with pytest.raises(error, match=message):
        noise.log_inclusion(ids, trials)
    with pytest.raises(error, match=message):
        noise.log_expected_count_tf(ids, 2, trials)


def test_bad_arguments_of_the_corrections_are_refused():
    noise, ids = noises.Uniform(5), torch.tensor([1, 5])
    for correction in (noise.log_inclusion, lambda *a, **b: noise.log_expected_count_tf(a[0], 2, *a[1:], **b)):
        with pytest.raises(ValueError, match=r"ids must be in 0 \.\. 4, got 5"):
            correction(ids, 3)
        with pytest.raises(TypeError, match=r"ids must be an int64 or int32 tensor, got list"):
            correction([1], 3)
        with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64, got"):
            correction(ids[:1], 3, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"k must be an int, got float 2\.0"):
        noise.log_expected_count_tf(ids[:1], 2.0, 3)
    with pytest.raises(ValueError, match=r"k must be >= 0, got -2"):
        noise.log_expected_count_tf(ids[:1], -2, 3)
    assert noise.log_expected_count_tf(ids[:1], 0, 0).item() == -math.inf
