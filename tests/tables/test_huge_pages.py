"""The table of a module lies in huge pages, where the system gives them out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# In a process of its own: memory that was in use before keeps the pages it has.
TABLE_PAGES = """
import re, nce_ext
loss_fn = nce_ext.NCELoss(64, 2**18, nce_ext.noise.Uniform(2**18), 2)
address = loss_fn.weight.data_ptr() + loss_fn.weight.nbytes // 2
for line in open("/proc/self/smaps"):
    if mapping := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
    elif inside and line.startswith("AnonHugePages:"):
        print(int(line.split()[1]) * 1024 / loss_fn.weight.nbytes)
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system gives out no huge pages"
)
def test_a_modules_table_lies_in_huge_pages():
    done = subprocess.run([sys.executable, "-c", TABLE_PAGES], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.5  # memory may be too scattered for all of it
