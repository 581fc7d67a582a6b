"""The compiled operators seen from Python: fakes, autograd, and the choice between them and the reference.

Nothing else in the package touches ``torch.ops``. Schemas are in csrc/ops.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nce_ext import reference
from nce_ext._ops import fakes as _fakes
from nce_ext._ops import library as _library
from nce_ext._ops import sampled_loss as _sampled_loss  # noqa: F401  interim: before the function of that name
from nce_ext._ops.fakes import COALESCED, DENSE, PADDED, compute_dtype

_registered = "fused (cpu)" not in _library.build_info()["missing"]  # type: ignore[operator]


def sample(kind: int, n_classes: int, table: Tensor, seed: Tensor, rows: int, cols: int) -> Tensor:
    """Noise ids, int64 [rows, cols]."""
    if _library.fused_available(seed.device):
        return torch.ops.nce_ext.sample(seed, table, kind, n_classes, rows, cols)
    return reference.draw(kind, n_classes, table, seed, rows, cols)


def alias_table(weights: Tensor, scale: float) -> Tensor:
    """int32 [V, 4] table of float64 weights whose sum times ``scale`` is V 2^32."""
    if _library.fused_available(weights.device):
        return torch.ops.nce_ext.alias_table(weights, scale)
    return reference.alias_table(weights, scale)


def sampled_loss(*args: Any) -> Tensor:
    """Per-example loss [B] of the fused operator; arguments as in its schema."""
    return sampled_loss_parts(*args)[0]


def sampled_loss_parts(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [B], ids and dlogit [B, T + k], unscaled gradient of hidden; without autograd."""
    return torch.ops.nce_ext.sampled_loss(*args)


def shared_loss(*args: Any) -> Tensor:
    """Loss over shared negatives, [B], or [1] with row_scale; arguments as in its schema."""
    return torch.ops.nce_ext.shared_loss(*args)[0]


def shared_loss_(*args: Any) -> tuple[Tensor, ...]:
    """What stands between the matrix products of shared_loss; arguments as in its schema."""
    return torch.ops.nce_ext.shared_loss_(*args)


def row_grad(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.nce_ext.row_grad(*args)


def row_grad_dense(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.nce_ext.row_grad_dense(*args)


def coalesce(gradient: Tensor) -> Tensor:
    """A COO gradient [V, ...] of one row a class: those of equal classes added up in their order, classes ascending."""
    if gradient.is_coalesced():
        return gradient
    classes, values = gradient._indices()[0], gradient._values()
    n, size = len(classes), gradient.shape
    if not _library.fused_available(gradient.device) or n == 0 or values[0].numel() == 0 or size[0] >= 2**31:
        return gradient.coalesce()
    one = values.new_ones((1,), dtype=compute_dtype(values.dtype)).expand(n)
    rows = values.reshape(n, -1).contiguous()
    classes, rows, _ = row_grad(
        classes.int()[:, None], one[:, None].contiguous(), one, rows, size[0], values.dtype, True, False, False
    )
    return coo(classes, rows.reshape(-1, *values.shape[1:]), tuple(size), True)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed from torch's own random state: int64 [2]."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of matrices.

    For float32 on the CPU by oneDNN, where torch has it: its own choice, MKL, runs at half the speed or less on
    processors that are not Intel's. The operator is torch's own affair, so it is tried once before it is relied on.
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() and b.numel() and _one_dnn_works():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


@functools.cache
def _one_dnn_works() -> bool:
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4).T
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), a @ b.T)
    except (AttributeError, RuntimeError):
        return False


def is_one(value: Tensor) -> bool:
    """Whether a tensor is the number 1, as what backward() starts with is; only where that costs no waiting.

    While a graph is traced the tensors are of other types, and have no values.
    """
    return type(value) is Tensor and value.device.type == "cpu" and value.numel() == 1 and bool(value == 1)


def implement(name: str, function: Callable[..., Any]) -> None:
    """Make a Python function the operator's kernel, for every device that has compiled ones.

    What it computes in is its own affair, as it is a compiled kernel's: autocast ends here.
    """

    def kernel(*arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments)

    if _registered:
        for device in ("cpu", "cuda"):
            torch.library.impl(f"nce_ext::{name}", device, kernel)


