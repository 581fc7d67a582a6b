"""Every operator under opcheck."""

from __future__ import annotations

import pytest
import torch
from operator_arguments import (
    ADVERSARIAL,
    SOFTMAX,
    B,
    D,
    K,
    T,
    V,
    epilogue_arguments,
    forward_arguments,
    leaf,
    row_arguments,
    shared_arguments,
    shared_row_arguments,
)

from nce_ext import noise as noises

pytestmark = pytest.mark.usefixtures("native")


def test_every_operator_is_checked_here():
    names = {"simd_level", "sample", "alias_table", "sampled_loss", "row_grad", "row_grad_dense"}
    names |= {"shared_loss_", "shared_loss", "shared_row_grad"}
    names |= {"row_step_", "row_grad_step_", "row_grad_norm", "scatter_step_"}  # in test_row_step_operators.py
    schemas = {
        s.name.removeprefix("nce_ext::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("nce_ext::")
    }
    assert schemas == names


@pytest.mark.parametrize("noise", [noises.Uniform(V), noises.LogUniform(V), noises.Unigram(range(1, V + 1))])
@pytest.mark.parametrize("size", [(3, 5), (0, 4), (4, 0), (1, 1)])
def test_opcheck_sample(noise, size):
    arguments = (torch.tensor([1, 2]), noise.table, noise.kind, V, *size)
    torch.library.opcheck(torch.ops.nce_ext.sample.default, arguments)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_opcheck_alias_table(n):
    weights = torch.rand(n, dtype=torch.float64)
    torch.library.opcheck(torch.ops.nce_ext.alias_table.default, (weights, n * 2.0**32 / float(weights.sum())))


CASES = {
    "drawn": {},
    "no bias": {"bias": None},
    "learned log_z": {"log_z": lambda: leaf(B)},
    "given negatives": {"seed": None, "negatives": lambda: torch.randint(V, (B, K))},
    "shared negatives, given log q": {
        "negatives": lambda: torch.randint(V, (1, K)),
        "target_log_q": lambda: -torch.rand(B, T),
        "negative_log_q": lambda: -torch.rand(1, K),
    },
    "all switches": {"remove_hits": True, "uniform_labels": True, "mean_candidates": True, "subtract_log_q": False},
    "no negatives": {"num_negatives": 0},
    "softmax": SOFTMAX,
    "adversarial": ADVERSARIAL,
    "uniform noise": {"kind": 0, "table": lambda: torch.empty((0, 4), dtype=torch.int32)},
}


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_sampled_loss(name, layout):
    changes = {key: value() if callable(value) else value for key, value in CASES[name].items()}
    tensors = {"hidden": leaf(B, D), "weight": leaf(V, D), "bias": leaf(V)}
    arguments = forward_arguments(**{**tensors, "gradient_layout": layout, **changes})
    # aot_dispatch compares eager and traced gradients with allclose, which sparse tensors do not have.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        torch.ops.nce_ext.sampled_loss.default, arguments,
        test_utils=tests if layout else [*tests, "test_aot_dispatch_dynamic"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float64)],
)
def test_opcheck_sampled_loss_of_mixed_storage(hidden, weight):
    arguments = forward_arguments(
        hidden=leaf(B, D, dtype=hidden), weight=leaf(V, D, dtype=weight), bias=leaf(V, dtype=weight)
    )
    torch.library.opcheck(torch.ops.nce_ext.sampled_loss.default, arguments)


@pytest.mark.parametrize("needs_hidden_grad", [False, True])
@pytest.mark.parametrize("needs_row_grad", [False, True])
def test_opcheck_sampled_loss_of_frozen_tensors(needs_hidden_grad, needs_row_grad):
    arguments = forward_arguments(needs_hidden_grad=needs_hidden_grad, needs_row_grad=needs_row_grad)
    torch.library.opcheck(torch.ops.nce_ext.sampled_loss.default, arguments)


@pytest.mark.parametrize(
    ("operator", "padded"), [("row_grad", (False,)), ("row_grad", (True,)), ("row_grad_dense", ())]
)
@pytest.mark.parametrize(("with_rows", "with_bias"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_row_gradients(operator, padded, with_rows, with_bias, dtype):
    arguments = row_arguments(with_rows, with_bias, dtype, torch.bfloat16, padded)
    torch.library.opcheck(getattr(torch.ops.nce_ext, operator).default, arguments)


SHARED_CASES = {
    "binary": {},
    "softmax": SOFTMAX,
    "adversarial": ADVERSARIAL,
    "no bias, no correction": {"bias": None, "target_log_q": None, "negative_log_q": None},
    "learned log_z": {"log_z": lambda: leaf(B)},
    "distinct": {"distinct": True},
}


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", SHARED_CASES)
def test_opcheck_shared_loss(name, reduced, layout):
    changes = {key: value() if callable(value) else value for key, value in SHARED_CASES[name].items()}
    changes |= {"gradient_layout": layout, "example_weight": torch.rand(B) if reduced else None}
    arguments = shared_arguments(**{"hidden": leaf(B, D), "weight": leaf(V, D), **changes})
    torch.library.opcheck(
        torch.ops.nce_ext.shared_loss.default, arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        + (("test_aot_dispatch_dynamic",) if layout == 0 else ()),
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, SOFTMAX, ADVERSARIAL, {"needs_derivatives": False}, {"needs_hidden_grad": False}]
)
def test_opcheck_shared_loss_epilogue(changes):
    torch.library.opcheck(torch.ops.nce_ext.shared_loss_.default, epilogue_arguments(**changes))


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("with_rows", "with_bias"), [(True, True), (True, False), (False, True)])
def test_opcheck_shared_row_grad(reduced, layout, with_rows, with_bias):
    arguments = shared_row_arguments(reduced, layout, with_rows, with_bias, torch.bfloat16)
    torch.library.opcheck(torch.ops.nce_ext.shared_row_grad.default, arguments)
