"""What every section of the benchmarks shares: the device, the stopwatch, the results, the ceilings found so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bench.cuda.cases import DeviceCase
from bench.cuda.measure import Stopwatch, free_bytes, release, value_row
from bench.cuda.report import Recorder

GIB = 2**30


class Job(NamedTuple):
    """One case of a section: what the run's time may cut off, and what may fail without stopping the rest."""

    work: str
    measure: Callable[[], None]


@dataclass
class Run:
    device: torch.device
    small: bool
    recorder: Recorder
    ceilings: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device, small=self.small)

    def sized(self, case: DeviceCase) -> DeviceCase:
        return case.smaller() if self.small else case

    def succeeds(self, work: str, baseline: Callable[[], object]) -> bool:
        """Whether a baseline runs: one that does not must not cost what stands beside it."""
        try:
            baseline()
            release(self.device)
        except RuntimeError as error:  # out of memory among them
            self.recorder.error(work, error)
            return False
        return True

    def copy_ceiling(self) -> float:
        """GB/s, bytes read plus bytes written, of the fastest copy known."""
        if not (known := list(self._values("copy"))):
            known = [self._measure_copy()]
        return max(known)

    def random_row_ceiling(self, row_bytes: int, law: str) -> tuple[float, int] | None:
        """GB/s of whole random rows of the size nearest to ``row_bytes``, and that size; None if it was not measured.

        The rate counts 4 bytes of id a row, which are taken off again.
        """
        rows = [
            (abs(size / row_bytes - 1), result["value"] * size / (size + result["params"]["id_bytes"]), size)
            for result in self.ceilings
            if result["name"] == "random rows" and result["params"]["ids"] == law
            for size in [result["params"]["row_bytes"]]
        ]
        return min(rows)[1:] if rows else None

    def _values(self, name: str) -> Iterator[float]:
        return (result["value"] for result in self.ceilings if result["name"] == name)

    def _measure_copy(self) -> float:
        size = 2**20 if self.small else min(2 * GIB, free_bytes(self.device) // 8)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = self.stopwatch.compare({"copy": lambda: target.copy_(source)}, 0.5)
        row = value_row(
            times,
            "copy",
            convert=lambda seconds: 2e-9 * size / seconds,
            name="ceilings, by themselves",
            work="copy, by torch",
            params={"bytes": size},
            unit="GB/s",
        )
        self.recorder.add(row)
        self.ceilings.append({"name": "copy", "params": {}, "unit": "GB/s", "value": row.nce_ext})
        return row.nce_ext
