"""A program of examples/ as a module, with its neighbours importable while it is loaded."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def run_example(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """As ``python examples/NAME.py ARGUMENTS`` does."""
    monkeypatch.setattr(sys, "argv", [example.__file__, *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    example.run(example.main)
