"""Operator row_grad_step_: one step of an optimizer on rows of a table, by a gradient that never is in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext._ops import library
from nce_ext._ops.row_grad import GradientPairs, min_of, unknown_size
from nce_ext.reference.row_step import RowStep

OPERATOR = "row_grad_step_"


class RowGradStepInputs(NamedTuple):
    """RowGradStepInputs of the operator, in the order of its schema in csrc/ops.cpp, which says their shapes."""

    ids: Tensor
    dlogit: Tensor
    grad_loss: Tensor
    hidden: Tensor
    weight: Tensor
    first: Tensor | None
    second: Tensor | None
    row_steps: Tensor | None
    decayed: Tensor | None
    master: Tensor | None
    gradient_scale: Tensor | None
    seed: Tensor | None
    with_bias: bool
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


def row_grad_step_(pairs: GradientPairs, step: RowStep, scale: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Step on a weight by the gradient of pairs: the touched classes [U] and, if ``with_bias``, bias's gradient [U]."""
    torch.autograd.graph.increment_version(step.weight)  # which compiled operators do not
    weight, state, hyperparameters, seed = step
    inputs = RowGradStepInputs(*pairs, weight, *state, scale, seed, with_bias, **hyperparameters._asdict())
    classes, bias = torch.ops.nce_ext.row_grad_step_(*inputs)
    return classes, bias


@library.register_fake(OPERATOR)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = RowGradStepInputs._make(arguments)
    unique: Any = unknown_size()
    if inputs.ids.device.type != "cpu":  # padded: nothing waits for the number of touched rows
        unique = min_of(inputs.ids.numel(), inputs.weight.shape[0])
    classes = inputs.ids.new_empty((unique,), dtype=torch.int64)
    return classes, inputs.weight.new_empty((unique if inputs.with_bias else 0,))
