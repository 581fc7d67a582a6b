"""One call of a sampled loss, from the user's arguments to the reduced loss: what all losses of the family share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nce_ext import _checks, _private_torch, _warnings, reference
from nce_ext._ops.coo import DENSE, made_coalesced
from nce_ext._ops.sampled_loss import SampledLossInputs, sampled_loss
from nce_ext._sampled import shared
from nce_ext._sampled.arguments import validate_and_flatten
from nce_ext._sampled.call import Call, log_q_of, needs_of, operands_of
from nce_ext.noise import Noise

_DENSE_GRADIENT_LIMIT = 256 * 2**20  # bytes
_MANY_ROWS = 4  # times the number of classes
_Result = TypeVar("_Result")


class TakesGradient(Protocol):
    """Takes the gradient of the rows instead of ``weight.grad``: see nce_ext.optim.fused_step."""

    def check_rows(self) -> None:
        """Refuse a call that leaves gradient rows, where only pairs can be taken."""

    def losses(self, inputs: SampledLossInputs) -> Tensor:
        """Compute the loss of each example, [B], whose backward pass hands over its pairs."""


def reduced_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    *,
    sample_weight: Tensor | None,
    reduction: str,
    fused_step: TakesGradient | None = None,
    **options: Any,
) -> Tensor:
    """Compute the loss of the examples, reduced; options are those of ``validate_and_flatten``."""
    call = validate_and_flatten(
        hidden, weight, target, noise, num_negatives, sample_weight=sample_weight, reduction=reduction,
        host_weight=True, **options,
    )  # fmt: skip
    grad_enabled = torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        if grad_enabled and not _private_torch.inside_transform():  # whose gradients reach no parameter
            _prepare_gradient(call)
        _warn_of_many_rows(call)
    fused, labels, correction = call.layout.fused, call.labels, call.correction
    id_check_args = (
        target, options["negatives"], noise, labels.ignore_index, correction.subtract_log_q, options["log_q"],
    )  # fmt: skip
    weights = None if sample_weight is None else sample_weight.reshape(-1)
    if fused_step is not None and (call.shared or not fused):
        fused_step.check_rows()
    if fused and call.shared:
        weight_of_examples = None
        if reduction != "none" and (weights is None or not weights.requires_grad):
            weight_of_examples = example_weight(call, weights, reduction).contiguous()
        losses = run_with_id_errors(
            lambda: shared.losses(call, weight_of_examples, grad_enabled), id_check_args, hidden.device
        )
        _wait_for_rows(call)
        if weight_of_examples is not None:
            return losses.sum()
    elif fused:
        inputs = inputs_of(call, grad_enabled)
        run = _losses if fused_step is None else fused_step.losses
        losses = run_with_id_errors(lambda: run(inputs), id_check_args, hidden.device)
        _wait_for_rows(call)
    else:
        _checks.ids(*id_check_args)
        losses = _reference_losses(call)
    if reduction == "none":
        return (losses if weights is None else losses * weights.to(losses.dtype)).reshape(call.layout.batch_shape)
    if reduction == "sum" and weights is None:
        return losses.sum()
    return (losses * example_weight(call, weights, reduction)).sum()


def inputs_of(call: Call, grad_enabled: bool) -> SampledLossInputs:
    """Arrange a call as the operator sampled_loss takes it: its groups are those of the schema."""
    candidates, noise = call.candidates, call.candidates.noise
    return SampledLossInputs._make(
        (
            *operands_of(call), candidates.seed, noise.table, noise.kind, candidates.k, candidates.ids,
            candidates.remove_hits, *call.correction, *call.labels, *call.objective, *needs_of(call, grad_enabled),
        )
    )  # fmt: skip


def _losses(inputs: SampledLossInputs) -> Tensor:
    return sampled_loss(inputs).loss


def run_with_id_errors(run: Callable[[], _Result], id_check_args: tuple[Any, ...], device: torch.device) -> _Result:
    """Run an operator whose refusal of an id is put in the words of the user's arguments.

    On the CPU the operator refuses bad ids as it reads them; once it has, they are searched for. On CUDA, where an
    operator cannot refuse, they are searched for beforehand, and only under set_debug(True).
    """
    if torch.compiler.is_compiling():
        return run()
    if device.type != "cpu":
        _checks.ids(*id_check_args)
    try:
        return run()
    except RuntimeError:
        _checks.ids(*id_check_args)
        raise


def _wait_for_rows(call: Call) -> None:
    """Wait until the rows of a weight in host memory are read, where no backward pass will: they may change then."""
    if call.operands.host_weight and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        torch.cuda.current_stream(call.operands.hidden.device).synchronize()


def example_weight(call: Call, weights: Tensor | None, reduction: str) -> Tensor:
    """Compute what the loss of each example, [B], is multiplied by before they are added up."""
    target, compute = call.operands.target, call.operands.compute_dtype
    if reduction == "sum":
        return target.new_ones(target.shape[0], dtype=compute) if weights is None else weights.to(compute)
    valid = target != call.labels.ignore_index
    valid = valid[:, 0] if target.shape[1] == 1 else valid.any(1)
    if weights is None:
        return (1 / valid.sum().clamp_min(1).to(compute)).expand(target.shape[0])
    scale = weights.to(compute)
    total = torch.where(valid, scale, 0).sum()
    return scale / torch.where(total == 0, 1, total)


def _reference_losses(call: Call) -> Tensor:
    """Compute the loss of each example, [B], in plain PyTorch."""
    operands, candidates, labels = call.operands, call.candidates, call.labels
    noise, ids, n_examples = candidates.noise, candidates.ids, operands.hidden.shape[0]
    if ids is None:
        assert candidates.seed is not None
        ids = reference.draw(noise.kind, noise.n_classes, noise.table, candidates.seed, n_examples, candidates.k)
    target_log_q, negative_log_q = log_q_of(call, ids)
    sparse = call.layout.gradient_layout != DENSE and not _private_torch.inside_vmap()  # where no tensor is sparse
    return reference.sampled_loss(
        operands.hidden, operands.weight, operands.bias, operands.target, ids.expand(n_examples, candidates.k),
        operands.log_z, target_log_q, negative_log_q, objective=call.objective, offset=call.correction.offset,
        remove_hits=candidates.remove_hits, **labels._asdict(), sparse=sparse,
        repeated=_repeated(ids) if candidates.distinct else None,
    )  # fmt: skip


def _repeated(ids: Tensor) -> Tensor:
    """Mark ids [1, k] that have occurred before in their row."""
    ascending, order = ids[0].sort(stable=True)
    again = torch.cat([ascending.new_zeros(1, dtype=torch.bool), ascending[1:] == ascending[:-1]])[: len(order)]
    return again.gather(0, order.argsort())[None]


def _prepare_gradient(call: Call) -> None:
    """Keep the flag of coalesced gradients; warn once of a dense one that is large."""
    weight = call.operands.weight
    if call.layout.gradient_layout != DENSE:
        made_coalesced.watch(weight)
        made_coalesced.watch(call.operands.bias)
        return
    size = weight.numel() * weight.element_size()
    if size > _DENSE_GRADIENT_LIMIT and weight.requires_grad:
        _warnings.warn_once(
            "dense gradient",
            f"weight.grad will be dense: {size / 2**20:.0f} MiB for {weight.shape[0]} rows of {weight.shape[1]} are "
            "written on every step. sparse=True makes the step independent of the number of rows "
            "(with the optimizers of nce_ext.optim).",
        )


def _warn_of_many_rows(call: Call) -> None:
    """Warn once of a call that reads more rows than the full softmax would."""
    n_examples, n_classes, k = call.operands.hidden.shape[0], call.operands.weight.shape[0], call.candidates.k
    rows = n_examples * (k + 1)
    if not call.shared and rows > _MANY_ROWS * n_classes:
        _warnings.warn_once(
            "many rows",
            f"{n_examples} examples of {k} + 1 candidates read {rows} rows of a table of {n_classes}: the full "
            "softmax (F.linear_cross_entropy), or negatives that all examples share (shared=True), would be cheaper.",
        )
