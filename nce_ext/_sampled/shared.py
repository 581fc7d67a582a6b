"""Negatives that all examples share: matrix products with their rows, and one fused epilogue between the products.

The operators ``shared_loss`` and ``shared_row_grad`` (schemas in csrc/ops.cpp) are implemented here, for every device.
A chunk of examples is scored, its scores are turned into derivatives in place while they are in the cache, and the
derivatives are multiplied out; nothing of size B k exists unless each example's loss is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nce_ext import _ops
from nce_ext._sampled.arguments import Call

# Bytes of a chunk of scores, which stay in a cache: beyond the second-level one on the CPU, where smaller products are
# slower, and in the L2 cache on a GPU.
_WORKSPACE = {"cpu": 2**22, "cuda": 32 * 2**20}


def losses(call: Call, scale: Tensor | None, learns: bool) -> Tensor:
    """Loss of each example [B], or with ``scale`` [B] the sum of their products, [1]."""
    assert call.ids is not None
    compute = _ops.compute_dtype(call.weight.dtype)
    target_log_q, negative_log_q = (None if q is None else q.to(compute) for q in call.log_q(call.ids))
    hidden = call.hidden if call.hidden.stride(-1) == 1 else call.hidden.contiguous()
    parameters = (call.weight, call.bias, call.log_z)
    return _ops.shared_loss(
        hidden, call.weight, call.bias, call.target, call.log_z, call.ids[0], target_log_q,
        None if negative_log_q is None else negative_log_q[0], scale, call.distinct, call.offset, call.remove_hits,
        call.uniform_labels, call.mean_candidates, call.ignore_index, *call.objective,
        learns and call.hidden.requires_grad, learns and any(t is not None and t.requires_grad for t in parameters),
        call.gradient_layout,
    )  # fmt: skip


class _Columns:
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

    def hits(self, target: Tensor) -> Tensor:
        """int32 [B, T, 2]: the columns of each target's class."""
        bounds = (torch.searchsorted(self.ids, target, right=right, out_int32=True) for right in (False, True))
        return torch.stack(tuple(bounds), -1)


