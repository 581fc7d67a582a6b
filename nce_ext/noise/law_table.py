"""The table of a law as part of a module: moved, saved and loaded with it, checked once, and no buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nce_ext import _checks, _private_torch, reference

if TYPE_CHECKING:
    from typing_extensions import Self

_LOG_Q_TOLERANCE = 1e-5  # a float32 log q of another machine's mathematics is off by 4e-6 at most


class LawTable(nn.Module):
    """Module that holds the alias table of a law, or an empty one if the law is in closed form.

    ``state_dict`` has the table, and ``to()`` and its like move it, but it is no buffer: an average of buffers
    (``AveragedModel(use_buffers=True)``) would round its bits, and what sends buffers would send it on every step. The
    law outlives a stay on the meta device: ``to_empty()`` brings the table back as it was.

    A table that was filled elsewhere, or has been changed in place, is looked at once before it is used.
    """

    kind: int
    n_classes: int
    table: Tensor
    _kept: Tensor | None = None  # the table, while the module is on the meta device
    _checked: tuple[Tensor, int] | None = None  # the table that is known to be one, and its version

    def _hold(self, table: Tensor | None, device: torch.device | str | None) -> None:
        """Take over a table on the CPU, or none, and put it on the device; None: torch's default one."""
        own = _no_entries() if table is None else table
        device = torch.get_default_device() if device is None else torch.device(device)
        self.table = own.to(device)
        self._kept = own if self.table.is_meta else None
        self._trust_table()

    def check_table(self) -> None:
        """Raise if the table is not an alias table of ``n_classes`` classes. Costs nothing while nothing changes it.

        While tracing, and while a CUDA graph is captured, nothing is looked at.
        """
        if torch.compiler.is_compiling():
            return
        table, checked = self.table, self._checked
        if checked is not None and checked[0] is table and checked[1] == _private_torch.version(table):
            return
        if (
            self.kind != reference.ALIAS
            or table.is_meta
            or type(table) is not Tensor
            or (table.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return
        flaw = flaw_of_table(table, self.n_classes)
        if flaw is not None:
            raise ValueError(
                f"noise's table must be an alias table of its {self.n_classes} classes, got {flaw}: it was never "
                "filled, or something has changed it; load its state_dict, or construct the noise again"
            )
        self._trust_table()

    def _trust_table(self) -> None:
        """Take the table as it is for an alias table of this law."""
        self._checked = (self.table, _private_torch.version(self.table))

    def materialise(self, device: torch.device) -> bool:
        """Leave the meta device for another one; False if the law is not known, or the module is elsewhere."""
        if not self.table.is_meta or device.type == "meta" or (self._kept is None and self.kind == reference.ALIAS):
            return False
        self.to_empty(device=device)
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply what ``to()``, ``to_empty()`` and their like ask for; of the table only the device changes."""
        apply: Callable[..., Any] = super()._apply
        apply(fn, recurse)
        table = self.table
        if table.is_meta and self._kept is None and self.kind == reference.ALIAS:
            self.table = fn(table)  # whatever that is: check_table looks at it
            return self
        if table.is_meta:
            table = _no_entries() if self._kept is None else self._kept
            device = fn(table[:0]).device
        else:
            device = fn(table).device
        if device != self.table.device:
            self.table, self._kept = table.to(device), table if device.type == "meta" else None
            self._trust_table()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.kind == reference.ALIAS:
            destination[prefix + "table"] = self.table if keep_vars else self.table.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        key = prefix + "table"
        if self.kind != reference.ALIAS:
            return
        if key in unexpected:
            unexpected.remove(key)
        if key not in state_dict:
            if strict:
                missing.append(key)
            return
        value = state_dict[key]
        flaw = _checks.describe(value) if not isinstance(value, Tensor) else flaw_of_table(value, self.n_classes)
        if flaw is not None:
            errors.append(f"{key} must be an alias table of {self.n_classes} classes, got {flaw}.")
        elif not value.is_meta:
            self._load_table(value.detach(), (local_metadata or {}).get("assign_to_params_buffers", False))

    @torch.no_grad()
    def _load_table(self, value: Tensor, assign: bool) -> None:
        if assign:
            self.table, self._kept = value, None
        elif self.table.is_meta:
            self._kept = value.clone()
        else:
            self.table.copy_(value)
        self._trust_table()

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """List the buffers; those of this module alone, of which checkpoints are made, with the table."""
        if not recurse and self.kind == reference.ALIAS:
            yield f"{prefix}.table" if prefix else "table", self.table
        yield from super().named_buffers(prefix, recurse, remove_duplicate)

    def __setattr__(self, name: str, value: Any) -> None:
        # Loaders that set attributes one by one make a parameter of every tensor.
        is_parameter = name == "table" and isinstance(value, nn.Parameter)
        super().__setattr__(name, value.detach() if is_parameter else value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers = dict(state.get("_buffers", {}))
        if "table" in buffers:  # pickled when it was a buffer
            state = {**state, "table": buffers.pop("table"), "_buffers": buffers}
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def _no_entries() -> Tensor:
    """Make the table of a law in closed form."""
    return torch.empty((0, 4), dtype=torch.int32, device="cpu")


@torch.no_grad()
def flaw_of_table(table: Tensor, n_classes: int) -> str | None:
    """Describe why a tensor is no alias table of that many classes; None if it is one. O(n_classes), and waits.

    Any thresholds and aliases that are in range make a law: the log q that the table holds must be that of it.
    """
    if table.dtype != torch.int32 or table.shape != (n_classes, 4):
        return _checks.describe(table)
    if table.is_meta:
        return None
    alias = table[:, 1].long()
    low, high = int(alias.min()), int(alias.max())
    if low < 0 or high >= n_classes:
        return f"the alias {low if low < 0 else high}"
    log_q = table[:, 2].contiguous().view(torch.float32)
    truth = (torch.log(reference.alias_masses(table).double()) - math.log(n_classes * 2.0**32)).float()
    wrong = _checks.first_index(~((log_q == truth) | ((log_q - truth).abs() <= _LOG_Q_TOLERANCE)))
    if wrong is not None:
        return f"log q {float(log_q[wrong[0]]):g} of class {wrong[0]}, where its mass says {float(truth[wrong[0]]):g}"
    return None if torch.equal(table[:, 3], table[:, 2][alias]) else "a log q of an alias that is not its class's"
