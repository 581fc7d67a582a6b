"""Builds nce_ext._C, the compiled operators, and nce_ext._C_cuda, their CUDA kernels. Metadata is in pyproject.toml.

NCE_EXT_NATIVE=0 installs the package without them: pure Python, served by the reference backend.
NCE_EXT_CUDA=auto|0|1: the CUDA kernels for the GPUs that are here, if torch and a toolkit allow (the default); never;
for the usual GPUs, or else fail. TORCH_CUDA_ARCH_LIST names GPUs to build for.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70, which .ci/gpu-check may meet
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))
import nce_ext_backend  # noqa: E402

OLDEST_TORCH = "0x020b000000000000"  # the stable ABI of 2.11: one binary serves every later torch


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").rglob(pattern))


DEFINE_TARGET = f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"
HOST_FLAGS = [
    # Ids must agree to the last bit between processors with and without fused multiply-add; kernels that want one
    # ask for it.
    "-ffp-contract=off",
    "-fvisibility=hidden",
    f"-ffile-prefix-map={ROOT}{os.sep}=",  # error messages name csrc/..., not the build machine's folders
    "-Wall",
    "-Wno-psabi",
]
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fno-math-errno",
    *HOST_FLAGS,
    "-Wextra",
    "-Wno-maybe-uninitialized",  # false alarm in GCC's own AVX-512 header
    DEFINE_TARGET,
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    *(word for flag in HOST_FLAGS for word in ("-Xcompiler", flag)),
    DEFINE_TARGET,
    "-DUSE_CUDA",  # or torch's headers hide the functions of the CUDA streams
]

SYSTEM_TOOLKIT = Path("/usr/local/cuda")
DRIVER = "libcuda.so.1"

# A100, H100, B200, and by way of PTX what comes after.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "8.0;9.0+PTX"
OLDEST_GPU = (8, 0)

REASON_FILE = "_C_cuda.not_built"  # beside the modules: why there is no nce_ext._C_cuda, for `python -m nce_ext`

ADVICE = """
nce_ext: the C++ operators could not be built: {reason}

  They need torch >= 2.11 (pip install torch) and a C++20 compiler (GCC 11 or Clang 14, or later: on Debian
  apt-get install g++). To install without them, on the much slower pure-PyTorch backend:

      NCE_EXT_NATIVE=0 pip install .
