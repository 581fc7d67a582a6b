"""Warnings that name the user's own line, however deep in the package they are given."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from types import FrameType

import torch

# Directories whose frames are never the user's: this package, and torch, whose nn.Module.__call__, nn.Sequential,
# no_grad and torch.compile stand between the user's line and a loss.
_INSIDE = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__))

_given: set[str] = set()
_lock = threading.Lock()


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning that names the innermost line outside the package and outside torch.

    Nothing happens while ``torch.compile`` traces, since the frames of a trace are not the user's.
    """
    if torch.compiler.is_compiling():
        return
    warnings.warn(message, category, stacklevel=_stacklevel())


def warn_once(key: str, message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning as :func:`warn_user` does, unless one with the same key was given earlier in this process."""
    if torch.compiler.is_compiling():
        return
    with _lock:
        if key in _given:
            return
        _given.add(key)
    warn_user(message, category)


def forget() -> None:
    """Let :func:`warn_once` give every warning once more, for tests."""
    with _lock:
        _given.clear()


def _stacklevel() -> int:
    """Count the frames from the caller of this function out to the first one that is the user's.

    ``warnings.warn`` passes over the frames of the import system without counting them, so they are not counted here.
    Where no frame is the user's, as in a thread that torch started, the level lies beyond the outermost frame.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and _is_inside(frame.f_code.co_filename):
        level += not _is_of_import(frame.f_code.co_filename)
        frame = frame.f_back
    return level


def _is_inside(filename: str) -> bool:
    """Tell whether a file belongs to the package, to torch, to a graph of torch.fx, or to the import system."""
    return filename.startswith((*_INSIDE, "<eval_with_key>")) or _is_of_import(filename)


def _is_of_import(filename: str) -> bool:
    """Tell whether ``warnings.warn`` takes a file for a part of the import system, by the rule of CPython."""
    return "importlib" in filename and "_bootstrap" in filename
