"""Steps in which rank 1 fails, in the ways that the arguments name, each on a group of its own; "dies" is the last."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchrun import report

from nce_ext.contrastive import InfoNCELoss
from nce_ext.distributed.collectives import Collectives
from nce_ext.distributed.gathered import GatheredLoss, gather

TIMEOUT = 4.0  # where it has to pass


def told_by(action: Callable[[], Any]) -> str:
    try:
        return f"no error, but {action()}"
    except (RuntimeError, ValueError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"


class Training:
    """One layer before a gathered loss, and plain SGD."""

    def __init__(self, group: dist.ProcessGroup, **options: Any) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 4)
        self.loss_fn: GatheredLoss = gather(InfoNCELoss(0.5, symmetric=True, learn_temperature=True, **options), group)
        self.parameters = [*self.layer.parameters(), *self.loss_fn.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss_fn(torch.tanh(self.layer(torch.randn(2, 3))), torch.randn(2, 4)).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def fail_in(training: Training, name: str, failure: Callable[[], Any]) -> None:
    """The next collective of that name fails on this rank before it is sent."""
    setattr(training.loss_fn.collectives, name, lambda *_: failure())


def out_of_memory() -> None:
    raise MemoryError("not enough memory")


class LostStore:
    """What a store is to its clients once the process that hosts it has died."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("broken pipe")


def scenario(
    group: dist.ProcessGroup, failure: Callable[[Training], Any], *, with_store: bool = True, **options: Any
) -> dict[str, Any]:
    training = Training(group, **options)
    training.step()
    if not with_store:
        training.loss_fn.collectives._link.store = LostStore()
    before = [p.detach().clone() for p in training.parameters]
    dist.barrier()
    start = time.monotonic()
    if dist.get_rank() == 1:
        failure(training)
    told: dict[str, Any] = {"error": told_by(training.step), "seconds": time.monotonic() - start}
    told["unchanged"] = all(map(torch.equal, before, training.parameters))
    told["later"] = told_by(training.step)
    told["anew"] = told_by(lambda: Collectives(group))
    return told


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the survivors, who have something to say
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    short = timedelta(seconds=TIMEOUT)

    def absent() -> dict[str, Any] | None:
        group, start = dist.new_group(timeout=short), time.monotonic()
        if dist.get_rank() == 1:
            return None
        return {"error": told_by(lambda: Collectives(group)), "seconds": time.monotonic() - start}

    ways: dict[str, Callable[[], Any]] = {
        "raises": lambda: scenario(dist.new_group(), lambda t: fail_in(t, "all_gather", out_of_memory)),
        "raises in backward": lambda: scenario(
            dist.new_group(), lambda t: fail_in(t, "reduce_scatter", out_of_memory), reduction="none"
        ),
        "store lost": lambda: scenario(
            dist.new_group(), lambda t: fail_in(t, "all_gather", out_of_memory), with_store=False
        ),
        "late": lambda: scenario(dist.new_group(timeout=short), lambda t: time.sleep(TIMEOUT + 1)),
        "absent": absent,
        "dies": lambda: scenario(dist.new_group(), lambda t: fail_in(t, "all_gather", lambda: os._exit(3))),
    }
    told = {}
    for name in sys.argv[1:]:
        told[name] = ways[name]()
        if name != "dies":
            dist.barrier()
    report(told)
    os._exit(0)  # the default group would wait for the lost rank


main()
