"""Scores, loss and gradients of examples whose columns are spread over processes: what each does with its own rows.

Every process has all examples and the rows of some classes. It scores the targets and negatives that are among them,
chunk by chunk, and adds the scores up to a few numbers an example, which are all that is reduced. Backward scores once
more, since the rows must be read again for hidden's gradient: nothing of an example's columns is kept but their ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nce_ext._ops.coo import COALESCED, DENSE
from nce_ext._ops.row_grad import GradientPairs, RowGradient, Table, gradients_of_table, row_grad_in
from nce_ext._sampled.shared import CHUNK_BYTES, merged_row_grad, product_in
from nce_ext.distributed.vocab_parallel.batch import GatherContext, GatheredExamples
from nce_ext.reference.dtypes import compute_dtype
from nce_ext.reference.objective import ReducedExamples


class VocabParallelLosses(torch.autograd.Function):
    """Losses [B_r] of this process's examples, of their ``hidden`` [B_r, D] and ``log_z``: None, [B_r], or a scalar.

    ``weight`` and ``bias`` are this process's rows, whose gradient is complete: it is of the examples of all processes.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, log_z, gathered: GatheredExamples, context: GatherContext) -> Tensor:
        ctx.hidden_dtype, ctx.context = hidden.dtype, context
        ctx.log_z_like = None if log_z is None else (log_z.dim(), log_z.dtype)
        with _without_autocast(hidden):
            totals = _reduce(gathered, context)
            losses = _reduced_examples(gathered, context, *totals).losses()
        ctx.save_for_backward(*gathered, *totals)
        return _own_examples(torch.where(gathered.bad, torch.nan, losses), context).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        saved, context = ctx.saved_tensors, ctx.context
        n_fields = len(GatheredExamples._fields)
        gathered, totals = GatheredExamples(*saved[:n_fields]), saved[n_fields:]
        needs_hidden, needs_weight, needs_bias, needs_log_z = ctx.needs_input_grad[:4]
        inputs: list[Tensor | None] = [None] * 6
        with context.collectives.step(agreed=True), _without_autocast(grad_losses):
            upstream = context.collectives.all_gather(grad_losses, context.sizes)
            gradient = _GradientSums(gathered, needs_hidden, needs_weight or needs_bias, shared=context.shared)
            reduced = _reduced_examples(gathered, context, *totals)
            of_targets = reduced.of_targets() * upstream[:, None]
            for chunk in _chunks(gathered, context):
                of_negatives = reduced.of_negatives(chunk.z, chunk.counts, chunk.examples)
                gradient.add(chunk, of_targets[chunk.examples], of_negatives * upstream[chunk.examples, None])
            if needs_hidden:
                inputs[0] = context.collectives.reduce_scatter(gradient.hidden, context.sizes).to(ctx.hidden_dtype)
            if needs_weight or needs_bias:
                inputs[1:3] = gradient.of_rows(context, needs_weight, needs_bias)
            if needs_log_z:
                per_example, dtype = ctx.log_z_like
                if per_example:
                    inputs[3] = -context.collectives.reduce_scatter(gradient.shift, context.sizes).to(dtype)
                else:
                    inputs[3] = -context.collectives.all_reduce(gradient.shift.sum()).to(dtype)
        return tuple(inputs)


class _ScoredPairs:
    """Rows of ids [b, n] (-1: none) beside the hidden vectors x [b, D] of their examples."""

    def __init__(self, gathered: GatheredExamples, ids: Tensor, x: Tensor) -> None:
        self.shape = ids.shape
        flat = ids.reshape(-1)
        self.at = (flat >= 0).nonzero()[:, 0]
        self.example = self.at // max(ids.shape[1], 1)
        self.classes = flat[self.at]
        self.rows = gathered.weight.index_select(0, self.classes).to(x.dtype)
        self.bias = gathered.bias

    def scores(self, x: Tensor) -> Tensor:
        """<x, row> + bias, 0 where there is none."""
        scores = x.index_select(0, self.example).mul_(self.rows).sum(1)
        if self.bias is not None:
            scores += self.bias.index_select(0, self.classes)
        return x.new_zeros(self.shape.numel()).index_put_((self.at,), scores).view(self.shape)

    def hidden_gradient(self, derivative: Tensor) -> Tensor:
        """sum_n derivative[:, n] row, [b, D]. The rows are used up."""
        self.rows.mul_(derivative.reshape(-1)[self.at, None])
        gradient = self.rows.new_zeros((self.shape[0], self.rows.shape[1]))
        return gradient.index_add_(0, self.example, self.rows)


