"""All pairs of two sets of vectors, a chunk of rows at a time: losses and gradients that never hold the B x M logits.

A row is a query, its positive is the key of the same index, and the M columns are what it is told apart from. The
gradient in the logits has a closed form, so a chunk yields loss and gradients at once: three matrix products, the rest
in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

# query [B, D], key [B, D], negatives [K, D], scale and bias: what gradients are taken of.
Operands: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


class Options(NamedTuple):
    """What is not a tensor."""

    sigmoid: bool  # SigLIP's objective instead of InfoNCE's
    in_batch: bool  # the other rows' keys are columns, before the explicit negatives
    debias: float
    total: bool  # the sum over rows instead of one loss a row
    grad_enabled: bool
    max_logits: int


class Data(NamedTuple):
    """What no gradient is taken of; one entry a row, or a column."""

    ids: Tensor | None  # [B]
    negative_ids: Tensor | None  # [K]
    negative_mask: Tensor | None  # [K], False where a column is left out
    log_q: Tensor | None  # [B]
    negative_log_q: Tensor | None  # [K]
    target: Tensor | None  # [B, B + K], or [B, 1 + K] without in_batch


class Gradients(NamedTuple):
    query: Tensor | None
    key: Tensor | None
    negatives: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class ChunkLosses(NamedTuple):
    """Of a chunk: the loss and its slopes. That in the logits is factor[:, None] * what is left in their place."""

    loss: Tensor
    factor: Tensor | None
    positive: Tensor  # the slope in the positive's logit
    extra: Tensor | None  # the slope in the scale that does not come by a logit (InfoNCE), in the bias (SigLIP)


class Pairwise(torch.autograd.Function):
    """Loss of float32 or float64 operands: their sum, or [B].

    A sum has one number as its upstream gradient, so the gradients are made in the forward pass and multiplied by it in
    backward: what is saved is of the operands' size. For [B] losses the upstream weighs every row on its own, and is
    not known before backward, which then computes the chunks anew: four products instead of three, and the operands
    are saved.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, negatives: Tensor | None, scale: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        data, options = Data(*rest[:-1]), rest[-1]
        ctx.options = options
        ctx.set_materialize_grads(False)
        operands = (query, key, negatives, scale, bias)
        needs = tuple(ctx.needs_input_grad[:5]) if options.grad_enabled and options.total else (False,) * 5
        of_queries, gradients = sweep(operands, data, options, needs, None)
        ctx.save_for_backward(*(gradients if options.total else (*operands, *data)))
        return of_queries.sum() if options.total else of_queries

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("nce_ext contrastive losses cannot be differentiated twice (create_graph=True)")
        nothing = (None,) * (len(Data._fields) + 1)
        needs = tuple(ctx.needs_input_grad[:5])
        if upstream is None:
            return (None,) * 5 + nothing
        if ctx.options.total:
            gradients = Gradients(*(None if g is None else g * upstream for g in ctx.saved_tensors))
        else:
            saved = ctx.saved_tensors
            _, gradients = sweep(saved[:5], Data(*saved[5:]), ctx.options, needs, upstream)
        return (*gradients, *nothing)


def losses(operands: Operands, data: Data, options: Options) -> Tensor:
    """The sum of all losses, or [B], as the options say."""
    apply: Callable[..., Tensor] = Pairwise.apply
    return apply(*operands, *data, options)


