"""Contrastive losses and their gradients in numpy float64, one row at a time, from the formulas and nothing else."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    """Losses [B] and the gradients of their weighted sum; each with the size of what was added up to make it."""

    loss: np.ndarray
    loss_scale: np.ndarray
    gradients: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


def logsumexp(z: np.ndarray) -> float:
    largest = z.max()
    return float(largest + np.log(np.exp(z - largest).sum()))


def info_nce_row(z, hit, own, labels, scale, debias):
    """Loss of one row of logits z, d loss / d z, and what the scale gets beside that; own is the positive's column."""
    kept = ~hit
    slope = np.zeros_like(z)
    if debias:
        pos = np.exp(z[own])
        others = kept.copy()
        others[own] = False
        n = others.sum()
        estimate = (np.exp(z[others]).sum() - n * debias * pos) / (1 - debias)
        floor = n * np.exp(-scale)
        mass = max(estimate, floor)
        loss = -np.log(pos / (pos + mass))
        if estimate > floor:
            slope[others] = np.exp(z[others]) / (1 - debias) / (pos + mass)
            slope[own] = 1 / (pos + mass) * (pos - n * debias * pos / (1 - debias)) - 1
            return loss, slope, 0.0
        slope[own] = pos / (pos + mass) - 1
        return loss, slope, -floor / (pos + mass)
    log_total = logsumexp(z[kept])
    t = labels if labels is not None else (np.arange(len(z)) == own).astype(float)
    loss = (t[kept] * (log_total - z[kept])).sum()
    slope[kept] = t.sum() * np.exp(z[kept] - log_total) - t[kept]
    if labels is None:  # the slopes of a softmax add up to 0; p - 1 would lose all digits of a small one
        slope[own] = 0.0
        slope[own] = -slope.sum()
    return loss, slope, 0.0


def sigmoid_row(z, hit, own):
    """softplus of -z for the positive and of z for the rest, and d loss / d z."""
    sign = np.where(np.arange(len(z)) == own, 1.0, -1.0)
    loss = np.logaddexp(0, -sign * z)[~hit].sum()
    return loss, np.where(hit, 0.0, -sign * np.exp(-np.logaddexp(0, sign * z)))


def pairwise(
    query, key, negatives=None, *, scale=1.0, bias=None, in_batch=True, ids=None, negative_ids=None, negative_mask=None,
    log_q=None, negative_log_q=None, target=None, debias=0.0, upstream=None,
) -> Truth:  # fmt: skip
    """InfoNCE, or with a bias SigLIP's loss, whose gradient "bias" is then there too."""
    batch, dim = query.shape
    negatives = np.zeros((0, dim)) if negatives is None else negatives
    upstream = np.ones(batch) if upstream is None else upstream
    losses, loss_scale = np.zeros(batch), np.zeros(batch)
    names = ("query", "key", "negatives", "scale", "bias")
    shapes = (query.shape, key.shape, negatives.shape, (), ())
    gradients = {name: np.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    scales = {name: np.zeros(shape) for name, shape in zip(names, shapes, strict=True)}

    for i in range(batch):
        # (which array, its row) for every column of this row of logits.
        columns = [("key", j) for j in range(batch)] if in_batch else [("key", i)]
        own = i if in_batch else 0
        columns += [("negatives", j) for j in range(len(negatives))]
        vectors = {"key": key, "negatives": negatives}
        z, hit, size = np.zeros(len(columns)), np.zeros(len(columns), bool), np.zeros(len(columns))
        for c, (kind, j) in enumerate(columns):
            vector = vectors[kind][j]
            z[c] = scale * query[i] @ vector + (0.0 if bias is None else bias)
            size[c] = abs(scale) * np.abs(query[i]) @ np.abs(vector) + abs(bias or 0.0)
            q = log_q if kind == "key" else negative_log_q
            if q is not None:
                z[c] -= q[j]
                size[c] += abs(q[j])
            if c == own:
                continue
            column_ids = ids if kind == "key" else negative_ids
            hit[c] = column_ids is not None and column_ids[j] == ids[i]
            if kind == "negatives" and negative_mask is not None:
                hit[c] |= not negative_mask[j]
        if bias is None:
            labels = None if target is None else target[i]
            losses[i], slope, extra = info_nce_row(z, hit, own, labels, scale, debias)
        else:
            losses[i], slope = sigmoid_row(z, hit, own)
            extra = 0.0
        # An error of a logit is one of an exponent: relative to what is exponentiated.
        largest = size.max() + abs(scale if debias else 0.0)
        weights = 1.0 if target is None else np.abs(target[i]).sum()
        cancels = weights if target is not None or debias else 0.0  # a slope that is a difference
        loss_scale[i] = (1 + largest) * weights if bias is None else (1 + size[~hit]).sum()
        for c, (kind, j) in enumerate(columns):
            for name, row, factor in (("query", i, vectors[kind][j]), (kind, j, query[i])):
                gradients[name][row] += upstream[i] * slope[c] * scale * factor
                scales[name][row] += np.abs(upstream[i] * scale * factor) * (1 + largest) * (np.abs(slope[c]) + cancels)
            gradients["scale"] += upstream[i] * slope[c] * (query[i] @ vectors[kind][j])
            gradients["bias"] += upstream[i] * slope[c]
            scales["scale"] += abs(upstream[i]) * (1 + largest) ** 2 * max(1, 1 / abs(scale)) * weights
            scales["bias"] += abs(upstream[i]) * (1 + largest)
        gradients["scale"] += upstream[i] * extra
    return Truth(losses, loss_scale, gradients, scales)
