"""One table of tolerances, and the only comparison of floating-point results with the float64 truth."""

from __future__ import annotations

import numpy as np
import torch

# dtype of the table -> (rtol, atol) of a result that is accumulated in float32 (float64) and rounded once at the end.
# atol is multiplied by the largest magnitude in the truth, so that it measures cancellation in sums.
TOLERANCE = {
    # A few hundred float64 roundings: 2^-53 * 1e3.
    torch.float64: (1e-12, 1e-13),
    # float32 dot products of up to 300 terms, and exp/log1p polynomials of about 2 ulp: 2^-24 * 50.
    torch.float32: (3e-6, 2e-6),
    # float32 arithmetic, then one rounding to 11 significant bits (half an ulp is 2^-12 of the value at worst).
    torch.float16: (6e-4, 6e-6),
    # float32 arithmetic, then one rounding to 8 significant bits (half an ulp is 2^-9 of the value at worst).
    torch.bfloat16: (4.5e-3, 6e-6),
}

# Smallest positive number of a storage type: half of it is the error of a rounding that underflows.
UNDERFLOW = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}

# "No worse than eager PyTorch in that dtype": the factor left for a different order of summation.
EAGER_MARGIN = 1.1


def as_float64(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = (value.to_dense() if value.is_sparse else value).detach().double().numpy()
    return np.asarray(value, dtype=np.float64)


def assert_close(got, truth, dtype: torch.dtype, what: str) -> None:
    """got, a tensor, equals the float64 truth to the rounding of dtype."""
    got, truth = as_float64(got), as_float64(truth)
    assert got.shape == truth.shape, f"{what}: shape {got.shape}, expected {truth.shape}"
    if truth.size == 0:
        return
    rtol, atol = TOLERANCE[dtype]
    limit = rtol * np.abs(truth) + atol * np.abs(truth).max() + UNDERFLOW[dtype]
    error = np.abs(got - truth)
    bad = ~(error <= limit)  # NaN compares false
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - limit)), error.shape)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} differ; at {tuple(map(int, worst))} got {got[worst]!r}, "
            f"expected {truth[worst]!r}, error {error[worst]:.3e} > {limit[worst]:.3e}"
        )


def relative_error(got, truth) -> float:
    """Euclidean norm of the error of a vector over that of the truth."""
    got, truth = as_float64(got), as_float64(truth)
    norm = float(np.linalg.norm(truth))
    return float(np.linalg.norm(got - truth)) / norm if norm else float(np.linalg.norm(got))
