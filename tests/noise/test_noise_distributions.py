"""The noise distributions: exact tables, bit-identical draws, and laws that a chi-square test of 10^7 draws accepts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nce_ext import noise as noises
from nce_ext import reference
from nce_ext.noise import laws

FULL = 2**32
SEED = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])


def reference_draw(noise, rows: int, cols: int, seed=SEED) -> torch.Tensor:
    return reference.draw(noise.kind, noise.n_classes, noise.table, seed, rows, cols)


# Philox: the known answers that the authors publish with Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([FULL - 1] * 4, [FULL - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(word) for word in words] == expected


def test_random_words_are_philox_of_slot_example_and_seed():
    """Two slots share one call; the key is seed[0] and the counter (slot // 2, example, seed[1])."""
    high, low = reference.random_words(SEED, 3, 5)
    key = [int(SEED[0]) & (FULL - 1), (int(SEED[0]) >> 32) & (FULL - 1)]
    tail = [int(SEED[1]) & (FULL - 1), (int(SEED[1]) >> 32) & (FULL - 1)]
    for example in range(3):
        for slot in range(5):
            counter = [torch.tensor(c) for c in (slot // 2, example, *tail)]
            words = [int(w) for w in reference.philox4x32(counter, [torch.tensor(k) for k in key])]
            assert (int(low[example, slot]), int(high[example, slot])) == tuple(words[2 * (slot % 2) :][:2])


# Alias tables
COUNTS = {
    "one class": [5],
    "two classes, one never": [0, 3],
    "all equal": [7] * 1000,
    "powers of two": [2**i for i in range(40)],
    "zipf": [1 / (i + 1) for i in range(5000)],
    "rising": list(range(1, 3000)),
    "huge dynamic range": [1e-300, 1e300, 1.0, 0.0, 1e-10, 1e10],
    "one giant among many dwarfs": [1e18, *[1.0] * 2000],
    "giant last": [*[1.0] * 2000, 1e18],
    "half zeros": [0, 1] * 500,
    "leading and trailing zeros": [0, 0, 0, 4, 1, 1, 0, 0],
    "subnormal": [5e-324, 1.0, 1e-310],
}


def quantised_masses(counts, power: float) -> list[int]:
    """Integer masses by the rule, in Python integers: round(V 2^32 q), at least 1, the residue to the heaviest."""
    counts = [float(c) for c in counts]
    top = max(counts)
    tiny = np.finfo(np.float64).tiny
    weights = [max((c / top) ** power, tiny) if c > 0 else 0.0 for c in counts]
    total = 0.0
    for w in weights:
        total += w
    scale = len(counts) * 2.0**32 / total
    masses = [max(1, round(w * scale)) if w > 0 else 0 for w in weights]
    masses[masses.index(max(masses))] += len(counts) * FULL - sum(masses)
    return masses


@pytest.mark.parametrize("power", [0.0, 0.5, 0.75, 1.0, 3.0])
@pytest.mark.parametrize("name", COUNTS)
def test_alias_masses_are_exact(name, power):
    noise = noises.Unigram(torch.tensor(COUNTS[name], dtype=torch.float64), power)
    masses = reference.alias_masses(noise.table)
    assert int(masses.sum()) == len(COUNTS[name]) * FULL
    assert all((mass > 0) == (count > 0) for mass, count in zip(masses.tolist(), COUNTS[name], strict=True))
    expected = quantised_masses(COUNTS[name], power)
    # pow and the sum of thousands of terms may round differently: 1e-13 of a mass, and the heaviest takes the residue.
    for i, (got, want) in enumerate(zip(masses.tolist(), expected, strict=True)):
        slack = max(1, 1e-12 * want) + (len(expected) if want == max(expected) else 0)
        assert abs(got - want) <= slack, f"class {i}: mass {got}, expected {want}"


@pytest.mark.parametrize("name", COUNTS)
def test_log_q_is_that_of_the_realised_masses(name):
    noise = noises.Unigram(torch.tensor(COUNTS[name], dtype=torch.float64))
    ids = torch.arange(noise.n_classes)
    masses = reference.alias_masses(noise.table).double().numpy()
    with np.errstate(divide="ignore"):
        exact = np.log(masses / (noise.n_classes * 2.0**32))
    # log mass - log total, each about 30, cancels to an ulp of 30: 4e-15.
    np.testing.assert_allclose(noise.log_prob(ids, dtype=torch.float64).numpy(), exact, rtol=1e-14, atol=8e-15)
    np.testing.assert_allclose(noise.log_prob(ids).numpy(), exact, rtol=2.0**-24 * 1.01, atol=8e-15)
    # The fourth word is the log q of the alias, which a draw reads from the bucket it has landed in.
    alias = noise.table[:, 1].long()
    assert torch.equal(noise.table[:, 3].view(torch.float32), noise.log_prob(alias))


def test_a_count_of_zero_is_never_drawn():
    """Zero-mass classes beside every other class, so that any slip in a threshold or an alias would hit one."""
    counts = torch.zeros(2000)
    counts[::2] = torch.rand(1000) + 1e-6
    noise = noises.Unigram(counts)
    ids = noise.sample((2000, 1000), seed=SEED)
    assert (ids % 2 == 0).all()
    assert torch.isinf(noise.log_prob(torch.arange(1, 2000, 2))).all()


def test_counts_of_every_type_give_one_table():
    counts = [3, 0, 1, 200, 5]
    expected = noises.Unigram(torch.tensor(counts, dtype=torch.float64)).table
    dtypes = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
    others = [torch.tensor(counts, dtype=dtype) for dtype in dtypes]
    others += [counts, tuple(counts), np.array(counts), np.array(counts, np.uint16), np.array(counts, np.float32)]
    others += [torch.tensor(counts)[None].expand(3, 5)[1], torch.tensor(counts).repeat_interleave(2)[::2]]
    others += [torch.tensor(counts, dtype=torch.float32, requires_grad=True)]
    for other in others:
        assert torch.equal(noises.Unigram(other).table, expected), other
    # Python floats are float64, and as such not too large.
    assert torch.equal(noises.Unigram([1e-300, 1e300]).table, noises.Unigram(np.array([1e-300, 1e300])).table)
    present = [True, False, True]
    assert torch.equal(noises.Unigram(torch.tensor(present)).table, noises.Unigram([1, 0, 1]).table)
    assert torch.equal(noises.Unigram(np.array(present)).table, noises.Unigram([1, 0, 1]).table)


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(
        st.one_of(
            st.just(0.0),
            st.just(1.0),
            st.integers(0, 60).map(lambda e: 2.0**e),
            st.floats(1e-300, 1e300),
            st.floats(0.5, 2.0),
        ),
        min_size=1,
        max_size=60,
    ).filter(any),
    power=st.sampled_from([0.0, 0.5, 0.75, 1.0, 2.0]),
    repeats=st.integers(1, 5),
)
def test_any_counts_give_exact_masses_and_one_table_on_both_backends(counts, power, repeats):
    counts = torch.tensor(counts * repeats, dtype=torch.float64)
    noise = noises.Unigram(counts, power)
    masses = reference.alias_masses(noise.table)
    assert int(masses.sum()) == len(counts) * FULL
    assert torch.equal(masses > 0, counts > 0)
    assert torch.equal(noise.table, reference.alias_table(*laws._unnormalised_law(counts, power)))


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 2**16 + 1, 300_000])
def test_large_tables_are_equal_on_both_backends(n, native):
    for law in (torch.rand(n), 1 / torch.arange(1, n + 1), torch.rand(n).pow(20), (torch.rand(n) < 0.01).float()):
        law[n // 2] = 1
        weights, scale = laws._unnormalised_law(law.double(), 0.75)
        assert torch.equal(torch.ops.nce_ext.alias_table(weights, scale), reference.alias_table(weights, scale))


# Draws: one pure function on every backend, thread count and shape
NOISES = {
    **{f"uniform {v}": lambda v=v: noises.Uniform(v) for v in (1, 2, 3, 7, 1000, 2**16, 2**24 + 3, 2**31 - 1)},
    **{f"log-uniform {v}": lambda v=v: noises.LogUniform(v) for v in (1, 2, 3, 7, 1000, 2**16, 2**24 + 3, 2**31 - 1)},
    **{f"unigram {v}": lambda v=v: noises.Unigram(1 / torch.arange(1, v + 1)) for v in (1, 2, 3, 7, 1000, 2**16)},
}


@pytest.mark.parametrize("name", NOISES)
def test_ids_are_bit_identical_on_both_backends(name, native):
    noise = NOISES[name]()
    seeds = [SEED, torch.tensor([0, 0]), torch.tensor([-1, -(2**63)]), torch.tensor([2**63 - 1, 2**32])]
    for seed in seeds:
        for rows, cols in ((1, 1), (3, 7), (64, 32), (5, 33), (1, 1000), (1000, 1), (0, 5), (5, 0)):
            ids = noise.sample((rows, cols), seed=seed)
            assert ids.shape == (rows, cols)
            assert ids.dtype == torch.int64
            assert torch.equal(ids, reference_draw(noise, rows, cols, seed))
            assert rows * cols == 0 or (int(ids.min()) >= 0 and int(ids.max()) < noise.n_classes)


@pytest.mark.parametrize("name", ["uniform 1000", "log-uniform 16777219", "unigram 65536"])
def test_draws_do_not_depend_on_the_number_of_threads(name):
    noise = NOISES[name]()
    torch.set_num_threads(1)
    alone = noise.sample((1001, 301), seed=SEED)
    torch.set_num_threads(2)
    assert torch.equal(noise.sample((1001, 301), seed=SEED), alone)


@pytest.mark.parametrize("name", ["uniform 1000", "log-uniform 16777219", "unigram 65536"])
def test_an_id_depends_on_seed_example_and_slot_only(name):
    noise = NOISES[name]()
    large = noise.sample((50, 41), seed=SEED)
    for rows, cols in ((1, 1), (7, 40), (50, 3), (49, 41)):
        assert torch.equal(noise.sample((rows, cols), seed=SEED), large[:rows, :cols])
    assert torch.equal(noise.sample((5, 10, 41), seed=SEED).reshape(50, 41), large)
    assert torch.equal(noise.sample(41, seed=SEED), large[0])
    assert torch.equal(noise.sample((), seed=SEED), large[0, 0])
    for other in (SEED + torch.tensor([1, 0]), SEED + torch.tensor([0, 1]), SEED + torch.tensor([2**32, 0])):
        # Independent ids still agree now and then: a uniform pair in 1 of V, a log-uniform one in about 3 of 100.
        assert (noise.sample((50, 41), seed=other) == large).float().mean() < 0.1


def test_the_seed_comes_from_the_generator_or_the_global_state():
    noise = noises.Uniform(2**31 - 1)
    generator = torch.Generator().manual_seed(3)
    first, second = (noise.sample(8, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(noise.sample(8, generator=torch.Generator().manual_seed(3)), first)
    torch.manual_seed(5)
    first = noise.sample(8)
    torch.manual_seed(5)
    assert torch.equal(noise.sample(8), first)


# Log-probabilities
@pytest.mark.parametrize("name", NOISES)
def test_probabilities_sum_to_one(name):
    noise = NOISES[name]()
    if noise.n_classes > 2**25:
        pytest.skip("too many classes to add up here; the closed form is compared below")
    total = noise.log_prob(torch.arange(noise.n_classes), dtype=torch.float64).exp().sum()
    assert abs(float(total) - 1) < 1e-11


@pytest.mark.parametrize("n", [5_000_000, 2**31 - 1])
def test_log_uniform_keeps_its_digits_in_the_tail(n):
    """log((y + 2) / (y + 1)) in float32 is wrong by 20% at y = 5e6, and as a difference of float32 logs it is 0."""
    ids = torch.cat([torch.arange(1000), torch.arange(n - 1000, n), torch.randint(n, (100_000,))])
    noise = noises.LogUniform(n)
    exact = np.log1p(1 / (ids.numpy().astype(np.longdouble) + 1)) / np.log(np.longdouble(n) + 1)
    q64 = np.exp(noise.log_prob(ids, dtype=torch.float64).numpy().astype(np.longdouble))
    q32 = np.exp(noise.log_prob(ids).numpy().astype(np.longdouble))
    assert (q32 > 0).all()
    assert np.abs(q64 / exact - 1).max() < 1e-14
    assert np.abs(q32 / exact - 1).max() < 1e-6


def test_log_prob_takes_any_shape_and_index_type():
    noise = noises.Unigram([1, 2, 3])
    ids = torch.tensor([[0, 2], [1, 1]])
    expected = torch.log(torch.tensor([[1.0, 3.0], [2.0, 2.0]]) ** 0.75 / sum(c**0.75 for c in (1, 2, 3)))
    torch.testing.assert_close(noise.log_prob(ids), expected)
    assert torch.equal(noise.log_prob(ids.int()), noise.log_prob(ids))
    assert noise.log_prob(ids).dtype == torch.float32
    assert noise.log_prob(torch.empty((0, 3), dtype=torch.int64)).shape == (0, 3)


# Vocabularies that float32 cannot count
@pytest.mark.slow
@pytest.mark.parametrize("n", [2**24 + 3, 2**26 + 1])
def test_unigram_reaches_beyond_2_to_24_classes(n, unpoisoned, request):
    if n > 2**25:
        request.getfixturevalue("native")
    counts = torch.zeros(n, dtype=torch.float32)
    counts[-3:] = torch.tensor([1.0, 2.0, 1.0])
    counts[: n - 3 : 2] = 1e-9
    noise = noises.Unigram(counts, power=1.0)
    ids = noise.sample((100, 1000), seed=SEED)
    light = (n - 2) // 2 * 1e-9
    assert abs(float((ids >= n - 3).double().mean()) - 4 / (4 + light)) < 0.01
    for back, share in ((3, 0.25), (2, 0.5), (1, 0.25)):
        assert abs(float((ids == n - back).double().mean()) - share * 4 / (4 + light)) < 0.01
    assert ((ids >= n - 3) | (ids % 2 == 0)).all()
    assert abs(float(noise.log_prob(torch.tensor([n - 2])).exp()) - 2 / (4 + light)) < 1e-6


def test_uniform_reaches_every_residue_of_the_largest_vocabulary():
    """A 24-bit float draw would only reach multiples of 2^7; a 32-bit one favours some ids."""
    ids = noises.Uniform(2**31 - 1).sample((100, 1000), seed=SEED)
    assert int(ids.max()) > 2**31 - 2**17
    assert torch.bincount(ids.flatten() % 128, minlength=128).min() > 600


# State
def test_state_dict_carries_the_table():
    trained, fresh = noises.Unigram([5, 1, 1], power=1.0), noises.Unigram([1, 1, 1], power=1.0)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.table, trained.table)
    assert torch.equal(fresh.sample(100, seed=SEED), trained.sample(100, seed=SEED))
    assert list(noises.Uniform(5).state_dict()) == list(noises.LogUniform(5).state_dict()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype_leaves_the_table_alone(dtype):
    noise = noises.Unigram([5, 1, 0, 1])
    table, log_q = noise.table.clone(), noise.log_prob(torch.arange(4))
    moved = torch.nn.ModuleList([noise]).to(dtype)[0]
    assert torch.equal(moved.table, table)
    assert torch.equal(moved.log_prob(torch.arange(4)), log_q)


def test_extra_repr_names_the_law():
    assert repr(noises.Unigram([1, 2], power=0.5)) == "Unigram(n_classes=2, power=0.5)"
    assert repr(noises.LogUniform(7)) == "LogUniform(n_classes=7)"


# Refusals
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([1, math.nan, 2], ValueError, r"counts must be finite and >= 0, got nan at index 1"),
        ([1, 2, math.inf], ValueError, r"counts must be finite and >= 0, got inf at index 2"),
        ([-math.inf, 2], ValueError, r"counts must be finite and >= 0, got -inf at index 0"),
        ([1, 2, -3, -4], ValueError, r"counts must be finite and >= 0, got -3\.0 at index 2"),
        ([0, 0, 0], ValueError, r"counts must not all be zero, got 3 zeros"),
        ([], ValueError, r"counts must have 1 \.\. 2\^31 - 1 entries, got 0"),
        ([[1, 2], [3, 4]], ValueError, r"counts must be 1-D, got shape \[2, 2\]"),
        (3.0, ValueError, r"counts must be 1-D, got shape \[\]"),
        (torch.tensor([1 + 2j]), TypeError, r"counts must be dense real numbers, got a complex64 tensor"),
        (torch.tensor([1.0, 0.0]).to_sparse(), TypeError, r"counts must be dense real numbers"),
        (["a", "b"], TypeError, r"counts must be a 1-D tensor, array or sequence of numbers"),
        ("ab", TypeError, r"counts must be"),
        (None, TypeError, r"counts must be"),
        ([[1], [1, 2]], TypeError, r"counts must be"),
    ],
)
def test_bad_counts_are_refused(counts, error, message):
    with pytest.raises(error, match=message):
        noises.Unigram(counts)


@pytest.mark.parametrize("power", [-0.1, math.nan, math.inf, "0.75", None])
def test_bad_powers_are_refused(power):
    with pytest.raises((TypeError, ValueError), match=r"power must be a finite number >= 0, got"):
        noises.Unigram([1, 2], power)


@pytest.mark.parametrize("law", [noises.Uniform, noises.LogUniform])
@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, r"n_classes must be in 1 \.\. 2\^31 - 1, got 0"),
        (-5, ValueError, r"n_classes must be in 1 \.\. 2\^31 - 1, got -5"),
        (2**31, ValueError, r"n_classes must be in 1 \.\. 2\^31 - 1, got 2147483648"),
        (10.0, TypeError, r"n_classes must be an int, got float 10\.0"),
        (True, TypeError, r"n_classes must be an int, got bool True|n_classes must be an int, got int True"),
        ("10", TypeError, r"n_classes must be an int, got str '10'"),
    ],
)
def test_bad_numbers_of_classes_are_refused(law, n, error, message):
    with pytest.raises(error, match=message):
        law(n)


