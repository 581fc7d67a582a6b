"""Objectives over an example's candidates from their formulas, in float64, with scales as oracle.py has them.

Columns are targets, then negatives; a negative j counts c_j times. With y the label of a target, T their number::

    binary       sum_t w (y softplus(-z_t) + (1 - y) softplus(z_t)) + sum_j c_j softplus(z_j)
    softmax      sum_i y_i (logsumexp(z) - z_i) over all columns, j of them c_j times; smoothed labels are
                 (1 - eps) y + eps sum(y) / n, n counting all columns
    adversarial  as binary, with c_j replaced by the constant c_j e^(a z_j) / sum of c_i e^(a z_i)

The scale of a derivative takes each z to be known to a relative eps of its `size`, the sum of the magnitudes of what it
was added up from. Nothing here comes from nce_ext.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import oracle

BINARY, SOFTMAX, ADVERSARIAL = 0, 1, 2


class Options(NamedTuple):
    objective: int = BINARY
    positive_weight: float = 1.0
    label_smoothing: float = 0.0
    temperature: float = 0.0
    correct_positive: bool = True
    uniform_labels: bool = False
    small_digits: bool = True  # SOFTMAX: what is close to 0 is known to its last digits, as in no eager cross-entropy


class Example(NamedTuple):
    loss: float
    dz: np.ndarray
    loss_scale: float
    dz_scale: np.ndarray


def of_each(function, values) -> np.ndarray:
    return np.array([function(v) for v in values], np.float64)


def log_rest(log_q: float) -> float:
    """log(1 - q), of a q that is at most 1 - 2^-24."""
    return math.log(max(-math.expm1(log_q), 2.0**-24))


def example(z, size, n_targets: int, count, options: Options, log_q_target: float = 0.0) -> Example:
    """Loss and derivatives from z, size and count of the live columns, of which n_targets >= 1 are targets."""
    z, size, count = (np.asarray(v, np.float64) for v in (z, size, count))
    label = 1 / n_targets if options.uniform_labels else 1.0
    # A sum of n terms in plain order is right to n eps, in units of rounding.py, whose atol is 32 eps.
    drift = 1 + len(z) / 32
    if options.objective == SOFTMAX:
        result = softmax(z, size, n_targets, count, label, options, log_q_target)
    else:
        result = weighted(z, size, n_targets, count, label, options)
    return result._replace(loss_scale=result.loss_scale * drift, dz_scale=result.dz_scale * drift)


def weighted(z, size, n_targets: int, count, label: float, options: Options) -> Example:
    targets, negatives = slice(None, n_targets), slice(n_targets, None)
    weight, weight_scale = count.copy(), count.copy()
    if options.objective == ADVERSARIAL and len(z) > n_targets:
        exponent = options.temperature * z[negatives]
        share = count[negatives] * np.exp(exponent - exponent.max())
        weight[negatives] = share / share.sum()
        unsure = options.temperature * (size[negatives] + size[negatives].max())
        weight_scale[negatives] = weight[negatives] * (1 + unsure)
    weight[targets] = weight_scale[targets] = options.positive_weight
    labels = np.where(np.arange(len(z)) < n_targets, label, 0.0)
    up, down = of_each(oracle.sigmoid, z), of_each(oracle.sigmoid, -z)
    term = labels * of_each(oracle.softplus, -z) + (1 - labels) * of_each(oracle.softplus, z)
    slope, slope_size = (1 - labels) * up - labels * down, (1 - labels) * up + labels * down
    return Example(
        float((weight * term).sum()), weight * slope,
        float((weight_scale * term + weight * np.abs(slope) * size).sum()),
        weight_scale * slope_size + weight * up * down * size,
    )  # fmt: skip


def softmax(z, size, n_targets: int, count, label: float, options: Options, log_q_target: float) -> Example:
    n_negatives, negative = count[n_targets:].sum(), np.arange(len(z)) >= n_targets
    if not options.correct_positive and n_negatives:
        shift = log_rest(log_q_target) - math.log(n_negatives)
        z, size = z + np.where(negative, shift, 0.0), size + np.where(negative, abs(shift), 0.0)
    total = n_targets * label
    smooth = options.label_smoothing * total / (n_targets + n_negatives)
    labels = np.where(negative, 0.0, (1 - options.label_smoothing) * label) + smooth * count
    top = z.max()
    exponentials = count * np.exp(z - top)
    share = exponentials / exponentials.sum()
    normaliser = top + math.log(exponentials.sum())
    unsure = 1 + 2 * size.max()
    dz, scale = total * share - labels, total * share * unsure + labels
    loss = float((labels * (normaliser - z)).sum())
    loss_scale = float((labels * (np.abs(normaliser - z) + size)).sum()) + total * unsure
    if n_targets == 1 and not smooth and options.small_digits:
        # Whatever is close to 0 here is known to its last digits.
        rest = float(share[negative].sum())
        dz[0], scale[0] = -total * rest, total * rest * unsure
        odds = float(exponentials[negative].sum() / exponentials[0]) if exponentials[0] else math.inf
        if odds < 1:
            loss = total * math.log1p(odds)
        loss_scale = loss + total * rest * unsure
    return Example(loss, dz, loss_scale, scale)


def batch(
    hidden, weight, target, negatives, options: Options, *, bias=None, target_log_q, negative_log_q, offsets=(),
    log_z=0.0, remove_hits=False, n_draws=None, reduction="mean", ignore_index=-100, sample_weight=None, upstream=None,
) -> oracle.Truth:  # fmt: skip
    """hidden [B, D], target [B, T], negatives and log q of B rows; n_draws: the loss is divided by it plus T.

    From every z are subtracted log_z, ``offsets`` and log q, which is 0 without a correction.
    """
    hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    n = len(hidden)
    bias = np.zeros(len(weight)) if bias is None else bias
    log_z = np.broadcast_to(np.asarray(log_z, np.float64), (n,))
    factor = np.ones(n) if sample_weight is None else np.asarray(sample_weight, np.float64)
    counted = np.array([any(y != ignore_index for y in row) for row in target], bool)
    total = factor[counted].sum() if reduction == "mean" else 1.0
    factor = factor / (total if total else 1.0)
    scale = factor if upstream is None or reduction != "none" else factor * np.asarray(upstream, np.float64)
    value, size = (
        oracle.Values(np.zeros(n), np.zeros_like(hidden), np.zeros_like(weight), np.zeros_like(bias), np.zeros(n))
        for _ in range(2)
    )
    terms, candidates = np.zeros(len(weight)), np.zeros(n)
    for i in np.flatnonzero(counted):
        at = [t for t, y in enumerate(target[i]) if y != ignore_index]
        classes, log_q = [target[i][t] for t in at], [target_log_q[i][t] for t in at]
        positives, log_q_target = set(classes), log_q[0]
        if options.objective == SOFTMAX and not options.correct_positive:
            log_q = [0.0] * len(at)
        for c, q in zip(negatives[i], negative_log_q[i], strict=True):
            if not (remove_hits and c in positives):
                classes.append(c)
                log_q.append(q)
        shift = [-log_z[i], *(-offset for offset in offsets)]
        parts = [[*(hidden[i] * weight[c]), bias[c], -q, *shift] for c, q in zip(classes, log_q, strict=True)]
        z, z_size = [math.fsum(p) for p in parts], [math.fsum(map(abs, p)) for p in parts]
        one = example(z, z_size, len(at), np.ones(len(z)), options, log_q_target)
        share = 1.0 if n_draws is None else 1 / (len(at) + n_draws)
        value.loss[i], size.loss[i] = share * factor[i] * one.loss, share * abs(factor[i]) * one.loss_scale
        dz, dz_size = share * scale[i] * one.dz, share * abs(scale[i]) * one.dz_scale
        value.hidden[i], size.hidden[i] = dz @ weight[classes], dz_size @ abs(weight[classes])
        for into, d, x in ((value, dz, hidden[i]), (size, dz_size, abs(hidden[i]))):
            np.add.at(into.weight, classes, d[:, None] * x)
            np.add.at(into.bias, classes, d)
        np.add.at(terms, classes, 1)
        candidates[i] = len(classes)
        value.log_z[i], size.log_z[i] = -dz.sum(), dz_size.sum()
    drift, across = 1 + terms / 32, 1 + candidates / 32
    size = size._replace(
        hidden=size.hidden * across[:, None], weight=size.weight * drift[:, None], bias=size.bias * drift
    )
    losses = [v.loss if reduction == "none" else v.loss.sum() for v in (value, size)]
    return oracle.Truth(*(v._replace(loss=np.asarray(x)) for v, x in zip((value, size), losses, strict=True)))
