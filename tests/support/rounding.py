"""What rounding may do to a result, and its comparison with the float64 truth; of numpy alone."""

from __future__ import annotations

import numpy as np

# storage type -> (rtol, atol): rtol is the one rounding of the finished result, relative to the result; atol is that of
# the arithmetic, relative to the scale of the result, which is the sum of the magnitudes of all that was added up.
TOLERANCE = {
    # 2^-53 for each of some roundings: products, a sum of equal terms in any order, exp, log1p.
    "float64": (2.0**-53, 32 * 2.0**-53),
    # float32 arithmetic, whose exp and log1p are good to about 2 ulp, and log q kept in float32.
    "float32": (2.0**-24, 32 * 2.0**-24),
    # float32 arithmetic, then one rounding to 11 significant bits.
    "float16": (2.0**-11, 32 * 2.0**-24),
    # float32 arithmetic, then one rounding to 8 significant bits.
    "bfloat16": (2.0**-8, 32 * 2.0**-24),
}

# What underflows: half the smallest positive number of the storage type; and in float32 (float64) arithmetic an exp
# that stops at the smallest normal number, 1e-38 (2e-308), which a gradient multiplies by elements of up to 1000.
UNDERFLOW = {"float64": 1e-304, "float32": 1e-35, "float16": 2.0**-25, "bfloat16": 1e-35}


def assert_rounded(got: np.ndarray, truth: np.ndarray, dtype: str, what: str, scale=None) -> None:
    """got equals the float64 truth to the rounding of dtype. Without a scale the truth's largest element is taken."""
    assert got.shape == truth.shape, f"{what}: shape {got.shape}, expected {truth.shape}"
    if truth.size == 0:
        return
    rtol, atol = TOLERANCE[dtype]
    scale = np.abs(truth).max() if scale is None else np.asarray(scale, np.float64).reshape(truth.shape)
    limit = rtol * np.abs(truth) + atol * scale + UNDERFLOW[dtype]
    error = np.abs(got - truth)
    bad = ~(error <= limit)  # NaN compares false
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - limit)), error.shape)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} differ; at {tuple(map(int, worst))} got {got[worst]!r}, "
            f"expected {truth[worst]!r}, error {error[worst]:.3e} > {limit[worst]:.3e}"
        )
