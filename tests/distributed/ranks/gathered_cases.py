"""Gathered contrastive losses, one case after the other: losses and gradients of this rank's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nce_ext.contrastive import InfoNCELoss, SigmoidContrastiveLoss

DIM = 5
PARTS = {1: (6,), 2: (4, 3), 3: (3, 0, 5), 4: (1, 3, 2, 2)}


class Case(NamedTuple):
    loss: type
    options: dict[str, Any]
    data: tuple[str, ...] = ()
    extra: int | None = None
    dtype: torch.dtype = torch.float64
    constant: tuple[str, ...] = ()  # operands without gradient
    empty: bool = False
    ddp: bool = False


OF_COLUMNS = ("ids", "log_q", "query_log_q")
CASES = {
    "plain": Case(InfoNCELoss, {"temperature": 0.5}),
    "sum": Case(InfoNCELoss, {"temperature": 0.5, "reduction": "sum"}, ("ids",)),
    "clip": Case(InfoNCELoss, {"learn_temperature": True, "symmetric": True, "normalize": True}, OF_COLUMNS),
    "clip in chunks": Case(InfoNCELoss, {"learn_temperature": True, "symmetric": True, "max_logits": 16}, ("ids",)),
    "clip at its limit": Case(InfoNCELoss, {"temperature": 0.01, "learn_temperature": True, "symmetric": True,
                                           "normalize": True}),
    "a row each": Case(InfoNCELoss, {"temperature": 0.5, "symmetric": True, "reduction": "none",
                                     "learn_temperature": True}, OF_COLUMNS),
    "explicit negatives": Case(InfoNCELoss, {"temperature": 0.5, "reduction": "sum", "learn_temperature": True},
                               ("ids", "negative_ids", "negative_mask", "log_q", "negative_log_q"), 4),
    "explicit without ids": Case(InfoNCELoss, {"temperature": 0.5, "symmetric": True}, ("ids", "negative_mask"), 4),
    "a row each with explicit": Case(InfoNCELoss, {"temperature": 0.5, "reduction": "none"}, (), 4),
    "a queue": Case(InfoNCELoss, {"temperature": 0.5}, ("ids", "negative_ids"), 4, constant=("key", "negatives")),
    "constant queries": Case(InfoNCELoss, {"symmetric": True, "temperature": 0.5}, constant=("query",)),
    "only explicit learn": Case(InfoNCELoss, {"temperature": 0.5}, (), 4, constant=("query", "key")),
    "debiased": Case(InfoNCELoss, {"temperature": 0.5, "debias": 0.1, "symmetric": True, "normalize": True,
                                   "learn_temperature": True}, ("ids",)),
    "siglip": Case(SigmoidContrastiveLoss, {"logit_scale": 3.0, "logit_bias": -2.0, "normalize": True}, ("ids",)),
    "siglip with explicit": Case(SigmoidContrastiveLoss, {"logit_scale": 3.0, "logit_bias": -2.0, "reduction": "sum"},
                                 ("ids", "negative_ids", "negative_mask"), 4),
    "siglip, a row each": Case(SigmoidContrastiveLoss, {"logit_bias": -2.0, "reduction": "none"}, ("ids",)),
    "bfloat16": Case(InfoNCELoss, {"symmetric": True, "temperature": 0.5, "normalize": True}, OF_COLUMNS,
                     dtype=torch.bfloat16),
    "float32": Case(InfoNCELoss, {"symmetric": True, "temperature": 0.5}, (*OF_COLUMNS, "negative_log_q"), 4,
                    dtype=torch.float32),
    "nothing": Case(InfoNCELoss, {"symmetric": True, "learn_temperature": True}, OF_COLUMNS, empty=True),
    "nothing, a row each": Case(InfoNCELoss, {"reduction": "none"}, empty=True),
    "averaged": Case(InfoNCELoss, {"symmetric": True, "learn_temperature": True}, OF_COLUMNS, ddp=True),
    "a row each, averaged": Case(SigmoidContrastiveLoss, {"reduction": "none"}, (), 4, ddp=True),
}  # fmt: skip


def inputs(name: str, world: int) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """What one process would pass, the upstream gradients of its rows, and the parts of the ranks."""
    case = CASES[name]
    parts = [0] * world if case.empty else list(PARTS[world])
    batch, generator = sum(parts), torch.Generator().manual_seed(sum(map(ord, name)) + world)

    def rows(n: int, *shape: int) -> Tensor:
        return 0.7 * torch.randn(n, *shape, generator=generator, dtype=torch.float64)

    given = {"query": rows(batch, DIM), "key": rows(batch, DIM)}
    if case.extra is not None:
        given["negatives"] = rows(case.extra, DIM)
    given = {key: value.to(case.dtype) for key, value in given.items()}
    extra = case.extra or 0
    values = {
        "ids": torch.randint(4, (batch,), generator=generator),
        "negative_ids": torch.randint(4, (extra,), generator=generator),
        "negative_mask": rows(extra) > 0,
        "log_q": rows(batch),
        "negative_log_q": rows(extra),
        "query_log_q": rows(batch),
    }
    return {**given, **{key: values[key] for key in case.data}}, rows(batch), parts


def loss_of(name: str) -> InfoNCELoss | SigmoidContrastiveLoss:
    case = CASES[name]
    wide = torch.promote_types(case.dtype, torch.float32)
    learns = case.loss is SigmoidContrastiveLoss or "learn_temperature" in case.options
    return case.loss(**case.options, **({"dtype": wide} if learns else {}))


def part_of(given: dict[str, Tensor], rank: int, parts: list[int]) -> dict[str, Tensor]:
    start = sum(parts[:rank])
    whole = ("negatives", "negative_ids", "negative_mask", "negative_log_q")
    return {name: value if name in whole else value[start : start + parts[rank]] for name, value in given.items()}


def run(name: str, collectives_group: Any, rank: int, world: int) -> dict[str, Any]:
    from nce_ext.distributed.gathered import gather

    case = CASES[name]
    given, upstream, parts = inputs(name, world)
    own = {key: value.clone() for key, value in part_of(given, rank, parts).items()}
    leaves = {key: own[key].requires_grad_() for key in ("query", "key", "negatives") if key in own}
    for key in case.constant:
        leaves.pop(key).requires_grad_(False)
    loss_fn = gather(loss_of(name), collectives_group, ddp=case.ddp)
    before = loss_fn.collectives.sent_bytes
    loss = loss_fn(**own)
    leaves.update(loss_fn.loss_fn.named_parameters())
    weights = part_of({"upstream": upstream}, rank, parts)["upstream"].to(loss.dtype) if loss.dim() else None
    gradients = torch.autograd.grad(loss, leaves.values(), weights, retain_graph=True)
    sent = loss_fn.collectives.sent_bytes - before
    again = torch.autograd.grad(loss, leaves.values(), weights)
    return {
        "loss": loss.tolist(),
        "dtype": str(loss.dtype).removeprefix("torch."),
        "gradients": {key: g.double().tolist() for key, g in zip(leaves, gradients, strict=True)},
        "dtypes": {key: str(g.dtype).removeprefix("torch.") for key, g in zip(leaves, gradients, strict=True)},
        "again": all(map(torch.equal, gradients, again)),
        "no grad": bool(torch.equal(torch.no_grad()(loss_fn)(**own), loss)),
        "sent": sent,
    }


class Towers(nn.Module):
    """Two encoders; with a loss, what DDP wraps is the whole of it."""

    def __init__(self, loss_fn: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.image, self.text = (nn.Linear(4, DIM, dtype=torch.float64) for _ in range(2))
        self.loss_fn = loss_fn

    def forward(self, images: Tensor, texts: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        query, key = torch.tanh(self.image(images)), torch.tanh(self.text(texts))
        return (query, key) if self.loss_fn is None else self.loss_fn(query, key)


def examples(step: int, world: int) -> tuple[Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(step)
    batch = sum(PARTS[world])
    images, texts = (torch.randn(batch, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return images, texts, list(PARTS[world])


def clip() -> InfoNCELoss:
    return InfoNCELoss(0.2, learn_temperature=True, symmetric=True, normalize=True, dtype=torch.float64)


def train(inside: bool, group: Any, rank: int, world: int) -> list[Any]:
    """Parameters after three steps, the loss's last, under DDP, which holds the loss or not."""
    from nce_ext.distributed.gathered import gather

    loss_fn = gather(clip(), group, ddp=True)
    model = nn.parallel.DistributedDataParallel(Towers(loss_fn if inside else None), process_group=group)
    parameters = list(model.parameters()) + ([] if inside else list(loss_fn.parameters()))
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for step in range(3):
        images, texts, parts = examples(step, world)
        own = part_of({"images": images, "texts": texts}, rank, parts)
        out = model(own["images"], own["texts"])
        optimizer.zero_grad()
        (out if inside else loss_fn(*out)).backward()
        optimizer.step()
    return [p.tolist() for p in parameters]


