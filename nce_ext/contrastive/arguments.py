"""Checks of what the contrastive losses are called with: the vectors, and the data that belong to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nce_ext import _checks
from nce_ext.contrastive.pairwise import Data, chunks, leave_out_


def check(query: object, key: object, negatives: object, data: Data, in_batch: bool) -> None:
    """Raise unless vectors and data fit each other in device, dtype, layout, rank and size; values are not checked."""
    query = _checks.tensor("query", query, _checks.FLOATS)
    for name, vectors in (("key", key), ("negatives", negatives)):
        if vectors is None and name == "negatives":
            continue
        vectors = _checks.tensor(name, vectors, _checks.FLOATS, query.device, "query")
        if (query.dtype == torch.float64) != (vectors.dtype == torch.float64):
            raise TypeError(f"query and {name} must both be float64 or neither, got {query.dtype} and {vectors.dtype}")
    if query.dim() != 2 or query.shape[1] < 1:
        raise ValueError(f"query must be [B, D] with D >= 1, got shape {list(query.shape)}")
    assert isinstance(key, Tensor)
    batch, dim = query.shape
    if key.shape != query.shape:
        raise ValueError(f"key must have query's shape {[batch, dim]}, got {list(key.shape)}")
    extra = None
    if isinstance(negatives, Tensor):
        if negatives.dim() != 2 or negatives.shape[1] != dim:
            raise ValueError(f"negatives must be [K, {dim}] for query's D = {dim}, got shape {list(negatives.shape)}")
        extra = negatives.shape[0]

    columns = (batch if in_batch else 1) + (extra or 0)
    for name, value, dtypes, shape in (
        ("ids", data.ids, _checks.INTEGERS, (batch,)),
        ("negative_ids", data.negative_ids, _checks.INTEGERS, (extra,)),
        ("negative_mask", data.negative_mask, (torch.bool,), (extra,)),
        ("log_q", data.log_q, _checks.FLOATS, (batch,)),
        ("negative_log_q", data.negative_log_q, _checks.FLOATS, (extra,)),
        ("target", data.target, _checks.FLOATS, (batch, columns)),
    ):
        if value is not None:
            if extra is None and name.startswith("negative"):
                raise ValueError(f"{name} must be None without negatives, got a tensor")
            check_data(name, value, query, dtypes, shape)
    if data.negative_ids is not None and data.ids is None:
        raise ValueError("ids must be given with negative_ids, to which they are compared, got None")
    if extra is not None and (data.log_q is None) != (data.negative_log_q is None):
        missing, given = ("log_q", "negative_log_q")[:: 1 if data.log_q is None else -1]
        raise ValueError(f"{missing} must be given with {given}, as all columns are compared, got None")


def check_data(
    name: str, value: Tensor, query: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> None:
    """Raise unless a tensor of data has this dtype and shape, is on query's device and requires no gradient."""
    _checks.tensor(name, value, dtypes, query.device, "query")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} for query {list(query.shape)}, got {list(value.shape)}")
    if torch.is_grad_enabled():
        _checks.without_gradient(name, value, "none is taken of it", f"use {name}.detach()")


def check_values(data: Data, query: Tensor, in_batch: bool, max_logits: int, log_q: str = "log_q") -> None:
    """Raise if a log q is not finite or a label has no meaning; ``log_q`` is what the caller's argument is called.

    Where :func:`nce_ext._checks.values_are_checked` is False nothing is checked, and the losses become NaN.
    """
    if not _checks.values_are_checked(query.device):
        return
    for name, value in ((log_q, data.log_q), ("negative_log_q", data.negative_log_q)):
        if value is not None:
            _checks.finite(name, value)
    if data.target is not None:
        bad = _bad_label(data.target, data, in_batch, max_logits)
        if bad is not None:
            raise ValueError(f"target must be {bad[0]} at index {bad[1]}")


def _bad_label(target: Tensor, data: Data, in_batch: bool, max_logits: int) -> tuple[str, list[int]] | None:
    """Find the first label without meaning: what it must be and is, in words, and its index [query, column]."""
    own = 0 if in_batch else 1
    for start, stop in chunks(target.shape[0], target.shape[1], max_logits):
        labels = target[start:stop]
        bad = ~((labels >= 0) & (labels < math.inf))
        wanted = "finite and >= 0"
        if not bad.any():
            z = labels.new_zeros((stop - start, target.shape[1] - own))
            leave_out_(z, start, data, in_batch)
            if in_batch:
                z.diagonal(start).zero_()
            bad = torch.cat([labels[:, :own] != labels[:, :own], (z != 0) & (labels[:, own:] != 0)], 1)
            wanted = "0 where ids or negative_mask leave a column out"
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            return f"{wanted}, got {labels[row, column].item():g}", [start + row, column]
    return None
