"""The operator ``sample``: noise ids as a pure function of a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from nce_ext import _private_torch, reference
from nce_ext._ops import library


def sample(seed: Tensor, table: Tensor, kind: int, n_classes: int, rows: int, cols: int) -> Tensor:
    """Draw ids, int64 [rows, cols]: by the compiled kernel, or by the reference where there is none, or inside vmap."""
    if library.fused_available(seed.device) and not _private_torch.inside_vmap():
        ids: Tensor = torch.ops.nce_ext.sample(seed, table, kind, n_classes, rows, cols)
        return ids
    return reference.draw(kind, n_classes, table, seed, rows, cols)


@library.register_fake("sample")
def _fake(seed: Tensor, table: Tensor, kind: int, n_classes: int, rows: int, cols: int) -> Tensor:
    return seed.new_empty((rows, cols))


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw a fresh seed, int64 [2], from torch's own random state."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)
