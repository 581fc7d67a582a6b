"""Base class of the loss modules that can keep their tables in pinned host memory while the model is on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class PinnedTables(nn.Module):
    """Module with tables ``weight`` and ``bias`` that :meth:`pin_weight` keeps in pinned host memory."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    sparse: bool | str
    _pinned = False

    def pin_weight(self) -> Self:
        """Keep weight and bias in pinned host memory, where kernels on a GPU read the rows they need.

        For tables that do not fit the GPU. ``pin_weight().cuda()`` moves all but these two, as does ``cuda()`` of a
        model that has the loss. ``weight.grad`` comes back to the host, for an optimizer that runs there::

            loss_fn = nce_ext.NCELoss(D, V, noise, k, sparse=True).pin_weight().cuda()
            optimizer = nce_ext.optim.Adagrad(loss_fn.parameters(), lr=0.1)
            loss_fn(hidden, target).backward()          # hidden and target on the GPU
            optimizer.step()                            # the touched rows, on the CPU

        Needs ``sparse=True`` or "padded" and the fused backend; not with ``fuse_optimizer``, nor while a CUDA graph is
        captured. A ``state_dict`` loads into the pinned memory; deep copies and unpickled modules are in ordinary
        memory, and need the call again. While the memory is pinned, weight and bias exist twice. docs/host_memory.md
        says more.

        Returns:
            The module itself.

        Raises:
            ValueError: ``sparse=False``.
            RuntimeError: there is no GPU to pin memory for.
        """
        if not self.sparse:
            raise ValueError(f"sparse must be True or 'padded' with a weight in host memory, got {self.sparse!r}")
        for p in (self.weight, self.bias):
            if p is not None:
                p.data = p.detach().cpu().pin_memory()
        self._pinned = True
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply what ``to()``, ``cuda()`` and their like ask for; of pinned tables only the dtype changes."""
        apply: Callable[..., Any] = super()._apply
        if not self._pinned:
            apply(fn, recurse)
            return self
        tables = {name: p for name in ("weight", "bias") if (p := self._parameters.get(name)) is not None}
        self._parameters.update(dict.fromkeys(tables))
        try:
            apply(fn, recurse)
        finally:
            self._parameters.update(tables)
        for p in tables.values():
            if (dtype := fn(p.new_empty(0)).dtype) != p.dtype:
                p.data = p.detach().to(dtype).pin_memory()
        return self
