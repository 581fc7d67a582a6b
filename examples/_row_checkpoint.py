"""Checkpoints of tables too large to write as a whole: a file that holds the rows which an optimizer has stepped on.

All other rows, and their states, must be what the program makes them at its start: the weights a function of a seed.
``optimizer.catch_up()`` decays every row, so it is for the end of a run, after the last checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import DataError
from torch import Tensor

ROWS_AT_ONCE = 2**16  # of a table, where it is gone through as a whole


def is_table(value: object) -> bool:
    """Whether a value of an optimizer's state has an element or more for every row."""
    return isinstance(value, Tensor) and value.dim() > 0


def row_tables(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Parameters that are stepped by rows, by their number, each with the tables of its state."""
    states = {i: optimizer.state[p] for i, p in enumerate(parameters) if optimizer.state[p].get("by_rows")}
    return {
        i: {"weight": parameters[i].detach(), **{name: value for name, value in state.items() if is_table(value)}}
        for i, state in states.items()
    }


def blocks(touched: np.ndarray) -> Iterator[Tensor]:
    """Numbers of the touched rows, a block of the table at a time."""
    for start in range(0, len(touched), ROWS_AT_ONCE):
        rows = start + np.flatnonzero(touched[start : start + ROWS_AT_ONCE])
        if len(rows):
            yield torch.from_numpy(rows)


def save(
    path: Path,
    settings: dict[str, Any],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    more: dict[str, Any],
) -> None:
    """Write beside ``path``, and move it there once it is on the disk: whenever the program dies, ``path`` is whole.

    A zip file, not compressed: what is small as torch.save writes it, and of every table the touched rows. Memory: the
    small part, a bit and a byte a class, and a block of rows.

    Args:
        settings: of the run, which are to be the same when it goes on.
        parameters: all those of the optimizer, in its order.
        more: what else is to be saved, of types that ``torch.load(weights_only=True)`` knows.
    """
    tables = row_tables(parameters, optimizer)
    state = optimizer.state_dict()
    state["state"] = {
        i: {name: value for name, value in values.items() if i not in tables or not is_table(value)}
        for i, values in state["state"].items()
    }
    saved = {
        "settings": settings,
        "tables": {i: list(of_parameter) for i, of_parameter in tables.items()},
        "dense": {i: p.detach() for i, p in enumerate(parameters) if i not in tables},
        "optimizer": state,
        "more": more,
    }
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                small = io.BytesIO()
                torch.save(saved, small)
                archive.writestr("saved.pt", small.getvalue())
                for i, of_parameter in tables.items():
                    _write(archive, i, of_parameter)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def _write(archive: zipfile.ZipFile, number: int, tables: dict[str, Tensor]) -> None:
    touched = (tables["row_step"] > 0).numpy()
    archive.writestr(f"{number}/touched", np.packbits(touched).tobytes())
    for name, table in tables.items():
        with archive.open(f"{number}/{name}", "w", force_zip64=True) as member:
            for rows in blocks(touched):
                member.write(table[rows].numpy().data)


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The small part of a checkpoint, if it was made with these settings."""
    with _opened(path) as archive:
        saved = torch.load(io.BytesIO(archive.read("saved.pt")), weights_only=True)
        found = saved["settings"]
    changed = [f"{key} was {found.get(key)}, now {value}" for key, value in settings.items() if found.get(key) != value]
    if changed:
        raise DataError(f"{path} belongs to a run with other settings: {'; '.join(changed)}")
    return saved


@torch.no_grad()
def restore(
    path: Path, saved: dict[str, Any], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Bring back what was saved, in the memory that new parameters and a new optimizer have; returns ``more``."""
    with _opened(path) as archive:
        bits = {i: np.frombuffer(archive.read(f"{i}/touched"), np.uint8) for i in saved["tables"]}
    touched = {i: np.unpackbits(bits[i], count=len(parameters[i])).astype(bool) for i in bits}
    for i in touched:  # a step on one row makes the state; the row is one of those that are read below
        row, nothing = torch.tensor([[int(touched[i].argmax())]]), torch.zeros(1, *parameters[i].shape[1:])
        parameters[i].grad = torch.sparse_coo_tensor(row, nothing, parameters[i].shape, check_invariants=True)
    optimizer.step()
    optimizer.zero_grad()
    with _opened(path) as archive:
        for i, tables in row_tables(parameters, optimizer).items():
            for name in saved["tables"][i]:
                _read(archive, f"{i}/{name}", tables[name], touched[i])
                if name != "weight":
                    saved["optimizer"]["state"][i][name] = tables[name]
    for i, parameter in saved["dense"].items():
        parameters[i].copy_(parameter)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["more"]


def _read(archive: zipfile.ZipFile, name: str, table: Tensor, touched: np.ndarray) -> None:
    with archive.open(name) as member:
        for rows in blocks(touched):
            data = bytearray(member.read(len(rows) * table[0].nbytes))
            table[rows] = torch.frombuffer(data, dtype=table.dtype).view(len(rows), *table.shape[1:])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The checkpoint; what is wrong with it becomes one line. To read a member to its end checks its sum."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, EOFError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} is not a whole checkpoint ({error}): remove it to start anew") from None
