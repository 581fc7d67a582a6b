"""Every collective on real ranks, and the messages that stop all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torchrun import report

from nce_ext.distributed.collectives import Collectives

FLOATS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def own(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(6.0).view(6, 1) * torch.tensor([1.0, -2.0]) + 10 * rank).to(dtype)


def values(c: Collectives) -> dict[str, Any]:
    told: dict[str, Any] = {"sizes": c.sizes(3 * c.rank)}
    parts = [2, 0, 4, 1][: c.size]
    for name, dtype in FLOATS.items():
        t = own(c.rank, dtype)
        kept = t.clone()
        total = torch.cat([t, t])[: sum(parts)]
        told[name] = {
            "even": c.all_gather(t, [6] * c.size).tolist(),
            "uneven": c.all_gather(t[: parts[c.rank]], parts).tolist(),
            "strided": c.all_gather(t.T, [2] * c.size).tolist(),
            "sum": c.all_reduce(t).tolist(),
            "max": c.all_reduce(t, "max").tolist(),
            "scattered": c.reduce_scatter(total, parts).tolist(),
            "kept": torch.equal(t, kept),
        }
    told["integers"] = c.all_gather(torch.full((c.rank, 1), c.rank), list(range(c.size))).tolist()
    told["booleans"] = c.all_gather(torch.tensor([c.rank == 1]), [1] * c.size).tolist()
    told["nothing"] = list(c.all_gather(torch.zeros(0, 3), [0] * c.size).shape)
    told["nothing scattered"] = list(c.reduce_scatter(torch.zeros(0, 3), [0] * c.size).shape)
    told["nothing wide"] = list(c.all_gather(torch.zeros(2, 0), [2] * c.size).shape)
    generator = torch.Generator().manual_seed(100 + c.rank)
    told["seed"] = c.broadcast_seed(generator).tolist()
    told["drawn"] = torch.randint(1000, (1,), generator=generator).item()
    torch.manual_seed(c.rank)
    told["seed of torch"] = c.broadcast_seed().tolist()
    return told


def costs(c: Collectives) -> dict[str, int]:
    """Bytes that this rank sends."""
    t = torch.zeros(6, 5)
    calls: dict[str, Callable[[], Any]] = {
        "agree": lambda: c.agree(n=1),
        "long agree": lambda: c.agree(text="x" * 600),
        "all_gather": lambda: c.all_gather(t, [6] * c.size),
        "uneven all_gather": lambda: c.all_gather(t[: 2 * c.rank], [2 * rank for rank in range(c.size)]),
        "all_reduce": lambda: c.all_reduce(t),
        "reduce_scatter": lambda: c.reduce_scatter(
            t, [1, 2, 3, 0][: c.size] if c.size == 3 else [6 // c.size] * c.size
        ),
        "seed": c.broadcast_seed,
    }
    told = {}
    for name, call in calls.items():
        before = c.sent_bytes
        call()
        told[name] = c.sent_bytes - before
    return told


def told_by(action: Callable[[], Any]) -> str:
    try:
        return f"no error, but {action()}"
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def disagreements(c: Collectives) -> dict[str, str]:
    def refusing(rank: int, error: Exception) -> None:
        with c.step():
            if c.rank >= rank:
                raise error
            c.agree(n=1)

    def nested() -> None:
        with c.step():
            c.agree(n=1)
            with c.step():
                c.all_reduce(torch.ones(1))

    def without_agreeing() -> None:
        with c.step():
            c.all_reduce(torch.ones(1))

    def agreed() -> torch.Tensor:
        with c.step(agreed=True):
            return c.all_reduce(torch.ones(1)).item()

    told = {
        "number": told_by(lambda: c.agree(d=3, n_classes=100 + (c.rank == 2))),
        "text": told_by(lambda: c.agree(dtype="float32" if c.rank else "float64")),
        "shape": told_by(lambda: c.agree(weight=(3, 4 + c.rank))),
        "long": told_by(lambda: c.agree(text="y" * 600 + str(c.rank == 1)))[-60:],
        "missing": told_by(lambda: c.agree(**({} if c.rank == 1 else {"seed": 5}))),
        "the first": told_by(lambda: c.sizes(1, a=c.rank, b=c.rank)),
        "call": told_by(lambda: c.agree() if c.rank == 0 else c.sizes(1)),
        "one refuses": told_by(lambda: refusing(2, TypeError("hidden must be dense"))),
        "two refuse": told_by(lambda: refusing(1, ValueError(f"ids of rank {c.rank}"))),
        "not agreed": told_by(without_agreeing),
        "nested": told_by(nested),
        "agreed": told_by(agreed),
        "no group": told_by(lambda: Collectives("world")),
        "alike": told_by(lambda: c.agree(n_classes=100, dtype="float32", weight=(3, 4))),
    }
    others = dist.new_group([1, 2])
    told["not a member"] = told_by(lambda: Collectives(others).rank)
    return told


dist.init_process_group("gloo")
collectives = Collectives()
report({
    "values": values(collectives),
    "costs": costs(collectives),
    "disagreements": disagreements(collectives),
    "alone": values(Collectives([dist.new_group([rank]) for rank in range(3)][dist.get_rank()])),
})  # fmt: skip
dist.destroy_process_group()
