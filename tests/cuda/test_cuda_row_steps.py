"""Steps on rows and the racy scatter on a GPU: as on the CPU, repeatable, without waiting for the device."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("cuda")

SGD, ADAGRAD, ROWWISE, ADAM = range(4)
V, B, COLUMNS = 300, 200, 9
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DIMS = [1, 8, 33, 100, 128, 300, 1024]
RULES: dict[str, dict[str, Any]] = {
    "SGD": {"rule": SGD},
    "Nesterov": {"rule": SGD, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "counted": True},
    "Adagrad": {"rule": ADAGRAD, "eps": 1e-10},
    "row-wise Adagrad": {"rule": ROWWISE, "eps": 1e-10, "weight_decay": 0.1},
    "AdamW": {"rule": ADAM, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "counted": True, "decoupled": True},
}


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Table:
    """A weight and its state on the CPU; `on(device)` gives the operators' arguments from copies there."""

    def __init__(self, dtype: torch.dtype, dim: int, seeded: bool = False, **rule: Any):
        torch.manual_seed(dim)
        self.rule, shape = rule, (V, dim)
        number = functools.partial(torch.randn, dtype=torch.float64)
        momentum = rule["rule"] == ADAM or rule.get("momentum", 0) > 0
        self.weight = number(shape).to(dtype)
        self.first = number(shape).to(compute(dtype)) if momentum else None
        second = number(V if rule["rule"] == ROWWISE else shape).square().to(compute(dtype))
        self.second = None if rule["rule"] == SGD else second
        self.steps = torch.randint(0, 3, (V,), dtype=torch.int32) if rule.get("counted") else None
        self.decayed = -0.3 * torch.rand(V, dtype=torch.float64) if rule.get("decoupled") else None
        self.scale = torch.tensor([0.5], dtype=compute(dtype))
        self.seed = torch.tensor([3, -4]) if seeded else None

    @property
    def numbers(self) -> tuple:
        get = self.rule.get
        log_decay = -0.3 if get("decoupled") else 0.0
        rates = (0.05, get("weight_decay", 0.0), log_decay, get("momentum", 0.0), 0.0)
        adam = (get("beta1", 0.0), get("beta2", 0.0), get("eps", 0.0))
        return (self.rule["rule"], 7, *rates, *adam, get("nesterov", False), False)

    def on(self, device: torch.device) -> tuple[Tensor, list[Tensor | None]]:
        copies = [self.weight, self.first, self.second, self.steps, self.decayed, None, self.scale, self.seed]
        weight, *state = (None if t is None else t.to(device, copy=True) for t in copies)
        return weight, state


def pairs(dtype: torch.dtype, dim: int) -> list[Tensor]:
    """Few hot classes and many rare ones."""
    torch.manual_seed(dim + 1)
    ids = (V * torch.rand(B, COLUMNS) ** 3).int()
    ids[torch.rand(B, COLUMNS) < 0.1] = -1
    real = compute(dtype)
    return [ids, torch.randn(B, COLUMNS, dtype=real), torch.randn(B, dtype=real), torch.randn(B, dim).to(dtype)]


def assert_same_state(got: tuple, wanted: tuple) -> None:
    for ours, theirs in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        if theirs is not None:
            # Sums are rounded in another order, and a 16-bit weight may fall to its other neighbour.
            tolerance = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}.get(theirs.dtype, 2e-4)
            torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=2e-4)


def row_step(table: Table, device: torch.device, classes: Tensor | None, gradient: Tensor) -> tuple:
    weight, state = table.on(device)
    classes = None if classes is None else classes.to(device)
    torch.ops.nce_ext.row_step_(weight, classes, gradient.to(device), *state, *table.numbers)
    return weight, state


