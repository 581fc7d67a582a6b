"""scatter_step_: one racy step of SGD on the rows that pairs touch (Recht et al., "Hogwild!", NeurIPS 2011)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext._ops import library

OPERATOR = "scatter_step_"


class Inputs(NamedTuple):
    """Arguments of the schema in csrc/ops.cpp, where their shapes are said, in its order."""

    ids: Tensor
    dlogit: Tensor
    grad_loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rate: float


def scatter_step_(*arguments: Any) -> None:
    """Subtract ``rate`` times the gradient of every pair from its row, in no order; arguments are :class:`Inputs`."""
    inputs = Inputs._make(arguments)
    changed = [inputs.weight] if inputs.bias is None else [inputs.weight, inputs.bias]
    torch.autograd.graph.increment_version(changed)  # which compiled operators do not
    torch.ops.nce_ext.scatter_step_(*inputs)


@library.register_fake(OPERATOR)
def _fake(*arguments: Any) -> None:
    Inputs._make(arguments)
