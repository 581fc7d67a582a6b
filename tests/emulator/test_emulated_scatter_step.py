"""The racy scatter of gradient rows, of csrc/cuda, against sums in float64."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import widened
from pairs import Pairs, random_ids
from rounding import assert_rounded

RATE = 0.3


def check(pairs: Pairs, *, gap: int = 0, lead: int = 0, with_bias: bool = True, **launch) -> np.ndarray:
    random = np.random.default_rng(8)
    start = random.standard_normal((pairs.classes, pairs.dim)).astype(np.float32)
    weight = emulated.lay_out(start, pairs.dim + gap, lead)
    bias = random.standard_normal(pairs.classes).astype(np.float32) if with_bias else None
    start_bias = None if bias is None else bias.copy()
    operands = (pairs.ids, pairs.dlogit, pairs.grad_loss, pairs.hidden)
    emulated.kernels().scatter_step(*operands, weight, bias, RATE, **launch)
    touched, values, sizes = pairs.sums()
    others = np.setdiff1d(np.arange(pairs.classes), touched)
    rate = np.float64(np.float32(RATE))
    for name, before, after in (("rows", start, weight), ("bias", start_bias, bias)):
        if after is None:
            continue
        before, after = before.reshape(pairs.classes, -1), after.reshape(pairs.classes, -1)
        assert after[others].tobytes() == before[others].tobytes()
        truth = before[touched] - rate * values[name]
        # Each addition rounds the weight, as often as its class occurs.
        terms = np.array([(pairs.ids == c).sum() for c in touched])[:, None]
        scale = (np.abs(before[touched]) + rate * sizes[name]) * (1 + terms / 16)
        assert_rounded(after[touched].astype(np.float64), truth, "float32", name, scale)
    return weight


@pytest.mark.parametrize("hidden", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [1, 3, 4, 8, 31, 32, 33, 64, 65, 100, 128, 129, 132, 300, 512, 513, 516, 1030])
def test_every_width(dim, hidden):
    pairs = Pairs(random_ids(9, 7, 40), dim=dim, hidden_dtype=hidden)
    check(pairs)
    check(pairs, access=0, grid=1, warps=1, order=1)
    check(pairs, grid=3, warps=4, order=2, with_bias=False)
    check(pairs, gap=4, lead=4)
    check(pairs, gap=1, lead=1)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("dim", [6, 40, 72, 140])
def test_every_number_of_columns(dim, columns):
    check(Pairs(random_ids(5, columns, 40, absent=0.3), dim=dim))


def test_hidden_of_any_stride_and_alignment():
    for gap, lead in ((0, 1), (3, 0), (4, 4), (8, 2)):
        pairs = Pairs(random_ids(9, 7, 40), dim=24)
        pairs.hidden = emulated.lay_out(pairs.hidden, 24 + gap, lead)
        pairs.grad_loss = np.repeat(pairs.grad_loss, 3)[1::3]
        check(pairs)


def test_equal_additions_whatever_the_access():
    """Of distinct classes, so that nothing depends on the order."""
    pairs = Pairs(np.random.default_rng(1).permutation(40)[:35].reshape(5, 7), dim=132)
    assert check(pairs).tobytes() == check(pairs, access=0, order=3).tobytes()


def test_a_hot_row():
    check(Pairs(np.zeros((40, 50)), classes=3, dim=20))


def test_ids_that_are_no_class_are_skipped():
    pairs = Pairs(random_ids(9, 7, 40), dim=20)
    pairs.ids[2, 3], pairs.ids[4, :] = 40, 2**31 - 1
    weight = np.zeros((40, 20), np.float32)
    bias = np.zeros(40, np.float32)
    emulated.kernels().scatter_step(pairs.ids, pairs.dlogit, pairs.grad_loss, pairs.hidden, weight, bias, 1.0)
    pairs.ids[pairs.ids >= 40] = -1
    touched, values, sizes = pairs.sums()
    assert_rounded(widened(-weight[touched]), values["rows"], "float32", "rows", sizes["rows"])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_pairs(shape):
    check(Pairs(np.zeros(shape, np.int32)))


def test_rows_more_than_2_to_31_elements_apart():
    pairs = Pairs(random_ids(2, 50, 2), classes=2, dim=24)
    start = np.zeros((2, 24), np.float32)
    operands = (pairs.ids, pairs.dlogit, pairs.grad_loss)
    emulated.kernels().scatter_step(*operands, pairs.hidden, start, None, 1.0, grid=1)
    far = emulated.far_apart(np.zeros((2, 24), np.float32), 2**31 + 4)
    emulated.kernels().scatter_step(*operands, emulated.far_apart(pairs.hidden, 2**31 + 4), far, None, 1.0, grid=1)
    np.testing.assert_allclose(far, start, rtol=1e-5, atol=1e-6)
