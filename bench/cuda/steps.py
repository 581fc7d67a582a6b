"""Training steps: against eager PyTorch, torch.compile and the full softmax; in place; as a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import nce_ext
from bench.cases import NOISES, Problem
from bench.cuda.baselines import Eager, assert_close, check, softmax_losses, why_eager_cannot
from bench.cuda.cases import (
    COMPILED_STEPS,
    CONTEXTS_PER_WORD,
    HOGWILD_STEPS,
    LANGUAGE_MODEL,
    LONG_ROWS,
    SMALL_BATCH,
    SOFTMAX_STEPS,
    STEPS,
    WORD2VEC,
    DeviceCase,
    make_problem,
)
from bench.cuda.forward import forward_operator
from bench.cuda.measure import DoesNotFit, free_bytes, require, value_row
from bench.cuda.run import Job, Run
from bench.eager import LABELS
from bench.timing import OURS, Row, Times

STEP = "forward+backward, sparse gradient (B, D, k, V)"
FORWARD = "forward, as it trains"
SAMPLING_GOAL = 0.05
DENSE_LIMIT = 8 * 2**30  # bytes of a dense gradient


def steps(run: Run) -> Iterator[Job]:
    for law in NOISES:
        for case in map(run.sized, STEPS):
            yield Job(case.work(law), functools.partial(measure_step, run, case, law))


def compiled(run: Run) -> Iterator[Job]:
    for case in map(run.sized, COMPILED_STEPS[:1] if run.small else COMPILED_STEPS):
        yield Job(case.work("uniform"), functools.partial(measure_compiled, run, case, "uniform"))


def softmax(run: Run) -> Iterator[Job]:
    for case in map(run.sized, SOFTMAX_STEPS):
        yield Job(case.work("zipf"), functools.partial(measure_softmax, run, case, "zipf"))


def hogwild(run: Run) -> Iterator[Job]:
    for case in map(run.sized, HOGWILD_STEPS):
        yield Job(case.work("zipf"), functools.partial(measure_hogwild, run, case, "zipf"))


def graphs(run: Run) -> Iterator[Job]:
    for case in map(run.sized, (SMALL_BATCH, WORD2VEC)):
        yield Job(case.work("zipf"), functools.partial(measure_graph, run, case, "zipf"))


def train(problem: Problem, sparse: bool | str) -> None:
    problem.loss(sparse=sparse).backward()
    problem.drop_gradients()


def bytes_of(case: DeviceCase) -> int:
    """Table, hidden with its gradients, ids and slopes, a gradient of every row and the scratch that sums it."""
    rows = min(case.pairs, case.classes) * case.dim * 4
    return case.table_bytes + 12 * case.batch * case.dim + 48 * case.pairs + 2 * rows


def measure_step(run: Run, case: DeviceCase, law: str) -> None:
    require(bytes_of(case), run.device)
    problem = make_problem(case, law, run.device)
    dense = case.table_bytes <= DENSE_LIMIT and 4 * case.table_bytes < 0.8 * free_bytes(run.device)
    check(problem, (True, "padded", False) if dense else (True, "padded"))
    why_not = why_eager_cannot(case, free_bytes(run.device))
    eager = None if why_not else Eager(problem)
    if eager is not None and not run.succeeds(f"eager, {case.work(law)}", lambda: eager.prepare(run.stopwatch)):
        eager, why_not = None, "eager left out: it failed"
    if eager is not None:
        eager.check("coalesced")
        dense = dense and run.succeeds(f"eager, dense, {case.work(law)}", lambda: eager.step("dense"))
    problem.drop_gradients()  # what a failure left

    forward: dict[str, Callable] = {OURS: problem.loss, "operator": forward_operator(problem, learns=True)}
    if eager is not None:
        forward["eager"] = lambda: eager.loss("sparse")
    times = run.stopwatch.compare(forward, 0.6)
    params, work = case.params(law), case.work(law)
    in_table = law == "uniform" and case in (LONG_ROWS, LANGUAGE_MODEL)
    gigabytes = case.pairs * case.row_bytes / 1e9
    rate = f"{gigabytes / times.median('operator'):.0f} GB/s of rows by the operator alone"
    if eager is not None:
        fields = {"work": work, "label": "eager", "note": f"{rate}; {eager.note}"}
        run.recorder.add(times.row(FORWARD, params, "eager", in_table=in_table, **fields))
    else:
        run.recorder.add(
            value_row(times, name=FORWARD, work=work, params=params, in_table=False, note=f"{rate}; {why_not}")
        )
    fields = {"work": work, "in_table": False, "note": rate}
    run.recorder.add(value_row(times, "operator", name="forward, the operator alone", params=params, **fields))

    steps: dict[str, Callable] = {
        OURS: lambda: train(problem, True),
        "padded": lambda: train(problem, "padded"),
        "sampling": lambda: problem.noise.sample((case.batch, case.negatives)),
        "row_grad": row_grad_operator(problem),
    }
    if dense:
        steps["dense"] = lambda: train(problem, False)
    if eager is not None:
        variants = {"coalesced": "coalesced", "sparse": "sparse"} | ({"eager, dense": "dense"} if dense else {})
        steps |= {name: functools.partial(eager.step, variant) for name, variant in variants.items()}
    times = run.stopwatch.compare(steps, 1.5)
    record_step(run, case, law, times, eager, why_not)


def record_step(run: Run, case: DeviceCase, law: str, times: Times, eager: Eager | None, why_not: str | None) -> None:
    params, work = case.params(law), case.work(law)
    goal = case.at_least.get("coalesced")
    for ours, kind in ((OURS, "sparse"), ("padded", "padded"), ("dense", "dense")):
        if ours not in times.seconds:
            continue
        name = STEP if ours == OURS else f"forward+backward, {kind} gradient"
        if eager is None:
            fields = {"name": name, "work": work, "params": params, "note": why_not or ""}
            run.recorder.add(value_row(times, ours, in_table=ours == OURS and law == "uniform", **fields))
            continue
        for variant in ("eager, dense",) if ours == "dense" else ("coalesced", "sparse"):
            shown = ours == OURS and variant == "coalesced" and (law == "uniform" or case.dim > 128)
            row = times.row(name, params, variant, work=work, ours=ours, label=LABELS.get(variant, variant))
            row.note, row.in_table = eager.note, shown
            row.at_least = goal if ours == OURS and variant == "coalesced" else None
            run.recorder.add(row)
    shares = {"sampling": "drawing the noise by itself, share of a step", "row_grad": "row_grad alone, share of a step"}
    for program, name in shares.items():
        row = times.row(name, params, OURS, work=work, ours=program, label="ms, whole step", shown_as="share")
        row.at_most = SAMPLING_GOAL if program == "sampling" and case.at_least else None
        row.in_table = program == "sampling" and case == LONG_ROWS and law == "zipf"
        run.recorder.add(row)


def row_grad_operator(problem: Problem) -> Callable[[], object]:
    """The gradient of the rows from what a forward pass has left, without waiting for their number."""
    loss, ids, slopes, _ = forward_operator(problem, learns=True)()
    case, hidden = problem.case, problem.hidden.detach()
    scale = torch.full_like(loss, 1 / case.batch)
    arguments = (ids, slopes, scale, hidden, case.classes, problem.weight.dtype, True, False, True)
    return lambda: torch.ops.nce_ext.row_grad(*arguments)


def measure_compiled(run: Run, case: DeviceCase, law: str) -> None:
    """Inductor takes dense gradients only; nce_ext runs as one would train with it, and dense as well."""
    require(bytes_of(case) + 4 * case.table_bytes, run.device)
    problem = make_problem(case, law, run.device)
    check(problem, (True, False))
    eager = Eager(problem)
    eager.prepare(run.stopwatch)
    eager.check("compiled")
    programs = {OURS: lambda: train(problem, True), "dense": lambda: train(problem, False)}
    times = run.stopwatch.compare({**programs, "compiled": lambda: eager.step("compiled")}, 1.5)
    fields = {"params": case.params(law), "against": "compiled", "work": case.work(law), "label": LABELS["compiled"]}
    run.recorder.add(times.row(STEP, at_least=case.at_least.get("compiled"), note=eager.note, **fields))
    run.recorder.add(
        times.row("forward+backward, dense gradient", ours="dense", in_table=False, note=eager.note, **fields)
    )


def measure_softmax(run: Run, case: DeviceCase, law: str) -> None:
    """nce_ext with k negatives an example against the exact loss over all classes, whose gradient is dense."""
    require(bytes_of(case) + 4 * case.table_bytes, run.device)
    problem = make_problem(case, law, run.device)
    check(problem)
    losses = softmax_losses(problem, free_bytes(run.device))
    losses = {name: loss for name, loss in losses.items() if run.succeeds(f"{name}, {case.work(law)}", loss)}
    values = {name: float(loss().detach()) for name, loss in losses.items()}
    reference = next(iter(values))
    for name, value in values.items():
        assert_close(f"{name} against {reference}", value, values[reference], 1e-2)

    def step(loss: Callable) -> None:
        loss().backward()
        problem.drop_gradients()

    programs = {name: functools.partial(step, loss) for name, loss in losses.items()}
    times = run.stopwatch.compare({OURS: lambda: train(problem, True), **programs}, 3, least_rounds=3)
    for name in losses:
        fields = {"work": case.work(law), "in_table": name == reference or name.startswith("F.linear")}
        run.recorder.add(times.row("forward+backward, full softmax", case.params(law), name, **fields))
    if "F.linear_cross_entropy" not in losses:
        run.recorder.skip(f"F.linear_cross_entropy, {case.work(law)}", f"torch {torch.__version__} has none")


def measure_hogwild(run: Run, case: DeviceCase, law: str) -> None:
    require(bytes_of(case) + case.table_bytes, run.device)
    problem = make_problem(case, law, run.device)
    hidden, weight = problem.hidden, problem.weight
    arguments = (hidden.detach(), weight.detach(), problem.target, problem.noise, case.negatives)
    seed = torch.tensor([3, 14], device=run.device)
    losses, _ = nce_ext.functional.hogwild_sgd_(*arguments, 0.0, seed=seed)
    with torch.no_grad():
        expected = nce_ext.functional.negative_sampling_loss(*arguments, seed=seed)
    assert_close("loss of the step in place", float(losses.mean()), float(expected), 1e-3)

    rate = 1e-6  # so small that however many steps leave the table as it is
    optimizer = torch.optim.SGD([weight], lr=rate)

    def sparse_step() -> None:
        loss = nce_ext.functional.negative_sampling_loss(
            hidden, weight, problem.target, problem.noise, case.negatives, sparse=True, reduction="sum"
        )
        loss.backward()
        optimizer.step()
        problem.drop_gradients()

    programs: dict[str, Callable] = {
        OURS: lambda: nce_ext.functional.hogwild_sgd_(*arguments, rate),
        "sparse step + SGD": sparse_step,
    }
    if (why_not := why_eager_cannot(case, free_bytes(run.device))) is None:
        eager = Eager(problem)
        eager.prepare(run.stopwatch)

        def eager_step() -> None:
            eager.loss("sparse").backward()
            optimizer.step()
            problem.drop_gradients()

        programs["eager, sparse + SGD"] = eager_step
    else:
        run.recorder.skip(f"eager, {case.work(law)}", why_not)
    times = run.stopwatch.compare(programs)
    for against in list(programs)[1:]:
        row = times.row("hogwild_sgd_, one step with its update", case.params(law), against, work=case.work(law))
        row.in_table = against == "sparse step + SGD"
        row.note = "eager subtracts log(k q) besides" if against.startswith("eager") else ""
        run.recorder.add(row)
    words = case.batch / CONTEXTS_PER_WORD / 1e6
    note = f"{CONTEXTS_PER_WORD} pairs of (centre, context) a word; kernels alone, no reading of text"
    fields = {"params": case.params(law), "unit": "M/s", "note": note, "convert": lambda seconds: words / seconds}
    run.recorder.add(
        value_row(times, name="hogwild_sgd_, words a second, estimated", work=case.work(law), in_table=False, **fields)
    )


def measure_graph(run: Run, case: DeviceCase, law: str) -> None:
    if run.device.type != "cuda":
        raise DoesNotFit("CUDA graphs need a GPU")
    require(bytes_of(case), run.device)
    problem = make_problem(case, law, run.device)
    check(problem, ("padded",))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(problem, "padded")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = problem.loss(sparse="padded")
        loss.backward()
        value = loss.detach()
    del loss  # it keeps the nodes that add up gradients, and those the stream of the capture
    hidden_grad, weight_grad = problem.hidden.grad, problem.weight.grad
    problem.drop_gradients()  # the graph's own stay alive by name, and the launched step makes its own
    graph.replay()
    graph_loss, launched_loss = float(value), float(problem.loss().detach())
    assert_close("loss of the graph", graph_loss, launched_loss, 0.5)  # on other draws
    assert hidden_grad is not None
    assert weight_grad is not None
    programs = {
        OURS: graph.replay,
        "launched, padded": lambda: train(problem, "padded"),
        "launched, sparse": lambda: train(problem, True),
    }
    times = run.stopwatch.compare(programs)
    for against in list(programs)[1:]:
        row: Row = times.row("forward+backward as a CUDA graph", case.params(law), against, work=case.work(law))
        row.in_table = case == SMALL_BATCH and against == "launched, sparse"
        run.recorder.add(row)
