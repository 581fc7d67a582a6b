"""Programs timed in turns, by CUDA events; on a CPU by the clock, to show that a benchmark works."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from bench.timing import OURS, Program, Row, Times

INTERVAL = 5e-3  # seconds a timed interval lasts at least
SHARE_OF_FREE = 0.8


class DoesNotFit(Exception):
    """A case that is left out, and why."""


class Stopwatch:
    def __init__(self, device: torch.device, *, small: bool) -> None:
        self.cuda = device.type == "cuda"
        self.small = small

    def seconds(self, program: Program, repetitions: int = 1) -> float:
        """Of one repetition. No cache is flushed: each finds what the one before it left."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repetitions):
                program()
            return (time.perf_counter() - start) / repetitions
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        program()  # untimed: the GPU is at work while the first timed call is launched, and memory is as it left it
        begin.record()
        for _ in range(repetitions):
            program()
        end.record()
        end.synchronize()
        return max(1e-7, begin.elapsed_time(end) * 1e-3) / repetitions

    def compare(self, programs: Mapping[str, Program], budget: float = 1.0, *, least_rounds: int = 5) -> Times:
        """As many rounds as ``budget`` seconds allow; each times every program once, over an interval."""
        for program in programs.values():
            program()  # loads and compiles
        once = {name: self.seconds(program) for name, program in programs.items()}
        if self.small:
            repetitions, rounds = dict.fromkeys(programs, 1), 2
        else:
            repetitions = {name: min(1000, math.ceil(INTERVAL / seconds)) for name, seconds in once.items()}
            cost = sum((1 + repetitions[name]) * once[name] for name in programs)
            rounds = int(min(max(budget / cost, least_rounds), 30))
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(rounds):
            for name, program in programs.items():
                seconds[name].append(self.seconds(program, repetitions[name]))
        return Times({name: np.array(taken) for name, taken in seconds.items()})


def value_row(times: Times, program: str = OURS, *, convert: Callable | None = None, **fields) -> Row:
    """A row of one program without another beside it: in ms, or as ``convert`` makes of its seconds."""
    values = (convert or (lambda seconds: seconds * 1e3))(times.seconds[program])
    fields = {"unit": "ms", "shown_as": "value", **fields}
    return Row(
        nce_ext=float(np.median(values)),
        nce_ext_p20=float(np.percentile(values, 20)),
        nce_ext_p80=float(np.percentile(values, 80)),
        rounds=len(values),
        **fields,
    )


def share_row(row: Row, baseline: float, against: str, **fields) -> Row:
    """The same row as a part of a ceiling, or as a multiple of ``baseline``."""
    for key, value in {"shown_as": "limit", **fields}.items():
        setattr(row, key, value)
    row.baseline, row.against = baseline, against
    row.ratio = row.nce_ext / baseline
    if row.nce_ext_p20 is not None and row.nce_ext_p80 is not None:
        row.ratio_p20, row.ratio_p80 = row.nce_ext_p20 / baseline, row.nce_ext_p80 / baseline
    return row


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def require(needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if needed > SHARE_OF_FREE * free:
        share = f"{SHARE_OF_FREE:.0%} of the {free / 2**30:.1f} GiB that are free"
        raise DoesNotFit(f"needs {needed / 2**30:.1f} GiB, more than {share}")


def peak_beyond_now(program: Program, device: torch.device) -> int:
    """Bytes that the memory in use rises by while the program runs, at most."""
    if device.type != "cuda":
        from bench.memory import peak_beyond_now as resident_peak

        return resident_peak(program)
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    program()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
