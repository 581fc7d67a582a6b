"""A training step with its optimizer, fused into backward or not, against a dense optimizer, as V grows."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases import short
from bench.fused_step import BATCH, DIM, NEGATIVES, WAYS
from bench.memory import RESET
from bench.timing import Row

CLASSES = (100_000, 1_000_000, 10_000_000)
QUICK = (10_000, 20_000)
RULES = ("RowwiseAdagrad", "AdamW")
MIB = 2**20
TIME = "training step with optimizer, B=4096, D=64, k=20"
MEMORY = "memory of that step beyond table and state"
LABELS = {"sparse": "sparse gradient, {}", "dense": "dense gradient, torch's AdamW"}


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not RESET.exists(), reason="the peak of the resident memory can be reset on Linux only")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("which", range(3), ids=["small", "medium", "large"])
def test_fused_step(which: int, rule: str, quick: bool, benchmark, rows) -> None:
    if quick and which == 2:
        pytest.skip("a smoke test takes two sizes")
    classes = (QUICK if quick else CLASSES)[which]
    # Table, gradient and two moments, and as much again for what comes and goes.
    ways = [way for way in WAYS if way != "dense" or available_bytes() > 5 * classes * DIM * 4]
    results = {way: measure_in_new_process(way, rule, classes, 3 if quick else 15) for way in ways if way != "dense"}
    if "dense" in ways:  # of which a step takes seconds, whatever the rule is called
        results["dense"] = measure_in_new_process("dense", "AdamW", classes, 3)
    benchmark.extra_info.update({f"{way} {key}": value for way in ways for key, value in results[way].items()})
    fused = results["fused"]
    benchmark.pedantic(lambda: None, rounds=1)  # the processes have timed themselves
    params = {"B": BATCH, "D": DIM, "k": NEGATIVES, "V": classes, "rule": rule}
    for name, key, unit, divisor in ((TIME, "step_ms", "ms", 1), (MEMORY, "peak_bytes", "MiB", MIB)):
        for way in ways[1:]:
            rows.append(
                Row(
                    name,
                    f"V={short(classes)} {rule}",
                    params,
                    unit,
                    fused[key] / divisor,
                    against=LABELS[way].format(rule),
                    baseline=results[way][key] / divisor,
                    ratio=results[way][key] / max(fused[key], 1),
                    rounds=3 if quick else 15,
                    note=f"table and state: {fused['table_bytes'] / MIB:.0f} MiB",
                )
            )


@functools.cache
def measure_in_new_process(way: str, rule: str, classes: int, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.fused_step", way, rule, str(classes), str(steps)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
