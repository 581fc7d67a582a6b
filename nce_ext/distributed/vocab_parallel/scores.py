"""Compute losses and gradients of examples whose columns are spread over ranks.

Every rank has all examples and owns the rows of some classes. It scores the targets and negatives among these classes,
chunk by chunk, and adds the scores up to a few numbers an example, which are all that the ranks reduce. Backward scores
once more, since it must read the rows again for hidden's gradient: of an example's columns only their ids are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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
    """Losses [B_r] of this rank's examples.

    Differentiable in their ``hidden`` [B_r, D], in ``log_z`` (None, [B_r], or a scalar), and in ``weight`` and
    ``bias``, the rows that this rank owns. The gradient of those is complete: examples of all ranks contribute to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_z: Tensor | None,
        gathered: GatheredExamples,
        context: GatherContext,
    ) -> Tensor:
        ctx.hidden_dtype, ctx.context = hidden.dtype, context
        ctx.log_z_like = None if log_z is None else (log_z.dim(), log_z.dtype)
        with _without_autocast(hidden):
            totals = _reduce(gathered, context)
            losses = _reduced_examples(gathered, context, *totals).losses()
        ctx.save_for_backward(*gathered, *totals)
        return _own_examples(torch.where(gathered.bad, torch.nan, losses), context).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved, context = ctx.saved_tensors, ctx.context
        n_fields = len(GatheredExamples._fields)
        gathered, totals = GatheredExamples(*saved[:n_fields]), saved[n_fields:]
        needs_hidden, needs_weight, needs_bias, needs_log_z = ctx.needs_input_grad[:4]
        of_hidden = of_weight = of_bias = of_log_z = None
        with context.collectives.step(agreed=True), _without_autocast(grad_losses):
            upstream = context.collectives.all_gather(grad_losses, context.sizes)
            gradient = _GradientSums(gathered, needs_hidden, needs_weight or needs_bias, shared=context.shared)
            reduced = _reduced_examples(gathered, context, *totals)
            of_targets = reduced.of_targets() * upstream[:, None]
            for chunk in _chunks(gathered, context):
                of_negatives = reduced.of_negatives(chunk.z, chunk.counts, chunk.examples)
                gradient.add(chunk, of_targets[chunk.examples], of_negatives * upstream[chunk.examples, None])
            if needs_hidden:
                of_hidden = context.collectives.reduce_scatter(gradient.hidden, context.sizes).to(ctx.hidden_dtype)
            if needs_weight or needs_bias:
                of_weight, of_bias = gradient.of_rows(context, needs_weight, needs_bias)
            if needs_log_z:
                per_example, dtype = ctx.log_z_like
                if per_example:
                    of_log_z = -context.collectives.reduce_scatter(gradient.shift, context.sizes).to(dtype)
                else:
                    of_log_z = -context.collectives.all_reduce(gradient.shift.sum()).to(dtype)
        return of_hidden, of_weight, of_bias, of_log_z, None, None


class _ScoredPairs:
    """Pairs of an example and a class that it has for itself: b examples with n ids each, whose rows are gathered.

    An id of -1 stands for no pair; only the others cost anything.
    """

    def __init__(self, gathered: GatheredExamples, ids: Tensor, x: Tensor) -> None:
        self.shape = ids.shape
        flat = ids.reshape(-1)
        self.at = (flat >= 0).nonzero()[:, 0]  # places of the pairs in [b n]
        self.example = self.at // max(ids.shape[1], 1)
        self.classes = flat[self.at]
        self.rows = gathered.weight.index_select(0, self.classes).to(x.dtype)
        self.bias = gathered.bias

    def scores(self, x: Tensor) -> Tensor:
        """Compute <x, row> + bias, [b, n], with 0 for no pair; ``x`` [b, D] are the hidden vectors."""
        scores = x.index_select(0, self.example).mul_(self.rows).sum(1)
        if self.bias is not None:
            scores += self.bias.index_select(0, self.classes)
        return x.new_zeros(self.shape.numel()).index_put_((self.at,), scores).view(self.shape)

    def hidden_gradient(self, derivative: Tensor) -> Tensor:
        """Sum derivative * row over each example's pairs, [b, D]. Overwrites the rows, to save their copy."""
        self.rows.mul_(derivative.reshape(-1)[self.at, None])
        gradient = self.rows.new_zeros((self.shape[0], self.rows.shape[1]))
        return gradient.index_add_(0, self.example, self.rows)


