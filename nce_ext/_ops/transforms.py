"""Autograd functions that torch.func can transform: differentiated once, and over a batch computed entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
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


def transformable(
    operator: Callable[..., Results],
    backward: Callable[..., Results],
    setup_context: Callable[[Any, Any, Any], None],
    refusal: str,
) -> Callable[..., Results]:
    """Make of an operator, and of what ``register_autograd`` takes, a function that torch.func can transform.

    What ``torch.library.register_autograd`` makes of them is an autograd function that torch.func refuses. Only the
    first result has a gradient, and differentiating that raises RuntimeError(refusal). Results may be None.
    """

    class Transformable(torch.autograd.Function):
        """Autograd function of the operator."""

        @staticmethod
        def forward(*inputs: Any) -> Results:
            return tuple(operator(*inputs))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
            of_operator = Context(ctx.needs_input_grad)
            setup_context(of_operator, inputs, output)
            ctx.of_operator, saved = of_operator, of_operator.saved_tensors
            of_operator.saved_tensors = ()
            floats = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
            ctx.n_saved = len(saved)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
            ctx.save_for_backward(*saved, *floats)

        @staticmethod
        def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Results:
            of_operator, n_saved = ctx.of_operator, ctx.n_saved

            def gradients(upstream: Tensor, *saved: Tensor | None) -> Results:
                return backward(of_operator.holding(saved[:n_saved]), upstream)

            if upstream is None:
                return (None,) * len(of_operator.needs_input_grad)
            return once(gradients, refusal, upstream, *ctx.saved_tensors)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Results, tuple[int | None, ...]]:
            return entry_by_entry(Transformable, info, in_dims, arguments)

    apply: Callable[..., Results] = Transformable.apply
    return apply


class Context(SimpleNamespace):
    """Stands for the context of an autograd function where that has to hold something else."""

    def __init__(self, needs_input_grad: Sequence[bool], **attributes: Any) -> None:
        super().__init__(**{"saved_tensors": (), **attributes, "needs_input_grad": needs_input_grad})

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def holding(self, tensors: Results) -> Context:
        """Return a copy whose saved tensors are these."""
        return Context(**{**vars(self), "saved_tensors": tensors})


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
