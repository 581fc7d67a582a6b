"""The scale of the logits that is learned and limited."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nce_ext import _private_torch


class CappedExp(torch.autograd.Function):
    """Autograd function min(exp(x), limit) whose gradient is that of exp, but never moves x further above the limit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        value = x.exp().clamp(max=limit)
        ctx.save_for_backward(value, x > math.log(limit))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        value, above = ctx.saved_tensors
        return torch.where(above, upstream.clamp(min=0), upstream) * value, None


class TransformableCappedExp(torch.autograd.Function):
    """Autograd function as :class:`CappedExp`, in the form that torch.func takes and that is slower to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.exp().clamp(max=limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, limit = inputs
        ctx.save_for_backward(output, x > math.log(limit))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return CappedExp.backward(ctx, upstream)


def capped_exp(x: Tensor, limit: float) -> Tensor:
    """Compute min(exp(x), limit) with the gradient of :class:`CappedExp`."""
    function = TransformableCappedExp if _private_torch.inside_transform() else CappedExp
    apply: Callable[..., Tensor] = function.apply
    return apply(x, limit)
