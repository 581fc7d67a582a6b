"""A training step, forward and backward, against the same loss in plain PyTorch."""

from __future__ import annotations

import pytest

from bench.cases import NOISES, STEPS, Case, Problem, describe
from bench.eager import LABELS, VARIANTS, EagerStep, assert_same_loss
from bench.timing import OURS

STEP = "training step, forward and backward (B, D, k, V)"
SHARE = "drawing the noise, share of a training step"

# A first call compiles for many seconds, so a quick run compiles one step only, to see that it still does.
QUICK_COMPILED = (STEPS[0], "uniform")


@pytest.mark.parametrize("law", NOISES)
@pytest.mark.parametrize("case", STEPS, ids=describe)
def test_step(case: Case, law: str, quick: bool, stopwatch, rows) -> None:
    variants = VARIANTS
    if quick and (case, law) != QUICK_COMPILED:
        variants = tuple(variant for variant in VARIANTS if variant != "compiled")
    problem = Problem.make(case.smaller() if quick else case, law)
    eager = EagerStep(problem)
    assert_same_loss(problem, eager, variants)

    baselines = {variant: lambda variant=variant: eager.step(variant) for variant in variants}
    baselines["sampling"] = lambda: problem.noise.sample((problem.case.batch, problem.case.negatives))
    times = stopwatch.compare(problem.step, baselines)

    params, work = problem.params(), f"{describe(problem.case)} {law}"
    note = f"the fastest of three forms of the dot products: {eager.score_name}"
    for variant in variants:
        goal = problem.case.at_least.get(variant)
        rows.append(times.row(STEP, params, variant, work=work, label=LABELS[variant], at_least=goal, note=note))
    rows.append(
        times.row(
            SHARE, params, OURS, ours="sampling", work=work, label="ms, whole step", shown_as="share", at_most=0.05
        )
    )
