"""16-bit tables in nce_ext.optim: state in float32, and weights rounded to nearest, at random, or beside a master."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from optim_cases import ALL, BF16, F16, F32, assert_same, make, parameter, random_gradient, sparse, use

from nce_ext import optim
from nce_ext.reference import row_step

NARROW = (BF16, F16)


@pytest.fixture(autouse=True)
def _kernels(backend, monkeypatch):
    use(backend, monkeypatch)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(exact: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of dtype that is at most each float32, and the smallest that is at least it, in float64."""
    value = exact.detach().numpy()
    if dtype == F16:
        with np.errstate(over="ignore"):
            near = value.astype(np.float16)
            below = np.where(near.astype(np.float64) > value, np.nextafter(near, np.float16(-np.inf)), near)
            above = np.where(near.astype(np.float64) < value, np.nextafter(near, np.float16(np.inf)), near)
        return below.astype(np.float64), above.astype(np.float64)
    bits = value.view(np.uint32)
    inner = bits & np.uint32(0xFFFF0000)
    outer = np.where(inner == bits, inner, inner + np.uint32(0x10000))
    ends = inner.view(np.float32).astype(np.float64), outer.view(np.float32).astype(np.float64)
    return np.minimum(*ends), np.maximum(*ends)


def wide_twin(name: str, p: torch.nn.Parameter):
    """A float32 copy of a 16-bit parameter with its optimizer."""
    wide = torch.nn.Parameter(p.detach().float())
    return wide, make(name, [wide])


def step_both(p, optimizer, wide, twin, touched) -> None:
    p.grad = random_gradient(p, touched)
    wide.grad = p.grad.float()
    optimizer.step()
    twin.step()


def assert_float32_state(state: dict, wide_state: dict) -> None:
    for key, value in wide_state.items():
        assert_same(state[key], value)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_nearest_is_the_float32_result_rounded(name, dtype):
    p = parameter(7, 21, dtype=dtype)
    optimizer = make(name, [p], rounding="nearest")
    wide, twin = wide_twin(name, p)
    for touched in ([1, 4], [4], [0, 1, 6], [4, 5]):
        step_both(p, optimizer, wide, twin, touched)
        assert torch.equal(p, wide.to(dtype))
        wide.data.copy_(p)
    assert_float32_state(optimizer.state[p], twin.state[wide])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_master_weights_are_those_of_the_float32_run(name, dtype):
    p = parameter(7, 21, dtype=dtype)
    optimizer = make(name, [p], rounding="master")
    wide, twin = wide_twin(name, p)
    for touched in ([1, 4], [4], [0, 1, 6], [4, 5]):
        step_both(p, optimizer, wide, twin, touched)
        assert torch.equal(optimizer.state[p]["master"], wide)
        assert torch.equal(p, wide.to(dtype))
    assert_float32_state(optimizer.state[p], twin.state[wide])
    optimizer.catch_up()
    twin.catch_up()
    assert torch.equal(optimizer.state[p]["master"], wide)
    assert torch.equal(p, wide.to(dtype))


