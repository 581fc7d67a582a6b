"""Base class of the optimizers of nce_ext.optim: which parameters are stepped by rows, and where their state lives."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nce_ext import _private_torch
from nce_ext._ops.row_grad import coalesce
from nce_ext._ops.row_step import row_step_
from nce_ext._ops.sample import draw_seed
from nce_ext._tables.pages import empty_table
from nce_ext.optim.row_state import (
    NARROW,
    OF_ROWS,
    Kept,
    adopt,
    counted,
    flag,
    is_zero,
    no_decay_yet,
    shaped,
    stepped_by_rows,
    touches,
    wide,
)  # fmt: skip
from nce_ext.reference.dtypes import compute_dtype
from nce_ext.reference.row_step import SGD, Hyperparameters, RowState, RowStep

ROUNDINGS = ("stochastic", "nearest", "master")
BIAS_CORRECTIONS = ("row", "global")


class RowOptimizer(torch.optim.Optimizer):
    """Optimizer of torch that also takes parameters whose gradients are row-sparse COO tensors.

    A parameter is stepped by rows from its first sparse gradient on, and from then on by dense gradients too, which
    touch every row. All other parameters are stepped by torch's own code. Subclasses name this class before torch's.

    ``state_dict`` has the same entries for both kinds, tensors of the parameter's shape, of one number a row or of no
    dimension. So has the state of a parameter whose first gradient is dense, until the second: what a step on zeros has
    made, as torch.distributed.checkpoint does, takes the state of either kind.
    """

    _dense_optimizer: type[torch.optim.Optimizer] | None = None  # whose step serves the other parameters
    _dense_steps_count = True  # whether torch's state has "step"
    _step_supports_amp_scaling: bool
    _one_number_a_row = False  # whether the rule's states are [V], and not of the parameter's shape

    def _options_of_rows(self, rounding: str, generator: torch.Generator | None, **more: Any) -> None:
        """Complete the constructor of torch's optimizer by options that it does not know."""
        check_options({"rounding": rounding, **more})
        self._generator = generator
        self._row_defaults = {"rounding": rounding, **more}
        self.defaults.update(self._row_defaults)
        for group in self.param_groups:
            for name, value in self._row_defaults.items():
                group.setdefault(name, value)
            for p in group["params"]:
                if self.state.get(p):  # torch's Adagrad has it from the start, in the parameter's type
                    self._present(group, p, fresh=True)
                    for table in self._tables(group):
                        if table in self.state[p] and p.dtype in NARROW:
                            self.state[p][table] = self._fresh(group, p, torch.float32)
        # Or GradScaler would leave the scaling of gradients to a fused optimizer, which does it for dense ones alone.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            check_options(param_group)
        super().add_param_group(param_group)

    # The rule, of which a subclass overrides what differs from plain SGD.

    def _hyperparameters(self, group: dict[str, Any], state: dict[str, Any]) -> Hyperparameters:
        """Collect what the next step takes besides tensors; ``state["step"]`` counts it already."""
        raise NotImplementedError

    def _tables(self, group: dict[str, Any]) -> tuple[str | None, str | None]:
        """Name the first and the second state of the rule in the optimizer's state; None where it has none."""
        raise NotImplementedError

    def _counts_touches(self, group: dict[str, Any]) -> bool:
        """Tell whether the rule depends on how often a row has been touched."""
        return False

    def _decays(self, group: dict[str, Any]) -> bool:
        """Tell whether the rule has decoupled decay."""
        return False

    def _decay(self, group: dict[str, Any]) -> float:
        """Compute the share of a weight that decoupled decay takes in a step."""
        return float(group["lr"]) * float(group["weight_decay"]) if self._decays(group) else 0.0

    def _refusal(self, group: dict[str, Any]) -> str | None:
        """Say why parameters of a group cannot be stepped by rows; None if they can."""
        return "differentiable must be False for sparse gradients, got True" if group.get("differentiable") else None

    def _initial(self, group: dict[str, Any]) -> float:
        """Choose the value of all elements of a new state."""
        return 0.0

    def _shape(self, p: Tensor) -> torch.Size:
        """Choose the shape of the rule's states."""
        return p.shape[:1] if self._one_number_a_row else p.shape

    # Stepping.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on every parameter that has a gradient; sparse gradients are coalesced first if they are not."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_rows, presented, new = [], [], []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state.get(p)
                if self._steps_by_rows(p, state):
                    by_rows.append((group, p))
                elif state is None:
                    new.append((group, p))
                elif "by_rows" in state:
                    presented.append((p, state))
                    if self._is_first(state):
                        new.append((group, p))
        for group, p in by_rows:
            self._check(group, p)
        for p, state in presented:
            self._return_to_torch(p, state)
        gradients = [p.grad for _, p in by_rows]
        try:
            for _, p in by_rows:
                p.grad = None
            self._step_dense()
        finally:
            for (_, p), gradient in zip(by_rows, gradients, strict=True):
                p.grad = gradient
        for group, p in new:
            self._present(group, p, fresh=self._is_on_nothing(group, p))
        for group, p in by_rows:
            classes, rows = rows_of(p.grad)
            row_step_(self._prepare(group, p), classes, rows)
        return loss

    def _steps_by_rows(self, p: Tensor, state: dict[str, Any] | None) -> bool:
        """Tell whether a parameter with a gradient is stepped by rows, and not by torch."""
        return p.grad.is_sparse or stepped_by_rows(state)  # type: ignore[union-attr]

    def _step_dense(self) -> None:
        """Run torch's step on the parameters that have a gradient now."""
        if self._dense_optimizer is not None:
            # torch wraps a class's step in a function that calls the optimizer's hooks, and within that in one that
            # switches autograd on or off. Hooks were called for this class's step, so torch's is run without wrappers.
            with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
                inspect.unwrap(self._dense_optimizer.step)(self)

    def _check(self, group: dict[str, Any], p: Tensor) -> None:
        """Refuse a parameter, or the gradient that it has, which cannot be stepped by rows."""
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
        """Count a step that was checked, and collect what it needs; states that are missing are made."""
        state = self.state[p]
        weight = as_rows(p)
        self._complete(group, p, state)
        state["step"] += 1
        decay = self._decay(group)
        if "decayed" in state and decay:
            state["log_decay"] += math.log1p(-decay)
        return RowStep(
            weight, self._row_state(group, p, state, weight), self._hyperparameters(group, state),
            self._seed(group, weight, state),
        )  # fmt: skip

    def _seed(self, group: dict[str, Any], weight: Tensor, state: dict[str, Any]) -> Tensor | None:
        """Draw the seed of stochastic rounding; None where the weight is not rounded at random."""
        if weight.dtype not in NARROW or group["rounding"] != "stochastic" or "master" in state:
            return None
        return draw_seed(weight.device, self._generator)

    def _row_state(self, group: dict[str, Any], p: Tensor, state: dict[str, Any], weight: Tensor) -> RowState:
        """Collect the tensors of a parameter's state in the form that a step takes, [V, D] and [V]."""
        first, second = (None if name is None else state[name] for name in self._tables(group))
        if p.dim() == 2:
            return RowState(first, second, state.get("row_step"), state.get("decayed"), state.get("master"))
        of_weight, of_rows = weight.shape, weight.shape[:1]
        of_tables = of_rows if self._one_number_a_row else of_weight
        return RowState(
            shaped(first, of_tables), shaped(second, of_tables), shaped(state.get("row_step"), of_rows),
            shaped(state.get("decayed"), of_rows), shaped(state.get("master"), of_weight),
        )  # fmt: skip

    def _complete(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Make the states that a step by rows needs and that are missing: fresh, or out of torch's dense ones."""
        if not stepped_by_rows(state):
            self._begin_rows(group, p, state)
        compute, shape = compute_dtype(p.dtype), self._shape(p)
        for name in self._tables(group):
            if name is None:
                continue
            table = state.get(name)
            if table is None:
                state[name] = self._fresh(group, p, compute)
            elif table.dtype != compute or table.shape != shape or not table.is_contiguous():
                state[name] = table.to(compute).reshape(shape).contiguous()
        if self._counts_touches(group) and "row_step" not in state:
            state["row_step"] = touches(p, 0)
        if self._decays(group) and "decayed" not in state:
            state.update(no_decay_yet(p))
        if p.dtype in NARROW and group["rounding"] == "master" and "master" not in state:
            state["master"] = wide(p)

    def _begin_rows(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Make a state that a sparse gradient continues out of torch's, or of none."""
        for name in OF_ROWS:
            state.pop(name, None)
        step = state.get("step", 0.0)
        state["by_rows"], state["step"] = flag(True), counted(step)
        if self._counts_touches(group) and any(name and state.get(name) is not None for name in self._tables(group)):
            state["row_step"] = touches(p, max(int(step), 1))  # torch's SGD does not count

    # States of parameters that no sparse gradient has reached.

    def _entries_of_rows(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        """Make what a state of rows has and torch's has not, for a parameter that torch steps; {} if only torch can."""
        if type(p) not in (Tensor, torch.nn.Parameter) or not p.is_floating_point() or self._refusal(group):
            return {}
        entries = {"by_rows": flag(False)}
        if not self._dense_steps_count:
            entries["step"] = counted(0)
        if self._counts_touches(group):
            entries["row_step"] = touches(p, 0)
        if self._decays(group):
            entries.update(no_decay_yet(p))
        if p.dtype in NARROW and group["rounding"] == "master":
            entries["master"] = p.detach()  # no memory
        return entries

    def _present(self, group: dict[str, Any], p: Tensor, *, fresh: bool) -> None:
        """Complete a state that torch has just made, so that one of rows can be loaded into it.

        A ``fresh`` one, which has seen no gradient or one of zeros, is float32 also for 16 bits, as that of rows is.
        """
        entries = self._entries_of_rows(group, p)
        if not entries:
            return
        state = self.state[p]
        state.update(entries)
        if fresh and p.dtype in NARROW:
            for name in (*self._tables(group), "master"):
                if name in state:
                    state[name] = wide(state[name])

    def _is_first(self, state: dict[str, Any]) -> bool:
        """Tell whether a state that :meth:`_present` has completed has seen no step."""
        return self._dense_steps_count and is_zero(state["step"])

    def _is_on_nothing(self, group: dict[str, Any], p: Tensor) -> bool:
        """Tell whether a step on 16 bits is of the kind that torch.distributed.checkpoint makes states by."""
        return p.dtype in NARROW and is_zero(group["lr"]) and not bool(p.grad.any())  # type: ignore[union-attr]

    def _return_to_torch(self, p: Tensor, state: dict[str, Any]) -> None:
        """Undo :meth:`_present`: another dense gradient has come."""
        for name in OF_ROWS if self._dense_steps_count else (*OF_ROWS, "step"):
            state.pop(name, None)
        if p.dtype in NARROW:
            for name, value in state.items():
                if name != "step" and isinstance(value, Tensor):
                    state[name] = value.to(p.dtype)

    @torch.inference_mode(False)
    def _fresh(self, group: dict[str, Any], p: Tensor, dtype: torch.dtype) -> Tensor:
        """Make a state that no step has changed yet."""
        shape = self._shape(p)
        table = empty_table(math.prod(shape[:1]), math.prod(shape[1:]), p.device, dtype)
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
                if "decayed" not in state or not stepped_by_rows(state):
                    continue
                weight = as_rows(p)
                nothing = weight.new_zeros((1, weight.shape[1])).expand_as(weight)
                _, _, _, decayed, master = self._row_state(group, p, state, weight)
                only_decay = RowState(decayed=decayed, master=master)
                hyperparameters = Hyperparameters(SGD, 1, 0.0, log_decay=float(state["log_decay"]))
                step = RowStep(weight, only_decay, hyperparameters, self._seed(group, weight, state))
                row_step_(step, None, nothing)

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict, in which dense parameters have the entries of those that are stepped by rows."""
        state_dict = super().state_dict()
        state = dict(state_dict["state"])
        parameters = ((group, p) for group in self.param_groups for p in group["params"])
        for number, (group, p) in enumerate(parameters):
            if "by_rows" not in state.get(number, ("by_rows",)):
                state[number] = {**state[number], **self._entries_of_rows(group, p)}
        return {**state_dict, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but leave the states of rows their dtypes: only their device is the parameter's.

        The state of torch's optimizer of the same name is accepted, too; all rows then count as touched at every step.
        """
        state = {
            number: {
                name: Kept(value) if isinstance(value, Tensor) and name != "step" else value
                for name, value in of_parameter.items()
            }
            if isinstance(of_parameter, dict) and "by_rows" in of_parameter
            else of_parameter
            for number, of_parameter in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.__dict__.get("_row_defaults", {}).items():
                group.setdefault(name, value)
        for p, of_parameter in self.state.items():
            if "by_rows" in of_parameter:
                self._adopt(p, of_parameter)

    def _adopt(self, p: Tensor, state: dict[str, Any]) -> None:
        """Give the entries of a loaded state the types and shapes that a step expects."""
        adopt(p, state, self._shape(p))


def check_options(group: dict[str, Any]) -> None:
    """Refuse a parameter group's options that torch's optimizer does not know."""
    if group.get("rounding", "nearest") not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, ROUNDINGS))}, got {group['rounding']!r}")
    if group.get("bias_correction", "row") not in BIAS_CORRECTIONS:
        raise ValueError(f"bias_correction must be 'row' or 'global', got {group['bias_correction']!r}")


def as_rows(p: Tensor) -> Tensor:
    """View a parameter, without autograd, as rows [V, D]: those of its first dimension."""
    if p.dim() < 2:
        return p.detach().view(-1, 1)
    return p.detach() if p.dim() == 2 else p.detach().view(p.shape[0], math.prod(p.shape[1:]))


def rows_of(gradient: Tensor) -> tuple[Tensor | None, Tensor]:
    """Split a gradient into classes [U], ascending, each once, and rows [U, D]; None in place of all classes."""
    if not gradient.is_sparse:
        return None, as_rows(gradient.contiguous())
    gradient = coalesce(gradient)
    return _private_torch.coo_classes(gradient).contiguous(), as_rows(_private_torch.coo_rows(gradient).contiguous())
