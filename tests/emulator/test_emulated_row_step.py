"""Steps of an optimizer on rows, of csrc/cuda, against textbook formulas; the same bits, however launched."""

from __future__ import annotations

import itertools

import emulated
import numpy as np
import pytest
from emulated import DTYPES, stored, widened
from steps import ADAM_NUMBERS, MOMENTUM, ROWWISE_NUMBERS, RULES, Table, random_bits, rounded_at_random

NARROW = ["bfloat16", "float16"]


def touched(table: Table, share: float = 0.6, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng([seed, 6])
    return np.flatnonzero(random.random(table.rows) < share).astype(np.int64)


def gradient_of(table: Table, rows: int, seed: int = 0) -> np.ndarray:
    return stored(np.random.default_rng([seed, 7]).standard_normal((rows, table.dim)), table.dtype)


def wide(table: Table, gradient: np.ndarray) -> bool:
    arrays = [table.arrays["weight"], gradient]
    states = [a for name in ("first", "second", "master") if (a := table.arrays[name]) is not None and a.ndim == 2]
    per = 16 // table.arrays["weight"].itemsize
    return table.dim % per == 0 and all(emulated.accesses(a)[0] == 16 for a in arrays + states)


def check_everywhere(table: Table, classes: np.ndarray | None = None, gradient: np.ndarray | None = None) -> Table:
    """Right, and the same bits for every access, grid, block and order of threads."""
    rows = np.arange(table.rows) if classes is None else classes
    gradient = gradient_of(table, len(rows)) if gradient is None else gradient
    got = table.copy()
    got.take_step(gradient, classes)
    live = (rows >= 0) & (rows < table.rows)
    if table.seed is None:
        got.check(table, rows[live], widened(gradient)[live])
    launches = itertools.product([16, 0] if wide(table, gradient) else [0], (1, 3), (1, 4))
    for order, (access, grid, warps) in enumerate(launches, 1):
        again = table.copy()
        again.take_step(gradient, classes, access=access, grid=grid, warps=warps, order=order)
        assert again.bits() == got.bits(), (access, grid, warps)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_dtype(rule, dtype):
    table = Table(dtype=dtype, dim=24, **RULES[rule])
    check_everywhere(table, touched(table))
    check_everywhere(Table(dtype=dtype, dim=13, contents=1, **RULES[rule]))


@pytest.mark.parametrize("rule", ["momentum", "row-wise Adagrad, coupled decay, maximize", "Adam"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 16, 31, 32, 33, 63, 64, 65, 100, 128, 129, 256, 300, 1000, 1024])
def test_every_width(dim, dtype, rule):
    table = Table(rows=7, dim=dim, dtype=dtype, **RULES[rule])
    check_everywhere(table, np.array([0, 2, 3, 6]))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 31, 33, 300])
@pytest.mark.parametrize("dim", [5, 40, 130])
def test_every_number_of_rows(rows, dim):
    check_everywhere(Table(rows=rows, dim=dim, counted=True, **ROWWISE_NUMBERS))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rule", RULES)
def test_a_master_copy(rule, dtype):
    table = Table(dtype=dtype, dim=24, mastered=True, **RULES[rule])
    got = check_everywhere(table, touched(table))
    rows = touched(table)
    assert np.array_equal(got.arrays["weight"][rows], stored(got.arrays["master"][rows], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 11])
@pytest.mark.parametrize("rule", ["SGD", "row-wise Adagrad", "Adam, rows' steps, decoupled decay, scale"])
def test_classes_that_are_no_row_are_skipped(rule, dim, dtype):
    table = Table(dtype=dtype, dim=dim, **RULES[rule])
    classes = np.array([-1, 3, -1, 4, 9, 19, 20, 2**40, -1, -(2**50)])
    check_everywhere(table, classes)
    nothing = np.full(9, -1)
    got = check_everywhere(table, nothing)
    assert got.bits() == table.bits()
    check_everywhere(table, np.zeros(0, np.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 24, 136])
@pytest.mark.parametrize(("gap", "lead"), [(1, 0), (3, 1), (8, 0), (16, 8), (8, 4)])
def test_rows_of_any_stride_and_alignment(gap, lead, dim, dtype):
    expected = Table(dtype=dtype, dim=dim, **ADAM_NUMBERS)
    classes, got = touched(expected), Table(dtype=dtype, dim=dim, gap=gap, lead=lead, **ADAM_NUMBERS)
    gradient = gradient_of(expected, len(classes))
    expected.take_step(gradient, classes)
    got = check_everywhere(got, classes, emulated.lay_out(gradient, dim + gap, lead))
    assert got.bits() == expected.bits()


def test_gradient_rows_that_are_one():
    table = Table(dim=24, **MOMENTUM)
    classes = touched(table)
    check_everywhere(table, classes, np.broadcast_to(gradient_of(table, 1), (len(classes), 24)))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dim", [1, 8, 13, 64, 270])
