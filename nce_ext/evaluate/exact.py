"""The exact softmax over all classes, evaluated in chunks so that the [N, V] logits are never held at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nce_ext import _checks
from nce_ext.reference.dtypes import compute_dtype

__all__ = ["OutputLayer", "nll", "perplexity", "topk"]


class OutputLayer(Protocol):
    """Output layer of a model: ``NCELoss``, ``nn.Linear``, or anything else with a weight and a bias."""

    @property
    def weight(self) -> Tensor:
        """Rows of all classes, [V, D]."""

    @property
    def bias(self) -> Tensor | None:
        """An element a class, [V], or None."""


@torch.no_grad()
def nll(
    layer: OutputLayer,
    hidden: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    max_logits: int = 2**24,
) -> Tensor:
    """Compute the exact negative log-likelihood of the full softmax, in nats.

    Equivalent to ``F.cross_entropy(F.linear(hidden, layer.weight, layer.bias).float(), target,
    reduction=reduction, ignore_index=ignore_index)``, with at most ``max_logits`` logits in memory.

    Args:
        layer: has ``weight`` [V, D] and ``bias`` [V] or None.
        hidden: [..., D].
        target: class ids, int64, [...].
        reduction: "mean" over the targets that are not ignored, "sum", or "none" ([...], 0 where ignored).
        ignore_index: target value to leave out.
        max_logits: size of a chunk, in logits.

    Returns:
        float32 (float64 for float64 weights); the mean of no targets is NaN, as in ``F.cross_entropy``.

    Raises:
        TypeError: a target that is not int64.
        ValueError: shapes that do not fit, another reduction, a target out of range.
    """
    _checks.reduction(reduction)
    ignore_index, max_logits = _checks.plain(ignore_index), _checks.plain(max_logits)
    weight, bias = _tables(layer)
    _check_hidden(weight, hidden)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target must have shape {list(hidden.shape[:-1])}, got {list(target.shape)}")
    flat_target = target.reshape(-1)
    valid = flat_target != ignore_index
    if ((flat_target < 0) | (flat_target >= weight.shape[0]))[valid].any():
        raise ValueError(f"target must be in 0 .. {weight.shape[0] - 1} or ignore_index = {ignore_index}")
    losses = torch.cat(
        [
            _nll_chunk(weight, bias, vectors, targets, ignore_index)
            for vectors, targets in zip(
                *(_split(t, weight.shape[0], max_logits) for t in (hidden.reshape(-1, hidden.shape[-1]), flat_target)),
                strict=True,
            )
        ]
    )
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum()


def _nll_chunk(weight: Tensor, bias: Tensor | None, hidden: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Compute the losses [n] of hidden [n, D], by PyTorch's own chunked operator where it takes these dtypes."""
    compute = compute_dtype(weight.dtype)
    if compute == weight.dtype == hidden.dtype and hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction="none", ignore_index=ignore_index
        )
    logits = F.linear(hidden.to(weight.dtype), weight, bias).to(compute)
    return F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)


def perplexity(
    layer: OutputLayer, hidden: Tensor, target: Tensor, *, ignore_index: int = -100, max_logits: int = 2**24
) -> Tensor:
    """Compute the perplexity of the full softmax: exp of the mean that :func:`nll` returns for the same arguments."""
    return nll(layer, hidden, target, ignore_index=ignore_index, max_logits=max_logits).exp()


@torch.no_grad()
def topk(layer: OutputLayer, hidden: Tensor, k: int, *, max_logits: int = 2**24) -> tuple[Tensor, Tensor]:
    """Find the k best classes of each example, best first.

    Equivalent to ``F.linear(hidden, layer.weight, layer.bias).topk(k)``, with at most ``max_logits`` logits in memory.

    Args:
        layer: has ``weight`` [V, D] and ``bias`` [V] or None.
        hidden: [..., D].
        k: 1 .. V.
        max_logits: size of a chunk, in logits.

    Returns:
        (logits, ids), each [..., k].

    Raises:
        ValueError: shapes that do not fit, k out of range.
    """
    k, max_logits = _checks.plain(k), _checks.plain(max_logits)
    weight, bias = _tables(layer)
    _check_hidden(weight, hidden)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be in 1 .. {weight.shape[0]}, got {k}")
    best = [
        F.linear(vectors.to(weight.dtype), weight, bias).topk(k)
        for vectors in _split(hidden.reshape(-1, hidden.shape[-1]), weight.shape[0], max_logits)
    ]
    shape = (*hidden.shape[:-1], k)
    return torch.cat([values for values, _ in best]).reshape(shape), torch.cat([ids for _, ids in best]).reshape(shape)


def _tables(layer: OutputLayer) -> tuple[Tensor, Tensor | None]:
    """Return the layer's weight and bias, and refuse a shard, which holds only some of its classes."""
    n_rows = layer.weight.shape[0]
    n_classes = getattr(layer, "n_classes", n_rows)
    if n_rows < n_classes and hasattr(layer, "device_mesh"):
        raise ValueError(
            f"layer must hold all of its {n_classes} classes, got {n_rows}: of a sharded loss take log_prob"
        )
    if n_rows != n_classes:
        raise ValueError(
            f"layer must have n_classes = {n_classes} rows in its weight, got {n_rows}; a loss's resize_classes "
            "changes both"
        )
    return layer.weight, layer.bias


def _check_hidden(weight: Tensor, hidden: Tensor) -> None:
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be [..., {weight.shape[1]}], got shape {list(hidden.shape)}")


def _split(examples: Tensor, n_classes: int, max_logits: int) -> tuple[Tensor, ...]:
    """Split examples into chunks of at most max_logits logits, or of one example; no examples are one empty chunk."""
    return torch.split(examples, max(1, max_logits // n_classes)) if len(examples) else (examples,)
