"""What is measured of a kernel's machine code, and how it is read back from a built extension."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sass

WARP = 32
SEGMENT_ROWS = 4  # SegmentSums::kRows
PURPOSES = ("binary", "whole")  # Purpose

# Of one H200: instructions that its warp schedulers issue in a second, and bytes that its memory delivers.
ISSUE_SLOTS_PER_SECOND = 4 * 132 * 1.755e9
BYTES_PER_SECOND = 4.3e12
BUDGET_ARCHITECTURE = "sm_90"


@dataclass(frozen=True)
class RowLoop:
    """The innermost loop that loads rows."""

    kind: str  # "batch"; "example" or "tile" where the compiler unrolled the batches into a loop around them
    rows: int  # that a warp handles in one round
    instructions: int  # of the natural loop, the rarely taken paths in it included
    shortest: int = 0  # of the shortest way round, and of the longest: not in the table but as a share of the budget
    longest: int = 0

    @property
    def per_row(self) -> float:
        return self.instructions / self.rows


@dataclass(frozen=True)
class Facts:
    registers: int
    spills: int  # instructions that access local memory, of the whole kernel
    local_bytes: int  # stack frame and local memory of a thread
    wide_loads: int  # 16-byte loads from global memory; of the row loop where there is one, else of the whole kernel
    wide_reductions: int  # 16-byte additions to global memory, likewise
    loop: RowLoop | None


@dataclass(frozen=True)
class Shape:
    """Template arguments of a kernel that loads rows."""

    access: int  # bytes of a load
    rows: int  # of a batch, in a warp
    vectors: int  # of 16 bytes, in a lane's part of all its rows of a batch
    row_bytes: int  # at most, of a warp's part of a row
    exchanges: int  # SHFL.BFLY of a batch; 0 if there are none by which to count batches
    purpose: str


def shape_of(name: str) -> Shape | None:
    if match := re.match(r"segment_sums_kernel<(\w+),\w+,(\d+)>", name):
        return Shape(int(match[2]), SEGMENT_ROWS, SEGMENT_ROWS, 16 * WARP, 0, "")
    pattern = r"sampled_loss_kernel<(\w+),RowShape<(\d+),(\d+),(\d+),\d+,\w+,(\w+)>,(\d+),(\w+)>"
    if match := re.match(pattern, name):
        vectors, group, rows = (int(match[n]) for n in (2, 3, 4))
        # As sums_scattered<group, rows> exchanges them, and warp_max where a score is larger than all before; 64 bits
        # take two.
        exchanges = rows - 1 + (group // rows).bit_length() - 1
        if match[7] == "whole":
            exchanges += (rows * WARP // group).bit_length() - 1
        exchanges *= 2 if match[1] == "double" else 1
        held = vectors if match[5] == "true" else 1
        return Shape(int(match[6]), rows * WARP // group, rows * held, 16 * vectors * group, exchanges, match[7])
    return None


def short_name(demangled: str) -> str | None:
    """Name and template arguments of one of this package's kernels; None for those of CUB."""
    name = re.sub(r"\(anonymous namespace\)::|_(?:INTERNAL|GLOBAL__N)_\w+::", "", demangled).removeprefix("void ")
    if not name.startswith("nce::cuda::"):
        return None
    name = re.sub(r"\((?:nce::cuda::)?Access\)", "", name).replace("nce::cuda::", "").replace("nce::", "")
    name = re.sub(r"\(Purpose\)(\d)", lambda match: PURPOSES[int(match[1])], name)
    return re.sub(r"\s", "", name.split("(", 1)[0])


