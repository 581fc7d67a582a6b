"""Builds and calls random_rows.cpp. It is compiled for this very processor when a benchmark asks, and never shipped."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("random_rows.cpp")


class Prefetch(NamedTuple):
    ahead: int  # rows between a request and its use
    locality: int  # 3: into the first-level cache, 2: the second, 0: past the outer ones


PREFETCHES = [Prefetch(ahead, locality) for ahead in (1, 2, 4, 8, 16) for locality in (0, 2, 3)]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def library() -> ctypes.CDLL:
    """The reader. Its OpenMP threads are torch's own: libgomp is loaded once, by name, so no two pools compete."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "random_rows.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(binary)], check=True)
        loaded = ctypes.CDLL(str(binary))
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    loaded.sum_random_rows.argtypes = [pointer, int64, pointer, int64, int64, ctypes.c_int, ctypes.c_int]
    loaded.sum_random_rows.restype = ctypes.c_float
    return loaded


def sum_rows(table: Tensor, ids: Tensor, prefetch: Prefetch) -> float:
    """The sum of all numbers in rows ``ids`` (int64) of ``table`` (float32 [V, D]), on torch's number of threads."""
    dim, threads = table.shape[1], torch.get_num_threads()
    return library().sum_random_rows(table.data_ptr(), dim, ids.data_ptr(), ids.numel(), *prefetch, threads)


def fastest(table: Tensor, ids: Tensor, rounds: int) -> Prefetch:
    """The prefetch with which the plain read is fastest here: it is to be a limit, not a straw man."""
    seconds: dict[Prefetch, list[float]] = {prefetch: [] for prefetch in PREFETCHES}
    for _ in range(rounds):
        for prefetch, taken in seconds.items():
            start = time.perf_counter()
            sum_rows(table, ids, prefetch)
            taken.append(time.perf_counter() - start)
    return min(seconds, key=lambda prefetch: median(seconds[prefetch]))
