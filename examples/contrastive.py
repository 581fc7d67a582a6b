#!/usr/bin/env python
"""Features learned without labels from pairs of augmented pictures (SimCLR), by three contrastive losses.

``python examples/contrastive.py`` takes about three minutes on two cores. It learns from Fashion-MNIST where that is
installed, from scikit-learn's small digits otherwise; a linear classifier on top of the features then judges them.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from _data import DataError, find_file, parser, prepare, progress, require, run
from torch import Tensor, nn
from torch.nn import functional as F

from nce_ext import InfoNCELoss, SigmoidContrastiveLoss

TEMPERATURE = 0.2
BATCH = 256
LEARNING_RATE = 2e-3
PICTURES = 20_000  # to learn features from, without their labels
LABELS = 1_000  # pictures whose labels the linear classifier sees
CANDIDATES = 1_000  # among which the bound of the mutual information asks for the right one
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
         "t10k-labels-idx1-ubyte.gz")  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """Grey pictures [N, 1, H, W] in 0 .. 1 and their classes [N]."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def losses() -> dict[str, nn.Module]:
    return {
        "InfoNCE": InfoNCELoss(TEMPERATURE, normalize=True),
        "InfoNCE, debiased": InfoNCELoss(TEMPERATURE, normalize=True, debias=0.1),
        "sigmoid": SigmoidContrastiveLoss(normalize=True),
    }


def read_idx(path: Path) -> Tensor:
    """The bytes of a gzipped IDX file: two zeros, 8 for bytes, the rank, the sizes as big-endian int32, the data."""
    try:
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">i4", content[3], 4)
        data = np.frombuffer(content, np.uint8, math.prod(shape), 4 + 4 * content[3])
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise DataError(f"{path} is not a gzipped IDX file: {error}") from None
    return torch.tensor(data.reshape(shape))


def load(data: Path | None, seed: int) -> Pictures:
    """Fashion-MNIST, or scikit-learn's digits where it is not installed."""
    try:
        command = "apt-get install dataset-fashion-mnist"
        paths = [find_file(name, command, data=data, system="datasets/fashion-mnist") for name in FILES]
    except DataError as missing:
        try:
            digits = require("sklearn.datasets", "pip install scikit-learn").load_digits()
        except DataError as error:
            raise DataError(f"{missing}, and for the small digits in its place, {error}") from None
        name, train, labels = "digits", torch.tensor(digits.images / 16), torch.tensor(digits.target)
        train, test, labels, test_labels = train[:-500], train[-500:], labels[:-500], labels[-500:]
    else:
        name = "Fashion-MNIST"
        train, labels, test, test_labels = (read_idx(path) for path in paths)
        train, test = train / 255, test / 255
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:PICTURES]
    train, test = train[shuffled, None].float(), test[:, None].float()
    return Pictures(name, train, labels[shuffled].long(), test, test_labels.long())


def augment(pictures: Tensor) -> Tensor:
    """Another look at each picture: a part of it, perhaps mirrored, lighter or darker."""
    n = len(pictures)
    width, height = torch.empty(2, n).uniform_(0.55, 1)
    left, top = (torch.empty(n).uniform_(-1, 1) * (1 - size) for size in (width, height))
    mirror, zero = torch.randint(2, (n,)) * 2 - 1, torch.zeros(n)
    where = torch.stack([width * mirror, zero, left, zero, height, top], 1).view(n, 2, 3)
    grid = F.affine_grid(where, list(pictures.shape), align_corners=False)
    part = F.grid_sample(pictures, grid, align_corners=False)
    return part ** torch.empty(n, 1, 1, 1).uniform_(0.5, 2) * torch.empty(n, 1, 1, 1).uniform_(0.5, 1)


class Encoder(nn.Sequential):
    """Three convolutions, whose output are the features, and a head of two layers that only the loss sees."""

    def __init__(self, width: int = 32, out: int = 64) -> None:
        layers: list[nn.Module] = []
        for a, b in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        head = nn.Sequential(nn.Linear(16 * width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, out))
        super().__init__(body, head)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        self.eval()
        result = torch.cat([self[0](chunk) for chunk in pictures.split(1000)])
        self.train()
        return result


def probe(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 0.1) -> float:
    """Accuracy of logistic regression on features [N, F], each of them scaled to mean 0 and variance 1."""
    mean, std = train.mean(0), train.std(0) + 1e-4
    train, test = (train - mean) / std, (test - mean) / std
    layer = nn.Linear(train.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), labels) + decay / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (layer(test).argmax(1) == test_labels).float().mean().item()


