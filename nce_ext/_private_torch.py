"""Uses of names that PyTorch does not document, each with the reason why no public one serves.

Nothing else in the package names them. tests/test_private_torch.py asserts what is relied on here, so that a release of
PyTorch that changes one of them is met by a test that says which.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable[..., Any])


def run_eagerly(function: Function) -> Function:
    """Keep ``function`` out of compiled graphs: ``torch.compiler.disable``, which takes seconds to import."""
    return cast("Function", _disable_dynamo(function))


# Sparse gradients. The public indices() and values() refuse a tensor that is not coalesced, and copy the flag's check
# into compiled graphs; coalesce() sorts anew whatever is known to be sorted.


def coo_classes(gradient: Tensor) -> Tensor:
    """Class of every row of a COO gradient, int64 [U], whether or not it is coalesced."""
    return gradient._indices()[0]


def coo_rows(gradient: Tensor) -> Tensor:
    """Rows [U, ...] of a COO gradient, whether or not it is coalesced; the memory of the gradient itself."""
    return gradient._values()


def flag_coalesced(gradient: Tensor) -> Tensor:
    """Declare that the classes of a COO gradient ascend, each once; the gradient itself."""
    return gradient._coalesced_(True)


def call_after_accumulation(parameter: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Have ``hook`` called after each gradient of a leaf is accumulated, once however often this is asked for.

    Whether it is known to the parameter is read from the parameter: a weak dictionary of parameters would keep
    ``torch.utils.swap_tensors`` from swapping them. Swapped, a parameter keeps the list of its hooks, but torch no
    longer calls them until the list is given to it again.
    """
    hooks = parameter._post_accumulate_grad_hooks
    if hooks is None or hook not in hooks.values():
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    else:
        parameter._post_accumulate_grad_hooks = hooks


def version(tensor: Tensor) -> int:
    """Count the in-place changes of a tensor, to see whether something derived from it is still true."""
    return -1 if tensor.is_inference() else tensor._version  # in inference mode nothing is counted


# The autograd engine. Public hooks see one tensor or one node; a fused step needs the pass as a whole.


def backward_pass_id() -> int:
    """Number the backward pass that this thread is in; -1 outside of one."""
    return torch._C._current_graph_task_id()


def will_run_in_this_pass(node: torch.autograd.graph.Node) -> bool:
    """Tell whether the backward pass under way executes ``node``, which ``autograd.grad`` of other inputs does not."""
    return torch._C._will_engine_execute_node(node)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call back once, when all gradients of the pass under way have been accumulated."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


# Function transforms (torch.func). No public name says whether one is under way; asking takes 0.2 us.


def inside_transform() -> bool:
    """Tell whether this thread is inside ``torch.func.grad``, ``vmap`` or another transform; False while tracing."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def inside_vmap() -> bool:
    """Tell whether one of the transforms that this thread is inside is vmap: then tensors have no single value."""
    if not inside_transform():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def is_batched(tensor: Tensor) -> bool:
    """Tell whether a tensor is a different one in each entry of a vmap, which has no public predicate either."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_batchedtensor(tensor)


# Optimizers.


def mark_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell schedulers of the learning rate that a step was taken, where ``step()`` was not called."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def record_found_inf(scaler: torch.amp.GradScaler, counted: object, found_inf: Tensor) -> None:
    """Count a step, as ``scaler.step`` would, among those whose gradients ``scaler.update`` looks at."""
    scaler._per_optimizer_states[id(counted)]["found_inf_per_device"][found_inf.device] = found_inf


# Process groups.


def timeout_of(group: torch.distributed.ProcessGroup) -> timedelta | None:
    """Timeout of the group's first backend; None where it does not say."""
    try:
        timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None
    return timeout


class SaysWhatIsSparse:
    """Mixin before ``DistributedDataParallel``, which asks only the modules of torch.nn whether they are sparse.

    Its reducer has to know beforehand whose gradients are sparse, and there is no option that would tell it.
    """

    _was_asked = False

    def _sparse_parameters(self) -> list[nn.Parameter]:
        """List the parameters whose gradients are sparse, beside those that DDP knows itself."""
        raise NotImplementedError

    def _build_params_for_reducer(self) -> tuple[list[Tensor], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()  # type: ignore[misc]  # DDP's, which comes after
        self._was_asked = True
        told = {id(p) for p in self._sparse_parameters()}
        return parameters, [known or id(p) in told for known, p in zip(sparse, parameters, strict=True)]


# Matrix products.


def one_dnn_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply float32 matrices on the CPU, a b^T, by oneDNN: ``torch.mm`` takes MKL wherever torch has it.

    Raises:
        AttributeError, RuntimeError: a build of PyTorch without it.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product
