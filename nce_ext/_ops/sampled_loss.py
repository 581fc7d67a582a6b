"""The operator ``sampled_loss``: the loss of each example over its own candidates, in one pass over their rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext import _private_torch, reference
from nce_ext._ops import library
from nce_ext._ops.row_grad import (
    NO_DOUBLE_BACKWARD,
    GradientPairs,
    gradients_of_table,
    keep_table,
    layout_now,
    row_grad_in,
)
from nce_ext._ops.transforms import transformable
from nce_ext.reference.dtypes import compute_dtype


class SampledLossInputs(NamedTuple):
    """Arguments of ``sampled_loss``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    log_z: Tensor | None
    seed: Tensor | None
    table: Tensor
    kind: int
    num_negatives: int
    negatives: Tensor | None
    remove_hits: bool
    target_log_q: Tensor | None
    negative_log_q: Tensor | None
    subtract_log_q: bool
    offset: float
    uniform_labels: bool
    mean_candidates: bool
    ignore_index: int
    objective: int
    positive_weight: float
    label_smoothing: float
    temperature: float
    correct_positive: bool
    needs_hidden_grad: bool
    needs_row_grad: bool
    gradient_layout: int


class SampledLossOutputs(NamedTuple):
    """Loss [B], ids and dlogit [B, T + k], gradient of hidden [B, D]; all unscaled, and empty where not needed."""

    loss: Tensor
    ids: Tensor
    dlogit: Tensor
    grad_hidden: Tensor


def sampled_loss(inputs: SampledLossInputs) -> SampledLossOutputs:
    """Call the operator, through autograd if a tensor requires a gradient; only the loss has one."""
    if _private_torch.inside_transform():
        return SampledLossOutputs._make(_transformable(*inputs))
    return SampledLossOutputs._make(torch.ops.nce_ext.sampled_loss(*inputs))


@library.register_fake("sampled_loss")
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = SampledLossInputs._make(arguments)
    hidden, (batch, dim) = inputs.hidden, inputs.hidden.shape
    columns = inputs.target.shape[1] + inputs.num_negatives
    compute = compute_dtype(inputs.weight.dtype)
    keeps_scores = inputs.objective != reference.BINARY and inputs.needs_hidden_grad
    saved = batch if inputs.needs_row_grad or keeps_scores else 0
    return SampledLossOutputs(
        loss=hidden.new_empty((batch,), dtype=compute),
        ids=hidden.new_empty((saved, columns), dtype=torch.int32),
        dlogit=hidden.new_empty((saved, columns), dtype=compute),
        grad_hidden=hidden.new_empty((batch if inputs.needs_hidden_grad else 0, dim), dtype=compute),
    )


_NO_GRADS: Any = SampledLossInputs._make([None] * len(SampledLossInputs._fields))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    given, made = SampledLossInputs._make(inputs), SampledLossOutputs._make(output)
    needs = library.needed_gradients(ctx, SampledLossInputs)
    keep_table(ctx, given.hidden, given.weight, given.gradient_layout)
    of_rows = needs.weight or needs.bias
    ctx.save_for_backward(
        given.hidden if of_rows else None,
        made.ids if of_rows else None,
        made.dlogit if of_rows or needs.log_z else None,
        made.grad_hidden if needs.hidden else None,
    )


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Scale what the forward pass has computed: everything is linear in grad_loss [B]."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    if grad_loss is None:
        return tuple(_NO_GRADS)
    hidden, ids, dlogit, grad_hidden = ctx.saved_tensors
    needs, table = library.needed_gradients(ctx, SampledLossInputs), ctx.table
    of_hidden = of_weight = of_bias = of_log_z = None
    if needs.hidden:
        of_hidden = (grad_hidden * grad_loss[:, None]).to(ctx.hidden_dtype)
    if needs.weight or needs.bias:
        with_rows, with_bias = needs.weight, needs.bias
        layout, pairs = layout_now(table, ids.device), GradientPairs(ids, dlogit, grad_loss, hidden)
        summed = row_grad_in(layout, pairs, table.n_classes, table.dtype, with_rows=with_rows, with_bias=with_bias)
        of_weight, of_bias = gradients_of_table(summed, table, layout, needs_weight=with_rows, needs_bias=with_bias)
    if needs.log_z:
        of_log_z = -dlogit.sum(1) * grad_loss
    return tuple(_NO_GRADS._replace(hidden=of_hidden, weight=of_weight, bias=of_bias, log_z=of_log_z))


library.register_autograd("sampled_loss", _backward, _setup_context)
_transformable = transformable(
    lambda *inputs: torch.ops.nce_ext.sampled_loss(*inputs), _backward, _setup_context, NO_DOUBLE_BACKWARD
)
