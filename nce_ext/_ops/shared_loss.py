"""The operators ``shared_loss``, ``shared_loss_`` and ``shared_row_grad``: negatives that all examples share.

Matrix products score the negatives; ``shared_loss_`` is what stands between them, on scores in a cache. The other two
are put together from products and operators in nce_ext/_sampled/shared.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext import _private_torch
from nce_ext._ops import library
from nce_ext._ops.coo import DENSE, PADDED, is_one
from nce_ext._ops.row_grad import (
    NO_DOUBLE_BACKWARD,
    RowGradient,
    gradients_of_table,
    keep_table,
    layout_now,
    min_of,
    unknown_size,
)
from nce_ext._ops.transforms import transformable
from nce_ext.reference.dtypes import compute_dtype


class SharedLossInputs(NamedTuple):
    """Arguments of ``shared_loss``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    log_z: Tensor | None
    negatives: Tensor
    distinct: bool
    remove_hits: bool
    target_log_q: Tensor | None
    negative_log_q: Tensor | None
    offset: float
    uniform_labels: bool
    mean_candidates: bool
    ignore_index: int
    objective: int
    positive_weight: float
    label_smoothing: float
    temperature: float
    correct_positive: bool
    example_weight: Tensor | None
    needs_hidden_grad: bool
    needs_row_grad: bool
    gradient_layout: int


class SharedLossOutputs(NamedTuple):
    """The loss [B], or [1] with example_weight, and what the backward pass needs; empty where it needs nothing."""

    loss: Tensor
    target_ids: Tensor  # int32 [B, T]
    target_dlogit: Tensor  # [B, T]
    grad_hidden: Tensor  # [B, D]
    classes: Tensor  # int64 [k], -1: none
    rows: Tensor  # [k, D], their gradient rows with example_weight
    elements: Tensor  # [k], their gradient elements with example_weight
    dlogit: Tensor  # [B, k], their derivatives without
    grad_shift: Tensor  # [B], the sum of each example's derivatives


class SharedEpilogueInputs(NamedTuple):
    """Arguments of ``shared_loss_``."""

    logits: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    log_z: Tensor | None
    column_shift: Tensor
    multiplicity: Tensor | None
    accidental_hits: Tensor | None
    n_draws: int
    target_log_q: Tensor | None
    offset: float
    uniform_labels: bool
    mean_candidates: bool
    ignore_index: int
    objective: int
    positive_weight: float
    label_smoothing: float
    temperature: float
    correct_positive: bool
    example_weight: Tensor | None
    needs_derivatives: bool
    needs_hidden_grad: bool


class SharedEpilogueOutputs(NamedTuple):
    """Loss [B], and of the targets ids and derivatives [B, T] and their part of the gradient of hidden [B, D]."""

    loss: Tensor
    target_ids: Tensor
    target_dlogit: Tensor
    grad_hidden: Tensor
    grad_shift: Tensor  # [B], the sum of each example's derivatives


class SharedRowGradInputs(NamedTuple):
    """Arguments of ``shared_row_grad``."""

    target_ids: Tensor
    target_dlogit: Tensor
    grad_loss: Tensor
    hidden: Tensor
    classes: Tensor
    rows: Tensor
    elements: Tensor
    dlogit: Tensor
    n_classes: int
    dtype: torch.dtype
    with_rows: bool
    with_bias: bool
    gradient_layout: int


def shared_loss(inputs: SharedLossInputs) -> SharedLossOutputs:
    """Call the operator, through autograd if a tensor requires a gradient; only the loss has one."""
    if _private_torch.inside_transform():
        return SharedLossOutputs._make(_transformable(*inputs))
    return SharedLossOutputs._make(torch.ops.nce_ext.shared_loss(*inputs))


def shared_loss_(inputs: SharedEpilogueInputs) -> SharedEpilogueOutputs:
    """Turn the scores of a chunk of examples into derivatives, in place."""
    return SharedEpilogueOutputs._make(torch.ops.nce_ext.shared_loss_(*inputs))


def shared_row_grad(inputs: SharedRowGradInputs) -> RowGradient:
    """Merge the gradients of the targets' and of the negatives' rows."""
    return RowGradient._make(torch.ops.nce_ext.shared_row_grad(*inputs))


