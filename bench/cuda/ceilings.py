"""What this GPU does at most of copies, reads, random rows, sorts, atomics and launches: builds and runs ceilings.cu.

python -m bench.cuda.ceilings [--output FILE.json] [--only NAME]... [--seconds S]
python -m bench.cuda.ceilings --build-only --arch sm_90
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "ceilings.cu"
BUILD = FOLDER.parents[1] / "build" / "bench"


def nvcc() -> str | None:
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit and (found := shutil.which("nvcc", path=str(Path(toolkit) / "bin"))):
            return found
    return shutil.which("nvcc")


def arch_present() -> str:
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is present: pass --arch, as in --build-only --arch sm_90")
    major, minor = torch.cuda.get_device_capability(0)
    return f"sm_{major}{minor}"


def build(arch: str | None = None) -> Path:
    """The program for ``arch`` (default: the GPU present), compiled anew if any source is newer than it."""
    arch = arch or arch_present()
    binary = BUILD / f"ceilings-{arch}"
    sources = [SOURCE, *FOLDER.glob("*.cuh")]
    if binary.exists() and binary.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return binary
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found under CUDA_HOME, CUDA_PATH or /usr/local/cuda, nor on PATH")
    BUILD.mkdir(parents=True, exist_ok=True)
    unfinished = binary.with_suffix(".tmp")  # a build that is interrupted must not leave what looks like a program
    flags = ["-O3", "-std=c++17", f"-arch={arch}"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(unfinished)], check=True)
    return unfinished.replace(binary)


def results(only: Sequence[str] = (), seconds: float = 20, arch: str | None = None) -> Iterator[dict]:
    """Each result as soon as the program prints it. Raises at the end if the program failed."""
    command = [str(build(arch)), "--seconds", str(seconds)]
    for name in only:
        command += ["--only", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        for line in program.stdout:
            yield json.loads(line)
    if program.returncode:
        raise subprocess.CalledProcessError(program.returncode, command)


def measure(only: Sequence[str] = (), seconds: float = 20, arch: str | None = None) -> list[dict]:
    return list(results(only, seconds, arch))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda.ceilings", description="Measure the limits of this GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all results as one JSON list")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a part, such as 'random rows'")
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="for all that is measured; default 20")
    parser.add_argument("--arch", metavar="sm_XX", help="compile for this; default: the GPU present")
    parser.add_argument("--build-only", action="store_true", help="compile and print where the program is")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.build_only:
        print(build(options.arch))
        return 0
    rows: list[dict] = []
    try:
        for row in results(options.only, options.seconds, options.arch):
            print(json.dumps(row), flush=True)
            rows.append(row)
    finally:  # what was measured before a failure is kept
        if options.output is not None and rows:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
