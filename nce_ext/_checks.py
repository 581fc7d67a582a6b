"""Checks of arguments, made before any work, in the order device, dtype, layout, rank, size, range.

Each message names the argument, says what is allowed and what was got. A wrong type or dtype is a TypeError, anything
else a ValueError. Checks of Python values come first, then those of tensors, of what losses take, and of what noise
distributions take.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nce_ext import _private_torch
from nce_ext._ops import library

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
REDUCTIONS = ("mean", "sum", "none")
MAX_CLASSES = 2**31 - 1
_LARGEST = sys.float_info.max

T = TypeVar("T")


def describe(value: object) -> str:
    """Describe a refused value for an error message: its type, and the value itself if that is short."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__


def instance(name: str, value: object, cls: type[T], wanted: str) -> T:
    """Raise unless the value is an instance of ``cls``, which the message calls ``wanted``; return it."""
    if not isinstance(value, cls):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}")
    return value


def plain(value: Any) -> Any:
    """Return the Python number that a numpy scalar stands for; any other value as it is."""
    return value.item() if isinstance(value, np.generic) else value


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless the value is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def reduction(value: object) -> None:
    """Raise unless the value is one of the reductions that every loss has."""
    one_of("reduction", value, REDUCTIONS)


def count(name: str, value: object, low: int, high: int | None = None, *, wanted: str | None = None) -> int:
    """Raise unless the value is an int in low .. high, and return it; ``wanted`` replaces the bounds in the message."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in {low} .. {high}"
        raise ValueError(f"{name} must be {wanted or bounds}, got {value}")
    return value  # type: ignore[return-value]  # a SymInt stays one, so that a traced graph serves every size


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    convert: bool = False,
    wanted: str | None = None,
) -> float:
    """Raise unless the value is a number with low <= value <= high and above < value < below; return it.

    Args:
        infinite: whether infinity is allowed where the bounds allow it. NaN never is.
        convert: whether to take everything that ``float()`` takes, such as a tensor of one element.
        wanted: what the message says is allowed, in place of the bounds; another type is then a ValueError as well.
    """
    value = _converted(value) if convert else plain(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        if wanted is None:
            raise TypeError(f"{name} must be a number, got {describe(value)}")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    inside = low <= value <= high and (above is None or value > above) and (below is None or value < below)
    if not inside or not (infinite or -_LARGEST <= value <= _LARGEST):
        raise ValueError(f"{name} must be {wanted or _bounds(low, high, above, below, infinite)}, got {value!r}")
    return value


def _converted(value: Any) -> object:
    """Return ``float(value)``, or the value itself where that fails."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _bounds(low: float, high: float, above: float | None, below: float | None, infinite: bool) -> str:
    """Put the bounds of :func:`number` into words for an error message."""
    lower, upper = low if above is None else above, high if below is None else below
    finite_and = "" if infinite else "finite and "
    if upper == math.inf:
        return "finite" if lower == -math.inf else f"{finite_and}{'>=' if above is None else '>'} {lower}"
    if above is None and below is None:
        return f"in {lower} .. {upper}"
    return f"in {'[' if above is None else '('}{lower}, {upper}{']' if below is None else ')'}"


# Tensors


def tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None, of: str = "hidden"
) -> Tensor:
    """Raise unless the value is a dense tensor of one of these dtypes, and on the device if one is given; return it.

    ``of`` says in the message whose device that is.
    """
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {names} tensor, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {of}'s device {device}, got {value.device}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be a {names} tensor, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {value.layout}")
    return value


def pinned(name: str, value: object, allowed: str) -> None:
    """Raise if a tensor is not in pinned host memory. While tracing, only its device is checked."""
    if not isinstance(value, Tensor):  # tensor() raises for it
        return
    if value.device.type != "cpu":
        raise ValueError(f"{name} must be {allowed}, got {value.device}")
    if not (torch.compiler.is_compiling() or value.is_pinned()):
        raise ValueError(f"{name} must be {allowed}, got pageable memory on cpu")


def without_gradient(name: str, value: Tensor, why: str, advice: str) -> None:
    """Raise if a tensor requires a gradient; the message says why none is taken, and what to do."""
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient ({why}), got one that does; {advice}")


