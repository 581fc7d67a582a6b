"""The fused forward pass of csrc/cuda against the float64 oracle, and that nothing of a launch changes a bit of it."""

from __future__ import annotations

import itertools

import emulated
import numpy as np
import pytest
from emulated import DTYPES, IGNORE, LAST_DIMS, Problem, assert_same_bits

# Both ends of every shape, and odd numbers in between.
DIMS = {
    dtype: sorted({1, 3, 5, 8, 17, 31, 33, 50, 100, 300, *last, *(dim + 1 for dim in last[:-1])})
    for dtype, last in LAST_DIMS.items()
}
WARPS = (1, 2, 4)


def check_everywhere(problem: Problem, **run) -> dict[str, np.ndarray]:
    """Right, and the same bits for every access that the rows allow, grid, block and order of threads."""
    widths = emulated.accesses(problem.weight)
    got = problem.run(access=widths[0], **run)
    problem.check(got)
    split = emulated.row_shape(problem.dtype, problem.dim)[3]  # all warps of a block share an example
    warps = (0,) if split else WARPS
    for order, (access, n_warps) in enumerate(itertools.product(widths, warps), 1):
        launch = {"access": access, "warps": n_warps, "grid": order % 3, "order": order}
        assert_same_bits(problem.run(**launch, **run), got, launch)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dimensions_of_these_tests_are_those_of_all_shapes(dtype):
    shapes = [emulated.row_shape(dtype, dim) for dim in range(1, 16385)]
    last = [dim for dim, (own, following) in enumerate(itertools.pairwise(shapes), 1) if own != following]
    assert [*last, 16384] == LAST_DIMS[dtype]


@pytest.mark.parametrize(("dtype", "dim"), [(dtype, dim) for dtype in DTYPES for dim in DIMS[dtype]])
def test_every_shape_and_access(dtype, dim):
    large = dim > 4096
    problem = Problem(
        batch=2 if large else 5, dim=dim, classes=11 if large else 29, targets=1 if large else 2,
        negatives=3 if large else 9, dtype=dtype, seed=dim, ignored=0.0 if large else 0.2,
        options={"offset": 1.5, "remove_hits": True},
    )  # fmt: skip
    problem.poison_unused()
    check_everywhere(problem)


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("bfloat16", 72), ("float64", 9), ("float32", 520)])
@pytest.mark.parametrize("targets", [1, 2, 33, 40])
@pytest.mark.parametrize("negatives", [0, 1, 31, 32, 33, 100])
def test_every_number_of_columns(dtype, dim, targets, negatives):
    given = ("", "rows", "shared")[(targets + negatives) % 3]
    options = {"remove_hits": negatives % 2 == 0, "uniform_labels": targets % 2 == 0, "mean_candidates": targets > 1}
    problem = Problem(
        batch=3, dim=dim, targets=targets, negatives=negatives, dtype=dtype, given=given, ignored=0.4,
        seed=100 * targets + negatives, options=options,
    )  # fmt: skip
    problem.poison_unused()
    got = problem.run()
    problem.check(got)
    assert_same_bits(problem.run(grid=1, order=5), got)


def random_problem(seed: int) -> Problem:
    random = np.random.default_rng([seed, 7])
    pick = lambda *values: values[random.integers(len(values))]  # noqa: E731
    dtype = pick(*DTYPES)
    options = {name: bool(random.integers(2)) for name in ("remove_hits", "uniform_labels", "mean_candidates")}
    options |= {"subtract_log_q": bool(random.random() < 0.7), "offset": pick(0.0, -2.25, 6.5)}
    return Problem(
        batch=pick(1, 2, 9), dim=pick(1, 2, 7, 24, 65, 130, 260, 1030), classes=pick(1, 2, 7, 60),
        targets=pick(1, 1, 3, 35), negatives=pick(0, 1, 6, 40, 70), dtype=dtype, hidden_dtype=pick(None, dtype),
        noise=pick("uniform", "log uniform", "alias"), given=pick("", "", "rows", "shared"),
        given_log_q=pick(False, True), with_bias=pick(False, True), log_z=pick(False, True),
        ignored=pick(0.0, 0.3, 1.0), seed=seed, options=options,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(80))
def test_options_together(seed):
    problem = random_problem(seed)
    problem.poison_unused()
    got = problem.run()
    problem.check(got)
    assert_same_bits(problem.run(grid=2, order=seed), got)


