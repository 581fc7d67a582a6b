"""The row gradient of csrc/cuda against sums in float64, and that it repeats bit for bit however it is launched."""

from __future__ import annotations

import itertools

import emulated
import numpy as np
import pytest
from emulated import DTYPES, Problem, assert_same_bits, widened
from pairs import SEGMENTS, Pairs, random_ids, segments
from rounding import assert_rounded


def check_everywhere(pairs: Pairs, **run) -> dict[str, np.ndarray]:
    """Right in every layout; the same bits for every access, grid, block and order of threads."""
    results = {}
    for layout in ("exact", "padded", "dense"):
        got = results[layout] = pairs.run(layout, **run)
        pairs.check(got, layout)
        launches = itertools.product(emulated.accesses(pairs.hidden), (1, 3))
        for order, (access, grid) in enumerate(launches, 1):
            launch = {"access": access, "grid": grid, "warps": (8, 1, 4)[order % 3], "order": order}
            assert_same_bits(pairs.run(layout, **launch, **run), got, launch)
    exact, n = results["exact"], len(results["exact"]["classes"])
    for name in exact.keys() - {"classes"}:
        assert results["padded"][name][:n].tobytes() == exact[name].tobytes()
        assert results["dense"][name][exact["classes"]].tobytes() == exact[name].tobytes()
    return exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 31, 64, 100, 127, 128, 129, 256, 300, 513])
def test_every_dtype_and_width(dtype, dim):
    check_everywhere(Pairs(random_ids(23, 7, 40), dim=dim, dtype=dtype))


@pytest.mark.parametrize("hidden", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [20, 264])
def test_hidden_and_gradient_of_different_dtypes(dtype, hidden, dim):
    check_everywhere(Pairs(random_ids(23, 7, 40), dim=dim, dtype=dtype, hidden_dtype=hidden))


@pytest.mark.parametrize("tile_pairs", [32, 64, 256])
@pytest.mark.parametrize("pairs", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000])
def test_every_number_of_pairs(pairs, tile_pairs):
    check_everywhere(Pairs(random_ids(pairs, 1, 40, seed=pairs), seed=pairs), tile_pairs=tile_pairs)


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("absent", [0, 1, 100])
def test_segments_across_tiles(name, absent):
    lengths = SEGMENTS[name]
    got = check_everywhere(Pairs(segments(*lengths, absent=absent), classes=len(lengths)), tile_pairs=64)
    assert np.array_equal(got["classes"], np.arange(len(lengths)))


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 140), ("bfloat16", 300), ("float64", 129), ("float16", 3)])
@pytest.mark.parametrize("tile_pairs", [64, 256])
def test_a_hot_row_that_the_whole_block_adds_up(dtype, dim, tile_pairs):
    pairs = Pairs(segments(3, tile_pairs * 37 + 5, 40, absent=9), classes=3, dim=dim, dtype=dtype)
    got = pairs.run(tile_pairs=tile_pairs)
    pairs.check(got)
    for order in range(1, 5):
        assert_same_bits(pairs.run(tile_pairs=tile_pairs, grid=order % 3, order=order), got)


@pytest.mark.parametrize(("lengths", "dim", "grid"), [((64 * 40,), 300, 5), ((64 * 35, 64 * 36), 3, 4)])
def test_a_block_that_adds_up_one_long_segment_after_another(lengths, dim, grid):
    """Of a block's groups of 8 tiles each next one has such a segment, so that shared memory is used again at once."""
    pairs = Pairs(segments(*lengths), classes=len(lengths), dim=dim)
    expected = pairs.run(tile_pairs=64)
    pairs.check(expected)
    for order in range(20):
        assert_same_bits(pairs.run(tile_pairs=64, grid=grid, order=order), expected)


def test_the_order_of_a_sum_is_that_of_the_pairs():
    """1e8 - 1e8 + 1 is 1 in this order only: within a tile, and across a few tiles."""
    for length in (3, 33, 300):
        pairs = Pairs(np.zeros((length, 1)), classes=1, dim=1)
        pairs.hidden[:] = pairs.grad_loss[:] = 1
        pairs.dlogit[:] = 0
        pairs.dlogit[[0, length // 2, length - 1], 0] = [1e8, -1e8, 1]
        assert pairs.run()["rows"][0, 0] == pairs.run()["bias"][0] == 1


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 8, 255, 256, 257, 65536, 2**20, 2**31 - 1])
def test_absent_pairs_sort_last_whatever_the_number_of_classes(classes):
    """The sort looks at as many bits as V has; the last class and the id -1 must still differ."""
    ids = random_ids(40, 3, min(classes, 20), absent=0.4)
    ids[::7] = classes - 1
    pairs = Pairs(ids, classes=classes)
    pairs.classes = classes
    got = pairs.run()
    known, counts = np.unique(ids[ids >= 0], return_counts=True)
    assert np.array_equal(got["classes"], known)
    assert counts.sum() == (ids >= 0).sum()
    if classes <= 65536:
        pairs.check(got)
        pairs.check(pairs.run("padded"), "padded")
        pairs.check(pairs.run("dense"), "dense")


