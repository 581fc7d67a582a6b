"""``python -m bench.cuda`` runs to its end on a CPU, at sizes that measure nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS_GPU = {"ceilings", "graphs", "host-memory", "more-ceilings"}
SECTIONS = {
    "matmul", "forward", "steps", "compiled", "softmax", "objectives", "epilogue", "draws", "hogwild", "memory",
    "optimizers",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("native")


def command(output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "bench.cuda", "--device", "cpu", "--small", "--output", str(output), *options]


def run(output: Path, *options: str) -> tuple[dict, list[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(output, *options), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()), done.stdout.splitlines()


@pytest.mark.slow
def test_every_section_has_rows_and_no_errors(tmp_path):
    result, printed = run(tmp_path / "out.json")
    assert result["errors"] == []
    assert result["left_out"] == []
    sections = {row["section"] for row in result["rows"] if "name" in row}
    assert sections >= SECTIONS
    assert {row["section"] for row in result["rows"] if "skipped" in row} >= NEEDS_GPU
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["rows"]
    assert result["facts"]["small"] is True
    table = printed[len(printed) - printed[::-1].index("") :]
    assert table[0].startswith("small sizes, not a measurement: ")
    assert 10 < len(table) <= 60
    assert max(map(len, table)) <= 100


def test_no_case_starts_after_the_time_is_up(tmp_path):
    result, _ = run(tmp_path / "out.json", "--only", "matmul", "draws", "--seconds", "0")
    assert result["rows"] == []
    assert {case.split(",")[0] for case in result["left_out"]} == {"matmul", "draws"}


def test_what_was_measured_outlives_a_termination(tmp_path):
    output = tmp_path / "out.json"
    process = subprocess.Popen(command(output), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = output.with_suffix(".jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (lines.exists() and lines.read_text().count("\n") >= 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    result = json.loads(output.read_text())
    assert len(result["rows"]) >= 4
    assert "SIGTERM" in " ".join(result["errors"]), printed
    assert result["left_out"]