def sweep(
    operands: Operands, data: Data, options: Options, needs: tuple[bool, ...], upstream: Tensor | None
) -> tuple[Tensor, Gradients]:
    """Losses [B], and the gradients in the operands that need one of sum(upstream * losses)."""
    query, key, negatives, scale, bias = operands
    needs_query, needs_key, needs_negatives, needs_scale, needs_bias = needs
    batch = query.shape[0]
    columns, first_negative = _columns(key, negatives, options.in_batch)
    shift, positive_shift, broken = _shifts(data, bias, columns, batch, options.in_batch)

    # Columns whose rows get a gradient: a queue of past keys needs none, and may be most of them.
    lo = 0 if needs_key and options.in_batch else first_negative
    hi = columns.shape[0] if needs_negatives else first_negative
    losses_of_chunks = []
    grad_query = torch.empty_like(query) if needs_query else None
    grad_key = torch.empty_like(key) if needs_key else None
    grad_columns = columns.new_zeros((hi - lo, columns.shape[1])) if hi > lo else None
    grad_scale = scale.new_zeros(()) if needs_scale else None
    grad_bias = bias.new_zeros(()) if needs_bias and bias is not None else None

    enabled = query.device.type != "meta" and torch.is_autocast_enabled(query.device.type)
    with torch.autocast(query.device.type, enabled=False) if enabled else nullcontext():
        for start, stop in chunks(batch, columns.shape[0], options.max_logits):
            q, k = query[start:stop], key[start:stop]
            scaled = q * scale
            positive = (scaled * k).sum(1)
            if positive_shift is not None:
                positive = positive + positive_shift[start:stop]
            z = scaled @ columns.T if shift is None else torch.addmm(shift, scaled, columns.T)
            if options.sigmoid:
                leave_out_(z, start, data, options.in_batch)
                of_chunk = _sigmoid(z, positive)
            elif data.target is None:
                leave_out_(z, start, data, options.in_batch)
                of_chunk = _softmax(z, positive, scale, options.debias)
            else:
                of_chunk = _soft_labels(z, positive, start, data, options.in_batch)
            losses_of_chunks.append(of_chunk.loss)
            if not any(needs):
                del z
                continue

            g = torch.ones_like(of_chunk.loss) if upstream is None else upstream[start:stop]
            if broken is not None:
                g = torch.where(broken, 0, g)
            weight = g if of_chunk.factor is None else g * of_chunk.factor
            of_positive = g * of_chunk.positive
            if needs_query or needs_scale:
                slope = (z @ columns).mul_(weight[:, None]).addcmul_(of_positive[:, None], k)
                if grad_scale is not None:
                    grad_scale += (q * slope).sum()
                if grad_query is not None:
                    grad_query[start:stop] = slope.mul_(scale)
            if grad_key is not None:
                grad_key[start:stop] = scaled * of_positive[:, None]
            if grad_columns is not None:
                grad_columns.addmm_(z[:, lo:hi].T, scaled * weight[:, None])
            scalar = grad_bias if options.sigmoid else grad_scale
            if of_chunk.extra is not None and scalar is not None:
                scalar += (g * of_chunk.extra).sum()
            del z  # so that two chunks are never held

    result = torch.cat(losses_of_chunks) if losses_of_chunks else query.new_zeros((0,))
    if broken is not None:
        result = torch.where(broken, math.nan, result)
    if grad_key is not None and grad_columns is not None and options.in_batch:
        grad_key += grad_columns[:batch]
    grad_negatives = None
    if needs_negatives and negatives is not None:
        grad_negatives = torch.zeros_like(negatives) if grad_columns is None else grad_columns[first_negative - lo :]
    return result, Gradients(grad_query, grad_key, grad_negatives, grad_scale, grad_bias)


