"""Ceilings of the device, and the share of them that the forward pass reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.cases import Problem
from bench.cuda import ceilings
from bench.cuda.baselines import check
from bench.cuda.cases import (
    DTYPES,
    FORWARD_NEGATIVES,
    FORWARD_READ_BYTES,
    FORWARD_TABLE_BYTES,
    ROW_BYTES,
    ZIPF_ROWS,
    DeviceCase,
    fill,
    make_problem,
)
from bench.cuda.measure import DoesNotFit, free_bytes, release, require, share_row, value_row
from bench.cuda.report import ceiling_row
from bench.cuda.run import Job, Run
from bench.timing import OURS
from nce_ext._ops.coo import COALESCED
from nce_ext._sampled.arguments import validate_and_flatten
from nce_ext._sampled.loss import inputs_of
from nce_ext.reference import Objective

GOAL, GOAL_ROW_BYTES = 0.85, 512
FORWARD = "forward, GB/s of requested rows, share of a copy"
FIRST_CEILINGS, FIRST_SECONDS = ("copy", "l2 read", "random rows"), 15
LAST_CEILINGS, LAST_SECONDS = ("read", "radix sort", "atomics", "launch"), 10
PRODUCTS = ((8192, 8192, 8192), (8192, 131_072, 4096))


def first_ceilings(run: Run) -> Iterator[Job]:
    yield Job(", ".join(FIRST_CEILINGS), lambda: measure_ceilings(run, FIRST_CEILINGS, FIRST_SECONDS))


def last_ceilings(run: Run) -> Iterator[Job]:
    yield Job(", ".join(LAST_CEILINGS), lambda: measure_ceilings(run, LAST_CEILINGS, LAST_SECONDS))


def measure_ceilings(run: Run, names: tuple[str, ...], seconds: float) -> None:
    if run.device.type != "cuda":
        raise DoesNotFit("the ceilings are a GPU's")
    release(run.device)  # another process is about to need the memory
    for result in ceilings.results(names, 2 if run.small else seconds):
        known = [other["name"] for other in run.ceilings]
        in_table = result["name"] == "copy" and result["params"]["method"] == "kernel"
        in_table |= result["name"] == "random rows" and result["params"]["row_bytes"] == 512
        in_table |= result["name"] == "l2 read" and "l2 read" not in known
        run.ceilings.append(result)
        run.recorder.add(ceiling_row(result, work_of(result), in_table=in_table))


def work_of(result: dict[str, Any]) -> str:
    params = result["params"]
    shown = ("row_bytes", "ids", "method", "rows_in", "vector_floats", "pairs", "end_bit", "of", "launch")
    values = [str(params[key]) for key in shown if key in params]
    if result["name"] == "l2 read":
        values.append(f"{params['bytes'] / 2**20:.0f} MiB")
    return ", ".join([result["name"], *values])


def products(run: Run) -> Iterator[Job]:
    for sizes in PRODUCTS:
        sizes = tuple(size // 64 for size in sizes) if run.small else sizes
        yield Job(
            "bf16 matmul " + "x".join(str(size) for size in sizes), lambda sizes=sizes: measure_matmul(run, sizes)
        )


def measure_matmul(run: Run, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    require(2 * (m * k + k * n + m * n), run.device)
    generator = torch.Generator(run.device).manual_seed(20)
    options = {"dtype": torch.bfloat16, "device": run.device}
    a = torch.empty(m, k, **options).normal_(generator=generator)  # on zeros it would run faster
    b = torch.empty(n, k, **options).normal_(generator=generator)
    out = torch.empty(m, n, **options)
    times = run.stopwatch.compare({"matmul": lambda: torch.mm(a, b.T, out=out)})
    row = value_row(
        times,
        "matmul",
        convert=lambda seconds: 2e-12 * m * n * k / seconds,
        name="ceilings, by themselves",
        work=f"bf16 matmul {m} x {n} x {k}",
        params={"m": m, "n": n, "k": k, "dtype": "bf16"},
        unit="TF/s",
        in_table=k == PRODUCTS[0][2],
    )
    run.recorder.add(row)


class Table:
    """One block of memory that every row length views as its table."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.block: torch.Tensor | None = None

    def view(self, rows: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        if self.block is None or self.block.dtype != dtype:
            self.block = None
            release(self.run.device)
            self.block = torch.empty(self.bytes() // dtype.itemsize, dtype=dtype, device=self.run.device)
            fill(self.block, 0.1, torch.Generator(self.run.device).manual_seed(20))
        return self.block[: rows * dim].view(rows, dim)

    def bytes(self) -> int:
        if self.run.small:
            return 2**22
        return min(FORWARD_TABLE_BYTES, free_bytes(self.run.device) // 4 // 2**20 * 2**20)


def forward(run: Run) -> Iterator[Job]:
    table = Table(run)
    for law in ("uniform", "zipf"):
        for dtype in DTYPES:
            for negatives in FORWARD_NEGATIVES[:1] if run.small else FORWARD_NEGATIVES:
                for row_bytes in ROW_BYTES[::3] if run.small else ROW_BYTES:
                    arguments = (law, dtype, negatives, row_bytes)
                    work = f"{row_bytes} B {DTYPES[dtype]} k={negatives} {law}"
                    yield Job(work, lambda arguments=arguments: measure_forward(run, table, *arguments))


def measure_forward(run: Run, table: Table, law: str, dtype: torch.dtype, negatives: int, row_bytes: int) -> None:
    dim = row_bytes // dtype.itemsize
    table_bytes = table.bytes() if table.block is None else table.block.nbytes
    classes = table_bytes // row_bytes
    classes = min(classes, ZIPF_ROWS) if law == "zipf" else classes
    read_bytes = 2**20 if run.small else FORWARD_READ_BYTES
    case = DeviceCase(
        "forward", max(8, read_bytes // row_bytes // (1 + negatives)), dim, negatives, classes, dtype=dtype
    )
    in_use = 4 * case.batch * dim * max(4, dtype.itemsize) + 16 * case.pairs  # hidden, its gradient; ids, their slopes
    require(in_use + (table_bytes if table.block is None else 0), run.device)
    problem = make_problem(case, law, run.device, table.view(classes, dim, dtype))
    check(problem)

    @torch.no_grad()
    def evaluate() -> None:
        problem.loss()

    operator = forward_operator(problem)
    programs = {OURS: evaluate, "with gradients": problem.loss, "operator": operator}
    times = run.stopwatch.compare(programs, 0.4)
    gigabytes = case.pairs * row_bytes / 1e9
    copy, random_rows = run.copy_ceiling(), run.random_row_ceiling(row_bytes, law)
    for program, kind in ((OURS, "no_grad"), ("with gradients", "with gradients"), ("operator", "operator alone")):
        is_goal = program == OURS and law == "uniform" and row_bytes >= GOAL_ROW_BYTES
        params = {**case.params(law), "row_bytes": row_bytes, "pass": kind, "row_gigabytes": gigabytes}
        fields = {"params": params, "unit": "GB/s", "convert": lambda seconds: gigabytes / seconds}
        work = f"{row_bytes} B {DTYPES[dtype]} k={negatives} {law}"
        work += {OURS: "", "with gradients": " grad", "operator": " op"}[program]
        row = value_row(times, program, name=FORWARD, work=work, **fields)
        row.in_table = in_table(program, case, law)
        against = "copy"
        if random_rows is not None:
            against += f"; {row.nce_ext / random_rows[0]:.0%} of random rows"
        note = "hidden is read besides: a row for every k + 1 rows of the table"
        run.recorder.add(share_row(row, copy, against, note=note, at_least=goal(run, is_goal)))
        if random_rows is not None:
            row = value_row(times, program, name="forward, share of random rows", work=work, **fields)
            ceiling, size = random_rows
            row.in_table = False
            run.recorder.add(share_row(row, ceiling, f"random rows of {size} B"))


def goal(run: Run, is_goal: bool) -> float | None:
    return GOAL if is_goal and not run.small else None


def in_table(program: str, case: DeviceCase, law: str) -> bool:
    size = case.row_bytes
    if case.negatives != FORWARD_NEGATIVES[0]:
        return False
    if program != OURS:
        return program == "with gradients" and law == "uniform" and size == 2048 and case.dtype == torch.float32
    if law == "zipf":
        return size == 2048 and case.dtype == torch.float32
    return case.dtype == torch.float32 or size in (512, 2048)


def forward_operator(
    problem: Problem, *, learns: bool = False, layout: int = COALESCED, objective: Objective | None = None
):
    """The operator under nce_loss with its arguments at hand, and nothing else."""
    case, hidden, weight = problem.case, problem.hidden.detach(), problem.weight.detach()
    call = validate_and_flatten(
        hidden, weight, problem.target, problem.noise, case.negatives, bias=None, shared=False, correction="log_kq",
        log_z=0.0, remove_hits=False, candidate_reduction="sum", positive_label="one", ignore_index=-100,
        backend="auto", negatives=None, log_q=None, seed=None, generator=None,
    )  # fmt: skip
    inputs = inputs_of(call._replace(objective=objective or call.objective), grad_enabled=False)
    arguments = inputs._replace(needs_hidden_grad=learns, needs_row_grad=learns, gradient_layout=layout)

    @torch.no_grad()
    def operator() -> tuple[torch.Tensor, ...]:
        return torch.ops.nce_ext.sampled_loss(*arguments)

    return operator
