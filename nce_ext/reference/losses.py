"""The sampled losses of an example's targets and negatives, every row gathered."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nce_ext.reference.dtypes import compute_dtype
from nce_ext.reference.objective import Objective


def sampled_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    negatives: Tensor,
    log_z: Tensor | None,
    target_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    *,
    objective: Objective,
    offset: float,
    remove_hits: bool,
    uniform_labels: bool,
    mean_candidates: bool,
    ignore_index: int,
    sparse: bool,
    repeated: Tensor | None = None,
) -> Tensor:
    """Per-example loss over T targets and k negatives, [B].

        z_j = <hidden, weight_j> + bias_j - log_z - offset - log q_j

    and, with labels y = 1, or 1/T, of the targets and 0 of the negatives, by the kind of objective::

        BINARY       sum_j beta_j (y_j softplus(-z_j) + (1 - y_j) softplus(z_j)), beta_j = positive_weight or 1
        SOFTMAX      sum_j y_j (logsumexp(z) - z_j), smoothed
        ADVERSARIAL  as BINARY, with the negatives' terms weighted by softmax(temperature z) over them, detached

    hidden [B, D], target [B, T], negatives [B, k]; log_q None leaves that term out. ``repeated`` [B, k] marks negatives
    to leave out. Rows are gathered as [B, T + k, D], so memory grows with k.
    """
    n_targets, n_classes = target.shape[1], weight.shape[0]
    compute = compute_dtype(weight.dtype)
    positive = target != ignore_index
    any_positive = positive.any(1, keepdim=True)

    ids = torch.cat([target, negatives], 1)
    live = torch.cat([positive, any_positive.expand_as(negatives)], 1)
    bad = (live & ((ids < 0) | (ids >= n_classes))).any(1)
    if target_log_q is not None and negative_log_q is not None:
        bad = bad | (positive & ~torch.isfinite(target_log_q)).any(1)
        bad = bad | (any_positive & ~torch.isfinite(negative_log_q.expand_as(negatives))).any(1)
    live = live & ~bad[:, None]
    ids = torch.where(live, ids, 0)
    left_out = torch.zeros_like(negatives, dtype=torch.bool) if repeated is None else repeated
    if remove_hits:
        left_out = left_out | ((negatives[:, :, None] == target[:, None, :]) & positive[:, None, :]).any(2)
    live = torch.cat([live[:, :n_targets], live[:, n_targets:] & ~left_out], 1)

    with torch.autocast(hidden.device.type, enabled=False):
        rows = F.embedding(ids, weight, sparse=sparse).to(compute)
        rows = torch.where(live[:, :, None], rows, 0)
        z = torch.einsum("bd,bcd->bc", hidden.to(compute), rows)
        if bias is not None:
            z = z + torch.gather(bias, 0, ids.flatten(), sparse_grad=sparse).view(ids.shape).to(compute)
        if log_z is not None:
            z = z - log_z.to(compute)[:, None]
        if target_log_q is not None and negative_log_q is not None:
            of_target = target_log_q if objective.correct_positive else torch.zeros_like(target_log_q)
            z = z - torch.cat([of_target, negative_log_q.expand_as(negatives)], 1).to(compute)
        largest = torch.finfo(compute).max  # a score that overflowed would turn 0 * softplus into NaN
        z = torch.where(live, z - offset, 0).clamp(-largest, largest)

        count = positive.sum(1, keepdim=True).clamp_min(1)
        label = torch.zeros_like(z)
        label[:, :n_targets] = 1.0 / count.to(compute) if uniform_labels else 1.0
        label = torch.where(live, label, 0)
        loss = objective.losses(z, live, label, target_log_q, n_targets)
        if mean_candidates:
            loss = loss / (count[:, 0] + negatives.shape[1])
    return torch.where(bad, torch.nan, loss)
