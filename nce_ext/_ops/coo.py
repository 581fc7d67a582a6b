"""Gradients of rows as autograd takes them: dense, or as COO tensors that stay known to be coalesced."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from nce_ext import _private_torch

# What backward makes of a gradient of rows: the argument gradient_layout of the losses.
DENSE, COALESCED, PADDED = 0, 1, 2


def coo(classes: Tensor, values: Tensor, size: tuple[int, ...], coalesced: bool) -> Tensor:
    """Make a COO tensor of ``size`` whose rows ``classes`` [U] are ``values`` [U, ...]."""
    return torch.sparse_coo_tensor(classes[None], values, size, is_coalesced=coalesced, check_invariants=False)


class CoalescedGradients:
    """Remembers which gradients were made coalesced, and flags them again once autograd has stored them.

    autograd stores the first sparse gradient of a leaf without the flag, and an optimizer would then sort and sum all
    rows once more. The tensor of classes is kept by what is stored, so it is known again by its address. The tensors
    are held until they are met again, so that nothing else can have come to lie there; only the last few, since a
    gradient may be on its way to something else than a leaf. Threads share one instance.
    """

    AT_MOST = 16  # eight threads, each with the gradients of a weight and of a bias

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By address: the classes, and the number of gradients that have them.
        self._made: OrderedDict[int, tuple[Tensor, int]] = OrderedDict()

    def add(self, classes: Tensor, gradients: int) -> None:
        """Remember ``classes``, which ascend, each once, of that many gradients."""
        if not _has_memory(classes) or not classes.numel():
            return
        with self._lock:
            self._made[classes.data_ptr()] = (classes, gradients)
            while len(self._made) > self.AT_MOST:
                self._made.popitem(last=False)

    def take(self, classes: Tensor) -> bool:
        """Tell whether ``classes`` were added, for one gradient fewer from now on."""
        with self._lock:
            made, gradients = self._made.pop(classes.data_ptr(), (None, 0))
            if made is None or made.shape != classes.shape or made.device != classes.device:
                return False
            if gradients > 1:
                self._made[classes.data_ptr()] = (made, gradients - 1)
            return True

    def flag(self, parameter: Tensor) -> None:
        """Flag a parameter's gradient if it was made here, or if its classes strictly ascend.

        The second is looked at on the CPU alone: on CUDA it would have to be waited for.
        """
        gradient = parameter.grad
        if gradient is None or not gradient.is_sparse or gradient.is_coalesced() or not _has_memory(gradient):
            return
        classes = _private_torch.coo_classes(gradient)
        if self.take(classes) or (classes.device.type == "cpu" and bool((classes[1:] > classes[:-1]).all())):
            _private_torch.flag_coalesced(gradient)

    def watch(self, parameter: Tensor | None) -> None:
        """Flag the gradients of a leaf from now on, as they are stored."""
        if parameter is not None and parameter.is_leaf and parameter.requires_grad:
            _private_torch.call_after_accumulation(parameter, flag_coalesced)


made_coalesced = CoalescedGradients()


def flag_coalesced(parameter: Tensor) -> None:
    """Flag a gradient that is coalesced, as a hook of a parameter: one function, so that a parameter has it once."""
    made_coalesced.flag(parameter)


def _has_memory(tensor: Tensor) -> bool:
    """Tell a tensor of its own memory from the stand-ins that tracing makes, whose address may not be asked for."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def is_one(value: Tensor) -> bool:
    """Tell whether a tensor is the number 1, as what ``backward()`` starts with; only where that costs no waiting."""
    return _has_memory(value) and value.device.type == "cpu" and value.numel() == 1 and bool(value == 1)


def capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, in which nothing may wait for the number of touched rows."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def brought_to(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Move tensors to a device; from CUDA to the host as copies in pinned memory, complete when this returns.

    The copies run on the stream that made the tensors, at the full rate of the bus and without touching fresh pages;
    the memory is used again once the gradient is gone. Nothing on the CPU waits for a stream, so this does, once for
    all of them: then the forward pass has read its rows as well, and they may be changed.
    """
    source = tensors[0].device
    if source == device:
        return tensors
    if source.type != "cuda" or not _has_memory(tensors[0]):  # nothing to wait for
        return tuple(t.to(device) for t in tensors)
    copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
    for copy, t in zip(copies, tensors, strict=True):
        copy.copy_(t, non_blocking=True)
    torch.cuda.current_stream(source).synchronize()
    return copies