def values_are_checked(device: torch.device) -> bool:
    """Tell whether the values of tensors on the device are checked: on the CPU always, on CUDA under set_debug(True).

    Elsewhere a check would have to wait for the device. While tracing there are no values, and inside
    ``torch.func.vmap`` there are many.
    """
    if torch.compiler.is_compiling() or _private_torch.inside_vmap():
        return False
    return device.type == "cpu" or library.debug_enabled()


def finite(name: str, value: Tensor, where: Tensor | None = None) -> None:
    """Raise if a tensor holds NaN or infinity; ``where`` is False for elements that may be either."""
    bad = ~torch.isfinite(value)
    index = first_index(bad if where is None else bad & where)
    if index is not None:
        raise ValueError(f"{name} must be finite, got {value[tuple(index)].item()} at index {index}")


def first_index(mask: Tensor) -> list[int] | None:
    """Return the index of the first True of a bool tensor, or None."""
    return mask.nonzero()[0].tolist() if mask.any() else None


# What losses take


class Law(Protocol):
    """Noise distribution, as far as the checks need to know it."""

    n_classes: int
    table: Tensor

    def log_prob(self, ids: Tensor) -> Tensor: ...

    def check_table(self) -> None: ...

    def materialise(self, device: torch.device) -> bool: ...


LawT = TypeVar("LawT", bound=Law)


def operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, host_weight: bool = False) -> None:
    """Raise unless hidden, weight and bias are tensors that fit each other.

    ``host_weight``: with hidden on CUDA, weight and bias may be in pinned host memory.
    """
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
    """Raise unless noise is a noise distribution over weight's classes, on the given device or on weight's; return it.

    ``cls`` is the class of noise distributions, which lies above this module.
    """
    noise = instance("noise", noise, cls, "an nce_ext.noise distribution")
    device = device or weight.device
    if noise.table.device != device and not noise.materialise(device):
        advice = "load its state_dict with assign=True" if noise.table.is_meta else "use noise.to()"
        raise ValueError(f"noise must be on hidden's device {device}, got {noise.table.device}; {advice}")
    if noise.n_classes != weight.shape[0]:
        raise ValueError(f"noise must have weight's {weight.shape[0]} classes, got {noise.n_classes}")
    noise.check_table()
    return noise


def batch_shaped(name: str, value: Tensor, batch_shape: torch.Size, extra: int | None) -> None:
    """Raise unless a tensor has the shape of the batch, followed by the size ``extra`` if that is given."""
    wanted = list(batch_shape) if extra is None else [*batch_shape, extra]
    if list(value.shape) != wanted:
        raise ValueError(
            f"{name} must have shape {wanted} for hidden of leading sizes {list(batch_shape)}, got {list(value.shape)}"
        )


def ids(
    target: Tensor,
    negatives: Tensor | None,
    noise: Law,
    ignore_index: int,
    subtract_log_q: bool,
    log_q: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise if ids are out of range, or if a log q that is subtracted is not finite.

    Where :func:`values_are_checked` is False, nothing is checked.
    """
    if not values_are_checked(target.device):
        return
    candidates = [("target", target, target != ignore_index, f" or ignore_index = {ignore_index}")]
    if negatives is not None:
        candidates.append(("negatives", negatives, torch.ones_like(negatives, dtype=torch.bool), ""))
    for i, (name, classes, present, otherwise) in enumerate(candidates):
        index = first_index(present & ((classes < 0) | (classes >= noise.n_classes)))
        if index is not None:
            got = int(classes[tuple(index)])
            raise ValueError(f"{name} must be in 0 .. {noise.n_classes - 1}{otherwise}, got {got} at index {index}")
        if not subtract_log_q:
            continue
        if log_q is not None:
            finite(f"log_q[{i}]", log_q[i], present if name == "target" else None)
            continue
        index = first_index(present & torch.isinf(noise.log_prob(torch.where(present, classes, 0))))
        if index is not None:
            raise ValueError(
                f"{name} must be classes that the noise can draw, got class {int(classes[tuple(index)])} with count 0 "
                f"at index {index}; give it a count, or use correction='none'"
            )


# What noise distributions take


def n_classes(value: object) -> int:
    """Raise unless the value is a number of classes that the kernels can handle; return it."""
    return count("n_classes", value, 1, MAX_CLASSES, wanted="in 1 .. 2^31 - 1")


def seed(value: object, device: torch.device) -> Tensor:
    """Raise unless the value is a seed, int64 [2], on the device; return it."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor of shape [2], got {describe(value)}")
    if value.device != device:
        raise ValueError(f"seed must be on {device}, got {value.device}")
    if value.shape != (2,):
        raise ValueError(f"seed must have shape [2], got {list(value.shape)}")
    return value


