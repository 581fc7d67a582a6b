"""Whether the compiled kernels are there."""

from __future__ import annotations

import os

import pytest
import torch

from nce_ext._ops import library


def require_native() -> None:
    """Skip without the compiled kernels, unless the run has declared that they must be there."""
    cpu = torch.device("cpu")
    if library.fused_available(cpu):
        return
    if os.environ.get("NCE_EXT_TEST_REQUIRE_NATIVE") == "1":
        pytest.fail(f"NCE_EXT_TEST_REQUIRE_NATIVE=1, but: {library.why_missing(cpu)}")
    pytest.skip(f"no compiled kernels: {library.why_missing(cpu)}")
