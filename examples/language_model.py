#!/usr/bin/env python
"""An LSTM language model with a vocabulary of 30,000 words, trained three ways for the same wall time.

``python examples/language_model.py`` takes about four minutes on two cores: NCE, sampled softmax and the full softmax
train the same model, and the exact perplexity of text that none has seen says how far each has come.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from _corpus import Corpus, CorpusError, Text, load
from _data import DataError, parser, prepare, progress, run
from torch import Tensor, nn
from torch.nn import functional as F

import nce_ext

LOSSES = ("NCE", "sampled softmax", "full softmax")
DIM = 256
NEGATIVES = 2048  # one set for all words of a batch: at this size their scores are one small matrix product
ROWS, STEPS = 64, 20  # words a batch: parallel streams of text, and the length of back-propagation through time
FULL_SOFTMAX_ROWS = 16  # with 64 it reads hardly more words a second, and ends worse for want of steps
LEARNING_RATE = 8e-3
HELD_OUT_WORDS, HELD_OUT_ROWS = 6_000, 20
EVALUATIONS = 6


class FullSoftmax(nn.Linear):
    """What the sampled losses replace. The bias starts, as theirs does, at the log frequencies."""

    def __init__(self, dim: int, counts: np.ndarray) -> None:
        super().__init__(dim, len(counts))
        self.bias = nn.Parameter(torch.from_numpy(np.log(counts / counts.sum())).float())

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(hidden).flatten(0, 1), target.flatten())


def output_layer(name: str, counts: np.ndarray) -> nn.Module:
    if name == "full softmax":
        return FullSoftmax(DIM, counts)
    kind = {"NCE": nce_ext.NCELoss, "sampled softmax": nce_ext.SampledSoftmaxLoss}[name]
    return kind(DIM, len(counts), nce_ext.noise.Unigram(counts, power=1), NEGATIVES, shared=True)


class LanguageModel(nn.Module):
    """Words in, a hidden vector for each next word out; the output layer reads the same table of word vectors."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.randn(output.weight.shape) * 0.05, freeze=False)
        self.lstm = nn.LSTM(DIM, DIM)
        self.output = output
        output.weight = self.embedding.weight

    def hidden(self, words: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple]:
        return self.lstm(self.embedding(words), state)


def stream(text: Text, end: int, rows: int, rng: np.random.Generator | None = None) -> Tensor:
    """Paragraphs (in random order, if there is an rng), each closed by ``end``, as parallel text [words, rows]."""
    if rng is not None:
        text = text.select(rng.permutation(len(text.bounds) - 1))
    words = np.insert(text.words, text.bounds[1:], end)
    words = words[: len(words) // rows * rows].reshape(rows, -1).T
    return torch.from_numpy(np.ascontiguousarray(words)).long()


def batches(corpus: Corpus, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Inputs and targets without end, and whether the text starts anew."""
    rng = np.random.default_rng(seed)
    while True:
        words = stream(corpus.train, len(corpus.vocabulary), rows, rng)
        steps = min(STEPS, len(words) - 1)
        for start in range(0, len(words) - steps, steps):
            yield words[start : start + steps], words[start + 1 : start + steps + 1], start == 0


@dataclass
class Result:
    name: str
    updates: int = 0
    words: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)  # (seconds, held-out perplexity)
    log_z: Tensor = field(default_factory=lambda: torch.zeros(0))


def train(name: str, corpus: Corpus, held_out: Tensor, counts: np.ndarray, seconds: float, seed: int) -> Result:
    """Train for this long; evaluations do not count. The learning rate falls to 0 over the time."""
    torch.manual_seed(seed)
    model = LanguageModel(output_layer(name, counts))
    # Dense gradients: at this vocabulary Adam's step over the whole table is a tenth of the time. With ten times the
    # words it would be half: then sparse=True, in the loss and in the embedding, and SparseAdam for the table.
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    rows = FULL_SOFTMAX_ROWS if name == "full softmax" else ROWS
    result, state = Result(name), None

    @torch.no_grad()
    def evaluate() -> None:
        hidden, _ = model.hidden(held_out[:-1])
        perplexity = nce_ext.evaluate.perplexity(model.output, hidden, held_out[1:])
        result.curve.append((result.seconds, perplexity.item()))

    evaluate()
    with progress(total=round(seconds), desc=f"{name:>15}", unit="s") as bar:
        for words, target, fresh in batches(corpus, rows, seed):
            started = time.perf_counter()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - result.seconds / seconds)
            hidden, state = model.hidden(words, None if fresh else state)
            state = tuple(part.detach() for part in state)
            loss = model.output(hidden, target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.lstm.parameters(), 1.0)
            optimizer.step()
            result.seconds += time.perf_counter() - started
            result.updates += 1
            result.words += target.numel()
            bar.update(min(round(result.seconds), bar.total) - bar.n)
            if result.seconds >= seconds * len(result.curve) / EVALUATIONS:
                evaluate()
                bar.set_postfix(perplexity=f"{result.curve[-1][1]:.1f}")
            if result.seconds >= seconds:
                break
    with torch.no_grad():
        hidden, _ = model.hidden(held_out[:51])  # a thousand contexts
        result.log_z = torch.logsumexp(F.linear(hidden, model.output.weight, model.output.bias), -1)
    return result


def report(results: list[Result]) -> None:
    print(f"\n{'':17}{'words/s':>8}{'updates':>9}{'words read':>12}{'perplexity':>12}{'log Z':>8} (spread)")
    print(f"{'word frequencies':17}{'':29}{results[0].curve[0][1]:12.1f}")
    for result in results:
        print(
            f"{result.name:17}{result.words / result.seconds:8,.0f}{result.updates:9,}{result.words:12,}"
            f"{result.curve[-1][1]:12.1f}{result.log_z.mean():+8.2f} ({result.log_z.std():.2f})"
        )


def draw(pyplot: ModuleType, path: Path, results: list[Result]) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for result in results:
        axes.plot(*zip(*result.curve, strict=True), marker="o", markersize=3, label=result.name)
    axes.set(xlabel="training time (s)", ylabel="held-out perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__.partition("\n")[0], seconds=60).parse_args()
    pyplot = prepare(options.output)
    if options.data is not None:
        sys.path.insert(0, str(options.data))  # the dictionary is looked for as a package
    try:
        corpus = load(None, min_count=5)
    except CorpusError as error:
        raise DataError(error) from None
    counts = np.append(corpus.counts, len(corpus.train.bounds) - 1)  # the last word is the end of a paragraph
    held_out = stream(corpus.held_out, len(corpus.vocabulary), HELD_OUT_ROWS)[: HELD_OUT_WORDS // HELD_OUT_ROWS + 1]
    print(
        f"{corpus.name}: {counts.sum():,} words to train on, {len(counts):,} different; {options.seconds:g} s for each "
        f"loss; exact perplexity of {held_out[1:].numel():,} held-out words",
        flush=True,
    )
    results = [train(name, corpus, held_out, counts, max(options.seconds, 0.01), options.seed) for name in LOSSES]
    report(results)
    path = options.output / "language_model.png"
    draw(pyplot, path, results)
    print(f"written: {path}")


if __name__ == "__main__":
    run(main)
