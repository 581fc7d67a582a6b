"""Fused steps of a loss behind a DistributedDataParallel encoder: each rank reports its weights and what it raised."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from cases import Case
from fused_cases import batches, loss_of
from optim_cases import make
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrun import report

F64 = torch.float64


def bits(tensors) -> list[str]:
    """Tensors of numbers, to the last bit."""
    return [t.detach().numpy().tobytes().hex() for t in tensors]


def train(rank: int, size: int, *, optimizer: str, sizes: list[list[int]], with_bias: bool = True, **options) -> dict:
    """One pass for each list of ``sizes``, which has a batch size for every rank; the whole batch is known to all."""
    torch.manual_seed(3)
    case = Case(dtype=getattr(torch, options.pop("dtype", "float64")), with_bias=with_bias, classes=20)
    loss_fn = loss_of(options.pop("loss", "nce"), case)
    encoder = nn.Linear(16, 16, dtype=case.dtype)
    parameters = [*loss_fn.parameters(), *encoder.parameters()]
    stepper = make(optimizer, parameters)
    handle = loss_fn.fuse_optimizer(stepper, process_group=dist.group.WORLD, **options)
    encoder = DistributedDataParallel(encoder)
    for group in sizes:
        made = batches(case, *group)
        mine = made[rank]
        if options.get("accumulate", 1) > 1:  # the encoder is left out
            loss_fn(mine["hidden"], mine["target"], seed=mine["seed"]).backward()
            continue
        loss_fn(encoder(mine["hidden"]), mine["target"], seed=mine["seed"]).backward()
        stepper.step()
        stepper.zero_grad()
    handle.step()
    state = [value for p in loss_fn.parameters() for value in stepper.state[p].values() if torch.is_tensor(value)]
    return {"parameters": [p.tolist() for p in parameters], "bits": bits([*parameters, *state])}


def errors(rank: int, size: int) -> list[str]:
    """What cannot be merged is refused on every rank, and has changed nothing; then training goes on."""
    torch.manual_seed(3)
    case = Case(dtype=F64, classes=20)
    raised = []

    def attempt(call) -> None:
        try:
            call()
        except RuntimeError as error:
            raised.append(str(error))

    loss_fn = loss_of("nce", case)
    stepper = make("SGD", loss_fn.parameters())
    loss_fn.fuse_optimizer(stepper)
    attempt(lambda: loss_fn(case.hidden, case.target))  # no group
    before = loss_fn.weight.detach().clone()
    loss_fn.fuse_optimizer(stepper, process_group=dist.group.WORLD)
    target = case.target if rank == 0 else case.target[:, None].expand(7, 2)
    attempt(loss_fn(case.hidden, target).backward)  # ranks of different T
    loss_fn.fuse_optimizer(stepper, process_group=dist.group.WORLD)
    both = loss_fn(case.hidden, case.target)
    if rank == 1:
        both = both + loss_fn(case.hidden, case.target[:, None].expand(7, 2))
    attempt(both.backward)  # one rank of different T
    tied = loss_fn(case.hidden, case.target)
    if rank == 1:
        tied = tied + loss_fn.weight.square().sum()
    attempt(tied.backward)  # one rank has another gradient
    loss_fn.zero_grad()
    assert torch.equal(before, loss_fn.weight)
    loss_fn(case.hidden, case.target, seed=case.seed).backward()
    assert not torch.equal(before, loss_fn.weight)
    return raised


def absent(rank: int, size: int) -> dict:
    """A rank that has called no loss joins by ``step()``; hidden vectors are bfloat16, which it cannot know."""
    torch.manual_seed(3)
    case = Case(hidden_dtype=torch.bfloat16, classes=20)
    loss_fn = loss_of("nce", case)
    handle = loss_fn.fuse_optimizer(make("AdamW, all", loss_fn.parameters()), process_group=dist.group.WORLD)
    if rank == 1:
        handle.step()
    else:
        loss_fn(case.hidden, case.target, seed=case.seed).backward()
    handle.step()  # nothing anywhere: no step
    steps = [int(handle.optimizer.state[p]["step"]) for p in loss_fn.parameters()]
    return {
        "bits": bits(loss_fn.parameters()),
        "parameters": [p.tolist() for p in loss_fn.parameters()],
        "steps": steps,
    }


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    runs = json.loads(sys.argv[1])
    results = {name: train(rank, size, **run) for name, run in runs.items()}
    if size == 2:
        results["errors"], results["absent"] = errors(rank, size), absent(rank, size)
    report(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
