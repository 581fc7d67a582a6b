"""A noise distribution whose frequencies are estimated from the training batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nce_ext import _checks
from nce_ext.noise.laws import TableNoise, alias_table_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Streaming(TableNoise):
    """Noise whose class frequencies are estimated batch by batch, for data whose counts are unknown or drift.

        noise = nce_ext.noise.Streaming(n_classes, half_life=1000)
        for step, (x, target) in enumerate(batches):
            noise.update(target)
            log_q = noise.log_frequency(target)          # in-batch softmax: the newest estimate
            if step % 1000 == 0:
                noise.rebuild()                          # sampled negatives: a law that is fixed meanwhile

    ``update`` and ``log_frequency`` cost what they touch, whatever ``n_classes`` is, and wait for no device.
    ``sample`` and ``log_prob`` use the law of the last ``rebuild()``, the uniform one before the first, because a
    correction must be of the law that was drawn from. The law is the estimate to the power ``power``, normalised.

    ``estimator="counts"``: how often a class occurs per example, from counts that decay with the batches:

        c <- 2^(-1 / half_life) c + occurrences in the batch;  p = (c + prior / n_classes) / (sum of c + prior)

    With a constant law its mean is exact but for the prior, also where a class occurs many times in a batch.

    ``estimator="interval"``: in which share of the batches a class occurs, from the time between them (Yi et al.,
    "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019, with an entry for
    every class in place of hashing). In batch t, for every class in it,

        B <- (1 - rate) B + rate (t - A);  A <- t;  p = 1 / B

    where the first occurrence sets B = t. However often a class is in one batch it counts once there, so p
    saturates at 1: classes that are in every batch get one and the same p, whatever their frequencies are. For them
    take "counts". The mean of B is 1 / p; that of 1 / B is above p by about rate / 2 of it. B changes only when the
    class occurs, so a class that has gone keeps its p; "counts" forgets it.

    All state is in ``state_dict``: 16 bytes per class beside the alias table, integers so that ``.half()`` does not
    round them.

    Args:
        n_classes: 1 .. 2^31 - 1.
        estimator: "counts" or "interval".
        half_life: for "counts", the batches after which an occurrence weighs half; > 0, math.inf for plain counts.
        rate: for "interval", the weight of the newest interval, in (0, 1].
        prior: for "counts", examples that were seen in advance, spread evenly over the classes; finite and > 0. It
            keeps the frequency of an unseen class above 0.
        power: exponent of the sampling law, finite and >= 0.
        device: where the state goes.

    Raises:
        TypeError, ValueError: an argument that is not as above.
    """

    values: Tensor
    last_step: Tensor
    step: Tensor
    total: Tensor

    def __init__(
        self,
        n_classes: int,
        *,
        estimator: str = "counts",
        half_life: float = 1000.0,
        rate: float = 0.05,
        prior: float = 1.0,
        power: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        n_classes = _checks.n_classes(n_classes)
        if estimator not in ("counts", "interval"):
            raise ValueError(f"estimator must be 'counts' or 'interval', got {estimator!r}")
        half_life = _checks.number("half_life", half_life, above=0, infinite=True)
        rate = _checks.number("rate", rate, above=0, high=1)
        prior, power = _checks.number("prior", prior, above=0), _checks.power(power)
        uniform = torch.ones(n_classes, dtype=torch.float64, device="cpu")
        super().__init__(n_classes, alias_table_of(uniform, 1.0), device=device)
        self.estimator, self.half_life, self.rate = estimator, float(half_life), float(rate)
        self.prior, self.power = float(prior), power
        # The last of n_classes + 1 entries takes the ignored ids. values and total are the bits of float64 numbers.
        self.register_buffer("values", torch.zeros(n_classes + 1, dtype=torch.int64, device=device))
        self.register_buffer("last_step", torch.zeros(n_classes + 1, dtype=torch.int64, device=device))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("total", torch.zeros(1, dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, ids: Tensor, *, ignore_index: int = -100) -> None:
        """Learn from one batch; the time of both estimators counts these calls, empty batches too.

        Args:
            ids: classes that occurred, with their repetitions; an integer tensor of any shape on the module's device.
            ignore_index: entries of this value are padding. (On CUDA, where no value can be looked at without
                waiting, every id out of range is.)

        Raises:
            TypeError, ValueError: ids that are not integers, are on another device or out of range.
        """
        _checks.class_ids(ids, self.n_classes, device=self.table.device, ignore_index=ignore_index)
        entries = self._entries(ids.flatten())
        self.step += 1
        values, total = self.values.view(torch.float64), self.total.view(torch.float64)
        elapsed = self.step - self.last_step[entries]
        # Repetitions of an id write the same value, so the order of the writes does not matter.
        if self.estimator == "counts":
            values[entries] = values[entries] * self._decay(elapsed)
            values.index_add_(0, entries, torch.ones_like(entries, dtype=torch.float64))
            total *= self._decay(torch.ones_like(self.step))
            total += (entries < self.n_classes).sum()
        else:
            first = (self.last_step[entries] == 0).double()
            rate = self.rate + (1 - self.rate) * first
            values[entries] = (1 - rate) * values[entries] + rate * elapsed
        self.last_step[entries] = self.step

    @torch.no_grad()
    def log_frequency(self, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute the log of the current estimate p of each id, for the log q correction of an in-batch softmax.

        With "counts" the p of all classes sum to 1. With "interval" p is per batch, so larger by about the batch
        size as long as it is far from 1; a softmax does not see such a constant. A class that has not been seen in t
        batches has p = prior / n_classes / (sum of c + prior) with "counts", and 1 / (t + 1) with "interval".

        Args:
            ids: integer tensor of any shape, in 0 .. n_classes - 1, on the module's device.
            dtype: torch.float32 or torch.float64.

        Returns:
            A tensor of the shape of ``ids``, finite and <= 0; NaN for ids out of range on CUDA.

        Raises:
            TypeError, ValueError: ids as in ``update`` or out of range; another dtype.
        """
        _checks.log_q_dtype(dtype)
        _checks.class_ids(ids, self.n_classes, device=self.table.device)
        entries = self._entries(ids)
        return torch.where(entries < self.n_classes, self._log_estimate(entries), torch.nan).to(dtype)

    @torch.no_grad()
    def rebuild(self) -> None:
        """Make the current estimate, to the power ``power``, the law of ``sample`` and ``log_prob``.

        Costs O(n_classes) and waits for the device; the table is built on the CPU and written in place. A class that
        was never seen keeps a positive probability.
        """
        log_p = self._log_estimate(torch.arange(self.n_classes, device=self.table.device))
        self.table.copy_(alias_table_of(torch.exp(log_p).cpu(), self.power))
        self._trust_table()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.values.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.values.is_meta:  # memory that nobody has filled: nothing has been seen
            for state in (self.values, self.last_step, self.step, self.total):
                state.zero_()
        return self

    def _log_estimate(self, entries: Tensor) -> Tensor:
        """Compute log p of these entries of the state, in float64."""
        values, elapsed = self.values.view(torch.float64)[entries], self.step - self.last_step[entries]
        if self.estimator == "interval":
            return -torch.log(torch.where(self.last_step[entries] == 0, (self.step + 1).double(), values))
        share = values * self._decay(elapsed) + self.prior / self.n_classes
        return torch.log(share / (self.total.view(torch.float64) + self.prior)).clamp_max(0)

    def _decay(self, elapsed: Tensor) -> Tensor:
        """Compute the factor by which a count has decayed after so many batches."""
        return torch.exp2(elapsed.double() * (-1 / self.half_life))

    def _entries(self, ids: Tensor) -> Tensor:
        """Map ids to entries of the state; those out of range to the last one, which no class has."""
        ids = ids.long()
        return torch.where((ids >= 0) & (ids < self.n_classes), ids, self.n_classes)

    def extra_repr(self) -> str:
        if self.estimator == "counts":
            option = f"half_life={self.half_life:g}, prior={self.prior:g}"
        else:
            option = f"rate={self.rate:g}"
        return f"n_classes={self.n_classes}, estimator={self.estimator!r}, {option}, power={self.power:g}"
