"""The CUDA kernels, compiled for the host: module emulated_kernels in the folder NCE_EXT_EMULATOR."""

from __future__ import annotations

import emulated
import pytest


@pytest.fixture(autouse=True, scope="session")
def kernels():
    """Skip without them, unless the run has declared that they must be there."""
    return emulated.kernels()
