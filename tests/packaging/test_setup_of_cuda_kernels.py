"""setup.py's decisions about the CUDA kernels: whether to build them, with which toolkit, for which GPUs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nce_ext._ops import cuda_module


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, on a machine with one H100 and without any CUDA toolkit."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for variable in ("NCE_EXT_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("nce_ext_setup", Path(__file__).parents[2] / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", "/nowhere/bin")
    monkeypatch.setattr(module, "SYSTEM_TOOLKIT", Path("/nowhere/cuda"))
    module.ask_driver = module.visible_gpus
    monkeypatch.setattr(module, "visible_gpus", lambda: [(9, 0)])
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
    assert setup_py.decide_cuda("2.14.1", torch_cuda) == "NCE_EXT_CUDA=0"
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
        decision = setup_py.decide_cuda("2.14.1", torch_cuda)
        (line,) = capsys.readouterr().out.splitlines()
        assert line == f"nce_ext: nce_ext._C_cuda is not built: {decision}"
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


def targets(setup_py, version: int) -> list[str]:
    return [flag.split(",code=")[1] for flag in setup_py.architecture_flags(version)]


def test_architectures(setup_py, monkeypatch):
    assert targets(setup_py, 13000) == ["sm_90"]
    monkeypatch.setenv("NCE_EXT_CUDA", "1")
    assert targets(setup_py, 13000) == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert targets(setup_py, 12060) == ["sm_80", "sm_90", "compute_90"]
    for switch in ("1", "auto"):
        monkeypatch.setenv("NCE_EXT_CUDA", switch)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0a;12.0+PTX")
        assert targets(setup_py, 13000) == ["sm_75", "sm_90a", "sm_120", "compute_120"]
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
        with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must be a list such as .* got 'Hopper'"):
            targets(setup_py, 13000)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [([(8, 0)], ["sm_80"]), ([(8, 6), (9, 0)], ["sm_86", "sm_90"]), ([(7, 5), (12, 0)], ["sm_120"])],
)
def test_auto_builds_for_the_gpus_that_are_here(setup_py, monkeypatch, tmp_path, gpus, expected):
    monkeypatch.setattr(setup_py, "visible_gpus", lambda: gpus)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    assert setup_py.decide_cuda("2.14.1", "13.0") == (tmp_path, 13000)
    assert targets(setup_py, 13000) == expected


@pytest.mark.parametrize(
    ("gpus", "here"), [([], "no GPU is here"), ([(6, 1), (7, 5)], "no GPU is here but of compute capability 7.5")]
)
def test_auto_skips_where_no_gpu_could_run_the_kernels(setup_py, monkeypatch, tmp_path, capsys, gpus, here):
    """In one line, which says how to get them; whoever asks for them gets them."""
    monkeypatch.setattr(setup_py, "visible_gpus", lambda: gpus)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    reason = setup_py.decide_cuda("2.14.1", "13.0")
    assert capsys.readouterr().out.splitlines() == [f"nce_ext: nce_ext._C_cuda is not built: {reason}"]
    for words in (here, "TORCH_CUDA_ARCH_LIST", "such as 9.0", "NCE_EXT_CUDA=1", "8.0;9.0;10.0+PTX"):
        assert words in reason
    monkeypatch.setenv("NCE_EXT_CUDA", "1")
    assert setup_py.decide_cuda("2.14.1", "13.0") == (tmp_path, 13000)
    monkeypatch.delenv("NCE_EXT_CUDA")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    assert setup_py.decide_cuda("2.14.1", "13.0") == (tmp_path, 13000)


DRIVER = """
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGetCount(int* count) { *count = 3; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  static const int capabilities[3][2] = {{9, 0}, {8, 6}, {9, 0}};
  *value = capabilities[device][attribute - 75];
  return 0;
}
"""


@pytest.mark.parametrize(("status", "expected"), [(0, [(8, 6), (9, 0)]), (100, [])])
def test_the_driver_is_asked_for_the_gpus(setup_py, monkeypatch, tmp_path, status, expected):
    compiler = shutil.which("cc", path="/usr/bin:/usr/local/bin:/bin")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    (tmp_path / "driver.c").write_text(DRIVER)
    driver = tmp_path / f"libcuda{status}.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-DSTATUS={status}", tmp_path / "driver.c", "-o", driver],
        check=True, env={"PATH": "/usr/bin:/usr/local/bin:/bin"},
    )  # fmt: skip
    monkeypatch.setattr(setup_py, "DRIVER", str(driver))
    assert setup_py.ask_driver() == expected
    monkeypatch.setattr(setup_py, "DRIVER", str(tmp_path / "no driver"))
    assert setup_py.ask_driver() == []


def test_the_reason_is_recorded_beside_the_modules(setup_py, monkeypatch, tmp_path):
    """Where `python -m nce_ext` finds it; a later build takes it away together with an old module."""
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    builder = setup_py.BuildNative.__new__(setup_py.BuildNative)
    builder.__dict__.update(build_lib=str(tmp_path / "lib"), inplace=False)
    builder.record_why_without_cuda("the reason")
    written = tmp_path / "lib/nce_ext" / cuda_module.REASON_FILE
    assert written.read_text() == "the reason\n"
    (written.parent / "_C_cuda.abi3.so").touch()
    builder.forget_cuda_module()
    assert not list(written.parent.iterdir())
    builder.inplace = True
    (tmp_path / "nce_ext").mkdir()
    builder.record_why_without_cuda("the reason")
    assert [path.name for path in (tmp_path / "nce_ext").iterdir()] == [setup_py.REASON_FILE]
