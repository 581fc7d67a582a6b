"""The base class of noise distributions, and the ones whose law is fixed: Uniform, LogUniform and Unigram."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nce_ext import _checks, reference
from nce_ext._ops.alias_table import alias_table
from nce_ext._ops.sample import draw_seed, sample
from nce_ext.noise.law_table import LawTable

# sample_distinct gives up after max(_DRAWS, _DRAWS_PER_ID * k) draws.
_DRAWS, _DRAWS_PER_ID = 2**22, 64


class Noise(LawTable):
    """Base class of the noise distributions over class ids 0 .. n_classes - 1; construct one of its subclasses."""

    def __init__(
        self, n_classes: int, table: Tensor | None = None, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.n_classes = _checks.n_classes(n_classes)
        self._hold(table, device)

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
        shape = _checks.plain(shape)
        sizes = tuple(operator.index(size) for size in ((shape,) if isinstance(shape, int) else shape))
        if any(size < 0 for size in sizes):
            raise ValueError(f"shape must have sizes >= 0, got {sizes}")
        device = self.table.device
        seed = draw_seed(device, generator) if seed is None else _checks.seed(seed, device)
        examples, slots = math.prod(sizes[:-1]), sizes[-1] if sizes else 1
        if examples > 2**32 or slots > 2**32:
            raise ValueError(f"shape must have at most 2^32 examples of 2^32 slots, got {sizes}")
        self.check_table()
        return self.draw(seed, examples, slots).view(sizes)

    def draw(self, seed: Tensor, examples: int, slots: int) -> Tensor:
        """Draw ``slots`` ids for each of ``examples`` examples: ``sample`` of a known seed, without its checks."""
        return sample(seed, self.table, self.kind, self.n_classes, examples, slots)

    def log_prob(self, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute the log-probability with which ``sample`` draws each id.

        An alias table holds probabilities rounded to integer masses; these are the rounded ones.

        Args:
            ids: integer tensor of any shape, in 0 .. n_classes - 1.
            dtype: torch.float32, or torch.float64 for the full precision of the law. For ``Unigram`` float64 reads
                the whole table, so it costs O(n_classes).

        Returns:
            A tensor of the shape of ``ids``; -inf where the class is never drawn.

        Raises:
            TypeError, ValueError: ids that are not integers or are out of range; another dtype.
        """
        _checks.log_q_dtype(dtype)
        _checks.class_ids(ids, self.n_classes)
        self.check_table()
        if dtype == torch.float64:
            return self._log_prob64(ids.long())
        return reference.log_q(self.kind, self.n_classes, self.table, ids.long())

    def sample_distinct(
        self, k: int, *, generator: torch.Generator | None = None, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw until k different ids are found: sampling without replacement as TensorFlow does it.

        Equivalent to reading ``sample(n, seed=seed)`` for a large n from its start up to the k-th id that has not
        come before; a pure function of the seed. On CUDA it waits for the device, as nobody knows n beforehand: use
        the distinct ids of a fixed number of draws and their ``log_inclusion`` where that must not be.

        Args:
            k: 0 .. the number of classes that can be drawn.
            generator, seed: as in ``sample``.

        Returns:
            ids int64 [k] in the order of their first appearance, and the number of draws it took, an int64 scalar
            tensor; both on the module's device.

        Raises:
            TypeError, ValueError: k is no int or out of range; a seed as ``sample`` refuses it.
            RuntimeError: k ids were not found in max(2^22, 64 k) draws, since the rest are too improbable.
        """
        k = _checks.count("k", k, 0, self.n_classes, wanted=f"in 0 .. {self.n_classes} = n_classes")
        device = self.table.device
        seed = draw_seed(device, generator) if seed is None else _checks.seed(seed, device)
        return self._distinct(k, seed, max(16, 2 * k))

    def _distinct(self, k: int, seed: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Draw k different ids, as ``sample_distinct`` says, from a block of draws that doubles until it holds them.

        Every block starts at the first slot again, so the ids do not depend on the sizes of blocks.
        """
        limit = max(_DRAWS, _DRAWS_PER_ID * k)
        drawable = None
        while True:
            block = min(block, limit)
            draws = self.sample(block, seed=seed)
            values, order = torch.sort(draws, stable=True)
            new = torch.ones_like(values, dtype=torch.bool)
            new[1:] = values[1:] != values[:-1]
            first = torch.sort(order[new]).values[:k]
            if len(first) == k:
                return draws[first], first[-1] + 1 if k else first.new_zeros(())
            if drawable is None:
                drawable = self._count_drawable()
                if k > drawable:
                    raise ValueError(f"k must be at most {drawable}, the classes that can be drawn, got {k}")
            if block == limit:
                raise RuntimeError(
                    f"found {len(first)} different ids in {limit} draws, not {k}: the others are too improbable; "
                    "ask for fewer, or use a flatter law (a lower power)"
                )
            block *= 2

    def _count_drawable(self) -> int:
        """Count the classes of positive probability."""
        return self.n_classes

    def log_inclusion(self, ids: Tensor, trials: int | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute the log-probability that an id is among ``trials`` draws with replacement: log(1 - (1 - q)^trials).

        It is the exact correction for the distinct ids of ``sample(trials)``: 1[id was drawn] / inclusion(id) has
        mean 1. Computed in float64, which keeps its digits for q near 0 and near 1. Waits for no device.

        Args:
            ids: integer tensor of any shape, in 0 .. n_classes - 1.
            trials: number of draws >= 0, an int or an integer scalar tensor on the device of ``ids``.
            dtype: as in ``log_prob``.

        Returns:
            A tensor of the shape of ``ids``; -inf where the class is never drawn, 0 where every draw is that class.

        Raises:
            TypeError, ValueError: as ``log_prob``; trials of another type, shape or device, or negative.
        """
        # For its float64 log q a table would be read as a whole; its float32 one is correctly rounded.
        closed_form = dtype == torch.float32 and self.kind != reference.ALIAS
        log_q = self.log_prob(ids, dtype=torch.float64 if closed_form else dtype).double()
        trials = _checks.trials(trials, log_q.device)
        missed = trials * log1mexp(log_q)
        return log1mexp(torch.where(torch.isnan(missed), 0, missed)).to(dtype)  # 0 draws of a certain class: 0 * -inf

    def log_expected_count_tf(
        self, ids: Tensor, k: int, trials: int | Tensor, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Compute the log of TensorFlow's expected count of each id among the k ids of ``sample_distinct``.

        That is k q if trials == k, else 1 - (1 - q)^trials (``tf.random.log_uniform_candidate_sampler`` and its
        like with ``unique=True``). It treats the number of draws as if it had been fixed before, so for probable
        classes it is too large and can exceed 1. For parity only; ``log_inclusion`` for a fixed number is exact.

        Args:
            ids, trials, dtype: as in ``log_inclusion``; ``trials`` as ``sample_distinct`` returned it.
            k: number of different ids that were sampled, >= 0.

        Returns:
            A tensor of the shape of ``ids``. Waits for no device.

        Raises:
            TypeError, ValueError: as ``log_inclusion``; k that is no int, or negative.
        """
        k = _checks.count("k", k, 0)
        inclusion = self.log_inclusion(ids, trials, dtype=dtype)
        count = self.log_prob(ids, dtype=dtype) + (math.log(k) if k else -math.inf)
        if isinstance(trials, Tensor):
            return torch.where(trials == k, count, inclusion)
        return count if trials == k else inclusion

    def probabilities(self) -> Tensor:
        """Compute the probabilities of all classes: float64 [n_classes] on the module's device, at O(n_classes)."""
        self.check_table()
        return torch.exp(self._log_prob64(torch.arange(self.n_classes, device=self.table.device)))

    def _log_prob64(self, ids: Tensor) -> Tensor:
        """Compute ``log_prob`` of valid int64 ids, in float64."""
        raise TypeError("Noise is a base class: use Uniform, LogUniform, Unigram, Mixture or Streaming")

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}"


class Uniform(Noise):
    """Noise that draws every class with probability 1 / n_classes.

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

    This is the law of TensorFlow's ``log_uniform_candidate_sampler``; it needs no table, whatever ``n_classes`` is.

    Args:
        n_classes: 1 .. 2^31 - 1.
    """

    kind = reference.LOG_UNIFORM

    def __init__(self, n_classes: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(n_classes, device=device)

    def _log_prob64(self, ids: Tensor) -> Tensor:
        return reference.log_q_log_uniform(self.n_classes, ids)


class TableNoise(Noise):
    """Base class of the distributions that draw from an alias table: any law, in constant time a draw."""

    kind = reference.ALIAS

    def _count_drawable(self) -> int:
        return int(torch.count_nonzero(~torch.isinf(self.table[:, 2].view(torch.float32))))

    def _log_prob64(self, ids: Tensor) -> Tensor:
        masses = reference.alias_masses(self.table)[ids].double()
        return torch.log(masses) - math.log(self.n_classes * 2.0**32)


class Unigram(TableNoise):
    """Noise with q(y) proportional to counts[y] ** power, drawn from an alias table in constant time.

    The table holds integer masses that sum to exactly n_classes * 2^32, so the realised law is known exactly:
    every class with a positive count has a mass of at least 1, and a class with count 0 is never drawn. A class
    that is never drawn cannot be a target under a log q correction.

    Args:
        counts: frequencies of the classes, finite and >= 0, not all zero; a 1-D tensor, array or sequence of any
            real dtype, with 1 .. 2^31 - 1 entries.
        power: exponent, finite and >= 0. 0.75 is word2vec's; 1 is the data's own law; 0 is uniform over the classes
            that occur.
        device: where the table goes; by default torch's default device.

    Raises:
        TypeError, ValueError: counts that are not real numbers, or not as above; the message says which and where.
    """

    def __init__(self, counts: Any, power: float = 0.75, *, device: torch.device | str | None = None) -> None:
        weights = _checks.counts(counts)
        power = _checks.power(power)
        super().__init__(len(weights), alias_table_of(weights, power), device=device)
        self.power = power

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}, power={self.power:g}"


def log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - e^x) for x <= 0, to full relative precision near 0 and near minus infinity."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def alias_table_of(counts: Tensor, power: float) -> Tensor:
    """Build the alias table, int32 [V, 4], of the law proportional to float64 counts ** power."""
    return alias_table(*_unnormalised_law(counts, power))


def _unnormalised_law(counts: Tensor, power: float) -> tuple[Tensor, float]:
    """Compute float64 weights proportional to counts ** power, and the factor that makes them sum to V 2^32.

    Counts are divided by their maximum first, so that no power overflows; what underflows is lifted to the smallest
    normal number, since a class that occurs keeps a positive mass.
    """
    weights = (counts / counts.max()).pow_(power)
    tiny = torch.finfo(torch.float64).tiny
    if power == 0 or float(weights.min()) < tiny:
        weights = torch.where(counts > 0, weights.clamp_min(tiny), 0)
    total = float(weights.numpy().sum())  # pairwise, and in one order whatever the number of threads
    return weights, len(weights) * 2.0**32 / total