class _NegativeColumns:
    """Rows that are negatives of every example, as the columns of a matrix product."""

    def __init__(self, gathered: GatheredExamples) -> None:
        compute = compute_dtype(gathered.weight.dtype)
        # float32 products of 16-bit operands need a GPU; elsewhere the operands are widened.
        self.product_dtype = gathered.weight.dtype if gathered.weight.device.type == "cuda" else compute
        self.rows = gathered.weight.index_select(0, gathered.ids).to(self.product_dtype)
        self.bias = None if gathered.bias is None else gathered.bias.index_select(0, gathered.ids).to(compute)
        self.compute = compute

    def scores(self, x: Tensor) -> Tensor:
        scores = self.product(x, self.rows)
        return scores if self.bias is None else scores + self.bias

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T."""
        if not (a.numel() and b.numel()):
            return torch.zeros((len(a), len(b)), dtype=self.compute, device=a.device)
        return product_in(self.compute, a.to(self.product_dtype), b.to(self.product_dtype))


class _ScoredChunk(NamedTuple):
    examples: slice
    x: Tensor  # [b, D]
    targets: _ScoredPairs
    target_z: Tensor  # [b, T], 0 where the target is not here
    negatives: _ScoredPairs | _NegativeColumns
    z: Tensor  # [b, n]
    counts: Tensor  # [b, n]: how often a column counts, 0 where it is masked


def _chunks(gathered: GatheredExamples, context: GatherContext) -> Iterator[_ScoredChunk]:
    """Examples of a few MiB of gathered rows, or of shared scores, at a time, with the scores of their columns here."""
    compute = compute_dtype(gathered.weight.dtype)
    batch, dim = gathered.hidden.shape
    shared = _NegativeColumns(gathered) if context.shared else None
    a_pair = 1 if shared else dim
    an_example = (gathered.ids.shape[-1] * a_pair + gathered.target.shape[1] * dim) * compute.itemsize
    size = max(1, CHUNK_BYTES[gathered.hidden.device.type] // an_example)
    largest = torch.finfo(compute).max  # a score that overflowed would turn 0 * softplus into NaN
    for begin in range(0, batch, size):
        examples = slice(begin, min(begin + size, batch))
        x, target = gathered.hidden[examples].to(compute), gathered.target[examples]
        shift = x.new_full((len(x), 1), context.offset)
        if gathered.log_z is not None:
            shift = shift + gathered.log_z[examples, None]

        targets = _ScoredPairs(gathered, target, x)
        target_z = targets.scores(x) - shift
        if gathered.target_log_q is not None and context.objective.correct_positive:
            target_z = target_z - gathered.target_log_q[examples]
        ids = gathered.ids if shared else gathered.ids[examples]
        negatives = shared or _ScoredPairs(gathered, ids, x)
        z = negatives.scores(x) - shift
        if gathered.log_q is not None:
            z = z - (gathered.log_q if shared else gathered.log_q[examples])

        live = gathered.positive[examples].any(1, keepdim=True) & (ids >= 0)
        for t in range(target.shape[1] if context.remove_hits else 0):
            live = live & (ids != target[:, t, None])
        count = live.to(compute)
        if gathered.multiplicity is not None:
            count = count * gathered.multiplicity
        yield _ScoredChunk(
            examples, x, targets, torch.where(target >= 0, target_z, 0).clamp(-largest, largest), negatives,
            torch.where(count > 0, z, 0).clamp(-largest, largest), count,
        )  # fmt: skip


def _reduce(gathered: GatheredExamples, context: GatherContext) -> tuple[Tensor, Tensor, Tensor]:
    """Over all processes: the scores of the targets [B, T], and of the negatives the maximum [B] and sums [B, .]."""
    batch, n_targets = gathered.target.shape
    objective, compute = context.objective, compute_dtype(gathered.weight.dtype)
    largest = torch.zeros(batch, dtype=compute, device=gathered.hidden.device)
    partial = largest.new_zeros((batch, n_targets + objective.n_sums))
    target_z, sums = partial[:, :n_targets], partial[:, n_targets:]
    for chunk in _chunks(gathered, context):
        target_z[chunk.examples] = chunk.target_z
        largest[chunk.examples], sums[chunk.examples] = objective.partial(chunk.z, chunk.counts)
    common = largest
    if objective.has_maximum:
        common = context.collectives.all_reduce(largest, "max")
        sums.copy_(objective.rebase(largest, sums, common))
    whole = context.collectives.all_reduce(partial)
    return whole[:, :n_targets], common, whole[:, n_targets:]


def _reduced_examples(
    gathered: GatheredExamples, context: GatherContext, target_z: Tensor, largest: Tensor, sums: Tensor
) -> ReducedExamples:
    n_positive = gathered.positive.sum(1, keepdim=True).clamp_min(1).to(sums.dtype)
    label = 1 / n_positive if context.uniform_labels else torch.ones_like(n_positive)
    return context.objective.reduced_examples(
        gathered.positive, torch.where(gathered.positive, label, 0), gathered.target_log_q,
        None if context.n_draws is None else n_positive[:, 0] + context.n_draws, target_z, largest, sums,
    )  # fmt: skip


class _GradientSums:
    """What the columns that are here add to the gradients, summed over chunks of examples."""

    def __init__(self, gathered: GatheredExamples, needs_hidden: bool, needs_rows: bool, *, shared: bool) -> None:
        self.gathered, self.shared, self.needs_hidden, self.needs_rows = gathered, shared, needs_hidden, needs_rows
        batch, dim = gathered.hidden.shape
        n_targets, n = gathered.target.shape[1], gathered.ids.shape[-1]
        compute = compute_dtype(gathered.weight.dtype)
        zeros = lambda *shape: torch.zeros(shape, dtype=compute, device=gathered.hidden.device)  # noqa: E731
        self.hidden = zeros(batch if needs_hidden else 0, dim)
        self.shift = zeros(batch)  # of what is added to all scores of an example
        self.pairs = zeros(batch if needs_rows else 0, n_targets if shared else n_targets + n)
        self.columns = zeros(n if shared and needs_rows else 0, dim)
        self.column_sums = zeros(len(self.columns))

    def add(self, chunk: _ScoredChunk, of_targets: Tensor, of_negatives: Tensor) -> None:
        """From the derivatives in the scores [b, T] and [b, n]."""
        examples, negatives = chunk.examples, chunk.negatives
        of_targets = torch.where(self.gathered.target[examples] >= 0, of_targets, 0)
        self.shift[examples] = of_targets.sum(1) + of_negatives.sum(1)
        if self.needs_hidden:
            self.hidden[examples] = chunk.targets.hidden_gradient(of_targets)
            if isinstance(negatives, _ScoredPairs):
                self.hidden[examples] += negatives.hidden_gradient(of_negatives)
            else:
                self.hidden[examples] += negatives.product(of_negatives, negatives.rows.T)
        if not self.needs_rows:
            return
        if isinstance(negatives, _ScoredPairs):
            self.pairs[examples] = torch.cat([of_targets, of_negatives], 1)
        else:
            self.pairs[examples] = of_targets
            self.columns += negatives.product(of_negatives.T, chunk.x.T)
            self.column_sums += of_negatives.sum(0)

    def of_rows(self, context: GatherContext, with_rows: bool, with_bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """weight's and bias's gradient, where they are wanted."""
        gathered, layout = self.gathered, context.gradient_layout
        weight, hidden, n_classes = gathered.weight, gathered.hidden, gathered.weight.shape[0]
        ids = gathered.target if self.shared else torch.cat([gathered.target, gathered.ids], 1)
        pairs = GradientPairs(ids, self.pairs, self.pairs.new_ones(len(ids)), hidden)
        if not (context.fused and n_classes and ids.numel()):
            columns = gathered.ids.long() if self.shared else gathered.ids.new_empty((0,), dtype=torch.int64)
            dense = layout == DENSE
            summed = _eager_row_grad(
                pairs, columns, self.columns, self.column_sums, n_classes, weight.dtype, dense=dense
            )  # fmt: skip
            layout = layout if dense else COALESCED
        elif self.shared:
            summed = RowGradient._make(
                merged_row_grad(
                    ids, self.pairs, self.pairs.new_ones(1), hidden, gathered.ids.long(), self.columns,
                    self.column_sums, self.pairs.new_empty((0, len(gathered.ids))), n_classes, weight.dtype, with_rows,
                    with_bias, layout,
                )
            )  # fmt: skip
        else:
            summed = row_grad_in(layout, pairs, n_classes, weight.dtype, with_rows=with_rows, with_bias=with_bias)
        table = Table(n_classes, weight.dtype, weight.device, layout)
        return gradients_of_table(summed, table, layout, needs_weight=with_rows, needs_bias=with_bias)


def _eager_row_grad(
    pairs: GradientPairs, classes: Tensor, rows: Tensor, elements: Tensor, n_classes: int, dtype: torch.dtype, *,
    dense: bool,
) -> RowGradient:  # fmt: skip
    """What row_grad does with ids [B, C] (-1: none), with the gradient of more ``classes`` added; ``rows`` [n, D]."""
    ids, derivative, _, hidden = pairs
    flat = ids.reshape(-1)
    at = (flat >= 0).nonzero()[:, 0]
    example, factors = at // max(ids.shape[1], 1), derivative.reshape(-1)[at]
    place = torch.cat([flat[at].long(), classes])
    found = place
    if not dense:
        found, place = torch.unique(place, return_inverse=True)
    sums = derivative.new_zeros((n_classes if dense else len(found), hidden.shape[1]))
    totals = sums.new_zeros(len(sums)).index_add_(0, place, torch.cat([factors, elements]))
    size = max(1, CHUNK_BYTES[hidden.device.type] // (hidden.shape[1] * sums.element_size()))
    for part, where, factor in zip(example.split(size), place[: len(at)].split(size), factors.split(size), strict=True):
        sums.index_add_(0, where, hidden.index_select(0, part).to(sums.dtype) * factor[:, None])
    sums.index_add_(0, place[len(at) :], rows)
    return RowGradient(found, sums.to(dtype), totals.to(dtype))


def _own_examples(values: Tensor, context: GatherContext) -> Tensor:
    """This process's examples of those of all."""
    before = sum(context.sizes[: context.collectives.rank])
    return values[before : before + context.sizes[context.collectives.rank]]


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
