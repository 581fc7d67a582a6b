"""Operator scatter_step_: one racy step of SGD on rows of a table (Recht et al., "Hogwild!", NeurIPS 2011)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext._ops import library

OPERATOR = "scatter_step_"


class Inputs(NamedTuple):
    """Inputs of the operator, in the order of its schema in csrc/ops.cpp, which says their shapes."""

    ids: Tensor
    dlogit: Tensor
    grad_loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rate: float


def scatter_step_(*arguments: Any) -> None:
    """Subtract ``rate`` times each pair's gradient from its row, in no order; arguments are :class:`Inputs`."""
    inputs = Inputs._make(arguments)
    changed = [inputs.weight] if inputs.bias is None else [inputs.weight, inputs.bias]
    torch.autograd.graph.increment_version(changed)  # which compiled operators do not
    torch.ops.nce_ext.scatter_step_(*inputs)


@library.register_fake(OPERATOR)
def _fake(*arguments: Any) -> None:
    Inputs._make(arguments)
