"""Steps fused with the row gradient, and its norm, of csrc/cuda: against sums and formulas in float64,
against the two kernels one after the other, and the same bits however they are launched."""

from __future__ import annotations

import itertools

import emulated
import numpy as np
import pytest
from emulated import DTYPES, assert_same_bits, stored, widened
from pairs import SEGMENTS, Pairs, random_ids, segments
from rounding import assert_rounded
from steps import ADAM_NUMBERS, MOMENTUM, ROWWISE, ROWWISE_NUMBERS, RULES, Table, random_bits, rounded_at_random

NARROW = ["bfloat16", "float16"]
SEVERAL = ["SGD", "row-wise Adagrad, coupled decay, maximize", "Adam, rows' steps, decoupled decay, scale"]


def narrower(table: Table, pairs: Pairs) -> list[int]:
    """Accesses that are possible, the widest first."""
    got = table.copy()
    try:
        got.take_fused_step(pairs, access=16)
    except ValueError:
        return [0]
    return [16, 0]


def check_outputs(pairs: Pairs, got: dict[str, np.ndarray]) -> np.ndarray:
    """Padded classes and bias; the classes that are touched."""
    classes, values, sizes = pairs.sums()
    n = min(pairs.ids.size, pairs.classes)
    assert np.array_equal(got["classes"], np.concatenate([classes, np.full(n - len(classes), -1)]))
    assert not widened(got["bias"])[len(classes) :].any()
    assert len(got["bias"]) == n
    bias = widened(got["bias"])[: len(classes), None]
    assert_rounded(bias, values["bias"], pairs.dtype, "bias", sizes["bias"])
    return classes


def check_everywhere(table: Table, pairs: Pairs, **run) -> Table:
    got = table.copy()
    outputs = got.take_fused_step(pairs, **run)
    classes = check_outputs(pairs, outputs)
    if table.seed is None:
        _, values, sizes = pairs.sums()
        got.check(table, classes, values["rows"], sizes["rows"])
    launches = itertools.product(narrower(table, pairs), (1, 3))
    for order, (access, grid) in enumerate(launches, 1):
        again = table.copy()
        launch = {"access": access, "grid": grid, "warps": (8, 1, 4)[order % 3], "order": order}
        assert_same_bits(again.take_fused_step(pairs, **launch, **run), outputs, launch)
        assert again.bits() == got.bits(), launch
    return got


def problem(dim: int, dtype: str, rule: str, ids=None, hidden: str | None = None, classes: int = 40, **table):
    ids = random_ids(23, 7, classes) if ids is None else ids
    pairs = Pairs(ids, classes=classes, dim=dim, dtype=dtype, hidden_dtype=hidden)
    return Table(rows=classes, dim=dim, dtype=dtype, **{**RULES[rule], **table}), pairs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dim", [24, 13])
def test_every_rule_and_dtype(dim, rule, dtype):
    check_everywhere(*problem(dim, dtype, rule))


@pytest.mark.parametrize("rule", SEVERAL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 31, 64, 100, 128, 129, 256, 300, 513])
def test_every_width(dim, dtype, rule):
    check_everywhere(*problem(dim, dtype, rule))


@pytest.mark.parametrize("hidden", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", SEVERAL)
@pytest.mark.parametrize("dim", [20, 264])
def test_hidden_and_weight_of_different_dtypes(dim, rule, dtype, hidden):
    check_everywhere(*problem(dim, dtype, rule, hidden=hidden))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rule", SEVERAL)
def test_a_master_copy(rule, dtype):
    table, pairs = problem(24, dtype, rule, mastered=True)
    got = check_everywhere(table, pairs)
    rows = pairs.sums()[0]
    assert np.array_equal(got.arrays["weight"][rows], stored(got.arrays["master"][rows], dtype))


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("rule", SEVERAL)
def test_segments_across_tiles(rule, name):
    ids = segments(*SEGMENTS[name], absent=3)
    check_everywhere(*problem(5, "float32", rule, ids, classes=len(SEGMENTS[name])), tile_pairs=64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 140), ("bfloat16", 300), ("float64", 129), ("float16", 3)])
