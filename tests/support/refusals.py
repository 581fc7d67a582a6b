"""The check that no refusal in a module's source goes untested."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from types import ModuleType


def parametrized(*tests) -> list:
    """The tuples of parametrized tests that have no table."""
    return [values for test in tests for mark in test.pytestmark for values in mark.args[1]]


def messages(*tables) -> list[str]:
    """The last string of each refusal, be it a tuple or a table's row."""
    rows = [row for table in tables for row in (table.values() if isinstance(table, dict) else table)]
    return [getattr(row, "message", None) or next(v for v in row[::-1] if isinstance(v, str)) for row in rows]


def refusals_of(module: ModuleType) -> list[str]:
    """The beginnings of the messages that the source has, up to the first thing that is filled in."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name, text = ast.unparse(node.func), node.args[0]
        if isinstance(text, ast.JoinedStr):
            text = text.values[0]
        if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
            continue
        if name in ("ValueError", "TypeError"):
            found.append(text.value)
        elif re.fullmatch(r"_checks\.(tensor|one_of|count|number|batch_shaped)", name):
            found.append(f"{text.value} must")
    return found


def assert_tested(modules: Iterable[ModuleType], tested: Iterable[str]) -> None:
    """A message that no pattern begins like is a refusal without a test."""
    patterns = [re.split(r"\.[*\d]|\(\w+\|", p.replace("\\", ""))[0] for p in tested]
    for module in modules:
        for message in refusals_of(module):
            assert any(len(p) > 5 and (message.startswith(p) or p.startswith(message)) for p in patterns), (
                f"{module.__name__}: no test of the refusal {message!r}"
            )
