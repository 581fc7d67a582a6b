"""Peak memory of a training step: nothing of size B k D, and under sparse=True nothing that grows with V."""

from __future__ import annotations

import subprocess
import sys

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
