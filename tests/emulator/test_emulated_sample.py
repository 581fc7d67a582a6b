"""The kernel that draws noise ids, bit for bit against the integers of draws.py."""

from __future__ import annotations

import draws
import emulated
import numpy as np
import pytest

SEED = np.array([0x0123456789ABCDEF, -0x0FEDCBA987654321])
NOISES = {
    "uniform": [draws.Noise(draws.UNIFORM, n) for n in (1, 2, 3, 1000, 2**20, 2**31 - 1)],
    "log uniform": [draws.Noise(draws.LOG_UNIFORM, n) for n in (1, 2, 3, 1000, 2**20, 2**31 - 1)],
    "alias": [
        draws.alias_noise(weights)
        for weights in ([5.0], [0.0, 3.0], [7.0] * 100, [1 / (i + 1) for i in range(3000)], [1e18, *[1.0] * 500])
    ],
}
SHAPES = [(0, 5), (5, 0), (1, 1), (1, 2), (7, 1), (3, 5), (11, 64), (2, 1001)]


# Of the authors' Random123 distribution (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([draws.WORD] * 4, [draws.WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_expected_words_are_philox(counter, key, expected):
    assert [int(word) for word in draws.philox4x32(counter, key)] == expected


def test_expected_alias_tables_hold_their_law():
    for weights in ([5.0], [0.0, 3.0], [1 / (i + 1) for i in range(300)], [1e18, *[1.0] * 500, 0.0]):
        noise = draws.alias_noise(weights)
        threshold, alias = (noise.table[:, i].view(np.uint32).astype(np.int64) for i in (0, 1))
        own = np.arange(len(weights))
        mass = np.where(alias == own, draws.FULL, threshold)
        np.add.at(mass, alias, draws.FULL - mass)
        assert mass.sum() == len(weights) * draws.FULL
        assert np.array_equal(mass > 0, np.array(weights) > 0)
        np.testing.assert_allclose(mass / draws.FULL / len(weights), np.array(weights) / sum(weights), atol=1e-9)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ids_are_those_of_the_seed(kind, shape):
    for noise in NOISES[kind]:
        expected = noise.draw(SEED, *shape)
        for grid, threads, order in ((0, 256, 0), (1, 32, 1), (3, 64, 2)):
            ids = emulated.sample(noise, SEED, *shape, grid=grid, threads=threads, order=order)
            assert ids.dtype == np.int64
            assert np.array_equal(ids, expected), (noise.n_classes, grid, threads)
            assert not ids.size or (ids.min() >= 0 and ids.max() < noise.n_classes)


def test_more_examples_than_16_bits_count():
    noise = draws.Noise(draws.UNIFORM, 1000)
    assert np.array_equal(emulated.sample(noise, SEED, 66_000, 1), noise.draw(SEED, 66_000, 1))


def test_a_seed_of_any_stride_and_value():
    noise = NOISES["alias"][3]
    for words in ([0, 0], [-1, -1], [2**63 - 1, -(2**63)], [1 << 32, 1], [1, 1 << 32]):
        seed = np.array(words)
        expected = noise.draw(seed, 3, 9)
        assert np.array_equal(emulated.sample(noise, seed, 3, 9), expected)
        spread = np.zeros(6, np.int64)
        spread[::5] = seed
        assert np.array_equal(emulated.sample(noise, spread[::5], 3, 9), expected)
