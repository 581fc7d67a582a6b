"""Objectives over the whole example against the binary one, and the epilogue of shared negatives against a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.cuda.cases import LANGUAGE_MODEL, LONG_ROWS, WORD2VEC, DeviceCase, make_problem
from bench.cuda.forward import forward_operator
from bench.cuda.measure import require, share_row, value_row
from bench.cuda.run import Job, Run
from nce_ext.reference import ADVERSARIAL, BINARY, SOFTMAX, Objective

OBJECTIVES = {
    "binary": Objective(BINARY),
    "softmax": Objective(SOFTMAX),
    "smoothed": Objective(SOFTMAX, label_smoothing=0.1),
    "adversarial": Objective(ADVERSARIAL, temperature=1.0),
}
EPILOGUES = ((8192, 8192), (8192, 1024), (65_536, 256))  # examples, columns
EPILOGUE_DIM, EPILOGUE_CLASSES = 1024, 128_000


def objectives(run: Run) -> Iterator[Job]:
    for case in (WORD2VEC, LONG_ROWS, LANGUAGE_MODEL):
        case = case.smaller() if run.small else case
        yield Job(case.work("uniform"), lambda case=case: measure_objectives(run, case))


def measure_objectives(run: Run, case: DeviceCase) -> None:
    """The forward pass with all gradients, by the operator alone."""
    require(case.table_bytes + 8 * case.batch * case.dim + 16 * case.pairs, run.device)
    problem = make_problem(case, "uniform", run.device)
    programs = {
        name: forward_operator(problem, learns=True, objective=objective) for name, objective in OBJECTIVES.items()
    }
    times = run.stopwatch.compare(programs, 1.0)
    gigabytes = case.pairs * case.row_bytes / 1e9
    for name in OBJECTIVES:
        row = value_row(
            times, name, convert=lambda seconds: gigabytes / seconds, name="objectives, GB/s of requested rows",
            work=f"{case.work('uniform')} {name}", params={**case.params("uniform"), "objective": name}, unit="GB/s",
        )  # fmt: skip
        row.in_table = case.name == WORD2VEC.name or name == "softmax"
        run.recorder.add(share_row(row, gigabytes / times.median("binary"), "the binary objective"))


def epilogue(run: Run) -> Iterator[Job]:
    for batch, columns in EPILOGUES:
        sizes = (batch // 256, columns // 16) if run.small else (batch, columns)
        yield Job(f"{sizes[0]} x {sizes[1]}", lambda sizes=sizes: measure_epilogue(run, *sizes))


def measure_epilogue(run: Run, batch: int, columns: int) -> None:
    """Logits are read once and written once; an objective does not tell that they are the derivatives of before."""
    dim, classes = (64, 1000) if run.small else (EPILOGUE_DIM, EPILOGUE_CLASSES)
    require(4 * batch * columns + 2 * classes * dim + 8 * batch * dim, run.device)
    options = {"dtype": torch.bfloat16, "device": run.device}
    hidden, weight = torch.randn(batch, dim, **options), torch.randn(classes, dim, **options)
    logits, shift = torch.randn(batch, columns, device=run.device), torch.randn(columns, device=run.device)
    target = torch.randint(classes, (batch, 1), device=run.device)
    programs: dict[str, Callable] = {}
    for name, objective in OBJECTIVES.items():
        arguments = (
            logits, hidden, weight, None, target, None, shift, None, None, columns, None, 0.0, False, False, -100,
            *objective, None, True, True,
        )  # fmt: skip
        programs[name] = lambda arguments=arguments: torch.ops.nce_ext.shared_loss_(*arguments)
    times = run.stopwatch.compare(programs, 0.5)
    gigabytes = (8 * batch * columns + batch * dim * (2 + 2 + 4)) / 1e9
    for name in OBJECTIVES:
        row = value_row(
            times, name, convert=lambda seconds: gigabytes / seconds, name="shared negatives' epilogue",
            work=f"{batch} x {columns} bf16 D={dim} {name}", unit="GB/s",
            params={"batch": batch, "columns": columns, "dim": dim, "objective": name},
        )  # fmt: skip
        row.in_table = name == "softmax"
        run.recorder.add(share_row(row, run.copy_ceiling(), "copy"))