def chunks(batch: int, columns: int, max_logits: int) -> list[tuple[int, int]]:
    """(start, stop) of the rows that are held at a time."""
    rows = max(1, max_logits // max(1, columns))
    return [(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def leave_out_(z: Tensor, start: int, data: Data, in_batch: bool) -> None:
    """-inf where a column is no negative of the row: the positive, the same id, and what the mask leaves out."""
    if in_batch:
        z.diagonal(start).fill_(-math.inf)
    stop = start + z.shape[0]
    if data.ids is not None:
        column_ids = data.ids if in_batch else data.ids[:0]
        if data.negative_ids is not None:
            column_ids = torch.cat([column_ids, data.negative_ids])
        same = data.ids[start:stop, None] == column_ids
        z[:, : same.shape[1]].masked_fill_(same, -math.inf)
    if data.negative_mask is not None:
        z[:, z.shape[1] - data.negative_mask.shape[0] :].masked_fill_(~data.negative_mask, -math.inf)


def count_negatives(query: Tensor, key: Tensor, negatives: Tensor | None, data: Data, options: Options) -> Tensor:
    """How many columns are negatives of the row, [B]."""
    columns = (key.shape[0] if options.in_batch else 0) + (0 if negatives is None else negatives.shape[0])
    counts = [query.new_zeros((0,))]
    for start, stop in chunks(query.shape[0], columns, options.max_logits):
        z = query.new_zeros((stop - start, columns))
        leave_out_(z, start, data, options.in_batch)
        counts.append((z == 0).sum(1, dtype=query.dtype))
    return torch.cat(counts)


def _columns(key: Tensor, negatives: Tensor | None, in_batch: bool) -> tuple[Tensor, int]:
    """The columns [M, D], and where the explicit negatives begin."""
    if negatives is None:
        return key, key.shape[0]
    return (torch.cat([key, negatives]), key.shape[0]) if in_batch else (negatives, 0)


def _shifts(
    data: Data, bias: Tensor | None, columns: Tensor, batch: int, in_batch: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is added to a column's logit and to a positive's, and whether some log q leaves the loss without meaning."""
    if bias is not None:
        return bias.expand(columns.shape[0]), bias.expand(batch), None
    if data.log_q is None:
        return None, None, None
    parts = [t.to(columns.dtype) for t in (data.log_q, data.negative_log_q) if t is not None]
    broken = ~torch.stack([torch.isfinite(part).all() for part in parts]).all()
    parts = [-torch.nan_to_num(part, 0.0, 0.0, 0.0) for part in parts]
    return torch.cat(parts if in_batch else parts[1:]), parts[0], broken


def _softplus(x: Tensor) -> Tensor:
    # Beyond 40 the difference to x is below float64's rounding.
    return F.softplus(x, threshold=40)


def _shifted_exp_(z: Tensor, positive: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z - m) in place of z, exp(positive - m), and m: the largest of a row, so that the sum is at least 1."""
    largest = torch.maximum(z.amax(1), positive) if z.shape[1] else positive
    if floor is not None:
        largest = torch.maximum(largest, floor)
    z.sub_(largest[:, None]).exp_()
    return z, (positive - largest).exp(), largest


def _softmax(z: Tensor, positive: Tensor, scale: Tensor, debias: float) -> ChunkLosses:
    """softplus(log(mass of the negatives) - positive): no cancellation however small the loss."""
    if not debias:
        e, p, largest = _shifted_exp_(z, positive)
        mass = e.sum(1)
        total = p + mass
        return ChunkLosses(_softplus(mass.log() + (largest - positive)), total.reciprocal(), -mass / total, None)

    count = (z > -math.inf).sum(1, dtype=z.dtype)
    e, p, largest = _shifted_exp_(z, positive, torch.where(count > 0, -scale, -math.inf))
    among = count * debias * p  # the positives that hide among the negatives
    estimate = (e.sum(1) - among) / (1 - debias)
    floor = torch.where(count > 0, count * (-scale - largest).exp(), 0)
    floored = estimate <= floor
    mass = torch.where(floored, floor, estimate)
    total = p + mass
    return ChunkLosses(
        loss=_softplus(mass.log() + (largest - positive)),
        factor=torch.where(floored, 0, 1 / ((1 - debias) * total)),
        positive=-(torch.where(floored, 0, among / (1 - debias)) + mass) / total,
        extra=torch.where(floored, -floor / total, 0),
    )


def _soft_labels(z: Tensor, positive: Tensor, start: int, data: Data, in_batch: bool) -> ChunkLosses:
    """sum_j t_j (logsumexp(z) - z_j); NaN and slope 0 where the labels have no meaning."""
    assert data.target is not None
    labels = data.target[start : start + z.shape[0]].to(z.dtype, copy=True)
    if in_batch:
        of_positive = labels.diagonal(start).clone()
        labels.diagonal(start).zero_()
    else:
        of_positive, labels = labels[:, 0], labels[:, 1:]
    # Before -inf is written, which a label of 0 would turn into NaN.
    logits = (labels * z).sum(1)
    leave_out_(z, start, data, in_batch)
    bad = ~((labels >= 0) & (labels < math.inf) & ((labels == 0) | (z > -math.inf))).all(1)
    bad |= ~((of_positive >= 0) & (of_positive < math.inf))
    labels = labels.masked_fill(bad[:, None], 0)
    of_positive = of_positive.masked_fill(bad, 0)
    of_negatives = labels.sum(1)

    e, p, largest = _shifted_exp_(z, positive)
    mass = e.sum(1)
    total = p + mass
    loss = of_positive * _softplus(mass.log() + (largest - positive))
    loss = loss + of_negatives * (total.log() + largest) - logits
    e.mul_(((of_positive + of_negatives) / total)[:, None]).sub_(labels)
    slope = (of_negatives * p - of_positive * mass) / total
    return ChunkLosses(loss.masked_fill(bad, math.nan), None, slope, None)


def _sigmoid(z: Tensor, positive: Tensor) -> ChunkLosses:
    loss = _softplus(-positive) + _softplus(z).sum(1)
    slope = -torch.sigmoid(-positive)
    z.sigmoid_()
    return ChunkLosses(loss, None, slope, z.sum(1) + slope)
