"""The racy in-place step of csrc/cuda: exact where no two candidates are of one class, else right to first order."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import IGNORE, LAST_DIMS, Problem, assert_same_bits
from rounding import assert_rounded

STEP = 0.37
DIMS = sorted({1, 3, 5, 17, 50, 100, 300, *LAST_DIMS["float32"], *(dim + 1 for dim in LAST_DIMS["float32"][:-1])})


def distinct(dim: int, *, batch: int = 4, targets: int = 1, negatives: int = 9, **options) -> Problem:
    """No class is a candidate twice; some are none at all."""
    columns = targets + negatives
    problem = Problem(batch=batch, dim=dim, classes=batch * columns + 5, targets=targets, negatives=negatives,
                      given="rows", seed=dim, options=options)  # fmt: skip
    ids = problem.random.permutation(problem.classes)[: batch * columns].reshape(batch, columns)
    problem.target, problem.given_ids = np.ascontiguousarray(ids[:, :targets]), np.ascontiguousarray(ids[:, targets:])
    return problem


def apply(problem: Problem, step: float, **launch) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Outputs, the new table in memory laid out as the old one, and the new bias."""
    rows = problem.weight
    stride, first = rows.strides[0] // rows.itemsize, rows.ctypes.data // rows.itemsize % 4
    weight = emulated.lay_out(rows, stride, first)
    bias = None if problem.bias is None else problem.bias.copy()
    outputs = problem.run(weight=weight, bias=bias, row_grad=False, step=step, **launch)
    return outputs, weight, bias


def check_step(problem: Problem, weight: np.ndarray, bias: np.ndarray | None, step: float) -> None:
    """A class that is no live candidate keeps its bits; others are w - step * gradient, to the rounding of that."""
    expected = problem.expected()
    for name, new, old in (("rows", weight, problem.weight), ("bias", bias, problem.bias)):
        if new is None:
            continue
        gradient, scale = getattr(expected, name), expected.scale[name]
        untouched = scale == 0
        assert new[untouched].tobytes() == old[untouched].tobytes()
        truth = old.astype(np.float64) - step * gradient
        assert_rounded(new.astype(np.float64), truth, "float32", name, np.abs(old) + step * scale)


@pytest.mark.parametrize("dim", DIMS)
def test_distinct_rows_take_the_exact_step(dim):
    problem = distinct(dim) if dim <= 4096 else distinct(dim, batch=2, negatives=3)
    forward = problem.run(row_grad=False)
    results = []
    for order, access in enumerate(emulated.accesses(problem.weight)):
        outputs, weight, bias = apply(problem, STEP, access=access, grid=order, order=order)
        assert_same_bits(outputs, forward)
        check_step(problem, weight, bias, STEP)
        results.append({"weight": np.ascontiguousarray(weight), "bias": bias})
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dim", [5, 24, 96, 1040])
@pytest.mark.parametrize(("gap", "first"), [(3, 0), (1, 1), (4, 2), (8, 0)])
def test_rows_of_any_stride_and_alignment(dim, gap, first):
    problem = distinct(dim)
    problem.weight = emulated.lay_out(problem.weight, dim + gap, first)
    for access in emulated.accesses(problem.weight):
        _, weight, bias = apply(problem, STEP, access=access)
        check_step(problem, weight, bias, STEP)
        base = weight.base
        while base.base is not None and isinstance(base.base, np.ndarray):
            base = base.base
        between = np.lib.stride_tricks.as_strided(
            base[-problem.dim - (problem.classes - 1) * (dim + gap) :][dim:],
            (problem.classes - 1, gap), weight.strides,
        )  # fmt: skip
        assert (between.view(np.uint8) == 0xFF).all()


@pytest.mark.parametrize("dim", [20, 600])
@pytest.mark.parametrize("negatives", [0, 1, 33, 100])
def test_every_number_of_columns(dim, negatives):
    for targets in (1, 3, 35):
        problem = distinct(dim, batch=2, targets=targets, negatives=negatives, uniform_labels=True)
        outputs, weight, bias = apply(problem, STEP)
        problem.check(outputs)
        check_step(problem, weight, bias, STEP)


def test_hits_absent_targets_and_bad_examples_update_nothing():
    problem = distinct(20, batch=6, targets=3, remove_hits=True)
    problem.given_ids[0, 4] = problem.target[0, 0]
    problem.target[1] = IGNORE
    problem.target[2, 1] = IGNORE
    problem.given_ids[3, 8] = problem.classes
    problem.target[4, 2] = -7
    outputs, weight, bias = apply(problem, STEP)
    problem.check(outputs)
    check_step(problem, weight, bias, STEP)


def test_without_a_bias_and_without_the_gradient_of_hidden():
    problem = distinct(20)
    problem.bias = None
    outputs, weight, _ = apply(problem, STEP, hidden_grad=False)
    problem.check(outputs)
    assert outputs.keys() == {"loss"}
    check_step(problem, weight, None, STEP)


def test_hidden_of_any_dtype():
    for dtype in ("bfloat16", "float16"):
        for dim in (20, 600):
            problem = distinct(dim)
            problem.hidden = emulated.stored(problem.hidden, dtype)
            _, weight, bias = apply(problem, STEP)
            check_step(problem, weight, bias, STEP)


@pytest.mark.parametrize("dim", [5, 20, 48, 100, 600])
@pytest.mark.parametrize("noise", ["uniform", "alias"])
def test_every_update_of_a_class_is_applied(dim, noise):
    """From a table of zeros and by a tiny step: what candidates of one class read of each other's updates is nothing
    beside their other scores, and what they add to is nothing that would round the updates away."""
    problem = Problem(batch=20, dim=dim, classes=6, targets=2, negatives=40, noise=noise)
    problem.weight[:] = problem.bias[:] = 0
    step, expected = 2.0**-40, problem.expected()
    for access in emulated.accesses(problem.weight):
        for order in range(3):
            outputs, weight, bias = apply(problem, step, access=access, order=order, grid=order)
            problem.check({"loss": outputs["loss"]}, expected)
            for name, new in (("rows", weight), ("bias", bias)):
                applied = -new.astype(np.float64) / step
                assert_rounded(applied, getattr(expected, name), "float32", name, expected.scale[name])


def test_a_sequence_of_steps_descends():
    """Some epochs of the racy step on one batch, with a seed for each."""
    problem = Problem(batch=30, dim=16, classes=12, negatives=8)
    _, weight, bias = apply(problem, 0.0)
    losses = []
    for epoch in range(30):
        seed = np.array([epoch, 1])
        got = problem.run(weight=weight, bias=bias, row_grad=False, hidden_grad=False, step=0.1, seed=seed, order=epoch)
        losses.append(got["loss"].mean())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