@pytest.mark.parametrize("weight", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("hidden", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [7, 24, 520, 1100])
def test_hidden_and_weight_of_different_dtypes(hidden, weight, dim):
    problem = Problem(dim=dim, dtype=weight, hidden_dtype=hidden)
    problem.poison_unused()
    check_everywhere(problem)


@pytest.mark.parametrize("noise", ["uniform", "log uniform", "alias"])
@pytest.mark.parametrize("negatives", [5, 33, 100])
@pytest.mark.parametrize("targets", [1, 40])
def test_drawn_ids_are_those_of_the_seed(noise, negatives, targets):
    problem = Problem(batch=9, dim=3, classes=1000, targets=targets, negatives=negatives, noise=noise)
    ids = problem.law.draw(problem.seed_words, 9, negatives)
    assert np.array_equal(problem.run()["ids"], np.concatenate([problem.target, ids], 1))
    strided = np.zeros(8, np.int64)
    strided[1::6] = problem.seed_words
    assert_same_bits(problem.run(seed=strided[1::6]), problem.run())
    problem.check(problem.run())


def test_hits_in_every_tile_of_every_target():
    """Few classes: in each 32 columns some negative is the first, the last or an ignored target."""
    problem = Problem(batch=6, classes=9, targets=35, negatives=100, given="rows", options={"remove_hits": True})
    problem.target[:] = IGNORE
    problem.target[:, 0] = np.arange(6)
    problem.target[::2, 34] = 8
    got = check_everywhere(problem)
    hits = problem.given_ids == problem.target[:, :1]
    hits[::2] |= problem.given_ids[::2] == 8
    for tile in range(0, 100, 25):
        assert hits[:, tile : tile + 25].any(1).all()
    assert not got["dlogit"][:, 35:][hits].any()
    assert got["dlogit"][:, 35:][~hits].all()
    assert np.array_equal(got["ids"][:, 35:], problem.given_ids)


def test_duplicates_count_each():
    problem = Problem(classes=2, targets=3, negatives=70, given="rows")
    problem.target[:] = 1
    problem.given_ids[:, 1::2] = 0
    got = check_everywhere(problem)
    assert len(np.unique(got["dlogit"][0, :3])) == 1


@pytest.mark.parametrize("remove_hits", [False, True])
@pytest.mark.parametrize("noise", ["uniform", "log uniform", "alias"])
def test_one_class(noise, remove_hits):
    problem = Problem(classes=1, negatives=40, noise=noise, options={"remove_hits": remove_hits})
    got = check_everywhere(problem)
    assert np.count_nonzero(got["dlogit"]) == 3 * (1 if remove_hits else 41)


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("float64", 700), ("bfloat16", 2000)])
def test_empty_problems(dtype, dim):
    empty = Problem(batch=0, dim=dim, dtype=dtype).run()
    assert [empty[name].shape for name in ("loss", "ids", "grad_hidden")] == [(0,), (0, 6), (0, dim)]
    for targets, negatives in ((0, 0), (0, 3), (0, 40)):
        got = Problem(targets=targets, negatives=negatives, dim=dim, dtype=dtype).run()
        assert got["ids"].shape == (3, negatives)
        assert (got["ids"] == -1).all()
        assert not any(got[name].any() for name in ("loss", "dlogit", "grad_hidden"))


@pytest.mark.parametrize("targets", [1, 3, 40])
@pytest.mark.parametrize(("dtype", "dim"), [("float16", 20), ("float32", 600), ("float64", 4100)])
def test_examples_without_targets(dtype, dim, targets):
    for ignore in (IGNORE, 4, -1):
        problem = Problem(batch=4, dim=dim, classes=6, targets=targets, negatives=34, dtype=dtype, given="rows",
                          options={"ignore_index": ignore, "remove_hits": True})  # fmt: skip
        problem.target[problem.target == ignore] = 5
        problem.target[::2] = ignore
        problem.target[1, 0] = ignore  # of the target that is ignored no negative is a hit
        problem.poison_unused()
        got = check_everywhere(problem) if dim == 20 else problem.run()
        problem.check(got)
        assert (got["ids"][::2] == -1).all()


