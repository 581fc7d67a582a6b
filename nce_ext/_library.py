"""Loads the compiled operators when they are there, and can say what is missing and why.

Importing this module never raises: without a binary the reference backend serves every call.
"""

from __future__ import annotations

import importlib
import os
import platform
import warnings

import torch

from nce_ext._version import __version__

_missing: dict[str, str] = {}
_debug = False


def _load_cpu() -> bool:
    if os.environ.get("NCE_EXT_DISABLE_NATIVE") == "1":
        _missing["fused (cpu)"] = "switched off by NCE_EXT_DISABLE_NATIVE=1"
        return False
    try:
        importlib.import_module("nce_ext._C")  # its static initialisers register the operators
        torch.ops.nce_ext.simd_level()
    except ImportError as error:
        _missing["fused (cpu)"] = (
            f"nce_ext._C could not be imported ({error}); build it with "
            "`pip install --no-build-isolation .` in an environment that has torch >= 2.11 and a C++ compiler"
        )
        return False
    except RuntimeError as error:
        _missing["fused (cpu)"] = str(error).splitlines()[0]
        return False
    return True


_has_cpu = _load_cpu()
_missing["fused (cuda)"] = "this version has no CUDA kernels; CUDA tensors use the reference backend"

if not _has_cpu:
    warnings.warn(
        f"nce_ext runs on its pure-PyTorch reference backend, which is much slower: {_missing['fused (cpu)']}",
        RuntimeWarning,
        stacklevel=2,
    )


def fused_available(device: torch.device) -> bool:
    """Whether compiled kernels can serve tensors of this device."""
    return device.type == "cpu" and _has_cpu


def why_missing(device: torch.device) -> str:
    """The reason fused_available(device) is False, in words for an error message."""
    return _missing.get(f"fused ({device.type})", f"there are no kernels for device type {device.type!r}")


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
        A dict with ``version``, ``torch``, ``python``, ``backends`` (the usable ones), ``simd`` (instruction set of
        the CPU kernels: "generic", "avx2", "avx512", or None), ``threads`` (torch's intra-op threads) and ``missing``
        (backend -> reason).
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": (["fused (cpu)"] if _has_cpu else []) + ["reference"],
        "simd": torch.ops.nce_ext.simd_level() if _has_cpu else None,
        "threads": torch.get_num_threads(),
        "missing": dict(_missing),
    }
