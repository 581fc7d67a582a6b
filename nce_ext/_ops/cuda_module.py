"""Finds and loads nce_ext._C_cuda, the CUDA kernels, or says why that cannot be done.

The module links the CUDA runtime of one major version, which has to be torch's: a second runtime in the process would
not know torch's streams. A wheel may hold one module for each version, under any name that begins with _C_cuda.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
REASON_FILE = "_C_cuda.not_built"  # written by setup.py
NAME = "nce_ext._C_cuda"


def linked_major(module: Path) -> int | None:
    """Major version of the CUDA runtime that a module links, or None."""
    with module.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            match = re.search(rb"libcudart\.so\.(\d+)\0", content)
            return int(match[1]) if match else None


def runtime_candidates(major: int) -> Iterator[Path]:
    """Where the CUDA runtime may be if torch has not loaded it: PyPI's packages, then a toolkit."""
    for folder in dict.fromkeys(sys.path):
        for package in (f"cu{major}", "cuda_runtime"):
            yield Path(folder or ".") / "nvidia" / package / "lib" / f"libcudart.so.{major}"
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield Path(home) / "lib64" / f"libcudart.so.{major}"


def load_file(path: Path) -> None:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)  # its static initialisers register the kernels
    loader.exec_module(module)
    sys.modules[NAME] = module


def load_with_runtime(path: Path, major: int) -> None:
    try:
        load_file(path)
        return
    except ImportError as error:
        if "libcudart" not in str(error):
            raise
        for runtime in runtime_candidates(major):
            if runtime.exists():
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
                break
        else:
            raise
    load_file(path)


def why_not_built() -> str:
    """What setup.py wrote down, in parentheses, if it did."""
    try:
        return f" ({(PACKAGE / REASON_FILE).read_text().strip()})"
    except OSError:
        return ""


def load() -> str | None:
    """Load the module that fits torch; the reason if there is none, or it cannot be loaded."""
    assert torch.version.cuda is not None
    major = int(torch.version.cuda.split(".")[0])
    build = (
        "build it with `NCE_EXT_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .` in an "
        f"environment that has this torch and a CUDA {major} toolkit"
    )
    modules = sorted(path for path in PACKAGE.glob("_C_cuda*") if path.name.endswith((".so", ".pyd")))
    if not modules:
        return f"{NAME} was not built{why_not_built()}; {build}"
    linked = {path: linked_major(path) for path in modules}
    # One that links no runtime by name, such as a broken file, is tried, and its own error told.
    fitting = [path for path in modules if linked[path] in (major, None)]
    if not fitting:
        versions = " and ".join(f"CUDA {version}" for version in sorted(filter(None, linked.values())))
        return f"{NAME} is built for {versions}, and torch {torch.__version__} for CUDA {major}; {build}"
    try:
        load_with_runtime(max(fitting, key=lambda path: linked[path] or 0), major)
    except (ImportError, OSError) as error:
        return f"{NAME} could not be imported ({error}); {build}"
    return None
