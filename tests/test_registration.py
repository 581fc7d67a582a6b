"""Every operator under opcheck."""

from __future__ import annotations

import pytest
import torch

from nce_ext import noise as noises

pytestmark = pytest.mark.usefixtures("native")

V, D, B, T, K = 11, 6, 5, 2, 4
OBJECTIVE = {
    "objective": 0, "positive_weight": 1.0, "label_smoothing": 0.0, "temperature": 0.0, "correct_positive": True,
}  # fmt: skip
SOFTMAX, ADVERSARIAL = {"objective": 1, "label_smoothing": 0.1}, {"objective": 2, "temperature": 0.5}


def forward_arguments(**changes):
    """Positional arguments of sampled_loss by name, in the order of its schema."""
    noise = noises.Unigram(range(1, V + 1))
    arguments = {
        "hidden": torch.randn(B, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(V, (B, T)),
        "log_z": None,
        "seed": torch.tensor([1, 2]),
        "table": noise.table,
        "negatives": None,
        "target_log_q": None,
        "negative_log_q": None,
        "kind": noise.kind,
        "num_negatives": K,
        "subtract_log_q": True,
        "offset": 1.0,
        "remove_hits": False,
        "uniform_labels": False,
        "mean_candidates": False,
        "ignore_index": -100,
        **OBJECTIVE,
        "needs_hidden_grad": True,
        "needs_row_grad": True,
        "gradient_layout": 0,
    }
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


def shared_arguments(**changes):
    """Positional arguments of shared_loss by name, in the order of its schema."""
    arguments = {
        "hidden": torch.randn(B, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(V, (B, T)),
        "log_z": None,
        "negatives": torch.randint(V, (K,)),
        "target_log_q": -torch.rand(B, T),
        "negative_log_q": -torch.rand(K),
        "row_scale": None,
        "distinct": False,
        "offset": 1.0,
        "remove_hits": True,
        "uniform_labels": False,
        "mean_candidates": False,
        "ignore_index": -100,
        **OBJECTIVE,
        "needs_hidden_grad": True,
        "needs_row_grad": True,
        "gradient_layout": 0,
    }
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


def epilogue_arguments(**changes):
    """Positional arguments of shared_loss_ by name, in the order of its schema."""
    arguments = {
        "logits": torch.randn(B, K),
        "hidden": torch.randn(B, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(V, (B, T)),
        "target_log_q": -torch.rand(B, T),
        "log_z": None,
        "column_shift": torch.randn(K),
        "multiplicity": None,
        "hits": None,
        "row_scale": None,
        "offset": 1.0,
        "uniform_labels": False,
        "mean_candidates": False,
        "n_draws": K,
        "ignore_index": -100,
        **OBJECTIVE,
        "needs_derivatives": True,
        "needs_hidden_grad": True,
    }
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


def shared_row_arguments(reduced=True, layout=0, with_rows=True, with_bias=True, dtype=torch.float32):
    """Positional arguments of shared_row_grad, from a call of shared_loss."""
    arguments = shared_arguments(row_scale=torch.rand(B) if reduced else None)
    _, target_ids, target_dlogit, _, classes, rows, elements, dlogit, _ = torch.ops.nce_ext.shared_loss(*arguments)
    upstream = torch.randn(1 if reduced else B)
    return (
        target_ids, target_dlogit, upstream, arguments[0], classes, rows, elements, dlogit, V, dtype, with_rows,
        with_bias, layout,
    )  # fmt: skip


def leaf(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, dtype=dtype).requires_grad_()


def row_arguments(with_rows=True, with_bias=True, dtype=torch.float32, hidden_dtype=torch.float32, padded=()):
    ids = torch.randint(V, (B, T + K)).int()
    ids[0, 0] = -1
    return (
        ids, torch.randn(B, T + K), torch.randn(B), torch.randn(B, D).to(hidden_dtype), V, dtype, with_rows, with_bias,
        *padded,
    )  # fmt: skip


def test_every_operator_is_checked_here():
    names = {"simd_level", "sample", "alias_table", "sampled_loss", "row_grad", "row_grad_dense"}
    names |= {"shared_loss_", "shared_loss", "shared_row_grad"}
    names |= {"row_step_", "row_grad_step_", "row_grad_norm", "scatter_step_"}  # in test_row_step.py
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
    changes |= {"gradient_layout": layout, "row_scale": torch.rand(B) if reduced else None}
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
