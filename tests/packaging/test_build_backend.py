"""The build backend: what it asks pip for, what it refuses, and that its failures are one line to type."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
WHEEL_HOOKS = ("wheel", "editable")


@pytest.fixture
def builder(monkeypatch):
    """The backend as a module, in an environment that lacks nothing; setuptools' hooks ask for nothing."""
    spec = importlib.util.spec_from_file_location("nce_ext_backend_under_test", ROOT / "build_tools/nce_ext_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("NCE_EXT_NATIVE", raising=False)
    monkeypatch.setattr(module, "setuptools_version", lambda: "84.2.1")
    monkeypatch.setattr(module, "torch_in_sight", lambda: True)
    monkeypatch.setattr(module, "has_ninja", lambda: True)
    monkeypatch.setattr(
        module,
        "build_meta",
        lambda: SimpleNamespace(
            get_requires_for_build_sdist=lambda settings: [],
            get_requires_for_build_wheel=lambda settings: [],
            get_requires_for_build_editable=lambda settings: [],
            prepare_metadata_for_build_wheel=lambda folder, settings: "metadata",
            prepare_metadata_for_build_editable=lambda folder, settings: "metadata",
        ),
    )
    return module


@pytest.mark.parametrize("kind", WHEEL_HOOKS)
def test_torch_is_asked_for_only_where_it_is_needed_and_not_there(builder, monkeypatch, capsys, kind):
    requires = getattr(builder, f"get_requires_for_build_{kind}")
    assert requires() == []
    monkeypatch.setattr(builder, "has_ninja", lambda: False)
    assert requires() == ["ninja"]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(builder, "torch_in_sight", lambda: False)
    assert requires() == ["ninja", "torch>=2.11"]
    (line,) = capsys.readouterr().out.splitlines()
    for words in ("downloads torch", "GB", "`pip install torch` first"):
        assert words in line
    assert builder.get_requires_for_build_sdist() == []
    monkeypatch.setenv("NCE_EXT_NATIVE", "0")
    assert requires() == []


@pytest.mark.parametrize("kind", WHEEL_HOOKS)
@pytest.mark.parametrize(
    ("setuptools", "torch", "ninja", "reasons", "packages"),
    [
        ("65.5.0", True, True, "it has setuptools 65.5.0", "'setuptools>=77'"),
        (None, True, True, "it has no setuptools", "'setuptools>=77'"),
        ("84.2.1", False, True, "it has no torch>=2.11", "'torch>=2.11'"),
        (
            "65.5.0", False, False,
            "it has setuptools 65.5.0, it has no torch>=2.11", "'setuptools>=77' 'torch>=2.11' ninja",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_line_to_type(builder, monkeypatch, kind, setuptools, torch, ninja, reasons, packages):
    """In the first hook that pip calls without isolation, before it downloads anything."""
    monkeypatch.setattr(builder, "setuptools_version", lambda: setuptools)
    monkeypatch.setattr(builder, "torch_in_sight", lambda: torch)
    monkeypatch.setattr(builder, "has_ninja", lambda: ninja)
    with pytest.raises(SystemExit) as stop:
        getattr(builder, f"prepare_metadata_for_build_{kind}")("folder")
    message = str(stop.value)
    assert "\n" not in message
    assert f"({reasons})" in message
    assert f"`pip install {packages} && pip install --no-build-isolation .`" in message
    assert "`pip install .`" in message


def test_without_the_operators_no_torch_is_needed(builder, monkeypatch):
    monkeypatch.setattr(builder, "torch_in_sight", lambda: False)
    monkeypatch.setenv("NCE_EXT_NATIVE", "0")
    assert builder.prepare_metadata_for_build_wheel("folder") == "metadata"


SEARCH = """
import sys
sys.path[:] = [folder for folder in sys.path if not folder.endswith("-packages")]
sys.path.insert(0, sys.argv[1])
import nce_ext_backend
nce_ext_backend.sysconfig.get_path = lambda name: sys.argv[2]
print(nce_ext_backend.torch_in_sight())
import importlib.util
print(importlib.util.find_spec("torch") is not None)
"""


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, False), ("2.10.1", False), ("1.13.1", False), ("2.11.0", True), ("2.13.0+cpu", True),
        ("2.15.0a0+git1234", True), ("3.0.0", True),
    ],
)  # fmt: skip
def test_the_torch_of_the_environment_serves_an_isolated_build(tmp_path, version, expected):
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").touch()
        metadata = tmp_path / f"torch-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SEARCH, str(ROOT / "build_tools"), str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(expected)] * 2


def test_a_launcher_of_ninja_that_fails_does_not_count(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("nce_ext_backend_under_test", ROOT / "build_tools/nce_ext_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not module.has_ninja()
    for status in (1, 0):
        (tmp_path / "ninja").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / "ninja").chmod(0o755)
        assert module.has_ninja() == (status == 0)


ON_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import nce_ext_backend
nce_ext_backend.tell("before a hook")
nce_ext_backend.announces = True
nce_ext_backend.tell("in a hook")
"""


def test_a_terminal_shows_what_pip_would_hide():
    """pip reads the output of a build and keeps it to itself; a build that is no hook writes to its output alone."""
    pty = pytest.importorskip("pty")
    terminal, end = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TERMINAL], stdin=end, capture_output=True, text=True, start_new_session=True,
        env={"PYTHONPATH": str(ROOT / "build_tools")},
    )  # fmt: skip
    os.close(end)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["nce_ext: before a hook", "nce_ext: in a hook"]
    shown = os.read(terminal, 1000).decode()
    os.close(terminal)
    assert shown.split("\r\n") == ["", "  nce_ext: in a hook", ""]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """A source distribution, made from a copy of what belongs in one, and extracted."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than the build allows")
    source = tmp_path_factory.mktemp("source")
    for name in ("build_tools", "csrc", "nce_ext"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "*.not_built", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    with tarfile.open(source / run_hook(source, "build_sdist", NCE_EXT_NATIVE="1")) as archive:
        archive.extractall(source / "extracted", filter="data")
    (folder,) = (source / "extracted").iterdir()
    return folder


def run_hook(source: Path, hook: str, **environment: str) -> str:
    """Call a hook the way pip does: in a process of its own, in the source folder."""
    code = f"import nce_ext_backend; print(nce_ext_backend.{hook}('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(source / "build_tools"), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_a_source_distribution_holds_what_a_build_needs(sdist):
    for name in ("build_tools", "csrc", "nce_ext"):
        expected = {
            path.relative_to(ROOT)
            for pattern in ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "py.typed")
            for path in (ROOT / name).rglob(pattern)
        }
        assert expected
        assert expected <= {path.relative_to(sdist) for path in (sdist / name).rglob("*")}, name


@pytest.mark.parametrize("kind", WHEEL_HOOKS)
def test_a_source_distribution_builds(sdist, kind):
    """Without the operators, in seconds; .ci/check-installations builds them."""
    wheel = sdist / run_hook(sdist, f"build_{kind}", NCE_EXT_NATIVE="0")
    assert "none-any" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "build_tools" in name or "nce_ext_backend" in name]
    if kind == "wheel":
        assert {"nce_ext/__init__.py", "nce_ext/_ops/cuda_module.py", "nce_ext/py.typed"} <= set(names)
    else:
        assert any("editable" in name for name in names)
