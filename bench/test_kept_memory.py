"""The training step again on a heap that keeps what is freed, where page faults play no part.

glibc returns every large block to the system, and the next step pays a page fault per 4 KiB to get it back. Eager
PyTorch, whose temporaries are the large ones, often spends more time on that than on arithmetic. Programs that run on
jemalloc, tcmalloc or tuned glibc settings do not, and these are their ratios.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from bench.cases import STEPS, Case, Problem, describe
from bench.eager import LABELS, EagerStep, assert_same_loss

NAME = "training step on a heap that keeps freed memory"
VARIANTS = ("coalesced", "sparse", "dense")

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65536


@pytest.fixture
def kept_memory() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version")):
        pytest.skip("needs glibc")
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    yield
    libc.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
    libc.mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
    libc.malloc_trim(0)


@pytest.mark.usefixtures("kept_memory")
@pytest.mark.parametrize("case", STEPS, ids=describe)
def test_kept_memory(case: Case, quick: bool, stopwatch, rows) -> None:
    problem = Problem.make(case.smaller() if quick else case, "uniform")
    eager = EagerStep(problem)
    assert_same_loss(problem, eager, VARIANTS)
    times = stopwatch.compare(
        problem.step, {variant: lambda variant=variant: eager.step(variant) for variant in VARIANTS}
    )
    work = f"{describe(problem.case)} uniform"
    note = f"the fastest of three forms of the dot products: {eager.score_name}"
    for variant in VARIANTS:
        rows.append(times.row(NAME, problem.params(), variant, work=work, label=LABELS[variant], note=note))