def row_loop(kernel: sass.Kernel, shape: Shape) -> tuple[RowLoop, list[sass.Instruction]] | None:
    """The smallest loop in which lanes tell each other of rows: no other loop has as many shuffles."""
    kind, least = ("BFLY", shape.exchanges) if shape.exchanges else ("IDX", shape.rows)
    found = []
    for loop in kernel.loops():
        body = kernel.body(loop)
        shuffles = sum(i.name == "SHFL" and i.has(kind) for i in body)
        loads = sum(i.name == "LDG" for i in body)
        if shuffles >= least and loads >= shape.vectors:
            found.append((len(body), shuffles, loop, body))
    if not found:
        return None
    size, shuffles, loop, body = min(found, key=lambda entry: entry[0])
    if shape.rows == WARP and shuffles > shape.exchanges > 0:
        # A batch is a whole tile, so there is no loop over batches: the sums that end an example are in this one.
        return RowLoop("example", shape.rows, size, *kernel.ways_round(loop)), body
    batches, rest = divmod(shuffles, shape.exchanges) if shape.exchanges else (1, 0)
    if rest:
        raise sass.Unexpected(f"{shuffles} SHFL.BFLY in the row loop, not a multiple of {shape.exchanges}")
    # Which lanes have a live column is voted on once a tile, and the ballot kept.
    tile = any(i.name == "VOTE" and i.has("ANY") and i.operands.startswith("R") for i in body)
    return RowLoop("tile" if tile else "batch", batches * shape.rows, size, *kernel.ways_round(loop)), body


def is_wide(instruction: sass.Instruction, name: str) -> bool:
    if name == "LDG":
        return instruction.name == "LDG" and instruction.has("128")
    return instruction.name in ("RED", "REDG") and (instruction.has("F32x4") or instruction.has("128"))


def facts_of(name: str, lines: list[str], registers: int, local_bytes: int) -> Facts:
    kernel = sass.Kernel(lines)
    shape = shape_of(name)
    measured = row_loop(kernel, shape) if shape else None
    loop, counted = measured or (None, kernel.instructions)
    return Facts(
        registers,
        kernel.count("STL") + kernel.count("LDL"),
        local_bytes,
        sum(is_wide(i, "LDG") for i in counted),
        sum(is_wide(i, "RED") for i in counted),
        loop,
    )


def tool(name: str) -> str:
    """A program of the CUDA toolkit's from PyPI, else on PATH."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return str(next((file.locate() for file in files if file.name == name), name))


def output_of(*command: object, cwd: Path | None = None, text: str | None = None) -> str:
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True, cwd=cwd, input=text
    ).stdout


def library_in(path: Path, folder: Path) -> Path:
    """The CUDA extension: the file itself, or that of a wheel."""
    if path.suffix != ".whl":
        return path.resolve()
    with zipfile.ZipFile(path) as wheel:
        member = next(name for name in wheel.namelist() if re.search(r"/_C_cuda\..*so$", name))
        return Path(wheel.extract(member, folder)).resolve()


def release_of(cubin: Path) -> str | None:
    match = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", cubin.read_bytes())
    return match[1].decode() if match else None


def resources(cubin: Path) -> dict[str, tuple[int, int]]:
    """Registers, and bytes of local memory, of each function."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = re.findall(pattern, output_of(tool("cuobjdump"), "-res-usage", cubin))
    return {name: (int(reg), int(stack) + int(local)) for name, reg, stack, local in found}


def kernels_of(cubin: Path) -> Iterator[tuple[str, str, Facts]]:
    listing = output_of(tool("nvdisasm"), "-c", cubin)
    target = re.search(r"^\s*\.target\s+(sm_\w+)", listing, flags=re.MULTILINE)
    parts = dict(sass.sections(listing))
    if not parts or target is None:
        return
    usage = resources(cubin)
    names = output_of("c++filt", text="\n".join(parts)).splitlines()
    for (mangled, lines), demangled in zip(parts.items(), names, strict=True):
        if name := short_name(demangled):
            yield name, target[1], facts_of(name, lines, *usage[mangled])


def measure(path: Path) -> tuple[str, dict[str, dict[str, Facts]]]:
    """nvcc's release, and facts by kernel and architecture."""
    releases: set[str | None] = set()
    result: dict[str, dict[str, Facts]] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = library_in(path, Path(folder))
        output_of(tool("cuobjdump"), "-xelf", "all", library, cwd=Path(folder))
        cubins = sorted(Path(folder).glob("*.cubin"))
        releases.update(map(release_of, cubins))
        with ThreadPoolExecutor() as pool:
            found = [
                kernel for kernels in pool.map(lambda cubin: list(kernels_of(cubin)), cubins) for kernel in kernels
            ]
        for name, architecture, facts in found:
            if result.setdefault(name, {}).setdefault(architecture, facts) != facts:
                raise sass.Unexpected(f"two different kernels {name} for {architecture}")
    return ", ".join(sorted(release or "unknown" for release in releases)), result
