"""Memory of a fused step: its gradient rows never exist, and nothing grows with the number of classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import Allocations
from cases import Case
from fused_cases import loss_of

from nce_ext import optim

pytestmark = pytest.mark.usefixtures("native")

RESET = Path("/proc/self/clear_refs")

# In a process of its own, whose peak is that of this step. The table and the state have been written to before.
STEP = """
import sys, torch, nce_ext
from pathlib import Path
from nce_ext import noise, optim
rule, way, accumulate = sys.argv[1:4]
batch, dim, classes, k = map(int, sys.argv[4:])
loss_fn = nce_ext.NCELoss(dim, classes, noise.Uniform(10_000), k, sparse=True) if classes == 10_000 else None
if loss_fn is None:
    counts = torch.zeros(classes)
    counts[:: classes // 10_000][:10_000] = 1
    loss_fn = nce_ext.NCELoss(dim, classes, noise.Unigram(counts), k, correction="none", sparse=True)
optimizer = getattr(optim, rule)(loss_fn.parameters(), lr=0.1)
if way == "fused":
    loss_fn.fuse_optimizer(optimizer, accumulate=int(accumulate))
def step(batch):
    hidden, target = torch.randn(batch, dim, requires_grad=True), loss_fn.noise.sample((batch,))
    loss_fn(hidden, target).backward()
    if way != "fused":
        optimizer.step()
        optimizer.zero_grad()
for _ in range(int(accumulate)):
    step(2)
for p in loss_fn.parameters():
    p.data.add_(1)
    for value in optimizer.state[p].values():
        if torch.is_tensor(value) and value.dim():
            value.add_(1)
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
for _ in range(int(accumulate)):
    step(batch)
print((resident("VmHWM") - before) / 1024)
"""


def growth(rule: str, way: str, *, classes: int, batch: int = 2048, dim: int = 256, k: int = 63, accumulate: int = 1):
    """MiB by which the step raises the peak."""
    arguments = map(str, (rule, way, accumulate, batch, dim, classes, k))
    done = subprocess.run([sys.executable, "-c", STEP, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not RESET.exists(), reason="the peak of the resident memory can be reset on Linux only")
def test_the_gradient_of_the_rows_never_exists():
    """All 10 000 rows are touched, of which the gradient takes 9.8 MiB."""
    assert growth("AdamW", "plain", classes=10_000) - growth("AdamW", "fused", classes=10_000) > 8


@pytest.mark.skipif(not RESET.exists(), reason="the peak of the resident memory can be reset on Linux only")
def test_memory_does_not_grow_with_the_classes():
    """Of 20 thousand or 2 million, the same number is drawn."""
    few, many = (growth("RowwiseAdagrad", "fused", classes=classes, dim=8) for classes in (20_000, 2_000_000))
    assert many < few + 4


@pytest.mark.parametrize("options", [{}, {"max_norm": 1e-3}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("rule", ["SGD", "Adagrad", "RowwiseAdagrad", "AdamW"])
def test_no_tensor_of_rows_is_made(rule, options):
    """The largest tensor of two steps is the pairs' or the hidden vectors', which accumulation puts together."""
    case = Case(lead=(32,), dim=64, classes=5000, negatives=63)
    touched = len(torch.cat([case.noise.sample((32, 63), seed=case.seed).reshape(-1), case.target]).unique())
    assert touched > 20 * 32
    loss_fn = loss_of("nce", case)
    optimizer = getattr(optim, rule)(loss_fn.parameters(), lr=0.1)
    loss_fn.fuse_optimizer(optimizer, **options)
    hidden = case.hidden.detach().requires_grad_()
    for _ in range(2):  # makes the state
        loss_fn(hidden, case.target, seed=case.seed).backward()
    tables = [t for p in loss_fn.parameters() for t in (p, *optimizer.state[p].values()) if torch.is_tensor(t)]
    with Allocations([*tables, case.noise.table]) as made:
        for _ in range(2):
            loss_fn(hidden, case.target, seed=case.seed).backward()
    assert 32 * 64 <= made.largest <= options.get("accumulate", 1) * 32 * 64