BAD_IDS = [-1, -5, 50, 51, 2**31 - 1, 2**31, 2**32, 2**32 + 3, -(2**63), 2**63 - 1]


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("float32", 600), ("bfloat16", 7), ("float64", 300)])
@pytest.mark.parametrize("column", [0, 1, 31, 32, 38, 39, 40, 63, 64, 70, 139])
def test_an_id_out_of_range_spoils_its_example_alone(column, dtype, dim):
    """In a target or in a given negative of any tile; and nothing is read at such an id."""
    problem = Problem(batch=5, dim=dim, classes=50, targets=40, negatives=100, dtype=dtype, given="rows", ignored=0.3)
    columns = [problem.target[1:4], problem.given_ids[1:4]]
    for which, example in enumerate((1, 3)):
        rows = columns[column >= 40]
        rows[example - 1, column % 40 if column < 40 else column - 40] = BAD_IDS[(column + 5 * which) % len(BAD_IDS)]
    problem.poison_unused()
    got = problem.run(order=column)
    problem.check(got)
    assert np.array_equal(np.isnan(got["loss"]), [False, True, False, True, False])
    assert (got["ids"][[1, 3]] == -1).all()
    assert not got["dlogit"][[1, 3]].any()
    assert not got["grad_hidden"][[1, 3]].any()
    assert_same_bits(problem.run(grid=1), got)


def test_bad_ids_of_examples_without_targets_are_not_looked_at():
    problem = Problem(batch=3, negatives=40, given="rows")
    problem.target[1] = IGNORE
    problem.given_ids[1] = 10**6
    problem.check(problem.run())


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("column", [0, 2, 34, 35, 66, 67, 100, 134])
def test_a_given_log_q_that_is_not_finite_is_bad(column, value):
    for subtract in (True, False):
        problem = Problem(batch=3, targets=35, negatives=100, given="rows", given_log_q=True,
                          options={"subtract_log_q": subtract})  # fmt: skip
        problem.target[:, 1] = IGNORE
        problem.target_log_q[:, 1] = -np.inf  # of a target that is not there
        log_q = problem.target_log_q if column < 35 else problem.negative_log_q
        log_q[1, column % 35 if column < 35 else column - 35] = value
        got = problem.run()
        problem.check(got)
        assert np.array_equal(np.isnan(got["loss"]), [False, subtract, False])


def test_a_class_that_is_never_drawn_is_no_target():
    for column, targets in ((0, 1), (0, 40), (39, 40)):
        problem = Problem(batch=4, classes=50, targets=targets, negatives=50)
        problem.law = emulated.draws.alias_noise([0.0, *[1.0] * 49])
        problem.target = np.maximum(problem.target, 1)
        problem.target[2, column] = 0
        got = problem.run()
        problem.check(got)
        assert np.array_equal(np.isnan(got["loss"]), [False, False, True, False])


LAYOUTS = [(3, 0), (1, 1), (4, 2), (8, 4), (0, 1), (16, 8)]  # elements between rows, and before the first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 24, 96, 1040])
def test_rows_of_any_stride_and_alignment(dtype, dim):
    plain = Problem(dim=dim, dtype=dtype, batch=4)
    expected = plain.run()
    plain.check(expected)
    for (gap, first), other in zip(LAYOUTS, reversed(LAYOUTS), strict=True):
        problem = Problem(dim=dim, dtype=dtype, batch=4)
        problem.weight = emulated.lay_out(problem.weight, dim + gap, first)
        problem.hidden = emulated.lay_out(problem.hidden, dim + other[0], other[1])
        for access in emulated.accesses(problem.weight):
            assert_same_bits(problem.run(access=access), expected, (gap, first, access))


@pytest.mark.parametrize("dim", [5, 24, 1100])
def test_rows_more_than_2_to_31_elements_apart(dim):
    problem = Problem(batch=2, dim=dim, classes=2, dtype="bfloat16")
    expected = problem.run()
    problem.check(expected)
    for stride in (2**31 + 8, 2**31 - 1):
        far = {name: emulated.far_apart(getattr(problem, name), stride) for name in ("hidden", "weight")}
        assert_same_bits(problem.run(**far), expected, stride)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 1040])
