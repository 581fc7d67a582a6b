"""Autograd functions under torch.func: results that cannot be differentiated, and batches computed entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Results: TypeAlias = tuple[Tensor | None, ...]


class Once(torch.autograd.Function):
    """Autograd function that computes ``function(*tensors)`` and refuses to be differentiated, with ``refusal``.

    It stands around a backward pass under torch.func, where grad mode does not tell whether the gradients will be
    differentiated again. ``tensors`` are all that the gradients depend on, used or not.
    """

    @staticmethod
    def forward(function: Callable[..., Results], refusal: str, *tensors: Tensor | None) -> Results:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        ctx.refusal = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.refusal)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Results, tuple[int | None, ...]]:
        return entry_by_entry(Once, info, in_dims, arguments)


def once(function: Callable[..., Results], refusal: str, *tensors: Tensor | None) -> Results:
    """Compute ``function(*tensors)``, a tuple; differentiating it raises RuntimeError(refusal)."""
    apply: Callable[..., Results] = Once.apply
    return apply(function, refusal, *tensors)


def entry_by_entry(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Results, tuple[int | None, ...]]:
    """Implement ``vmap`` of an autograd function whose result is a tuple: by one call for each entry of the batch."""
    apply: Callable[..., Results] = function.apply
    batched = [isinstance(a, Tensor) and dim is not None for a, dim in zip(arguments, in_dims, strict=True)]
    results = [
        apply(*(a.select(dim, i) if b else a for a, dim, b in zip(arguments, in_dims, batched, strict=True)))
        for i in range(info.batch_size)
    ]
    columns = [None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True)]
    return tuple(columns), tuple(None if column is None else 0 for column in columns)