@library.register_fake("shared_loss")
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = SharedLossInputs._make(arguments)
    hidden, target, (batch, dim) = inputs.hidden, inputs.target, inputs.hidden.shape
    n_targets, k = target.shape[1], inputs.negatives.shape[0]
    compute = compute_dtype(inputs.weight.dtype)
    reduced, needs_rows = inputs.example_weight is not None, inputs.needs_row_grad
    examples = batch if inputs.needs_hidden_grad or needs_rows else 0
    columns = k if needs_rows and reduced else 0
    return SharedLossOutputs(
        loss=hidden.new_empty((1 if reduced else batch,), dtype=compute),
        target_ids=target.new_empty((examples, n_targets), dtype=torch.int32),
        target_dlogit=hidden.new_empty((examples, n_targets), dtype=compute),
        grad_hidden=hidden.new_empty((batch if inputs.needs_hidden_grad else 0, dim), dtype=compute),
        classes=target.new_empty((k if needs_rows else 0,)),
        rows=hidden.new_empty((columns, dim), dtype=compute),
        elements=hidden.new_empty((columns,), dtype=compute),
        dlogit=hidden.new_empty((batch if needs_rows and not reduced else 0, k), dtype=compute),
        grad_shift=hidden.new_empty((examples,), dtype=compute),
    )


@library.register_fake("shared_loss_")
def _epilogue_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = SharedEpilogueInputs._make(arguments)
    logits, target, (batch, dim) = inputs.logits, inputs.target, inputs.hidden.shape
    n_targets = target.shape[1]
    examples = batch if inputs.needs_derivatives else 0
    return SharedEpilogueOutputs(
        loss=logits.new_empty((batch,)),
        target_ids=target.new_empty((examples, n_targets), dtype=torch.int32),
        target_dlogit=logits.new_empty((examples, n_targets)),
        grad_hidden=logits.new_empty((examples if inputs.needs_hidden_grad else 0, dim)),
        grad_shift=logits.new_empty((examples,)),
    )


@library.register_fake("shared_row_grad")
def _row_grad_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = SharedRowGradInputs._make(arguments)
    unique: Any
    n: Any
    if inputs.gradient_layout == DENSE:
        unique, n = 0, inputs.n_classes
    elif inputs.gradient_layout == PADDED:
        unique = n = min_of(inputs.target_ids.numel(), inputs.n_classes) + inputs.classes.shape[0]
    else:
        unique = n = unknown_size()
    hidden, dtype = inputs.hidden, inputs.dtype
    return RowGradient(
        classes=inputs.classes.new_empty((unique,)),
        rows=hidden.new_empty((n if inputs.with_rows else 0, hidden.shape[1]), dtype=dtype),
        elements=hidden.new_empty((n if inputs.with_bias else 0,), dtype=dtype),
    )


_NO_GRADS: Any = SharedLossInputs._make([None] * len(SharedLossInputs._fields))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    given, made = SharedLossInputs._make(inputs), SharedLossOutputs._make(output)
    needs = library.needed_gradients(ctx, SharedLossInputs)
    keep_table(ctx, given.hidden, given.weight, given.gradient_layout)
    of_rows = needs.weight or needs.bias
    kept = dict.fromkeys(SharedLossOutputs._fields, of_rows)
    kept.update(loss=False, grad_hidden=needs.hidden, grad_shift=needs.log_z)
    saved = (value if kept[name] else None for name, value in made._asdict().items())
    ctx.save_for_backward(given.hidden if of_rows else None, *saved)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Scale what the forward pass has computed. grad_loss is [1] where it has summed the examples, else [B]."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    if grad_loss is None:
        return tuple(_NO_GRADS)
    hidden, *rest = ctx.saved_tensors
    saved, needs = SharedLossOutputs._make(rest), library.needed_gradients(ctx, SharedLossInputs)
    table, of_hidden, of_weight, of_bias, of_log_z = ctx.table, None, None, None, None
    if needs.hidden:
        grad_hidden = saved.grad_hidden
        if grad_loss.shape[0] != 1 or not is_one(grad_loss):
            grad_hidden = grad_hidden * grad_loss[:, None]
        of_hidden = grad_hidden.to(ctx.hidden_dtype)
    if needs.weight or needs.bias:
        with_rows, with_bias = needs.weight, needs.bias
        layout = layout_now(table, hidden.device)
        merged = shared_row_grad(
            SharedRowGradInputs(
                saved.target_ids, saved.target_dlogit, grad_loss, hidden, saved.classes, saved.rows, saved.elements,
                saved.dlogit, table.n_classes, table.dtype, with_rows, with_bias, layout,
            )
        )  # fmt: skip
        of_weight, of_bias = gradients_of_table(merged, table, layout, needs_weight=with_rows, needs_bias=with_bias)
    if needs.log_z:
        of_log_z = -saved.grad_shift * grad_loss
    return tuple(_NO_GRADS._replace(hidden=of_hidden, weight=of_weight, bias=of_bias, log_z=of_log_z))


library.register_autograd("shared_loss", _backward, _setup_context)
_transformable = transformable(
    lambda *inputs: torch.ops.nce_ext.shared_loss(*inputs), _backward, _setup_context, NO_DOUBLE_BACKWARD
)