def test_operands_that_examples_share(dtype, dim):
    """hidden and log_z of stride 0, and a weight whose rows are one."""
    problem = Problem(batch=4, dim=dim, dtype=dtype, given="rows")
    problem.hidden = np.broadcast_to(problem.hidden[:1], (4, dim))
    problem.log_z_values = np.broadcast_to(problem.log_z_values[:1], 4)
    problem.check(problem.run())
    problem.weight = np.broadcast_to(problem.weight[:1], (problem.classes, dim))
    problem.check(problem.run())


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("bfloat16", 1100), ("float64", 4098)])
def test_outputs_that_are_not_wanted_change_no_other(dtype, dim):
    problem = Problem(dim=dim, dtype=dtype, negatives=35, targets=2, ignored=0.3)
    full = problem.run()
    for hidden_grad, row_grad in itertools.product((False, True), repeat=2):
        wanted = ["loss", *(["ids", "dlogit"] if row_grad else []), *(["grad_hidden"] if hidden_grad else [])]
        got = problem.run(hidden_grad=hidden_grad, row_grad=row_grad)
        assert_same_bits(got, {name: full[name] for name in wanted})


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("float16", 80), ("float32", 520), ("float64", 4098)])
def test_an_example_is_the_same_in_any_batch(dtype, dim):
    problem = Problem(batch=6, dim=dim, dtype=dtype, negatives=37, targets=3, given="rows", ignored=0.2)
    together = problem.run()
    for i in range(6):
        one = slice(i, i + 1)
        alone = problem.run(
            hidden=problem.hidden[one], target=problem.target[one], log_z=problem.log_z_values[one],
            negatives=problem.given_ids[one], order=i,
        )  # fmt: skip
        assert_same_bits(alone, {name: array[one] for name, array in together.items()})


SHARED_TILES = [(1, 0), (1, 1), (1, 5), (2, 5), (3, 8), (1, 14), (1, 15), (1, 16), (4, 28), (1, 31)]


@pytest.mark.parametrize(("targets", "negatives"), SHARED_TILES)
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("float32", 50), ("float32", 100), ("bfloat16", 200)])
@pytest.mark.parametrize("given", ["", "rows"])
def test_examples_that_share_a_tile_are_as_they_are_alone(targets, negatives, dtype, dim, given):
    """With one worker as many examples as fit share the lanes of a tile; with a worker for each none do."""
    options = {"remove_hits": True, "uniform_labels": True, "mean_candidates": True}
    problem = Problem(
        batch=45, dim=dim, dtype=dtype, classes=9, targets=targets, negatives=negatives, given=given, ignored=0.3,
        options=options,
    )  # fmt: skip
    alone = problem.run(warps=1)
    problem.check(alone)
    for grid, warps in ((1, 1), (1, 4), (7, 1), (20, 2)):
        assert_same_bits(problem.run(grid=grid, warps=warps, order=grid), alone, (grid, warps))
    problem.target[3::7, 0] = problem.classes  # a bad example leaves those beside it alone
    spoiled = problem.run(grid=1, warps=1)
    assert_same_bits(problem.run(warps=1), spoiled)
    bad = np.isnan(spoiled["loss"])
    assert np.array_equal(np.flatnonzero(bad), np.arange(3, 45, 7))
    assert_same_bits({name: array[~bad] for name, array in spoiled.items()}, {n: a[~bad] for n, a in alone.items()})


@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e20), ("bfloat16", 1e20), ("float64", 1e160)])
@pytest.mark.parametrize("dim", [4, 1100])
def test_scores_that_overflow(dtype, large, dim):
    """+infinity is the largest number: a target's loss is 0, a negative's that number; neither is NaN."""
    problem = Problem(batch=2, dim=dim, dtype=dtype, classes=4, negatives=1, given="rows", log_z=False)
    for array in (problem.hidden, problem.weight):
        array[:] = emulated.stored(np.full(array.shape, large), dtype)
    problem.given_ids[:] = 2
    problem.target[:] = 1
    problem.weight[1 if dim == 4 else 2] = emulated.stored(-large, dtype)  # the target or the negative scores -infinity
    got = problem.run()
    finfo = np.finfo(emulated.compute_dtype(dtype))
    if dim == 4:  # both are as wrong as can be
        assert (got["loss"] >= finfo.max).all()
        assert np.array_equal(got["dlogit"], [[-1, 1]] * 2)
    else:
        assert not got["loss"].any()
        assert not got["dlogit"].any()
        assert not got["grad_hidden"].any()


def test_errors_of_the_emulator_are_exceptions():
    with pytest.raises(ValueError, match="more warps"):
        Problem().run(warps=5)
    with pytest.raises(ValueError, match="forbid"):
        Problem(dim=5).run(access=16)
    with pytest.raises(emulated.kernels().Error, match="block must have"):
        emulated.sample(Problem().law, np.zeros(2, np.int64), 2000, 2, threads=1025)
