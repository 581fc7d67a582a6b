"""Fixtures of the tests of examples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from load_example import load_example


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch) -> Path:
    """An empty folder; neither Debian's data nor scikit-learn can be found."""
    monkeypatch.setattr(load_example("_data"), "SYSTEM", tmp_path / "usr-share")
    for name in ("sklearn", "sklearn.datasets"):  # another test may have imported the second
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path
