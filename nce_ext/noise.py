"""Noise distributions: where negatives come from, and the exact log-probability of drawing each.

Every distribution is an ``nn.Module``: it moves with ``.to()``, and what it needs lives in ``state_dict``. Drawing is a
pure function of a seed, so the same seed gives the same ids on every device, backend and thread count.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nce_ext import _ops, reference

MAX_CLASSES = 2**31 - 1

__all__ = ["LogUniform", "Noise", "Uniform", "Unigram"]


class Noise(nn.Module):
    """Base of the distributions over class ids 0 .. n_classes - 1. Use a subclass."""

    kind: int
    table: Tensor

    def __init__(
        self, n_classes: int, table: Tensor | None = None, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.n_classes = _check_n_classes(n_classes)
        # A law in closed form keeps an empty table, which remembers the device that .to() chose.
        entries = torch.empty((0, 4), dtype=torch.int32) if table is None else table
        self.register_buffer("table", entries.to(device), persistent=table is not None)

    def sample(
        self, shape: int | Sequence[int], *, generator: torch.Generator | None = None, seed: Tensor | None = None
    ) -> Tensor:
        """Draw ids with replacement.

        Equivalent to ``torch.multinomial(q, prod(shape), replacement=True).view(shape)`` at a cost that does not
        depend on ``n_classes``. The last dimension of ``shape`` counts slots, the ones before it examples: the id at
        (example, slot) depends on ``seed`` and on these two numbers only.

        Args:
            shape: of the result.
            generator: draws the seed when none is given; on the module's device.
            seed: int64 tensor of shape [2] on the module's device.

        Returns:
            int64 ids of that shape, on the module's device.

        Raises:
            TypeError, ValueError: a negative size; a seed of another dtype, shape or device.
        """
        sizes = tuple(operator.index(size) for size in ((shape,) if isinstance(shape, int) else shape))
        if any(size < 0 for size in sizes):
            raise ValueError(f"shape must have sizes >= 0, got {sizes}")
        device = self.table.device
        seed = draw_seed(device, generator) if seed is None else check_seed(seed, device)
        cols = sizes[-1] if sizes else 1
        rows = math.prod(sizes[:-1])
        if rows > 2**32 or cols > 2**32:
            raise ValueError(f"shape must have at most 2^32 examples of 2^32 slots, got {sizes}")
        return _ops.sample(self.kind, self.n_classes, self.table, seed, rows, cols).view(sizes)

    def log_prob(self, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Log-probability of drawing each id: of the law that ``sample`` realises, not of the one that was asked for.

        Args:
            ids: integer tensor of any shape, in 0 .. n_classes - 1.
            dtype: torch.float32, or torch.float64 for the full precision of the law. For ``Unigram`` float64 reads
                the whole table, so it costs O(n_classes).

        Returns:
            A tensor of the shape of ``ids``; -inf where the class is never drawn.

        Raises:
            TypeError, ValueError: ids that are not integers or are out of range; another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be an int64 or int32 tensor, got {describe(ids)}")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.n_classes:
                raise ValueError(f"ids must be in 0 .. {self.n_classes - 1}, got {low if low < 0 else high}")
        if dtype == torch.float64:
            return self._log_prob64(ids.long())
        return reference.log_q(self.kind, self.n_classes, self.table, ids.long())

    def _log_prob64(self, ids: Tensor) -> Tensor:
        raise TypeError("Noise is a base class: use Uniform, LogUniform or Unigram")

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}"


class Uniform(Noise):
    """Every class with probability 1 / n_classes.

    Args:
        n_classes: 1 .. 2^31 - 1.
    """

    kind = reference.UNIFORM

    def __init__(self, n_classes: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(n_classes, device=device)

    def _log_prob64(self, ids: Tensor) -> Tensor:
        return torch.full(ids.shape, -math.log(self.n_classes), dtype=torch.float64, device=ids.device)


class LogUniform(Noise):
    """Zipf-like noise for classes sorted by falling frequency: q(y) = log((y + 2) / (y + 1)) / log(n_classes + 1).

    The law of TensorFlow's ``log_uniform_candidate_sampler``; it needs no table, whatever ``n_classes`` is.

    Args:
        n_classes: 1 .. 2^31 - 1.
    """

    kind = reference.LOG_UNIFORM

    def __init__(self, n_classes: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(n_classes, device=device)

    def _log_prob64(self, ids: Tensor) -> Tensor:
        return reference.log_q_log_uniform(self.n_classes, ids)


class Unigram(Noise):
    """q(y) proportional to counts[y] ** power, drawn from an alias table in constant time.

    The table holds integer masses that sum to exactly n_classes * 2^32, so the realised law is known exactly:
    every class with a positive count has a mass of at least 1, and a class with count 0 is never drawn. A class
    that is never drawn cannot be a target under a log q correction.

    Args:
        counts: frequencies of the classes, finite and >= 0, not all zero; a 1-D tensor, array or sequence of any
            real dtype, with 1 .. 2^31 - 1 entries.
        power: exponent, finite and >= 0. 0.75 is word2vec's; 1 is the data's own law; 0 is uniform over the classes
            that occur.
        device: where the table goes.

    Raises:
        TypeError, ValueError: counts that are not real numbers, or not as above; the message says which and where.
    """

    kind = reference.ALIAS

    def __init__(self, counts: Any, power: float = 0.75, *, device: torch.device | str | None = None) -> None:
        weights = _check_counts(counts)
        if not isinstance(power, (int, float)) or not math.isfinite(power) or power < 0:
            raise ValueError(f"power must be a finite number >= 0, got {power!r}")
        table = _ops.alias_table(*_unnormalised_law(weights, float(power)))
        super().__init__(len(weights), table, device=device)
        self.power = float(power)

    def _log_prob64(self, ids: Tensor) -> Tensor:
        masses = reference.alias_masses(self.table)[ids].double()
        return torch.log(masses) - math.log(self.n_classes * 2.0**32)

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}, power={self.power:g}"


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed from torch's own random state: int64 [2]."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def check_seed(seed: Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor of shape [2], got {describe(seed)}")
    if seed.device != device:
        raise ValueError(f"seed must be on {device}, got {seed.device}")
    if seed.shape != (2,):
        raise ValueError(f"seed must have shape [2], got {list(seed.shape)}")
    return seed


def describe(value: object) -> str:
    """What a wrong argument is, for an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__


