"""Data-parallel training with row-sparse gradients: what every rank has after each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nce_ext

DIM, K, STEPS = 3, 4, 4


class Model(nn.Module):
    """An embedding, a layer, and a sampled loss: sparse, dense and sparse gradients."""

    def __init__(self, n_classes: int, sparse: bool | str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.embedding = nn.Embedding(9, DIM, sparse=bool(sparse), dtype=torch.float64)
            self.layer = nn.Linear(DIM, DIM, dtype=torch.float64)
            rows = torch.randn(20, DIM, dtype=torch.float64)
            self.loss_fn = nce_ext.NCELoss(
                DIM, n_classes, nce_ext.noise.Uniform(n_classes), K,
                correction="none", log_z="learned", reduction="sum", sparse=sparse, dtype=torch.float64,
            )  # fmt: skip
            with torch.no_grad():  # the same whatever n_classes is
                self.loss_fn.weight[:20].copy_(rows)

    def forward(self, word: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
        return self.loss_fn(torch.tanh(self.layer(self.embedding(word))), target, negatives=negatives)


def batches(step: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of one optimizer step: step 2 accumulates three, and in step 1 the last rank touches no row."""
    for i in range(3 if step == 2 else 1):
        generator = torch.Generator().manual_seed(1000 * step + 10 * i + rank)
        n = 0 if step == 1 and rank == world - 1 else 2 + rank
        yield (
            torch.randint(9, (n,), generator=generator),
            torch.randint(20, (n,), generator=generator),
            torch.randint(20, (n, K), generator=generator),
        )


def bits(gradient: Tensor) -> list[Any]:
    """Ids and rows of a coalesced gradient; a dense one as it is."""
    if not gradient.is_sparse:
        return gradient.tolist()
    assert gradient.is_coalesced()
    return [gradient.indices()[0].tolist(), gradient.values().tolist()]


def train(n_classes: int, sparse: bool | str, group: Any, rank: int, world: int) -> list[dict[str, Any]]:
    from nce_ext.distributed.ddp import RowSparseDDP

    model = RowSparseDDP(Model(n_classes, sparse), process_group=group)
    assert not model.broadcast_buffers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = []
    for step in range(STEPS):
        optimizer.zero_grad()
        *accumulated, last = batches(step, rank, world)
        start = model.collectives.sent_bytes
        with model.no_sync():
            for batch in accumulated:
                model(*batch).backward()
        before = model.collectives.sent_bytes
        model(*last).backward()
        told.append({
            "gradients": {name: bits(p.grad) for name, p in model.module.named_parameters()},
            "sent": model.collectives.sent_bytes - before,
            "sent while accumulating": before - start,
        })  # fmt: skip
        optimizer.step()
        told[-1]["parameters"] = {name: p[:20].tolist() if p.dim() else p.item()
                                  for name, p in model.module.named_parameters()}  # fmt: skip
    return told


def hook_alone(group: Any, rank: int) -> list[Any]:
    from nce_ext.distributed.ddp import sparse_gradient_hook

    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(6, 2, sparse=True), nn.Linear(2, 1))
    model = nn.parallel.DistributedDataParallel(model, process_group=group)
    model.register_comm_hook(group, sparse_gradient_hook)
    model(torch.tensor([1, 1, rank])).sum().backward()
    return [bits(p.grad) for p in model.parameters()]


def attempt(action: Any) -> str | None:
    try:
        action()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def by_hand(group: Any, rank: int) -> dict[str, Any]:
    from nce_ext.distributed.ddp import reduce_sparse_gradients

    def coo(ids: list[int], rows: list[Any], *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        values = torch.tensor(rows, dtype=dtype).reshape(len(ids), *shape[1:])
        return torch.sparse_coo_tensor([ids], values, shape, check_invariants=False)

    def parameters() -> list[Tensor]:
        made = [torch.zeros(8, 2, dtype=torch.float64), torch.zeros(8, dtype=torch.float32), torch.zeros(8, 2)]
        repeated = coo([3, rank, 3], [[1, 2], [10, 20], [4, 5 + rank]], 8, 2)
        made[0].grad = repeated if rank else None
        made[1].grad = coo([7, 0], [1 + rank, 0.1], 8, dtype=torch.float32)
        return made

    def made_of(dtype: torch.dtype) -> Tensor:
        parameter = torch.zeros(8, dtype=dtype)
        parameter.grad = coo([1], [2.0], 8, dtype=dtype)
        return parameter

    told: dict[str, Any] = {}
    rows = parameters()
    reduce_sparse_gradients(rows, group)
    told["reduced"] = [None if p.grad is None else bits(p.grad) for p in rows]
    told["dtypes"] = [str(p.grad.dtype) for p in rows if p.grad is not None]

    rows = parameters()
    if rank == 1:
        rows[2].grad = torch.ones(8, 2)
    before = [p.grad for p in rows]
    told["dense"] = attempt(lambda: reduce_sparse_gradients(rows, group))
    told["number"] = attempt(lambda: reduce_sparse_gradients(rows[: 2 if rank else 1], group))
    told["shape"] = attempt(lambda: reduce_sparse_gradients([torch.zeros(8 + rank, 2)], group))
    told["dtype"] = attempt(
        lambda: reduce_sparse_gradients([made_of(torch.float64 if rank == 1 else torch.float32)], group)
    )
    told["no tensor"] = attempt(lambda: reduce_sparse_gradients([None] if rank == 0 else rows[:1], group))
    told["kept"] = all(p.grad is g for p, g in zip(rows, before, strict=True))
    return told


if __name__ == "__main__":
    import torch.distributed as dist
    from torchrun import report

    dist.init_process_group("gloo")
    me, told = dist.get_rank(), {}
    for size in range(1, dist.get_world_size() + 1):
        ranks = dist.new_group(list(range(size)))
        if me < size:
            told[size] = {
                "small": train(20, True, ranks, me, size),
                "large": train(5000, True, ranks, me, size),
                "padded": train(20, "padded", ranks, me, size),
                "hook": hook_alone(None if size == dist.get_world_size() else ranks, me),
                "by hand": by_hand(ranks, me),
            }
    report(told)
    dist.destroy_process_group()
