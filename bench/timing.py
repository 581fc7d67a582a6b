"""Programs timed in turns, so that a busy moment of a shared machine hits all of them, and the rows made from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Program = Callable[[], object]
OURS = "nce_ext"


def settling(seconds: float) -> int:
    """Untimed calls before each timed one, for a program that takes this long.

    A training loop finds caches, free memory and its pages as its own last steps left them, not as another program
    did; but one long call drowns what it found.
    """
    return 4 if seconds < 0.1 else 1 if seconds < 2 else 0


@dataclass
class Row:
    """One line of the results: what nce_ext does, what the baseline does, and their ratio.

    ``ratio`` is the median over rounds of the ratio within a round, with its 20th and 80th percentiles; above 1 means
    that nce_ext is ahead, unless ``shown_as`` is "share", the part of the baseline's time that nce_ext takes.
    ``ratio_of_best`` compares the fastest rounds: the last resort on a machine that never falls quiet.
    """

    name: str
    work: str  # which one, in the table
    params: dict[str, Any]
    unit: str
    nce_ext: float
    nce_ext_p20: float | None = None
    nce_ext_p80: float | None = None
    against: str = ""
    baseline: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    ratio_of_best: float | None = None
    rounds: int | None = None
    shown_as: str = "speed-up"  # or "share", "limit" (part of what is possible), "growth", "value"
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    in_table: bool = True

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        value = self.nce_ext if self.ratio is None else self.ratio
        if self.at_least is not None:
            return value >= self.at_least
        return value <= self.at_most if self.at_most is not None else None


@dataclass
class Times:
    """Seconds of every round, by program."""

    seconds: Mapping[str, np.ndarray]

    def median(self, program: str = OURS) -> float:
        return float(np.median(self.seconds[program]))

    def row(
        self,
        name: str,
        params: Mapping[str, Any],
        against: str,
        *,
        work: str,
        ours: str = OURS,
        label: str = "",
        unit: str = "ms",
        per_second: float | None = None,
        **goal: Any,
    ) -> Row:
        """``ours`` against the program ``against``, in ms; or as the rate of ``per_second`` units of work a round."""
        mine, theirs = self.seconds[ours], self.seconds[against]
        convert = (lambda seconds: seconds * 1e3) if per_second is None else (lambda seconds: per_second / seconds)
        share = goal.get("shown_as") == "share"
        ratio = mine / theirs if share else theirs / mine
        return Row(
            name=name,
            work=work,
            params=dict(params),
            unit=unit,
            nce_ext=float(np.median(convert(mine))),
            nce_ext_p20=float(np.percentile(convert(mine), 20)),
            nce_ext_p80=float(np.percentile(convert(mine), 80)),
            against=label or against,
            baseline=float(np.median(convert(theirs))),
            ratio=float(np.median(ratio)),
            ratio_p20=float(np.percentile(ratio, 20)),
            ratio_p80=float(np.percentile(ratio, 80)),
            ratio_of_best=float(mine.min() / theirs.min() if share else theirs.min() / mine.min()),
            rounds=len(mine),
            **goal,
        )


def seconds_of(program: Program) -> float:
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


class Stopwatch:
    """Times nce_ext through pytest-benchmark's fixture and the baselines in the pauses between its rounds."""

    def __init__(self, benchmark: Any, *, quick: bool) -> None:
        self.benchmark = benchmark
        self.quick = quick
        self.budget = 0.2 if quick else 5.0  # seconds a comparison, where the least number of rounds allows

    def compare(
        self, ours: Program, baselines: Mapping[str, Program], *, least_rounds: int = 5, most_rounds: int = 40
    ) -> Times:
        """As many rounds as the budget allows; a round times every baseline once, then ``ours`` once."""
        programs = {**baselines, OURS: ours}
        first = {name: seconds_of(program) for name, program in programs.items()}
        untimed = {name: settling(seconds) for name, seconds in first.items()}
        cost = sum(
            (1 + untimed[name]) * (seconds_of(programs[name]) if untimed[name] else first[name]) for name in programs
        )
        least_rounds = min(least_rounds, 2) if self.quick else least_rounds
        rounds = int(min(max(self.budget / cost, least_rounds), most_rounds))
        seconds: dict[str, list[float]] = {name: [] for name in baselines}

        def settle(name: str) -> None:
            for _ in range(untimed[name]):
                programs[name]()

        def run_baselines() -> None:
            for name, program in baselines.items():
                settle(name)
                seconds[name].append(seconds_of(program))
            settle(OURS)

        if self.benchmark.disabled:  # --benchmark-disable: show that everything runs, time nothing in earnest
            run_baselines()
            return Times({name: np.array(taken) for name, taken in {**seconds, OURS: [seconds_of(ours)]}.items()})
        self.benchmark.pedantic(ours, setup=run_baselines, rounds=rounds)
        seconds[OURS] = list(self.benchmark.stats.stats.data)
        return Times({name: np.array(taken) for name, taken in seconds.items()})
