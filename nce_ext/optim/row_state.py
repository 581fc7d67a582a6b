"""State of a parameter that is stepped by rows: what it has beyond torch's, and how it is loaded.

``by_rows``: whether a sparse gradient has begun it; ``step``: of the whole parameter; ``row_step`` [V]: touches of a
row; ``decayed`` [V] and ``log_decay``: of decoupled decay; ``master``: the 16-bit weight in full. All are tensors, and
those without a dimension are on the CPU, so that a step reads them without waiting for a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nce_ext.reference.dtypes import compute_dtype

OF_ROWS = ("by_rows", "row_step", "decayed", "log_decay", "master")  # what torch's states do not have
NARROW = (torch.bfloat16, torch.float16)


@dataclass
class Kept:
    """Wrapper that takes a tensor through torch's ``load_state_dict`` unchanged.

    torch casts every tensor of a state to its parameter's dtype, and rebuilds whatever can be iterated over.
    """

    tensor: Tensor


def adopt(p: Tensor, state: dict[str, Any], shape: torch.Size) -> None:
    """Give the entries of a state, also of an earlier version's, the types and shapes that a step expects.

    Args:
        shape: of the rule's own states.
    """
    for name, value in state.items():
        if isinstance(value, Kept):
            state[name] = value.tensor
    by_rows = bool(state["by_rows"])
    state["by_rows"] = flag(by_rows)
    if "log_decay" in state:
        state["log_decay"] = decay_sum(state["log_decay"])
    if by_rows:
        state["step"] = counted(state["step"])
    for name, value in state.items():
        if isinstance(value, Tensor) and name not in ("step", "by_rows", "log_decay"):
            state[name] = _place(p, name, value, shape, by_rows=by_rows)
    if p.dtype not in NARROW:
        state.pop("master", None)
    elif "master" in state and not by_rows:
        state["master"] = p.detach()


def _place(p: Tensor, name: str, value: Tensor, shape: torch.Size, *, by_rows: bool) -> Tensor:
    """Move a state to the device of its parameter, to the dtype that steps compute in, and into its shape."""
    of_rows = name in ("row_step", "decayed")
    shape = p.shape[:1] if of_rows else p.shape if name == "master" else shape
    exact = of_rows or name == "master" or not value.is_floating_point()
    torch_steps = not by_rows and p.dtype in NARROW and value.dtype in NARROW
    value = value.to(p.device, value.dtype if exact else p.dtype if torch_steps else compute_dtype(p.dtype))
    return value.reshape(shape) if value.numel() == math.prod(shape) else value


def stepped_by_rows(state: dict[str, Any] | None) -> bool:
    """Tell whether a parameter's state is one of rows, which a sparse gradient has begun."""
    return bool(state) and bool(state.get("by_rows", False))  # type: ignore[union-attr]


# What is made in inference mode could not be changed outside of it.


@torch.inference_mode(False)
def flag(value: bool) -> Tensor:
    """Make an entry ``by_rows``."""
    return torch.tensor(value, device="cpu")


@torch.inference_mode(False)
def counted(step: float | Tensor) -> Tensor:
    """Make an entry ``step``, on the CPU."""
    return torch.as_tensor(step, dtype=torch.float32, device="cpu").clone()


@torch.inference_mode(False)
def wide(weight: Tensor) -> Tensor:
    """Make an entry ``master``, or another in the type that steps on 16 bits compute in."""
    return weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


@torch.inference_mode(False)
def touches(p: Tensor, count: int) -> Tensor:
    """Make an entry ``row_step``."""
    return torch.full(p.shape[:1], count, dtype=torch.int32, device=p.device)


@torch.inference_mode(False)
def decay_sum(value: float | Tensor) -> Tensor:
    """Make an entry ``log_decay``, on the CPU."""
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


@torch.inference_mode(False)
def no_decay_yet(p: Tensor) -> dict[str, Tensor]:
    """Make the entries of decoupled decay: its sum over all steps, on the CPU, and that at each row's last touch."""
    return {
        "log_decay": decay_sum(0),
        "decayed": torch.zeros(p.shape[:1], dtype=torch.float64, device=p.device),
    }


def is_zero(number: float | Tensor) -> bool:
    """Tell whether a number is 0, as far as that is known without waiting for a device."""
    return not (isinstance(number, Tensor) and number.device.type != "cpu") and float(number) == 0


def shaped(value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """View a state in another shape."""
    return value if value is None or value.shape == shape else value.view(shape)
