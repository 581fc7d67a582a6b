"""Pairs (class, coefficient) for the row gradient and for steps that are fused with it."""

from __future__ import annotations

from dataclasses import dataclass

import emulated
import numpy as np
from emulated import compute_dtype, stored, widened
from rounding import assert_rounded

JOINED_ALONE = 32  # tiles that one warp adds up by itself: kJoinAlone of csrc/cuda/row_grad_join.cuh


@dataclass
class Pairs:
    """ids [B, columns], a coefficient for each, and hidden [B, D]."""

    ids: np.ndarray
    classes: int = 40
    dim: int = 5
    dtype: str = "float32"
    hidden_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        compute = compute_dtype(self.dtype)
        batch = len(self.ids)
        self.ids = np.ascontiguousarray(self.ids, np.int32)
        self.dlogit = random.standard_normal(self.ids.shape).astype(compute)
        self.grad_loss = random.standard_normal(batch).astype(compute)
        self.hidden = stored(random.standard_normal((batch, self.dim)), self.hidden_dtype or self.dtype)

    def run(self, layout: str = "exact", **launch) -> dict[str, np.ndarray]:
        dtype = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)
        operands = (self.ids, self.dlogit, self.grad_loss, self.hidden)
        return emulated.kernels().row_grad(*operands, self.classes, dtype, layout, **launch)

    def check(self, got: dict[str, np.ndarray], layout: str = "exact") -> None:
        touched, values, sizes = self.sums()
        n_rows = self.classes if layout == "dense" else min(self.ids.size, self.classes) if layout == "padded" else 0
        n_rows = n_rows or (len(touched) if layout == "exact" else 0)
        place = touched if layout == "dense" else np.arange(len(touched))
        if layout != "dense":
            classes = np.zeros(n_rows, np.int64)
            classes[place] = touched
            assert np.array_equal(got["classes"], classes)
        for name in ("rows", "bias"):
            if name not in got:
                continue
            truth, size = (np.zeros((n_rows, values[name].shape[1])) for _ in range(2))
            truth[place], size[place] = values[name], sizes[name]
            found = widened(got[name]).reshape(truth.shape)
            assert not found[size == 0].any()
            assert_rounded(found, truth, self.dtype, name, size)

    def sums(self) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Classes that are touched; their rows and bias elements, and the scales of these."""
        example, column = np.nonzero(self.ids >= 0)
        touched, place, terms = np.unique(self.ids[example, column], return_inverse=True, return_counts=True)
        coefficient = (self.dlogit[example, column].astype(np.float64) * self.grad_loss[example])[:, None]
        values, sizes = {}, {}
        for name, factor in (("rows", widened(self.hidden)[example]), ("bias", np.ones((len(place), 1)))):
            value, scale = (np.zeros((len(touched), factor.shape[1])) for _ in range(2))
            np.add.at(value, place, coefficient * factor)
            np.add.at(scale, place, abs(coefficient * factor))
            # A sum of n terms in order may be off by n eps of their magnitudes; see oracle.py.
            values[name], sizes[name] = value, scale * (1 + terms[:, None] / 32)
        return touched, values, sizes


def random_ids(batch: int, columns: int, classes: int, *, absent: float = 0.1, skew: float = 3.0, seed: int = 0):
    """Few hot classes and many rare ones."""
    random = np.random.default_rng(seed)
    ids = (classes * random.random((batch, columns)) ** skew).astype(np.int32)
    ids[random.random(ids.shape) < absent] = -1
    return ids


def segments(*lengths: int, absent: int = 0, shuffled: bool = True) -> np.ndarray:
    """Pairs of classes 0, 1, ... of these lengths, and of no class, over examples of one column each."""
    ids = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), np.full(absent, -1)])
    return (np.random.default_rng(len(ids)).permutation(ids) if shuffled else ids)[:, None]


SEGMENTS = {
    "ends at a tile's end": (64,),
    "each ends at a tile's end": (64, 64, 64),
    "two tiles exactly": (128, 64, 128),
    "begins at a tile's last pair": (63, 65, 63, 2),
    "crosses by one": (65, 64, 63),
    "a tile of single pairs": (1,) * 70,
    "one within, one across": (10, 100, 10, 72, 1),
    "three tiles inside": (60, 200, 60),
    "as many tiles as one warp adds up": (5, 64 * JOINED_ALONE + 30, 3),
    "one tile more": (5, 64 * (JOINED_ALONE + 1) + 30, 3),
    "the whole block, ends at a tile's end": (64 * 40,),
    "several for the whole block": (64 * 35 + 7, 64 * 33 + 1, 2, 64 * 50 + 20, 30),
}
