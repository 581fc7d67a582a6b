"""setup.py's decisions about the CUDA kernels: whether to build them, with which toolkit, for which GPUs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, on a machine without any CUDA toolkit."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for variable in ("NCE_EXT_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("nce_ext_setup", Path(__file__).parents[2] / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", "/nowhere/bin")
    monkeypatch.setattr(module, "SYSTEM_TOOLKIT", Path("/nowhere/cuda"))
    monkeypatch.setattr(sys, "path", ["/nowhere/site-packages"])
    return module


def toolkit(home: Path, version: int = 13000, without: str = "") -> Path:
    """The files that a CUDA toolkit is known by, but for one."""
    contents = {
        "bin/nvcc": "#!/bin/sh\n",
        "include/cuda_runtime.h": "",
        "include/cuda_runtime_api.h": f"#define CUDART_VERSION  {version}\n",
        "include/crt/host_config.h": "",
        "include/cccl/nv/target": "",
    }
    for name, text in contents.items():
        if name != without:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o755)
    return home


@pytest.mark.parametrize("value", ["", "yes", "2", "AUTO"])
def test_other_values_of_the_cuda_switch_are_refused(setup_py, monkeypatch, value):
    monkeypatch.setenv("NCE_EXT_CUDA", value)
    with pytest.raises(SystemExit, match=f"NCE_EXT_CUDA must be auto, 0 or 1, got '{value}'"):
        setup_py.decide_cuda("2.14.1", "13.0")


@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_cuda_switched_off(setup_py, monkeypatch, tmp_path, capsys, torch_cuda):
    monkeypatch.setenv("NCE_EXT_CUDA", "0")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    assert setup_py.decide_cuda("2.14.1", torch_cuda) is None
    assert capsys.readouterr().out == "nce_ext: nce_ext._C_cuda is not built: NCE_EXT_CUDA=0\n"


@pytest.mark.parametrize(
    ("torch_cuda", "reasons"),
    [
        (None, ["torch 2.14.1 is a build without CUDA"]),
        ("13.0", ["torch is built for CUDA 13.0", "no toolkit of CUDA 13", "/nowhere/cuda does not exist"]),
    ],
)
def test_cuda_that_cannot_be_built(setup_py, monkeypatch, capsys, torch_cuda, reasons):
    """auto goes on, in one line that says why; 1 stops, and says what to do as well."""
    for value in (None, "auto"):
        if value:
            monkeypatch.setenv("NCE_EXT_CUDA", value)
        assert setup_py.decide_cuda("2.14.1", torch_cuda) is None
        (line,) = capsys.readouterr().out.splitlines()
        assert all(reason in line for reason in reasons)
    monkeypatch.setenv("NCE_EXT_CUDA", "1")
    with pytest.raises(SystemExit) as stop:
        setup_py.decide_cuda("2.14.1", torch_cuda)
    for words in (*reasons, "CUDA_HOME", "nvidia-cuda-nvcc", "NCE_EXT_CUDA=0 pip install"):
        assert words in str(stop.value)


@pytest.mark.parametrize("value", ["auto", "1"])
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_toolkit_of_the_environment_is_the_only_one(setup_py, monkeypatch, tmp_path, variable, value):
    monkeypatch.setenv("NCE_EXT_CUDA", value)
    monkeypatch.setattr(setup_py, "SYSTEM_TOOLKIT", toolkit(tmp_path / "system", 13010))
    monkeypatch.setenv(variable, str(toolkit(tmp_path / "own", 13020)))
    assert setup_py.decide_cuda("2.14.1", "13.0") == (tmp_path / "own", 13020)
    monkeypatch.setenv(variable, str(tmp_path / "wrong"))
    with pytest.raises(setup_py.NoCuda, match=f"{variable}=.*wrong does not exist$"):
        setup_py.find_toolkit("13.0")


def test_toolkits_are_looked_for_in_order(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", ["/nowhere", str(tmp_path / "site")])
    packages = toolkit(tmp_path / "site/nvidia/cu13")
    assert setup_py.find_toolkit("13.0") == (packages, 13000)
    monkeypatch.setattr(setup_py, "SYSTEM_TOOLKIT", toolkit(tmp_path / "system", 13010))
    assert setup_py.find_toolkit("13.0") == (tmp_path / "system", 13010)

    # A script called nvcc leads to no toolkit, a link does.
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup_py.find_toolkit("13.0") == (tmp_path / "system", 13010)
    nvcc.unlink()
    nvcc.symlink_to(toolkit(tmp_path / "linked", 13020) / "bin/nvcc")
    assert setup_py.find_toolkit("13.0") == (tmp_path / "linked", 13020)

    # One of another major version is passed over.
    toolkit(tmp_path / "linked", 12080)
    assert setup_py.find_toolkit("13.0") == (tmp_path / "system", 13010)
    with pytest.raises(setup_py.NoCuda, match=r"linked .* is CUDA 12\.8; .*system is CUDA 13\.1$"):
        setup_py.find_toolkit("14.0")


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ("bin/nvcc", "has no bin/nvcc"),
        ("include/cuda_runtime.h", "has no include/cuda_runtime.h"),
        ("include/crt/host_config.h", "nvidia-cuda-crt"),
        ("include/cccl/nv/target", "nvidia-cuda-cccl"),
    ],
)
def test_what_a_toolkit_lacks_is_named(setup_py, monkeypatch, tmp_path, without, reason):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, without=without)))
    with pytest.raises(setup_py.NoCuda, match=reason):
        setup_py.find_toolkit("13.0")


def test_architectures(setup_py, monkeypatch):
    def targets(version: int) -> list[str]:
        return [flag.split(",code=")[1] for flag in setup_py.architecture_flags(version)]

    assert targets(13000) == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert targets(12060) == ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0a;12.0+PTX")
    assert targets(13000) == ["sm_75", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must be a list such as .* got 'Hopper'"):
        targets(13000)
