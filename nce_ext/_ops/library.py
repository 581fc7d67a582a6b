"""Loads the compiled operators when they are there, and can say what is missing and why.

Importing this module never raises: without a binary the reference backend serves every call.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nce_ext import _warnings
from nce_ext._ops import cuda_module
from nce_ext._version import __version__

_missing: dict[str, str] = {}
_debug = False


def _load_cpu() -> str | None:
    """Load the operators and their CPU kernels; the reason if that cannot be done."""
    if os.environ.get("NCE_EXT_DISABLE_NATIVE") == "1":
        return "switched off by NCE_EXT_DISABLE_NATIVE=1"
    try:
        importlib.import_module("nce_ext._C")  # its static initialisers register the operators
        torch.ops.nce_ext.simd_level()
    except ImportError as error:
        return (
            f"nce_ext._C could not be imported ({error}); build it with "
            "`pip install .` in nce_ext's source folder, which needs a C++ compiler"
        )
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _load_cuda(missing_cpu: str | None) -> str | None:
    """Load the CUDA kernels; the reason if that cannot be done."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA, then nce_ext again"
    if missing_cpu is not None:
        return f"they need the operators of nce_ext._C: {missing_cpu}"
    return cuda_module.load()


def _load() -> tuple[bool, bool]:
    """Whether there are kernels for the CPU, and for CUDA."""
    reasons = {"cpu": (missing_cpu := _load_cpu()), "cuda": _load_cuda(missing_cpu)}
    _missing.update({f"fused ({device})": reason for device, reason in reasons.items() if reason is not None})
    return reasons["cpu"] is None, reasons["cuda"] is None


_has_cpu, _has_cuda = _load()
operators_exist = _has_cpu  # the schemas come with the CPU kernels

if not _has_cpu:
    _warnings.warn_user(
        f"nce_ext runs on its pure-PyTorch reference backend, which is much slower: {_missing['fused (cpu)']}",
        RuntimeWarning,
    )


Function = TypeVar("Function", bound=Callable[..., Any])


def register_fake(operator: str) -> Callable[[Function], Function]:
    """Register what a compiled operator returns while a graph is traced: shapes and dtypes, without values."""

    def register(function: Function) -> Function:
        if operators_exist:
            torch.library.register_fake(f"nce_ext::{operator}", function)
        return function

    return register


def register_autograd(
    operator: str, backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
) -> None:
    """Register an operator's backward pass, where there are operators."""
    if operators_exist:
        torch.library.register_autograd(f"nce_ext::{operator}", backward, setup_context=setup_context)


def needed_gradients(ctx: Any, inputs: Any) -> Any:
    """Say by name, in a tuple of the type ``inputs``, which of an operator's inputs need a gradient.

    torch appends an entry of its own to those of the schema.
    """
    return inputs(*ctx.needs_input_grad[: len(inputs._fields)])


def implement(operator: str, function: Callable[..., Any]) -> None:
    """Make a Python function the kernel of an operator, for every device that has compiled ones.

    It computes in whatever types it chooses, as a compiled kernel does: autocast ends here.
    """

    def kernel(*arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments)

    if operators_exist:
        for device in ("cpu", "cuda"):
            torch.library.impl(f"nce_ext::{operator}", device, kernel)


def fused_available(device: torch.device) -> bool:
    """Whether compiled kernels can serve tensors of this device."""
    return (device.type == "cpu" and _has_cpu) or (device.type == "cuda" and _has_cuda)


def why_missing(device: torch.device) -> str:
    """The reason fused_available(device) is False, in words for an error message."""
    return _missing.get(f"fused ({device.type})", f"there are no kernels for device type {device.type!r}")


def warn_of_reference(device: torch.device) -> None:
    """Say, once, that a GPU is served by the reference backend; import is too early, since it may never be used."""
    _warnings.warn_once(
        f"reference on {device.type}",
        "nce_ext runs on its pure-PyTorch reference backend for tensors on "
        f"{device.type}, which is much slower: {why_missing(device)}. backend='reference' asks for it without warning.",
        RuntimeWarning,
    )


def set_debug(enabled: bool) -> None:
    """Check ids on the GPU too, at the price of a device synchronisation per call.

    On the CPU every id is always checked. On CUDA a row with an id out of range, or with a target the noise
    can never draw, gets loss NaN and gradient 0 instead, because a check would have to wait for the device.
    With ``set_debug(True)`` such a row raises ValueError there too, and the message names the row.
    """
    global _debug
    _debug = bool(enabled)


def debug_enabled() -> bool:
    return _debug


def build_info() -> dict[str, object]:
    """What this installation can do, and the reason for anything it cannot.

    Returns:
        A dict with ``version``, ``torch``, ``python``, ``cuda`` (the version torch is built for, or None), ``backends``
        (the usable ones; whether there is a GPU is for torch to say), ``simd`` (instruction set of the CPU kernels:
        "generic", "avx2", "avx512", or None), ``threads`` (torch's intra-op threads) and ``missing`` (backend ->
        reason).
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "backends": ["fused (cpu)"] * _has_cpu + ["fused (cuda)"] * _has_cuda + ["reference"],
        "simd": torch.ops.nce_ext.simd_level() if _has_cpu else None,
        "threads": torch.get_num_threads(),
        "missing": dict(_missing),
    }
