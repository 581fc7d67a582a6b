"""Losses over all pairs of two sets of vectors, computed a chunk of queries at a time: the B x M logits are never held.

The positive of a query is the key of the same index; the M columns are the vectors that it is told apart from. The
gradient in the logits has a closed form, so loss and gradients of a chunk are computed at once, with three matrix
products and the rest in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from nce_ext import _private_torch
from nce_ext._ops.transforms import Results, transformable

# query [B, D], key [B, D], negatives [K, D], scale and bias: the inputs that may require a gradient.
Operands: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]

NO_DOUBLE_BACKWARD = "nce_ext contrastive losses cannot be differentiated twice (create_graph=True)"


class Options(NamedTuple):
    """Options of a pairwise loss: all that it takes beside tensors."""

    sigmoid: bool  # SigLIP's objective instead of InfoNCE's
    in_batch: bool  # the batch's keys are columns, before the explicit negatives
    debias: float
    total: bool  # one sum over the queries instead of one loss a query
    grad_enabled: bool  # torch.is_grad_enabled() where the loss was called: inside a Function it is False
    max_logits: int


class Data(NamedTuple):
    """Tensors of which no gradient is taken: one entry a query of the batch [B], or one an explicit negative [K]."""

    ids: Tensor | None  # [B], of the keys: an equal id makes a column no negative
    negative_ids: Tensor | None  # [K]
    negative_mask: Tensor | None  # [K], False where a column is left out
    log_q: Tensor | None  # [B]
    negative_log_q: Tensor | None  # [K]
    target: Tensor | None  # [B, B + K], or [B, 1 + K] without in_batch


class Gradients(NamedTuple):
    """Gradients of the operands, of their shapes; None where none is needed."""

    query: Tensor | None
    key: Tensor | None
    negatives: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class ChunkLosses(NamedTuple):
    """Losses of the queries of a chunk, and their derivatives, each [n].

    The functions that return this overwrite the logits z [n, M] with the derivative in them, up to a factor a query.
    """

    loss: Tensor
    factor: Tensor | None  # the derivative in z is factor[:, None] * z; None: z itself
    positive: Tensor  # the derivative in the positive's logit
    extra: Tensor | None  # in the scale, as far as no logit carries it (InfoNCE); in the bias (SigLIP)


class Pairwise(torch.autograd.Function):
    """Autograd function of the losses of float32 or float64 operands: their sum, or [B].

    The upstream gradient of a sum is one number, so the gradients are computed in the forward pass, saved, and
    multiplied by that number in backward. The upstream gradient of [B] losses weighs every query on its own and is
    known in backward only, so there the operands are saved, and backward computes all chunks once more: four matrix
    products instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, negatives: Tensor | None, scale: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        data, options = Data(*rest[:-1]), rest[-1]
        operands = (query, key, negatives, scale, bias)
        needs = tuple(ctx.needs_input_grad[:5]) if options.grad_enabled and options.total else (False,) * 5
        of_queries, gradients = sweep(operands, data, options, needs, None)
        _keep(ctx, (*operands, *data, options), gradients)
        return of_queries.sum() if options.total else of_queries

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Results:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(NO_DOUBLE_BACKWARD)
        return _backward(ctx, upstream)


def _keep(ctx: Any, arguments: tuple[Any, ...], gradients: Results) -> None:
    """Save for backward what it needs: the gradients of a sum, or all arguments."""
    ctx.options = arguments[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(gradients if ctx.options.total else arguments[:-1]))


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> Results:
    """Compute the gradients of all arguments, of what was kept."""
    nothing, saved = (None,) * (len(Data._fields) + 1), ctx.saved_tensors
    if upstream is None:
        return (None,) * 5 + nothing
    if ctx.options.total:
        return (*(None if g is None else g * upstream for g in saved), *nothing)
    needs = tuple(ctx.needs_input_grad[:5])
    return (*sweep(saved[:5], Data(*saved[5:]), ctx.options, needs, upstream)[1], *nothing)


def _with_gradients(*arguments: Any) -> Results:
    """Compute the losses and, of a sum, the gradients of all operands: under torch.func any may be needed."""
    operands, data, options = arguments[:5], Data(*arguments[5:-1]), arguments[-1]
    needs = tuple(options.grad_enabled and options.total and t is not None for t in operands)
    of_queries, gradients = sweep(operands, data, options, needs, None)
    return of_queries.sum() if options.total else of_queries, *gradients


# Beside Pairwise, as apply() of an autograd function that torch.func takes is slower by 30 us.
_transformable = transformable(
    _with_gradients, _backward, lambda ctx, inputs, output: _keep(ctx, inputs, output[1:]), NO_DOUBLE_BACKWARD
)


def losses(operands: Operands, data: Data, options: Options) -> Tensor:
    """Compute the sum of all losses, or the losses [B], as ``options.total`` says, with gradients for autograd."""
    if _private_torch.inside_transform():
        of_queries = _transformable(*operands, *data, options)[0]
        assert of_queries is not None
        return of_queries
    apply: Callable[..., Tensor] = Pairwise.apply
    return apply(*operands, *data, options)


