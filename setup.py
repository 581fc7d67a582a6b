"""Builds nce_ext._C, the compiled operators, and nce_ext._C_cuda, their CUDA kernels. Metadata is in pyproject.toml.

NCE_EXT_NATIVE=0 installs the package without them: pure Python, served by the reference backend.
NCE_EXT_CUDA=auto|0|1: the CUDA kernels where torch and a toolkit allow (the default), never, or else fail.
"""

from __future__ import annotations

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

OLDEST_TORCH = "0x020b000000000000"  # the stable ABI of 2.11: one binary serves every later torch

ROOT = Path(__file__).resolve().parent


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

# A100, H100, B200, and by way of PTX what comes after.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "8.0;9.0+PTX"

ADVICE = """
nce_ext: the C++ operators could not be built: {reason}

  They need torch >= 2.11 in this environment, visible to the build (pip install --no-build-isolation), and a C++20
  compiler (GCC 11 or Clang 14, or later). To install without them, on the much slower pure-PyTorch backend:

      NCE_EXT_NATIVE=0 pip install --no-build-isolation .
"""

CUDA_ADVICE = """
nce_ext: the CUDA kernels could not be built: {reason}

  They need a torch with CUDA in this environment, visible to the build (pip install --no-build-isolation), and a CUDA
  toolkit of the same major version: from NVIDIA, with CUDA_HOME set to its folder if that is not /usr/local/cuda, or
  for CUDA 13 from PyPI (nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-cuda-cccl and nvidia-nvvm of torch's version). No
  GPU is needed. TORCH_CUDA_ARCH_LIST chooses the GPUs to build for. To install without them:

      NCE_EXT_CUDA=0 pip install --no-build-isolation .
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


def decide_cuda(torch_version: str, torch_cuda: str | None) -> tuple[Path, int] | None:
    """The toolkit to build nce_ext._C_cuda with, or None, having said why, if it is not to be built."""
    switch = cuda_switch()
    try:
        if switch == "0":
            raise NoCuda("NCE_EXT_CUDA=0")
        if torch_cuda is None:
            raise NoCuda(f"torch {torch_version} is a build without CUDA")
        return find_toolkit(torch_cuda)
    except NoCuda as reason:
        if switch == "1":
            sys.exit(CUDA_ADVICE.format(reason=reason))
        print(f"nce_ext: nce_ext._C_cuda is not built: {reason}", flush=True)
        return None


def architecture_flags(version: int) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST.

    torch derives them too, but leaves them all out as soon as "arch" occurs in any other flag, such as in a path.
    """
    default = ARCHITECTURES if version >= 12080 else ARCHITECTURES_BEFORE_12_8
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
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


class BuildNative(build_ext):
    """Hands over to torch's builder, and turns any failure into advice."""

    def run(self) -> None:
        try:
            import torch

            toolkit = decide_cuda(torch.__version__, torch.version.cuda)
            if toolkit is not None:
                os.environ["CUDA_HOME"] = str(toolkit[0])  # for torch, which looks for itself and may find another
            from torch.utils import cpp_extension
        except ImportError as error:
            sys.exit(ADVICE.format(reason=f"torch cannot be imported ({error})"))
        self.remove_cuda_module()
        (native,) = self.extensions
        extension = cpp_extension.CppExtension(
            native.name, native.sources, depends=native.depends, extra_compile_args=FLAGS, py_limited_api=True
        )
        built = [self.build(extension, ADVICE)]
        if toolkit is not None:
            built.append(self.build(cuda_extension(*toolkit), CUDA_ADVICE))
        self.distribution.ext_modules = self.extensions = built

    def remove_cuda_module(self) -> None:
        """Drop that of an earlier build, which the wheel would take along, or whose operators are out of date."""
        for folder in (Path(self.build_lib) / "nce_ext", *([ROOT / "nce_ext"] if self.inplace else [])):
            for path in folder.glob("_C_cuda.*so"):
                path.unlink()

    def build(self, extension: Extension, advice: str) -> Extension:
        from torch.utils import cpp_extension

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