@pytest.mark.parametrize("shape", [(7, 21), (7,), (7, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_random_rounding_is_to_a_neighbour_by_the_bits_of_the_seed(name, dtype, shape):
    """The same bits on every backend: those of round_at_random for the seed that the generator hands out."""
    p = parameter(*shape, dtype=dtype)
    optimizer = make(name, [p], generator=generator())
    wide, twin = wide_twin(name, p)
    seeds, nearest = generator(), 0
    for touched in ([1, 4], [4], [0, 1, 6], [4, 5], list(range(7))):
        before = p.detach().clone()
        step_both(p, optimizer, wide, twin, touched)
        below, above = neighbours(wide, dtype)
        got = p.detach().double().numpy()
        assert np.all((got == below) | (got == above))
        nearest += int((p == wide.to(dtype)).sum())
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), generator=seeds)
        rows = torch.tensor(touched)
        wanted = row_step.round_at_random(wide.detach().view(7, -1)[rows], rows, seed, dtype).to(dtype)
        assert torch.equal(p.view(7, -1)[rows], wanted)
        untouched = [row for row in range(7) if row not in touched]
        assert torch.equal(p[untouched], before[untouched])
        wide.data.copy_(p)
    assert nearest < 5 * p.numel()
    assert_float32_state(optimizer.state[p], twin.state[wide])


# dtype -> float32 numbers between two of it: of both signs, next to a power of 2, near zero, hardly off a number.
BETWEEN = {
    BF16: [1.001, -1.001, 0.9999, -3.1415, 1e-3, -7.7e-30, 2e20, 1 + 2**-7 - 2**-20, 1 + 2**-15, 3e-39, -1e-40],
    F16: [1.0003, -1.0003, 0.99999, -3.1415, 1e-3, 6.2e-5, -6.05e-5, 2**-24 * 3.25, -(2**-26), 2**-24 * 0.75, 65519.0],
}


# Two-sided normal quantile of a level of 1e-5: of some hundred tests, of fixed seeds, none fails by chance.
Z = 4.42


def shares(exact: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The neighbours of numbers, and how far on the way to the upper one they are; infinity lies at 2^16."""
    below, above = (np.clip(end, -65536, 65536) if dtype == F16 else end for end in neighbours(exact, dtype))
    return below, above, (exact.detach().double().numpy() - below) / (above - below)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_random_rounding_has_the_right_mean(dtype):
    """Up as often as the distance to the number below says."""
    exact = torch.tensor(BETWEEN[dtype], dtype=F32)
    below, above, share = shares(exact, dtype)
    assert np.all((share > 0) & (share < 1))
    rows, ups, seeds = torch.arange(1000), 0, generator()
    for _ in range(40):
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), generator=seeds)
        got = row_step.round_at_random(exact.expand(len(rows), -1), rows, seed, dtype).to(dtype).double().numpy()
        got = np.clip(got, -65536, 65536) if dtype == F16 else got
        assert np.all((got == below) | (got == above))
        ups = ups + (got == above).sum(0)
    n = 40 * len(rows)
    z = (ups - n * share) / np.sqrt(n * share * (1 - share))
    assert np.all(np.abs(z) < Z), z


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW, all", "row-wise Adagrad"])
def test_steps_are_right_on_average(name, dtype):
    """Equal rows with equal gradients: they differ in their random bits alone, and their mean is the float32 result."""
    n = 20_000
    start, gradient = torch.randn(13).to(dtype), torch.randn(13).to(dtype)
    p = torch.nn.Parameter(start.repeat(n, 1))
    optimizer = make(name, [p], lr=0.01, generator=generator())
    wide = torch.nn.Parameter(start[None].float())
    twin = make(name, [wide], lr=0.01)
    p.grad, wide.grad = sparse(range(n), gradient.expand(n, 13), n, True), gradient[None].float()
    optimizer.step()
    wide.grad = sparse([0], wide.grad, 1)
    twin.step()
    below, above, share = shares(wide, dtype)
    got = p.detach().double().numpy()
    assert np.all((got == below) | (got == above))
    ups = (got == above).sum(0)
    z = (ups - n * share) / np.sqrt(n * share * (1 - share))
    assert np.all(np.abs(z) < Z), z


def test_small_steps_are_not_lost():
    """800 steps of 2^-10 move bfloat16 weights of 1 to about 1.78; to nearest each of them would round to nothing."""
    moved = {}
    for rounding in ("stochastic", "nearest", "master"):
        p = torch.nn.Parameter(torch.ones(2, 64, dtype=BF16))
        optimizer = optim.SGD([p], lr=2.0**-10, rounding=rounding, generator=generator())
        for _ in range(800):
            p.grad = sparse([1], -torch.ones(1, 64, dtype=BF16), 2, True)
            optimizer.step()
        assert torch.equal(p[0], torch.ones(64, dtype=BF16))
        moved[rounding] = float(p.detach()[1].double().mean()) - 1
    # Each of 64 walks has 800 steps, of 2^-7 once in 8: a standard deviation of sqrt(800 * 7 / 64) 2^-7 = 0.073.
    assert abs(moved["stochastic"] - 800 * 2.0**-10) < Z * 0.073 / 8
    assert moved["nearest"] == 0
    assert moved["master"] == pytest.approx(800 * 2.0**-10, abs=2.0**-8)


SPECIAL = [math.nan, 0.0, -0.0, 1.0, -1.5, 2.0**-24, -(2.0**-14), 65504.0]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_numbers_that_need_no_rounding_stay(dtype):
    """Whatever the random bits: NaN, zeros of both signs, and what the type holds exactly."""
    exact = torch.tensor(SPECIAL).to(dtype)
    p = torch.nn.Parameter(torch.cat([exact, exact]).repeat(200, 1))
    optimizer = optim.SGD([p], lr=1.0, generator=generator())
    p.grad = sparse(range(200), torch.zeros(200, 2 * len(exact), dtype=dtype), 200, True)
    optimizer.step()
    for row in p.detach():
        for got, wanted in zip(row, torch.cat([exact, exact]), strict=True):
            assert torch.equal(got.view(torch.int16), wanted.view(torch.int16)) or bool(got.isnan() & wanted.isnan())


@pytest.mark.parametrize(("dtype", "largest"), [(F16, 65504.0), (BF16, float(torch.finfo(BF16).max))])
def test_overflow(dtype, largest):
    """Half-way to where infinity would lie it is one or the other; beyond, infinity; and NaN comes from NaN alone."""
    n = 500
    start = torch.tensor([largest, -largest, largest, 1.0, 1.0]).to(dtype)
    half = largest * (2.0**-12 if dtype == F16 else 2.0**-9)
    gradient = torch.tensor([-half, half, -largest, math.nan, -math.inf]).to(dtype)
    p = torch.nn.Parameter(start.repeat(n, 1))
    p.grad = sparse(range(n), gradient.expand(n, 5), n, True)
    optim.SGD([p], lr=1.0, generator=generator()).step()
    got = p.detach().double()
    for column, sign in ((0, 1), (1, -1)):
        infinite = got[:, column] == sign * math.inf
        assert torch.all(infinite | (got[:, column] == sign * start[0].double()))
        assert 0.3 * n < int(infinite.sum()) < 0.7 * n
    assert torch.all(got[:, [2, 4]] == math.inf)
    assert torch.all(got[:, 3].isnan())


@pytest.mark.parametrize("name", ALL)
def test_the_generator_decides(name):
    def run(source: torch.Generator | None) -> torch.Tensor:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 7 * 21).view(7, 21).to(BF16))
        optimizer = make(name, [p], lr=1e-3, generator=source)
        values = torch.linspace(1, 2, 3 * 21).view(3, 21).to(BF16)
        for _ in range(3):
            p.grad = sparse([1, 3, 6], values, 7)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(generator(1)), run(generator(1)))
    assert not torch.equal(run(generator(1)), run(generator(2)))
    torch.manual_seed(3)
    first, second = run(None), run(None)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(run(None), first)
    before = torch.get_rng_state()
    run(generator(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_late_decay_is_rounded_once(dtype):
    """catch_up rounds the decayed weight as a step would; rows that are up to date keep their bits."""
    p = torch.nn.Parameter(torch.linspace(1, 2, 4000 * 3).view(4000, 3).to(dtype))
    start = p.detach().clone()
    optimizer = optim.AdamW([p], lr=0.01, weight_decay=0.5, generator=generator())
    for _ in range(3):
        p.grad = sparse([0], torch.zeros(1, 3, dtype=dtype), 4000, True)
        optimizer.step()
    touched = p.detach()[0].clone()
    optimizer.catch_up()
    assert torch.equal(p[0], touched)
    exact = torch.from_numpy((start.double().numpy() * 0.995**3).astype(np.float32))
    below, above, share = shares(exact, dtype)
    got = p.detach().double().numpy()[1:]
    assert np.all((got == below[1:]) | (got == above[1:]))
    share = share[1:][below[1:] < above[1:]]
    ups = (got == above[1:])[below[1:] < above[1:]].sum()
    assert abs(ups - share.sum()) < Z * np.sqrt((share * (1 - share)).sum())
    once = p.detach().clone()
    optimizer.catch_up()
    assert torch.equal(p, once)


@pytest.mark.parametrize("name", ALL)
def test_state_of_narrow_tables_is_float32_from_the_start(name):
    """Initial accumulators too: torch's Adagrad makes them in the type of the weight."""
    p, wide = parameter(3, 4, dtype=BF16), parameter(3, 4)
    states = []
    for each in (p, wide):
        options = {"initial_accumulator_value": 0.1} if "dagrad" in name else {}
        optimizer = make(name, [each], **options)
        each.grad = random_gradient(each, [])
        optimizer.step()
        states.append(dict(optimizer.state[each]))
    assert_same(*states)