def _check_n_classes(n_classes: int) -> int:
    if isinstance(n_classes, bool) or not isinstance(n_classes, int):
        raise TypeError(f"n_classes must be an int, got {describe(n_classes)}")
    if not 1 <= n_classes <= MAX_CLASSES:
        raise ValueError(f"n_classes must be in 1 .. 2^31 - 1, got {n_classes}")
    return n_classes


def _check_counts(counts: Any) -> Tensor:
    try:
        # numpy reads Python numbers as float64; torch would make them float32.
        weights = torch.as_tensor(counts if isinstance(counts, Tensor) else np.asarray(counts))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"counts must be a 1-D tensor, array or sequence of numbers ({error})") from None
    if weights.is_complex() or weights.is_sparse:
        raise TypeError(f"counts must be dense real numbers, got {describe(weights)}")
    if weights.dim() != 1:
        raise ValueError(f"counts must be 1-D, got shape {list(weights.shape)}")
    if not 1 <= len(weights) <= MAX_CLASSES:
        raise ValueError(f"counts must have 1 .. 2^31 - 1 entries, got {len(weights)}")
    weights = weights.detach().to("cpu", torch.float64)
    low, high = torch.aminmax(weights)  # NaN if any entry is
    if not (torch.isfinite(high) and low >= 0):
        bad = ~(torch.isfinite(weights) & (weights >= 0))
        where = int(bad.nonzero()[0, 0])
        raise ValueError(f"counts must be finite and >= 0, got {float(weights[where])} at index {where}")
    if high == 0:
        raise ValueError(f"counts must not all be zero, got {len(weights)} zeros")
    return weights


def _unnormalised_law(counts: Tensor, power: float) -> tuple[Tensor, float]:
    """float64 weights counts ** power, and the factor that makes them sum to V 2^32.

    Counts are divided by their maximum first, so that no power overflows; what underflows is lifted to the smallest
    normal number, since a class that occurs keeps a positive mass.
    """
    weights = (counts / counts.max()).pow_(power)
    tiny = torch.finfo(torch.float64).tiny
    if power == 0 or float(weights.min()) < tiny:
        weights = torch.where(counts > 0, weights.clamp_min(tiny), 0)
    total = float(weights.numpy().sum())  # pairwise, and in one order whatever the number of threads
    return weights, len(weights) * 2.0**32 / total
