"""The loss and its gradients from the formula alone, in float64, one example and one column at a time.

For an example with hidden vector x, targets y_1 .. y_T and negatives n_1 .. n_k::

    z_c  = <x, w_c> + b_c - log_z - [log k] - [log q_c]
    loss = sum_c  label_c log(1 + e^-z_c) + (1 - label_c) log(1 + e^z_c)
    dloss/dz_c = sigmoid(z_c) - label_c

Nothing here comes from nce_ext.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    loss: np.ndarray  # scalar, or [B]
    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    log_z: np.ndarray  # [B]; a shared log_z has the sum of it


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
    losses = np.zeros(batch)
    grad_hidden, grad_weight = np.zeros_like(hidden), np.zeros_like(weight)
    grad_bias, grad_log_z = np.zeros_like(bias), np.zeros(batch)

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
        share = 1.0 / (len(positives) + k) if candidate_reduction == "mean" else 1.0
        for c, label, log_q in columns:
            z = math.fsum(hidden[i] * weight[c]) + bias[c] - log_z[i] - log_q
            if correction == "log_kq":
                z -= math.log(k)
            losses[i] += share * (label * softplus(-z) + (1 - label) * softplus(z))
            dz = share * (sigmoid(z) - label) * scale[i]
            grad_hidden[i] += dz * weight[c]
            grad_weight[c] += dz * hidden[i]
            grad_bias[c] += dz
            grad_log_z[i] -= dz
    losses = losses * factor
    if reduction == "none":
        loss = losses
    elif reduction == "sum":
        loss = np.asarray(losses.sum())
    else:
        total = sum(f for f, c in zip(factor, counted, strict=True) if c)
        loss = np.asarray(losses.sum() / (total if total else 1.0))
    return Truth(loss, grad_hidden, grad_weight, grad_bias, grad_log_z)
