#!/usr/bin/env python
"""Next-film recommendation (SASRec) on MovieLens-100k with four sampled losses, given the same number of steps.

``python examples/recommender.py`` takes about three minutes on two cores. It shows what the log q correction is worth
where the negatives are the other examples of the batch, and so come as often as they are popular.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from _data import find_file, parser, prepare, progress, run
from torch import Tensor, nn
from torch.nn import functional as F

import nce_ext
from nce_ext.contrastive import InfoNCELoss

INSTALL = "pip install --no-deps recbole==1.2.1"
DIM, LAYERS, HEADS, DROPOUT = 64, 1, 2, 0.3
LENGTH = 50  # films of a user's history that the model sees
BATCH = 32  # histories
NEGATIVES = 512  # one set for all films of a batch
LEARNING_RATE = 3e-3
IGNORE = -100


def read_histories(path: Path) -> tuple[list[np.ndarray], int]:
    """Each user's items, oldest first, and the number of items."""
    columns = np.loadtxt(path, delimiter="\t", skiprows=1, dtype=np.int64, usecols=(0, 1, 3))
    user, item, when = columns.T
    items, item = np.unique(item, return_inverse=True)
    order = np.lexsort((when, user))
    starts = np.flatnonzero(np.diff(user[order])) + 1
    return np.split(item[order], starts), len(items)


def training_windows(histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [windows, LENGTH], without each user's last two items: those are to be predicted.

    Windows are filled up on the right, where a causal model does not look, with targets that no loss counts.
    """
    inputs, targets = [], []
    for history in histories:
        items = history[:-2]
        for start in range(0, len(items) - 1, LENGTH):
            window = items[start : start + LENGTH + 1]
            padding = (0, LENGTH + 1 - len(window))
            inputs.append(np.pad(window, padding)[:-1])
            targets.append(np.pad(window, padding, constant_values=IGNORE)[1:])
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


class SASRec(nn.Module):
    """A small causal transformer over the items that a user chose; scores are products with the same item vectors."""

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, DIM)
        self.positions = nn.Parameter(torch.zeros(LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, DROPOUT, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.normal_(self.items.weight, std=DIM**-0.5)

    def forward(self, items: Tensor) -> Tensor:
        """[users, length] -> a vector after each item, [users, length, DIM]."""
        length = items.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        return self.layers(self.dropout(self.items(items) + self.positions[:length]), mask=causal, is_causal=True)


class InBatchLoss(nn.Module):
    """The targets of all other positions as negatives; ``log_q`` [n_items] corrects for how often an item is one."""

    def __init__(self, weight: Tensor, log_q: Tensor | None = None) -> None:
        super().__init__()
        self.loss, self.weight, self.log_q = InfoNCELoss(temperature=1.0), weight, log_q

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        counted = target != IGNORE
        ids = target[counted]
        log_q = None if self.log_q is None else self.log_q[ids]
        return self.loss(hidden[counted], F.embedding(ids, self.weight), ids=ids, log_q=log_q)


def losses(counts: Tensor) -> dict[str, Callable[[Tensor], nn.Module]]:
    """What to compare; each is made for a model's item vectors."""
    n_items = len(counts)
    log_q = torch.log(counts.clamp(min=1) / counts.sum())
    popular = nce_ext.noise.Unigram(counts + 1, power=1)  # + 1: items that nobody chose must be pushed down as well
    uniform = nce_ext.noise.Uniform(n_items)

    def sampled(kind: type[nn.Module], noise: nce_ext.noise.Noise, **options) -> Callable[[Tensor], nn.Module]:
        def make(weight: Tensor) -> nn.Module:
            loss = kind(DIM, n_items, noise, NEGATIVES, bias=False, shared=True, ignore_index=IGNORE, **options)
            loss.weight = weight
            return loss

        return make

    # With margin 0 every item starts at probability 1/2, and pushing them all down comes before anything is learned.
    gbce = {"calibration": 0.75, "margin": -math.log(n_items)}
    return {
        "in-batch InfoNCE": lambda weight: InBatchLoss(weight),
        "in-batch InfoNCE, log q": lambda weight: InBatchLoss(weight, log_q),
        "sampled softmax": sampled(nce_ext.SampledSoftmaxLoss, popular),
        "negative sampling, gBCE": sampled(nce_ext.NegativeSamplingLoss, uniform, **gbce),
    }


def rank(scores: Tensor, target: Tensor, seen: list[np.ndarray]) -> Tensor:
    """How many unseen items score no lower than the target, [users]; 0 is best. Ties count against it, as does NaN."""
    own = scores.gather(1, target[:, None])
    ahead = ~(scores < own)
    for row, items in zip(ahead, seen, strict=True):
        row[torch.from_numpy(items)] = False
    ahead.scatter_(1, target[:, None], False)
    return ahead.sum(1)


def hit_rate(ranks: Tensor, k: int = 10) -> float:
    """HR@k: the share of users whose item is among the k best."""
    return (ranks < k).double().mean().item()


def ndcg(ranks: Tensor, k: int = 10) -> float:
    """NDCG@k with one relevant item: 1 / log2(2 + rank) within the k best, else 0."""
    return torch.where(ranks < k, 1 / torch.log2(2.0 + ranks.double()), 0.0).mean().item()


@torch.no_grad()
def model_ranks(model: SASRec, histories: list[np.ndarray], position: int) -> Tensor:
    """Ranks of each user's item at ``position`` (-1: the last), predicted from those before it."""
    model.eval()
    before = [history[:position] for history in histories]
    recent = [torch.from_numpy(items[-LENGTH:]) for items in before]
    last = torch.tensor([len(items) - 1 for items in recent])
    hidden = model(nn.utils.rnn.pad_sequence(recent, batch_first=True))[torch.arange(len(recent)), last]
    model.train()
    return rank(hidden @ model.items.weight.T, target_of(histories, position), before)


def target_of(histories: list[np.ndarray], position: int) -> Tensor:
    return torch.tensor([history[position] for history in histories])


@dataclass
class Result:
    name: str
    test: Tensor  # ranks, of the epoch that was best on the validation items
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)  # validation NDCG@10 after each epoch


