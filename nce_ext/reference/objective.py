"""Objectives, which say what is made of an example's corrected scores, in the two forms that they have outside of C++.

*Whole*: all columns of an example are at hand, and autograd differentiates (:meth:`Objective.losses`).

*Reduced*: no process has all of an example's negatives, and their scores are not kept. Each process adds its own up to
a maximum and a few sums (:meth:`Objective.partial`), which become those of all negatives by one maximum and one sum
over the processes (:meth:`Objective.rebase` in between). With them, and with the scores of the targets, which are few
and known everywhere, a process computes the loss of each example and the derivatives of its own columns
(:class:`ReducedExamples`). With c_j the number of times that negative j counts, M the maximum and t the temperature::

    BINARY       sum c softplus(z)
    ADVERSARIAL  M = max t z;  sum c e^(t z - M),  sum c e^(t z - M) softplus(z)
    SOFTMAX      M = max z;    sum c e^(z - M),    sum c,    sum c (M - z)

A new objective is a code, its numbers in :class:`Objective`, and a subclass of :class:`ReducedExamples` in ``_KINDS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The codes are those of Objective in csrc/objective.h.
BINARY, SOFTMAX, ADVERSARIAL = 0, 1, 2
SMALLEST_REST = 2.0**-24  # what 1 - q is taken to be at least, of a target that is all of the noise in float32


class Objective(NamedTuple):
    """Kind and numbers of an objective, which makes a loss of an example's corrected scores z.

    Options that all objectives share are not among them. Operators take the five numbers splatted, in this order.
    """

    kind: int = BINARY
    positive_weight: float = 1.0  # BINARY, ADVERSARIAL: factor of the targets' terms
    label_smoothing: float = 0.0  # SOFTMAX
    temperature: float = 0.0  # ADVERSARIAL: negatives are weighted by softmax(temperature z)
    correct_positive: bool = True  # SOFTMAX: whether log q is subtracted from the target's score too

    def losses(self, z: Tensor, live: Tensor, label: Tensor, target_log_q: Tensor | None, n_targets: int) -> Tensor:
        """Compute the loss of each example, [B], of all its columns: T targets, then k negatives.

        Args:
            z: [B, T + k], finite, 0 where not live.
            live: False for columns that are masked.
            label: 0 for negatives and where not live.
            target_log_q: [B, T], for a target whose score is not corrected by it.
            n_targets: T.
        """
        return _KINDS[self.kind].whole_losses(self, z, live, label, target_log_q, n_targets)

    @property
    def n_sums(self) -> int:
        """Number of sums that :meth:`partial` gives for each example."""
        return _KINDS[self.kind].n_sums

    @property
    def has_maximum(self) -> bool:
        """Whether the sums are relative to a maximum, so that parts must be rebased before they are added up."""
        return _KINDS[self.kind].has_maximum

    def partial(self, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce some columns: to their maximum [B] and their sums [B, n_sums].

        Args:
            z: scores of negatives, [B, n]; n may be 0.
            count: how often each of them counts, [B, n]; 0 where masked.

        Returns:
            Maximum and sums. The maximum is -inf where no column counts, and 0 if the objective has none.
        """
        return _KINDS[self.kind].partial(self, z, count)

    def rebase(self, largest: Tensor, sums: Tensor, common: Tensor) -> Tensor:
        """Convert the sums of a part to what they are for a larger maximum, so that those of all parts can be added.

        Args:
            largest, sums: from :meth:`partial`.
            common: the maximum over all parts, [B].
        """
        return _KINDS[self.kind].rebase(sums, torch.where(torch.isfinite(largest), common - largest, 0))

    def reduced_examples(
        self,
        positive: Tensor,
        label: Tensor,
        target_log_q: Tensor | None,
        divisor: Tensor | None,
        target_z: Tensor,
        largest: Tensor,
        sums: Tensor,
    ) -> ReducedExamples:
        """Construct this objective's :class:`ReducedExamples`, whose fields these are."""
        return _KINDS[self.kind](self, positive, label, target_log_q, divisor, target_z, largest, sums)


