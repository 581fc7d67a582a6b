"""Inputs of the emulated kernels, and what they must answer: the oracle's float64 values and the ids of draws.py."""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import draws
import numpy as np
import oracle
import pytest
from rounding import assert_rounded

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
DTYPES = list(SIZE)
IGNORE = -100

# The largest dimension of every shape of csrc/cuda/shapes.cuh, whose kernels differ.
LAST_DIMS = {
    "float32": [32, 64, 128, 256, 384, 512, 8192, 16384],
    "bfloat16": [64, 128, 256, 512, 1024, 16384],
    "float16": [64, 128, 256, 512, 1024, 16384],
    "float64": [128, 2048, 16384],
}


@functools.cache
def kernels():
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("NCE_EXT_EMULATOR", root / "build/emulator")).resolve()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("emulated_kernels")
    except ImportError as error:
        reason = f"no emulated kernels: {error}; `make emulate` builds them"
    finally:
        sys.path.remove(str(folder))
    if os.environ.get("NCE_EXT_TEST_REQUIRE_NATIVE") == "1":
        pytest.fail(f"NCE_EXT_TEST_REQUIRE_NATIVE=1, but: {reason}")
    pytest.skip(reason)


def stored(values, dtype: str) -> np.ndarray:
    """Values rounded to dtype; bfloat16 is held as uint16."""
    values = np.asarray(values, np.float64)
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def row_shape(dtype: str, dim: int) -> tuple[int, int, int, bool, bool]:
    """Vectors of a lane, lanes of a group, rows in flight, whether warps share a row, whether registers hold it."""
    return kernels().row_shape(np.dtype("uint16" if dtype == "bfloat16" else dtype), dim)


def compute_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def lay_out(rows: np.ndarray, stride: int, first: int = 0) -> np.ndarray:
    """The same rows `stride` elements apart in memory that begins `first` elements before and ends with the last row.

    What lies between rows is NaN.
    """
    n, dim = rows.shape
    base = np.empty(first + max(n - 1, 0) * stride + dim, rows.dtype)
    base.view(np.uint8)[:] = 0xFF
    apart = (stride * base.itemsize, base.itemsize)
    view = np.lib.stride_tricks.as_strided(base[first:], (n, dim), apart)
    view[:] = rows
    return view


def far_apart(rows: np.ndarray, stride: int) -> np.ndarray:
    """The same rows `stride` elements apart in fresh pages, of which only those that hold rows are ever touched."""
    n, dim = rows.shape
    n_bytes = ((n - 1) * stride + dim) * rows.itemsize
    base = np.frombuffer(mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), rows.dtype)
    view = np.lib.stride_tricks.as_strided(base, (n, dim), (stride * rows.itemsize, rows.itemsize))
    view[:] = rows
    return view


def accesses(rows: np.ndarray) -> list[int]:
    """Bytes that a kernel may read at once, the widest first; 0 for single elements."""
    bits = rows.ctypes.data | rows.strides[0] | rows.shape[1] * rows.itemsize
    return [bytes_ for bytes_ in (16, 8, 0) if (bits % bytes_ == 0 if bytes_ else rows.itemsize < 8)]


def sample(noise: draws.Noise, seed, rows: int, columns: int, **launch: int) -> np.ndarray:
    return kernels().sample(*noise, seed, rows, columns, **launch)


class Expected(NamedTuple):
    ids: np.ndarray
    loss: np.ndarray
    dlogit: np.ndarray
    grad_hidden: np.ndarray
    rows: np.ndarray  # [V, D], for an upstream gradient of 1
    bias: np.ndarray
    scale: dict[str, np.ndarray]


