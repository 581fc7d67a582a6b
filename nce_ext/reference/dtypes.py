"""The type in which values of a storage type are computed."""

from __future__ import annotations

import torch


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32 and the 16-bit types."""
    return torch.float64 if storage == torch.float64 else torch.float32
