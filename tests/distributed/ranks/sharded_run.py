"""What the scripts that ranks run have in common: checks one after the other, and a report of all ranks."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchrun import report


def start() -> DeviceMesh:
    """A group of all ranks; fresh memory is poisoned."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),))


def everybody(value: Any) -> list[Any]:
    """The values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The ranks' rows of each behind each other; a scalar must be the same on all of them."""
    ranks = everybody(tensors)
    whole: list[Tensor | None] = []
    for i, tensor in enumerate(tensors):
        parts = [values[i] for values in ranks]
        if tensor is not None and not tensor.dim():
            assert all(torch.equal(other, parts[0]) for other in parts), f"not the same on all ranks: {parts}"
        whole.append(tensor if tensor is None or not tensor.dim() else torch.cat(parts))
    return whole


def run_all(checks: dict[str, Callable[[], Any]]) -> None:
    """Run each check; every rank reports what ran, the traceback of each failure, and what the checks returned."""
    failures, results = {}, {}
    for name, check in checks.items():
        mine = None
        try:
            results[name] = check()
        except Exception:
            mine = traceback.format_exc()
        texts = everybody(mine)
        if any(texts):
            failures[name] = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
    report({"ran": list(checks), "failures": failures, "results": results})
    dist.destroy_process_group()
