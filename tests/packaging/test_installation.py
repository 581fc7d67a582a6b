"""The installation seen from outside: no binary, another instruction set, and the floors of the package."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from native import require_native

import nce_ext
from nce_ext._ops import library
from nce_ext._sampled import arguments

PACKAGE = Path(nce_ext.__file__).parent


def python(code: str, *flags: str, root: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds nce_ext under root."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


# An editable install would serve its binary to any copy of the package.
WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import nce_ext
"""


def copy_of_the_python_files(root: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, root / "nce_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")))


def test_import_without_the_binary_serves_the_reference():
    code = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import nce_ext
import torch
info = nce_ext.build_info()
noise = nce_ext.noise.Unigram([3, 2, 1])
loss_fn = nce_ext.NCELoss(4, 3, noise, 5)
loss = loss_fn(torch.randn(2, 4), torch.tensor([0, 1]))
loss.backward()
try:
    nce_ext.functional.nce_loss(torch.randn(2, 4), loss_fn.weight, torch.tensor([0, 1]), noise, 5, backend="fused")
    refusal = None
except RuntimeError as error:
    refusal = str(error)
print(json.dumps({
    "warnings": [(w.category.__name__, str(w.message)) for w in caught if "nce_ext" in str(w.message)],
    "info": info, "loss": loss.item(), "refusal": refusal,
}))
"""
    done = python(code, NCE_EXT_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ((category, message),) = result["warnings"]
    assert category == "RuntimeWarning"
    assert "NCE_EXT_DISABLE_NATIVE=1" in message
    assert result["info"]["backends"] == ["reference"]
    assert result["info"]["simd"] is None
    assert "NCE_EXT_DISABLE_NATIVE=1" in result["info"]["missing"]["fused (cpu)"]
    assert 0 < result["loss"] < 100
    assert "backend='fused' is not available for cpu" in result["refusal"]
    assert "NCE_EXT_DISABLE_NATIVE=1" in result["refusal"]


def test_a_missing_binary_is_told_in_plain_words(tmp_path):
    """A copy of the Python files alone: the reason is that there is no nce_ext._C, not a 'circular import'."""
    copy_of_the_python_files(tmp_path)
    code = WITHOUT_EDITABLE + "print(nce_ext.__file__); print(nce_ext.build_info()['missing']['fused (cpu)'])"
    done = python(code, "-W", "ignore::RuntimeWarning", root=tmp_path, NCE_EXT_DISABLE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    where, reason = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert "_C" in reason
    assert "pip install" in reason
    assert "circular" not in reason


def test_a_broken_binary_does_not_break_the_import(tmp_path):
    (copy_of_the_python_files(tmp_path) / "_C.abi3.so").write_bytes(b"not a library")
    done = python(
        WITHOUT_EDITABLE + "print(nce_ext.build_info()['backends'])", root=tmp_path, NCE_EXT_DISABLE_NATIVE="0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['reference']"
    assert "RuntimeWarning" in done.stderr


def test_module_prints_what_is_there():
    done = subprocess.run([sys.executable, "-m", "nce_ext"], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    for word in (nce_ext.__version__, torch.__version__, "backends", "reference", "threads", "fused (cuda)"):
        assert word in done.stdout


def test_import_is_light():
    """What takes seconds to import is imported by those who use it."""
    heavy = ("torch._dynamo", "torch.distributed.tensor", "nce_ext.distributed")
    done = python(f"import sys, torch, nce_ext; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert nce_ext.distributed.shard.__doc__


def test_build_info():
    info = nce_ext.build_info()
    assert info["version"] == nce_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["backends"][-1] == "reference"
    assert ("fused (cpu)" in info["backends"]) == ("fused (cpu)" not in info["missing"])
    assert (info["simd"] is None) == ("fused (cpu)" in info["missing"])
    assert info["cuda"] == torch.version.cuda
    assert ("fused (cuda)" in info["backends"]) == ("fused (cuda)" not in info["missing"])
    before = dict(info["missing"])
    info["missing"]["fused (cpu)"] = "changed by the caller"
    assert nce_ext.build_info()["missing"] == before


def test_the_reference_on_a_gpu_is_warned_of_once(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(library, "_has_cuda", False)
    monkeypatch.setitem(library._missing, "fused (cuda)", "the reason")

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return x + arguments._choose_backend("auto", cuda, 8)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        arguments._choose_backend("auto", torch.device("cpu"), 8)
        arguments._choose_backend("reference", cuda, 8)
        compiled(torch.zeros(1))
    with pytest.warns(RuntimeWarning, match=r"reference backend for tensors on cuda.*the reason.*backend='reference'"):
        assert not arguments._choose_backend("auto", cuda, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert not arguments._choose_backend("auto", cuda, 8)
    with pytest.raises(RuntimeError, match="not available for cuda: the reason"):
        arguments._choose_backend("fused", cuda, 8)
    monkeypatch.setattr(library, "_has_cuda", True)
    assert arguments._choose_backend("auto", cuda, 8)
    assert arguments._choose_backend("auto", cuda, arguments.CUDA_MAX_DIM)
    assert not arguments._choose_backend("reference", cuda, arguments.CUDA_MAX_DIM + 1)
    with pytest.raises(
        ValueError, match=r"weight must have at most 16384 columns for the CUDA kernels, got 16385; back"
    ):
        arguments._choose_backend("auto", cuda, arguments.CUDA_MAX_DIM + 1)


# Instruction sets
FLAGS = {"generic": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl")}


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


LEVEL_CODE = """
import torch, nce_ext, sys
from nce_ext import noise as noises
torch.manual_seed(1)
out = {"level": nce_ext.build_info()["simd"]}
seed = torch.tensor([7, 8])
laws = (noises.Uniform(1000), noises.LogUniform(1000), noises.Unigram(range(1, 1001)))
for noise in laws:
    name = repr(noise)
    out["ids " + name] = noise.sample((50, 37), seed=seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for dim in (1, 19, 64, 300):
            hidden = torch.randn(20, dim, dtype=torch.float64).to(dtype).requires_grad_()
            weight = (torch.randn(1000, dim, dtype=torch.float64) / dim**0.5).to(dtype).requires_grad_()
            target = torch.randint(1000, (20,))
            loss = nce_ext.functional.nce_loss(hidden, weight, target, noise, 37, seed=seed, backend="fused")
            loss.backward()
            key = (name, str(dtype), dim)
            out[key] = [loss.detach().double(), hidden.grad.double(), weight.grad.double()]
torch.save(out, sys.argv[1])
"""


def results_of_level(level: str, path: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", LEVEL_CODE, str(path)],
        env={**os.environ, "NCE_EXT_SIMD": level, "PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def generic_results(tmp_path_factory) -> dict:
    require_native()
    return results_of_level("generic", tmp_path_factory.mktemp("generic") / "results")


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_instruction_sets_agree(level, generic_results, tmp_path):
    """The same ids to the last bit; losses and gradients to the rounding of another order of summation."""
    if not set(FLAGS[level]) <= cpu_flags():
        pytest.skip(f"this CPU lacks {level}")
    generic, other = dict(generic_results), results_of_level(level, tmp_path / "results")
    assert (generic.pop("level"), other.pop("level")) == ("generic", level)
    assert generic.keys() == other.keys()
    # One unit in the last place of the stored gradients, whose float32 sums may round to either side.
    rounding = {"torch.float64": 1e-12, "torch.float32": 3e-6, "torch.float16": 2e-3, "torch.bfloat16": 1.6e-2}
    for key, expected in generic.items():
        if isinstance(key, str):
            assert torch.equal(other[key], expected), key
            continue
        for i, (got, want) in enumerate(zip(other[key], expected, strict=True)):
            tolerance = 3e-6 if i == 0 and key[1] != "torch.float64" else rounding[key[1]]
            error = (got - want).abs() - tolerance * want.abs()
            assert error.max() <= 2e-6 * want.abs().max(), (key, i)


def test_an_unknown_instruction_set_is_named(native):
    code = "import nce_ext; i = nce_ext.build_info(); print(i['backends']); print(i['missing'])"
    done = python(code, "-W", "ignore::RuntimeWarning", NCE_EXT_SIMD="sse9")
    assert done.returncode == 0, done.stderr
    backends, missing = done.stdout.splitlines()
    assert backends == "['reference']"
    reason = ast.literal_eval(missing)["fused (cpu)"]
    assert "sse9" in reason
    for level in FLAGS:
        assert level in reason
    assert ".cpp" not in reason


def test_public_names_exist_and_are_documented():
    for module in (
        nce_ext, nce_ext.noise, nce_ext.functional, nce_ext.evaluate, nce_ext.contrastive, nce_ext.density,
        nce_ext.optim, nce_ext.utils, nce_ext.distributed,
    ):  # fmt: skip
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                assert thing.__doc__, f"{module.__name__}.{name} has no docstring"
    assert (PACKAGE / "py.typed").exists()
