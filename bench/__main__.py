"""``python -m bench``: every benchmark in one process, one JSON file, one table."""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure nce_ext against eager PyTorch, torch.compile, the full softmax and the memory system.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file; default bench/results/DATE.json")
    parser.add_argument("--quick", action="store_true", help="a smoke test of under a minute; no file by default")
    parser.add_argument("-k", dest="select", metavar="EXPRESSION", help="run only the benchmarks that match")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    arguments = [str(FOLDER), "--rootdir", str(FOLDER.parent), "-p", "no:cacheprovider"]
    # pytest-benchmark's own table is much wider than a screen; its statistics are in the JSON.
    arguments += ["--benchmark-quiet", "--benchmark-disable-gc"]
    if options.quick:
        arguments.append("--quick")
    if options.select:
        arguments += ["-k", options.select]

    output = options.output
    if output is None and not options.quick:
        output = FOLDER / "results" / f"{datetime.date.today().isoformat()}.json"
    if output is None:
        return pytest.main(arguments)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # a run that fails must not leave half a file where a whole one was
        finished = Path(folder) / output.name
        status = pytest.main([*arguments, f"--benchmark-json={finished}"])
        if status == pytest.ExitCode.OK and finished.stat().st_size:
            shutil.move(finished, output)
            print(f"\nwrote {output}")
        else:
            print(f"\nnot written, as the run failed: {output}", file=sys.stderr)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
