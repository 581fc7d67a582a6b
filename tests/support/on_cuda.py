"""Runs the losses on a GPU for tests that hold everything on the CPU.

Tensors go over with their strides, results and gradients come back, and ids are checked as on the CPU, so that one
test serves every backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nce_ext
from nce_ext import functional
from nce_ext._ops import library
from nce_ext._ops.sample import draw_seed

# The mechanism can be tried without a GPU: NCE_EXT_TEST_DEVICE=cpu.
DEVICE = torch.device(os.environ.get("NCE_EXT_TEST_DEVICE", "cuda"))
MUST_RUN = os.environ.get("FAIL_WITHOUT_CUDA") == "1"


def available() -> bool:
    there = DEVICE.type == "cpu" or torch.cuda.is_available()
    return there and library.fused_available(DEVICE)


def require() -> None:
    """Skip without a GPU and kernels for it, unless the run has declared that they must be there."""
    if available():
        return
    reason = "no GPU" if not torch.cuda.is_available() else library.why_missing(DEVICE)
    if MUST_RUN:
        pytest.fail(f"FAIL_WITHOUT_CUDA=1, but: {reason}")
    pytest.skip(reason)


class ToDevice(torch.autograd.Function):
    """A copy with the same strides and offset from its storage; its gradient comes back to the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return copy(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to("cpu")


def copy(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    used = tensor.as_strided((extent,), (1,), tensor.storage_offset())
    # As misaligned as it was: the storage of a fresh tensor begins at a multiple of any vector.
    offset = tensor.storage_offset() % 16
    storage = torch.empty(offset + extent, dtype=tensor.dtype, device=DEVICE)
    storage[offset:].copy_(used)
    return storage.as_strided(tensor.shape, tensor.stride(), offset)


def to_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ToDevice.apply(value) if value.device.type == "cpu" and value.layout == torch.strided else value
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item) for item in value)
    if isinstance(value, nce_ext.noise.Noise):
        moved = object.__new__(type(value))
        moved.__dict__.update(value.__dict__)
        moved._buffers = {name: buffer.to(DEVICE) for name, buffer in value._buffers.items()}
        moved.table = value.table.to(DEVICE)
        return moved
    return value


def on_device(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        if generator is not None and options.get("seed") is None and options.get("negatives") is None:
            options["seed"] = draw_seed(torch.device("cpu"), generator)
        if options.get("backend") == "reference":
            return loss(*args, **options)
        moved = {name: to_device(value) for name, value in options.items()}
        return loss(*(to_device(value) for value in args), **moved).to("cpu")

    return run


def step_on_device(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        names = ("hidden", "weight", "target", "noise", "num_negatives", "learning_rate")
        given = {**dict(zip(names, args, strict=False)), **options}
        with torch.no_grad():
            moved = {name: to_device(value) for name, value in given.items()}
        losses, gradient = step(**moved)
        with torch.no_grad():
            for name in ("weight", "bias"):
                if isinstance(given.get(name), Tensor):
                    given[name].copy_(moved[name])
        return losses.to("cpu"), gradient.to("cpu")

    return run


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the losses run on the device, and check ids there."""
    monkeypatch.setattr(library, "_debug", True)
    monkeypatch.setattr(functional, "nce_loss", on_device(functional.nce_loss))
    monkeypatch.setattr(functional, "hogwild_sgd_", step_on_device(functional.hogwild_sgd_))
