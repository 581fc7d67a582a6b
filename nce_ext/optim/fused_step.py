"""Optimizer steps inside backward: the gradient of the touched rows is applied as it is summed, and never exists.

A loss is computed on stand-ins for weight and bias. Where the compiled kernels compute it example by example, backward
keeps the pairs (id, derivative) whose sum is the gradient; when it ends, one operator sorts, sums and applies them.
Shared negatives and the reference backend make gradient rows in any case, and the stand-ins' hooks collect those.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nce_ext import _checks, _private_torch
from nce_ext._checks import describe
from nce_ext._ops.coo import coo, flag_coalesced
from nce_ext._ops.row_grad import NO_DOUBLE_BACKWARD, GradientPairs, row_grad, row_grad_norm
from nce_ext._ops.row_grad_step import row_grad_step_
from nce_ext._ops.row_step import row_step_
from nce_ext._ops.sampled_loss import SampledLossInputs, sampled_loss
from nce_ext._ops.scatter_step import scatter_step_
from nce_ext.optim.pairs import gather_pairs, merge_pairs
from nce_ext.optim.row_optimizer import RowOptimizer, rows_of
from nce_ext.optim.rules import SGD
from nce_ext.reference.dtypes import compute_dtype

TWICE = (
    "a fused optimizer has taken its step for this graph already: backward cannot pass through it twice "
    "(retain_graph=True); loss_fn.unfuse_optimizer() brings gradients back"
)


class FusedLoss(torch.autograd.Function):
    """Run the operator sampled_loss; backward hands the pairs of its gradient to a fused step.

    ``weight`` is among the arguments so that the loss has a graph even if hidden has none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        log_z: Tensor | None,
        weight: Tensor,
        inputs: SampledLossInputs,
        fused_step: FusedStep,
    ) -> Tensor:
        loss, ids, dlogit, grad_hidden = sampled_loss(inputs)
        ctx.save_for_backward(hidden, ids, dlogit, grad_hidden)
        ctx.fused_step, ctx.done = fused_step, False
        ctx.of_rows = torch.autograd.graph.get_gradient_edge(weight).node
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, ids, dlogit, grad_hidden = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD)
        # autograd.grad after the gradient of hidden alone is no step.
        if _private_torch.will_run_in_this_pass(ctx.of_rows):
            if ctx.done:
                raise RuntimeError(TWICE)
            ctx.done = True
            ctx.fused_step.add(GradientPairs(ids, dlogit, grad_loss, hidden.detach()))
        needs_hidden, needs_log_z = ctx.needs_input_grad[:2]
        return (
            (grad_hidden * grad_loss[:, None]).to(hidden.dtype) if needs_hidden else None,
            -dlogit.sum(1) * grad_loss if needs_log_z else None,
            None, None, None,
        )  # fmt: skip


class BackwardPass:
    """Parts of the gradient of weight and bias that one backward pass has brought so far."""

    def __init__(self) -> None:
        self.pairs: list[GradientPairs] = []
        self.rows: list[tuple[nn.Parameter, Tensor]] = []  # parameters, and gradients of their stand-ins


