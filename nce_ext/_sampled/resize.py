"""The rows that a loss begins with, and a change of their number."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nce_ext import _checks
from nce_ext._tables.pages import empty_table
from nce_ext.noise import Noise


class Resizable(Protocol):
    """A sampled loss as far as its rows go."""

    n_classes: int
    in_features: int
    num_negatives: int
    correction: str
    noise: Noise
    weight: nn.Parameter
    bias: nn.Parameter | None
    _fused: Any
    _pinned: bool


def initialise_weight(rows: Tensor) -> None:
    """Fill rows [V, D] with what a weight begins with: uniform in +-1/sqrt(D), as nn.Linear."""
    bound = 1 / math.sqrt(rows.shape[1])
    nn.init.uniform_(rows, -bound, bound)


def initial_bias(noise: Noise, correction: str, first: int, last: int) -> Tensor:
    """Compute what the bias of classes first .. last - 1 begins with: log q of the noise, or 0 without a correction."""
    classes = torch.arange(first, last, device=noise.table.device)
    if correction == "none":
        return torch.zeros(len(classes), device=classes.device)
    floor = -math.log(noise.n_classes * 2.0**32)  # of a class that is never drawn
    return noise.log_prob(classes).clamp_min(floor)


@torch.no_grad()
def resize_classes(loss_fn: Resizable, n_classes: int, noise: Noise, optimizer: torch.optim.Optimizer | None) -> None:
    """Change the number of rows of a loss in place; see the method of the same name."""
    n_classes = _checks.n_classes(n_classes)
    noise = _checks.instance("noise", noise, Noise, "an nce_ext.noise distribution")
    if noise.n_classes != n_classes:
        raise ValueError(f"noise must have n_classes = {n_classes} classes, got {noise.n_classes}")
    if loss_fn._fused is not None:
        raise ValueError(
            "loss must not be fused with its optimizer, got one that is; call unfuse_optimizer() before and "
            "fuse_optimizer() after"
        )
    if loss_fn._pinned:
        raise ValueError("loss must not be in pinned memory, got one that is; resize it before pin_weight()")
    parameters = [p for p in (loss_fn.weight, loss_fn.bias) if p is not None]
    groups = _groups_of(parameters, optimizer)
    n_old = min(loss_fn.n_classes, len(loss_fn.weight))
    kept = min(n_old, n_classes)
    noise = noise.to(loss_fn.weight.device)
    noise.check_table()

    weight = empty_table(n_classes, loss_fn.in_features, loss_fn.weight.device, loss_fn.weight.dtype)
    weight[:kept] = loss_fn.weight[:kept]
    if n_classes > kept:
        initialise_weight(weight[kept:])
    tables = [weight]
    if loss_fn.bias is not None:
        new = initial_bias(noise, loss_fn.correction, kept, n_classes)
        tables.append(torch.cat([loss_fn.bias[:kept], new.to(loss_fn.bias)]))
    for p, table in zip(parameters, tables, strict=True):
        if optimizer is not None and p in optimizer.state:
            optimizer.state[p] = {
                name: _resized(name, optimizer.state[p], p, table, kept, groups[p]) for name in optimizer.state[p]
            }
        p.grad = None
        # A graph that is alive keeps the node that takes p's gradients, in the old shape; another dtype parts them.
        p.data = table.new_empty(0, dtype=torch.float32 if p.dtype == torch.float64 else torch.float64)
        p.data = table
    loss_fn.noise, loss_fn.n_classes = noise, n_classes


def _groups_of(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[Tensor, dict[str, Any]]:
    """Find the parameter groups of an optimizer that hold the parameters; all must be there."""
    if optimizer is None:
        return {}
    _checks.instance("optimizer", optimizer, torch.optim.Optimizer, "an optimizer")
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    if not all(p in groups for p in parameters):
        raise ValueError("optimizer must have the loss's weight and bias among its parameters, got one that has not")
    return groups


def _resized(name: str, state: dict[str, Any], p: Tensor, table: Tensor, kept: int, group: dict[str, Any]) -> Any:
    """Resize one entry of a parameter's state that has an element or a row a class; others stay.

    New rows get what a step would make for them: a copy of the weight, what Adagrad's sums begin with, or 0.
    """
    value = state[name]
    if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != len(p):
        return value
    resized = value.new_zeros((len(table), *value.shape[1:]))
    resized[:kept] = value[:kept]
    if name == "master":
        resized[kept:] = table[kept:].reshape(resized[kept:].shape)
    elif name == "sum":
        resized[kept:] = group.get("initial_accumulator_value", 0)
    elif name == "decayed":  # up to date: no decay that was before its time
        resized[kept:] = state.get("log_decay", 0)
    return resized