@pytest.mark.parametrize("batch", [1, 64, 65, 200])
def test_no_pair_has_a_class(batch):
    pairs = Pairs(np.full((batch, 3), -1))
    check_everywhere(pairs)
    assert not any(array.any() for layout in ("padded", "dense") for array in pairs.run(layout).values())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_pairs(shape):
    pairs = Pairs(np.zeros(shape, np.int32))
    assert [array.shape for array in pairs.run("exact").values()] == [(0,), (0, 5), (0,)]
    assert [array.shape for array in pairs.run("padded").values()] == [(0,), (0, 5), (0,)]
    dense = pairs.run("dense")
    assert [array.shape for array in dense.values()] == [(40, 5), (40,)]
    assert not dense["rows"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_either_gradient_alone(dtype):
    pairs = Pairs(random_ids(100, 7, 40), dim=33, dtype=dtype)
    for layout in ("exact", "padded", "dense"):
        both = pairs.run(layout)
        for other in ("bias", "rows"):
            got = pairs.run(layout, **{f"with_{other}": False}, order=3)
            assert_same_bits(got, {name: array for name, array in both.items() if name != other})


def test_padding_that_is_as_large_as_the_gradient():
    """No row to spare, and all but one."""
    pairs = Pairs(np.arange(30).reshape(10, 3), classes=30, dim=9)
    pairs.check(pairs.run("padded"), "padded")
    pairs = Pairs(np.full((50, 3), 7), classes=40, dim=9)
    got = pairs.run("padded")
    pairs.check(got, "padded")
    assert np.count_nonzero(got["classes"]) == np.count_nonzero(got["bias"]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 24, 264])
def test_operands_of_any_stride_and_alignment(dtype, dim):
    expected = Pairs(random_ids(23, 7, 40), dim=dim, dtype=dtype).run()
    for gap, first in ((0, 1), (3, 0), (4, 2), (8, 4), (16, 8)):
        pairs = Pairs(random_ids(23, 7, 40), dim=dim, dtype=dtype)
        pairs.hidden = emulated.lay_out(pairs.hidden, dim + gap, first)
        pairs.grad_loss = np.repeat(pairs.grad_loss, 3)[1::3]
        for access in emulated.accesses(pairs.hidden):
            assert_same_bits(pairs.run(access=access), expected, (gap, first, access))
    pairs = Pairs(random_ids(23, 7, 40), dim=dim, dtype=dtype)
    pairs.hidden = np.broadcast_to(pairs.hidden[:1], pairs.hidden.shape)
    pairs.grad_loss = np.broadcast_to(pairs.grad_loss[:1], pairs.grad_loss.shape)
    pairs.check(pairs.run())


def test_hidden_rows_more_than_2_to_31_elements_apart():
    pairs = Pairs(random_ids(2, 50, 7), classes=7, dim=24, dtype="bfloat16")
    expected = pairs.run()
    pairs.check(expected)
    pairs.hidden = emulated.far_apart(pairs.hidden, 2**31 + 8)
    assert_same_bits(pairs.run(), expected)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 641])
def test_pairs_belong_to_their_examples(columns):
    check_everywhere(Pairs(random_ids(3, columns, 40, seed=columns)))


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("bfloat16", 72), ("float16", 100), ("float64", 300)])
def test_the_whole_backward_pass(dtype, dim):
    """From the forward pass's ids and dlogit to the rows of the table: the oracle's gradients."""
    problem = Problem(
        batch=12, dim=dim, targets=3, negatives=20, dtype=dtype, ignored=0.3,
        options={"remove_hits": True, "mean_candidates": True},
    )  # fmt: skip
    expected, forward = problem.expected(), problem.run()
    pairs = Pairs(forward["ids"], classes=problem.classes, dim=dim, dtype=dtype)
    pairs.dlogit, pairs.hidden = forward["dlogit"], problem.hidden
    pairs.grad_loss = np.broadcast_to(np.ones(1, pairs.grad_loss.dtype), 12)
    got = pairs.run("dense")
    for name in ("rows", "bias"):
        assert_rounded(widened(got[name]), getattr(expected, name), dtype, name, expected.scale[name])
