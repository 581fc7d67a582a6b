"""Negatives that all examples share: matrix products with their rows, and one fused epilogue between the products.

The operators ``shared_loss`` and ``shared_row_grad`` (schemas in csrc/ops.cpp) are implemented here, for every device.
A chunk of examples is scored, its scores are turned into derivatives in place while they are in the cache, and the
derivatives are multiplied out; nothing of size B k exists unless each example's loss is asked for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nce_ext import _private_torch
from nce_ext._ops import library
from nce_ext._ops.coo import COALESCED, PADDED, is_one
from nce_ext._ops.row_grad import GradientPairs, RowGradient, row_grad_in
from nce_ext._ops.shared_loss import (
    SharedEpilogueInputs,
    SharedLossInputs,
    SharedLossOutputs,
    SharedRowGradInputs,
    shared_loss,
    shared_loss_,
)
from nce_ext._sampled.call import Call, log_q_of, needed_gradients, objective_arguments
from nce_ext.reference.dtypes import compute_dtype

# Bytes of a chunk of scores, which stay in a cache: beyond the second-level one on the CPU, where smaller products are
# slower, and in the L2 cache on a GPU.
CHUNK_BYTES = {"cpu": 2**22, "cuda": 32 * 2**20}


def losses(call: Call, example_weight: Tensor | None, grad_enabled: bool) -> Tensor:
    """Compute the loss of each example [B], or with ``example_weight`` [B] the sum of their products, [1]."""
    operands, candidates, correction = call.operands, call.candidates, call.correction
    assert candidates.ids is not None
    target_log_q, negative_log_q = log_q_of(call, candidates.ids)
    hidden = operands.hidden
    needs_hidden_grad, needs_row_grad = needed_gradients(operands, grad_enabled)
    inputs = SharedLossInputs(
        **operands._replace(hidden=hidden if hidden.stride(-1) == 1 else hidden.contiguous())._asdict(),
        negatives=candidates.ids[0],
        distinct=candidates.distinct,
        remove_hits=candidates.remove_hits,
        target_log_q=None if target_log_q is None else target_log_q.to(operands.compute_dtype),
        negative_log_q=None if negative_log_q is None else negative_log_q.to(operands.compute_dtype)[0],
        offset=correction.offset,
        **call.labels._asdict(),
        **objective_arguments(call.objective),
        example_weight=example_weight,
        needs_hidden_grad=needs_hidden_grad,
        needs_row_grad=needs_row_grad,
        gradient_layout=call.layout.gradient_layout,
    )
    return shared_loss(inputs).loss


class SharedColumns:
    """The negatives as columns of a matrix of scores, sorted by class; of equal ones the first counts for all of them.

    On the CPU the others are left out. On CUDA, where one would have to wait for their number, they count 0 times.
    """

    def __init__(self, ids: Tensor, log_q: Tensor | None, n_classes: int, *, distinct: bool) -> None:
        self.n_draws = len(ids)
        bad = (ids < 0) | (ids >= n_classes)
        self.bad = bad.any() if log_q is None else bad.any() | ~torch.isfinite(log_q).all()
        self.ids, order = torch.where(bad, 0, ids).sort(stable=True)
        self.log_q = None if log_q is None else log_q[order]
        first = torch.ones_like(self.ids, dtype=torch.bool)
        first[1:] = self.ids[1:] != self.ids[:-1]
        if self.log_q is not None:  # that of the caller may differ between equal ids
            first[1:] |= self.log_q[1:] != self.log_q[:-1]
        self.multiplicity: Tensor | None
        if ids.device.type == "cpu":
            starts = first.nonzero()[:, 0]
            self.multiplicity = None
            if len(starts) < len(ids):
                self.ids, self.log_q = self.ids[starts], None if self.log_q is None else self.log_q[starts]
                if not distinct:
                    self.multiplicity = torch.diff(starts, append=starts.new_tensor([self.n_draws]))
        elif distinct:
            self.multiplicity = first
        else:
            run = first.cumsum(0) - 1
            self.multiplicity = torch.where(
                first, torch.zeros_like(run).scatter_add_(0, run, torch.ones_like(run))[run], 0
            )

    def accidental_hits(self, target: Tensor) -> Tensor:
        """Find the columns of each target's class: their bounds, int32 [B, T, 2]."""
        bounds = (torch.searchsorted(self.ids, target, right=right, out_int32=True) for right in (False, True))
        return torch.stack(tuple(bounds), -1)


