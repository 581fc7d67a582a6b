"""The operator ``alias_table``: a law of exact integer masses, drawn from in constant time."""

from __future__ import annotations

import torch
from torch import Tensor

from nce_ext import reference
from nce_ext._ops import library


def alias_table(weights: Tensor, scale: float) -> Tensor:
    """Build the int32 [V, 4] table of float64 weights [V] whose sum times ``scale`` is V 2^32."""
    if library.fused_available(weights.device):
        table: Tensor = torch.ops.nce_ext.alias_table(weights, scale)
        return table
    return reference.alias_table(weights, scale)


@library.register_fake("alias_table")
def _fake(weights: Tensor, scale: float) -> Tensor:
    return weights.new_empty((weights.shape[0], 4), dtype=torch.int32)
