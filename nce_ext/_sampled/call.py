"""A validated call of a sampled loss: its arguments in groups, so that a function takes the group that it needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nce_ext import _private_torch
from nce_ext.noise import Noise
from nce_ext.reference import Objective
from nce_ext.reference.dtypes import compute_dtype


class Operands(NamedTuple):
    """Tensors with one entry an example, and the table of classes."""

    hidden: Tensor  # [B, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    target: Tensor  # [B, T]
    log_z: Tensor | None  # [B]; a number has become part of Correction.offset

    @property
    def host_weight(self) -> bool:
        """Whether weight and bias are in host memory, and all else on a GPU."""
        return self.weight.device != self.hidden.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of scores, losses and their derivatives."""
        return compute_dtype(self.weight.dtype)


class Candidates(NamedTuple):
    """Where an example's negatives come from."""

    noise: Noise
    seed: Tensor | None  # draws them where ids are None
    ids: Tensor | None  # those that are known: [B, k], or [1, k] for all examples
    k: int
    negatives_shared: bool  # ids are for all examples, however many there are
    distinct: bool  # of equal ids, one counts
    remove_hits: bool


class Correction(NamedTuple):
    """What is subtracted from a score besides log_z."""

    target_log_q: Tensor | None  # [B, T]; None: the noise's
    negative_log_q: Tensor | None  # as Candidates.ids; None: the noise's
    subtract_log_q: bool
    offset: float


class Labels(NamedTuple):
    """What the targets' labels are, and what a loss is divided by."""

    uniform_labels: bool
    mean_candidates: bool
    ignore_index: int


class Layout(NamedTuple):
    """What becomes of the result."""

    batch_shape: torch.Size  # the sizes that were flattened to B
    fused: bool
    gradient_layout: int


class Call(NamedTuple):
    """Validated arguments of a sampled loss, flattened to one entry an example."""

    operands: Operands
    candidates: Candidates
    correction: Correction
    labels: Labels
    objective: Objective
    layout: Layout

    @property
    def shared(self) -> bool:
        """Whether all examples have the same negatives, with the same log q."""
        log_q, candidates = self.correction.negative_log_q, self.candidates
        one_log_q = log_q is None or log_q.shape[0] == 1
        return candidates.ids is not None and candidates.negatives_shared and one_log_q


def log_q_of(call: Call, ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Look up log q of the targets and of the negatives ``ids``: as given, else the noise's; None where not wanted."""
    correction, noise = call.correction, call.candidates.noise
    if not correction.subtract_log_q or correction.target_log_q is not None:
        return correction.target_log_q, correction.negative_log_q
    target = call.operands.target
    return noise.log_prob(known_ids(noise, target)), noise.log_prob(known_ids(noise, ids))


def known_ids(noise: Noise, ids: Tensor) -> Tensor:
    """Replace what is no class by 0: ignored and bad ids, which are masked later."""
    return torch.where((ids >= 0) & (ids < noise.n_classes), ids, 0)


def operands_of(call: Call) -> Operands:
    """Give the operands as operators take them: with elements of hidden side by side."""
    hidden = call.operands.hidden
    return call.operands if hidden.stride(-1) == 1 else call.operands._replace(hidden=hidden.contiguous())


def needs_of(call: Call, grad_enabled: bool) -> tuple[bool, bool, int]:
    """Tell operators which gradients to prepare: whether of hidden, whether of the rows, and in which layout."""
    layout = call.layout.gradient_layout
    if grad_enabled and _private_torch.inside_transform():
        return True, True, layout  # perhaps at a level of torch.func that requires_grad does not tell of
    hidden, weight, bias, _, log_z = call.operands
    needs_row_grad = any(t is not None and t.requires_grad for t in (weight, bias, log_z))
    return grad_enabled and hidden.requires_grad, grad_enabled and needs_row_grad, layout
