"""Refusals: every argument is checked before any work, in the order device, dtype, layout, rank, size, range.

Each message names the argument, says what is allowed and what was got.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nce_ext._ops import library as _library

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_CLASSES = 2**31 - 1


class Law(Protocol):
    """What the checks need of a noise distribution."""

    n_classes: int
    table: Tensor

    def log_prob(self, ids: Tensor) -> Tensor: ...


T = TypeVar("T")
LawT = TypeVar("LawT", bound=Law)


def describe(value: object) -> str:
    """What a wrong argument is, for an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__


def instance(name: str, value: object, cls: type[T], wanted: str) -> T:
    """Refuse a value that is no ``cls``, which the message calls ``wanted``."""
    if not isinstance(value, cls):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}")
    return value


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def count(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in {low} .. {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value  # type: ignore[return-value]


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not (low <= value <= high and math.isfinite(value)):
        bounds = "finite" if low == -math.inf else f"in {low} .. {high}" if high < math.inf else f"finite and >= {low}"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")
    return value


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> Tensor:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {names} tensor, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on hidden's device {device}, got {value.device}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be a {names} tensor, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {value.layout}")
    return value


def pinned(name: str, value: object, allowed: str) -> None:
    """A tensor must be in host memory that CUDA can read. While tracing that is for the operator to see."""
    if not isinstance(value, Tensor):  # tensor() says so
        return
    if value.device.type != "cpu":
        raise ValueError(f"{name} must be {allowed}, got {value.device}")
    if not (torch.compiler.is_compiling() or value.is_pinned()):
        raise ValueError(f"{name} must be {allowed}, got pageable memory on cpu")


def operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, host_weight: bool = False) -> None:
    """``host_weight``: with hidden on CUDA, weight and bias may be in pinned host memory."""
    tensor("hidden", hidden, FLOATS)
    device: torch.device | None = hidden.device
    if host_weight and hidden.device.type == "cuda" and getattr(weight, "device", hidden.device) != hidden.device:
        device = None
        pinned("weight", weight, f"on hidden's device {hidden.device} or in pinned host memory (weight.pin_memory())")
        pinned("bias", bias, "in pinned host memory (bias.pin_memory()), as weight is")
    tensor("weight", weight, FLOATS, device)
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"hidden and weight must both be float64 or neither, got {hidden.dtype} and {weight.dtype}")
    if bias is not None:
        tensor("bias", bias, (weight.dtype,), device)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [n_classes, D], got shape {list(weight.shape)}")
    if hidden.dim() < 1:
        raise ValueError("hidden must be [..., D], got a scalar")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have weight's D = {weight.shape[1]} as its last size, got shape {list(hidden.shape)}"
        )
    if weight.shape[1] < 1 or weight.shape[0] < 1:
        raise ValueError(f"weight must have at least one row and one column, got shape {list(weight.shape)}")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(
            f"weight must have rows with stride 1 between elements, got strides {weight.stride()}; "
            "store it as [n_classes, D] (a transposed view would touch all of it on every step)"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        got = f"shape {list(bias.shape)} with strides {list(bias.stride())}"
        raise ValueError(f"bias must be contiguous of shape [{weight.shape[0]}], got {got}")


def noise_of(noise: object, cls: type[LawT], weight: Tensor, device: torch.device | None = None) -> LawT:
    """``device``: hidden's, if that is not weight's."""
    noise = instance("noise", noise, cls, "an nce_ext.noise distribution")
    device = device or weight.device
    if noise.table.device != device:
        raise ValueError(f"noise must be on hidden's device {device}, got {noise.table.device}; use noise.to()")
    if noise.n_classes != weight.shape[0]:
        raise ValueError(f"noise must have weight's {weight.shape[0]} classes, got {noise.n_classes}")
    return noise


def batch_shaped(name: str, value: Tensor, lead: torch.Size, extra: int | None, symbol: str = "k") -> None:
    """A tensor must be hidden's leading sizes, or those and one more dimension."""
    wanted = list(lead) if extra is None else [*lead, extra]
    if list(value.shape) != wanted:
        raise ValueError(
            f"{name} must have shape {wanted} for hidden of leading sizes {list(lead)}, got {list(value.shape)}"
        )


def ids(
    target: Tensor,
    negatives: Tensor | None,
    noise: Law,
    ignore_index: int,
    subtract_log_q: bool,
    log_q: tuple[Tensor, Tensor] | None,
) -> None:
    """Values: on the CPU always, on CUDA under set_debug(True), while tracing never (the kernel does)."""
    if torch.compiler.is_compiling() or not (target.device.type == "cpu" or _library.debug_enabled()):
        return
    candidates = [("target", target, target != ignore_index, f" or ignore_index = {ignore_index}")]
    if negatives is not None:
        candidates.append(("negatives", negatives, torch.ones_like(negatives, dtype=torch.bool), ""))
    for i, (name, values, present, otherwise) in enumerate(candidates):
        bad = present & ((values < 0) | (values >= noise.n_classes))
        if bad.any():
            where = bad.nonzero()[0].tolist()
            got = int(values[tuple(where)])
            raise ValueError(f"{name} must be in 0 .. {noise.n_classes - 1}{otherwise}, got {got} at index {where}")
        if not subtract_log_q:
            continue
        if log_q is None:
            bad = present & torch.isinf(noise.log_prob(torch.where(present, values, 0)))
            why = "classes that the noise can draw, got class {} with count 0 at index {}; give it a count, or use "
            why = f"{name} must be {why}correction='none'"
        else:
            bad = ~torch.isfinite(log_q[i]) & (present if i == 0 else True)
            values, why = log_q[i], f"log_q[{i}] must be finite, got {{}} at index {{}}"
        if bad.any():
            where = bad.nonzero()[0].tolist()
            raise ValueError(why.format(values[tuple(where)].item(), where))


def check_n_classes(n_classes: int) -> int:
    if isinstance(n_classes, bool) or not isinstance(n_classes, int):
        raise TypeError(f"n_classes must be an int, got {describe(n_classes)}")
    if not 1 <= n_classes <= MAX_CLASSES:
        raise ValueError(f"n_classes must be in 1 .. 2^31 - 1, got {n_classes}")
    return n_classes


def check_seed(seed: Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor of shape [2], got {describe(seed)}")
    if seed.device != device:
        raise ValueError(f"seed must be on {device}, got {seed.device}")
    if seed.shape != (2,):
        raise ValueError(f"seed must have shape [2], got {list(seed.shape)}")
    return seed


def check_ids(ids: Tensor, n_classes: int, ignore_index: int | None = None) -> None:
    """The type always, the range on the CPU: on CUDA one would have to wait for it."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be an int64 or int32 tensor, got {describe(ids)}")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    if ignore_index is not None:
        ids = torch.where(ids == ignore_index, 0, ids)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_classes:
        otherwise = "" if ignore_index is None else f" or ignore_index = {ignore_index}"
        raise ValueError(f"ids must be in 0 .. {n_classes - 1}{otherwise}, got {low if low < 0 else high}")


def check_power(power: object) -> float:
    if not isinstance(power, (int, float)) or not math.isfinite(power) or power < 0:
        raise ValueError(f"power must be a finite number >= 0, got {power!r}")
    return float(power)


def check_counts(counts: Any) -> Tensor:
    try:
        # numpy reads Python numbers as float64; torch would make them float32.
        weights = torch.as_tensor(counts if isinstance(counts, Tensor) else np.asarray(counts))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"counts must be a 1-D tensor, array or sequence of numbers ({error})") from None
    if weights.is_complex() or weights.is_sparse:
        raise TypeError(f"counts must be dense real numbers, got {describe(weights)}")
    if weights.dim() != 1:
        raise ValueError(f"counts must be 1-D, got shape {list(weights.shape)}")
    if not 1 <= len(weights) <= MAX_CLASSES:
        raise ValueError(f"counts must have 1 .. 2^31 - 1 entries, got {len(weights)}")
    weights = weights.detach().to("cpu", torch.float64)
    low, high = torch.aminmax(weights)  # NaN if any entry is
    if not (torch.isfinite(high) and low >= 0):
        bad = ~(torch.isfinite(weights) & (weights >= 0))
        where = int(bad.nonzero()[0, 0])
        raise ValueError(f"counts must be finite and >= 0, got {float(weights[where])} at index {where}")
    if high == 0:
        raise ValueError(f"counts must not all be zero, got {len(weights)} zeros")
    return weights


def check_trials(trials: int | Tensor, device: torch.device) -> None:
    integer = trials.dtype in (torch.int64, torch.int32) if isinstance(trials, Tensor) else type(trials) is not bool
    if not integer or not isinstance(trials, (int, torch.SymInt, Tensor)):
        raise TypeError(f"trials must be an int or an integer scalar tensor, got {describe(trials)}")
    if isinstance(trials, Tensor):
        if trials.device != device:
            raise ValueError(f"trials must be on {device}, got {trials.device}")
        if trials.dim():
            raise ValueError(f"trials must be a scalar, got shape {list(trials.shape)}")
        if trials.device.type != "cpu" or torch.compiler.is_compiling():
            return
    if trials < 0:
        raise ValueError(f"trials must be >= 0, got {int(trials)}")
