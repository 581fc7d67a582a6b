"""Mixtures of noise distributions: the exact law of candidates that come from several sources."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from nce_ext import functional, reference
from nce_ext import noise as noises

FULL = 2**32
SEED = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])


def zipf(n: int) -> np.ndarray:
    return 1 / np.arange(1, n + 1)


def laws(n: int) -> dict[str, tuple[noises.Noise, np.ndarray]]:
    """Distributions, and their laws written down again in numpy."""
    y = np.arange(n, dtype=np.float64)
    powered = zipf(n) ** 0.75
    holes = np.where(y % 3 == 1, 0, n - y)
    return {
        "uniform": (noises.Uniform(n), np.full(n, 1 / n)),
        "log-uniform": (noises.LogUniform(n), np.log1p(1 / (y + 1)) / math.log1p(n)),
        "unigram": (noises.Unigram(zipf(n)), powered / powered.sum()),
        "holes": (noises.Unigram(holes, power=1.0), holes / holes.sum()),
    }


MIXTURES = [
    (("unigram", "uniform"), (8192, 1024)),
    (("holes", "log-uniform"), (1, 1)),
    (("holes", "holes"), (3, 0.25)),
    (("uniform", "log-uniform", "unigram", "holes"), (5, 1e-3, 2.5, 100)),
    (("unigram",), (7,)),
]


def masses_of(noise: noises.Noise) -> np.ndarray:
    return reference.alias_masses(noise.table).numpy()


@pytest.mark.parametrize(("names", "counts"), MIXTURES)
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_the_law_is_the_weighted_sum(names, counts, n):
    parts = [laws(n)[name] for name in names]
    mixture = noises.Mixture([noise for noise, _ in parts], counts)
    exact = sum(c * q for c, (_, q) in zip(counts, parts, strict=True)) / sum(counts)
    masses = masses_of(mixture)
    assert int(masses.sum()) == n * FULL
    assert ((masses > 0) == (exact > 0)).all()
    # One unit of mass for each rounding of a table, of the mixture and under it; the heaviest takes the residue.
    slack = np.where(exact == exact.max(), 2 * n + 2, 2)
    assert (np.abs(masses - exact * n * FULL) <= np.maximum(slack, 1e-13 * masses)).all()

    ids = torch.arange(n)
    with np.errstate(divide="ignore"):
        realised = np.log(masses / (n * 2.0**32))
    np.testing.assert_allclose(mixture.log_prob(ids, dtype=torch.float64).numpy(), realised, rtol=1e-14, atol=8e-15)
    np.testing.assert_allclose(mixture.log_prob(ids).numpy(), realised, rtol=2.0**-24 * 1.01, atol=8e-15)


def test_mixed_negative_sampling():
    """Q(y) = B / (B + K) q(y) + K / (B + K) / V for a batch of B and K uniform negatives."""
    n, batch, k = 500, 96, 32
    q = zipf(n) / zipf(n).sum()
    candidates = noises.Mixture([noises.Unigram(zipf(n), power=1.0), noises.Uniform(n)], [batch, k])
    expected = np.log(batch / (batch + k) * q + k / (batch + k) / n)
    np.testing.assert_allclose(candidates.log_prob(torch.arange(n), dtype=torch.float64).numpy(), expected, rtol=2e-9)


def test_draws_follow_the_mixture():
    """A class drawn by its part alone, and one drawn by the other, in the right shares: chi-square of 10^6 draws."""
    n = 300
    left, right = np.where(np.arange(n) < 100, zipf(n), 0), np.where(np.arange(n) >= 50, 1.0, 0)
    mixture = noises.Mixture([noises.Unigram(left, 1.0), noises.Unigram(right, 1.0)], [3, 2])
    law = (3 * left / left.sum() + 2 * right / right.sum()) / 5
    observed = np.bincount(mixture.sample((1000, 1000), seed=SEED).numpy().ravel(), minlength=n)
    assert stats.chisquare(observed, 1e6 * law).pvalue > 1e-4
    wrong = (left / left.sum() + right / right.sum()) / 2
    assert stats.chisquare(observed, 1e6 * wrong).pvalue < 1e-12


def test_draws_are_bit_identical_on_both_backends(native):
    mixture = noises.Mixture([noises.LogUniform(1000), noises.Unigram(zipf(1000))], [10, 3])
    ids = mixture.sample((64, 33), seed=SEED)
    assert torch.equal(ids, reference.draw(mixture.kind, 1000, mixture.table, SEED, 64, 33))


def test_only_the_ratio_of_counts_matters():
    parts = [noises.LogUniform(400), noises.Uniform(400)]
    table = noises.Mixture(parts, [1, 3]).table
    for counts in ([2, 6], (0.25, 0.75), torch.tensor([8, 24]), np.array([1.0, 3.0]), [4e307, 1.2e308]):
        assert torch.equal(noises.Mixture(parts, counts).table, table), counts


def test_one_law_is_itself():
    unigram = noises.Unigram(zipf(300))
    assert (masses_of(noises.Mixture([unigram], [0.1])) == masses_of(unigram)).all()
    assert (masses_of(noises.Mixture([unigram, unigram], [1, 9])) == masses_of(unigram)).all()


def test_a_mixture_of_mixtures_is_a_mixture():
    parts = [noises.LogUniform(50), noises.Uniform(50), noises.Unigram(zipf(50))]
    nested = noises.Mixture([noises.Mixture(parts[:2], [1, 2]), parts[2]], [3, 4])
    flat = noises.Mixture(parts, [1, 2, 4])
    assert (np.abs(masses_of(nested) - masses_of(flat)) <= 52).all()


def test_a_vanishing_share_keeps_every_class():
    mixture = noises.Mixture([noises.Unigram([1, 0, 1, 0]), noises.Uniform(4)], [1e300, 1e-300])
    assert (masses_of(mixture)[[1, 3]] == 1).all()
    assert torch.isfinite(mixture.log_prob(torch.arange(4))).all()


def test_state_dict_and_to():
    mixture = noises.Mixture([noises.LogUniform(50), noises.Uniform(50)], [1, 2])
    other = noises.Mixture([noises.Uniform(50)], [1])
    other.load_state_dict(mixture.state_dict())
    assert list(mixture.state_dict()) == ["table"]
    assert torch.equal(other.sample(100, seed=SEED), mixture.sample(100, seed=SEED))
    log_q = mixture.log_prob(torch.arange(50))
    assert torch.equal(torch.nn.ModuleList([mixture]).to(torch.bfloat16)[0].log_prob(torch.arange(50)), log_q)
    assert mixture.to("meta").table.device.type == "meta"
    assert noises.Mixture([noises.Uniform(5)], [1], device="meta").table.device.type == "meta"
    assert repr(noises.Mixture([noises.Uniform(5)] * 2, [1, 0.5])) == "Mixture(n_classes=5, counts=[1, 0.5])"


def test_a_loss_takes_it_as_its_noise():
    n, dim, k = 20, 4, 6
    mixture = noises.Mixture([noises.Unigram(zipf(n), 1.0), noises.Uniform(n)], [2, 1])
    hidden, weight, target = torch.randn(5, dim, dtype=torch.float64), torch.randn(n, dim, dtype=torch.float64), 3
    targets = torch.full((5,), target)
    losses = functional.nce_loss(
        hidden, weight, targets, mixture, k, seed=SEED, reduction="none", backend="reference"
    ).numpy()
    q = (2 * zipf(n) / zipf(n).sum() + 1 / n) / 3
    ids = mixture.sample((5, k), seed=SEED).numpy()
    z = hidden.numpy() @ weight.numpy().T - np.log(k * q)
    expected = np.logaddexp(0, -z[:, target]) + np.logaddexp(0, np.take_along_axis(z, ids, 1)).sum(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)  # log q is read in float32


# Refusals
@pytest.mark.parametrize(
    ("parts", "counts", "error", "message"),
    [
        ([], [], ValueError, r"noises must have at least one distribution, got none"),
        (noises.Uniform(3), [1], TypeError, r"noises must be a sequence of noise distributions, got Uniform"),
        ("ab", [1, 2], TypeError, r"noises must be a sequence of noise distributions, got str 'ab'"),
        (None, [1], TypeError, r"noises must be a sequence of noise distributions, got NoneType"),
        ([noises.Uniform(3), 5], [1, 2], TypeError, r"noises must be noise distributions, got int 5 at index 1"),
        (
            [noises.Uniform(3), noises.Uniform(4)],
            [1, 2],
            ValueError,
            r"noises must have the same n_classes, got 3 and 4 at index 1",
        ),
        ([noises.Uniform(3)], [1, 2], ValueError, r"counts must have one entry for each of the 1 noises, got 2"),
        ([noises.Uniform(3)], [], ValueError, r"counts must have 1 \.\. 2\^31 - 1 entries, got 0"),
        ([noises.Uniform(3)] * 2, [1, 0], ValueError, r"counts must be > 0, got 0\.0 at index 1"),
        ([noises.Uniform(3)] * 2, [1, -2], ValueError, r"counts must be finite and >= 0, got -2\.0 at index 1"),
        ([noises.Uniform(3)] * 2, [math.nan, 1], ValueError, r"counts must be finite and >= 0, got nan at index 0"),
        ([noises.Uniform(3)] * 2, [1, math.inf], ValueError, r"counts must be finite and >= 0, got inf at index 1"),
        ([noises.Uniform(3)] * 2, 5, ValueError, r"counts must be 1-D, got shape \[\]"),
        ([noises.Uniform(3)] * 2, ["a", "b"], TypeError, r"counts must be a 1-D tensor, array or sequence"),
        ([noises.Uniform(3)] * 2, None, TypeError, r"counts must be"),
    ],
)
def test_bad_mixtures_are_refused(parts, counts, error, message):
    with pytest.raises(error, match=message):
        noises.Mixture(parts, counts)