class FusedStep:
    """Handle of a fused optimizer, which ``loss_fn.fuse_optimizer`` makes and documents.

    A backward pass ends with one step on all it brought: several calls of the loss are merged, and so is what other
    uses of the same parameters have left in their ``.grad``, which is then None again.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        optimizer: RowOptimizer,
        *,
        accumulate: int,
        max_norm: float | None,
        process_group: Any,
        grad_scaler: Any,
        hogwild: bool,
    ) -> None:
        self.optimizer, self.accumulate, self.max_norm = optimizer, accumulate, max_norm
        self.process_group, self.hogwild = process_group, hogwild
        self.grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._parameters = [p for p in (weight, bias) if p is not None]
        # Passes under way, by the engine's number. Only their callbacks hold them, so that a pass that fails takes its
        # pairs with it. The lock is one of its own, since a step under _lock may last.
        self._under_way: weakref.WeakValueDictionary[int, BackwardPass] = weakref.WeakValueDictionary()
        self._under_way_lock = threading.Lock()
        self._waiting: list[GradientPairs] = []  # of passes that are over
        self._passes = 0
        self._lock = threading.RLock()  # held while _waiting or the parameters change: one step after the other

    def __reduce__(self) -> Any:
        """Copy as None: a copy of the loss is not fused, since no optimizer has the parameters that were copied."""
        return type(None), ()

    @_private_torch.run_eagerly  # what happens at the end of backward cannot be traced
    def loss(
        self,
        function: Callable[..., Tensor],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        noise: Any,
        num_negatives: int,
        options: dict[str, Any],
    ) -> Tensor:
        """Compute the loss on stand-ins for weight and bias, so that its backward ends with a step on these.

        ``function`` takes the arguments of ``nce_ext.functional.nce_loss`` and ``fused_step``, which is this object: it
        calls :meth:`check_rows` where gradient rows will be formed, and :meth:`losses` where pairs will.
        """
        if isinstance(hidden, Tensor) and weight.device != hidden.device:  # pairs and rows would lie apart
            raise ValueError(
                f"weight must be on hidden's device {hidden.device} with fuse_optimizer, got {weight.device}"
            )
        self._check(weight, bias)
        weight, bias = self._stand_ins()
        options = {**options, "bias": bias, "sparse": True, "fused_step": self}
        return function(hidden, weight, target, noise, num_negatives, **options)

    def _check(self, weight: Tensor, bias: Tensor | None) -> None:
        """Refuse in the forward pass whatever would stop the step at the end of backward, when it is too late."""
        if _private_torch.inside_transform():
            raise RuntimeError(
                "fuse_optimizer steps inside backward(), which torch.func transforms do not run; "
                "loss_fn.unfuse_optimizer() brings gradients back"
            )
        current = [p for p in (weight, bias) if p is not None]
        if len(current) != len(self._parameters) or any(
            p is not q for p, q in zip(current, self._parameters, strict=True)
        ):
            raise RuntimeError("weight and bias were replaced after fuse_optimizer; call it again")
        for name, p in zip(("weight", "bias"), self._parameters, strict=False):
            if not p.requires_grad:
                raise RuntimeError(
                    f"{name} must require a gradient while a fused optimizer steps on it; "
                    "loss_fn.unfuse_optimizer() stops that"
                )
            self.optimizer._check(self._group(p), p)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self.process_group is None:
            raise RuntimeError(
                f"process_group must be given to fuse_optimizer where {dist.get_world_size()} processes train, or "
                "their copies of the weights would part; got None (dist.group.WORLD merges the steps of all)"
            )

    def _group(self, p: Tensor) -> dict[str, Any]:
        """Find the optimizer's group of a parameter."""
        for group in self.optimizer.param_groups:
            if any(q is p for q in group["params"]):
                return group
        raise RuntimeError("weight and bias were taken from the optimizer after fuse_optimizer; call it again")

    def _stand_ins(self) -> tuple[Tensor, Tensor | None]:
        """Make leaves in the memory of weight and bias; gradients that reach them are collected for the step."""
        stand_ins = []
        for p in self._parameters:
            stand_in = p.detach().requires_grad_()
            stand_in.register_post_accumulate_grad_hook(self._take_rows(p))  # type: ignore[no-untyped-call]  # by torch
            stand_ins.append(stand_in)
        return stand_ins[0], stand_ins[1] if len(stand_ins) == 2 else None

    def _take_rows(self, p: nn.Parameter) -> Callable[[Tensor], None]:
        """Make the hook of a stand-in for ``p``: it moves the stand-in's gradient to the pass under way."""
        done = False

        def take(stand_in: Tensor) -> None:
            nonlocal done
            if stand_in.grad is None:  # pairs were collected instead
                return
            if torch.is_grad_enabled():
                raise RuntimeError(NO_DOUBLE_BACKWARD)
            if done:
                raise RuntimeError(TWICE)
            done = True
            flag_coalesced(stand_in)
            self._this_pass().rows.append((p, stand_in.grad))
            stand_in.grad = None

        return take

    def check_rows(self) -> None:
        """Refuse a loss that forms gradient rows where several processes train: only pairs are exchanged."""
        if self.process_group is not None:
            raise RuntimeError(
                "process_group must be None in fuse_optimizer with shared negatives or the reference backend, whose "
                "gradient rows are not exchanged"
            )

    def losses(self, inputs: SampledLossInputs) -> Tensor:
        """Run the operator sampled_loss, whose backward will leave its pairs here; the loss of each example [B]."""
        plain = SampledLossInputs._make(value.detach() if isinstance(value, Tensor) else value for value in inputs)
        plain = plain._replace(needs_hidden_grad=inputs.hidden.requires_grad, needs_row_grad=True)
        loss: Tensor = FusedLoss.apply(  # type: ignore[no-untyped-call]  # by torch
            inputs.hidden, inputs.log_z, inputs.weight, plain, self
        )
        return loss

    def _this_pass(self) -> BackwardPass:
        """Find the backward pass under way, or begin to collect of it, and have it end with :meth:`_end`."""
        number = _private_torch.backward_pass_id()
        with self._under_way_lock:
            this = self._under_way.get(number)
            if this is not None:
                return this
            self._under_way[number] = this = BackwardPass()
        _private_torch.at_end_of_backward(lambda: self._end(this))
        return this

    def add(self, pairs: GradientPairs) -> None:
        """Collect pairs of the backward pass under way."""
        self._this_pass().pairs.append(pairs)

    def _end(self, ended: BackwardPass) -> None:
        """Count a backward pass, and take the step if it is the last of ``accumulate``."""
        with self._lock:
            self._waiting += ended.pairs
            for p, rows in ended.rows:
                p.grad = rows if p.grad is None else p.grad + rows
            self._passes += 1
            full = self._passes >= self.accumulate
        if full:
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Take the step on what has been accumulated, such as a last group that is not full; without any, no step."""
        with self._lock:
            pairs, self._waiting, self._passes = self._waiting, [], 0
            racy = self.hogwild and all(p.grad is None for p in self._parameters)
            if not racy:
                self._step(pairs)
        if racy:
            self._scatter(pairs)

    def _step(self, pairs: list[GradientPairs]) -> None:
        """Take one exact step on pairs and on the gradients that the parameters have."""
        if self.process_group is not None:
            tied = any(p.grad is not None for p in self._parameters)
            pairs = gather_pairs(pairs, self._parameters[0], self.process_group, tied=tied)
        gradients = [p.grad for p in self._parameters]
        if not pairs and all(gradient is None for gradient in gradients):
            return
        merged = merge_pairs(pairs) if pairs else None
        for p in self._parameters:
            self.optimizer._check(self._group(p), p)
        if merged is not None and any(gradient is not None for gradient in gradients):
            self._give_gradients(merged)
            merged = None
        norm = self._factor() * self._norm(merged) if self.max_norm or self.grad_scaler else None
        if self.grad_scaler is None or norm is None or self._is_finite(norm, self.grad_scaler):
            self._apply(merged, self._scale(norm))
        for p in self._parameters:
            p.grad = None
        _private_torch.mark_as_stepped(self.optimizer)

    def _is_finite(self, norm: Tensor, scaler: torch.amp.GradScaler) -> bool:
        """Decide whether the step is taken, and have ``scaler.update()`` count it as one of ``scaler.step()``."""
        finite = torch.isfinite(norm)
        _private_torch.record_found_inf(scaler, self, (~finite).float())
        return bool(finite)

    def _apply(self, merged: GradientPairs | None, scale: Tensor | None) -> None:
        """Step by pairs, or without any by the parameters' gradients; ``scale`` multiplies all of them."""
        stepped = [p for p in self._parameters if merged is not None or p.grad is not None]
        steps = {p: self.optimizer._prepare(self._group(p), p) for p in stepped}
        if merged is None:
            for p, step in steps.items():
                row_step_(step, *rows_of(p.grad), scale)  # type: ignore[arg-type]
            return
        weight, *bias = steps.values()
        classes, elements = row_grad_step_(merged, weight, scale, bool(bias))
        for step in bias:
            row_step_(step, classes, elements[:, None], scale)

    def _scatter(self, pairs: list[GradientPairs]) -> None:
        """Take the racy step of ``hogwild=True``."""
        weight, *bias = self._parameters
        for p in self._parameters:
            if p not in self.optimizer.state:  # or a checkpoint would lack the parameter
                self.optimizer._complete(self._group(p), p, self.optimizer.state[p])
        rate = float(self._group(weight)["lr"])
        for each in pairs:
            scatter_step_(each, weight.detach(), bias[0].detach() if bias else None, rate)

    def _give_gradients(self, merged: GradientPairs) -> None:
        """Form the gradient of pairs, and add it to the gradients that other uses of the parameters have left."""
        weight, *bias = self._parameters
        classes, rows, elements = row_grad(
            merged, weight.shape[0], weight.dtype, with_rows=True, with_bias=bool(bias), padded=False
        )
        for p, values in zip(self._parameters, (rows, elements), strict=False):
            own = coo(classes, values, tuple(p.shape), True)
            p.grad = own if p.grad is None else p.grad + own

    def _factor(self) -> float:
        """Factor of all gradients before clipping: the mean over processes, unscaled."""
        size = 1 if self.process_group is None else dist.get_world_size(self.process_group)
        return 1 / size if self.grad_scaler is None else 1 / (size * self.grad_scaler.get_scale())

    def _scale(self, norm: Tensor | None) -> Tensor | None:
        """Factor [1] by which the kernels multiply all gradients, clipping included; None if it is 1."""
        weight, factor = self._parameters[0], self._factor()
        compute = compute_dtype(weight.dtype)
        if norm is not None and self.max_norm is not None:
            return (factor * (self.max_norm / (norm + 1e-6)).clamp(max=1)).to(compute)
        return None if factor == 1 else torch.full((1,), factor, dtype=compute, device=weight.device)

    def _norm(self, merged: GradientPairs | None) -> Tensor:
        """Norm, float64 [1], of the gradient of pairs, or without any of the parameters' gradients together."""
        if merged is not None:
            weight, *bias = self._parameters
            return row_grad_norm(merged, weight.shape[0], with_rows=True, with_bias=bool(bias)).sqrt()
        rows = [rows_of(p.grad)[1].double() for p in self._parameters if p.grad is not None]
        norm: Tensor = torch.stack([values.norm() for values in rows]).norm()
        return norm.reshape(1)


