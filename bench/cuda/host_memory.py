"""Steps on a table in pinned host memory, against the same table on the GPU and against rows gathered by the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import nce_ext
from bench.cases import Problem
from bench.cuda.baselines import assert_close
from bench.cuda.cases import DeviceCase, device_noise, fill
from bench.cuda.measure import DoesNotFit, require, share_row, value_row
from bench.cuda.run import Job, Run

CASES = (
    DeviceCase("word2vec", 8192, 128, 20, 10_000_000),
    DeviceCase("recommender", 8192, 128, 256, 10_000_000),
    DeviceCase("long rows", 8192, 1024, 20, 2_000_000, dtype=torch.bfloat16),
)
LAW = "zipf"
BUS_BYTES = 2**28


def host_memory(run: Run) -> Iterator[Job]:
    for case in map(run.sized, CASES):
        yield Job(case.work(LAW), functools.partial(measure_host_memory, run, case))


def measure_host_memory(run: Run, case: DeviceCase) -> None:
    if run.device.type != "cuda":
        raise DoesNotFit("pinned memory needs a GPU")
    require(3 * case.table_bytes, torch.device("cpu"))  # rounded up to a power of two, and the optimizer's state
    require(2 * case.table_bytes + 12 * case.batch * case.dim + 8 * case.pairs * (case.dim + 8), run.device)
    generator = torch.Generator().manual_seed(20)
    table = torch.empty(case.classes, case.dim, dtype=case.dtype, pin_memory=True)
    fill(table, 0.1, generator)
    noise = device_noise(LAW, case.classes, run.device)
    hidden = fill(torch.empty(case.batch, case.dim, dtype=case.dtype), 1, generator).to(run.device).requires_grad_()
    target = noise.sample((case.batch,))
    places = {"host": table, "GPU": table.to(run.device)}
    problems = {name: Problem(case, LAW, noise, hidden, nn.Parameter(t), target) for name, t in places.items()}
    check(problems)
    record_bus(run)

    programs: dict[str, Callable] = {}
    for name, problem in problems.items():
        optimizer = nce_ext.optim.Adagrad([problem.weight], lr=1e-6)
        programs[f"forward, {name}"] = functools.partial(forward, problem)
        programs[f"forward+backward, {name}"] = functools.partial(step, problem, None)
        programs[f"whole step, {name}"] = functools.partial(step, problem, optimizer)
    programs["gathered by the host"] = functools.partial(gather, problems["host"])
    times = run.stopwatch.compare(programs, 4, least_rounds=3)

    params, work = case.params(LAW), case.work(LAW)
    note = f"{case.pairs * case.row_bytes / 2**20:.0f} MiB of rows a forward pass"
    for part in ("forward", "forward+backward", "whole step"):
        row = times.row(
            f"table in host memory, {part}", params, f"{part}, GPU", ours=f"{part}, host", label="table on the GPU",
            work=work, note=f"{note}; the step by Adagrad where the table is",
        )  # fmt: skip
        run.recorder.add(row)
    row = times.row(
        "table in host memory, rows read", params, "gathered by the host", ours="forward, host",
        label="gathered on the CPU", work=work, note="index_select and a copy: the rows alone, no loss",
    )  # fmt: skip
    run.recorder.add(row)
    gigabytes = case.pairs * case.row_bytes / 1e9
    rate = value_row(
        times, "forward, host", convert=lambda seconds: gigabytes / seconds, name="table in host memory, GB/s of rows",
        work=work, params=params, unit="GB/s",
    )  # fmt: skip
    run.recorder.add(share_row(rate, bus_rate(run, to_host=False), "a copy from pinned memory"))


@torch.no_grad()
def forward(problem: Problem) -> None:
    problem.loss()


def step(problem: Problem, optimizer: torch.optim.Optimizer | None) -> None:
    problem.loss().backward()
    if optimizer is not None:
        optimizer.step()
    problem.drop_gradients()


def gather(problem: Problem) -> Tensor:
    """What one does without kernels that read host memory: the rows of all candidates, copied together."""
    ids = problem.noise.sample((problem.case.pairs,)).cpu()
    rows = torch.empty(len(ids), problem.case.dim, dtype=problem.weight.dtype, pin_memory=True)
    torch.index_select(problem.weight.detach(), 0, ids, out=rows)
    return rows.to(problem.hidden.device, non_blocking=True)


def check(problems: dict[str, Problem]) -> None:
    seed = torch.tensor([3, 14], device=problems["host"].hidden.device)
    losses, norms = [], []
    for problem in problems.values():
        loss = problem.loss(seed=seed)
        loss.backward()
        assert problem.weight.grad is not None
        losses.append(float(loss.detach()))
        norms.append(float(problem.weight.grad._values().double().norm()))
        problem.drop_gradients()
    assert_close("loss of the table in host memory", losses[0], losses[1], 1e-6)
    assert_close("norm of its gradient", norms[0], norms[1], 1e-6)


def record_bus(run: Run) -> None:
    if any(result["name"] == "bus" for result in run.ceilings):
        return
    on_host = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty(BUS_BYTES, dtype=torch.uint8, device=run.device)
    programs = {
        "from pinned memory": lambda: on_device.copy_(on_host, non_blocking=True),
        "to pinned memory": lambda: on_host.copy_(on_device, non_blocking=True),
    }
    times = run.stopwatch.compare(programs, 0.5)
    for name in programs:
        row = value_row(
            times, name, convert=lambda seconds: 1e-9 * BUS_BYTES / seconds, name="ceilings, by themselves",
            work=f"copy {name}", params={"bytes": BUS_BYTES}, unit="GB/s",
        )  # fmt: skip
        run.recorder.add(row)
        run.ceilings.append({"name": "bus", "params": {"to_host": name.startswith("to")}, "value": row.nce_ext})


def bus_rate(run: Run, *, to_host: bool) -> float:
    rates = (r["value"] for r in run.ceilings if r["name"] == "bus" and r["params"]["to_host"] == to_host)
    return next(rates)
