"""The epilogue of shared negatives of csrc/cuda, against the float64 oracle."""

from __future__ import annotations

import itertools

import emulated
import family
import numpy as np
import pytest
from emulated import DTYPES, IGNORE, assert_same_bits
from family import OBJECTIVES
from shared import Shared
from test_emulated_sampled_loss import BAD_IDS

CASES = family.with_targets(1, 2, 4)
# Columns for each number of warps and of vectors that a thread keeps, for float32 and float64; ends, and odd numbers.
COLUMNS = [0, 1, 3, 4, 31, 33, 256, 257, 512, 513, 1100, 2049, 4095, 4100, 8192, 8195]
WIDE = [1, 5, 7, 300, 2000]  # dimensions: an odd one, one vector, one warp, several


def check_everywhere(problem: Shared) -> dict[str, np.ndarray]:
    """Right, and the same bits for every grid, order of threads and alignment of the logits."""
    got = problem.run()
    problem.check(got)
    for order, (stride, first) in enumerate(((0, 0), (1, 0), (3, 1), (4, 4)), 1):
        problem.stride, problem.first = (problem.columns + stride, first) if order > 1 else (None, 0)
        assert_same_bits(problem.run(grid=order % 3, order=order), got, (stride, first))
    return got


@pytest.mark.parametrize(("name", "targets"), CASES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_number_of_columns(name, targets, columns):
    for dtype, dim in (("float32", 20), ("float64", 9)):
        options = {**OBJECTIVES[name], "uniform_labels": targets == 2, "offset": 1.25}
        problem = Shared(dim=dim, dtype=dtype, targets=targets, columns=columns, ignored=0.2, seed=columns,
                         options=options)  # fmt: skip
        check_everywhere(problem)


@pytest.mark.parametrize("name", ["softmax", "smoothed", "adversarial", "binary"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*WIDE, 8192, 8200])
def test_every_storage_and_dimension(name, dtype, dim):
    for targets in (1, 3):
        problem = Shared(dim=dim, dtype=dtype, targets=targets, ignored=0.3, seed=dim, options=OBJECTIVES[name])
        check_everywhere(problem)
    if dtype != "float64":
        for hidden in {"float32", "bfloat16", "float16"} - {dtype}:
            problem = Shared(dim=dim, dtype=dtype, hidden_dtype=hidden, options=OBJECTIVES[name])
            problem.check(problem.run())


@pytest.mark.parametrize("seed", range(100))
def test_options_together(seed):
    random = np.random.default_rng([seed, 13])
    pick = lambda *values: values[random.integers(len(values))]  # noqa: E731
    name = pick(*OBJECTIVES)
    options = {**OBJECTIVES[name], "uniform_labels": pick(False, True), "offset": pick(0.0, -3.5)}
    if name == "binary":
        options |= {"mean_candidates": pick(False, True), "n_draws": 19}
    elif options["objective"] == family.SOFTMAX:
        options["label_smoothing"] = pick(0.0, 0.01, 1.0)
    else:
        options["temperature"] = pick(0.0, 0.5, 4.0)
    problem = Shared(
        batch=pick(1, 2, 7), dim=pick(1, 8, 65, 300), columns=pick(0, 1, 7, 64, 600, 2100, 5000),
        targets=1 if family.one_target(name) else pick(1, 2, 5, 40), dtype=pick(*DTYPES),
        with_bias=pick(False, True), log_z=pick(False, True), log_q=family.one_target(name) or pick(False, True),
        multiplicity=pick(False, True), accidental_hits=pick(False, True), example_weight=pick(False, True),
        ignored=pick(0.0, 0.3, 1.0), stride=pick(None, 5003, 5004), first=pick(0, 1, 4), seed=seed, options=options,
    )  # fmt: skip
    got = problem.run()
    problem.check(got)
    assert_same_bits(problem.run(grid=1, order=seed), got)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("columns", [40, 1500, 9000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rising", [True, False])
def test_scores_that_rise_or_fall_along_the_columns(name, columns, dtype, rising):
    """Every lane and warp has its own largest score, e^200 times others."""
    problem = Shared(dtype=dtype, columns=columns, options=OBJECTIVES[name])
    problem.logits[:] = np.linspace(-200, 200, columns) * (1 if rising else -1)
    check_everywhere(problem)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("columns", [13, 1100, 9000])
def test_masked_columns_are_not_looked_at(name, columns):
    """By hits or a multiplicity of 0; if all are masked the target is left alone."""
    problem = Shared(batch=4, columns=columns, options=OBJECTIVES[name])
    problem.ranges[:] = 5
    problem.ranges[0] = [0, columns]
    problem.ranges[1] = [0, columns - 1]
    problem.ranges[2] = [1, columns]
    problem.counts[:] = 2
    problem.counts[1] = problem.counts[columns - 2] = 0
    huge = np.finfo(problem.logits.dtype).max
    problem.logits[0] = huge
    problem.logits[1, :-1] = problem.logits[2, 1:] = np.nan
    problem.logits[3, [1, columns - 2]] = np.inf, np.nan
    got = check_everywhere(problem)
    assert not got["dlogit"][0].any()
    assert np.array_equal(np.flatnonzero(got["dlogit"][1]), [columns - 1])
    assert np.array_equal(np.flatnonzero(got["dlogit"][2]), [0])


def test_hits_of_several_targets_and_of_none():
    """Ranges of ignored targets do not count; empty ones may lie anywhere."""
    problem = Shared(batch=3, targets=4, columns=600)
    problem.ranges[:] = [[[3, 5], [590, 600], [77, 77], [0, 600]]] * 3
    problem.target[:, 3] = IGNORE
    problem.target[1] = IGNORE
    problem.counts[:] = 1
    got = check_everywhere(problem)
    assert np.array_equal(np.flatnonzero(got["dlogit"][0] == 0), [3, 4, *range(590, 600)])
    assert not got["dlogit"][1].any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("which", range(len(BAD_IDS)))
def test_a_bad_target_spoils_its_example_alone(name, targets, which):
    targets = 1 if family.one_target(name) else targets
    problem = Shared(batch=5, targets=targets, columns=300, options=OBJECTIVES[name])
    problem.target[1, targets - 1] = BAD_IDS[which]
    problem.target_log_q[3, 0] = (np.inf, -np.inf, np.nan)[which % 3]
    got = check_everywhere(problem)
    assert np.array_equal(np.isnan(got["loss"]), [False, True, False, True, False])
    assert (got["target_ids"][[1, 3]] == -1).all()
    for array in ("dlogit", "target_dlogit", "grad_hidden", "grad_shift"):
        assert not got[array][[1, 3]].any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "columns"), [("float32", 30), ("bfloat16", 2100), ("float64", 4200)])
def test_outputs_that_are_not_wanted_change_no_other(name, dtype, columns):
    problem = Shared(dtype=dtype, columns=columns, ignored=0.3, options=OBJECTIVES[name])
    full = problem.run()
    assert_same_bits(problem.run(derivatives=False), {"loss": full["loss"]})
    without = problem.run(hidden_grad=False)
    assert_same_bits(without, {name: array for name, array in full.items() if name != "grad_hidden"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_example_is_the_same_in_any_batch(name):
    problem = Shared(batch=5, columns=700, ignored=0.2, options=OBJECTIVES[name])
    together = problem.run()
    whole = {key: getattr(problem, key) for key in ("hidden", "target", "logits", "log_z_values", "target_log_q")}
    whole |= {"ranges": problem.ranges, "scale": problem.scale}
    for i in range(5):
        problem.batch = 1
        for key, array in whole.items():
            setattr(problem, key, array[i : i + 1])
        assert_same_bits(problem.run(), {key: array[i : i + 1] for key, array in together.items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_stride_and_alignment(dtype):
    for dim, (gap, first) in itertools.product((5, 24, 300), ((3, 0), (1, 1), (8, 4), (16, 8))):
        problem = Shared(dim=dim, dtype=dtype)
        expected = problem.run()
        problem.weight = emulated.lay_out(problem.weight, dim + gap, first)
        problem.hidden = emulated.lay_out(problem.hidden, dim + gap + 1, first)
        assert_same_bits(problem.run(), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("columns", [40, 1500, 9000])
def test_a_score_that_is_not_a_number_is_not_lost(name, columns):
    for column in (0, 33, columns - 1):
        problem = Shared(columns=columns, multiplicity=False, accidental_hits=False, options=OBJECTIVES[name])
        problem.logits[1, column] = np.nan
        assert np.array_equal(np.isnan(problem.run()["loss"]), [False, True, False])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("columns", [12, 9000])
def test_scores_that_overflow(name, columns):
    """Infinite scores stand for the largest number: the loss is large, and no derivative is NaN."""
    problem = Shared(
        columns=columns, multiplicity=False, accidental_hits=False, example_weight=False, options=OBJECTIVES[name]
    )
    problem.logits[0, 3] = -np.inf
    problem.logits[1, 3] = np.inf
    problem.logits[2] = -np.inf
    temperature = min(OBJECTIVES[name].get("temperature", 0.0), 1.0)
    got = problem.run(temperature=temperature)
    for array in ("dlogit", "target_dlogit", "grad_hidden", "grad_shift"):
        assert np.isfinite(got[array]).all(), array
    assert got["loss"][1] > 1e30


def test_empty_problems():
    for batch, targets, columns in ((0, 1, 5), (0, 0, 0), (2, 0, 5), (2, 1, 0)):
        problem = Shared(batch=batch, targets=targets, columns=columns)
        problem.check(problem.run())
