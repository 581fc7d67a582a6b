"""Interim: the inputs of the operator sampled_loss, until the operators have a file each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Arguments of the schema in csrc/ops.cpp, in its order."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    log_z: Tensor | None
    seed: Tensor | None
    table: Tensor
    negatives: Tensor | None
    target_log_q: Tensor | None
    negative_log_q: Tensor | None
    kind: int
    num_negatives: int
    subtract_log_q: bool
    offset: float
    remove_hits: bool
    uniform_labels: bool
    mean_candidates: bool
    ignore_index: int
    objective: int
    positive_weight: float
    label_smoothing: float
    temperature: float
    correct_positive: bool
    needs_hidden_grad: bool
    needs_row_grad: bool
    gradient_layout: int
