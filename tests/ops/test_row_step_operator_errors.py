"""Refusals of the operators of steps on rows: an error that names the argument, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from optim_cases import BF16, F32, F64, assert_same
from row_step_arguments import SEED, B, D, K, V, copied, fused_step, ops, pair_arguments, step_arguments

pytestmark = pytest.mark.usefixtures("native")

i64, i32 = torch.int64, torch.int32
CLASSES = r"classes must ascend, each once, within 0 \.\. 10, got"

# name -> rule and type of the table, changes, message.
OF_STEPS = {
    "rule above": (("Adam", F32), {"rule": 4}, r"rule must be 0, 1, 2 or 3, got 4"),
    "rule below": (("Adam", F32), {"rule": -1}, r"rule must be 0, 1, 2 or 3, got -1"),
    "step": (("Adam", F32), {"row_steps": None, "step": 0}, r"step must be >= 1, got 0"),
    "weight of integers": (("SGD", F32), {"weight": torch.zeros(V, D, dtype=i64)}, r"weight must be float32, bf"),
    "weight 3-D": (("SGD", F32), {"weight": torch.zeros(V, D, 1)}, r"weight must be 2-D, got shape \[11, 6, 1\]"),
    "weight transposed": (("SGD", F32), {"weight": torch.zeros(D, V).T}, r"weight must have stride 1 in its last"),
    "weight expanded": (
        ("SGD", F32), {"weight": torch.zeros(1, D).expand(V, D)}, r"weight must have rows that do not overlap",
    ),
    "Adam without first": (("Adam", F32), {"first": None}, r"first and second must be given with rule 3"),
    "Adam without second": (("Adam", F32), {"second": None}, r"first and second must be given with rule 3"),
    "Adagrad without second": (("Adagrad", F32), {"second": None}, r"second must be given with rule 1"),
    "row-wise without second": (("row-wise Adagrad", F32), {"second": None}, r"second must be given with rule 2"),
    "Adagrad with first": (("Adagrad", F32), {"first": torch.zeros(V, D)}, r"first must be None with this rule"),
    "SGD with second": (("SGD", F32), {"second": torch.zeros(V, D)}, r"second must be None with this rule"),
    "first too small": (("Adam", F32), {"first": torch.zeros(V - 1, D)}, r"first must have shape \[11, 6\], got \[10"),
    "first too narrow": (("Adam", BF16), {"first": torch.zeros(V, D).to(BF16)}, r"first must be Float, got BFloat16"),
    "first transposed": (("Adam", F32), {"first": torch.zeros(D, V).T}, r"first must be contiguous"),
    "second of float32": (("Adagrad", F64), {"second": torch.zeros(V, D)}, r"second must be Double, got Float"),
    "second of rows": (("Adagrad", F32), {"second": torch.zeros(V)}, r"second must have shape \[11, 6\], got \[11\]"),
    "second of elements": (
        ("row-wise Adagrad", F32), {"second": torch.zeros(V, D)}, r"second must have shape \[11\], got \[11, 6\]",
    ),
    "row_steps long": (("Adam", F32), {"row_steps": torch.zeros(V, dtype=i64)}, r"row_steps must be Int, got Long"),
    "row_steps short": (("Adam", F32), {"row_steps": torch.zeros(3, dtype=i32)}, r"row_steps must have shape \[11\]"),
    "decayed of float32": (("Adam", F32), {"decayed": torch.zeros(V)}, r"decayed must be Double, got Float"),
    "decayed short": (("Adam", F32), {"decayed": torch.zeros(3, dtype=F64)}, r"decayed must have shape \[11\], got"),
    "master of float32": (("SGD", F32), {"master": torch.zeros(V, D)}, r"master must be None but for a 16-bit weight"),
    "master short": (("SGD", BF16), {"master": torch.zeros(3, D)}, r"master must have shape \[11, 6\], got \[3, 6\]"),
    "master narrow": (("SGD", BF16), {"master": torch.zeros(V, D).to(BF16)}, r"master must be Float, got BFloat16"),
    "scale of two": (("SGD", F32), {"gradient_scale": torch.ones(2)}, r"gradient_scale must have one element, got sh"),
    "scale of float64": (
        ("SGD", F32), {"gradient_scale": torch.ones(1, dtype=F64)}, r"gradient_scale must be Float, got Double",
    ),
    "seed of float32": (("SGD", F32), {"seed": SEED}, r"seed must be None but for a 16-bit weight"),
    "seed of floats": (("SGD", BF16), {"seed": torch.zeros(2)}, r"seed must"),
    "seed of three": (("SGD", BF16), {"seed": torch.zeros(3, dtype=i64)}, r"seed must"),
}  # fmt: skip
OF_GRADIENTS = {
    "of another type": ({"gradient": torch.zeros(4, D, dtype=F64)}, r"gradient must be Float, got Double"),
    "too few rows": ({"gradient": torch.zeros(3, D)}, r"gradient must have shape \[4, 6\], got \[3, 6\]"),
    "too long rows": ({"gradient": torch.zeros(4, D + 1)}, r"gradient must have shape \[4, 6\], got \[4, 7\]"),
    "one-dimensional": ({"gradient": torch.zeros(4)}, r"gradient must be 2-D, got shape \[4\]"),
    "transposed": ({"gradient": torch.zeros(D, 4).T}, r"gradient must have stride 1 in its last dimension"),
    "not of all rows": ({"classes": None}, r"gradient must have shape \[11, 6\], got \[4, 6\]"),
    "classes int32": ({"classes": torch.arange(4).int()}, r"classes must be Long, got Int"),
    "classes 2-D": ({"classes": torch.arange(4)[:, None]}, r"classes must be 1-D and contiguous, got \[4, 1\]"),
    "classes strided": ({"classes": torch.arange(8)[::2]}, r"classes must be 1-D and contiguous, got \[4\]"),
    "classes descend": ({"classes": torch.tensor([0, 2, 1, 3])}, CLASSES + " 1 at 2"),
    "classes repeat": ({"classes": torch.tensor([0, 2, 2, 3])}, CLASSES + " 2 at 2"),
    "class above": ({"classes": torch.tensor([0, 2, 4, 11])}, CLASSES + " 11 at 3"),
    "class below": ({"classes": torch.tensor([-1, 2, 4, 5])}, CLASSES + " -1 at 0"),
}
OF_PAIRS = {
    "ids long": (0, torch.zeros(B, K, dtype=i64), r"ids must be Int, got Long"),
    "ids 1-D": (0, torch.zeros(B, dtype=i32), r"ids must be 2-D and contiguous, got \[5\]"),
    "id above": (0, torch.full((B, K), V, dtype=i32), r"ids must be below 11"),
    "one id above": (0, torch.arange(V - B * K + 1, V + 1, dtype=i32).view(B, K), r"ids must be below 11"),
    "dlogit of float64": (1, torch.zeros(B, K, dtype=F64), r"dlogit must be Float, got Double"),
    "dlogit too wide": (1, torch.zeros(B, K + 1), r"dlogit must have shape \[5, 4\], got \[5, 5\]"),
    "grad_loss": (2, torch.zeros(B + 1), r"grad_loss must have shape \[5\], got \[6\]"),
    "hidden too narrow": (3, torch.zeros(B, D - 1), r"hidden must have 6 columns, got 5"),
    "hidden too short": (3, torch.zeros(B - 1, D), r"hidden must have 5 rows, got 4"),
    "hidden transposed": (3, torch.zeros(D, B).T, r"hidden must have stride 1 in its last dimension"),
}


def refused(call, arguments: dict, message: str) -> None:
    before = copied(arguments)
    with pytest.raises(RuntimeError, match=message):
        call()
    assert_same(arguments, before)


@pytest.mark.parametrize("name", OF_STEPS)
def test_refusals_of_steps(name):
    (rule, dtype), changes, message = OF_STEPS[name]
    arguments = step_arguments(rule, dtype, **changes)
    refused(lambda: ops.row_step_(*arguments.values()), arguments, message)
    refused(lambda: fused_step(pair_arguments(hidden=F64 if dtype == F64 else F32), arguments), arguments, message)


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_refusals_of_gradients(name):
    changes, message = OF_GRADIENTS[name]
    arguments = step_arguments(**changes)
    refused(lambda: ops.row_step_(*arguments.values()), arguments, message)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_refusals_of_pairs(name):
    at, value, message = OF_PAIRS[name]
    pairs = list(pair_arguments())
    pairs[at] = value
    arguments = step_arguments()
    refused(lambda: fused_step(pairs, arguments), arguments, message)
    bias = torch.randn(V)
    both = {"weight": arguments["weight"], "bias": bias}
    refused(lambda: ops.scatter_step_(*pairs, *both.values(), 0.1), both, message)
    if name != "hidden too narrow":
        refused(lambda: ops.row_grad_norm(*pairs, V, True, True), {}, message)


def test_tables_and_pairs_of_different_types():
    arguments = step_arguments(dtype=F64)
    refused(lambda: fused_step(pair_arguments(), arguments), arguments, r"must both be float64 or neither")
    for weight, bias, message in (
        (torch.zeros(V, D, dtype=F64), None, r"weight must be Float, got Double"),
        (torch.zeros(V, D).to(BF16), None, r"weight must be Float, got BFloat16"),
        (torch.zeros(D, V).T, None, r"weight must have stride 1 in its last dimension"),
        (torch.zeros(V, D), torch.zeros(V - 1), r"bias must have shape \[11\], got \[10\]"),
        (torch.zeros(V, D), torch.zeros(V, dtype=F64), r"bias must be Float, got Double"),
        (torch.zeros(V, D), torch.zeros(2 * V)[::2], r"bias must be contiguous"),
    ):
        tables = {"weight": weight, "bias": bias}
        refused(lambda t=tables: ops.scatter_step_(*pair_arguments(), *t.values(), 0.1), tables, message)


def test_an_id_out_of_range_beside_valid_ones():
    pairs = pair_arguments()
    pairs[0][0, 0], pairs[0][4, 3] = 3, V
    arguments = step_arguments()
    refused(lambda: fused_step(pairs, arguments), arguments, r"ids must be")
    weight = {"weight": torch.randn(V, D)}
    refused(lambda: ops.scatter_step_(*pairs, weight["weight"], None, 0.1), weight, r"ids must be")