def row_grad_norm(*args: Any) -> Tensor:
    """Squared norm, float64 [1], of the gradient that row_grad would make; arguments as in its schema."""
    return torch.ops.nce_ext.row_grad_norm(*args)


def keep_coalesced(parameter: Tensor | None) -> None:
    """Keep the flag that a leaf's sparse gradient is coalesced.

    autograd stores a sparse gradient without it, and an optimizer would then sort and sum all rows once more.
    """
    if parameter is not None and parameter.is_leaf and parameter.requires_grad and parameter not in _watched:
        _watched[parameter] = parameter.register_post_accumulate_grad_hook(flag_coalesced)


_watched = WeakTensorKeyDictionary()

# Classes of the coalesced gradients that were made here and are not stored yet, by address, and the number of gradients
# that have them: autograd keeps the tensor of classes when it stores the first gradient of a leaf. Held, so that
# nothing else can have come to lie at that address; only a few, since a gradient may be on its way to something else.
_made: dict[int, tuple[Tensor, int]] = {}
_MADE_AT_MOST = 4


def _remember(classes: Tensor, gradients: int) -> None:
    while len(_made) >= _MADE_AT_MOST:
        del _made[next(iter(_made))]
    _made[classes.data_ptr()] = (classes, gradients)


def _made_here(classes: Tensor) -> bool:
    made, gradients = _made.pop(classes.data_ptr(), (None, 0))
    if made is None or made.shape != classes.shape or made.device != classes.device:
        return False
    if gradients > 1:
        _made[made.data_ptr()] = (made, gradients - 1)
    return True


def flag_coalesced(parameter: Tensor) -> None:
    """A gradient that was made here, or whose classes strictly ascend; on CUDA one would have to wait to see that."""
    grad = parameter.grad
    if grad is None or not grad.is_sparse or grad.is_coalesced():
        return
    classes = grad._indices()[0]
    if _made_here(classes) or (classes.device.type == "cpu" and bool((classes[1:] > classes[:-1]).all())):
        grad._coalesced_(True)


NO_DOUBLE_BACKWARD = (
    "nce_ext losses cannot be differentiated twice (create_graph=True); use backend='reference' for that"
)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight = inputs[:2]
    _, ids, dlogit, grad_hidden = output
    ctx.set_materialize_grads(False)
    ctx.n_classes, ctx.row_dtype, ctx.hidden_dtype = weight.shape[0], weight.dtype, hidden.dtype
    ctx.gradient_layout, ctx.weight_device = inputs[-1], weight.device
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    needs_log_z = ctx.needs_input_grad[4]
    ctx.save_for_backward(
        hidden if needs_weight or needs_bias else None,
        ids if needs_weight or needs_bias else None,
        dlogit if needs_weight or needs_bias or needs_log_z else None,
        grad_hidden if needs_hidden else None,
    )


