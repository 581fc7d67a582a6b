"""Builds nce_ext._C, the compiled operators. Metadata is in pyproject.toml.

NCE_EXT_NATIVE=0 installs the package without them: pure Python, served by the reference backend.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = "0x020b000000000000"  # the stable ABI of 2.11: one binary serves every later torch

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    # Ids must agree to the last bit between processors with and without fused multiply-add; kernels that want one
    # ask for it.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    f"-ffile-prefix-map={ROOT}{os.sep}=",  # error messages name csrc/..., not the build machine's folders
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # false alarm in GCC's own AVX-512 header
    f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
]

ADVICE = """
nce_ext: the C++ operators could not be built: {reason}

  They need torch >= 2.11 in this environment, visible to the build (pip install --no-build-isolation), and a C++20
  compiler (GCC 11 or Clang 14, or later). To install without them, on the much slower pure-PyTorch backend:

      NCE_EXT_NATIVE=0 pip install --no-build-isolation .
"""


class BuildNative(build_ext):
    """Hands over to torch's builder, and turns any failure into advice."""

    def run(self) -> None:
        try:
            from torch.utils import cpp_extension
        except ImportError as error:
            sys.exit(ADVICE.format(reason=f"torch cannot be imported ({error})"))
        native = self.extensions[0]
        extension = cpp_extension.CppExtension(
            native.name,
            native.sources,
            depends=native.depends,
            extra_compile_args=FLAGS,
            py_limited_api=True,
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
            sys.exit(ADVICE.format(reason=str(error) or type(error).__name__))


class StableWheel(bdist_wheel):
    def finalize_options(self) -> None:
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


if os.environ.get("NCE_EXT_NATIVE", "1") == "0":
    setup()
else:
    setup(
        ext_modules=[Extension("nce_ext._C", SOURCES, depends=HEADERS, py_limited_api=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": StableWheel},
    )