@pytest.mark.parametrize("rule", ["SGD", "Adagrad", "Adam"])
def test_rounding_at_random(rule, dim, dtype):
    """The float32 step, rounded by bits that a Philox of numpy's has drawn."""
    seed = (123456789012345, -987654321)
    table = Table(dtype=dtype, dim=dim, seed=seed, **RULES[rule])
    classes = touched(table)
    got = check_everywhere(table, classes)
    full = Table(dim=dim, **RULES[rule])
    full.arrays["weight"][:] = widened(table.arrays["weight"])
    full.take_step(widened(gradient_of(table, len(classes))).astype(np.float32), classes)
    bits = random_bits(seed, classes, dim)
    assert np.array_equal(got.arrays["weight"][classes], rounded_at_random(full.arrays["weight"][classes], bits, dtype))


def test_rounding_at_random_of_small_large_and_special_numbers():
    for dtype, values in (
        ("float16", [1e-8, -3e-6, 6e-5, 6.1e-5, 65504.0, 65519.0, 1e6, np.inf, -np.inf, 0.0, -0.0]),
        ("bfloat16", [1e-40, -3e-39, 1.18e-38, 3.3e38, np.inf, -np.inf, 0.0, -0.0]),
    ):
        n = len(values)
        table = Table(rows=200, dim=n, dtype=dtype, seed=(5, 6), mastered=False)
        table.arrays["weight"][:] = 0
        table.rate = -1.0
        # float32 values that the gradient cannot hold come from a scale, whose product is rounded once.
        gradient = np.ones((200, n)).astype(np.float32)
        gradient[:] = [value if np.isinf(value) or value == 0 else np.sign(value) for value in values]
        for d, value in enumerate(values):
            own = table.copy()
            own.scale = np.array([abs(value) if np.isfinite(value) and value else 1.0], np.float32)
            own.take_step(stored(gradient, dtype), None)
            got = widened(own.arrays["weight"])[:, d]
            exact = np.float64(np.float32(value))
            if np.isinf(value) or value == 0:
                assert (got == value).all()
                continue
            bits = random_bits((5, 6), np.arange(200), n)[:, d]
            if dtype == "float16" and abs(value) > 65504:
                assert set(np.unique(got)) <= {65504.0, np.inf}
                assert value > 65536 or len(set(got)) == 2 or value < 65508
                continue
            truth = widened(rounded_at_random(np.full(200, exact), bits, dtype))
            assert np.array_equal(got, truth), (dtype, value)


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_at_random_is_right_on_average_and_to_nearest_without_a_seed(dtype):
    table = Table(rows=3, dim=10, dtype=dtype)
    gradient, full = gradient_of(table, 3), Table(rows=3, dim=10)
    full.arrays["weight"][:] = widened(table.arrays["weight"])
    full.take_step(widened(gradient).astype(np.float32), None)
    exact, n = widened(full.arrays["weight"]), 800
    results = []
    for seed in range(n):
        own = table.copy()
        own.seed = (seed, 17)
        own.take_step(gradient, None)
        results.append(widened(own.arrays["weight"]))
    low, high = np.min(results, 0), np.max(results, 0)
    assert ((low <= exact) & (exact <= high)).all()
    deviation = np.sqrt((exact - low) * (high - exact) / n)
    assert (np.abs(np.mean(results, 0) - exact) <= 5 * deviation + 2.0**-13 * (high - low)).all()
    nearest = table.copy()
    nearest.take_step(gradient, None)
    assert np.array_equal(nearest.arrays["weight"], stored(full.arrays["weight"], dtype))


def test_a_seed_is_not_looked_at_where_there_is_a_master_copy():
    table = Table(dtype="bfloat16", mastered=True)
    gradient = gradient_of(table, table.rows)
    expected, got = table.copy(), table.copy()
    got.seed = (1, 2)
    expected.take_step(gradient, None)
    got.take_step(gradient, None)
    assert got.bits() == expected.bits()


def test_steps_one_after_the_other():
    """Counters and decay are those of each row's own touches."""
    table = Table(rows=30, dim=10, dtype="float64", **RULES["Adam, rows' steps, decoupled decay, scale"])
    for step in range(1, 6):
        before = table.copy()
        classes = touched(table, 0.4, seed=step)
        table.step, table.log_decay = step, -0.01 * step
        before.step, before.log_decay = table.step, table.log_decay
        gradient = gradient_of(table, len(classes), seed=step)
        table.take_step(gradient, classes)
        table.check(before, classes, gradient)


def test_not_a_number_stays_in_its_row():
    table = Table(dim=40, **ROWWISE_NUMBERS)
    gradient = gradient_of(table, table.rows)
    expected = table.copy()
    expected.take_step(gradient, None)
    gradient[3, 7] = np.nan
    table.take_step(gradient, None)
    others = np.arange(table.rows) != 3
    assert np.array_equal(table.arrays["weight"][others], expected.arrays["weight"][others])
    assert np.isnan(table.arrays["weight"][3]).all()


def test_rows_more_than_2_to_31_elements_apart():
    table = Table(rows=2, dim=24, dtype="bfloat16", **MOMENTUM)
    gradient = gradient_of(table, 2)
    far = table.copy()
    far.arrays["weight"] = emulated.far_apart(far.arrays["weight"], 2**31 + 8)
    table.take_step(gradient, None)
    far.take_step(emulated.far_apart(gradient, 2**31 + 8), None)
    assert np.array_equal(far.arrays["weight"], table.arrays["weight"])
    assert np.array_equal(far.arrays["first"], table.arrays["first"])