def train(
    name: str, make_loss: Callable[[Tensor], nn.Module], histories: list[np.ndarray], n_items: int, options
) -> Result:
    torch.manual_seed(options.seed)
    model = SASRec(n_items)
    loss_fn = make_loss(model.items.weight)
    # Adam with decoupled weight decay: the data are few, and every loss overfits without it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    inputs, targets = training_windows(histories)
    result = Result(name, torch.empty(0))
    bar = progress(range(options.epochs), desc=f"{name:>23}", unit="epoch")
    for _ in bar:
        started = time.perf_counter()
        for rows in torch.randperm(len(inputs)).split(BATCH):
            loss = loss_fn(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        result.seconds += time.perf_counter() - started
        result.curve.append(ndcg(model_ranks(model, histories, -2)))
        if result.curve[-1] == max(result.curve):
            result.test = model_ranks(model, histories, -1)
        bar.set_postfix(ndcg=f"{result.curve[-1]:.4f}")
    return result


def popularity(counts: Tensor, histories: list[np.ndarray], position: int) -> Tensor:
    """Ranks where everyone is shown the most chosen items."""
    before = [history[:position] for history in histories]
    return rank(counts.float().expand(len(histories), -1), target_of(histories, position), before)


def report(results: list[Result]) -> None:
    print(f"\n{'last film of each user, all unseen films ranked':47}  HR@10  NDCG@10  seconds")
    for result in results:
        print(f"{result.name:47} {hit_rate(result.test):6.4f} {ndcg(result.test):8.4f} {result.seconds:8.1f}")


def draw(pyplot: ModuleType, path: Path, results: list[Result]) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for result in results:
        epochs = range(1, len(result.curve) + 1)
        axes.plot(epochs, result.curve, label=result.name, linestyle="-" if result.seconds else ":")
    axes.set(xlabel="epoch", ylabel="NDCG@10 of the validation films")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__.partition("\n")[0], epochs=20).parse_args()
    pyplot = prepare(options.output)
    ratings = find_file("ml-100k.inter", INSTALL, data=options.data, wheel="recbole/dataset_example/ml-100k")
    histories, n_items = read_histories(ratings)
    counts = torch.bincount(torch.from_numpy(np.concatenate([h[:-2] for h in histories])), minlength=n_items)
    print(f"MovieLens-100k: {len(histories)} users, {n_items:,} films, {counts.sum():,} choices to train on")
    results = [train(name, make, histories, n_items, options) for name, make in losses(counts).items()]
    curve = [ndcg(popularity(counts, histories, -2))] * options.epochs
    results.append(Result("popularity", popularity(counts, histories, -1), curve=curve))
    report(results)
    path = options.output / "recommender.png"
    draw(pyplot, path, results)
    print(f"written: {path}")


if __name__ == "__main__":
    run(main)