def test_hot_rows_and_rows_across_a_few_tiles(dtype, dim, rule):
    table, pairs = problem(dim, dtype, rule, segments(3, 32 * 37 + 5, 80, 40, absent=9), classes=4)
    got, expected = table.copy(), None
    got.take_fused_step(pairs, tile_pairs=32)
    classes, values, sizes = pairs.sums()
    got.check(table, classes, values["rows"], sizes["rows"])
    for order in range(1, 4):
        again = table.copy()
        again.take_fused_step(pairs, tile_pairs=32, grid=order % 3, order=order)
        expected = expected or got.bits()
        assert again.bits() == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dim", [12, 300])
def test_equal_to_the_gradient_followed_by_a_step(dim, rule, dtype):
    """Bit for bit, but for row-wise Adagrad, whose sum of squares is added up in another order."""
    table, pairs = problem(dim, dtype, rule, segments(3, 64 * 37 + 5, 100, *(1,) * 30, absent=9), classes=33)
    fused, apart = table.copy(), table.copy()
    fused.take_fused_step(pairs, tile_pairs=64)
    gradient = pairs.run(tile_pairs=64)
    apart.take_step(gradient["rows"], gradient["classes"])
    for name, array in fused.arrays.items():
        if array is not None and table.rule == ROWWISE and name in ("weight", "second"):
            np.testing.assert_allclose(
                array, apart.arrays[name], rtol=64 * np.finfo(dtype).eps, atol=64 * np.finfo(dtype).eps
            )
        elif array is not None:
            assert np.array_equal(array, apart.arrays[name]), name


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("hidden", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [8, 13, 300])
def test_rounding_at_random(dim, hidden, dtype):
    """Rows that end in their tile, and rows that are joined: the float32 step, rounded by a Philox of numpy's."""
    seed, ids = (-5, 2**40 + 3), segments(3, 200, 70, *(1,) * 9)
    table, pairs = problem(dim, dtype, "SGD", ids, hidden=hidden, classes=12, seed=seed)
    got = check_everywhere(table, pairs, tile_pairs=64)
    full = Table(rows=12, dim=dim)
    full.arrays["weight"][:] = widened(table.arrays["weight"])
    full.take_fused_step(pairs, tile_pairs=64)
    bits = random_bits(seed, np.arange(12), dim)
    assert np.array_equal(got.arrays["weight"], rounded_at_random(full.arrays["weight"], bits, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 24, 264])
def test_operands_of_any_stride_and_alignment(dim, dtype):
    table, pairs = problem(dim, dtype, "Adam")
    expected = table.copy()
    expected.take_fused_step(pairs)
    for gap, lead, own_gap, own_lead in ((0, 1, 0, 0), (8, 4, 8, 0), (0, 0, 3, 1), (16, 8, 16, 8), (0, 0, 0, 4)):
        table, pairs = problem(dim, dtype, "Adam", gap=own_gap, lead=own_lead)
        pairs.hidden = emulated.lay_out(pairs.hidden, dim + gap, lead)
        pairs.grad_loss = np.repeat(pairs.grad_loss, 3)[1::3]
        got = check_everywhere(table, pairs)
        assert got.bits() == expected.bits()


@pytest.mark.parametrize("rule", SEVERAL)
@pytest.mark.parametrize("batch", [1, 64, 200])
def test_no_pair_has_a_class(batch, rule):
    table, pairs = problem(9, "float32", rule, np.full((batch, 3), -1))
    assert check_everywhere(table, pairs).bits() == table.bits()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_pairs(shape):
    table, pairs = problem(9, "float32", "Adam", np.zeros(shape, np.int32))
    before = table.bits()
    assert [array.shape for array in table.take_fused_step(pairs).values()] == [(0,), (0,)]
    assert table.bits() == before
    assert emulated.kernels().row_grad_norm(pairs.ids, pairs.dlogit, pairs.grad_loss, pairs.hidden, 40)[0] == 0


