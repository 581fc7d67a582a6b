"""What is made of an example's corrected scores, and the same when no process sees all columns of the example.

A process has the negatives whose rows it owns. It adds them up to a maximum and a few sums an example (``partial``),
which become those of all negatives by one maximum and one sum over the processes (``rebase`` in between). With them,
and with the scores of the targets, which are few and known everywhere, a process computes the loss of each example and
the derivatives of its own columns. With c_j the number of times that negative j counts, M the maximum::

    BINARY       sum c softplus(z)
    ADVERSARIAL  M = max t z;  sum c e^(t z - M),  sum c e^(t z - M) softplus(z)
    SOFTMAX      M = max z;    sum c e^(z - M),    sum c,    sum c (M - z)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The codes are those of Objective in csrc/objective.h.
BINARY, SOFTMAX, ADVERSARIAL = 0, 1, 2
SMALLEST_REST = 2.0**-24  # what 1 - q is taken to be at least, of a target that is all of the noise in float32


class Objective(NamedTuple):
    """What is made of an example's corrected scores z, beside the options that all objectives share."""

    kind: int = BINARY
    positive_weight: float = 1.0  # BINARY, ADVERSARIAL: factor of the targets' terms
    label_smoothing: float = 0.0  # SOFTMAX
    temperature: float = 0.0  # ADVERSARIAL: negatives are weighted by softmax(temperature z)
    correct_positive: bool = True  # SOFTMAX: whether log q is subtracted from the target's score too


BINARY_OBJECTIVE = Objective()

N_SUMS = {BINARY: 1, ADVERSARIAL: 2, SOFTMAX: 3}


