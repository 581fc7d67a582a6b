"""scatter_step_: one racy step of SGD on the rows that pairs touch (Recht et al., "Hogwild!", NeurIPS 2011)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext._ops import library
from nce_ext._ops.row_grad import GradientPairs

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


def scatter_step_(pairs: GradientPairs, weight: Tensor, bias: Tensor | None, rate: float) -> None:
    """Subtract ``rate`` times the gradient of every pair from its row of weight, and of bias, in no order."""
    changed = [weight] if bias is None else [weight, bias]
    torch.autograd.graph.increment_version(changed)  # which compiled operators do not
    torch.ops.nce_ext.scatter_step_(*Inputs(*pairs, weight, bias, rate))


@library.register_fake(OPERATOR)
def _fake(*arguments: Any) -> None:
    Inputs._make(arguments)
