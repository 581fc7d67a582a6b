"""The results: each is written as soon as it is there, all of them with facts about the machine at the end."""

from __future__ import annotations

import json
import subprocess
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.report import machine_facts, row_json
from bench.report import table as table_of
from bench.timing import Row

MOST_LINES = 60
WIDTH = 100
ROOT = Path(__file__).resolve().parents[2]
CACHES = "not flushed: every call finds what the one before it left, as a training step does"
GPU_FACTS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu")


class Recorder:
    """Rows by section: results, errors, and what was skipped and why."""

    def __init__(self, output: Path) -> None:
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        self.lines = output.with_suffix(".jsonl").open("w")
        self.written: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.errors: list[str] = []
        self.skips: list[str] = []
        self.section = ""

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write({"section": self.section, **row_json(row)})

    def write(self, line: Mapping[str, Any]) -> None:
        self.written.append(dict(line))
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()

    def error(self, work: str, error: BaseException) -> None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
        at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        message = f"{type(error).__name__}: {str(error).strip() or 'no message'}{at}"
        self.errors.append(f"{self.section}, {work}: {message.splitlines()[0]}")
        self.write({"section": self.section, "work": work, "error": message[:2000]})

    def skip(self, work: str, why: str) -> None:
        self.skips.append(f"{self.section}, {work}: {why}")
        self.write({"section": self.section, "work": work, "skipped": why})

    def finish(self, facts: Mapping[str, Any], left_out: list[str]) -> None:
        result = {"facts": facts, "left_out": left_out, "errors": self.errors, "rows": self.written}
        unfinished = self.output.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(self.output)
        self.lines.close()

    def table(self, facts: Mapping[str, Any], left_out: list[str]) -> list[str]:
        title = ", ".join(str(facts[key]) for key in ("gpu", "cpu") if key in facts)
        lines = [f"{title}, torch {facts['torch']}, {facts['seconds']:.0f} s"]
        if facts["small"]:
            lines[0] = "small sizes, not a measurement: " + lines[0]
        notes = [f"error: {error}" for error in self.errors[:4]]
        if len(self.errors) > 4:
            notes.append(f"and {len(self.errors) - 4} more errors")
        notes += [f"skipped: {len(self.skips)}, such as {self.skips[0]}"] if self.skips else []
        notes += [f"left out, for want of time: {len(left_out)}: " + "; ".join(left_out)] if left_out else []
        notes.append(f"wrote {self.output}")
        rows = table_of(self.rows)
        most = MOST_LINES - len(lines) - len(notes)
        if len(rows) > most:
            rows = [*rows[: most - 1], f"and {len(rows) - most + 1} more lines in the file"]
        return [line[:WIDTH] for line in [*lines, *rows, *notes]]


def gpu_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        **gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """What nvidia-smi tells; it only reads."""
    command = ["nvidia-smi", "--query-gpu=" + ",".join(GPU_FACTS), "--format=csv,noheader", "--id=0"]
    values = output_of(command)
    return dict(zip(GPU_FACTS, (value.strip() for value in values.split(",")), strict=False)) if values else {}


def commit() -> str | None:
    name = output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if name and output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]):
        return f"{name}, with changes"
    return name or None


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def facts(device: torch.device, *, small: bool) -> dict[str, Any]:
    return {**machine_facts(), **gpu_facts(device), "commit": commit(), "small": small, "caches": CACHES}


def ceiling_row(result: Mapping[str, Any], work: str, *, in_table: bool) -> Row:
    """A row of what bench.cuda.ceilings measured."""
    return Row(
        name="ceilings, by themselves",
        work=work,
        params=result["params"],
        unit="TF/s" if result["unit"] == "TFLOP/s" else result["unit"],
        nce_ext=result["value"],
        nce_ext_p20=result["p20"],
        nce_ext_p80=result["p80"],
        rounds=result["rounds"],
        shown_as="value",
        in_table=in_table,
    )
