"""Gradient clipping and unscaling for row-sparse gradients, as ``torch.nn.utils`` and ``torch.amp`` do for dense ones.

PyTorch's own functions refuse sparse gradients, or look at each of several rows of one class by itself. The functions
here add up the rows of each class first, at a cost that does not depend on the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nce_ext import _checks, _private_torch
from nce_ext._checks import describe
from nce_ext._ops.row_grad import coalesce
from nce_ext._warnings import warn_user

__all__ = ["clip_grad_norm_", "clip_grad_value_", "coalesce_grads_", "unscale_"]


def coalesce_grads_(parameters: Tensor | Iterable[Tensor]) -> None:
    """Coalesce every sparse gradient: sum the rows of each class, and sort by class.

    Equivalent to ``p.grad = p.grad.coalesce()`` for each parameter ``p`` with a sparse gradient. Afterwards
    ``p.grad._values()`` [touched, ...] may be changed in place, and the gradient stays coalesced. Two gradients whose
    rows lie in the same memory, which autograd makes where it can, get memory of their own; a gradient that is
    coalesced and alone in its memory stays the same object, and so does every dense one.

    Rows repeat after several backward passes, and in most gradients of ``nn.Embedding(sparse=True)``. Summing them
    waits for the device on CUDA, as their number is not known beforehand; a coalesced gradient costs nothing.

    Args:
        parameters: a tensor, or an iterable of them; those without a gradient are left out.

    Raises:
        TypeError: something else than tensors; a gradient that is neither dense nor COO with ``sparse_dim() == 1``.
    """
    _store(_coalesced(_gradients(parameters)))


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients in place so that their norm, taken as one vector, is at most ``max_norm``.

    Equivalent to ``torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)`` on the dense
    gradients: ``p.grad *= min(1, max_norm / (norm + 1e-6))``. It is that function, given the summed rows of the sparse
    gradients (see :func:`coalesce_grads_`); the other elements are 0 and count nothing. So, as there, norms of 16-bit
    gradients are accumulated in float32 and rounded once, nothing waits for a GPU unless ``error_if_nonfinite``
    (or rows must be summed), and a parameter that is given twice counts twice and is scaled twice.

    Norms that are not finite do what they do in PyTorch: an infinite one makes finite elements 0 and infinite ones NaN,
    a NaN one makes all elements NaN. Classes without a row stay without one, where a dense gradient would be all NaN.

    Args:
        parameters: a tensor, or an iterable of them; those without a gradient are left out.
        max_norm: >= 0; inf changes nothing.
        norm_type: p of the p-norm, > 0; ``inf`` or ``"inf"`` is the largest magnitude.
        error_if_nonfinite: raise where the norm is NaN or infinite, before anything is changed.

    Returns:
        The norm before clipping, a scalar tensor of the gradients' (promoted) dtype on the first gradient's device;
        ``tensor(0.)`` where there is no gradient.

    Raises:
        TypeError: something else than tensors or numbers; a gradient that is neither dense nor COO with
            ``sparse_dim() == 1``.
        ValueError: ``max_norm`` or ``norm_type`` out of range. (PyTorch takes a negative ``max_norm``, which turns the
            gradients round, and a ``norm_type`` of 0, which counts the tensors.)
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``.
    """
    gradients = _gradients(parameters)
    max_norm = _checks.number("max_norm", max_norm, 0, infinite=True, convert=True)
    norm_type = _checks.number("norm_type", norm_type, above=0, infinite=True, convert=True)
    gradients = _coalesced(gradients)
    total = torch.nn.utils.clip_grad_norm_(_stand_ins(gradients), max_norm, norm_type, error_if_nonfinite)
    _store(gradients)
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Clamp every element of every gradient to -clip_value .. clip_value, in place.

    Equivalent to ``torch.nn.utils.clip_grad_value_(parameters, clip_value)`` on the dense gradients. Rows of one class
    are summed before (see :func:`coalesce_grads_`), and NaN stays NaN.

    Args:
        parameters: a tensor, or an iterable of them; those without a gradient are left out.
        clip_value: >= 0; inf changes nothing.

    Raises:
        TypeError: something else than tensors or a number; a gradient that is neither dense nor COO with
            ``sparse_dim() == 1``.
        ValueError: ``clip_value`` negative or NaN.
    """
    gradients = _gradients(parameters)
    clip_value = _checks.number("clip_value", clip_value, 0, infinite=True, convert=True)
    if not gradients:  # an error in PyTorch
        return
    gradients = _coalesced(gradients)
    torch.nn.utils.clip_grad_value_(_stand_ins(gradients), clip_value)
    _store(gradients)


def unscale_(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Divide the optimizer's gradients by the scaler's scale, in place, and tell the scaler whether all are finite.

    Equivalent to ``scaler.unscale_(optimizer)`` on the dense gradients: ``scaler.step(optimizer)`` then leaves out a
    step whose gradients hold inf or NaN, and ``scaler.update()`` lowers the scale::

        scaler.scale(loss).backward()
        nce_ext.utils.unscale_(scaler, optimizer)
        nce_ext.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()

    It sums the rows of one class (see :func:`coalesce_grads_`) and calls ``scaler.unscale_``. ``scaler.step`` alone
    calls ``scaler.unscale_`` itself, which is the same for coalesced gradients, as the compiled kernels make in one
    backward pass with ``sparse=True``. Where rows repeat, that looks at each alone: finite rows whose sum overflows are
    stepped with, and the weights become infinite; and rows in memory that two gradients share are divided twice. So
    call :func:`unscale_`, or :func:`coalesce_grads_`, before ``scaler.step``.

    float16 gradients, whose sums overflow first, the scaler refuses, dense or sparse: keep float32 parameters under
    ``torch.autocast``. bfloat16 gradients need no scaling but work. A scaler that is not enabled changes nothing.

    Args:
        scaler: whose ``scale`` made the loss.
        optimizer: of ``torch.optim``, ``nce_ext.optim`` or any other with ``param_groups``.

    Raises:
        TypeError: not a scaler, not an optimizer; a gradient that is neither dense nor COO with ``sparse_dim() == 1``.
        ValueError, RuntimeError, AssertionError: as ``scaler.unscale_`` does, with all gradients as they were: float16
            gradients, a second call before ``scaler.update()``, nothing scaled yet.
    """
    _checks.instance("scaler", scaler, torch.amp.GradScaler, "a torch.amp.GradScaler")
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be an optimizer with param_groups, got {describe(optimizer)}")
    if not scaler.is_enabled():
        return
    before = _gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])
    _store(_coalesced(before))
    try:
        scaler.unscale_(optimizer)
    except BaseException:
        _store(before)
        raise


