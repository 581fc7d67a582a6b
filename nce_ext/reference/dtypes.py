"""Dtypes in which the losses and the steps compute."""

from __future__ import annotations

import torch


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """Choose the dtype in which kernels compute with weights of a storage dtype."""
    return torch.float64 if storage == torch.float64 else torch.float32
