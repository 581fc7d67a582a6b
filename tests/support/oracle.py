"""The loss and its gradients from the formula alone, in float64, one example and one column at a time.

For an example with hidden vector x, targets y_1 .. y_T and negatives n_1 .. n_k::

    z_c  = <x, w_c> + b_c - log_z - [log k] - [log q_c]
    loss = sum_c  label_c log(1 + e^-z_c) + (1 - label_c) log(1 + e^z_c)
    dloss/dz_c = sigmoid(z_c) - label_c

Beside every result stands its scale: the same sum with every term and every part of z replaced by its magnitude. An
implementation whose every operation is right to a relative eps is right to a small multiple of eps times that scale.
A row of the table is a sum of n terms, which in plain order is right to n eps of their magnitudes: its scale is larger.

Nothing here comes from nce_ext.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Values(NamedTuple):
    loss: np.ndarray  # scalar, or [B]
    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    log_z: np.ndarray  # [B]; a shared log_z has the sum of it


class Truth(NamedTuple):
    value: Values
    scale: Values


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def nce(
    hidden,
    weight,
    target,
    negatives,
    *,
    bias=None,
    target_log_q=None,
    negative_log_q=None,
    correction="log_kq",
    log_z=0.0,
    remove_hits=False,
    candidate_reduction="sum",
    positive_label="one",
    reduction="mean",
    ignore_index=-100,
    sample_weight=None,
    upstream=None,
) -> Truth:
    """hidden [B, D], target [B, T], negatives [B, k], log q of the same shapes; upstream [B] for reduction "none"."""
    hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    batch, k = len(target), len(negatives[0]) if len(negatives) else 0
    bias = np.zeros(len(weight)) if bias is None else np.asarray(bias, np.float64)
    log_z = np.broadcast_to(np.asarray(log_z, np.float64), (batch,))
    value, size = (
        Values(np.zeros(batch), np.zeros_like(hidden), np.zeros_like(weight), np.zeros_like(bias), np.zeros(batch))
        for _ in range(2)
    )

    terms, candidates = np.zeros(len(weight)), np.zeros(batch)
    counted = [any(y != ignore_index for y in row) for row in target]
    factor = np.ones(batch) if sample_weight is None else np.asarray(sample_weight, np.float64)
    scale = np.array(factor)
    if reduction == "mean":
        total = sum(f for f, c in zip(factor, counted, strict=True) if c)
        scale = scale / (total if total else 1.0)
    elif reduction == "none" and upstream is not None:
        scale = scale * np.asarray(upstream, np.float64)

    for i in range(batch):
        if not counted[i]:
            continue
        positives = [int(y) for y in target[i] if y != ignore_index]
        columns = []  # (class, label, log q)
        for t, y in enumerate(target[i]):
            if y != ignore_index:
                label = 1.0 / len(positives) if positive_label == "uniform" else 1.0
                columns.append((int(y), label, target_log_q[i][t] if correction != "none" else 0.0))
        for j, n in enumerate(negatives[i]):
            if not (remove_hits and int(n) in positives):
                columns.append((int(n), 0.0, negative_log_q[i][j] if correction != "none" else 0.0))
        candidates[i] = len(columns)
        share = 1.0 / (len(positives) + k) if candidate_reduction == "mean" else 1.0
        for c, label, log_q in columns:
            parts = [*(hidden[i] * weight[c]), bias[c], -log_z[i], -log_q]
            if correction == "log_kq":
                parts.append(-math.log(k))
            z, z_size = math.fsum(parts), math.fsum(map(abs, parts))
            # sigmoid(z) - label, without the cancellation that would leave few digits of it
            up, down = (1 - label) * sigmoid(z), label * sigmoid(-z)
            slope = up - down
            dz = share * slope * scale[i]
            dz_size = abs(share * scale[i]) * (up + down + sigmoid(z) * sigmoid(-z) * z_size)
            value.loss[i] += share * (label * softplus(-z) + (1 - label) * softplus(z))
            size.loss[i] += share * (label * softplus(-z) + (1 - label) * softplus(z) + abs(slope) * z_size)
            terms[c] += 1
            signed, absolute = (value, dz, weight[c], hidden[i]), (size, dz_size, abs(weight[c]), abs(hidden[i]))
            for total, d, row, x in (signed, absolute):
                total.hidden[i] += d * row
                total.weight[c] += d * x
                total.bias[c] += d
            value.log_z[i] -= dz
            size.log_z[i] += dz_size
    # A sum of n terms may be off by n eps of the sum of their magnitudes, and is where they are equal; in units of
    # rounding.py, whose atol is 32 eps.
    drift, across = 1 + terms / 32, 1 + candidates / 32
    size = size._replace(
        hidden=size.hidden * across[:, None], weight=size.weight * drift[:, None], bias=size.bias * drift
    )
    loss, loss_size = value.loss * factor, size.loss * np.abs(factor)
    if reduction != "none":
        loss, loss_size = loss.sum(), loss_size.sum()
    if reduction == "mean":
        total = sum(f for f, c in zip(factor, counted, strict=True) if c)
        loss, loss_size = loss / (total if total else 1.0), loss_size / (total if total else 1.0)
    return Truth(value._replace(loss=np.asarray(loss)), size._replace(loss=np.asarray(loss_size)))
