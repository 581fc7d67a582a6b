"""Real processes for tests: starts a script of distributed/ranks by torchrun and collects what each rank reports."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
RANKS = TESTS / "distributed" / "ranks"
PATH = os.pathsep.join(map(str, (TESTS.parent, TESTS / "support", TESTS / "distributed")))


@functools.cache
def torchrun(script: str, n: int, *args: object, timeout: float = 120, fails: bool = False) -> list[Any]:
    """Run tests/distributed/ranks/``script`` on ``n`` ranks; what each of them reported, in their order, or None.

    What is asked again is not run again. Without ``fails`` the run must succeed. With it, it must not: some rank dies,
    and the others ignore torchrun's SIGTERM for as long as they need to report.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
             str(RANKS / script), *map(str, args)],
            env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "REPORTS": folder},
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert (run.returncode != 0) == fails, f"{script} on {n} ranks ended with {run.returncode}:\n{run.stderr}"
        paths = [Path(folder, f"{rank}.json") for rank in range(n)]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def report(value: Any) -> None:
    """Called by a rank, once: JSON for the test to read."""
    path = Path(os.environ["REPORTS"], f"{os.environ['RANK']}.json")
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").rename(path)
