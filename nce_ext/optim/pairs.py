"""Pairs of a fused step: those of several calls of a loss joined, those of several processes gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nce_ext import _checks
from nce_ext._ops.row_grad import GradientPairs
from nce_ext.reference.dtypes import compute_dtype

_DIFFERENT = -1  # what a rank reports as its number of columns if its calls have several, and cannot be merged


def gather_pairs(pairs: list[GradientPairs], weight: Tensor, process_group: Any, *, tied: bool) -> list[GradientPairs]:
    """Gather the pairs of all ranks, in the order of ranks: all then take the same step, bit for bit.

    ``tied`` says that this rank has other gradients of the weights, which all ranks then refuse.
    """
    size = dist.get_world_size(process_group)
    dtype = _checks.FLOATS.index(pairs[0].hidden.dtype) if pairs else -1
    n_rows, (width, *more) = sum(len(each.ids) for each in pairs), {each.ids.shape[1] for each in pairs} or {0}
    own = torch.tensor([n_rows, _DIFFERENT if more else width, dtype, tied], device=weight.device)
    counts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(counts, own, group=process_group)
    rows, columns, dtypes, has_gradients = zip(*(count.tolist() for count in counts), strict=True)
    if any(has_gradients):  # known to all, so that no rank is left waiting
        raise RuntimeError(
            "process_group must be None in fuse_optimizer with tied weights: other gradients are not exchanged"
        )
    if len({c for c in columns if c}) > 1 or _DIFFERENT in columns:
        raise RuntimeError(
            f"target must have as many positives, and k must be the same, on all ranks, got T + k = {columns}"
        )
    if not any(columns):
        return []
    empty = _empty(max(columns), weight, _checks.FLOATS[max(dtypes)])
    if not any(rows):
        return [empty]
    parts = []
    for t in merge_pairs(pairs) if pairs else empty:
        padded = t.new_zeros((max(rows), *t.shape[1:]))
        padded[: len(t)] = t
        everyone = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(everyone, padded, group=process_group)
        parts.append([each[:count] for each, count in zip(everyone, rows, strict=True)])
    return [GradientPairs(*each) for each in zip(*parts, strict=True)]


def merge_pairs(pairs: list[GradientPairs]) -> GradientPairs:
    """Join the pairs of several calls of the loss into those of one."""
    if len(pairs) == 1:
        return pairs[0]
    columns = sorted({each.ids.shape[1] for each in pairs})
    if len(columns) > 1:
        raise RuntimeError(
            f"target must have as many positives, and k must be the same, in one step, got T + k = {columns}"
        )
    return GradientPairs(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))


def _empty(columns: int, weight: Tensor, hidden_dtype: torch.dtype) -> GradientPairs:
    """Pairs of no example, which a rank sends that has none."""
    compute = compute_dtype(weight.dtype)
    return GradientPairs(
        torch.empty((0, columns), dtype=torch.int32, device=weight.device),
        torch.empty((0, columns), dtype=compute, device=weight.device),
        torch.empty(0, dtype=compute, device=weight.device),
        torch.empty((0, weight.shape[1]), dtype=hidden_dtype, device=weight.device),
    )
