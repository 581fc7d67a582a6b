"""Peak memory of a training step: nothing of size B k D, and under sparse=True nothing that grows with V."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The table is only read, and a fresh page that is only read is the kernel's one zero page: it does not count.
STEP = """
import resource, sys, torch
from nce_ext import functional, noise
batch, dim, classes, k = map(int, sys.argv[1:])
def step(batch, k, weight):
    hidden = torch.randn(batch, dim, requires_grad=True)
    target = torch.randint(len(weight), (batch,))
    options = {"sparse": True, "backend": "fused"}
    functional.nce_loss(hidden, weight, target, noise.Uniform(len(weight)), k, **options).backward()
step(2, 2, torch.zeros(10, dim, requires_grad=True))
weight = torch.empty(classes, dim).requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(batch, k, weight)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_growth(batch: int, dim: int, classes: int, k: int) -> float:
    """MiB by which one step raises the peak memory of a fresh process."""
    sizes = map(str, (batch, dim, classes, k))
    done = subprocess.run([sys.executable, "-c", STEP, *sizes], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        # The gathered rows would take 1 GiB, and ids, dlogit, sorted pairs and touched rows take 40 MiB.
        ({"batch": 1000, "dim": 256, "classes": 2000, "k": 1000}, 96),
        # A dense gradient would take 8 GiB.
        ({"batch": 100, "dim": 128, "classes": 2**24, "k": 10}, 32),
        # [B, V] logits would take 4 GiB.
        ({"batch": 1024, "dim": 4, "classes": 2**20, "k": 5}, 32),
    ],
    ids=str,
)
def test_a_step_allocates_for_what_it_touches(sizes, limit, native):
    assert peak_growth(**sizes) < limit


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