def _shared_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """Implement the operator ``shared_loss``."""
    inputs = SharedLossInputs._make(arguments)
    hidden, weight, target = inputs.hidden, inputs.weight, inputs.target
    batch, (n_classes, dim), k = hidden.shape[0], weight.shape, len(inputs.negatives)
    n_targets, compute = target.shape[1], compute_dtype(weight.dtype)
    needs_rows, example_weight = inputs.needs_row_grad, inputs.example_weight
    needs_derivatives = inputs.needs_hidden_grad or needs_rows
    columns = SharedColumns(inputs.negatives, inputs.negative_log_q, n_classes, distinct=inputs.distinct)
    n = len(columns.ids)
    if hidden.device.type == "cpu" and bool(columns.bad) and bool((target != inputs.ignore_index).any()):
        raise RuntimeError(f"negatives must be in 0 .. {n_classes - 1}, classes with a finite log q")
    # float32 products of 16-bit operands need a GPU; elsewhere the operands are widened.
    product_dtype = weight.dtype if hidden.device.type == "cuda" or weight.dtype == compute else compute
    # Of a table in host memory they are gathered there, for which the ids are waited for.
    of_columns = columns.ids.to(weight.device)
    rows = weight.index_select(0, of_columns).to(hidden.device, product_dtype)
    shift = torch.full((n,), -inputs.offset, dtype=compute, device=hidden.device)
    if inputs.bias is not None:
        shift += inputs.bias.index_select(0, of_columns).to(hidden.device)
    if columns.log_q is not None:
        shift -= columns.log_q
    # A bad negative is everybody's: it makes each example bad, by way of its targets.
    target_log_q = inputs.target_log_q
    if target_log_q is None:
        target_log_q = target.new_zeros(target.shape, dtype=compute)
    target_log_q = torch.where(columns.bad, torch.nan, target_log_q)
    multiplicity = None if columns.multiplicity is None else columns.multiplicity.to(compute)
    accidental_hits = columns.accidental_hits(target) if inputs.remove_hits else None

    kept = example_weight is None and needs_rows  # the derivatives, for what is yet to come from above
    accumulates = needs_rows and not kept
    saved = batch if needs_derivatives else 0
    out = SharedLossOutputs(
        loss=hidden.new_empty((batch,), dtype=compute),
        target_ids=target.new_empty((saved, n_targets), dtype=torch.int32),
        target_dlogit=hidden.new_empty((saved, n_targets), dtype=compute),
        grad_hidden=hidden.new_empty((batch if inputs.needs_hidden_grad else 0, dim), dtype=compute),
        classes=torch.full((k if needs_rows else 0,), -1, dtype=torch.int64, device=hidden.device),
        rows=hidden.new_empty((k if accumulates else 0, dim), dtype=compute),
        elements=hidden.new_zeros((k if accumulates else 0,), dtype=compute),
        dlogit=hidden.new_zeros((batch if kept else 0, k), dtype=compute),
        grad_shift=hidden.new_empty((saved,), dtype=compute),
    )
    grad_columns = hidden.new_zeros((dim, n if accumulates else 0), dtype=compute)  # transposed: the faster product
    if needs_rows:
        out.classes[:n] = columns.ids if multiplicity is None else torch.where(multiplicity > 0, columns.ids, -1)

    options = {name: value for name, value in inputs._asdict().items() if name in SharedEpilogueInputs._fields}
    size = max(1, min(batch, CHUNK_BYTES[hidden.device.type] // (max(n, 1) * shift.element_size())))
    for begin in range(0, batch, size):
        chunk = slice(begin, min(begin + size, batch))
        x = hidden[chunk].to(product_dtype)
        logits = product_in(compute, x, rows)
        made = shared_loss_(
            SharedEpilogueInputs(
                **{
                    **options,
                    "logits": logits,
                    "hidden": hidden[chunk],
                    "target": target[chunk],
                    "target_log_q": target_log_q[chunk],
                    "log_z": _part(inputs.log_z, chunk),
                    "column_shift": shift,
                    "multiplicity": multiplicity,
                    "accidental_hits": _part(accidental_hits, chunk),
                    "n_draws": columns.n_draws,
                    "example_weight": _part(example_weight, chunk),
                    "needs_derivatives": needs_derivatives,
                }
            )
        )
        out.loss[chunk] = made.loss
        if not needs_derivatives:
            continue
        out.target_ids[chunk], out.target_dlogit[chunk] = made.target_ids, made.target_dlogit
        out.grad_shift[chunk] = made.grad_shift
        factors = logits.to(product_dtype)
        if inputs.needs_hidden_grad:
            torch.add(made.grad_hidden, product_in(compute, factors, rows.T), out=out.grad_hidden[chunk])
        if kept:
            out.dlogit[chunk, :n] = logits
        elif needs_rows:
            grad_columns += product_in(compute, x.T.contiguous(), factors.T)
            out.elements[:n] += logits.sum(0)
    if accumulates:
        out.rows[:n], out.rows[n:] = grad_columns.T, 0
    if example_weight is None:
        return out
    return out._replace(loss=(out.loss * example_weight).sum().reshape(1))


def _part(values: Tensor | None, chunk: slice) -> Tensor | None:
    return None if values is None else values[chunk]


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, a b^T, summed in float32 or float64 whatever the operands' dtype."""
    return product(a, b) if a.dtype == dtype else torch.mm(a, b.T, out_dtype=dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, a b^T.

    For float32 on the CPU by oneDNN, where torch has it: its own choice, MKL, runs at half the speed or less on
    processors that are not Intel's. The operator is torch's own affair, so it is tried once before it is relied on.
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() and b.numel() and _one_dnn_works():
        return _private_torch.one_dnn_product(a, b)
    return a @ b.T


@functools.cache
def _one_dnn_works() -> bool:
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4).T
    try:
        return torch.equal(_private_torch.one_dnn_product(a, b), a @ b.T)
    except (AttributeError, RuntimeError):
        return False


def merged_row_grad(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Implement the operator ``shared_row_grad``."""
    inputs = SharedRowGradInputs._make(arguments)
    grad_loss, hidden, n_classes = inputs.grad_loss, inputs.hidden, inputs.n_classes
    classes, rows, elements, dlogit = inputs.classes, inputs.rows, inputs.elements, inputs.dlogit
    with_rows, with_bias, gradient_layout = inputs.with_rows, inputs.with_bias, inputs.gradient_layout
    batch = hidden.shape[0]
    present = classes >= 0
    if classes.device.type == "cpu":
        n = int(present.sum())
        classes, rows, elements, dlogit = classes[:n], rows[:n], elements[:n], dlogit[:, :n]
    elif gradient_layout == COALESCED:  # waits, as row_grad does
        keep = present.nonzero()[:, 0]
        classes, rows, elements, dlogit = (
            classes[keep],
            rows[keep[: len(rows)]],
            elements[keep[: len(elements)]],
            dlogit[:, keep],
        )
    upstream = grad_loss.expand(batch)
    if not batch:
        if gradient_layout == COALESCED:  # nothing was touched
            classes = classes[:0]
        rows = hidden.new_zeros((len(classes), hidden.shape[1]), dtype=dlogit.dtype)
        elements = dlogit.new_zeros(len(classes))
    elif dlogit.shape[0] == batch:
        rows = product(dlogit.T, (hidden.to(dlogit.dtype) * upstream[:, None]).T) if with_rows else rows
        elements = dlogit.T @ upstream
    elif not is_one(grad_loss):
        rows, elements = rows * grad_loss if with_rows else rows, elements * grad_loss

    targets = GradientPairs(inputs.target_ids, inputs.target_dlogit, upstream, hidden)
    known = torch.where(classes >= 0, classes, 0)  # the others' rows are zero
    place = known
    if gradient_layout == COALESCED:
        targets = _with_classes(targets, classes)
    # In full precision until targets' and negatives' parts are added up.
    total = row_grad_in(gradient_layout, targets, n_classes, dlogit.dtype, with_rows=with_rows, with_bias=with_bias)
    if gradient_layout == PADDED:
        total = RowGradient(
            torch.cat([total.classes, known]),
            torch.cat([total.rows, rows]) if with_rows else total.rows,
            torch.cat([total.elements, elements]) if with_bias else total.elements,
        )
    else:
        if gradient_layout == COALESCED:
            place = torch.searchsorted(total.classes, classes)
        if with_rows:
            total.rows.index_add_(0, place, rows)
        if with_bias:
            total.elements.index_add_(0, place, elements)
    return RowGradient(total.classes, total.rows.to(inputs.dtype), total.elements.to(inputs.dtype))


def _with_classes(pairs: GradientPairs, classes: Tensor) -> GradientPairs:
    """Add columns of derivative 0, so that the gradient of the pairs has rows for these classes too."""
    ids, dlogit, batch = pairs.ids, pairs.dlogit, len(pairs.ids)
    width = -(-len(classes) // batch) if batch else 0
    more = ids.new_full((batch, width), -1)
    if batch:
        more.view(-1)[: len(classes)] = classes.to(ids.dtype)
    zeros = torch.zeros_like(more, dtype=dlogit.dtype)
    return pairs._replace(ids=torch.cat([ids, more], 1), dlogit=torch.cat([dlogit, zeros], 1))


library.implement("shared_loss", _shared_loss)
library.implement("shared_row_grad", merged_row_grad)
