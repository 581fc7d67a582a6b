"""Operator row_step_: one step of an optimizer on rows of a table, by a gradient that lies in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext._ops import library
from nce_ext.reference import row_step as reference
from nce_ext.reference.row_step import RowStep

OPERATOR = "row_step_"


class RowStepInputs(NamedTuple):
    """RowStepInputs of the operator, in the order of its schema in csrc/ops.cpp, which says their shapes."""

    weight: Tensor
    classes: Tensor | None
    gradient: Tensor
    first: Tensor | None
    second: Tensor | None
    row_steps: Tensor | None
    decayed: Tensor | None
    master: Tensor | None
    gradient_scale: Tensor | None
    seed: Tensor | None
    rule: int
    step: int
    rate: float
    weight_decay: float
    log_decay: float
    momentum: float
    dampening: float
    beta1: float
    beta2: float
    eps: float
    nesterov: bool
    maximize: bool


def row_step_(step: RowStep, classes: Tensor | None, gradient: Tensor, scale: Tensor | None = None) -> None:
    """Step on rows of a weight: those of ``classes`` [U], ascending, each once, or all; their gradient is [U, D]."""
    weight, state, hyperparameters, seed = step
    torch.autograd.graph.increment_version(weight)  # which compiled operators do not
    if library.fused_available(weight.device):
        inputs = RowStepInputs(weight, classes, gradient, *state, scale, seed, **hyperparameters._asdict())
        torch.ops.nce_ext.row_step_(*inputs)
    else:
        reference.row_step_(weight, classes, gradient, state, hyperparameters, scale, seed)


@library.register_fake(OPERATOR)
def _fake(*arguments: Any) -> None:
    RowStepInputs._make(arguments)
