"""One training step in a process of its own: the memory it takes beyond the table, and its time.

    python -m bench.memory CLASSES

prints a JSON object. Linux only: the kernel keeps the peak of the resident memory, and lets it be reset.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import nce_ext
from bench.cases import MEMORY_CASE, MEMORY_CLASSES, Problem
from bench.eager import EagerStep
from nce_ext._tables.pages import empty_table

RESET = Path("/proc/self/clear_refs")
TIMED_STEPS = 9


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_beyond_now(program: Callable[[], object]) -> int:
    """Bytes that the resident memory rises by while the program runs, at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier calls left in the heap would serve this one unseen
    before = resident("VmRSS")
    RESET.write_text("5")
    program()
    return resident("VmHWM") - before


def few_rows_noise(classes: int) -> nce_ext.noise.Unigram:
    """As many classes with a positive count at every V, spread over the table: only V itself varies."""
    counts = torch.zeros(classes)
    counts[:: classes // MEMORY_CLASSES[0]] = 1
    return nce_ext.noise.Unigram(counts)


def problem_of(noise: nce_ext.noise.Noise, weight: nn.Parameter, law: str) -> Problem:
    case = replace(MEMORY_CASE, classes=noise.n_classes)
    hidden = torch.randn(case.batch, case.dim, requires_grad=True)
    return Problem(case, law, noise, hidden, weight, noise.sample((case.batch,)))


def warm_up() -> None:
    """Threads, lazy imports and code pages are not the step's."""
    tiny = Problem.make(replace(MEMORY_CASE, batch=8, classes=100), "zipf")
    for _ in range(2):
        tiny.step()
        EagerStep(tiny).step("coalesced")


def measure(classes: int) -> dict[str, float]:
    warm_up()
    weight = nn.Parameter(empty_table(classes, MEMORY_CASE.dim, None, None).fill_(0.01))  # touches every page
    few = problem_of(few_rows_noise(classes), weight, "few rows")
    uniform = problem_of(nce_ext.noise.Uniform(classes), weight, "uniform")
    eager = EagerStep(uniform)  # runs steps of its own
    result = {
        "few_rows_bytes": peak_beyond_now(few.step),
        "uniform_bytes": peak_beyond_now(uniform.step),
        "eager_bytes": peak_beyond_now(lambda: eager.step("coalesced")),
        "table_bytes": weight.numel() * weight.element_size(),
    }
    seconds = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        uniform.step()
        seconds.append(time.perf_counter() - start)
    return result | {"step_ms": sorted(seconds)[TIMED_STEPS // 2] * 1e3}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
