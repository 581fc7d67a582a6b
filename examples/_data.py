"""What the examples share: options, finding data that is installed, errors in one line, the output folder and plots."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

SYSTEM = Path("/usr/share")


class DataError(Exception):
    """Something the user can put right, as a package to install; the message is one line."""


def parser(description: str, *, seconds: float | None = None, epochs: int | None = None) -> argparse.ArgumentParser:
    """The options that every example has, with --seconds or --epochs where a default for it is given."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="where the plot goes")
    result.add_argument("--data", type=Path, default=None, metavar="DIR", help="where to look for data first")
    if seconds is not None:
        result.add_argument("--seconds", type=at_least(float, 0), default=seconds, help="time to train for")
    if epochs is not None:
        result.add_argument("--epochs", type=at_least(int, 1), default=epochs, help="passes over the data")
    result.add_argument("--seed", type=at_least(int, 0), default=1, help="of all that is random")
    return result


def at_least(kind: type, low: float) -> Callable[[str], Any]:
    """A number not below ``low``, for argparse."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def require(module: str, command: str) -> ModuleType:
    """The imported module, or a DataError that names the command which installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise DataError(f"{missing} is not installed: {command}") from None


def find_file(name: str, command: str, *, data: Path | None = None, system: str = "", wheel: str = "") -> Path:
    """The file ``name``, or a DataError that names the command which installs it.

    It is looked for in the user's folder ``data`` (there also under the path it has in a package unpacked into that
    folder), then in /usr/share/``system``, then in an installed wheel, whose folder is ``wheel`` ("package/folder").
    """
    places = []
    if data is not None:
        places = [data, *([data / "usr/share" / system] if system else []), *([data / wheel] if wheel else [])]
    if system:
        places.append(SYSTEM / system)
    package, _, folder = wheel.partition("/")
    spec = importlib.util.find_spec(package) if package else None
    places += [Path(place) / folder for place in (spec.submodule_search_locations or [])] if spec else []
    for place in places:
        if (place / name).is_file():
            return place / name
    raise DataError(f"{name} is not installed: {command} (or give --data DIR)")


def progress(iterable: Iterable | None = None, **options: Any) -> Any:
    """tqdm's bar."""
    return require("tqdm", "pip install tqdm").tqdm(iterable, mininterval=0.5, **options)


def prepare(output: Path) -> ModuleType:
    """Make the output folder; returns pyplot, which will draw into files."""
    matplotlib = require("matplotlib", "pip install matplotlib")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {output}: {error.strerror}") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def run(main: Callable[[], None]) -> None:
    """Run a program; a DataError becomes one line on stderr and exit status 1."""
    try:
        main()
    except DataError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
