"""Draws of noise a second, and the memory of a step as the vocabulary grows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

import nce_ext
from bench.cases import MEMORY_CASE, MEMORY_CLASSES, Problem, short, zipf
from bench.cuda.cases import (
    ALIAS_BUILD_LIMIT,
    ALIAS_CLASSES,
    ALIAS_GOAL,
    ALIAS_GOAL_CLASSES,
    DRAW_COLUMNS,
    DRAWS,
)
from bench.cuda.measure import DoesNotFit, peak_beyond_now, require, value_row
from bench.cuda.run import Job, Run
from bench.memory import few_rows_noise
from bench.timing import OURS, Row

DRAWING = "noise, draws a second"
MEMORY = "memory of a step beyond the table"
MULTINOMIAL_CLASSES = (100_000, 1_000_000)  # it refuses more than 2^24
MIB = 2**20


def draws(run: Run) -> Iterator[Job]:
    builds: dict[int, float] = {}
    for classes in ALIAS_CLASSES[:2] if run.small else ALIAS_CLASSES:
        yield Job(f"alias V={short(classes)}", functools.partial(measure_alias, run, classes, builds))
    classes = ALIAS_GOAL_CLASSES
    for name, make in (("log-uniform", nce_ext.noise.LogUniform), ("uniform", nce_ext.noise.Uniform)):
        work = f"{name} V={short(classes)}"
        yield Job(work, lambda work=work, make=make: measure_draws(run, work, make(classes).to(run.device), {}))


def measure_alias(run: Run, classes: int, builds: dict[int, float]) -> None:
    estimate = max((seconds * classes / known for known, seconds in builds.items()), default=0)
    if classes > max(builds, default=0) and estimate > ALIAS_BUILD_LIMIT:
        raise DoesNotFit(f"its table would take about {estimate:.0f} s to build")
    require(24 * classes, run.device)
    start = time.perf_counter()
    noise = zipf(classes)
    if classes >= ALIAS_GOAL_CLASSES:  # a small one tells nothing of a large one
        builds[classes] = time.perf_counter() - start
    baselines: dict[str, Callable] = {}
    draws = draws_of(run)
    noise = noise.to(run.device)
    if classes in MULTINOMIAL_CLASSES:
        probabilities = noise.log_prob(torch.arange(classes, device=run.device)).exp()
        few = draws // 8  # it may be slow

        def multinomial() -> torch.Tensor:
            return torch.multinomial(probabilities, few, replacement=True)

        if run.succeeds(f"torch.multinomial, V={short(classes)}", multinomial):
            baselines["torch.multinomial"] = multinomial
    measure_draws(run, f"alias V={short(classes)}", noise, baselines)


def draws_of(run: Run) -> int:
    return 2**16 if run.small else DRAWS


def measure_draws(run: Run, work: str, noise: nce_ext.noise.Noise, baselines: dict[str, Callable]) -> None:
    draws = draws_of(run)
    require(3 * 8 * draws, run.device)
    ids = noise.sample((1000,), seed=torch.tensor([3, 14], device=run.device))
    assert 0 <= int(ids.min()) <= int(ids.max()) < noise.n_classes, "ids out of range"
    programs = {OURS: lambda: noise.sample((draws // DRAW_COLUMNS, DRAW_COLUMNS)), **baselines}
    times = run.stopwatch.compare(programs, 0.6, least_rounds=3)
    for name in baselines:
        times.seconds[name] *= 8  # type: ignore[index]
    params = {"V": noise.n_classes, "draws": draws}
    goal = ALIAS_GOAL if "alias" in work and noise.n_classes <= ALIAS_GOAL_CLASSES and not run.small else None
    fields = {"unit": "G/s", "at_least": goal, "note": "int64 ids are written: 8 bytes a draw"}
    row = value_row(times, name=DRAWING, work=work, params=params, convert=lambda s: draws / s / 1e9, **fields)
    row.in_table = work not in ("alias V=1k", "alias V=100k")
    run.recorder.add(row)
    for name in baselines:
        row = times.row(DRAWING, params, name, work=work, unit="G/s", per_second=draws / 1e9)
        row.in_table = False
        run.recorder.add(row)


def memory(run: Run) -> Iterator[Job]:
    peaks: dict[int, int] = {}
    for classes in MEMORY_CLASSES[:2] if run.small else MEMORY_CLASSES:
        yield Job(f"V={short(classes)}", functools.partial(measure_memory, run, classes, peaks))


def measure_memory(run: Run, classes: int, peaks: dict[int, int]) -> None:
    """As many classes are drawn at every V, spread over the table: only V itself varies."""
    case = replace(MEMORY_CASE, classes=classes)
    require(classes * (4 * case.dim + 16) + 64 * case.batch * case.dim * case.negatives, run.device)
    weight = nn.Parameter(torch.full((classes, case.dim), 0.01, device=run.device))
    noise = few_rows_noise(classes).to(run.device)
    hidden = torch.randn(case.batch, case.dim, device=run.device, requires_grad=True)
    problem = Problem(case, "few rows", noise, hidden, weight, noise.sample((case.batch,)))
    problem.step()  # loads kernels
    peaks[classes] = peak = peak_beyond_now(problem.step, run.device)
    first = min(peaks)
    run.recorder.add(
        Row(
            name=MEMORY,
            work=f"V={short(classes)}",
            params=problem.params(),
            unit="MiB",
            nce_ext=peak / MIB,
            against=f"MiB at V={short(first)}",
            baseline=peaks[first] / MIB,
            ratio=peak / max(peaks[first], 1),
            shown_as="growth",
            at_most=1.1 if classes == MEMORY_CLASSES[-1] else None,
            note=f"the table itself: {weight.nbytes / MIB:.0f} MiB; {MEMORY_CLASSES[0]} classes are drawn",
            in_table=classes == MEMORY_CLASSES[-1],
        )
    )