def row_grad_step(table: Table, device: torch.device, operands: list[Tensor]) -> tuple[tuple, tuple[Tensor, Tensor]]:
    weight, state = table.on(device)
    moved = [t.to(device) for t in operands]
    outputs = torch.ops.nce_ext.row_grad_step_(*moved, weight, *state, True, *table.numbers)
    return (weight, state), outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_agrees_with_the_cpu(rule, dim, dtype, cuda):
    table, cpu = Table(dtype, dim, **RULES[rule]), torch.device("cpu")
    classes = torch.randperm(V)[: V // 2].sort().values
    gradient = torch.randn(len(classes), dim).to(dtype)
    assert_same_state(row_step(table, cuda, classes, gradient), row_step(table, cpu, classes, gradient))
    gradient = torch.randn(V, dim).to(dtype)
    assert_same_state(row_step(table, cuda, None, gradient), row_step(table, cpu, None, gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_fused_step_agrees_with_the_cpu_and_repeats(rule, dim, dtype, cuda):
    table, operands = Table(dtype, dim, **RULES[rule]), pairs(dtype, dim)
    wanted, (classes, bias) = row_grad_step(table, torch.device("cpu"), operands)
    got, (ours, elements) = row_grad_step(table, cuda, operands)
    assert_same_state(got, wanted)
    n = len(classes)
    assert torch.equal(ours[:n].cpu(), classes)
    assert cuda.type == "cpu" or (ours[n:] == -1).all()
    assert not elements[n:].any()
    torch.testing.assert_close(elements[:n].cpu(), bias, rtol=1e-2, atol=1e-4)
    again, _ = row_grad_step(table, cuda, operands)
    assert torch.equal(again[0], got[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_agrees_with_the_cpu(dtype, cuda):
    """The bits are the same; a weight whose float32 value differs by a rounding may fall to its other neighbour."""
    table = Table(dtype, 300, seeded=True, rule=SGD)
    gradient = torch.randn(V, 300).to(dtype)
    got = row_step(table, cuda, None, gradient)[0].cpu()
    wanted = row_step(table, torch.device("cpu"), None, gradient)[0]
    assert (got != wanted).double().mean() < 1e-3


def test_classes_that_are_no_row_are_skipped(cuda):
    if cuda.type == "cpu":
        pytest.skip("the CPU refuses them")
    table = Table(torch.float32, 100, **RULES["AdamW"])
    gradient = torch.randn(5, 100)
    got = row_step(table, cuda, torch.tensor([-1, 3, V, 7, 2**40]), gradient)
    wanted = row_step(table, torch.device("cpu"), torch.tensor([3, 7]), gradient[[1, 3]])
    assert_same_state(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("with_rows", "with_bias"), [(True, True), (True, False), (False, True)])
def test_the_norm_agrees_with_the_cpu(with_rows, with_bias, dim, dtype, cuda):
    operands = pairs(dtype, dim)
    norm = torch.ops.nce_ext.row_grad_norm
    wanted = norm(*operands, V, with_rows, with_bias)
    got = norm(*(t.to(cuda) for t in operands), V, with_rows, with_bias)
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=0)
    assert torch.equal(got, norm(*(t.to(cuda) for t in operands), V, with_rows, with_bias))


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_racy_scatter_is_the_sum_of_all_pairs(with_bias, dim, hidden, cuda):
    operands = pairs(hidden, dim)
    rows, bias = torch.ops.nce_ext.row_grad_dense(*operands, V, torch.float32, True, True)
    weight = torch.zeros(V, dim, device=cuda)
    elements = torch.zeros(V, device=cuda) if with_bias else None
    torch.ops.nce_ext.scatter_step_(*(t.to(cuda) for t in operands), weight, elements, 0.5)
    torch.testing.assert_close(weight.cpu(), -0.5 * rows, rtol=1e-4, atol=1e-4)
    if elements is not None:
        torch.testing.assert_close(elements.cpu(), -0.5 * bias, rtol=1e-4, atol=1e-4)


def test_the_racy_scatter_refuses_all_but_float32(cuda):
    operands = [t.to(cuda) for t in pairs(torch.bfloat16, 8)]
    with pytest.raises(RuntimeError, match="weight must be Float, got BFloat16"):
        torch.ops.nce_ext.scatter_step_(*operands, torch.zeros(V, 8, device=cuda).bfloat16(), None, 0.5)


@pytest.mark.parametrize("rule", RULES)
def test_steps_in_a_graph(rule, cuda):
    """Nothing waits for the device, and a graph of a fused step and of a step replays them."""
    if cuda.type == "cpu":
        pytest.skip("needs CUDA graphs")
    table, operands = Table(torch.float32, 100, **RULES[rule]), [t.to(cuda) for t in pairs(torch.float32, 100)]
    gradient = torch.randn(V, 100, device=cuda)

    def both(weight: Tensor, state: list[Tensor | None]) -> Tensor:
        torch.ops.nce_ext.row_grad_step_(*operands, weight, *state, True, *table.numbers)
        torch.ops.nce_ext.row_step_(weight, None, gradient, *state, *table.numbers)
        return torch.ops.nce_ext.row_grad_norm(*operands, V, True, True)

    wanted = table.on(cuda)
    both(*wanted)
    total = both(*wanted)
    captured = table.on(cuda)
    warm_up = table.on(cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(*warm_up)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = both(*captured)
    graph.replay()
    graph.replay()
    assert torch.equal(captured[0], wanted[0])
    assert torch.equal(norm, total)
