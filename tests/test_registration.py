"""Every operator under opcheck, and direct calls with bad tensors: an error, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

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
    names.add("scatter_sgd_")  # only CUDA has it: test_cuda.py
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


# Direct calls with bad tensors. One process for all: a crash shows as its exit status.
PRELUDE = """
import sys, torch, nce_ext
sys.path.insert(0, {tests!r})
from test_registration import B, D, K, T, V, epilogue_arguments, forward_arguments, row_arguments, shared_arguments
ops = torch.ops.nce_ext
f32, f64, i64, i32 = torch.float32, torch.float64, torch.int64, torch.int32
noise = nce_ext.noise.Unigram(range(1, V + 1))
def sample(seed=torch.tensor([1, 2]), table=noise.table, kind=2, n=V, rows=3, cols=2):
    return ops.sample(seed, table, kind, n, rows, cols)
def forward(**changes):
    return ops.sampled_loss(*forward_arguments(**changes))
def epilogue(**changes):
    return ops.shared_loss_(*epilogue_arguments(**changes))
def shared(**changes):
    return ops.shared_loss(*shared_arguments(**changes))
def rows(at=None, value=None, operator=ops.row_grad):
    arguments = list(row_arguments(padded=() if operator is ops.row_grad_dense else (False,)))
    if at is not None:
        arguments[at] = value
    return operator(*arguments)
def alias(weights, scale=2.0**32):
    return ops.alias_table(weights, scale)