def batches(n: int) -> Iterator[Tensor]:
    """Numbers below n in random order, BATCH at a time (all of them, where there are fewer), for ever."""
    while True:
        order = torch.randperm(n)
        yield from order[: max(n // BATCH, 1) * BATCH].split(BATCH)


def step(encoder: Encoder, loss_fn: nn.Module, pictures: Tensor) -> Tensor:
    """The loss of telling each picture's other view from both views of all others (NT-Xent).

    Rows i and i + B are the two views of picture i. Their equal ids say that a vector is no negative of itself.
    """
    views = torch.cat([augment(pictures), augment(pictures)])
    vectors = encoder(views.contiguous(memory_format=torch.channels_last))
    ids = torch.arange(len(pictures)).repeat(2)
    return loss_fn(vectors, vectors.roll(len(pictures), 0), ids=ids)


@torch.no_grad()
def information(encoder: Encoder, loss_fn: nn.Module, pictures: Tensor) -> float:
    """Nats that a view is known to tell of the other one: a lower bound from unseen pictures, log(N) at most.

    It is a bound with any scores, so those that the other losses learned may be used.
    """
    scale = loss_fn.logit_scale.exp().item() if isinstance(loss_fn, SigmoidContrastiveLoss) else 1 / TEMPERATURE
    encoder.eval()
    a, b = (encoder(augment(pictures)) for _ in range(2))
    encoder.train()
    return InfoNCELoss(1 / scale, normalize=True).mutual_information_bound(a, b).item()


def train(name: str, loss_fn: nn.Module, pictures: Pictures, options: argparse.Namespace) -> dict:
    """An encoder trained by this loss: its accuracy after each epoch, which is of PICTURES pictures."""
    torch.manual_seed(options.seed)  # the same first weights for each loss
    encoder, labelled = Encoder(), slice(LABELS)

    def accuracy() -> float:
        features = (encoder.features(part) for part in (pictures.train[labelled], pictures.test))
        return probe(next(features), pictures.train_labels[labelled], next(features), pictures.test_labels)

    n_steps = max(PICTURES // BATCH, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *loss_fn.parameters()], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, options.epochs * n_steps)
    curve, seconds, indices = [accuracy()], 0.0, batches(len(pictures.train))
    with progress(desc=name, total=options.epochs * n_steps, unit="step") as bar:
        for _ in range(options.epochs):
            started = time.perf_counter()
            for chosen in itertools.islice(indices, n_steps):
                optimizer.zero_grad()
                loss = step(encoder, loss_fn, pictures.train[chosen])
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            seconds += time.perf_counter() - started
            curve.append(accuracy())
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{curve[-1]:.3f}")
    return {"curve": curve, "seconds": seconds, "bound": information(encoder, loss_fn, pictures.test[:CANDIDATES])}


def draw(pyplot: ModuleType, path: Path, runs: dict[str, dict], pixels: float, name: str) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, result in runs.items():
        axes.plot(result["curve"], marker="o", markersize=3, label=label)
    axes.axhline(pixels, color="grey", linestyle="--", label="pixels")
    axes.set(xlabel="epochs without labels", ylabel=f"accuracy with {LABELS:,} labels", title=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__.partition("\n")[0], epochs=8).parse_args()
    pyplot = prepare(options.output)
    pictures = load(options.data, options.seed)
    shape = "x".join(map(str, pictures.train.shape[2:]))
    print(
        f"{pictures.name}: {len(pictures.train):,} pictures of {shape} to learn from; {LABELS:,} of them have labels, "
        f"for the linear classifier; accuracy on {len(pictures.test):,} others",
        flush=True,
    )
    torch.manual_seed(options.seed)
    labelled = pictures.train[:LABELS].flatten(1), pictures.train_labels[:LABELS]
    pixels = probe(*labelled, pictures.test.flatten(1), pictures.test_labels)
    runs = {name: train(name, loss_fn, pictures, options) for name, loss_fn in losses().items()}

    print(f"\n{'linear classifier on':<22}{'accuracy':>10}{'bound (nats)':>14}{'seconds':>10}")
    print(f"{'pixels':<22}{pixels:>10.1%}")
    print(f"{'untrained network':<22}{next(iter(runs.values()))['curve'][0]:>10.1%}")
    for name, result in runs.items():
        print(f"{name:<22}{result['curve'][-1]:>10.1%}{result['bound']:>14.2f}{result['seconds']:>10.1f}")
    n = min(CANDIDATES, len(pictures.test))
    print(f"bound: of what one view tells of the other; {n:,} unseen pictures can show log {n:,} = {math.log(n):.2f}")
    path = options.output / "contrastive.png"
    draw(pyplot, path, runs, pixels, pictures.name)
    print(f"written: {path}")


if __name__ == "__main__":
    run(main)
