"""What the optimizers of nce_ext.optim share: which parameters are stepped by rows, and where their state lives."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nce_ext import _private_torch
from nce_ext._ops.row_grad import coalesce
from nce_ext._ops.row_step import row_step_
from nce_ext._ops.sample import draw_seed
from nce_ext._tables.pages import empty_table
from nce_ext.reference.dtypes import compute_dtype
from nce_ext.reference.row_step import SGD, Hyperparameters, RowState, RowStep

ROUNDINGS = ("stochastic", "nearest", "master")
BIAS_CORRECTIONS = ("row", "global")
_NARROW = (torch.bfloat16, torch.float16)


@dataclass
class _Kept:
    """A tensor that torch's load_state_dict is to leave as it is: what is iterable it takes apart."""

    tensor: Tensor


class RowOptimizer(torch.optim.Optimizer):
    """An optimizer of torch that also takes parameters whose gradients are row-sparse COO tensors.

    A parameter is stepped by rows from its first sparse gradient on, and then by dense gradients too, which touch every
    row; all others are torch's own affair. Subclasses put this class before torch's.
    """

    _dense_optimizer: type[torch.optim.Optimizer] | None = None  # whose step serves the other parameters

    def _options_of_rows(self, rounding: str, generator: torch.Generator | None, **more: Any) -> None:
        """Complete the constructor: options that torch's optimizer does not know."""
        check_options({"rounding": rounding, **more})
        self._generator = generator
        self._row_defaults = {"rounding": rounding, **more}
        self.defaults.update(self._row_defaults)
        for group in self.param_groups:
            for name, value in self._row_defaults.items():
                group.setdefault(name, value)
        # Or GradScaler would leave the scaling of gradients to a fused optimizer, which does it for dense ones alone.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            check_options(param_group)
        super().add_param_group(param_group)

    # What a subclass says of its rule.

    def _hyperparameters(self, group: dict[str, Any], state: dict[str, Any]) -> Hyperparameters:
        raise NotImplementedError

    def _tables(self, group: dict[str, Any]) -> tuple[str | None, str | None]:
        """Names of the first and the second state of every element."""
        raise NotImplementedError

    def _counts_touches(self, group: dict[str, Any]) -> bool:
        return False

    def _decay(self, group: dict[str, Any]) -> float:
        """Decoupled decay, times the learning rate."""
        return 0.0

    def _refusal(self, group: dict[str, Any]) -> str | None:
        """Why a parameter of this group cannot be stepped by rows."""
        return "differentiable must be False for sparse gradients, got True" if group.get("differentiable") else None

    def _initial(self, group: dict[str, Any]) -> float:
        """What the states of every element begin with."""
        return 0.0

    # Stepping.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; sparse ones are coalesced first if they are not."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_rows = [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and self._steps_by_rows(p)
        ]
        for group, p in by_rows:
            self._check(group, p)
        gradients = [p.grad for _, p in by_rows]
        try:
            for _, p in by_rows:
                p.grad = None
            self._step_dense()
        finally:
            for (_, p), gradient in zip(by_rows, gradients, strict=True):
                p.grad = gradient
        for group, p in by_rows:
            classes, rows = rows_of(p.grad)
            row_step_(self._prepare(group, p), classes, rows)
        return loss

    def _steps_by_rows(self, p: Tensor) -> bool:
        return p.grad.is_sparse or bool(self.state.get(p, {}).get("by_rows"))  # type: ignore[union-attr]

    def _step_dense(self) -> None:
        if self._dense_optimizer is not None:
            # torch wraps the step of a class once it has an instance, to call the hooks; they are to be called once.
            # Within that wrapper is the one that switches autograd on or off.
            with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
                inspect.unwrap(self._dense_optimizer.step)(self)

    def _check(self, group: dict[str, Any], p: Tensor) -> None:
        why = self._refusal(group)
        if why is not None:
            raise ValueError(why)
        if p.grad is not None and p.grad.is_sparse and p.grad.sparse_dim() != 1:
            raise ValueError(
                f"gradient must be dense or sparse in its first dimension alone, got {p.grad.sparse_dim()} sparse "
                f"dimensions for a parameter of shape {list(p.shape)}"
            )
        if not p.is_floating_point():
            raise TypeError(f"parameter must be of a real floating-point type for sparse gradients, got {p.dtype}")
        if p.grad is not None and p.grad.dtype != p.dtype:
            raise TypeError(f"gradient must be of its parameter's type {p.dtype}, got {p.grad.dtype}")
        if p.numel() and p.dim() and not (p[0].is_contiguous() and (len(p) == 1 or p.stride(0) >= p[0].numel())):
            raise ValueError(
                f"parameter must have contiguous rows for sparse gradients, got strides {list(p.stride())} for shape "
                f"{list(p.shape)}"
            )
        if not self._decay(group) < 1:
            raise ValueError(f"lr * weight_decay must be below 1, got {self._decay(group)}")

    def _prepare(self, group: dict[str, Any], p: Tensor) -> RowStep:
        """Count the step, and make what it needs; from here on nothing can fail."""
        state = self.state[p]
        weight = as_rows(p)
        self._complete(group, p, state, weight)
        state["step"] += 1
        decay = self._decay(group)
        if "decayed" in state and decay:
            state["log_decay"] += math.log1p(-decay)
        return RowStep(
            weight, self._row_state(group, state), self._hyperparameters(group, state), self._seed(group, weight, state)
        )

    def _seed(self, group: dict[str, Any], weight: Tensor, state: dict[str, Any]) -> Tensor | None:
        if weight.dtype not in _NARROW or group["rounding"] != "stochastic" or "master" in state:
            return None
        return draw_seed(weight.device, self._generator)

    def _row_state(self, group: dict[str, Any], state: dict[str, Any]) -> RowState:
        first, second = (None if name is None else state[name] for name in self._tables(group))
        return RowState(first, second, state.get("row_step"), state.get("decayed"), state.get("master"))

    def _complete(self, group: dict[str, Any], p: Tensor, state: dict[str, Any], weight: Tensor) -> None:
        """State of a parameter that is new to rows: fresh, or continued from torch's dense state."""
        compute = compute_dtype(p.dtype)
        if not state.get("by_rows") and p.dtype in _NARROW and state.get("step") == 0:
            state.clear()  # torch's Adagrad makes its sum at once, rounded
        continued = any(name is not None and state.get(name) is not None for name in self._tables(group))
        if not state.get("by_rows"):
            state["by_rows"] = True
            state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).cpu().clone()
        for name in self._tables(group):
            if name is None:
                continue
            if state.get(name) is None:
                state[name] = self._fresh(group, weight, compute)
            else:
                state[name] = state[name].to(compute).reshape(self._shape(weight)).contiguous()
        if self._counts_touches(group) and "row_step" not in state:
            touches = max(int(state["step"]), 1) if continued else 0  # torch's SGD does not count
            state["row_step"] = torch.full(weight.shape[:1], touches, dtype=torch.int32, device=p.device)
        if self._decay(group) and "decayed" not in state:
            state["log_decay"] = 0.0
            state["decayed"] = torch.zeros(weight.shape[0], dtype=torch.float64, device=p.device)
        if p.dtype in _NARROW and group["rounding"] == "master" and "master" not in state:
            state["master"] = weight.float()

    def _shape(self, weight: Tensor) -> tuple[int, ...]:
        """Of the tables."""
        return tuple(weight.shape)

    def _fresh(self, group: dict[str, Any], weight: Tensor, dtype: torch.dtype) -> Tensor:
        shape = self._shape(weight)
        table = empty_table(shape[0], math.prod(shape[1:]), weight.device, dtype)
        return table.fill_(self._initial(group)).view(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_generator": self._generator, "_row_defaults": self._row_defaults}

    @torch.no_grad()
    def catch_up(self) -> None:
        """Apply the decoupled decay that rows have missed since they were last touched.

        A row that is touched is brought up to date by the step itself. Call this before the weights are read as a
        whole: to evaluate, to save, to average. Costs O(V D); without decoupled decay there is nothing to do.
        """
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "decayed" not in state:
                    continue
                weight = as_rows(p)
                nothing = weight.new_zeros((1, weight.shape[1])).expand_as(weight)
                only_decay = RowState(decayed=state["decayed"], master=state.get("master"))
                hyperparameters = Hyperparameters(SGD, 1, 0.0, log_decay=state["log_decay"])
                step = RowStep(weight, only_decay, hyperparameters, self._seed(group, weight, state))
                row_step_(step, None, nothing)

    # Saving and loading.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state of rows keeps its own types: it moves to the parameter's device alone.

        A state of torch's optimizer of the same name is taken too: all rows then count as touched at every step.
        """
        state = {
            index: {
                name: _Kept(value) if isinstance(value, Tensor) and name != "step" else value
                for name, value in of_parameter.items()
            }
            if isinstance(of_parameter, dict) and of_parameter.get("by_rows")
            else of_parameter
            for index, of_parameter in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.__dict__.get("_row_defaults", {}).items():
                group.setdefault(name, value)
        for p, of_parameter in self.state.items():
            if not of_parameter.get("by_rows"):
                continue
            of_parameter["step"] = torch.as_tensor(of_parameter["step"], dtype=torch.float32).cpu().clone()
            for name, value in of_parameter.items():
                if isinstance(value, _Kept):
                    of_parameter[name] = self._place(p, name, value.tensor)
            if p.dtype not in _NARROW:
                of_parameter.pop("master", None)

    @staticmethod
    def _place(p: Tensor, name: str, value: Tensor) -> Tensor:
        exact = not value.is_floating_point() or name in ("decayed", "master")
        return value.to(p.device, value.dtype if exact else compute_dtype(p.dtype))


def check_options(group: dict[str, Any]) -> None:
    if group.get("rounding", "nearest") not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, ROUNDINGS))}, got {group['rounding']!r}")
    if group.get("bias_correction", "row") not in BIAS_CORRECTIONS:
        raise ValueError(f"bias_correction must be 'row' or 'global', got {group['bias_correction']!r}")


def as_rows(p: Tensor) -> Tensor:
    """A parameter as rows [V, D]: those of its first dimension."""
    if p.dim() < 2:
        return p.detach().view(-1, 1)
    return p.detach() if p.dim() == 2 else p.detach().view(p.shape[0], math.prod(p.shape[1:]))


def rows_of(gradient: Tensor) -> tuple[Tensor | None, Tensor]:
    """Classes [U], or None for all, and rows [U, D] of a gradient."""
    if not gradient.is_sparse:
        return None, as_rows(gradient.contiguous())
    gradient = coalesce(gradient)
    return _private_torch.coo_classes(gradient).contiguous(), as_rows(_private_torch.coo_rows(gradient).contiguous())
