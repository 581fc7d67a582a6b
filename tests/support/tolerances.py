"""The comparison of tensors with the float64 truth; its numbers are those of rounding.py."""

from __future__ import annotations

import numpy as np
import torch
from rounding import assert_rounded

# "No worse than eager PyTorch in that dtype": the factor left for a different order of summation.
EAGER_MARGIN = 1.1


def as_float64(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = (value.to_dense() if value.is_sparse else value).detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def assert_close(got, truth, dtype: torch.dtype, what: str, scale=None) -> None:
    """got equals the float64 truth to the rounding of dtype. Without a scale the truth's largest element is taken."""
    scale = None if scale is None else as_float64(scale)
    assert_rounded(as_float64(got), as_float64(truth), str(dtype).removeprefix("torch."), what, scale)


def relative_error(got, truth) -> float:
    """Euclidean norm of the error of a vector over that of the truth."""
    got, truth = as_float64(got), as_float64(truth)
    norm = float(np.linalg.norm(truth))
    return float(np.linalg.norm(got - truth)) / norm if norm else float(np.linalg.norm(got))
