"""The results: facts about the machine, the JSON file, and the table at the end of a run."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import nce_ext
from bench.timing import Row

WIDTH = 100


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine or its user."""
    info = nce_ext.build_info()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "nce_ext": info["version"],
        "simd": info["simd"],
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def compact(output: dict[str, Any], rows: list[Row]) -> None:
    """Turn pytest-benchmark's JSON into ours: the rows first, its statistics without the single rounds after them."""
    commit = output["commit_info"]
    benchmarks = output.pop("benchmarks")
    for benchmark in benchmarks:
        benchmark["stats"].pop("data", None)
        benchmark["params"] = None  # printed in the name already
    output["commit_info"] = {key: commit[key] for key in ("id", "time", "dirty") if key in commit}
    output["rows"] = [row_json(row) for row in rows]
    output["benchmarks"] = benchmarks


def row_json(row: Row) -> dict[str, Any]:
    filled = {key: value for key, value in asdict(row).items() if value not in (None, "") and key != "in_table"}
    if row.reached is not None:
        filled["reached"] = row.reached
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in filled.items()}


def table(rows: list[Row]) -> list[str]:
    """Lines of at most WIDTH columns: work, nce_ext, baseline, ratio, goal."""
    lines = [f"{'work':<32} {'nce_ext':>7} {'':<4} {'baseline':<32} {'ratio':>7}  goal    met", "-" * WIDTH]
    rows = [row for row in rows if row.in_table]
    for name in dict.fromkeys(row.name for row in rows):
        lines.append(name)
        lines.extend(_line(row) for row in rows if row.name == name)
    return [line.rstrip()[:WIDTH] for line in lines]


def _line(row: Row) -> str:
    theirs = "" if row.baseline is None else number(row.baseline)
    theirs = f"{theirs:>6} {row.against}"
    return f"  {row.work:<30} {number(row.nce_ext):>7} {row.unit:<4} {theirs:<32} {_ratio(row):>7}  {_goal(row)}"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else _as_shown(row, row.ratio)


def _as_shown(row: Row, value: float) -> str:
    if row.shown_as in ("share", "limit"):
        return f"{100 * value:.2g}%" if value < 0.1 else f"{100 * value:.0f}%"
    if row.shown_as == "value":
        return f"{number(value)} {row.unit}".strip()
    return f"{value:.2f}x" if row.shown_as == "growth" else f"{number(value)}x"


def _goal(row: Row) -> str:
    if row.reached is None:
        return ""
    sign, value = (">=", row.at_least) if row.at_least is not None else ("<=", row.at_most)
    return f"{f'{sign} {_as_shown(row, value)}':<7} {'yes' if row.reached else 'no'}"


def number(value: float) -> str:
    """Three digits at least, in as few characters: 0.123, 4.56, 78.9, 1234, 56k."""
    if value >= 10_000:
        return f"{value / 1e3:.0f}k" if value < 1e6 else f"{value / 1e6:.3g}M"
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"