def class_ids(
    value: object, n_classes: int, *, device: torch.device | None = None, ignore_index: int | None = None
) -> Tensor:
    """Raise unless the value is a tensor of class ids, on the device of the module if that is given; return it.

    The range is checked on the CPU only: on CUDA the check would have to wait for the device.
    """
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        raise TypeError(f"ids must be an int64 or int32 tensor, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"ids must be on the module's device {device}, got {value.device}")
    if value.device.type != "cpu" or not value.numel() or not values_are_checked(value.device):
        return value
    classes = value if ignore_index is None else torch.where(value == ignore_index, 0, value)
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= n_classes:
        otherwise = "" if ignore_index is None else f" or ignore_index = {ignore_index}"
        raise ValueError(f"ids must be in 0 .. {n_classes - 1}{otherwise}, got {low if low < 0 else high}")
    return value


def log_q_dtype(value: object) -> None:
    """Raise unless the value is a dtype of log-probabilities: float32 or float64."""
    if value not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {value}")


def power(value: object) -> float:
    """Raise unless the value is an exponent for counts; return it. True and False are taken as 1 and 0."""
    value = plain(value)
    exponent = int(value) if isinstance(value, bool) else value
    return float(number("power", exponent, 0, wanted="a finite number >= 0"))


def counts(value: Any) -> Tensor:
    """Raise unless the value is a list of frequencies of classes; return it as a float64 tensor on the CPU."""
    try:
        weights = value if isinstance(value, Tensor) else torch.as_tensor(_host_array(value), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"counts must be a 1-D tensor, array or sequence of numbers ({error})") from None
    if weights.is_complex() or weights.is_sparse:
        raise TypeError(f"counts must be dense real numbers, got {describe(weights)}")
    if weights.is_meta:
        raise ValueError(f"counts must be on a device with memory, got {describe(weights)} on meta")
    if weights.dim() != 1:
        raise ValueError(f"counts must be 1-D, got shape {list(weights.shape)}")
    if not 1 <= len(weights) <= MAX_CLASSES:
        raise ValueError(f"counts must have 1 .. 2^31 - 1 entries, got {len(weights)}")
    weights = weights.detach().to("cpu", torch.float64)
    low, high = torch.aminmax(weights)  # NaN if any entry is
    if not (torch.isfinite(high) and low >= 0):
        where = int((~(torch.isfinite(weights) & (weights >= 0))).nonzero()[0, 0])
        raise ValueError(f"counts must be finite and >= 0, got {float(weights[where])} at index {where}")
    if high == 0:
        raise ValueError(f"counts must not all be zero, got {len(weights)} zeros")
    return weights


def _host_array(value: Any) -> np.ndarray[Any, Any]:
    """Return numbers as an array that torch takes: of any byte order and strides before, float64 if they are real.

    numpy reads Python numbers as float64; torch would make them float32.
    """
    array = np.asarray(value)
    return np.array(array, dtype=np.float64, order="C") if array.dtype.kind in "biuf" else array


def trials(value: int | Tensor, device: torch.device) -> int | Tensor:
    """Raise unless the value is a number of draws: an int, or an integer scalar tensor on the device; return it."""
    value = plain(value)
    integer = value.dtype in INTEGERS if isinstance(value, Tensor) else type(value) is not bool
    if not integer or not isinstance(value, (int, torch.SymInt, Tensor)):
        raise TypeError(f"trials must be an int or an integer scalar tensor, got {describe(value)}")
    if isinstance(value, Tensor):
        if value.device != device:
            raise ValueError(f"trials must be on {device}, got {value.device}")
        if value.dim():
            raise ValueError(f"trials must be a scalar, got shape {list(value.shape)}")
        if value.device.type != "cpu" or not values_are_checked(value.device):
            return value
    if value < 0:
        raise ValueError(f"trials must be >= 0, got {int(value)}")
    return value