def test_without_the_bias():
    table, pairs = problem(24, "float32", "momentum")
    expected = table.copy()
    expected.take_fused_step(pairs)
    assert table.take_fused_step(pairs, with_bias=False)["bias"].shape == (0,)
    assert table.bits() == expected.bits()


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 641])
def test_pairs_belong_to_their_examples(columns):
    check_everywhere(*problem(20, "float32", "momentum", random_ids(3, columns, 40, seed=columns)))


def norm(pairs: Pairs, **run) -> np.ndarray:
    operands = (pairs.ids, pairs.dlogit, pairs.grad_loss, pairs.hidden)
    return emulated.kernels().row_grad_norm(*operands, pairs.classes, **run)


def check_norm(pairs: Pairs, **run) -> None:
    _, values, sizes = pairs.sums()
    names = [name for name, key in (("rows", "with_rows"), ("bias", "with_bias")) if run.get(key, True)]
    truth = np.array([sum((values[name] ** 2).sum() for name in names)])
    scale = np.array([sum((2 * np.abs(values[name]) * sizes[name]).sum() for name in names)])
    got = norm(pairs, **run)
    assert_rounded(got, truth, emulated.compute_dtype(pairs.dtype), "norm", scale)
    for order, (grid, warps) in enumerate(itertools.product((1, 3), (1, 8)), 1):
        launch = {"grid": grid, "warps": warps, "order": order}
        assert norm(pairs, **launch, **run).tobytes() == got.tobytes()
    assert norm(pairs, access=0, **run).tobytes() == got.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 31, 100, 129, 300, 513])
def test_norm_of_every_dtype_and_width(dim, dtype):
    pairs = Pairs(random_ids(23, 7, 40), dim=dim, dtype=dtype)
    for with_rows, with_bias in ((True, True), (True, False), (False, True), (False, False)):
        check_norm(pairs, with_rows=with_rows, with_bias=with_bias)


@pytest.mark.parametrize("name", SEGMENTS)
def test_norm_of_segments_across_tiles(name):
    pairs = Pairs(segments(*SEGMENTS[name], absent=3), classes=len(SEGMENTS[name]), dim=140)
    check_norm(pairs, tile_pairs=64)


def test_norm_of_more_rows_than_parts():
    check_norm(Pairs(np.random.default_rng(1).permutation(3000).reshape(600, 5), classes=3000, dim=3))


def test_norm_neither_overflows_nor_underflows():
    for factor in (1e25, 1e-25):
        pairs = Pairs(random_ids(23, 7, 40))
        pairs.dlogit *= np.float32(factor)
        check_norm(pairs)


def test_norm_is_not_a_number_where_the_gradient_is_not():
    for value, expected in ((np.nan, np.nan), (np.inf, np.inf)):
        pairs = Pairs(np.arange(6).reshape(6, 1), dim=5)
        pairs.hidden[:] = 1
        pairs.dlogit[2] = value
        np.testing.assert_equal(norm(pairs)[0], expected)


@pytest.mark.parametrize("rules", [MOMENTUM, ADAM_NUMBERS, ROWWISE_NUMBERS])
def test_hidden_and_weight_rows_more_than_2_to_31_elements_apart(rules):
    pairs = Pairs(random_ids(2, 50, 2), classes=2, dim=24, dtype="bfloat16")
    table = Table(rows=2, dim=24, dtype="bfloat16", **rules)
    expected, far = table.copy(), table.copy()
    expected.take_fused_step(pairs)
    pairs.hidden = emulated.far_apart(pairs.hidden, 2**31 + 8)
    far.arrays["weight"] = emulated.far_apart(far.arrays["weight"], 2**31 + 8)
    far.take_fused_step(pairs)
    assert np.array_equal(far.arrays["weight"], expected.arrays["weight"])
