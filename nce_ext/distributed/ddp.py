"""Row-sparse gradients in data-parallel training: (ids, rows) of every rank, gathered and merged."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nce_ext import _private_torch
from nce_ext._checks import describe
from nce_ext._ops.row_grad import coalesce
from nce_ext.distributed.collectives import Collectives
from nce_ext.losses import _SampledLoss

__all__ = ["RowSparseDDP", "reduce_sparse_gradients", "sparse_gradient_hook"]


class RowSparseDDP(_private_torch.SaysWhatIsSparse, DistributedDataParallel):
    """DistributedDataParallel that reduces row-sparse gradients as rows, at a cost that does not depend on V.

    Equivalent, after every backward, for each parameter with a sparse gradient, to::

        grad = sum(gradient of each rank) / world_size, coalesced

    with the same bits on every rank; dense gradients are averaged as ever. A rank sends the ids and the rows that it
    touched; after steps under ``no_sync``, once, at the end. Sparse are losses with ``sparse=True`` (or "padded") and,
    as for DDP itself, ``nn.Embedding`` and ``nn.EmbeddingBag`` with ``sparse=True``. (DDP alone knows no others, and
    breaks off at the gradient of such a loss.) ::

        model = nce_ext.distributed.RowSparseDDP(model)      # model holds nce_ext.NCELoss(..., sparse=True)
        model(input, target).backward()
        optimizer.step()                                     # of nce_ext.optim

    Each rank's loss must take part in every backward; with an empty batch it touches no row. It registers
    :func:`sparse_gradient_hook`, and so leaves no room for another communication hook.

    Args:
        module, arguments, options: as DistributedDataParallel; but ``forward_sync_buffers`` (``broadcast_buffers``
            before torch 2.13) is False unless given: the table of a noise distribution is a buffer of V rows, which DDP
            would send in every forward.

    Attributes:
        collectives: whose ``sent_bytes`` counts what sparse gradients cost.

    Raises: as DistributedDataParallel. ValueError: a module with a loss that has a fused optimizer. RuntimeError: a
        PyTorch whose DDP cannot be told what is sparse.
    """

    def __init__(self, module: nn.Module, *arguments: Any, **options: Any) -> None:
        if any(isinstance(m, _SampledLoss) and m._fused is not None for m in module.modules()):
            raise ValueError(
                "module must hold no loss with a fused optimizer, for whose gradient DDP would wait; keep the loss "
                "outside, and give fuse_optimizer the process_group"
            )
        # The option has a new name since torch 2.13; the fourth argument is the old one.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        if len(arguments) < 4 and "broadcast_buffers" not in options:
            options.setdefault("forward_sync_buffers" if new else "broadcast_buffers", False)
        super().__init__(module, *arguments, **options)
        if not self._was_asked:
            raise RuntimeError(
                f"RowSparseDDP has to tell DDP what is sparse, and torch {torch.__version__} did not ask"
            )
        self.collectives = Collectives(self.process_group)
        self.register_comm_hook(self.collectives, sparse_gradient_hook)

    def _sparse_parameters(self) -> list[nn.Parameter]:
        """List the tables of the module's losses that give sparse gradients."""
        losses = (m for m in self.module.modules() if isinstance(m, _SampledLoss) and m.sparse)
        return [table for loss_fn in losses for table in (loss_fn.weight, loss_fn.bias) if table is not None]


def sparse_gradient_hook(
    state: Collectives | dist.ProcessGroup | None, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """A communication hook: the average over ranks of a bucket, row-sparse or dense.

    For a DDP that knows which of its parameters are sparse, from ``nn.Embedding(sparse=True)``, by
    ``ddp.register_comm_hook(None, sparse_gradient_hook)``; :class:`RowSparseDDP` brings its own.

    Args:
        state: the ranks of the DDP: its process group, ``Collectives`` of that, or None for the default group.
        bucket: from DDP. A sparse one is a single gradient; a dense one is averaged as without a hook.

    Raises:
        ValueError: on every rank, if their gradients differ in shape or dtype.
        RuntimeError: a rank is missing, or failed.
    """
    collectives = state if isinstance(state, Collectives) else Collectives(state)
    gradient = bucket.buffer()
    if not gradient.is_sparse:
        work = dist.all_reduce(gradient.div_(collectives.size), group=collectives.group, async_op=True)
        return work.get_future().then(lambda reduced: reduced.value()[0])
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    with collectives.step():
        mean = _mean_over_ranks(gradient, gradient, collectives)
        assert mean is not None
    future.set_result(mean)
    return future


if dist.is_available():
    # DDP compares them with types, and here they are strings.
    sparse_gradient_hook.__annotations__.update(bucket=dist.GradBucket, **{"return": torch.futures.Future[Tensor]})


@torch.no_grad()
def reduce_sparse_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace the row-sparse gradient of each parameter by its average over the ranks, the same bits on all.

    For training loops without DDP, or for parameters that are kept out of it: call it once between the last
    ``backward()`` and the optimizer's step. Equivalent to ``p.grad = sum(gradient of each rank) / world_size``,
    coalesced. Costs what the touched rows cost, whatever V is.

    Args:
        parameters: the same on every rank, in the same order. A parameter whose ``grad`` is None on this rank counts as
            one without touched rows; if it is None on all of them, it stays.
        group: the ranks; None: the default group.

    Raises:
        TypeError: a gradient that is dense, on the rank that has it; a RuntimeError that names it on the others.
        ValueError: on every rank, if the parameters differ in number, shape or dtype.
        RuntimeError: a rank is missing, or failed. The gradients of a step that was refused are as they were.
    """
    collectives = Collectives(group)
    parameters = list(parameters)
    with collectives.step():
        for i, p in enumerate(parameters):
            if not isinstance(p, Tensor):
                raise TypeError(f"parameters must be tensors, got {describe(p)} at index {i}")
            if p.grad is not None and not (p.grad.is_sparse and p.grad.sparse_dim() == 1):
                raise TypeError(f"parameters must have row-sparse gradients, got {describe(p.grad)} at index {i}")
        collectives.agree(**{"the number of parameters": len(parameters)})
        reduced = [_mean_over_ranks(p.grad, p, collectives) for p in parameters]
    for p, gradient in zip(parameters, reduced, strict=True):
        p.grad = gradient


def _mean_over_ranks(gradient: Tensor | None, like: Tensor, collectives: Collectives) -> Tensor | None:
    """The mean over ranks of COO gradients [V, ...], coalesced; the rows of a class are added in the order of ranks."""
    shape = tuple(like.shape)
    # Half the bytes of int64, wherever classes fit.
    narrow = torch.int32 if shape[0] < 2**31 else torch.int64
    if gradient is None:
        ids, rows = like.new_zeros((0,), dtype=narrow), like.new_zeros((0, *shape[1:]))
    else:
        own = coalesce(gradient)
        ids, rows = _private_torch.coo_classes(own).to(narrow), _private_torch.coo_rows(own)
    common: dict[str, Any] = {"the shape of the gradient": shape, "the dtype of the gradient": str(rows.dtype)}
    sizes = collectives.sizes(-1 if gradient is None else len(ids), **common)
    if max(sizes) < 0:
        return None
    sizes = [max(n, 0) for n in sizes]
    ids, rows = collectives.all_gather(ids, sizes), collectives.all_gather(rows, sizes)
    whole = torch.sparse_coo_tensor(ids.long()[None], rows, shape, check_invariants=False)
    whole = coalesce(whole) if collectives.size > 1 else _private_torch.flag_coalesced(whole)
    _private_torch.coo_rows(whole).div_(collectives.size)
    return whole
