"""Shapes and dtypes of what the compiled operators return: what tracing sees in the place of their kernels.

Arguments are those of the schemas in csrc/ops.cpp.
"""

from __future__ import annotations

from typing import Any

import torch

from nce_ext import reference
from nce_ext.reference.dtypes import compute_dtype

# What backward makes of the rows' gradient: the last argument of sampled_loss.
DENSE, COALESCED, PADDED = 0, 1, 2


def sample(seed, table, kind, n_classes, rows, cols):
    return seed.new_empty((rows, cols))


def alias_table(weights, scale):
    return weights.new_empty((weights.shape[0], 4), dtype=torch.int32)


def sampled_loss(
    hidden, weight, bias, target, log_z, seed, table, negatives, target_log_q, negative_log_q, kind, num_negatives,
    subtract_log_q, offset, remove_hits, uniform_labels, mean_candidates, ignore_index, objective, positive_weight,
    label_smoothing, temperature, correct_positive, needs_hidden_grad, needs_row_grad, gradient_layout,
):  # fmt: skip
    batch, dim = hidden.shape
    columns = target.shape[1] + num_negatives
    compute = compute_dtype(weight.dtype)
    rows = batch if needs_row_grad or (objective != reference.BINARY and needs_hidden_grad) else 0
    return (
        hidden.new_empty((batch,), dtype=compute),
        hidden.new_empty((rows, columns), dtype=torch.int32),
        hidden.new_empty((rows, columns), dtype=compute),
        hidden.new_empty((batch if needs_hidden_grad else 0, dim), dtype=compute),
    )


def shared_loss_(
    logits, hidden, weight, bias, target, target_log_q, log_z, column_shift, multiplicity, hits, row_scale, offset,
    uniform_labels, mean_candidates, n_draws, ignore_index, objective, positive_weight, label_smoothing, temperature,
    correct_positive, needs_derivatives, needs_hidden_grad,
):  # fmt: skip
    (batch, dim), n_targets = hidden.shape, target.shape[1]
    rows = batch if needs_derivatives else 0
    return (
        logits.new_empty((batch,)),
        target.new_empty((rows, n_targets), dtype=torch.int32),
        logits.new_empty((rows, n_targets)),
        logits.new_empty((rows if needs_hidden_grad else 0, dim)),
        logits.new_empty((rows,)),
    )


def shared_loss(
    hidden, weight, bias, target, log_z, negatives, target_log_q, negative_log_q, row_scale, distinct, offset,
    remove_hits, uniform_labels, mean_candidates, ignore_index, objective, positive_weight, label_smoothing,
    temperature, correct_positive, needs_hidden_grad, needs_row_grad, gradient_layout,
):  # fmt: skip
    (batch, dim), n_targets, k = hidden.shape, target.shape[1], negatives.shape[0]
    compute = compute_dtype(weight.dtype)
    examples = batch if needs_hidden_grad or needs_row_grad else 0
    columns = k if needs_row_grad and row_scale is not None else 0
    return (
        hidden.new_empty((batch if row_scale is None else 1,), dtype=compute),
        target.new_empty((examples, n_targets), dtype=torch.int32),
        hidden.new_empty((examples, n_targets), dtype=compute),
        hidden.new_empty((batch if needs_hidden_grad else 0, dim), dtype=compute),
        target.new_empty((k if needs_row_grad else 0,)),
        hidden.new_empty((columns, dim), dtype=compute),
        hidden.new_empty((columns,), dtype=compute),
        hidden.new_empty((batch if needs_row_grad and row_scale is None else 0, k), dtype=compute),
        hidden.new_empty((examples,), dtype=compute),
    )


def shared_row_grad(
    target_ids, target_dlogit, grad_loss, hidden, classes, rows, elements, dlogit, n_classes, dtype, with_rows,
    with_bias, gradient_layout,
):  # fmt: skip
    unique: Any
    n: Any
    if gradient_layout == DENSE:
        unique, n = 0, n_classes
    elif gradient_layout == PADDED:
        unique = n = torch.sym_min(target_ids.numel(), n_classes) + classes.shape[0]
    else:
        unique = n = torch.library.get_ctx().new_dynamic_size()
    return (
        classes.new_empty((unique,)),
        hidden.new_empty((n if with_rows else 0, hidden.shape[1]), dtype=dtype),
        hidden.new_empty((n if with_bias else 0,), dtype=dtype),
    )


def row_grad(ids, dlogit, grad_loss, hidden, n_classes, dtype, with_rows, with_bias, padded):
    unique = torch.sym_min(ids.numel(), n_classes) if padded else torch.library.get_ctx().new_dynamic_size()
    return (
        ids.new_empty((unique,), dtype=torch.int64),
        hidden.new_empty((unique if with_rows else 0, hidden.shape[1]), dtype=dtype),
        hidden.new_empty((unique if with_bias else 0,), dtype=dtype),
    )


def row_grad_dense(ids, dlogit, grad_loss, hidden, n_classes, dtype, with_rows, with_bias):
    return (
        hidden.new_empty((n_classes if with_rows else 0, hidden.shape[1]), dtype=dtype),
        hidden.new_empty((n_classes if with_bias else 0,), dtype=dtype),
    )


def row_grad_norm(ids, dlogit, grad_loss, hidden, n_classes, with_rows, with_bias):
    return hidden.new_empty((1,), dtype=torch.float64)


OF_OPERATORS = (
    sample,
    alias_table,
    sampled_loss,
    shared_loss_,
    shared_loss,
    shared_row_grad,
    row_grad,
    row_grad_dense,
    row_grad_norm,
)
