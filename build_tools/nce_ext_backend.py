"""Builds nce_ext for pip: setuptools' hooks, behind checks whose failure says in one line what to type.

pip calls these hooks as pyproject.toml asks (PEP 517 and 660). An isolated build gets torch and ninja only where the
operators are to be compiled and the environment that is installed into has no torch: the operators use torch's stable
ABI, so any torch from 2.11 on builds them. NCE_EXT_NATIVE=0 builds none and needs neither.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

OLDEST_SETUPTOOLS = 77  # the first to read pyproject.toml's license and license-files
OLDEST_TORCH = (2, 11)
TORCH = "torch>=2.11"

announces = False


def tell(message: str) -> None:
    """Print a line, also on the terminal where pip keeps a build's output to itself."""
    print(f"nce_ext: {message}", flush=True)
    if not announces or sys.stdout.isatty():
        return
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n  nce_ext: {message}\n")  # pip's spinner has left an unfinished line
    except OSError:
        pass


def native_wanted() -> bool:
    return os.environ.get("NCE_EXT_NATIVE", "1") != "0"


def leading_numbers(version: str) -> tuple[int, int]:
    """Major and minor of a version such as 2.13.0+cpu or 2.15.0a0."""
    major, minor = version.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)))


def has_ninja() -> bool:
    # A launcher whose package is out of sight is on the PATH, and fails.
    try:
        return subprocess.run(["ninja", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def torch_in_sight() -> bool:
    """Whether a build here can import a torch that will do; that of the environment installed into counts too.

    pip isolates a build by a folder in front of the interpreter's own modules. A second copy of torch there would cost
    gigabytes, and could be one for another CUDA.
    """
    if importlib.util.find_spec("torch") is None:
        site_packages = sysconfig.get_path("purelib")
        found = next(iter(importlib.metadata.distributions(name="torch", path=[site_packages])), None)
        if found is None or not (Path(site_packages) / "torch").is_dir():
            return False
        if leading_numbers(found.version) < OLDEST_TORCH:
            return False
        sys.path.append(site_packages)
        importlib.invalidate_caches()
        return True
    try:
        return leading_numbers(importlib.metadata.version("torch")) >= OLDEST_TORCH
    except importlib.metadata.PackageNotFoundError:
        return True  # built from source and on the path: the compiler will tell


def setuptools_version() -> str | None:
    try:
        import setuptools
    except ImportError:
        return None
    return str(setuptools.__version__)


def check(with_torch: bool = True) -> None:
    """Stop, in one line that says what to type, where setuptools or torch are missing or too old."""
    global announces
    announces = True
    version = setuptools_version()
    reasons, packages = [], []
    if version is None or leading_numbers(version)[0] < OLDEST_SETUPTOOLS:
        reasons.append(f"it has {'no setuptools' if version is None else f'setuptools {version}'}")
        packages.append(f"'setuptools>={OLDEST_SETUPTOOLS}'")
    if with_torch and native_wanted() and not torch_in_sight():
        reasons.append(f"it has no {TORCH}")
        packages.append(f"'{TORCH}'")
    if not reasons:
        return
    if native_wanted() and not has_ninja():
        packages.append("ninja")
    sys.exit(
        f"nce_ext: this environment cannot build it ({', '.join(reasons)}): type `pip install .`, which brings what a "
        f"build needs, or `pip install {' '.join(packages)} && pip install --no-build-isolation .`"
    )


def requirements_of_a_native_build() -> list[str]:
    """What pip is to bring into an isolated build, having said how large that is."""
    if not native_wanted():
        return []
    wanted = [] if has_ninja() else ["ninja"]
    if not torch_in_sight():
        tell(
            "to compile the operators pip now downloads torch, which this environment lacks: for Linux PyPI has the "
            "CUDA build, about 2 GB, 4.7 GB unpacked, in a temporary folder and then here. `pip install torch` first "
            "avoids the second copy."
        )
        wanted.append(TORCH)
    return wanted


def build_meta() -> Any:
    from setuptools import build_meta

    return build_meta


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    check(with_torch=False)
    return list(build_meta().get_requires_for_build_sdist(config_settings))


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    check(with_torch=False)
    return [*build_meta().get_requires_for_build_wheel(config_settings), *requirements_of_a_native_build()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    check(with_torch=False)
    return [*build_meta().get_requires_for_build_editable(config_settings), *requirements_of_a_native_build()]


# Metadata need no torch, but without isolation pip asks for them first, and then downloads all dependencies before it
# builds: a build that will fail has to fail here.
def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    check()
    return str(build_meta().prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    check()
    return str(build_meta().prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    check(with_torch=False)
    return str(build_meta().build_sdist(sdist_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    check()
    return str(build_meta().build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    check()
    return str(build_meta().build_editable(wheel_directory, config_settings, metadata_directory))
