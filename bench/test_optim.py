"""One step of an optimizer on the touched rows of a table, against torch's on the same gradient and on a dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.cases import short
from nce_ext import optim

STEP = "optimizer step on touched rows (V, rows, D)"
CLASSES, TOUCHED, DIM = (100_000, 1_000_000), 80_000, 64

# Our optimizer, its options, torch's for the same sparse gradient, and whether that takes the same step. SparseAdam
# adds eps elsewhere: a tiny one makes no difference.
RULES = {
    "SGD": (optim.SGD, {"lr": 0.1}, torch.optim.SGD, True),
    "Adagrad": (optim.Adagrad, {"lr": 0.1}, torch.optim.Adagrad, True),
    "row-wise Adagrad": (optim.RowwiseAdagrad, {"lr": 0.1}, torch.optim.Adagrad, False),
    "Adam": (optim.Adam, {"lr": 1e-3, "eps": 1e-15, "bias_correction": "global"}, torch.optim.SparseAdam, True),
    "AdamW": (optim.AdamW, {"lr": 1e-3}, torch.optim.SparseAdam, False),
}


def sparse_gradient(n_classes: int, touched: int) -> Tensor:
    """Coalesced, of classes at random."""
    classes = torch.randperm(n_classes)[:touched].sort().values
    rows = torch.randn(touched, DIM)
    return torch.sparse_coo_tensor(
        classes[None], rows, (n_classes, DIM), is_coalesced=True, check_invariants=False
    )  # fmt: skip


def given(weight: Tensor, gradient: Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient
    return parameter


@pytest.mark.parametrize("classes", CLASSES, ids=short)
@pytest.mark.parametrize("name", RULES)
def test_optimizer_step(name: str, classes: int, quick: bool, stopwatch, rows) -> None:
    ours, options, theirs, same = RULES[name]
    n_classes, touched = (classes // 50, TOUCHED // 50) if quick else (classes, TOUCHED)
    weight, gradient = torch.randn(n_classes, DIM), sparse_gradient(n_classes, touched)
    mine, other = given(weight, gradient), given(weight, gradient)
    step = ours([mine], **options).step
    shared = {key: value for key, value in options.items() if key != "bias_correction"}
    baselines = {"torch": theirs([other], **shared).step}
    if name == "AdamW":
        dense = given(weight, gradient.to_dense())
        baselines["dense"] = torch.optim.AdamW([dense], **shared).step
    step()
    for baseline in baselines.values():
        baseline()
    if same:
        torch.testing.assert_close(mine, other)
    times = stopwatch.compare(step, baselines)
    params = {"rule": name, "V": n_classes, "rows": touched, "D": DIM}
    sizes = f"({short(n_classes)}, {short(touched)}, {DIM})"
    rows.append(times.row(STEP, params, "torch", work=f"{name} {sizes}", label=f"torch's {theirs.__name__}, sparse"))
    if "dense" in baselines:
        rows.append(times.row(STEP, params, "dense", work=f"{name} {sizes}", label="torch's AdamW, dense"))