# Pairs of a parameter and its gradient.
_Gradients = list[tuple[Tensor, Tensor]]


def _gradients(parameters: Tensor | Iterable[Tensor]) -> _Gradients:
    """Collect the parameters that have a gradient; refuse what is no tensor, and sparse gradients of another form."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be a tensor or an iterable of tensors, got {describe(parameters)}")
    given = list(parameters)
    if not given and isinstance(parameters, Iterator):
        warn_user("parameters is an empty iterator, perhaps a used-up one: no gradient is changed")
    for i, parameter in enumerate(given):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters must be tensors, got {describe(parameter)} at index {i}")
    gradients = [(i, parameter, parameter.grad) for i, parameter in enumerate(given)]
    for i, _, grad in gradients:
        if grad is None or grad.layout == torch.strided:
            continue
        if grad.layout != torch.sparse_coo:
            raise TypeError(f"parameters[{i}].grad must be dense or COO, got layout {grad.layout}")
        if grad.sparse_dim() != 1:
            raise TypeError(
                f"parameters[{i}].grad must have sparse_dim() == 1, one index a row, got {grad.sparse_dim()}"
            )
    return [(parameter, grad) for _, parameter, grad in gradients if grad is not None]


def _coalesced(gradients: _Gradients) -> _Gradients:
    """Coalesce the sparse gradients, and give each of them memory of its own.

    Autograd hands one tensor of rows to several parameters where their gradients are equal, as those of two embeddings
    that are added. Scaled in place, such a tensor would be scaled twice.
    """
    if not any(grad.is_sparse for _, grad in gradients):
        return gradients
    # A subclass of Tensor, such as DTensor, may have no storage to ask for.
    taken = {grad.untyped_storage().data_ptr() for _, grad in gradients if type(grad) is Tensor and not grad.is_sparse}
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for _, grad in gradients:
            if not grad.is_sparse or id(grad) in made:
                continue
            summed = grad if grad.is_coalesced() else coalesce(grad)
            values = _private_torch.coo_rows(summed)
            if values.numel():
                expanded = any(step == 0 and size > 1 for step, size in zip(values.stride(), values.shape, strict=True))
                if expanded or values.untyped_storage().data_ptr() in taken:
                    summed = summed.clone()
                taken.add(_private_torch.coo_rows(summed).untyped_storage().data_ptr())
            made[id(grad)] = summed
    return [(parameter, made.get(id(grad), grad)) for parameter, grad in gradients]


def _stand_ins(gradients: _Gradients) -> list[Tensor]:
    """Build what PyTorch's functions take as parameters: for a sparse gradient, a tensor whose gradient is its rows."""
    stand_ins = []
    for parameter, grad in gradients:
        if grad.is_sparse:
            values = _private_torch.coo_rows(grad).detach()
            if not values.numel() and grad.numel():
                values = values.new_zeros(1)  # the largest of no elements is an error, the largest of only zeros is 0
            parameter = values.detach()
            parameter.grad = values
        stand_ins.append(parameter)
    return stand_ins


def _store(gradients: _Gradients) -> None:
    """Set the gradients of the parameters, where they are not set already."""
    for parameter, grad in gradients:
        if parameter.grad is not grad:
            parameter.grad = grad
