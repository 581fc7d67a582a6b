"""The CUDA kernels, compiled for the host: module emulated_kernels in the folder NCE_EXT_EMULATOR."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # oracle.py and rounding.py

import emulated


@pytest.fixture(autouse=True, scope="session")
def kernels():
    """Skip without them, unless the run has declared that they must be there."""
    return emulated.kernels()
