"""Objectives over the whole example in the fused forward pass of csrc/cuda, against the float64 oracle."""

from __future__ import annotations

import itertools

import emulated
import family
import numpy as np
import pytest
from emulated import DTYPES, IGNORE, LAST_DIMS, assert_same_bits
from family import OBJECTIVES, WHOLE, Family
from test_emulated_sampled_loss import BAD_IDS, SHARED_TILES, check_everywhere

# One dimension of every shape, its last, and some whose last vectors are not full.
DIMS = {dtype: sorted({1, 7, 50, 333, *last}) for dtype, last in LAST_DIMS.items()}
SIZES = [("float32", 20), ("bfloat16", 72), ("float32", 520), ("float16", 300), ("float64", 9), ("float64", 2050)]


def options_of(name: str, **others) -> dict:
    return {**OBJECTIVES[name], "remove_hits": True, **others}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("dtype", "dim"), [(dtype, dim) for dtype in DTYPES for dim in DIMS[dtype]])
def test_every_shape_and_access(dtype, dim, name):
    large = dim > 4096
    problem = Family(
        batch=2 if large else 4, dim=dim, classes=11 if large else 29, negatives=3 if large else 40, dtype=dtype,
        targets=1 if family.one_target(name) or large else 2, seed=dim, ignored=0.0 if large else 0.2,
        options=options_of(name, offset=1.5),
    )  # fmt: skip
    problem.poison_unused()
    check_everywhere(problem)


@pytest.mark.parametrize(("name", "targets"), family.with_targets(1, 2, 4, 33))
@pytest.mark.parametrize(("dtype", "dim"), SIZES[::2])
@pytest.mark.parametrize("negatives", [0, 1, 31, 32, 100])
def test_every_number_of_columns(name, targets, dtype, dim, negatives):
    given = ("", "rows", "shared")[(targets + negatives) % 3]
    options = options_of(name, remove_hits=negatives % 2 == 0, uniform_labels=targets % 2 == 0)
    problem = Family(
        batch=3, dim=dim, targets=targets, negatives=negatives, dtype=dtype, given=given, ignored=0.4,
        seed=100 * targets + negatives, options=options,
    )  # fmt: skip
    problem.poison_unused()
    got = problem.run()
    problem.check(got)
    assert_same_bits(problem.run(grid=1, order=5), got)


def random_problem(seed: int) -> Family:
    random = np.random.default_rng([seed, 11])
    pick = lambda *values: values[random.integers(len(values))]  # noqa: E731
    name = pick(*OBJECTIVES)
    options = options_of(name, remove_hits=bool(random.integers(2)), uniform_labels=bool(random.integers(2)))
    options |= {"offset": pick(0.0, -2.25, 6.5), "mean_candidates": name == "binary" and random.random() < 0.5}
    options["subtract_log_q"] = family.one_target(name) or bool(random.random() < 0.7)
    if options["objective"] == family.SOFTMAX:
        options["label_smoothing"] = pick(0.0, 0.0, 0.01, 0.5, 1.0)
    else:
        options |= {"temperature": pick(0.0, 0.5, 4.0), "positive_weight": pick(1.0, 0.125, 3.0)}
    return Family(
        batch=pick(1, 2, 9), dim=pick(1, 2, 7, 24, 65, 130, 260, 1030), classes=pick(2, 7, 60),
        targets=1 if family.one_target(name) else pick(1, 1, 3, 35), negatives=pick(0, 1, 6, 40, 70),
        dtype=pick(*DTYPES), noise=pick("uniform", "log uniform", "alias"), given=pick("", "", "rows", "shared"),
        given_log_q=pick(False, True), with_bias=pick(False, True), log_z=pick(False, True),
        ignored=pick(0.0, 0.3, 1.0), seed=seed, options=options,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(100))
def test_options_together(seed):
    problem = random_problem(seed)
    problem.poison_unused()
    got = problem.run()
    problem.check(got)
    assert_same_bits(problem.run(grid=2, order=seed), got)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "dim"), SIZES)
@pytest.mark.parametrize("rising", [True, False])
def test_scores_that_rise_or_fall_along_the_columns(name, dtype, dim, rising):
    """Each batch of rows has a new largest score, of up to e^30 times those before; or none but the first has."""
    problem = Family(dim=dim, dtype=dtype, classes=102, negatives=100, given="rows", noise="uniform", with_bias=True,
                     options=options_of(name))  # fmt: skip
    order = np.arange(100) if rising else np.arange(100)[::-1]
    problem.given_ids[:] = order
    problem.target[:] = 101
    problem.bias = emulated.stored(np.linspace(-200, 200, 102), dtype)
    problem.bias[101] = emulated.stored(190.0, dtype)
    check_everywhere(problem)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("dtype", "dim"), SIZES)
def test_all_negatives_are_hits(name, dtype, dim):
    """Then no negative counts, not even the target's share: of softmax nothing is left."""
    problem = Family(dim=dim, dtype=dtype, negatives=40, given="rows", options=options_of(name))
    problem.given_ids[:] = problem.target[:, :1]
    problem.given_ids[2, 35] = (problem.target[2, 0] + 1) % problem.classes  # the last example has one
    got = check_everywhere(problem)
    assert not got["dlogit"][:2, 1:].any()
    if "adversarial" not in name:
        assert not got["loss"][:2].any()
        assert not got["grad_hidden"][:2].any()
    assert got["dlogit"][2, 36]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("float32", 600), ("bfloat16", 7), ("float64", 2100)])