def sweep(
    operands: Operands, data: Data, options: Options, needs: tuple[bool, ...], upstream: Tensor | None
) -> tuple[Tensor, Gradients]:
    """Compute the losses [B], and the gradients of sum(upstream * losses) in the operands that ``needs`` names.

    ``upstream`` is [B], or None for ones.
    """
    query, key, negatives, scale, bias = operands
    needs_query, needs_key, needs_negatives, needs_scale, needs_bias = needs
    batch = query.shape[0]
    columns, first_negative = _columns(key, negatives, options.in_batch)
    shift, positive_shift, broken = _shifts(data, bias, columns, batch, options.in_batch)

    # lo .. hi: the columns that get a gradient. A queue of past keys needs none, and may be most of the columns.
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
            del z  # before the next chunk is made

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
    """Split a batch into chunks (start, stop) of at most max_logits logits, or of one query."""
    rows = max(1, max_logits // max(1, columns))
    return [(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def leave_out_(z: Tensor, start: int, data: Data, in_batch: bool) -> None:
    """Set to -inf the logits z [n, M] of columns that are no negatives of a query.

    These are its own key, columns of the same id, and those that negative_mask leaves out. ``start`` is the index of
    the first of the n queries in the batch.
    """
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
    """Count the columns that are negatives of each query: [B], in query's dtype."""
    columns = (key.shape[0] if options.in_batch else 0) + (0 if negatives is None else negatives.shape[0])
    counts = [query.new_zeros((0,))]
    for start, stop in chunks(query.shape[0], columns, options.max_logits):
        z = query.new_zeros((stop - start, columns))
        leave_out_(z, start, data, options.in_batch)
        counts.append((z == 0).sum(1, dtype=query.dtype))
    return torch.cat(counts)


def _columns(key: Tensor, negatives: Tensor | None, in_batch: bool) -> tuple[Tensor, int]:
    """Return the columns [M, D], and the index of the first explicit negative among them."""
    if negatives is None:
        return key, key.shape[0]
    return (torch.cat([key, negatives]), key.shape[0]) if in_batch else (negatives, 0)


def _shifts(
    data: Data, bias: Tensor | None, columns: Tensor, batch: int, in_batch: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return what is added to the logits: [M] to those of columns, [B] to those of positives; None: nothing.

    The third value, a bool scalar tensor, is True where some log q is not finite: then no loss has a meaning.
    """
    if bias is not None:
        return bias.expand(columns.shape[0]), bias.expand(batch), None
    if data.log_q is None:
        return None, None, None
    parts = [t.to(columns.dtype) for t in (data.log_q, data.negative_log_q) if t is not None]
    broken = ~torch.stack([torch.isfinite(part).all() for part in parts]).all()
    parts = [-torch.nan_to_num(part, 0.0, 0.0, 0.0) for part in parts]
    return torch.cat(parts if in_batch else parts[1:]), parts[0], broken


def _softplus(x: Tensor) -> Tensor:
    """Compute log(1 + e^x); beyond 40 its difference to x is below the rounding of float64."""
    return F.softplus(x, threshold=40)


def _shifted_exp_(z: Tensor, positive: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite z [n, M] with exp(z - m); return it, exp(positive - m), and m [n], the largest logit of each query.

    So the sum of a query's exponentials is at least 1. ``floor`` [n] counts among the logits.
    """
    largest = torch.maximum(z.amax(1), positive) if z.shape[1] else positive
    if floor is not None:
        largest = torch.maximum(largest, floor)
    z.sub_(largest[:, None]).exp_()
    return z, (positive - largest).exp(), largest


def _softmax(z: Tensor, positive: Tensor, scale: Tensor, debias: float) -> ChunkLosses:
    """Compute InfoNCE, debiased or not, as softplus(log(mass of the negatives) - positive).

    In this form nothing cancels, however small the loss is.
    """
    if not debias:
        e, p, largest = _shifted_exp_(z, positive)
        mass = e.sum(1)
        total = p + mass
        return ChunkLosses(_softplus(mass.log() + (largest - positive)), total.reciprocal(), -mass / total, None)

    count = (z > -math.inf).sum(1, dtype=z.dtype)
    e, p, largest = _shifted_exp_(z, positive, torch.where(count > 0, -scale, -math.inf))
    among = count * debias * p  # the mass of the positives that are expected among the negatives
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
    """Compute sum_j t_j (logsumexp(z) - z_j) of soft labels t; NaN, with derivative 0, where they have no meaning."""
    assert data.target is not None
    labels = data.target[start : start + z.shape[0]].to(z.dtype, copy=True)
    if in_batch:
        of_positive = labels.diagonal(start).clone()
        labels.diagonal(start).zero_()
    else:
        of_positive, labels = labels[:, 0], labels[:, 1:]
    # Computed before -inf is written into z, since 0 * -inf is NaN.
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
    """Compute the binary cross-entropies of SigLIP, summed over the pairs of each query."""
    loss = _softplus(-positive) + _softplus(z).sum(1)
    slope = -torch.sigmoid(-positive)
    z.sigmoid_()
    return ChunkLosses(loss, None, slope, z.sum(1) + slope)