def refusals(group: Any, rank: int) -> dict[str, str]:
    """What is raised when ranks disagree, each time followed by a step that works."""
    from nce_ext.distributed.gathered import gather, gather_rows

    loss_fn, sigmoid = gather(InfoNCELoss(0.5), group), gather(SigmoidContrastiveLoss(), group)
    two = torch.zeros(2, DIM)
    odd = rank == 1
    attempts: dict[str, Callable[[], Any]] = {
        "bad ids on rank 1": lambda: loss_fn(two, two, ids=torch.zeros(3 if odd else 2, dtype=torch.int64)),
        "D": lambda: loss_fn(two[:, : 4 if odd else 5], two[:, : 4 if odd else 5]),
        "dtype of query": lambda: loss_fn(two.bfloat16() if odd else two, two),
        "dtype of key": lambda: loss_fn(two, two.half() if odd else two),
        "arguments": lambda: loss_fn(two, two, **({} if odd else {"ids": torch.arange(2)})),
        "gradients": lambda: loss_fn(two, two.clone().requires_grad_(not odd)),
        "number of negatives": lambda: loss_fn(two, two, negatives=torch.zeros(2 + odd, DIM)),
        "negatives": lambda: loss_fn(two, two, negatives=two + odd),
        "temperature": lambda: gather(InfoNCELoss(0.25 if odd else 0.5), group)(two, two),
        "log q of sigmoid": lambda: sigmoid(two, two, log_q=torch.zeros(2)),
        "rows": lambda: gather_rows(torch.zeros(2, 3 + odd), group),
        "types of rows": lambda: gather_rows(torch.zeros(2, dtype=torch.int64 if odd else torch.float32), group),
        "a scalar": lambda: gather_rows(torch.tensor(1.0), group),
    }
    told = {}
    for name, action in attempts.items():
        try:
            told[name] = f"no refusal: {action()}"
        except (RuntimeError, TypeError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"
        assert loss_fn(two, two).isfinite()
    return told


if __name__ == "__main__":
    import torch.distributed as dist
    from torchrun import report

    from nce_ext.distributed.gathered import gather_rows

    dist.init_process_group("gloo")
    me, told = dist.get_rank(), {}
    for size in range(1, dist.get_world_size() + 1):
        ranks = dist.new_group(list(range(size)))
        if me < size:
            told[size] = {name: run(name, ranks, me, size) for name in CASES}
            told[size]["trained"] = {
                place: train(place == "inside", ranks, me, size) for place in ("inside", "outside")
            }
        if size == 3 and me < size:
            told["refusals"] = refusals(ranks, me)
    told["rows"] = gather_rows(torch.full((me, 2), float(me), requires_grad=True)).tolist()
    report(told)
    dist.destroy_process_group()
