"""Sharded tables in checkpoints: what each rank keeps of a table is presented as its part of one tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nce_ext.optim.row_optimizer import RowOptimizer


class ShardedState(nn.Module):
    """Module whose ``weight`` and ``bias`` are the rows ``first .. last - 1`` of tables of ``n_classes`` rows.

    ``state_dict`` presents them as DTensors of the tables, and ``load_state_dict`` takes such, or whole tensors.
    """

    device_mesh: DeviceMesh
    in_features: int
    n_classes: int
    first: int
    last: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def as_dtensor(self, rows: Tensor) -> DTensor:
        """Present ``rows`` [last - first, ...] as this rank's part of a tensor of all classes, [V, ...]; no copy."""
        if rows.dim() < 1 or len(rows) != self.last - self.first:
            raise ValueError(f"rows must be [{self.last - self.first}, ...], got shape {list(rows.shape)}")
        shape = torch.Size([self.n_classes, *rows.shape[1:]])
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(rows, self.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            if prefix + name in destination:
                destination[prefix + name] = self.as_dtensor(destination[prefix + name])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        shapes = {"weight": [self.n_classes, self.in_features], "bias": [self.n_classes]}
        for name, shape in shapes.items():
            parameter, value = getattr(self, name), state_dict.get(prefix + name)
            if parameter is None or value is None:
                continue
            if list(value.shape) == shape:
                state_dict[prefix + name] = self._own_rows(value)
            else:
                errors.append(f"{prefix}{name} must have shape {shape}, got {list(value.shape)}")
                state_dict[prefix + name] = parameter.detach()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _own_rows(self, table: Tensor) -> Tensor:
        """Select this rank's rows of a tensor of all classes."""
        if isinstance(table, DTensor):
            if table.device_mesh == self.device_mesh and table.placements == (Shard(0),):
                return table.to_local()
            table = table.full_tensor()
        return table[self.first : self.last]

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """Return what ``optimizer`` keeps for ``weight`` and ``bias``, by their names, for checkpoints.

        What has one entry a class is a DTensor of all classes, in the same memory; the rest is as it is. To continue
        with another number of ranks, let the new optimizer make its state by a step on no examples, and load into it::

            loss_fn(hidden[:0], target[:0]).backward()
            optimizer.step()
            state = {"model": loss_fn.state_dict(), "optimizer": loss_fn.optimizer_state_dict(optimizer)}
            torch.distributed.checkpoint.load(state, checkpoint_id=...)
            loss_fn.load_state_dict(state["model"])
            loss_fn.load_optimizer_state_dict(optimizer, state["optimizer"])
        """
        states = optimizer.state_dict()["state"]
        numbers = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        return {
            name: {key: self._as_checkpointed(parameter, value) for key, value in states[numbers[parameter]].items()}
            for name, parameter in self._tables()
            if parameter in optimizer.state
        }

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
        """Give ``optimizer`` the state of ``weight`` and ``bias`` that :meth:`optimizer_state_dict` has made."""
        for name, parameter in self._tables():
            if name in state:
                optimizer.state[parameter] = own = {
                    key: self._own_rows(value) if isinstance(value, DTensor) else value
                    for key, value in state[name].items()
                }
                if isinstance(optimizer, RowOptimizer) and "by_rows" in own:
                    optimizer._adopt(parameter, own)

    def _tables(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in (("weight", self.weight), ("bias", self.bias)) if p is not None]

    def _as_checkpointed(self, parameter: Tensor, value: Any) -> Any:
        """Present an optimizer's state as a DTensor if it has one entry a class, else as it is."""
        per_class = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(parameter)
        return self.as_dtensor(value) if per_class else value
