"""The operators ``row_grad``, ``row_grad_dense`` and ``row_grad_norm``: pairs summed into gradients of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext import _private_torch
from nce_ext._ops import coo, library
from nce_ext._ops.coo import COALESCED, DENSE, PADDED
from nce_ext.reference.dtypes import compute_dtype

NO_DOUBLE_BACKWARD = (
    "nce_ext losses cannot be differentiated twice (create_graph=True); use backend='reference' for that"
)


class GradientPairs(NamedTuple):
    """Terms whose sum is the gradient of weight and bias.

    Column c of example b adds ``grad_loss[b] * dlogit[b, c] * hidden[b]`` to the row of class ``ids[b, c]``.
    """

    ids: Tensor  # int32 [B, C]; -1: no class
    dlogit: Tensor  # [B, C]: derivative of the example's loss in the score of the column's class
    grad_loss: Tensor  # [B]: derivative of what backward() was called on in the example's loss
    hidden: Tensor  # [B, D]


class RowGradInputs(NamedTuple):
    """Arguments of ``row_grad``; the other two have the first ones of them."""

    ids: Tensor
    dlogit: Tensor
    grad_loss: Tensor
    hidden: Tensor
    n_classes: int
    dtype: torch.dtype
    with_rows: bool
    with_bias: bool
    padded: bool


class RowGradient(NamedTuple):
    """Gradients of the rows and of the bias's elements of some classes."""

    classes: Tensor  # int64 [U]; without meaning in a dense layout
    rows: Tensor  # [U, D], or [V, D] in a dense layout; [0, D] where they are not wanted
    elements: Tensor  # [U], or [V]; [0] where they are not wanted


def row_grad(
    pairs: GradientPairs, n_classes: int, dtype: torch.dtype, *, with_rows: bool, with_bias: bool, padded: bool
) -> RowGradient:
    """Sum the pairs of each class: classes ascend, each once; padded to min(B C, V), spare rows zero, of class 0."""
    gradient = torch.ops.nce_ext.row_grad(*pairs, n_classes, dtype, with_rows, with_bias, padded)
    return RowGradient._make(gradient)


def row_grad_dense(
    pairs: GradientPairs, n_classes: int, dtype: torch.dtype, *, with_rows: bool, with_bias: bool
) -> RowGradient:
    """Sum the pairs of each class into tables of all classes."""
    rows, elements = torch.ops.nce_ext.row_grad_dense(*pairs, n_classes, dtype, with_rows, with_bias)
    return RowGradient(pairs.ids.new_empty((0,), dtype=torch.int64), rows, elements)


def row_grad_in(
    layout: int, pairs: GradientPairs, n_classes: int, dtype: torch.dtype, *, with_rows: bool, with_bias: bool
) -> RowGradient:
    """Sum the pairs of each class, in the layout that the argument gradient_layout of the losses asks for."""
    if layout == DENSE:
        return row_grad_dense(pairs, n_classes, dtype, with_rows=with_rows, with_bias=with_bias)
    return row_grad(pairs, n_classes, dtype, with_rows=with_rows, with_bias=with_bias, padded=layout == PADDED)


def row_grad_norm(pairs: GradientPairs, n_classes: int, *, with_rows: bool, with_bias: bool) -> Tensor:
    """Compute the squared norm, float64 [1], of the gradient that ``row_grad`` would make, which is not made."""
    squares: Tensor = torch.ops.nce_ext.row_grad_norm(*pairs, n_classes, with_rows, with_bias)
    return squares


@library.register_fake("row_grad")
def _row_grad_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = RowGradInputs._make(arguments)
    n: Any = min_of(inputs.ids.numel(), inputs.n_classes) if inputs.padded else unknown_size()
    return (
        inputs.ids.new_empty((n,), dtype=torch.int64),
        inputs.hidden.new_empty((n if inputs.with_rows else 0, inputs.hidden.shape[1]), dtype=inputs.dtype),
        inputs.hidden.new_empty((n if inputs.with_bias else 0,), dtype=inputs.dtype),
    )


@library.register_fake("row_grad_dense")
def _row_grad_dense_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = RowGradInputs._make([*arguments, False])
    n, dim = inputs.n_classes, inputs.hidden.shape[1]
    return (
        inputs.hidden.new_empty((n if inputs.with_rows else 0, dim), dtype=inputs.dtype),
        inputs.hidden.new_empty((n if inputs.with_bias else 0,), dtype=inputs.dtype),
    )


@library.register_fake("row_grad_norm")
def _row_grad_norm_fake(
    ids: Tensor, dlogit: Tensor, grad_loss: Tensor, hidden: Tensor, n_classes: int, with_rows: bool, with_bias: bool
) -> Tensor:
    return hidden.new_empty((1,), dtype=torch.float64)


def unknown_size() -> Any:
    """Make a size that depends on values: the number of touched classes."""
    return torch.library.get_ctx().new_dynamic_size()


def min_of(a: int, b: int) -> Any:
    """Take the smaller of two sizes, either of which may be symbolic."""
    return torch.sym_min(a, b)  # type: ignore[no-untyped-call]


class Table(NamedTuple):
    """What a backward pass has to know of the weight whose gradient it makes."""

    n_classes: int
    dtype: torch.dtype
    device: torch.device
    layout: int


def keep_table(ctx: Any, hidden: Tensor, weight: Tensor, layout: int) -> None:
    """Note for the backward pass whose gradients it makes, and that an absent gradient stays absent."""
    ctx.set_materialize_grads(False)
    ctx.table = Table(weight.shape[0], weight.dtype, weight.device, layout)
    ctx.hidden_dtype = hidden.dtype


def layout_now(table: Table, device: torch.device) -> int:
    """Choose the layout of a gradient: the table's, but padded while a CUDA graph is captured."""
    return PADDED if table.layout == COALESCED and coo.capturing(device) else table.layout


def gradients_of_table(
    gradient: RowGradient, table: Table, layout: int, *, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Make of a gradient of rows what autograd takes as weight's and bias's, on the device of the table."""
    if layout == DENSE:
        return gradient.rows if needs_weight else None, gradient.elements if needs_bias else None
    classes, rows, elements = coo.brought_to(table.device, *gradient)
    coalesced = layout == COALESCED
    if coalesced:
        coo.made_coalesced.add(classes, needs_weight + needs_bias)
    return (
        coo.coo(classes, rows, (table.n_classes, rows.shape[1]), coalesced) if needs_weight else None,
        coo.coo(classes, elements, (table.n_classes,), coalesced) if needs_bias else None,
    )


def coalesce(gradient: Tensor) -> Tensor:
    """Coalesce deterministically: sum duplicates in order, sort by class. A COO gradient [V, ...] of rows."""
    if gradient.is_coalesced():
        return gradient
    classes, values = _private_torch.coo_classes(gradient), _private_torch.coo_rows(gradient)
    n, size = len(classes), gradient.shape
    if not library.fused_available(gradient.device) or n == 0 or values[0].numel() == 0 or size[0] >= 2**31:
        return gradient.coalesce()
    ones = values.new_ones((1,), dtype=compute_dtype(values.dtype)).expand(n)
    pairs = GradientPairs(classes.int()[:, None], ones[:, None].contiguous(), ones, values.reshape(n, -1).contiguous())
    summed = row_grad(pairs, size[0], values.dtype, with_rows=True, with_bias=False, padded=False)
    return coo.coo(summed.classes, summed.rows.reshape(-1, *values.shape[1:]), tuple(size), True)