"""

BAD_CALLS = [
    "sample(seed=torch.zeros(2))",
    "sample(seed=torch.zeros(3, dtype=i64))",
    "sample(seed=torch.zeros((), dtype=i64))",
    "sample(table=noise.table[:5])",
    "sample(table=noise.table[:, :3])",
    "sample(table=noise.table.long())",
    "sample(table=noise.table.t().contiguous().t())",
    "sample(kind=3)",
    "sample(kind=-1)",
    "sample(n=0)",
    "sample(n=2**31)",
    "sample(rows=-1)",
    "sample(cols=-1)",
    "sample(rows=2**33, cols=2**33)",
    "alias(torch.rand(5))",
    "alias(torch.rand(5, 2, dtype=f64))",
    "alias(torch.empty(0, dtype=f64))",
    "forward(hidden=torch.randn(B, D, dtype=f64))",
    "forward(hidden=torch.randn(B, D + 1))",
    "forward(hidden=torch.randn(D))",
    "forward(hidden=torch.randn(D, B).t())",
    "forward(hidden=torch.zeros(B, D, dtype=i64))",
    "forward(weight=torch.randn(D, V).t())",
    "forward(weight=torch.randn(V * D))",
    "forward(weight=torch.randn(V, D).to_sparse())",
    "forward(weight=torch.empty(0, D))",
    "forward(weight=torch.randn(V + 1, D))",
    "forward(bias=torch.randn(V - 1))",
    "forward(bias=torch.randn(V, dtype=f64))",
    "forward(bias=torch.randn(V, 1))",
    "forward(target=torch.zeros(B, T, dtype=i32))",
    "forward(target=torch.zeros(B - 1, T, dtype=i64))",
    "forward(target=torch.zeros(B, dtype=i64))",
    "forward(target=torch.full((B, T), V))",
    "forward(target=torch.full((B, T), -1))",
    "forward(target=torch.full((B, T), 2**40))",
    "forward(log_z=torch.zeros(B + 1))",
    "forward(log_z=torch.zeros(B, dtype=f64))",
    "forward(seed=None)",
    "forward(seed=torch.zeros(1, dtype=i64))",
    "forward(table=noise.table[:-1])",
    "forward(kind=7)",
    "forward(negatives=torch.full((B, K), V))",
    "forward(negatives=torch.full((B, K), -1))",
    "forward(negatives=torch.full((B, K), -100))",
    "forward(negatives=torch.zeros(B, K + 1, dtype=i64))",
    "forward(negatives=torch.zeros(K, dtype=i64))",
    "forward(negatives=torch.zeros(2, K, dtype=i64))",
    "forward(negatives=torch.zeros(B, K))",
    "forward(negative_log_q=torch.zeros(B, K))",
    "forward(negatives=torch.zeros(B, K, dtype=i64), negative_log_q=torch.zeros(B, K, dtype=f64))",
    "forward(negatives=torch.zeros(B, K, dtype=i64), negative_log_q=torch.zeros(B, K - 1))",
    "forward(target_log_q=torch.zeros(B, T + 1))",
    "forward(target_log_q=torch.zeros(B, T, dtype=f64))",
    "forward(num_negatives=-1)",
    "forward(num_negatives=2**40)",
    "forward(objective=3)",
    "forward(objective=-1)",
    "forward(objective=1, mean_candidates=True)",
    "forward(objective=1, label_smoothing=1.5)",
    "forward(objective=2, temperature=-1.0)",
    "forward(correct_positive=False)",
    "forward(objective=1, correct_positive=False)",
    "epilogue(logits=torch.randn(B, K, dtype=f64))",
    "epilogue(logits=torch.randn(B - 1, K))",
    "epilogue(logits=torch.randn(K, B).t())",
    "epilogue(logits=torch.randn(1, K).expand(B, K))",
    "epilogue(hidden=torch.randn(B, D + 1))",
    "epilogue(weight=torch.randn(D, V).t())",
    "epilogue(bias=torch.randn(V - 1))",
    "epilogue(target=torch.full((B, T), V))",
    "epilogue(target=torch.full((B, T), -1))",
    "epilogue(target=torch.zeros(B, T, dtype=i32))",
    "epilogue(target_log_q=torch.full((B, T), float('nan')))",
    "epilogue(target_log_q=torch.zeros(B, T + 1))",
    "epilogue(log_z=torch.zeros(B + 1))",
    "epilogue(column_shift=torch.zeros(K + 1))",
    "epilogue(multiplicity=torch.zeros(K, dtype=i64))",
    "epilogue(hits=torch.zeros(B, T, dtype=i32))",
    "epilogue(row_scale=torch.zeros(B, 1))",
    "epilogue(n_draws=-1)",
    "epilogue(objective=1, correct_positive=False)",
    "shared(negatives=torch.full((K,), V))",
    "shared(negatives=torch.full((K,), -1))",
    "shared(target=torch.full((B, T), V))",
    "rows(0, torch.zeros(B, T + K, dtype=i64))",
    "rows(0, torch.full((B, T + K), V, dtype=i32))",
    "rows(0, torch.zeros(B * (T + K), dtype=i32))",
    "rows(1, torch.zeros(B, T + K - 1))",
    "rows(1, torch.zeros(B, T + K, dtype=f64))",
    "rows(2, torch.zeros(B + 1))",
    "rows(2, torch.zeros(()))",
    "rows(2, torch.zeros(B, dtype=f64))",
    "rows(3, torch.zeros(B + 1, D))",
    "rows(3, torch.zeros(B, D, dtype=f64))",
    "rows(3, torch.zeros(D, B).t())",
    "rows(4, 0)",
    "rows(4, -1)",
    "rows(4, 2**31)",
    "rows(5, i64)",
    "rows(5, f64)",
    "rows(0, torch.full((B, T + K), V, dtype=i32), ops.row_grad_dense)",
]

# What has a meaning, odd as it looks: the call must return.
ODD_CALLS = [
    "sample(rows=0, cols=2**20)",
    "forward(num_negatives=0)",
    "forward(target=torch.full((B, T), -100))",
    "forward(target=torch.empty((B, 0), dtype=i64))",
    "forward(hidden=torch.randn(0, D), target=torch.empty((0, T), dtype=i64))",
    "forward(hidden=torch.randn(B, 0), weight=torch.randn(V, 0))",
    "rows(0, torch.full((B, T + K), -1, dtype=i32))",
    "rows(0, torch.full((B, T + K), -7, dtype=i32))",
    "rows(0, torch.full((B, T + K), -2**31, dtype=i32), ops.row_grad_dense)",
    "rows(3, torch.zeros(B, 0))",
    "epilogue(target=torch.full((B, T), -100))",
    "epilogue(logits=torch.randn(B, 0), column_shift=torch.zeros(0))",
    "shared(negatives=torch.empty((0,), dtype=i64), negative_log_q=torch.empty(0))",
    "shared(hidden=torch.randn(0, D), target=torch.empty((0, T), dtype=i64), target_log_q=torch.empty(0, T))",
]


def run_calls(calls: list[str], expect: str) -> dict[str, str]:
    """The outcome of each call in a fresh process: 'returned', or the name of the exception and its message."""
    body = PRELUDE.format(tests=os.path.dirname(__file__)) + textwrap.dedent(
        """
        for call in sys.stdin.read().splitlines():
            try:
                eval(call)
                outcome = "returned"
            except Exception as error:
                outcome = type(error).__name__ + ": " + str(error).splitlines()[0]
            print(call, outcome, sep="\\t", flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", body], input="\n".join(calls), text=True, capture_output=True)
    outcomes = dict(line.split("\t") for line in done.stdout.splitlines())
    assert done.returncode == 0, f"{calls[len(outcomes)]} ended the process: {done.returncode}\n{done.stderr[-2000:]}"
    return {call: outcome for call, outcome in outcomes.items() if not outcome.startswith(expect)}


def test_bad_tensors_raise_and_never_crash():
    # torch itself refuses some, before a kernel is reached, with its own exceptions.
    wrong = run_calls(BAD_CALLS, expect=("RuntimeError", "NotImplementedError"))
    assert not wrong, wrong


def test_odd_calls_return():
    wrong = run_calls(ODD_CALLS, expect="returned")
    assert not wrong, wrong


def test_messages_name_the_argument():
    sampled_loss, sample = torch.ops.nce_ext.sampled_loss, torch.ops.nce_ext.sample
    with pytest.raises(RuntimeError, match=r"bias must have shape \[11\], got \[10\]"):
        sampled_loss(*forward_arguments(bias=torch.randn(V - 1)))
    with pytest.raises(RuntimeError, match=r"target must be in 0 \.\. 10, got 11"):
        sampled_loss(*forward_arguments(target=torch.full((B, T), V)))
    with pytest.raises(RuntimeError, match=r"seed must be Long, got Float"):
        sample(torch.zeros(2), noises.Uniform(V).table, 0, V, 1, 1)
