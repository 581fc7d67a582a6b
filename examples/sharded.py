#!/usr/bin/env python
"""A next-word model whose output table is spread over processes, trained as one process would train it.

``torchrun --nproc-per-node 2 examples/sharded.py`` takes under a minute on two cores. Every process has half of the
rows and half of each batch; then the first one repeats the training alone, with the whole table, and the losses agree
to rounding. The exit status is 1 if they do not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from _corpus import Corpus, CorpusError, load
from _data import DataError, at_least, progress, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import nce_ext
from nce_ext import distributed, optim

DIM, NEGATIVES = 128, 32
CONTEXT = 4  # words before the one to predict
INPUTS = 4_000  # the most frequent words have a vector as input; all others share one
BATCH = 2_048  # examples of all processes together
LEARNING_RATE = 0.05
HELD_OUT_WORDS = 2_000
EVERY = 25  # steps between two lines of the report
LARGEST_DIFFERENCE = 1e-9  # of losses in float64 that were summed in another order; training makes it grow


class Trunk(nn.Sequential):
    """The words before, [B, CONTEXT], to a hidden vector [B, DIM]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Embedding(INPUTS + 1, DIM // 2), nn.Flatten(), nn.Linear(CONTEXT * DIM // 2, DIM), nn.ReLU(),
            nn.Linear(DIM, DIM),
        )  # fmt: skip


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    bytes_per_step: float = 0.0
    perplexity: float = math.nan


def examples(words: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """The words before each position, and the one there; a text is its paragraphs one after the other."""
    before = np.minimum(words[positions[:, None] - np.arange(CONTEXT, 0, -1)], INPUTS)
    return torch.from_numpy(before).long(), torch.from_numpy(words[positions]).long()


def batches(corpus: Corpus, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of all processes together, and the same on each."""
    rng = np.random.default_rng(seed)
    words = corpus.train.words
    for _ in range(steps):
        yield examples(words, rng.integers(CONTEXT, len(words), BATCH))


def train(corpus: Corpus, steps: int, seed: int, mesh: dist.DeviceMesh | None) -> Result:
    """With a mesh this process's share, else everything."""
    rank, size = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
    torch.manual_seed(seed)
    noise = nce_ext.noise.Unigram(corpus.counts, power=1)
    trunk = Trunk()
    loss_fn: nn.Module = nce_ext.SampledSoftmaxLoss(DIM, len(corpus.counts), noise, NEGATIVES, sparse=True)
    if mesh:
        loss_fn = distributed.shard(loss_fn, mesh)
    optimizer = optim.Adagrad([*trunk.parameters(), *loss_fn.parameters()], lr=LEARNING_RATE)

    result, started = Result(), time.perf_counter()
    sent = loss_fn.collectives.sent_bytes if mesh else 0
    name = f"{size} processes" if mesh else "one process"
    bar = progress(batches(corpus, steps, seed), total=steps, desc=f"{name:>11}", disable=rank != 0)
    for step, (words, target) in enumerate(bar):
        own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        loss = loss_fn(trunk(words[own]), target[own], seed=torch.tensor([seed, step]))
        optimizer.zero_grad()
        loss.backward()
        if mesh:
            # The table's gradient is complete; the trunk's is of this process's examples, and the whole is their sum.
            for parameter in trunk.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        result.losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    result.seconds = time.perf_counter() - started
    result.bytes_per_step = (loss_fn.collectives.sent_bytes - sent) / steps if mesh else 0.0
    result.perplexity = perplexity(corpus, trunk, loss_fn, rank, size)
    return result


@torch.no_grad()
def perplexity(corpus: Corpus, trunk: Trunk, loss_fn: nn.Module, rank: int, size: int) -> float:
    """Exact, of held-out words, of which each process takes a share."""
    words = corpus.held_out.words
    positions = np.arange(CONTEXT, min(len(words), CONTEXT + HELD_OUT_WORDS))
    before, target = examples(words, positions[rank::size])
    total = torch.zeros(2)
    for i in range(0, math.ceil(len(positions) / size), 250):
        log_p = loss_fn.log_prob(trunk(before[i : i + 250]))
        total[0] += F.nll_loss(log_p, target[i : i + 250], reduction="sum")
        total[1] += len(log_p)
    if size > 1:
        dist.all_reduce(total)
    return math.exp(total[0] / total[1])


def report(together: Result, alone: Result, n_classes: int, size: int) -> float:
    """Print both curves; returns the largest difference of their losses."""
    print(f"\n{'step':>6}{f'{size} processes':>16}{'one process':>16}{'difference':>14}")
    differences = np.abs(np.subtract(together.losses, alone.losses))
    for step in [*range(0, len(differences) - 1, EVERY), len(differences) - 1]:
        print(f"{step:6}{together.losses[step]:16.6f}{alone.losses[step]:16.6f}{differences[step]:14.1e}")
    print(f"{'exact perplexity of held-out words':>22}: {together.perplexity:.2f} and {alone.perplexity:.2f}")
    print(f"largest difference of {len(differences)} losses: {differences.max():.1e}")
    print(f"seconds: {together.seconds:.1f} and {alone.seconds:.1f}")
    print(
        f"each process has {-(-n_classes // size):,} of {n_classes:,} rows and sends {together.bytes_per_step:,.0f} "
        f"bytes a step for the loss, {together.bytes_per_step / (BATCH / size):,.0f} an example"
    )
    return float(differences.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=at_least(int, 1), default=100, help="of training (default: 100)")
    parser.add_argument("--seed", type=at_least(int, 0), default=1, help="of all that is random (default: 1)")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="where to look for data first")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise DataError("several processes are wanted: torchrun --nproc-per-node 2 examples/sharded.py")
    if options.data is not None:
        sys.path.insert(0, str(options.data))  # the dictionary is looked for as a package
    try:
        corpus = load(None, min_count=5)
    except CorpusError as error:
        raise DataError(error) from None
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that a difference is seen that is no rounding
    dist.init_process_group("gloo")
    try:
        size = dist.get_world_size()
        if dist.get_rank() == 0:
            print(f"{corpus.name}: {len(corpus.train.words):,} words, {len(corpus.counts):,} classes", flush=True)
        together = train(corpus, options.steps, options.seed, init_device_mesh("cpu", (size,)))
        if dist.get_rank() == 0:
            alone = train(corpus, options.steps, options.seed, None)
            difference = report(together, alone, len(corpus.counts), size)
            if not difference < LARGEST_DIFFERENCE:
                raise DataError(f"the losses differ by up to {difference}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
