"""Operator scatter_step_: one racy step of SGD on rows of a table (Recht et al., "Hogwild!", NeurIPS 2011)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext._ops import library
from nce_ext._ops.row_grad import GradientPairs

OPERATOR = "scatter_step_"


class ScatterStepInputs(NamedTuple):
    """ScatterStepInputs of the operator, in the order of its schema in csrc/ops.cpp, which says their shapes."""

    ids: Tensor
    dlogit: Tensor
    grad_loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rate: float


def scatter_step_(pairs: GradientPairs, weight: Tensor, bias: Tensor | None, rate: float) -> None:
    """Subtract ``rate`` times the gradient of every pair from its row of weight, and of bias, in no order."""
    changed = [weight] if bias is None else [weight, bias]
    torch.autograd.graph.increment_version(changed)  # which compiled operators do not
    torch.ops.nce_ext.scatter_step_(*ScatterStepInputs(*pairs, weight, bias, rate))


@library.register_fake(OPERATOR)
def _fake(*arguments: Any) -> None:
    ScatterStepInputs._make(arguments)