@dataclass
class Problem:
    """B examples of D numbers, T targets and k negatives, V classes; every class has a bias and a log q."""

    batch: int = 3
    dim: int = 20
    classes: int = 23
    targets: int = 1
    negatives: int = 5
    dtype: str = "float32"
    hidden_dtype: str | None = None
    noise: str = "alias"
    given: str = ""  # negatives: "" drawn, "rows" for each example, "shared" by all
    given_log_q: bool = False
    with_bias: bool = True
    log_z: bool = True
    ignored: float = 0.0  # share of targets that are ignore_index
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random = np.random.default_rng(self.seed)
        compute = compute_dtype(self.dtype)
        self.hidden = stored(random.standard_normal((self.batch, self.dim)), self.hidden_dtype or self.dtype)
        self.weight = stored(random.standard_normal((self.classes, self.dim)) / self.dim**0.5, self.dtype)
        self.bias = stored(random.standard_normal(self.classes), self.dtype) if self.with_bias else None
        self.target = random.integers(self.classes, size=(self.batch, self.targets))
        ignore = self.options.get("ignore_index", IGNORE)
        self.target[random.random(self.target.shape) < self.ignored] = ignore
        self.log_z_values = random.standard_normal(self.batch).astype(compute) if self.log_z else None
        self.law = {
            "uniform": lambda: draws.Noise(draws.UNIFORM, self.classes),
            "log uniform": lambda: draws.Noise(draws.LOG_UNIFORM, self.classes),
            "alias": lambda: draws.alias_noise(1 / np.arange(1.0, self.classes + 1)),
        }[self.noise]()
        self.seed_words = random.integers(-(2**62), 2**62, 2)
        rows = 1 if self.given == "shared" else self.batch
        shape = (rows, self.negatives)
        self.given_ids = random.integers(self.classes, size=shape) if self.given else None
        self.target_log_q = self.negative_log_q = None
        if self.given_log_q:
            self.target_log_q = -3 * random.random(self.target.shape).astype(compute)
            if self.given:
                self.negative_log_q = -3 * random.random(shape).astype(compute)

    @property
    def all_negatives(self) -> np.ndarray:
        if self.given_ids is None:
            return self.law.draw(self.seed_words, self.batch, self.negatives)
        return np.broadcast_to(self.given_ids, (self.batch, self.negatives))

    def arguments(self) -> dict[str, Any]:
        drawn = self.given_ids is None
        return {
            "hidden": self.hidden,
            "weight": self.weight,
            "bias": self.bias,
            "target": self.target,
            "log_z": self.log_z_values,
            "seed": self.seed_words if drawn else None,
            "kind": self.law.kind,
            "table": self.law.table,
            "n_negatives": self.negatives if drawn else 0,
            "negatives": self.given_ids,
            "target_log_q": self.target_log_q,
            "negative_log_q": self.negative_log_q,
            **self.options,
        }

    def run(self, **launch: Any) -> dict[str, np.ndarray]:
        return kernels().sampled_loss(**{**self.arguments(), **launch})

    def log_q(self) -> np.ndarray:
        """[B, T + k]; 0 for an id out of range."""
        ids = np.concatenate([self.target, self.all_negatives], 1)
        if not self.options.get("subtract_log_q", True):
            return np.zeros(ids.shape)
        valid = (ids >= 0) & (ids < self.classes)
        log_q = np.where(valid, self.law.log_q(np.where(valid, ids, 0)), 0.0)
        if self.target_log_q is not None:
            log_q[:, : self.targets] = self.target_log_q
        if self.negative_log_q is not None:
            log_q[:, self.targets :] = self.negative_log_q
        return log_q

    def expected(self) -> Expected:
        options, log_q = self.options, self.log_q()
        ids = np.concatenate([self.target, self.all_negatives], 1)
        positive = self.target != options.get("ignore_index", IGNORE)
        present = np.concatenate([positive, np.ones((self.batch, self.negatives), bool)], 1)
        counted = positive.any(1)
        bad = counted & (present & ((ids < 0) | (ids >= self.classes) | ~np.isfinite(log_q))).any(1)
        fine = np.flatnonzero(counted & ~bad)
        present[~(counted & ~bad)] = False
        ids = np.where(present, ids, -1)
        live = present.copy()
        if options.get("remove_hits"):
            same = self.all_negatives[:, :, None] == self.target[:, None, :]
            live[:, self.targets :] &= ~(same & positive[:, None, :]).any(2)

        hidden, weight = widened(self.hidden), widened(self.weight)
        bias = np.zeros(self.classes) if self.bias is None else widened(self.bias)
        log_z = np.full(self.batch, options.get("offset", 0.0))
        if self.log_z_values is not None:
            log_z = log_z + self.log_z_values
        label_of = (lambda count: 1 / count) if options.get("uniform_labels") else (lambda count: 1.0)

        dlogit, dlogit_scale = np.zeros(ids.shape), np.zeros(ids.shape)
        for i in fine:
            share = 1 / (positive[i].sum() + self.negatives) if options.get("mean_candidates") else 1.0
            for c in np.flatnonzero(live[i]):
                terms = hidden[i].astype(np.longdouble) * weight[ids[i, c]]
                others = [bias[ids[i, c]], -log_z[i], -log_q[i, c]]
                z, size = float(terms.sum() + sum(others)), float(np.abs(terms).sum()) + sum(map(abs, others))
                label = label_of(positive[i].sum()) if c < self.targets else 0.0
                up, down = (1 - label) * oracle.sigmoid(z), label * oracle.sigmoid(-z)
                dlogit[i, c] = share * (up - down)
                dlogit_scale[i, c] = share * (up + down + oracle.sigmoid(z) * oracle.sigmoid(-z) * size)

        truth = oracle.nce(
            hidden[fine], weight, self.target[fine].tolist(), self.all_negatives[fine].tolist(), bias=bias,
            target_log_q=log_q[fine, : self.targets], negative_log_q=log_q[fine, self.targets :], correction="log_q",
            log_z=log_z[fine], remove_hits=options.get("remove_hits", False),
            candidate_reduction="mean" if options.get("mean_candidates") else "sum",
            positive_label="uniform" if options.get("uniform_labels") else "one", reduction="none",
            ignore_index=options.get("ignore_index", IGNORE),
        )  # fmt: skip

        def spread(values: np.ndarray, rest=0.0) -> np.ndarray:
            out = np.full((self.batch, *values.shape[1:]), rest)
            out[fine] = values
            return out

        loss = spread(truth.value.loss)
        loss[bad] = np.nan
        scale = {
            "loss": spread(truth.scale.loss), "dlogit": dlogit_scale, "grad_hidden": spread(truth.scale.hidden),
            "rows": truth.scale.weight, "bias": truth.scale.bias,
        }  # fmt: skip
        value = truth.value
        return Expected(ids.astype(np.int32), loss, dlogit, spread(value.hidden), value.weight, value.bias, scale)

    def poison_unused(self) -> None:
        """NaN in every row that no live candidate is, and in the hidden vectors of examples without any."""
        ids = self.expected().ids
        for rows, used in ((self.weight, np.unique(ids[ids >= 0])), (self.hidden, np.flatnonzero((ids >= 0).any(1)))):
            unused = np.setdiff1d(np.arange(len(rows)), used)
            rows[unused] = np.array(0xFFFF, np.uint16) if rows.dtype == np.uint16 else np.nan

    def check(self, got: dict[str, np.ndarray], expected: Expected | None = None) -> None:
        """Ids exactly, zeros exactly, values to the rounding of the arithmetic."""
        expected = expected or self.expected()
        compute = compute_dtype(self.dtype)
        if "ids" in got:
            assert np.array_equal(got["ids"], expected.ids)
        for name in ("loss", "dlogit", "grad_hidden"):
            if name not in got:
                continue
            assert got[name].dtype == compute
            truth, values = getattr(expected, name), got[name].astype(np.float64)
            assert np.array_equal(np.isnan(values), np.isnan(truth)), name
            left_out = expected.scale[name] == 0
            assert not np.nan_to_num(values)[left_out].any(), name
            known = ~np.isnan(truth)
            assert_rounded(values[known], truth[known], compute, name, expected.scale[name][known])


def assert_same_bits(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], what: Any = "") -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes(), f"{name} {what}"
