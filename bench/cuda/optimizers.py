"""A training step with its optimizer: inside backward, after it by nce_ext.optim, and by torch's sparse optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

import nce_ext
from bench.cuda.cases import HOGWILD_STEPS, DeviceCase, make_problem
from bench.cuda.measure import require
from bench.cuda.run import Job, Run
from bench.cuda.steps import bytes_of
from bench.timing import OURS

RATE = 1e-6  # so small that however many steps leave the table as it is
# Ours, and torch's for sparse gradients that comes nearest.
RULES: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer]]] = {
    "SGD": (nce_ext.optim.SGD, torch.optim.SGD),
    "RowwiseAdagrad": (nce_ext.optim.RowwiseAdagrad, torch.optim.Adagrad),
    "AdamW": (nce_ext.optim.AdamW, torch.optim.SparseAdam),
}


def optimizers(run: Run) -> Iterator[Job]:
    for case in map(run.sized, HOGWILD_STEPS):
        for rule in RULES:
            yield Job(f"{rule}, {case.work('zipf')}", functools.partial(measure, run, case, rule))


def measure(run: Run, case: DeviceCase, rule: str) -> None:
    require(bytes_of(case) + 6 * case.table_bytes, run.device)
    problem = make_problem(case, "zipf", run.device)
    hidden, target = problem.hidden, problem.target
    weight = nn.Parameter(problem.weight.detach())
    ours, theirs = (make([weight], lr=RATE) for make in RULES[rule])

    def make_loss() -> nce_ext.NCELoss:
        with torch.device("meta"):  # the table is there already
            made = nce_ext.NCELoss(case.dim, case.classes, problem.noise, case.negatives, bias=False, sparse=True)
        made.weight = weight
        return made

    plain, fused = make_loss(), make_loss()
    fused.fuse_optimizer(ours)

    def fused_step() -> None:
        fused(hidden, target).backward()
        hidden.grad = None

    def step(optimizer: torch.optim.Optimizer) -> None:
        plain(hidden, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        hidden.grad = None

    programs: dict[str, Callable[[], None]] = {OURS: fused_step, "gradient, then step": lambda: step(ours)}
    name = f"torch.optim.{RULES[rule][1].__name__}"
    if run.succeeds(f"{name}, {case.work('zipf')}", lambda: step(theirs)):
        programs[name] = lambda: step(theirs)
    times = run.stopwatch.compare(programs)
    for against in list(programs)[1:]:
        row = times.row(f"step with {rule} inside backward", case.params("zipf"), against, work=case.work("zipf"))
        row.in_table = rule == "AdamW"
        run.recorder.add(row)
