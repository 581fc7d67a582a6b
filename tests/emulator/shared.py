"""Inputs of the epilogue of shared negatives, and what it must answer by objectives_oracle.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import emulated
import numpy as np
import objectives_oracle
from emulated import IGNORE, compute_dtype, stored, widened
from family import objective_options
from rounding import assert_rounded


@dataclass
class Shared:
    """B examples of D numbers, T targets, and U columns, of which `accidental_hits` mask some for each example."""

    batch: int = 3
    dim: int = 20
    columns: int = 13
    targets: int = 1
    classes: int = 17
    dtype: str = "float32"
    hidden_dtype: str | None = None
    with_bias: bool = True
    log_z: bool = True
    log_q: bool = True
    multiplicity: bool = True
    accidental_hits: bool = True
    example_weight: bool = True
    ignored: float = 0.0
    stride: int | None = None  # of logits
    first: int = 0  # elements before them
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng([self.seed, 3])
        compute = compute_dtype(self.dtype)
        number = lambda *shape: random.standard_normal(shape).astype(compute)  # noqa: E731
        self.hidden = stored(random.standard_normal((self.batch, self.dim)), self.hidden_dtype or self.dtype)
        self.weight = stored(random.standard_normal((self.classes, self.dim)) / self.dim**0.5, self.dtype)
        self.target = random.integers(self.classes, size=(self.batch, self.targets))
        self.target[random.random(self.target.shape) < self.ignored] = self.options.get("ignore_index", IGNORE)
        self.logits = 2 * number(self.batch, self.columns)
        self.shift = number(self.columns)
        self.bias = stored(number(self.classes), self.dtype) if self.with_bias else None
        self.log_z_values = number(self.batch) if self.log_z else None
        self.target_log_q = -3 * random.random(self.target.shape).astype(compute) if self.log_q else None
        self.counts = random.integers(0, 5, self.columns).astype(compute) if self.multiplicity else None
        self.ranges = None
        if self.accidental_hits:
            ends = np.sort(random.integers(0, self.columns + 1, (self.batch, self.targets, 2)), 2)
            short = random.random((self.batch, self.targets)) < 0.7
            ends[..., 1] = np.where(short, np.minimum(ends[..., 0] + random.integers(0, 3), self.columns), ends[..., 1])
            self.ranges = ends.astype(np.int32)
        self.scale = number(self.batch) if self.example_weight else None

    def run(self, grid: int = 0, order: int = 0, **changes: Any) -> dict[str, np.ndarray]:
        """With the derivatives of the columns as "dlogit"; what lies between rows of logits must stay as it is."""
        stride = self.stride or self.columns
        at = self.first + stride * np.arange(self.batch)[:, None] + np.arange(self.columns)
        n_elements = self.first + max(self.batch - 1, 0) * stride + self.columns
        memory = np.full(n_elements * self.logits.itemsize, 0xFF, np.uint8).view(self.logits.dtype)
        apart = (stride * memory.itemsize, memory.itemsize)
        logits = np.lib.stride_tricks.as_strided(memory[self.first :], self.logits.shape, apart)
        logits[:] = self.logits
        arguments = {
            "logits": logits, "hidden": self.hidden, "weight": self.weight, "bias": self.bias, "target": self.target,
            "target_log_q": self.target_log_q, "log_z": self.log_z_values, "column_shift": self.shift,
            "multiplicity": self.counts, "accidental_hits": self.ranges, "example_weight": self.scale, **self.options,
            **changes,
        }  # fmt: skip
        got = emulated.kernels().shared_loss(**arguments, grid=grid, order=order)
        assert (np.delete(memory, at.ravel()).view(np.uint8) == 0xFF).all()
        if "target_ids" in got:
            got["dlogit"] = logits.copy()
        return got

    def expected(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Values and scales."""
        options = self.options
        ignore = options.get("ignore_index", IGNORE)
        positive = self.target != ignore
        log_q = np.zeros(self.target.shape) if self.target_log_q is None else self.target_log_q.astype(np.float64)
        bad = (positive & ((self.target < 0) | (self.target >= self.classes) | ~np.isfinite(log_q))).any(1)
        fine = positive.any(1) & ~bad
        hidden, weight = widened(self.hidden), widened(self.weight)
        bias = np.zeros(self.classes) if self.bias is None else widened(self.bias)
        log_z = np.zeros(self.batch) if self.log_z_values is None else self.log_z_values.astype(np.float64)
        counts = np.ones(self.columns) if self.counts is None else self.counts.astype(np.float64)
        value = {name: np.zeros(shape) for name, shape in self.shapes().items()}
        scale = {name: np.zeros(shape) for name, shape in self.shapes().items()}
        value["loss"][bad] = np.nan
        for i in np.flatnonzero(fine):
            at = np.flatnonzero(positive[i])
            ids = self.target[i, at]
            live = counts > 0
            if self.ranges is not None:
                for begin, end in self.ranges[i, at]:
                    live[begin:end] = False
            live = np.flatnonzero(live)
            correction = log_q[i, at] if options.get("correct_positive", True) else np.zeros(len(at))
            terms = hidden[i].astype(np.longdouble) * weight[ids]
            others = [
                bias[ids],
                -correction,
                np.full(len(at), -log_z[i]),
                np.full(len(at), -options.get("offset", 0.0)),
            ]
            of_column = [self.logits[i, live].astype(np.float64), self.shift[live], np.full(len(live), -log_z[i])]
            z = np.concatenate([(terms.sum(1) + sum(others)).astype(np.float64), sum(of_column)])
            size = np.concatenate([np.abs(terms).sum(1) + sum(map(np.abs, others)), sum(map(np.abs, of_column))])
            truth = objectives_oracle.example(
                z, size.astype(np.float64), len(at), np.concatenate([np.ones(len(at)), counts[live]]),
                objective_options(options), log_q[i, 0],
            )  # fmt: skip
            share = 1 / (len(at) + options.get("n_draws", 0)) if options.get("mean_candidates") else 1.0
            upstream = share * (1.0 if self.scale is None else float(self.scale[i]))
            value["loss"][i], scale["loss"][i] = share * truth.loss, share * truth.loss_scale
            for out, dz, factor in ((value, truth.dz, upstream), (scale, truth.dz_scale, abs(upstream))):
                out["dlogit"][i, live] = factor * dz[len(at) :]
                out["target_dlogit"][i, at] = factor * dz[: len(at)]
                out["grad_shift"][i] = factor * dz.sum()
            value["grad_hidden"][i] = value["target_dlogit"][i, at] @ weight[ids]
            scale["grad_hidden"][i] = scale["target_dlogit"][i, at] @ np.abs(weight[ids])
        value["target_ids"] = np.where(positive & fine[:, None], self.target, -1)
        return value, scale

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "loss": (self.batch,), "dlogit": (self.batch, self.columns), "target_dlogit": (self.batch, self.targets),
            "grad_hidden": (self.batch, self.dim), "grad_shift": (self.batch,),
        }  # fmt: skip

    def check(self, got: dict[str, np.ndarray]) -> None:
        """Ids exactly, zeros exactly, values to the rounding of the arithmetic."""
        value, scale = self.expected()
        compute = compute_dtype(self.dtype)
        if "target_ids" in got:
            assert np.array_equal(got["target_ids"], value["target_ids"])
        for name in self.shapes():
            if name not in got:
                continue
            assert got[name].dtype == compute
            truth, values = value[name], got[name].astype(np.float64)
            assert np.array_equal(np.isnan(values), np.isnan(truth)), name
            assert not np.nan_to_num(values)[scale[name] == 0].any(), name
            known = ~np.isnan(truth)
            assert_rounded(values[known], truth[known], compute, name, scale[name][known])
