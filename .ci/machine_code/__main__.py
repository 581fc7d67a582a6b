"""Compares the machine code of the CUDA kernels with a committed table: a test of their speed that needs no GPU.

Fails where a kernel spills, has lost its 16-byte loads or additions, or takes more than 10 % more registers or
instructions per row than the table says. Needs nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm and c++filt.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import facts
import sass
import table

PATH = Path(__file__).parent / "table.txt"


def installed() -> Path:
    spec = importlib.util.find_spec("nce_ext")
    folders = spec.submodule_search_locations if spec else None
    library = next((path for folder in folders or () for path in Path(folder).glob("_C_cuda.*so")), None)
    if library is None:
        sys.exit("machine-code: no nce_ext with CUDA kernels is installed; name a wheel or a library by --binary")
    return library


def main() -> None:
    parser = argparse.ArgumentParser(prog="machine-code", description=__doc__)
    parser.add_argument("--binary", type=Path, help="wheel or shared library; by default that which is installed")
    parser.add_argument("--table", type=Path, default=PATH, help="by default %(default)s")
    parser.add_argument("--update", action="store_true", help="write the table")
    arguments = parser.parse_args()

    try:
        release, measured = facts.measure(arguments.binary or installed())
    except sass.Unexpected as reason:
        sys.exit(f"machine-code: {reason}")
    if not measured:
        sys.exit("machine-code: no kernels found")
    if arguments.update:
        arguments.table.write_text(table.write(release, measured))
        print(f"machine-code: wrote {arguments.table}")
    table_release, known = table.read(arguments.table.read_text())
    tolerance = table.tolerance_between(release, table_release)
    if release != table_release:
        print(f"machine-code: built by nvcc {release}, the table is of {table_release}: {tolerance:.0%} are allowed")
    failures, hints = table.compare(known, measured, tolerance)
    for hint in hints:
        print(f"machine-code: better: {hint}; --update writes it down")
    for failure in failures:
        print(f"machine-code: {failure}")
    if failures:
        sys.exit(f"machine-code: {len(failures)} failures")
    n_kernels = sum(map(len, measured.values()))
    print(f"machine-code: {len(measured)} kernels, {n_kernels} with their architectures, as the table says")


if __name__ == "__main__":
    main()
