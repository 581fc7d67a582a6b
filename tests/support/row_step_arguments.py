"""Arguments of the operators of steps on rows by name, small and valid."""

from __future__ import annotations

import torch
from optim_cases import F32, F64

ops = torch.ops.nce_ext
V, D, B, K = 11, 6, 5, 4
SEED = torch.tensor([1, 2])
SGD, ADAGRAD, ROWWISE, ADAM = range(4)
RULES = {"SGD": SGD, "SGD, momentum": SGD, "Adagrad": ADAGRAD, "row-wise Adagrad": ROWWISE, "Adam": ADAM}


def step_arguments(name="Adam", dtype=F32, n=V, dim=D, **changes):
    """Arguments of row_step_ by name, in the order of its schema; the state is that of a table stepped on before."""
    rule, compute = RULES[name], F64 if dtype == F64 else F32
    moments = [torch.randn(n, dim, dtype=compute), torch.rand(n, dim, dtype=compute)]
    touched = torch.arange(0, n, 3)
    arguments = {
        "weight": torch.randn(n, dim).to(dtype),
        "classes": touched,
        "gradient": torch.randn(len(touched), dim).to(dtype),
        "first": moments[0] if name in ("SGD, momentum", "Adam") else None,
        "second": moments[1] if rule in (ADAGRAD, ADAM) else torch.rand(n, dtype=compute) if rule == ROWWISE else None,
        "row_steps": torch.randint(4, (n,)).int() if name in ("SGD, momentum", "Adam") else None,
        "decayed": -torch.rand(n, dtype=F64) if rule == ADAM else None,
        "master": None,
        "gradient_scale": None,
        "seed": None,
        "rule": rule,
        "step": 7,
        "rate": 0.3,
        "weight_decay": 0.0 if rule == ADAM else 0.1,
        "log_decay": -1.5,
        "momentum": 0.7,
        "dampening": 0.6,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-3,
        "nesterov": False,
        "maximize": False,
    }
    assert set(changes) <= set(arguments), changes
    return {**arguments, **changes}


def copied(arguments: dict) -> dict:
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in arguments.items()}


def pair_arguments(batch=B, columns=K, n=V, dim=D, hidden=F32, repeated=True):
    """ids, dlogit, grad_loss, hidden; some of the ids are none."""
    compute = F64 if hidden == F64 else F32
    ids = torch.randint(n, (batch, columns)) if repeated else torch.randperm(n)[: batch * columns].view(batch, columns)
    ids.view(-1)[::7] = -1
    return (
        ids.int(), torch.randn(batch, columns, dtype=compute), torch.randn(batch, dtype=compute),
        torch.randn(batch, dim, dtype=compute).to(hidden),
    )  # fmt: skip


def fused_step(pairs, arguments: dict, with_bias: bool = True):
    rest = [value for key, value in arguments.items() if key not in ("classes", "gradient", "weight")]
    return ops.row_grad_step_(*pairs, arguments["weight"], *rest[:7], with_bias, *rest[7:])
