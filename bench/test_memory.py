"""What a step with sparse gradients needs beyond the table, as the vocabulary grows: memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases import MEMORY_CASE, MEMORY_CLASSES, short
from bench.memory import RESET
from bench.timing import Row

MIB = 2**20


@pytest.mark.skipif(not RESET.exists(), reason="the peak of the resident memory can be reset on Linux only")
def test_memory(quick: bool, rows) -> None:
    sizes = MEMORY_CLASSES[:2] if quick else MEMORY_CLASSES
    results = {classes: measure_in_new_process(classes) for classes in sizes}
    first = results[sizes[0]]
    params = {key: value for key, value in MEMORY_CASE.sizes().items() if key != "V"}
    for classes, result in results.items():
        rows.append(
            Row(
                "memory of a step beyond the table, 10k classes drawn",
                f"V={short(classes)}",
                {**params, "V": classes},
                "MiB",
                result["few_rows_bytes"] / MIB,
                against=f"MiB at V={short(sizes[0])}",
                baseline=first["few_rows_bytes"] / MIB,
                ratio=result["few_rows_bytes"] / first["few_rows_bytes"],
                shown_as="growth",
                at_most=1.1 if classes == MEMORY_CLASSES[-1] else None,
                note=f"the table itself: {result['table_bytes'] / MIB:.0f} MiB",
            )
        )
    for classes, result in results.items():
        rows.append(
            Row(
                "memory of a step beyond the table, all classes drawn",
                f"V={short(classes)}",
                {**params, "V": classes},
                "MiB",
                result["uniform_bytes"] / MIB,
                against="MiB eager, coalesced",
                baseline=result["eager_bytes"] / MIB,
                ratio=result["eager_bytes"] / result["uniform_bytes"],
                note="the gradient has a row per distinct class drawn, so at most B (k + 1) rows",
            )
        )
    for classes, result in results.items():
        rows.append(
            Row(
                "time of a step, uniform noise",
                f"V={short(classes)}",
                {**params, "V": classes},
                "ms",
                result["step_ms"],
                against=f"ms at V={short(sizes[0])}",
                baseline=first["step_ms"],
                ratio=result["step_ms"] / first["step_ms"],
                shown_as="growth",
                note="a small table stays in the caches, and repeated classes share a row of the gradient",
            )
        )


def measure_in_new_process(classes: int) -> dict[str, float]:
    """A peak is a property of a process, and so is a heap that has been used before."""
    command = [sys.executable, "-m", "bench.memory", str(classes)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
