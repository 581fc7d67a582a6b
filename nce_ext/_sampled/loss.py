"""One call of a sampled loss, from the user's arguments to the reduced loss: what all losses of the family share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from nce_ext import _checks, _ops, reference
from nce_ext._ops.sampled_loss import Inputs
from nce_ext._sampled import arguments as _call
from nce_ext._sampled import shared as _shared
from nce_ext.noise import Noise

_DENSE_GRADIENT_LIMIT = 256 * 2**20  # bytes
_MANY_ROWS = 4  # times the number of classes
_warned: set[str] = set()  # hints that were given; each is given once


_fused_step: ContextVar[Any] = ContextVar("fused_step", default=None)


def with_fused_step(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Interim: a public function as one that takes ``fused_step`` as well."""

    @functools.wraps(function)
    def call(*arguments: Any, fused_step: Any, **options: Any) -> Tensor:
        token = _fused_step.set(fused_step)
        try:
            return function(*arguments, **options)
        finally:
            _fused_step.reset(token)

    return call


def sampled_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    *,
    sample_weight: Tensor | None,
    reduction: str,
    **options: Any,
) -> Tensor:
    """The reduced loss; options are those of :func:`_call.prepare`."""
    call = _call.prepare(
        hidden, weight, target, noise, num_negatives, sample_weight=sample_weight, reduction=reduction,
        host_weight=True, **options,
    )  # fmt: skip
    learns = torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        if learns:
            _prepare_gradient(call)
        _hint_at_many_rows(call)
    given = (target, options["negatives"], noise, call.ignore_index, call.subtract_log_q, options["log_q"])
    weights = None if sample_weight is None else sample_weight.reshape(-1)
    fused_step = _fused_step.get() if learns else None
    if fused_step is not None and (call.shared or not call.fused):
        fused_step.check_rows()
    if call.fused and call.shared:
        scale = None
        if reduction != "none" and (weights is None or not weights.requires_grad):
            scale = _scale(call, weights, reduction)
        losses = guarded(_shared.losses, (call, scale, learns), given, check_first=hidden.device.type != "cpu")
        _wait_for_rows(call)
        if scale is not None:
            return losses.sum()
    elif call.fused:
        needs_row_grad = learns and any(t is not None and t.requires_grad for t in (weight, call.bias, call.log_z))
        arguments = (
            *call.operator_arguments(), *call.objective, learns and hidden.requires_grad, needs_row_grad,
            call.gradient_layout,
        )  # fmt: skip
        operator = _ops.sampled_loss
        if fused_step is not None:
            operator, arguments = fused_step.sampled_loss, (Inputs._make(arguments),)
        losses = guarded(operator, arguments, given, check_first=hidden.device.type != "cpu")
        _wait_for_rows(call)
    else:
        losses = _reference_loss(call, given)
    if reduction == "none":
        return (losses if weights is None else losses * weights.to(losses.dtype)).reshape(call.lead)
    if reduction == "sum" and weights is None:
        return losses.sum()
    return (losses * _scale(call, weights, reduction)).sum()


def guarded(operator: Callable[..., Any], arguments: tuple, given: tuple, *, check_first: bool) -> Any:
    """Bad ids are refused by the operator, as it reads them; once it has, they are searched for the words to say so.

    On CUDA, where an operator cannot refuse, ids are checked beforehand, and only under set_debug(True).
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if check_first:
        _checks.ids(*given)
    try:
        return operator(*arguments)
    except RuntimeError:
        _checks.ids(*given)
        raise


def _wait_for_rows(call: _call.Call) -> None:
    """Without a backward pass, which waits, until the rows of a weight in host memory are read: it may change then."""
    if call.host_weight and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        torch.cuda.current_stream(call.hidden.device).synchronize()


def _scale(call: _call.Call, weights: Tensor | None, reduction: str) -> Tensor:
    """[B]: what the loss of each example is multiplied by before they are added up."""
    compute = torch.float64 if call.weight.dtype == torch.float64 else torch.float32
    n_examples = call.target.shape[0]
    scale = call.target.new_ones(n_examples, dtype=compute) if weights is None else weights.to(compute)
    if reduction == "sum":
        return scale
    valid = call.target != call.ignore_index
    valid = valid[:, 0] if call.target.shape[1] == 1 else valid.any(1)
    total = torch.where(valid, scale, 0).sum()
    return scale / torch.where(total == 0, 1, total)


def _reference_loss(call: _call.Call, given: tuple) -> Tensor:
    _checks.ids(*given)
    noise, ids, n_examples = call.noise, call.ids, call.hidden.shape[0]
    if ids is None:
        assert call.seed is not None
        ids = reference.draw(noise.kind, noise.n_classes, noise.table, call.seed, n_examples, call.k)
    target_log_q, negative_log_q = call.log_q(ids)
    return reference.sampled_loss(
        call.hidden, call.weight, call.bias, call.target, ids.expand(n_examples, call.k), call.log_z, target_log_q,
        negative_log_q, objective=call.objective, offset=call.offset, remove_hits=call.remove_hits,
        uniform_labels=call.uniform_labels, mean_candidates=call.mean_candidates, ignore_index=call.ignore_index,
        sparse=call.gradient_layout != _ops.DENSE, repeated=_repeated(ids) if call.distinct else None,
    )  # fmt: skip


def _repeated(ids: Tensor) -> Tensor:
    """[1, k]: whether an id occurs earlier in the row."""
    ascending, order = ids[0].sort(stable=True)
    again = torch.cat([ascending.new_zeros(1, dtype=torch.bool), ascending[1:] == ascending[:-1]])[: len(order)]
    return torch.zeros_like(again).scatter_(0, order, again)[None]


def _prepare_gradient(call: _call.Call) -> None:
    if call.gradient_layout != _ops.DENSE:
        _ops.keep_coalesced(call.weight)
        _ops.keep_coalesced(call.bias)
        return
    weight = call.weight
    size = weight.numel() * weight.element_size()
    if size > _DENSE_GRADIENT_LIMIT and weight.requires_grad:
        _hint(
            "dense gradient",
            f"weight.grad will be dense: {size / 2**20:.0f} MiB for {weight.shape[0]} rows of {weight.shape[1]} are "
            "written on every step. sparse=True makes the step independent of the number of rows "
            "(with the optimizers of nce_ext.optim).",
        )


def _hint_at_many_rows(call: _call.Call) -> None:
    n_examples, n_classes = call.hidden.shape[0], call.weight.shape[0]
    rows = n_examples * (call.k + 1)
    if not call.shared and rows > _MANY_ROWS * n_classes:
        _hint(
            "many rows",
            f"{n_examples} examples of {call.k} + 1 candidates read {rows} rows of a table of {n_classes}: the full "
            "softmax (F.linear_cross_entropy), or negatives that all examples share (shared=True), would be cheaper.",
        )


def _hint(name: str, text: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(text, UserWarning, stacklevel=5)
