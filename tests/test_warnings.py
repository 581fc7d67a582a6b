"""Warnings name the user's line, whatever of the package and of torch stands between, and come as often as asked."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from nce_ext import _warnings, utils

# Compiled under a file name of the package, whose code this stands for.
SOURCE = """
import torch
from nce_ext import _warnings

def warns(x):
    _warnings.warn_user("of a function")
    return x

def warns_deep_inside(x):
    def inner():
        return (lambda: warns(x))()
    return inner()

@torch.no_grad()
def warns_without_gradient(x):
    return warns(x)

def warns_once(x, key="a key"):
    _warnings.warn_once(key, f"once of {key}", RuntimeWarning)
    return x

class Warns(torch.nn.Module):
    def forward(self, x):
        return warns_deep_inside(x)
"""
FILE = os.path.join(os.path.dirname(_warnings.__file__), "invented", "room.py")
room: Any = types.ModuleType("invented_room")
exec(compile(SOURCE, FILE, "exec"), room.__dict__)
sys.modules[room.__name__] = room  # where torch.compile looks for its functions


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch):
    monkeypatch.setattr(_warnings, "_given", set())


@contextlib.contextmanager
def recorded():
    """All warnings given inside, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def line_here() -> int:
    return inspect.currentframe().f_back.f_lineno


def lines_of(caught: list) -> list[int]:
    assert all(w.filename == __file__ for w in caught), [w.filename for w in caught]
    return [w.lineno for w in caught]


def test_a_call_of_a_function_is_blamed():
    with recorded() as caught:
        room.warns(1)
        first = line_here() - 1
        room.warns_deep_inside(1)
        room.warns_without_gradient(1)
        functools.partial(room.warns, 1)()
    assert lines_of(caught) == [first, first + 2, first + 3, first + 4]


def test_a_call_of_a_module_is_blamed():
    loss_fn = room.Warns()
    loss_fn.register_forward_pre_hook(lambda *_: None)
    with recorded() as caught:
        loss_fn(1)
        first = line_here() - 1
        loss_fn.forward(1)
        nn.Sequential(nn.Identity(), loss_fn)(1)
        nn.Sequential(nn.Sequential(loss_fn))(1)
        torch.func.functional_call(loss_fn, {}, (1,))
    assert lines_of(caught) == [first, first + 2, first + 3, first + 4, first + 5]


def test_the_line_in_a_module_of_the_user_is_blamed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss_fn = room.Warns()

        def forward(self, x):
            return self.loss_fn(x)

    with recorded() as caught:
        nn.Sequential(Model())(1)
    assert lines_of(caught) == [inspect.getsourcelines(Model.forward)[1] + 1]


def test_the_line_in_a_checkpointed_function_is_blamed():
    x = torch.zeros(2, requires_grad=True)
    with recorded() as caught:
        torch.utils.checkpoint.checkpoint(room.warns, x, use_reentrant=False)
    assert lines_of(caught) == [line_here() - 1]


def test_an_import_is_blamed(tmp_path, monkeypatch):
    """Between the user's line and the package are the frames of the import system, which Python does not count."""
    (tmp_path / "imports_the_room.py").write_text("def load(name):\n    return __import__(name)\n")
    package = tmp_path / "room_that_warns"
    package.mkdir()
    (package / "__init__.py").write_text("from room_that_warns import inner")
    (package / "inner.py").write_text("from nce_ext import _warnings\n_warnings.warn_user('on import')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_warnings, "_INSIDE", (*_warnings._INSIDE, str(package)))
    import imports_the_room

    with pytest.warns(UserWarning, match="on import") as caught:
        imports_the_room.load("room_that_warns")
    assert [(w.filename, w.lineno) for w in caught] == [(imports_the_room.__file__, 2)]


def test_a_stack_without_a_line_of_the_user():
    with recorded() as caught:
        thread = threading.Thread(target=room.warns, args=(1,))
        thread.start()
        thread.join()
    assert [str(w.message) for w in caught] == ["of a function"]  # threading's own line is blamed


def test_the_users_filters_are_those_of_the_blamed_module():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=__name__)
        room.Warns()(1)
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="of a function"):
            room.Warns()(1)


def test_once_is_once_a_key_until_it_is_forgotten():
    with recorded() as caught:
        for _ in range(2):
            for key in ("a key", "another"):
                room.warns_once(1, key)
        first = line_here() - 1
        _warnings.forget()
        room.warns_once(1)
    assert [str(w.message) for w in caught] == ["once of a key", "once of another", "once of a key"]
    assert {w.category for w in caught} == {RuntimeWarning}
    assert lines_of(caught) == [first, first, first + 3]


def test_once_is_once_among_threads():
    start = threading.Barrier(8)

    def call() -> None:
        start.wait()
        room.warns_once(1)

    with recorded() as caught:
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caught) == 1


def test_tracing_gives_no_warning_and_does_not_use_it_up():
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return room.warns_once(room.warns(x)) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        assert compiled(torch.zeros(1)) == 1
    with pytest.warns(RuntimeWarning, match="once of a key"):
        room.warns_once(1)


def test_a_used_up_iterator_of_parameters():
    with pytest.warns(UserWarning, match="empty iterator") as caught:
        utils.clip_grad_norm_((p for p in ()), 1.0)
    assert lines_of(caught) == [line_here() - 1]