class _NegativeColumns:
    """Negatives that all examples share, whose scores are a product of matrices."""

    def __init__(self, gathered: GatheredExamples) -> None:
        compute = compute_dtype(gathered.weight.dtype)
        # float32 products of 16-bit operands need a GPU; elsewhere the operands are widened.
        self.product_dtype = gathered.weight.dtype if gathered.weight.device.type == "cuda" else compute
        self.rows = gathered.weight.index_select(0, gathered.ids).to(self.product_dtype)
        self.bias = None if gathered.bias is None else gathered.bias.index_select(0, gathered.ids).to(compute)
        self.compute = compute

    def scores(self, x: Tensor) -> Tensor:
        """Compute x rows^T + bias, [b, n]."""
        scores = self.product(x, self.rows)
        return scores if self.bias is None else scores + self.bias

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply a b^T."""
        if not (a.numel() and b.numel()):
            return torch.zeros((len(a), len(b)), dtype=self.compute, device=a.device)
        return product_in(self.compute, a.to(self.product_dtype), b.to(self.product_dtype))


class _ScoredChunk(NamedTuple):
    """Some examples, b of the B, with the scores of their owned columns."""

    examples: slice
    x: Tensor  # hidden vectors, [b, D]
    targets: _ScoredPairs
    target_z: Tensor  # [b, T], 0 where the target is not owned
    negatives: _ScoredPairs | _NegativeColumns
    z: Tensor  # [b, n]
    counts: Tensor  # [b, n]: how often a column counts, 0 where it is masked


def _chunks(gathered: GatheredExamples, context: GatherContext) -> Iterator[_ScoredChunk]:
    """Score the examples, as many at a time as have a few MiB of gathered rows, or of scores of shared negatives."""
    compute = compute_dtype(gathered.weight.dtype)
    batch, dim = gathered.hidden.shape
    shared = _NegativeColumns(gathered) if context.shared else None
    numbers_a_column = 1 if shared else dim
    bytes_an_example = (gathered.ids.shape[-1] * numbers_a_column + gathered.target.shape[1] * dim) * compute.itemsize
    size = max(1, CHUNK_BYTES[gathered.hidden.device.type] // bytes_an_example)
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
    """Score the owned columns and reduce over the ranks.

    Returns:
        Scores of the targets [B, T]; maximum [B] and sums [B, n_sums] of the negatives.
    """
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
    """Construct the examples from what :func:`_reduce` returned, for their losses and derivatives."""
    n_positive = gathered.positive.sum(1, keepdim=True).clamp_min(1).to(sums.dtype)
    label = 1 / n_positive if context.uniform_labels else torch.ones_like(n_positive)
    return context.objective.reduced_examples(
        gathered.positive, torch.where(gathered.positive, label, 0), gathered.target_log_q,
        None if context.n_draws is None else n_positive[:, 0] + context.n_draws, target_z, largest, sums,
    )  # fmt: skip


class _GradientSums:
    """Sums, over chunks of examples, of what the owned columns contribute to the gradients."""

    def __init__(self, gathered: GatheredExamples, needs_hidden: bool, needs_rows: bool, *, shared: bool) -> None:
        self.gathered, self.shared, self.needs_hidden, self.needs_rows = gathered, shared, needs_hidden, needs_rows
        batch, dim = gathered.hidden.shape
        n_targets, n = gathered.target.shape[1], gathered.ids.shape[-1]
        compute = compute_dtype(gathered.weight.dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=compute, device=gathered.hidden.device)

        self.hidden = zeros(batch if needs_hidden else 0, dim)
        self.shift = zeros(batch)  # derivative by what is added to all scores of an example
        # Derivative by the score of each pair of an example and a class of its own.
        self.pairs = zeros(batch if needs_rows else 0, n_targets if shared else n_targets + n)
        self.columns = zeros(n if shared and needs_rows else 0, dim)  # gradient of the shared negatives' rows
        self.column_sums = zeros(len(self.columns))  # and of their biases

    def add(self, chunk: _ScoredChunk, of_targets: Tensor, of_negatives: Tensor) -> None:
        """Add a chunk, from the derivatives by the scores of its targets [b, T] and negatives [b, n]."""
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
        """Form the gradients of weight and bias, in the layout that the loss asks for; None where not wanted."""
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
    """Form the gradient of the rows in plain PyTorch, as the operators row_grad and row_grad_dense do.

    Args:
        ids: of pairs, [B, C]; -1 for no pair.
        derivative: by their scores, [B, C].
        classes: of more rows that have a gradient, [n].
        rows, elements: the gradients of these, [n, D], and of their biases, [n].
        hidden: [B, D].

    Returns:
        Classes, each once and ascending, with the gradients of their rows and biases. If ``dense``, gradients of all
        classes; the first of the three then means nothing.
    """
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
    parts = (torch.split(whole, size) for whole in (example, place[: len(at)], factors))
    for part, where, factor in zip(*parts, strict=True):
        sums.index_add_(0, where, hidden.index_select(0, part).to(sums.dtype) * factor[:, None])
    sums.index_add_(0, place[len(at) :], rows)
    return RowGradient(found, sums.to(dtype), totals.to(dtype))


def _own_examples(values: Tensor, context: GatherContext) -> Tensor:
    """Select this rank's examples from those of all ranks."""
    before = sum(context.sizes[: context.collectives.rank])
    return values[before : before + context.sizes[context.collectives.rank]]


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Keep products in the precision that the loss has chosen, whatever autocast surrounds it."""
    return torch.autocast(tensor.device.type, enabled=False)