def fuse(weight: nn.Parameter, bias: nn.Parameter | None, optimizer: Any, **options: Any) -> FusedStep:
    """Check the arguments of ``loss_fn.fuse_optimizer``, and make the handle that it returns."""
    if not isinstance(optimizer, RowOptimizer):
        raise TypeError(
            f"optimizer must be one of nce_ext.optim, got {type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        if not any(p is q for group in optimizer.param_groups for q in group["params"]):
            raise ValueError(f"optimizer must have the loss's {name} among its parameters")
        if not p.requires_grad:
            raise ValueError(f"{name} must require a gradient to be stepped on")
    max_norm, grad_scaler = options["max_norm"], options["grad_scaler"]
    _checks.count("accumulate", options["accumulate"], 1)
    if max_norm is not None and _checks.number("max_norm", max_norm, 0) == 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {describe(grad_scaler)}")
    if options["hogwild"]:
        _check_hogwild(weight, bias, optimizer, options)
    return FusedStep(weight, bias, optimizer, **options)


def _check_hogwild(weight: Tensor, bias: Tensor | None, optimizer: RowOptimizer, options: dict[str, Any]) -> None:
    """Refuse all that the racy step does not do: anything but plain SGD on float32 in one process."""
    if not isinstance(optimizer, SGD):
        raise ValueError(f"optimizer must be SGD with hogwild=True, got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        if any(p is weight or p is bias for p in group["params"]):
            for name in ("momentum", "weight_decay", "maximize"):
                if group[name]:
                    raise ValueError(f"{name} must be 0 or False with hogwild=True, got {group[name]!r}")
    if weight.dtype != torch.float32:
        raise ValueError(f"weight must be float32 with hogwild=True, got {weight.dtype}")
    for name in ("max_norm", "process_group", "grad_scaler"):
        if options[name] is not None:
            raise ValueError(f"{name} must be None with hogwild=True, got {options[name]!r}")