"""

CUDA_ADVICE = """
nce_ext: the CUDA kernels could not be built: {reason}

  They need a torch with CUDA in this environment (pip install torch) and a CUDA toolkit of the same major version: from
  NVIDIA, with CUDA_HOME set to its folder if that is not /usr/local/cuda, or for CUDA 13 from PyPI (nvidia-cuda-nvcc,
  nvidia-cuda-crt, nvidia-cuda-cccl and nvidia-nvvm of torch's version). No GPU is needed. TORCH_CUDA_ARCH_LIST chooses
  the GPUs to build for. To install without them:

      NCE_EXT_CUDA=0 pip install .
"""


class NoCuda(Exception):
    """Why the CUDA kernels cannot be built here."""


def cuda_switch() -> str:
    switch = os.environ.get("NCE_EXT_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        sys.exit(f"nce_ext: NCE_EXT_CUDA must be auto, 0 or 1, got {switch!r}")
    return switch


def toolkit_version(home: Path) -> int:
    """CUDART_VERSION of the toolkit in that folder, such as 13000."""
    if not (home / "bin" / "nvcc").exists():
        raise NoCuda("has no bin/nvcc")
    # What a command called nvcc leads to need not be a toolkit: the folder above may hold a link or a script alone.
    for include in (home / "include", *home.glob("targets/*/include")):
        if not (include / "cuda_runtime.h").exists():
            continue
        # PyPI has these in packages of their own; torch brings cuda_runtime.h.
        if not (include / "crt" / "host_config.h").exists():
            raise NoCuda("has no include/crt (nvidia-cuda-crt)")
        if not any((parent / "nv" / "target").exists() for parent in (include, include / "cccl")):
            raise NoCuda("has no include/cccl (nvidia-cuda-cccl)")
        match = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", (include / "cuda_runtime_api.h").read_text())
        if match:
            return int(match[1])
    raise NoCuda("has no include/cuda_runtime.h")


def toolkit_candidates(torch_cuda: str) -> Iterator[tuple[str, Path]]:
    """Where a toolkit may be, best first. A folder that the user names is the only one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield f"{variable}={os.environ[variable]}", Path(os.environ[variable])
            return
    nvcc = shutil.which("nvcc")
    if nvcc:
        home = Path(nvcc).resolve().parent.parent
        yield f"{home} (of nvcc on PATH)", home
    yield str(SYSTEM_TOOLKIT), SYSTEM_TOOLKIT
    for folder in dict.fromkeys(sys.path):
        home = Path(folder or ".") / "nvidia" / f"cu{torch_cuda.split('.')[0]}"
        if home.is_dir():
            yield f"{home} (from PyPI)", home


def find_toolkit(torch_cuda: str) -> tuple[Path, int]:
    """Folder and version of a CUDA toolkit of torch's major version."""
    major = int(torch_cuda.split(".")[0])
    seen = []
    for name, home in toolkit_candidates(torch_cuda):
        try:
            version = toolkit_version(home)
        except NoCuda as lack:
            seen.append(f"{name} {lack if home.exists() else 'does not exist'}")
            continue
        if version // 1000 == major:
            return home.absolute(), version
        seen.append(f"{name} is CUDA {version // 1000}.{version % 1000 // 10}")
    raise NoCuda(f"torch is built for CUDA {torch_cuda}, but no toolkit of CUDA {major} was found: {'; '.join(seen)}")


def visible_gpus() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that the driver shows, without a word to torch.cuda."""
    try:
        driver = ctypes.CDLL(DRIVER)
        if driver.cuInit(0) != 0:
            return []
    except (OSError, AttributeError):
        return []
    number = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(number))
    gpus = []
    for device in range(number.value):
        capability = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            capability.append(number.value)
        gpus.append((capability[0], capability[1]))
    return sorted(set(gpus))


def wanted_architectures(version: int) -> str:
    """Which GPUs to build for: those of TORCH_CUDA_ARCH_LIST, the usual ones if asked for, or those that are here."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return listed
    usual = ARCHITECTURES if version >= 12080 else ARCHITECTURES_BEFORE_12_8
    if cuda_switch() == "1":
        return usual
    gpus = visible_gpus()
    able = [f"{major}.{minor}" for major, minor in gpus if (major, minor) >= OLDEST_GPU]
    if able:
        return ";".join(able)
    here = f"no GPU is here but of compute capability {gpus[-1][0]}.{gpus[-1][1]}" if gpus else "no GPU is here"
    raise NoCuda(
        f"{here} and TORCH_CUDA_ARCH_LIST names none to build for; set it (such as 9.0), or NCE_EXT_CUDA=1 to build "
        f"for {usual}, and install again"
    )


def decide_cuda(torch_version: str, torch_cuda: str | None) -> tuple[Path, int] | str:
    """The toolkit to build nce_ext._C_cuda with, or why, having said so, it is not to be built."""
    switch = cuda_switch()
    try:
        if switch == "0":
            raise NoCuda("NCE_EXT_CUDA=0")
        if torch_cuda is None:
            raise NoCuda(f"torch {torch_version} is a build without CUDA")
        toolkit = find_toolkit(torch_cuda)
        wanted_architectures(toolkit[1])
        return toolkit
    except NoCuda as reason:
        if switch == "1":
            sys.exit(CUDA_ADVICE.format(reason=reason))
        nce_ext_backend.tell(f"nce_ext._C_cuda is not built: {reason}")
        return str(reason)


def architecture_flags(version: int) -> list[str]:
    """nvcc's flags for the GPUs to build for.

    torch derives them too, but leaves them all out as soon as "arch" occurs in any other flag, such as in a path.
    """
    wanted = wanted_architectures(version)
    flags = []
    for entry in wanted.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            sys.exit(f"nce_ext: TORCH_CUDA_ARCH_LIST must be a list such as {ARCHITECTURES!r}, got {wanted!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_extension(home: Path, version: int) -> Extension:
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(home)  # read from the environment too early if something has imported it before
    extension = cpp_extension.CUDAExtension(
        "nce_ext._C_cuda",
        files("*.cu"),
        depends=files("*.h", "*.cuh"),
        extra_compile_args={"cxx": FLAGS, "nvcc": [*NVCC_FLAGS, *architecture_flags(version)]},
        py_limited_api=True,
    )
    # PyPI has the library under its full name alone.
    if not any((Path(folder) / "libcudart.so").exists() for folder in extension.library_dirs):
        full_name = f":libcudart.so.{version // 1000}"
        extension.libraries = [full_name if name == "cudart" else name for name in extension.libraries]
    return extension


def minutes_to_compile(extension: Extension) -> int:
    """About how long two processors take."""
    compile_arguments = extension.extra_compile_args
    if "nvcc" not in compile_arguments:
        return 2
    return 3 * sum(flag.startswith("-gencode") for flag in compile_arguments["nvcc"])


class BuildNative(build_ext):
    """Hands over to torch's builder, and turns any failure into advice."""

    def run(self) -> None:
        try:
            import torch

            toolkit = decide_cuda(torch.__version__, torch.version.cuda)
            if not isinstance(toolkit, str):
                os.environ["CUDA_HOME"] = str(toolkit[0])  # for torch, which looks for itself and may find another
            from torch.utils import cpp_extension
        except ImportError as error:
            sys.exit(ADVICE.format(reason=f"torch cannot be imported ({error})"))
        self.forget_cuda_module()
        (native,) = self.extensions
        extension = cpp_extension.CppExtension(
            native.name, native.sources, depends=native.depends, extra_compile_args=FLAGS, py_limited_api=True
        )
        built = [self.build(extension, ADVICE)]
        if isinstance(toolkit, str):
            self.record_why_without_cuda(toolkit)
        else:
            built.append(self.build(cuda_extension(*toolkit), CUDA_ADVICE))
        self.distribution.ext_modules = self.extensions = built

    def package_folders(self) -> list[Path]:
        """Where modules are put, the last one being where they are used."""
        return [Path(self.build_lib) / "nce_ext", *([ROOT / "nce_ext"] if self.inplace else [])]

    def forget_cuda_module(self) -> None:
        """Drop that of an earlier build, which the wheel would take along, or whose operators are out of date."""
        for folder in self.package_folders():
            for path in [*folder.glob("_C_cuda.*so"), *folder.glob(REASON_FILE)]:
                path.unlink()

    def record_why_without_cuda(self, reason: str) -> None:
        folder = self.package_folders()[-1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REASON_FILE).write_text(reason + "\n")

    def build(self, extension: Extension, advice: str) -> Extension:
        from torch.utils import cpp_extension

        processors = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        if not nce_ext_backend.has_ninja():
            processors = 1
            nce_ext_backend.tell("there is no ninja to compile several files at once (pip install ninja)")
        nce_ext_backend.tell(
            f"compiling {extension.name}: {len(extension.sources)} files, {processors} at once; with 2 about "
            f"{minutes_to_compile(extension)} minutes"
        )
        self.distribution.ext_modules = [extension]
        command = cpp_extension.BuildExtension(self.distribution)
        command.inplace, command.parallel = self.inplace, self.parallel
        command.build_lib, command.build_temp = self.build_lib, self.build_temp
        command.editable_mode = self.editable_mode
        command.finalize_options()
        try:
            command.run()
        except Exception as error:
            sys.exit(advice.format(reason=str(error) or type(error).__name__))
        self.ext_map.update(command.ext_map)
        return extension


class StableWheel(bdist_wheel):
    def finalize_options(self) -> None:
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


if os.environ.get("NCE_EXT_NATIVE", "1") == "0":
    if cuda_switch() == "1":
        sys.exit("nce_ext: NCE_EXT_CUDA=1 needs NCE_EXT_NATIVE=1: the CUDA kernels come on top of nce_ext._C")
    setup()
else:
    setup(
        # depends also says what a source distribution must hold.
        ext_modules=[
            Extension("nce_ext._C", files("*.cpp"), depends=files("*.h", "*.cuh", "*.cu"), py_limited_api=True)
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": StableWheel},
    )