BINARY_OBJECTIVE = Objective()


@dataclass
class ReducedExamples(ABC):
    """Examples whose negatives have been reduced: their losses, and the derivatives of any column that is scored again.

    The class holds the formulas of one kind of objective; an instance holds B examples with T targets each.
    """

    n_sums: ClassVar[int]
    has_maximum: ClassVar[bool] = True

    objective: Objective
    positive: Tensor  # [B, T]: targets that are none are False
    label: Tensor  # [B, T], 0 where there is no target
    target_log_q: Tensor | None  # [B, T], for a target whose score is not corrected by it
    divisor: Tensor | None  # [B]: the number of candidates, if the loss is their mean
    target_z: Tensor  # [B, T]: scores of the targets, 0 where there is none
    largest: Tensor  # [B]: maximum over all negatives
    sums: Tensor  # [B, n_sums], over all negatives

    @staticmethod
    @abstractmethod
    def whole_losses(
        objective: Objective, z: Tensor, live: Tensor, label: Tensor, target_log_q: Tensor | None, n_targets: int
    ) -> Tensor:
        """Implement :meth:`Objective.losses`."""

    @staticmethod
    @abstractmethod
    def partial(objective: Objective, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Implement :meth:`Objective.partial`."""

    @staticmethod
    @abstractmethod
    def rebase(sums: Tensor, further: Tensor) -> Tensor:
        """Convert sums to a maximum that is larger by ``further`` [B]."""

    @abstractmethod
    def losses(self) -> Tensor:
        """Compute the loss of each example, [B]."""

    def of_targets(self) -> Tensor:
        """Differentiate each loss by the scores of its targets, [B, T]."""
        return torch.where(self.positive, self._divided(self._target_slope(), slice(None)), 0)

    def of_negatives(self, z: Tensor, count: Tensor, examples: slice = slice(None)) -> Tensor:
        """Differentiate each loss by the scores of some negatives, [b, n].

        Args:
            z, count: as :meth:`Objective.partial` took them, [b, n].
            examples: which b of the B examples they belong to.
        """
        return torch.where(count > 0, count * self._divided(self._negative_slope(z, examples), examples), 0)

    @abstractmethod
    def _target_slope(self) -> Tensor:
        """Differentiate by the targets' scores, before masking and division."""

    @abstractmethod
    def _negative_slope(self, z: Tensor, examples: slice) -> Tensor:
        """Differentiate by the scores of negatives that count once, before masking and division."""

    def _divided(self, slope: Tensor, examples: slice) -> Tensor:
        return slope if self.divisor is None else slope / self.divisor[examples, None]


class BinaryExamples(ReducedExamples):
    """Examples whose columns are classified one by one: softplus(-z) for targets, softplus(z) for negatives."""

    n_sums = 1
    has_maximum = False

    @staticmethod
    def whole_losses(
        objective: Objective, z: Tensor, live: Tensor, label: Tensor, target_log_q: Tensor | None, n_targets: int
    ) -> Tensor:
        share = torch.ones_like(z[:, n_targets:])
        return _weighted_sum(objective, _column_losses(z, live, label), share, n_targets)

    @staticmethod
    def partial(objective: Objective, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return z.new_zeros(len(z)), (count * _softplus(z)).sum(1, keepdim=True)

    @staticmethod
    def rebase(sums: Tensor, further: Tensor) -> Tensor:
        return sums

    def losses(self) -> Tensor:
        of_targets = self.label * _softplus(-self.target_z) + (1 - self.label) * _softplus(self.target_z)
        of_targets = torch.where(self.positive, of_targets, 0).sum(1)
        loss = self.objective.positive_weight * of_targets + self._loss_of_negatives()
        return loss if self.divisor is None else loss / self.divisor

    def _loss_of_negatives(self) -> Tensor:
        return self.sums[:, -1]

    def _target_slope(self) -> Tensor:
        up, down = torch.sigmoid(self.target_z), torch.sigmoid(-self.target_z)
        return self.objective.positive_weight * ((1 - self.label) * up - self.label * down)

    def _negative_slope(self, z: Tensor, examples: slice) -> Tensor:
        return torch.sigmoid(z)


class AdversarialExamples(BinaryExamples):
    """Binary examples whose negatives are weighted by the softmax of their scores; weights are not differentiated."""

    n_sums = 2
    has_maximum = True

    @staticmethod
    def whole_losses(
        objective: Objective, z: Tensor, live: Tensor, label: Tensor, target_log_q: Tensor | None, n_targets: int
    ) -> Tensor:
        share = _masked_softmax(_tempered(objective, z[:, n_targets:]), live[:, n_targets:]).detach()
        return _weighted_sum(objective, _column_losses(z, live, label), share, n_targets)

    @staticmethod
    def partial(objective: Objective, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        largest, below = _below_maximum(_tempered(objective, z), count)
        share = count * torch.exp(-below)
        return largest, torch.stack([share.sum(1), (share * _softplus(z)).sum(1)], 1)

    @staticmethod
    def rebase(sums: Tensor, further: Tensor) -> Tensor:
        return sums * torch.exp(-further)[:, None]

    def _loss_of_negatives(self) -> Tensor:
        return self.sums[:, -1] / self._total()

    def _negative_slope(self, z: Tensor, examples: slice) -> Tensor:
        exponent = _tempered(self.objective, z) - self.largest[examples, None]
        return torch.sigmoid(z) * torch.exp(exponent) / self._total()[examples, None]

    def _total(self) -> Tensor:
        """Return the sum of the weights before they are normalised, [B]; 1 where no negative counts."""
        return torch.where(self.sums[:, 0] > 0, self.sums[:, 0], 1)


@dataclass
class SoftmaxExamples(ReducedExamples):
    """Examples whose loss is the cross entropy of the labels and the softmax over all columns."""

    n_sums = 3

    @staticmethod
    def whole_losses(
        objective: Objective, z: Tensor, live: Tensor, label: Tensor, target_log_q: Tensor | None, n_targets: int
    ) -> Tensor:
        """Compute sum_j label_j (logsumexp(z) - z_j) over the live columns, with smoothed labels."""
        total = label.sum(1, keepdim=True)
        if not objective.correct_positive and target_log_q is not None:
            n = live[:, n_targets:].sum(1, keepdim=True).clamp_min(1).to(z.dtype)
            scale = _log_rest(target_log_q[:, :1].to(z.dtype)) - n.log()
            z = torch.cat([z[:, :n_targets], z[:, n_targets:] + scale], 1)
        if objective.label_smoothing:
            n = live.sum(1, keepdim=True).clamp_min(1)
            label = (1 - objective.label_smoothing) * label + objective.label_smoothing * total / n
        some = live.any(1, keepdim=True)
        normaliser = torch.logsumexp(torch.where(some, z.masked_fill(~live, -torch.inf), 0), 1, keepdim=True)
        return torch.where(live & (label != 0), label * (normaliser - z), 0).sum(1)

    @staticmethod
    def partial(objective: Objective, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        largest, below = _below_maximum(z, count)
        share = count * torch.exp(-below)
        return largest, torch.stack([share.sum(1), count.sum(1), (count * below).sum(1)], 1)

    @staticmethod
    def rebase(sums: Tensor, further: Tensor) -> Tensor:
        share, count, below = sums.unbind(1)
        return torch.stack([share * torch.exp(-further), count, below + count * further], 1)

    def __post_init__(self) -> None:
        share, count, _ = self.sums.unbind(1)
        self.shift = torch.zeros_like(share)  # of the negatives' scores
        if not self.objective.correct_positive:
            assert self.target_log_q is not None
            self.shift = _log_rest(self.target_log_q[:, 0].to(share.dtype)) - count.clamp_min(1).log()
        of_negatives = torch.where(count > 0, self.largest + self.shift + share.log(), -torch.inf)
        of_targets = torch.where(self.positive, self.target_z, -torch.inf)
        self.normaliser = torch.logsumexp(torch.cat([of_targets, of_negatives[:, None]], 1), 1)
        if self.target_z.shape[1] == 1:  # to the last digit where the target has nearly all of the probability
            self.gap = _softplus(of_negatives[:, None] - self.target_z)
        else:
            self.gap = self.normaliser[:, None] - self.target_z
        self.gap = torch.where(self.positive, self.gap, 0)
        self.total = self.label.sum(1)
        n_columns = self.positive.sum(1) + count
        self.smoothing = self.objective.label_smoothing * self.total / n_columns.clamp_min(1)
        smoothed = (1 - self.objective.label_smoothing) * self.label + self.smoothing[:, None]
        self.smoothed = torch.where(self.positive, smoothed, 0)

    def losses(self) -> Tensor:
        loss = (self.smoothed * self.gap).sum(1)
        if self.objective.label_smoothing:
            _, count, below = self.sums.unbind(1)
            spread = count * (self.normaliser - self.largest - self.shift) + below
            loss = loss + torch.where(count > 0, self.smoothing * spread, 0)
        return loss

    def _target_slope(self) -> Tensor:
        # total p - label, which keeps its digits where p is close to 1.
        total = self.total[:, None]
        return total * torch.expm1(-self.gap) + (total - self.smoothed)

    def _negative_slope(self, z: Tensor, examples: slice) -> Tensor:
        exponent = z + (self.shift - self.normaliser)[examples, None]
        return self.total[examples, None] * torch.exp(exponent) - self.smoothing[examples, None]


_KINDS: dict[int, type[ReducedExamples]] = {
    BINARY: BinaryExamples,
    SOFTMAX: SoftmaxExamples,
    ADVERSARIAL: AdversarialExamples,
}


def _column_losses(z: Tensor, live: Tensor, label: Tensor) -> Tensor:
    """Compute the binary cross entropy of each column, [B, T + k]; 0 where it is not live."""
    column = -label * F.logsigmoid(z) - (1 - label) * F.logsigmoid(-z)
    return torch.where(live, column, 0)


def _weighted_sum(objective: Objective, column: Tensor, share: Tensor, n_targets: int) -> Tensor:
    """Add up the columns' losses, [B], with the weight of the targets and the ``share`` [B, k] of each negative."""
    return objective.positive_weight * column[:, :n_targets].sum(1) + (share * column[:, n_targets:]).sum(1)


def _masked_softmax(z: Tensor, live: Tensor) -> Tensor:
    """Compute the softmax over the live columns; 0 elsewhere, and everywhere where none is live."""
    if not z.shape[1]:
        return z
    some = live.any(1, keepdim=True)
    return torch.where(live, torch.softmax(torch.where(some, z.masked_fill(~live, -torch.inf), 0), 1), 0)


def _below_maximum(exponent: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the maximum [B] over the columns that count, or -inf, and how far each [B, n] lies below; 0 if masked."""
    largest = exponent.new_full((len(exponent),), -torch.inf)
    if exponent.shape[1]:
        largest = torch.where(count > 0, exponent, -torch.inf).amax(1)
    return largest, torch.where(count > 0, largest[:, None] - exponent, 0)


def _tempered(objective: Objective, z: Tensor) -> Tensor:
    """Multiply scores by the temperature, clamped to finite numbers."""
    largest = torch.finfo(z.dtype).max
    return (objective.temperature * z).clamp(-largest, largest)


def _log_rest(target_log_q: Tensor) -> Tensor:
    """Compute log(1 - q) of the target: a negative that is no target is drawn from q / (1 - q_target)."""
    return (-torch.expm1(target_log_q)).clamp_min(SMALLEST_REST).log()


def _softplus(z: Tensor) -> Tensor:
    """Compute log(1 + e^z). F.softplus drops log1p(e^-z) above z = 20, which float64 still holds."""
    return -F.logsigmoid(-z)
