"""How the CUDA kernels are found and loaded: which module fits torch, and the reason where none does."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nce_ext
from nce_ext._ops import cuda_module, library

PACKAGE = Path(nce_ext.__file__).parent
COMPILER = shutil.which("cc")
needs_a_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """A package folder without modules, beside a torch for CUDA 13; no CUDA runtime is installed."""
    monkeypatch.setattr(cuda_module, "PACKAGE", tmp_path)
    monkeypatch.setattr(cuda_module, "runtime_candidates", lambda major: iter(()))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def compile_library(path: Path, code: str, *flags: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_name(path.name + ".c")
    source.write_text(code)
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", path, *flags], check=True)
    source.unlink()
    return path


def test_a_build_of_torch_without_cuda_is_the_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"torch {torch.__version__} is a build without CUDA" in library._load_cuda(None)


def test_missing_operators_are_the_reason(folder):
    assert "nce_ext._C: switched off" in library._load_cuda("switched off")


def test_a_module_that_was_not_built(folder):
    plain = library._load_cuda(None)
    (folder / "_C_cuda.not_built").write_text("no GPU is here\n")
    recorded = library._load_cuda(None)
    assert "nce_ext._C_cuda was not built; build it with" in plain
    assert "nce_ext._C_cuda was not built (no GPU is here); build it with" in recorded
    for reason in (plain, recorded):
        assert "NCE_EXT_CUDA=1 pip install" in reason
        assert "CUDA 13 toolkit" in reason


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_module(folder, content):
    (folder / "_C_cuda.abi3.so").write_bytes(content)
    reason = library._load_cuda(None)
    assert "nce_ext._C_cuda could not be imported (" in reason
    assert "NCE_EXT_CUDA=1 pip install" in reason


@pytest.mark.parametrize(
    ("linked", "versions"), [([12], "CUDA 12"), ([14], "CUDA 14"), ([12, 14], "CUDA 12 and CUDA 14")]
)
def test_modules_for_other_versions_are_not_loaded(folder, monkeypatch, linked, versions):
    """Though their runtime may be found: it would be a second one in the process."""
    monkeypatch.setattr(cuda_module, "load_file", lambda path: pytest.fail("loaded"))
    for major in linked:
        (folder / f"_C_cuda.{major}.so").write_bytes(b"ELF libc.so.6\0libcudart.so.%d\0" % major)
    reason = library._load_cuda(None)
    assert f"is built for {versions}, and torch {torch.__version__} for CUDA 13; build it with" in reason


def test_of_several_modules_the_one_for_torch_is_loaded(folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(cuda_module, "load_file", loaded.append)
    for major in (12, 13, 14):
        (folder / f"_C_cuda.{major}.so").write_bytes(b"ELF\0libcudart.so.%d\0" % major)
    assert library._load_cuda(None) is None
    assert loaded == [folder / "_C_cuda.13.so"]


def test_where_the_runtime_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    found = list(cuda_module.runtime_candidates(13))
    assert found[0] == tmp_path / "nvidia/cu13/lib/libcudart.so.13"
    assert tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.13" in found
    assert tmp_path / "toolkit/lib64/libcudart.so.13" in found


MODULE = """
int cudaStandIn(void);
void *PyModule_Create2(void *, int);
static long definition[32] = {1, 0, 0, 0, 0};
int nce_loaded(void) { return cudaStandIn(); }
struct Base { long refcount; void *type; void *init; long index; void *copy; };
static struct { struct Base base; const char *name; const char *doc; long size; void *rest[5]; } module =
    {{1, 0, 0, 0, 0}, "_C_cuda", 0, -1, {0}};
void *PyInit__C_cuda(void) { return cudaStandIn() == 13 ? PyModule_Create2(&module, 3) : 0; }
"""


@needs_a_compiler
def test_a_module_is_loaded_with_the_runtime_from_a_package(native, tmp_path):
    """A runtime that torch has not loaded and the linker does not find, such as PyPI's."""
    package = Path(shutil.copytree(PACKAGE, tmp_path / "nce_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")))
    shutil.copy(sys.modules["nce_ext._C"].__file__, package)
    runtime = compile_library(
        tmp_path / "site/nvidia/cu99/lib/libcudart.so.99", "int cudaStandIn(void) { return 13; }",
        "-Wl,-soname,libcudart.so.99",
    )  # fmt: skip
    compile_library(package / "_C_cuda.abi3.so", MODULE, str(runtime))
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch
torch.version.cuda = "99.0"
import nce_ext
print(nce_ext.build_info()["backends"])
print(nce_ext.build_info()["missing"])
print(sys.modules["nce_ext._C_cuda"].__file__ if "nce_ext._C_cuda" in sys.modules else "")
"""

    def run(*path: Path) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    backends, missing, file = run(tmp_path, tmp_path / "site")
    assert ast.literal_eval(missing) == {}
    assert ast.literal_eval(backends) == ["fused (cpu)", "fused (cuda)", "reference"]
    assert file == str(package / "_C_cuda.abi3.so")

    backends, missing, _ = run(tmp_path)
    assert ast.literal_eval(backends) == ["fused (cpu)", "reference"]
    reason = ast.literal_eval(missing)["fused (cuda)"]
    assert "could not be imported (libcudart.so.99: cannot open shared object file" in reason
