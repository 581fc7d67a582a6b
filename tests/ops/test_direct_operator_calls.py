"""Direct calls of the operators with bad tensors: an error that names the argument, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import operator_arguments
import pytest
import torch
from operator_arguments import B, T, V, forward_arguments

from nce_ext import noise as noises

pytestmark = pytest.mark.usefixtures("native")

# Direct calls with bad tensors. One process for all: a crash shows as its exit status.
PRELUDE = """
import sys, torch, nce_ext
sys.path.insert(0, {support!r})
from operator_arguments import B, D, K, T, V, epilogue_arguments, forward_arguments, row_arguments, shared_arguments
ops = torch.ops.nce_ext
f32, f64, i64, i32 = torch.float32, torch.float64, torch.int64, torch.int32
noise = nce_ext.noise.Unigram(range(1, V + 1))
def aliases(value):
    table = noise.table.clone()
    table[:, 0], table[:, 1] = 0, value
    return table
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
    "sample(table=aliases(V))",
    "sample(table=aliases(-1))",
    "sample(table=aliases(2**31 - 1), rows=10000, cols=40)",
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
    "forward(table=aliases(V))",
    "forward(table=aliases(-1))",
    "forward(table=aliases(2**31 - 1))",
    "forward(table=aliases(-2**31), subtract_log_q=False)",
    "forward(table=aliases(V), remove_hits=True)",
    "forward(table=aliases(V), objective=1)",
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
    "epilogue(accidental_hits=torch.zeros(B, T, dtype=i32))",
    "epilogue(example_weight=torch.zeros(B, 1))",
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
    body = PRELUDE.format(support=os.path.dirname(operator_arguments.__file__)) + textwrap.dedent(
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