def partial(objective: Objective, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum [B] and sums [B, N_SUMS] over the columns z [B, n] that are here; count [B, n] is 0 where masked.

    The maximum is -inf where no column counts. BINARY has none, and gives zeros.
    """
    if objective.kind == BINARY:
        return z.new_zeros(len(z)), (count * _softplus(z)).sum(1, keepdim=True)
    exponent = _exponent(objective, z)
    largest = z.new_full((len(z),), -torch.inf)
    if z.shape[1]:
        largest = torch.where(count > 0, exponent, -torch.inf).amax(1)
    below = torch.where(count > 0, largest[:, None] - exponent, 0)
    share = count * torch.exp(-below)
    more = (share * _softplus(z),) if objective.kind == ADVERSARIAL else (count, count * below)
    return largest, torch.stack([share.sum(1), *(values.sum(1) for values in more)], 1)


def rebase(objective: Objective, largest: Tensor, sums: Tensor, common: Tensor) -> Tensor:
    """The sums as they are for a larger maximum ``common`` [B], so that those of all processes can be added up."""
    if objective.kind == BINARY:
        return sums
    further = torch.where(torch.isfinite(largest), common - largest, 0)
    factor = torch.exp(-further)
    if objective.kind == ADVERSARIAL:
        return sums * factor[:, None]
    share, count, below = sums.unbind(1)
    return torch.stack([share * factor, count, below + count * further], 1)


@dataclass
class Examples:
    """All examples of all processes, [B] or [B, T], and what all columns of each have come to."""

    objective: Objective
    positive: Tensor  # [B, T]: targets that are none are False
    label: Tensor  # [B, T], 0 where there is no target
    target_log_q: Tensor | None  # for a target that is not corrected
    divisor: Tensor | None  # [B]: the number of candidates, if the loss is their mean
    z: Tensor  # scores of the targets, 0 where there is none
    largest: Tensor  # over the negatives of all processes
    sums: Tensor

    def __post_init__(self) -> None:
        if self.objective.kind == SOFTMAX:
            self._normalise()

    def _normalise(self) -> None:
        share, count, _ = self.sums.unbind(1)
        self.shift = torch.zeros_like(share)  # of the negatives' scores
        if not self.objective.correct_positive:
            assert self.target_log_q is not None
            # A negative is drawn from q given that it is no target, n times: log(n q / (1 - q_target)).
            rest = -torch.expm1(self.target_log_q[:, 0].to(share.dtype))
            self.shift = rest.clamp_min(SMALLEST_REST).log() - count.clamp_min(1).log()
        of_negatives = torch.where(count > 0, self.largest + self.shift + share.log(), -torch.inf)
        of_targets = torch.where(self.positive, self.z, -torch.inf)
        self.normaliser = torch.logsumexp(torch.cat([of_targets, of_negatives[:, None]], 1), 1)
        if self.z.shape[1] == 1:  # to the last digit where the target has nearly all of the probability
            self.gap = _softplus(of_negatives[:, None] - self.z)
        else:
            self.gap = self.normaliser[:, None] - self.z
        self.gap = torch.where(self.positive, self.gap, 0)
        self.total = self.label.sum(1)
        n_columns = self.positive.sum(1) + count
        self.smoothing = self.objective.label_smoothing * self.total / n_columns.clamp_min(1)
        smoothed = (1 - self.objective.label_smoothing) * self.label + self.smoothing[:, None]
        self.smoothed = torch.where(self.positive, smoothed, 0)

    def losses(self) -> Tensor:
        """[B]."""
        if self.objective.kind == SOFTMAX:
            loss = (self.smoothed * self.gap).sum(1)
            if self.objective.label_smoothing:
                _, count, below = self.sums.unbind(1)
                spread = count * (self.normaliser - self.largest - self.shift) + below
                loss = loss + torch.where(count > 0, self.smoothing * spread, 0)
            return loss
        of_negatives = self.sums[:, -1]
        if self.objective.kind == ADVERSARIAL:
            of_negatives = of_negatives / self._adversarial_total()
        of_targets = self.label * _softplus(-self.z) + (1 - self.label) * _softplus(self.z)
        loss = self.objective.positive_weight * torch.where(self.positive, of_targets, 0).sum(1) + of_negatives
        return loss if self.divisor is None else loss / self.divisor

    def of_targets(self) -> Tensor:
        """Derivatives of the losses in the targets' scores, [B, T]."""
        if self.objective.kind == SOFTMAX:
            # total p - label, which keeps its digits where p is close to 1.
            total = self.total[:, None]
            slope = total * torch.expm1(-self.gap) + (total - self.smoothed)
        else:
            up, down = torch.sigmoid(self.z), torch.sigmoid(-self.z)
            slope = self.objective.positive_weight * ((1 - self.label) * up - self.label * down)
        return torch.where(self.positive, self._divided(slope, slice(None)), 0)

    def of_negatives(self, z: Tensor, count: Tensor, rows: slice = slice(None)) -> Tensor:
        """Derivatives in the scores z [b, n] of negatives that are here, of the examples ``rows``."""
        if self.objective.kind == SOFTMAX:
            exponent = z + (self.shift - self.normaliser)[rows, None]
            slope = self.total[rows, None] * torch.exp(exponent) - self.smoothing[rows, None]
        else:
            slope = torch.sigmoid(z)
            if self.objective.kind == ADVERSARIAL:
                exponent = _exponent(self.objective, z) - self.largest[rows, None]
                slope = slope * torch.exp(exponent) / self._adversarial_total()[rows, None]
        return torch.where(count > 0, count * self._divided(slope, rows), 0)

    def _adversarial_total(self) -> Tensor:
        return torch.where(self.sums[:, 0] > 0, self.sums[:, 0], 1)

    def _divided(self, slope: Tensor, rows: slice) -> Tensor:
        return slope if self.divisor is None else slope / self.divisor[rows, None]


def _exponent(objective: Objective, z: Tensor) -> Tensor:
    if objective.kind == SOFTMAX:
        return z
    largest = torch.finfo(z.dtype).max
    return (objective.temperature * z).clamp(-largest, largest)


def _softplus(z: Tensor) -> Tensor:
    """F.softplus drops log1p(e^-z) above z = 20, which float64 still holds."""
    return -F.logsigmoid(-z)
