"""One way to step, in a process of its own: the time of a training step and its memory beyond table and state.

    python -m bench.fused_step WAY RULE CLASSES STEPS

WAY: "fused", "sparse" (gradient, then the optimizer's step), "dense" (torch.optim.AdamW, whatever the rule).
Prints a JSON object. Linux only, as bench.memory.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch

import nce_ext
from bench.memory import peak_beyond_now
from nce_ext import noise

BATCH, DIM, NEGATIVES = 4096, 64, 20
WAYS = ("fused", "sparse", "dense")


class Training:
    """A loss, its optimizer, and batches of random hidden vectors."""

    def __init__(self, way: str, rule: str, classes: int, batch: int = BATCH) -> None:
        self.way, self.batch = way, batch
        self.loss_fn = nce_ext.NCELoss(DIM, classes, noise.Uniform(classes), NEGATIVES, sparse=way != "dense")
        make = torch.optim.AdamW if way == "dense" else getattr(nce_ext.optim, rule)
        self.optimizer = make(self.loss_fn.parameters(), lr=1e-3)
        if way == "fused":
            self.loss_fn.fuse_optimizer(self.optimizer)
        self.hidden = torch.randn(batch, DIM, requires_grad=True)

    def step(self) -> None:
        target = self.loss_fn.noise.sample((self.batch,))
        self.loss_fn(self.hidden, target).backward()
        if self.way != "fused":
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.hidden.grad = None

    def tables(self) -> list[torch.Tensor]:
        state = [value for p in self.loss_fn.parameters() for value in self.optimizer.state[p].values()]
        return [*self.loss_fn.parameters(), *(value for value in state if torch.is_tensor(value) and value.dim())]


def measure(way: str, rule: str, classes: int, steps: int) -> dict[str, float]:
    Training(way, rule, 100, 8).step()  # threads, lazy imports and code pages are not the step's
    training = Training(way, rule, classes)
    training.step()  # makes the state
    with torch.no_grad():
        for table in training.tables():
            table.add_(0)  # touches every page
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        training.step()
        seconds.append(time.perf_counter() - start)
    return {
        "step_ms": sorted(seconds)[steps // 2] * 1e3,
        "best_ms": min(seconds) * 1e3,
        "peak_bytes": peak_beyond_now(training.step),
        "table_bytes": sum(table.nbytes for table in training.tables()),
    }


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="weight.grad will be dense")
        print(json.dumps(measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))