def _backward(ctx, grad_loss, grad_ids, grad_dlogit, grad_grad_hidden):
    """Everything is linear in grad_loss [B], so the kernels of the forward pass have done all but a scaling."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    inputs: list[Tensor | None] = [None] * 26
    if grad_loss is None:
        return tuple(inputs)
    hidden, ids, dlogit, grad_hidden = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if needs_hidden:
        inputs[0] = (grad_hidden * grad_loss[:, None]).to(ctx.hidden_dtype)
    if needs_weight or needs_bias:
        arguments = (ids, dlogit, grad_loss, hidden, ctx.n_classes, ctx.row_dtype, needs_weight, needs_bias)
        layout = ctx.gradient_layout
        if layout == DENSE:
            classes, (rows, elements) = ids, torch.ops.nce_ext.row_grad_dense(*arguments)
        else:
            layout = PADDED if _capturing(ids.device) else layout
            classes, rows, elements = torch.ops.nce_ext.row_grad(*arguments, layout == PADDED)
        _give_row_gradients(ctx, inputs, layout, classes, rows, elements)
    if ctx.needs_input_grad[4]:
        inputs[4] = -dlogit.sum(1) * grad_loss
    return tuple(inputs)


def _setup_shared_context(ctx, inputs, output) -> None:
    hidden, weight = inputs[:2]
    _, target_ids, target_dlogit, grad_hidden, classes, rows, elements, dlogit, grad_shift = output
    ctx.set_materialize_grads(False)
    ctx.n_classes, ctx.row_dtype, ctx.hidden_dtype = weight.shape[0], weight.dtype, hidden.dtype
    ctx.gradient_layout, ctx.weight_device = inputs[-1], weight.device
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    of_rows = (hidden, target_ids, target_dlogit, classes, rows, elements, dlogit)
    ctx.save_for_backward(
        grad_hidden if needs_hidden else None,
        grad_shift if ctx.needs_input_grad[4] else None,
        *(of_rows if needs_weight or needs_bias else [None] * 7),
    )


def _shared_backward(ctx, grad_loss, *_):
    """As _backward. grad_loss is [1] where the forward pass has summed the examples."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    inputs: list[Tensor | None] = [None] * 23
    if grad_loss is None:
        return tuple(inputs)
    grad_hidden, grad_shift, hidden, target_ids, target_dlogit, classes, rows, elements, dlogit = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if needs_hidden:
        if grad_loss.shape[0] != 1 or not is_one(grad_loss):
            grad_hidden = grad_hidden * grad_loss[:, None]
        inputs[0] = grad_hidden.to(ctx.hidden_dtype)
    if needs_weight or needs_bias:
        layout = ctx.gradient_layout
        if layout == COALESCED and _capturing(hidden.device):
            layout = PADDED
        classes, rows, elements = torch.ops.nce_ext.shared_row_grad(
            target_ids, target_dlogit, grad_loss, hidden, classes, rows, elements, dlogit, ctx.n_classes, ctx.row_dtype,
            needs_weight, needs_bias, layout,
        )  # fmt: skip
        _give_row_gradients(ctx, inputs, layout, classes, rows, elements)
    if ctx.needs_input_grad[4]:
        inputs[4] = -grad_shift * grad_loss
    return tuple(inputs)


def _give_row_gradients(ctx, inputs, layout: int, classes: Tensor, rows: Tensor, elements: Tensor) -> None:
    """Put weight's and bias's gradient, dense or as COO tensors of these classes, where backward returns them."""
    needs_weight, needs_bias = ctx.needs_input_grad[1:3]
    if layout == DENSE:
        inputs[1:3] = [rows if needs_weight else None, elements if needs_bias else None]
        return
    classes, rows, elements = _brought_to(ctx.weight_device, classes, rows, elements)
    if layout == COALESCED and not torch.compiler.is_compiling():
        _remember(classes, needs_weight + needs_bias)
    if needs_weight:
        inputs[1] = coo(classes, rows, (ctx.n_classes, rows.shape[1]), layout == COALESCED)
    if needs_bias:
        inputs[2] = coo(classes, elements, (ctx.n_classes,), layout == COALESCED)


def _brought_to(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on that device; from CUDA to the host as copies in pinned memory, complete when this returns.

    The copies run on the stream that made the tensors, at the full rate of the bus and without touching fresh pages;
    the memory is used again once the gradient is gone. Nothing on the CPU waits for a stream, so this does, once for
    all of them: then the forward pass has read its rows as well, and they may be changed.
    """
    source = tensors[0].device
    if source == device:
        return tensors
    if source.type != "cuda" or type(tensors[0]) is not Tensor or torch.compiler.is_compiling():  # nothing to wait for
        return tuple(t.to(device) for t in tensors)
    copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
    for copy, t in zip(copies, tensors, strict=True):
        copy.copy_(t, non_blocking=True)
    torch.cuda.current_stream(source).synchronize()
    return copies


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may wait for the number of touched rows."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def coo(classes: Tensor, values: Tensor, size: tuple[int, ...], coalesced: bool) -> Tensor:
    """A gradient of the rows ``classes`` [U]."""
    return torch.sparse_coo_tensor(classes[None], values, size, is_coalesced=coalesced, check_invariants=False)


if _registered:
    for _fake in _fakes.OF_OPERATORS:
        torch.library.register_fake(f"nce_ext::{_fake.__name__}", _fake)
    torch.library.register_autograd("nce_ext::sampled_loss", _backward, setup_context=_setup_context)
    torch.library.register_autograd("nce_ext::shared_loss", _shared_backward, setup_context=_setup_shared_context)