def _shared_loss(
    hidden, weight, bias, target, log_z, negatives, target_log_q, negative_log_q, row_scale, distinct, offset,
    remove_hits, uniform_labels, mean_candidates, ignore_index, objective, positive_weight, label_smoothing,
    temperature, correct_positive, needs_hidden_grad, needs_row_grad, gradient_layout,
):  # fmt: skip
    batch, (n_classes, dim), k = hidden.shape[0], weight.shape, len(negatives)
    n_targets, compute = target.shape[1], _ops.compute_dtype(weight.dtype)
    learns = needs_hidden_grad or needs_row_grad
    columns = _Columns(negatives, negative_log_q, n_classes, distinct=distinct)
    n = len(columns.ids)
    if hidden.device.type == "cpu" and bool(columns.bad) and bool((target != ignore_index).any()):
        raise RuntimeError(f"negatives must be in 0 .. {n_classes - 1}, classes with a finite log q")
    # float32 products of 16-bit operands need a GPU; elsewhere the operands are widened.
    product = weight.dtype if hidden.device.type == "cuda" or weight.dtype == compute else compute
    # Of a table in host memory they are gathered there, for which the ids are waited for.
    of_columns = columns.ids.to(weight.device)
    rows = weight.index_select(0, of_columns).to(hidden.device, product)
    shift = torch.full((n,), -offset, dtype=compute, device=hidden.device)
    if bias is not None:
        shift += bias.index_select(0, of_columns).to(hidden.device)
    if columns.log_q is not None:
        shift -= columns.log_q
    # A bad negative is everybody's: it makes each example bad, by way of its targets.
    if target_log_q is None:
        target_log_q = target.new_zeros(target.shape, dtype=compute)
    target_log_q = torch.where(columns.bad, torch.nan, target_log_q)
    multiplicity = None if columns.multiplicity is None else columns.multiplicity.to(compute)
    hits = columns.hits(target) if remove_hits else None

    kept = row_scale is None and needs_row_grad  # the derivatives, for what is yet to come from above
    loss = hidden.new_empty((batch,), dtype=compute)
    target_ids = target.new_empty((batch if learns else 0, n_targets), dtype=torch.int32)
    target_dlogit = hidden.new_empty((batch if learns else 0, n_targets), dtype=compute)
    grad_hidden = hidden.new_empty((batch if needs_hidden_grad else 0, dim), dtype=compute)
    grad_shift = hidden.new_empty((batch if learns else 0,), dtype=compute)
    classes = torch.full((k if needs_row_grad else 0,), -1, dtype=torch.int64, device=hidden.device)
    accumulates = needs_row_grad and not kept
    grad_columns = hidden.new_zeros((dim, n if accumulates else 0), dtype=compute)  # transposed: the faster product
    grad_rows = hidden.new_empty((k if accumulates else 0, dim), dtype=compute)
    grad_elements = hidden.new_zeros((k if accumulates else 0,), dtype=compute)
    dlogit = hidden.new_zeros((batch if kept else 0, k), dtype=compute)
    if needs_row_grad:
        classes[:n] = columns.ids if multiplicity is None else torch.where(multiplicity > 0, columns.ids, -1)

    size = max(1, min(batch, _WORKSPACE[hidden.device.type] // (max(n, 1) * shift.element_size())))
    for begin in range(0, batch, size):
        chunk = slice(begin, min(begin + size, batch))
        x = hidden[chunk].to(product)
        logits = _product(x, rows, compute)
        loss[chunk], *derivatives = _ops.shared_loss_(
            logits, hidden[chunk], weight, bias, target[chunk], target_log_q[chunk],
            None if log_z is None else log_z[chunk], shift, multiplicity, None if hits is None else hits[chunk],
            None if row_scale is None else row_scale[chunk], offset, uniform_labels, mean_candidates, columns.n_draws,
            ignore_index, objective, positive_weight, label_smoothing, temperature, correct_positive, learns,
            needs_hidden_grad,
        )  # fmt: skip
        if not learns:
            continue
        target_ids[chunk], target_dlogit[chunk], of_hidden, grad_shift[chunk] = derivatives
        factors = logits.to(product)
        if needs_hidden_grad:
            torch.add(of_hidden, _product(factors, rows.T, compute), out=grad_hidden[chunk])
        if kept:
            dlogit[chunk, :n] = logits
        elif needs_row_grad:
            grad_columns += _product(x.T.contiguous(), factors.T, compute)
            grad_elements[:n] += logits.sum(0)
    if accumulates:
        grad_rows[:n], grad_rows[n:] = grad_columns.T, 0
    if row_scale is not None:
        loss = (loss * row_scale).sum().reshape(1)
    return (
        loss, target_ids, target_dlogit, grad_hidden, classes, grad_rows, grad_elements, dlogit, grad_shift,
    )  # fmt: skip


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T, summed in float32 or float64 whatever the operands' dtype."""
    return _ops.product(a, b) if a.dtype == dtype else torch.mm(a, b.T, out_dtype=dtype)


def _shared_row_grad(
    target_ids, target_dlogit, grad_loss, hidden, classes, rows, elements, dlogit, n_classes, dtype, with_rows,
    with_bias, gradient_layout,
):  # fmt: skip
    batch = hidden.shape[0]
    present = classes >= 0
    if classes.device.type == "cpu":
        n = int(present.sum())
        classes, rows, elements, dlogit = classes[:n], rows[:n], elements[:n], dlogit[:, :n]
    elif gradient_layout == _ops.COALESCED:  # waits, as row_grad does
        keep = present.nonzero()[:, 0]
        classes, rows, elements, dlogit = (
            classes[keep],
            rows[keep[: len(rows)]],
            elements[keep[: len(elements)]],
            dlogit[:, keep],
        )
    upstream = grad_loss.expand(batch)
    if not batch:
        if gradient_layout == _ops.COALESCED:  # nothing was touched
            classes = classes[:0]
        rows = hidden.new_zeros((len(classes), hidden.shape[1]), dtype=dlogit.dtype)
        elements = dlogit.new_zeros(len(classes))
    elif dlogit.shape[0] == batch:
        rows = _ops.product(dlogit.T, (hidden.to(dlogit.dtype) * upstream[:, None]).T) if with_rows else rows
        elements = dlogit.T @ upstream
    elif not _ops.is_one(grad_loss):
        rows, elements = rows * grad_loss if with_rows else rows, elements * grad_loss

    # In full precision until targets' and negatives' parts are added up.
    rest = (upstream, hidden, n_classes, dlogit.dtype, with_rows, with_bias)
    known = torch.where(classes >= 0, classes, 0)  # the others' rows are zero
    if gradient_layout == _ops.PADDED:
        of_targets, target_rows, target_elements = _ops.row_grad(target_ids, target_dlogit, *rest, True)
        rows = torch.cat([target_rows, rows]) if with_rows else target_rows
        elements = torch.cat([target_elements, elements]) if with_bias else target_elements
        return torch.cat([of_targets, known]), rows.to(dtype), elements.to(dtype)
    if gradient_layout == _ops.DENSE:
        merged, place = classes.new_empty((0,)), known
        total, total_elements = _ops.row_grad_dense(target_ids, target_dlogit, *rest)
    else:
        merged, total, total_elements = _ops.row_grad(*_with_classes(target_ids, target_dlogit, classes), *rest, False)
        place = torch.searchsorted(merged, classes)
    if with_rows:
        total.index_add_(0, place, rows)
    if with_bias:
        total_elements.index_add_(0, place, elements)
    return merged, total.to(dtype), total_elements.to(dtype)


def _with_classes(ids: Tensor, dlogit: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """More columns, with derivative 0, so that the gradient of the targets has rows for these classes too."""
    batch = len(ids)
    width = -(-len(classes) // batch) if batch else 0
    more = ids.new_full((batch, width), -1)
    if batch:
        more.view(-1)[: len(classes)] = classes.to(ids.dtype)
    return torch.cat([ids, more], 1), torch.cat([dlogit, torch.zeros_like(more, dtype=dlogit.dtype)], 1)


_ops.implement("shared_loss", _shared_loss)
_ops.implement("shared_row_grad", _shared_row_grad)