@pytest.mark.parametrize(
    ("shape", "seed", "error", "message"),
    [
        ((2, -1), None, ValueError, r"shape must have sizes >= 0, got \(2, -1\)"),
        (-1, None, ValueError, r"shape must have sizes >= 0, got \(-1,\)"),
        ((2**33, 0), None, ValueError, r"shape must have at most 2\^32 examples"),
        ((0, 2**33), None, ValueError, r"shape must have at most 2\^32 examples of 2\^32 slots"),
        ((2.5, 3), None, TypeError, None),
        ("ab", None, (TypeError, ValueError), None),
        (3, 17, TypeError, r"seed must be an int64 tensor of shape \[2\], got int 17"),
        (3, torch.zeros(2), TypeError, r"seed must be an int64 tensor of shape \[2\], got a float32 tensor"),
        (3, torch.zeros(2, dtype=torch.int32), TypeError, r"seed must be an int64 tensor"),
        (3, torch.zeros(3, dtype=torch.int64), ValueError, r"seed must have shape \[2\], got \[3\]"),
        (3, torch.tensor(1), ValueError, r"seed must have shape \[2\], got \[\]"),
        (3, torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, r"seed must be on cpu, got meta"),
    ],
)
def test_bad_samples_are_refused(shape, seed, error, message):
    with pytest.raises(error, match=message):
        noises.Uniform(10).sample(shape, seed=seed)


@pytest.mark.parametrize(
    ("ids", "dtype", "error", "message"),
    [
        (torch.tensor([3, 10]), torch.float32, ValueError, r"ids must be in 0 \.\. 9, got 10"),
        (torch.tensor([3, -1]), torch.float32, ValueError, r"ids must be in 0 \.\. 9, got -1"),
        (torch.tensor([3.0]), torch.float32, TypeError, r"ids must be an int64 or int32 tensor, got a float32 tensor"),
        ([1, 2], torch.float32, TypeError, r"ids must be an int64 or int32 tensor, got list"),
        (torch.tensor([3]), torch.bfloat16, ValueError, r"dtype must be torch\.float32 or torch\.float64, got"),
    ],
)
def test_bad_ids_are_refused(ids, dtype, error, message):
    for noise in (noises.Uniform(10), noises.LogUniform(10), noises.Unigram([1] * 10)):
        with pytest.raises(error, match=message):
            noise.log_prob(ids, dtype=dtype)
