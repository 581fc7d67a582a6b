"""What `make` says while it sets up an environment: its stages, in order."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("target", "last"), [("demo", "examples/word2vec.py"), ("test", "pytest")])
def test_a_set_up_announces_its_stages(target, last, tmp_path):
    """And nothing is installed or built without having been announced."""
    # A make around the tests would have its options taken over, and its level shown.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    stages = [int(match[1]) for line in lines if (match := re.match(r'echo "(\d)/4 ', line))]
    assert stages == sorted(stages)
    assert set(stages) == {1, 2, 3, 4}
    for before, line in itertools.pairwise(lines):
        if "pip install" in line or " -m venv " in line:
            assert before.startswith("echo "), line
            assert ("--quiet" in line) or (" -m venv " in line), "here no terminal would show the progress"
    assert last in lines[-1]
