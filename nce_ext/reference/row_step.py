"""One step of an optimizer on rows of a table, in plain PyTorch: the twin of csrc/row_step.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nce_ext.reference.noise import philox4x32

# The codes are those of StepRule in csrc/row_step.h.
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM = 0, 1, 2, 3


class Hyperparameters(NamedTuple):
    """What a step takes besides tensors."""

    rule: int
    step: int  # of the optimizer, from 1; Adam corrects by it where rows do not count their own
    rate: float
    weight_decay: float = 0.0  # coupled: added to the gradient, times the weight
    log_decay: float = 0.0  # decoupled: sum over all steps of log(1 - rate * decay)
    momentum: float = 0.0
    dampening: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class RowState(NamedTuple):
    """State of a table [V, D], float32, or float64 with a float64 weight."""

    first: Tensor | None = None  # [V, D]: SGD's momentum buffer, Adam's first moment
    second: Tensor | None = None  # [V, D]: Adagrad's sum, Adam's second moment; [V]: row-wise Adagrad's sum
    row_steps: Tensor | None = None  # int32 [V]: how often a row was touched
    decayed: Tensor | None = None  # float64 [V]: log_decay at the row's last touch
    master: Tensor | None = None  # float32 [V, D]: the 16-bit weight in full


class RowStep(NamedTuple):
    """A step that is about to be taken on rows of one table."""

    weight: Tensor  # [V, D], without autograd
    state: RowState
    hyperparameters: Hyperparameters
    seed: Tensor | None = None  # int64 [2]: rounds a 16-bit weight at random


def row_step_(
    weight: Tensor,
    classes: Tensor | None,
    gradient: Tensor,
    state: RowState,
    hyperparameters: Hyperparameters,
    gradient_scale: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """Step on the rows ``classes`` [U], or on all, of weight [V, D] in place; gradient [U, D]."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = torch.arange(weight.shape[0], device=weight.device) if classes is None else classes
    touches = None if state.row_steps is None else state.row_steps[rows].double() + 1
    w = (weight if state.master is None else state.master)[rows].to(compute)
    g = gradient.to(compute)
    if gradient_scale is not None:
        g = g * gradient_scale.to(compute)
    g = -g if hyperparameters.maximize else g
    if hyperparameters.weight_decay:  # 0 times infinity is not 0
        g = g + hyperparameters.weight_decay * w
    if state.decayed is not None:
        w = w * torch.exp(hyperparameters.log_decay - state.decayed[rows]).to(compute)[:, None]
        state.decayed[rows] = hyperparameters.log_decay
    step = {SGD: _sgd, ADAGRAD: _adagrad, ROWWISE_ADAGRAD: _rowwise_adagrad, ADAM: _adam}[hyperparameters.rule]
    w = w - step(g, rows, touches, state, hyperparameters)
    if state.row_steps is not None:
        state.row_steps[rows] += 1
    if state.master is not None:
        state.master[rows] = w
    elif seed is not None:
        w = round_at_random(w, rows, seed, weight.dtype)
    weight[rows] = w.to(weight.dtype)


def _sgd(g: Tensor, rows: Tensor, touches: Tensor | None, state: RowState, h: Hyperparameters) -> Tensor:
    if state.first is not None:
        take = torch.full((len(rows), 1), 1 - h.dampening, dtype=g.dtype, device=g.device)
        if touches is not None:
            take[touches == 1] = 1
        first = h.momentum * state.first[rows] + take * g
        state.first[rows] = first
        g = g + h.momentum * first if h.nesterov else first
    return h.rate * g


def _adagrad(g: Tensor, rows: Tensor, _: Tensor | None, state: RowState, h: Hyperparameters) -> Tensor:
    assert state.second is not None
    state.second[rows] += g * g
    return h.rate * (g / (state.second[rows].sqrt() + h.eps))


def _rowwise_adagrad(g: Tensor, rows: Tensor, _: Tensor | None, state: RowState, h: Hyperparameters) -> Tensor:
    assert state.second is not None
    state.second[rows] += (g * g).mean(1)
    return h.rate * (g / (state.second[rows].sqrt()[:, None] + h.eps))


def _adam(g: Tensor, rows: Tensor, touches: Tensor | None, state: RowState, h: Hyperparameters) -> Tensor:
    assert state.first is not None
    assert state.second is not None
    t = torch.full((len(rows),), h.step, dtype=torch.float64, device=g.device) if touches is None else touches
    rate = (h.rate / (1 - h.beta1**t)).to(g.dtype)[:, None]
    root = (1 - h.beta2**t).sqrt().to(g.dtype)[:, None]
    first = state.first[rows] + (1 - h.beta1) * (g - state.first[rows])
    second = h.beta2 * state.second[rows] + (1 - h.beta2) * (g * g)
    state.first[rows], state.second[rows] = first, second
    return rate * (first / (second.sqrt() / root + h.eps))


def round_at_random(values: Tensor, rows: Tensor, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [U, D] rounded to neighbours in a 16-bit type, up with the probability of the fraction that is cut off.

    The 16 random bits of element d of a row are those of (seed, row, d): 8 elements share a Philox block.
    """
    n, dim = values.shape
    d = torch.arange(dim, device=values.device)[None, :]
    zero = torch.zeros((n, dim), dtype=torch.int64, device=values.device)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    words = philox4x32([zero + d // 8, zero + rows[:, None], zero + low[1], zero + high[1]], [low[0], high[0]])
    word = torch.stack(words, -1).gather(-1, (zero + d % 8 // 2)[..., None])[..., 0]
    random = (word >> (16 * (d % 2))) & 0xFFFF
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        cut = (bits + random) & 0xFFFF0000
    else:
        normal = magnitude >= 0x38800000  # 2^-14; below it the numbers lie 2^-24 apart
        units = values.abs() * 2.0**24
        whole = units.floor()
        subnormal = (whole + (random < (units - whole) * 65536)) * 2.0**-24
        sign = bits & 0x80000000
        small = torch.where(normal, 0.0, subnormal).view(torch.int32).long() | sign
        cut = torch.where(normal, (bits + (random >> 3)) & 0xFFFFE000, small)
    cut = torch.where(magnitude >= 0x7F800000, bits, cut)
    return torch.where(cut >= 2**31, cut - 2**32, cut).int().view(torch.float32)