@pytest.mark.parametrize("column", [0, 1, 32, 100])
def test_an_id_out_of_range_spoils_its_example_alone(column, dtype, dim, name):
    problem = Family(batch=5, dim=dim, classes=50, negatives=100, dtype=dtype, given="rows", options=options_of(name))
    for which, example in enumerate((1, 3)):
        rows = problem.target if column == 0 else problem.given_ids
        rows[example, max(column - 1, 0)] = BAD_IDS[(column + 5 * which) % len(BAD_IDS)]
    problem.poison_unused()
    got = problem.run(order=column)
    problem.check(got)
    assert np.array_equal(np.isnan(got["loss"]), [False, True, False, True, False])
    assert not got["dlogit"][[1, 3]].any()
    assert not got["grad_hidden"][[1, 3]].any()
    assert_same_bits(problem.run(grid=1), got)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("dtype", "dim"), [("float16", 20), ("float32", 600), ("float64", 2100)])
def test_examples_without_targets(name, dtype, dim):
    for ignore in (IGNORE, 4, -1):
        problem = Family(batch=4, dim=dim, classes=6, negatives=34, dtype=dtype, given="rows",
                         options=options_of(name, ignore_index=ignore))  # fmt: skip
        problem.target[problem.target == ignore] = 5
        problem.target[::2] = ignore
        problem.poison_unused()
        got = problem.run()
        problem.check(got)
        assert (got["ids"][::2] == -1).all()


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("bfloat16", 1100), ("float64", 2050)])
def test_outputs_that_are_not_wanted_change_no_other(name, dtype, dim):
    problem = Family(dim=dim, dtype=dtype, negatives=35, ignored=0.3, options=options_of(name))
    full = problem.run()
    for hidden_grad, row_grad in itertools.product((False, True), repeat=2):
        saves = ["ids", "dlogit"] if hidden_grad or row_grad else []
        wanted = ["loss", *saves, *(["grad_hidden"] if hidden_grad else [])]
        got = problem.run(hidden_grad=hidden_grad, row_grad=row_grad)
        assert_same_bits(got, {name: full[name] for name in wanted})


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("float16", 80), ("float32", 520), ("float64", 2050)])
def test_an_example_is_the_same_in_any_batch(name, dtype, dim):
    problem = Family(batch=6, dim=dim, dtype=dtype, negatives=37, given="rows", ignored=0.2, options=options_of(name))
    together = problem.run()
    for i in range(6):
        one = slice(i, i + 1)
        alone = problem.run(
            hidden=problem.hidden[one], target=problem.target[one], log_z=problem.log_z_values[one],
            negatives=problem.given_ids[one], order=i,
        )  # fmt: skip
        assert_same_bits(alone, {name: array[one] for name, array in together.items()})


@pytest.mark.parametrize(("name", "targets"), family.with_targets(*sorted({targets for targets, _ in SHARED_TILES})))
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 20), ("bfloat16", 200)])
@pytest.mark.parametrize("negatives", [0, 5, 14, 28])
def test_examples_that_share_a_tile_are_as_they_are_alone(name, targets, negatives, dtype, dim):
    """Also beside an example whose scores are NaN."""
    problem = Family(
        batch=45, dim=dim, dtype=dtype, classes=9, targets=targets, negatives=negatives, given="rows", ignored=0.3,
        options=options_of(name, uniform_labels=True),
    )  # fmt: skip
    alone = problem.run(warps=1)
    problem.check(alone)
    for grid, warps in ((1, 1), (1, 4), (7, 1), (20, 2)):
        assert_same_bits(problem.run(grid=grid, warps=warps, order=grid), alone, (grid, warps))
    fine = np.arange(45) % 7 != 3
    problem.log_z_values[~fine] = np.nan
    for grid in (1, 7):
        got = problem.run(grid=grid, warps=1, order=grid)
        assert_same_bits({name: array[fine] for name, array in got.items()}, {n: a[fine] for n, a in alone.items()})


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("column", [0, 1, 17, 40])
@pytest.mark.parametrize("dim", [20, 600])
def test_a_score_that_is_not_a_number_is_not_lost(name, column, dim):
    problem = Family(dim=dim, classes=50, negatives=40, given="rows", options=options_of(name))
    problem.target[:] = 0
    problem.given_ids[:] = np.arange(1, 41)
    problem.bias[column] = np.nan
    assert np.isnan(problem.run()["loss"]).all()


@pytest.mark.parametrize("name", ["softmax", "smoothed", "adversarial"])
@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e20), ("bfloat16", 1e20), ("float64", 1e160)])
@pytest.mark.parametrize("dim", [4, 1100])
def test_scores_that_overflow(name, dtype, large, dim):
    """The largest number, with either sign, stands for infinity; nothing becomes NaN."""
    options = {**options_of(name), "temperature": 1.0}
    problem = Family(batch=2, dim=dim, dtype=dtype, classes=4, negatives=2, given="rows", log_z=False, options=options)
    for array in (problem.hidden, problem.weight):
        array[:] = emulated.stored(np.full(array.shape, large), dtype)
    problem.given_ids[:] = [2, 3]
    problem.target[:] = 1
    problem.weight[1] = emulated.stored(-large, dtype)
    problem.weight[2] = emulated.stored(0.0, dtype)
    got = problem.run(hidden_grad=False)
    assert (got["loss"] >= np.finfo(emulated.compute_dtype(dtype)).max / 4).all()
    label = options.get("label_smoothing", 0.0) / 3
    truth = np.array([-1 + 2 * label, -label, 1 - label])
    truth[0] *= options.get("positive_weight", 1.0)
    assert np.allclose(got["dlogit"], np.stack([truth] * 2), rtol=1e-6, atol=0)
