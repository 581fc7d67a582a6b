"""Gather the input of a sharded step: the examples of all ranks, and those of their columns whose rows are owned here.

A column is a candidate of an example: a target or a negative. The rank that owns the row of its class scores it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nce_ext._sampled.call import Call, known_ids
from nce_ext._sampled.shared import SharedColumns
from nce_ext.distributed.collectives import Collectives
from nce_ext.reference import Objective
from nce_ext.reference.dtypes import compute_dtype

# What ranks send in the place of a target. Classes are 0 .. n_classes - 1.
_NO_TARGET, _BAD_EXAMPLE = -1, -2


class OwnedRows(NamedTuple):
    """Rows of the classes first .. last - 1, which this rank owns."""

    weight: Tensor  # [last - first, D]
    bias: Tensor | None  # [last - first]
    first: int
    last: int


class GatheredExamples(NamedTuple):
    """Examples of all ranks in the order of ranks, B of them, with those of their columns that this rank owns.

    Classes are numbered from the first one that it owns; -1 stands for none. All fields are tensors or None, so that
    autograd saves them.
    """

    hidden: Tensor  # [B, D]
    weight: Tensor  # the owned rows
    bias: Tensor | None
    log_z: Tensor | None  # [B]; a number has become part of the offset
    bad: Tensor  # [B]: whether the loss is NaN; such an example has no columns
    positive: Tensor  # [B, T]: whether there is a target, whoever owns its row
    target: Tensor  # int32 [B, T]: owned targets
    target_log_q: Tensor | None  # [B, T]
    ids: Tensor  # owned negatives: int32 [B, n], or [n] if all examples share them
    log_q: Tensor | None  # like ids
    multiplicity: Tensor | None  # [n]: how often a shared negative counts; None: once


class GatherContext(NamedTuple):
    """Ranks and options of a step: all that it needs beside tensors."""

    collectives: Collectives
    sizes: list[int]  # number of examples of each rank
    objective: Objective
    shared: bool  # whether all examples have the same negatives, with the same log q
    offset: float  # subtracted from every score
    remove_hits: bool
    uniform_labels: bool
    n_draws: int | None  # if given, an example's loss is divided by this plus the number of its targets
    fused: bool  # whether compiled operators form the gradient of the rows
    gradient_layout: int


@torch.no_grad()
def gather_examples(
    call: Call,
    rows: OwnedRows,
    collectives: Collectives,
    sizes: list[int],
    log_z: Tensor | None,
    *,
    one_log_q: bool,
) -> tuple[GatheredExamples, GatherContext]:
    """Gather the examples of all ranks, and find the columns whose rows this rank owns.

    Args:
        call: the loss's checked arguments, with this rank's examples.
        sizes: number of examples of each rank.
        log_z: a scalar that takes the place of the call's.
        one_log_q: whether the negatives' log q, if given, is the same for all examples.
    """

    def of_all_ranks(values: Tensor) -> Tensor:
        return collectives.all_gather(values.detach().contiguous(), sizes)

    operands, candidates, correction = call.operands, call.candidates, call.correction
    noise, k, batch = candidates.noise, candidates.k, sum(sizes)
    target_log_q, negative_log_q = correction.target_log_q, correction.negative_log_q
    if correction.subtract_log_q and target_log_q is None:
        target_log_q = noise.log_prob(known_ids(noise, operands.target))
    target = of_all_ranks(_mark_targets(call, target_log_q).int())
    bad = (target == _BAD_EXAMPLE).any(1)

    ids = candidates.ids
    if ids is None:
        assert candidates.seed is not None
        ids = noise.draw(candidates.seed, batch, k)
    elif not candidates.negatives_shared:
        ids = of_all_ranks(ids.clamp(-1, noise.n_classes).int())
    if negative_log_q is not None and not one_log_q:
        negative_log_q = of_all_ranks(negative_log_q)

    shared, multiplicity = candidates.negatives_shared and one_log_q, None
    if shared:
        if correction.subtract_log_q and negative_log_q is None:
            negative_log_q = noise.log_prob(known_ids(noise, ids))
        columns = SharedColumns(
            ids[0], None if negative_log_q is None else negative_log_q[0], noise.n_classes, distinct=candidates.distinct
        )
        begin, end = torch.searchsorted(columns.ids, columns.ids.new_tensor([rows.first, rows.last])).tolist()
        owned = (columns.ids[begin:end] - rows.first).int()
        owned_log_q = None if columns.log_q is None else columns.log_q[begin:end]
        multiplicity = None if columns.multiplicity is None else columns.multiplicity[begin:end]
        bad = bad | columns.bad
    else:
        log_q_of_all = None if negative_log_q is None else negative_log_q.expand(batch, k)
        owned, owned_log_q = _owned_columns(ids.expand(batch, k), log_q_of_all, rows.first, rows.last)
        if correction.subtract_log_q and owned_log_q is None:
            owned_log_q = noise.log_prob(torch.where(owned >= 0, owned.long() + rows.first, 0))

    log_z_of_examples = None if operands.log_z is None else of_all_ranks(operands.log_z)
    if log_z is not None:
        log_z_of_examples = log_z.to(compute_dtype(rows.weight.dtype)).expand(batch)
    positive = (target >= 0) & ~bad[:, None]
    here = positive & (target >= rows.first) & (target < rows.last)
    gathered = GatheredExamples(
        hidden=of_all_ranks(operands.hidden),
        weight=rows.weight,
        bias=rows.bias,
        log_z=log_z_of_examples,
        bad=bad & (target != _NO_TARGET).any(1),
        positive=positive,
        target=torch.where(here, target - rows.first, -1),
        target_log_q=None if target_log_q is None else of_all_ranks(target_log_q),
        ids=owned,
        log_q=owned_log_q,
        multiplicity=multiplicity,
    )
    context = GatherContext(
        collectives=collectives,
        sizes=sizes,
        objective=call.objective,
        shared=shared,
        offset=correction.offset,
        remove_hits=candidates.remove_hits,
        uniform_labels=call.labels.uniform_labels,
        n_draws=k if call.labels.mean_candidates else None,
        fused=call.layout.fused,
        gradient_layout=call.layout.gradient_layout,
    )
    return gathered, context


def _mark_targets(call: Call, target_log_q: Tensor | None) -> Tensor:
    """Replace targets: by _NO_TARGET where there is none, by _BAD_EXAMPLE in an example with an invalid id or log q.

    On the CPU such an example has been refused before. On CUDA, where looking for one would wait for the device, its
    loss becomes NaN.
    """
    target, ids, n_classes = call.operands.target, call.candidates.ids, call.candidates.noise.n_classes
    negative_log_q = call.correction.negative_log_q
    positive = target != call.labels.ignore_index
    bad = positive & ((target < 0) | (target >= n_classes))
    if target_log_q is not None:
        bad = bad | (positive & ~torch.isfinite(target_log_q))
    bad = bad.any(1)
    if ids is not None and not call.candidates.negatives_shared:
        bad = bad | ((ids < 0) | (ids >= n_classes)).any(1)
    if negative_log_q is not None:
        bad = bad | ~torch.isfinite(negative_log_q).all(1)
    bad = bad & positive.any(1)
    return torch.where(bad[:, None], _BAD_EXAMPLE, torch.where(positive, target, _NO_TARGET))


def _owned_columns(ids: Tensor, log_q: Tensor | None, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    """Select of ids [B, k] those in first .. last - 1, and their log q.

    Returns:
        The selected ids, counted from first and moved to the left: int32 [B, n], filled with -1. n is the largest
        number that an example has; on CUDA this waits for n. Their log q, [B, n], filled with 0.
    """
    here = (ids >= first) & (ids < last)
    per_example = here.sum(1)
    width = int(per_example.max()) if len(ids) else 0
    example, column = here.nonzero(as_tuple=True)
    place = torch.arange(len(example), device=ids.device) - (per_example.cumsum(0) - per_example)[example]
    owned = torch.full((len(ids), width), -1, dtype=torch.int32, device=ids.device)
    owned[example, place] = (ids[example, column] - first).int()
    if log_q is None:
        return owned, None
    owned_log_q = log_q.new_zeros(owned.shape)
    owned_log_q[example, place] = log_q[example, column]
    return owned, owned_log_q
