#!/usr/bin/env python
"""Twenty million classes on a machine of 24 GiB: as fast as two hundred thousand, and it may be killed at any time.

``python examples/large_vocabulary.py`` takes about three minutes on two cores. A class is the next two words of a text,
hashed into V buckets; the model reads the four words before. First V = 200,000, then V = 20,000,000: a float32 table of
5 GB, and two more for AdamW's moments. Only the rows of a batch are read, clipped and stepped.

With ``--classes V --checkpoint FILE`` a run that was killed goes on, when it is started again, from its last checkpoint
and computes the very losses it would have. The file holds the rows that were touched so far (_row_checkpoint.py).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import _row_checkpoint
import numpy as np
import torch
from _corpus import Corpus, CorpusError, Text, load
from _data import DataError, at_least, parser, prepare, progress, run
from _row_checkpoint import ROWS_AT_ONCE, is_table
from torch import Tensor, nn
from torch.nn import functional as F

import nce_ext

DIM = 64
CONTEXT, PHRASE = 4, 2  # words that the model reads, and words that it predicts
BATCH, ACCUMULATE = 1024, 2  # a step is taken on two batches
NEGATIVES = 2048  # one set for all examples of a batch
SMOOTHING = 0.25  # of the frequencies: what the buckets without a phrase of the text have between them, nearly
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-2, 1e-2, 0.18
WARM_UP = 10  # steps whose time does not count
HELD_OUT, EXACT = 8192, 256  # held-out examples for the NCE loss, and for the exact perplexity
# Weight and two moments, each with a bias; the row's touches and decay, twice; alias table; what set-up takes besides.
BYTES_A_CLASS = 3 * 4 * (DIM + 1) + 2 * (4 + 8) + 16 + 24
PROGRAM_BYTES = 10**9


class Examples(NamedTuple):
    context: Tensor  # int32 [N, CONTEXT]; words before the paragraph are the word after the last one
    phrase: np.ndarray  # uint64 [N], a hash


def examples_of(text: Text, n_words: int) -> Examples:
    """One for every two neighbouring words of a paragraph."""
    words, paragraph = text.words.astype(np.int32), text.paragraph_of_word()
    n = max(len(words) - PHRASE + 1, 0)
    start = np.flatnonzero(paragraph[:n] == paragraph[len(words) - n :])
    before = start[:, None] - np.arange(CONTEXT, 0, -1)
    inside = (before >= 0) & (paragraph[before] == paragraph[start, None])
    phrase = np.zeros(len(start), np.uint64)
    for i in range(PHRASE):
        phrase = phrase * np.uint64(n_words) + words[start + i].astype(np.uint64)
    phrase ^= phrase >> np.uint64(29)
    return Examples(
        torch.from_numpy(np.where(inside, words[before], np.int32(n_words))),
        phrase * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32),
    )


def buckets(phrase: np.ndarray, classes: int) -> Tensor:
    """int64 [N]: all buckets are equally probable for a phrase."""
    return torch.from_numpy((phrase * np.uint64(classes) >> np.uint64(32)).astype(np.int64))


class Model(nn.Module):
    """Words in, a hidden vector out; the loss over the classes is its output layer."""

    def __init__(self, n_words: int, noise: nce_ext.noise.Noise) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_words + 1, DIM, sparse=True)
        self.layers = nn.Sequential(nn.Linear(CONTEXT * DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.output = nce_ext.NCELoss(DIM, noise.n_classes, noise, NEGATIVES, shared=True, sparse=True)

    def hidden(self, context: Tensor) -> Tensor:
        return self.layers(self.embedding(context).flatten(1))

    def forward(self, context: Tensor, target: Tensor) -> Tensor:
        return self.output(self.hidden(context), target)


class Training:
    """All that a checkpoint must bring back."""

    def __init__(self, n_words: int, train: Examples, classes: int, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.context, self.target, self.seed = train.context, buckets(train.phrase, classes), seed
        counts = torch.bincount(self.target, minlength=classes).float()
        noise = nce_ext.noise.Unigram(counts + SMOOTHING * len(self.target) / classes, power=1)
        self.model = Model(n_words, noise)
        self.parameters = list(self.model.parameters())
        self.optimizer = nce_ext.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.05, total_iters=steps)
        self.losses: list[float] = []
        self.norms: list[float] = []  # of the gradients before they were clipped
        self.held_out: list[float] = []
        self._order = (-1, np.empty(0, np.int64))

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Every epoch has an order of its own, so the number is all there is to know."""
        size = min(BATCH, len(self.target))
        epoch, within = divmod(number, len(self.target) // size)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.target))
        chosen = torch.from_numpy(self._order[1][within * size : (within + 1) * size])
        return self.context[chosen].long(), self.target[chosen]

    def step(self) -> None:
        self.optimizer.zero_grad()
        total = 0.0
        for i in range(ACCUMULATE):
            loss = self.model(*self.batch(len(self.losses) * ACCUMULATE + i)) / ACCUMULATE
            loss.backward()
            total += loss.item()
        norm = nce_ext.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(total)
        self.norms.append(norm.item())

    def more(self) -> dict[str, Any]:
        """What a checkpoint holds beside parameters and optimizer."""
        curves = [self.losses, self.norms, self.held_out]
        return {"scheduler": self.scheduler.state_dict(), "random": torch.get_rng_state(), "curves": curves}

    def restore(self, path: Path, saved: dict[str, Any]) -> None:
        more = _row_checkpoint.restore(path, saved, self.parameters, self.optimizer)
        self.scheduler.load_state_dict(more["scheduler"])
        self.losses, self.norms, self.held_out = more["curves"]
        torch.set_rng_state(more["random"])


def memory(name: str) -> int | None:
    """Bytes of VmRSS, the memory in use, or of VmHWM, its peak; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
    return None


def settle() -> None:
    """Give back the memory that the allocator keeps, and forget the peak: what comes now is seen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def require_memory(classes: int) -> None:
    needed = PROGRAM_BYTES + classes * BYTES_A_CLASS
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        if available < needed:
            sizes = f"{needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
            raise DataError(f"{classes:,} classes take {sizes}: give fewer --classes")


@torch.no_grad()
def held_out_loss(training: Training, examples: Examples, seed: int) -> float:
    """NCE loss on examples that are not trained on, against the same noise each time."""
    classes = training.model.output.n_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = zip(examples.context.split(BATCH), buckets(examples.phrase, classes).split(BATCH), strict=True)
        return float(np.mean([training.model(context.long(), target).item() for context, target in parts]))


@torch.no_grad()
def exact_nll(training: Training, examples: Examples) -> tuple[float, float]:
    """Mean negative log-likelihood over all classes, of the model and of the smoothed frequencies it started from.

    The rows have to be decayed as far as AdamW says before they are read as a whole.
    """
    training.optimizer.catch_up()
    output = training.model.output
    hidden, target = training.model.hidden(examples.context.long()), buckets(examples.phrase, output.n_classes)
    log_z = torch.full((len(target),), -torch.inf)
    for weight, bias in zip(output.weight.split(ROWS_AT_ONCE), output.bias.split(ROWS_AT_ONCE), strict=True):
        log_z = torch.logaddexp(log_z, F.linear(hidden, weight, bias).logsumexp(1))
    score = (hidden * output.weight[target]).sum(1) + output.bias[target]
    return (log_z - score).mean().item(), -output.noise.log_prob(target).mean().item()


class Result(NamedTuple):
    classes: int
    tables: int  # bytes of parameters and optimizer state
    set_up: float  # seconds, with the first step, which makes the optimizer's tables
    step: float  # median, in seconds
    extra: int | None  # bytes, at the peak of all steps, beside the tables and what the program had before
    checkpoint: str
    held_out: list[float]
    nll: tuple[float, float]
    losses: list[float]
    clipped: float  # share of the steps


def train(corpus: Corpus, train_on: Examples, held_out: Examples, classes: int, options: argparse.Namespace) -> Result:
    path, steps, seed = options.checkpoint, options.steps, options.seed
    settings = {
        "classes": classes, "steps": steps, "seed": seed, "text": corpus.sha256, "dim": DIM, "batch": BATCH,
        "accumulate": ACCUMULATE, "negatives": NEGATIVES, "max_norm": MAX_NORM, "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY, "smoothing": SMOOTHING,
    }  # fmt: skip
    saved = _row_checkpoint.read(path, settings) if path and path.exists() else None
    started = time.perf_counter()
    training = Training(len(corpus.vocabulary), train_on, classes, steps, seed)
    settle()
    before, parameters = memory("VmRSS"), sum(p.nbytes for p in training.parameters)
    checkpoint = ""
    if saved is not None:
        training.restore(path, saved)
        print(f"resumed from step {len(training.losses)} of {steps}: {path}", flush=True)
    else:
        training.held_out.append(held_out_loss(training, held_out, seed))
    set_up, times = time.perf_counter() - started, []
    first = len(training.losses)
    with progress(total=steps, initial=first, desc=f"V = {classes:,}", unit=" steps") as bar:
        while len(training.losses) < steps:
            started = time.perf_counter()
            training.step()
            times.append(time.perf_counter() - started)
            done = len(training.losses)
            if path and done % options.checkpoint_every == 0 and done < steps:
                started = time.perf_counter()
                _row_checkpoint.save(path, settings, training.parameters, training.optimizer, training.more())
                checkpoint = f"{path.stat().st_size / 1e6:,.0f} MB in {time.perf_counter() - started:.1f} s"
            bar.set_postfix(loss=f"{training.losses[-1]:.3f}", refresh=False)
            bar.update()
    peak = memory("VmHWM")
    tables = parameters + sum(t.nbytes for s in training.optimizer.state.values() for t in s.values() if is_table(t))
    extra = None if before is None or peak is None else peak - before - (tables - parameters)
    if options.log:
        curves = {"loss": training.losses, "norm": training.norms, "first": first}
        options.log.write_text(json.dumps({"classes": classes, **curves}))
    training.held_out.append(held_out_loss(training, held_out, seed))
    sample = np.linspace(0, len(held_out.phrase) - 1, min(EXACT, len(held_out.phrase)), dtype=np.int64)
    return Result(
        classes, tables, set_up + sum(times[:1]), float(np.median(times[WARM_UP:] or times or [0])), extra, checkpoint,
        training.held_out, exact_nll(training, Examples(held_out.context[sample], held_out.phrase[sample])),
        training.losses, float(np.mean(np.array(training.norms) > MAX_NORM)),
    )  # fmt: skip


def warm_up(n_words: int, train_on: Examples) -> None:
    """Load what the first steps load, so that it counts for no V."""
    training = Training(n_words, train_on, 100_000, WARM_UP, seed=0)
    for _ in range(WARM_UP):
        training.step()


def report(results: list[Result]) -> None:
    rows = {
        "tables (GB)": lambda r: f"{r.tables / 1e9:.2f}",
        "set-up and first step (s)": lambda r: f"{r.set_up:.1f}",
        "step, median (ms)": lambda r: f"{r.step * 1e3:.1f}",
        "memory beside the tables (MB)": lambda r: "not measured" if r.extra is None else f"{r.extra / 1e6:.0f}",
        "steps clipped": lambda r: f"{r.clipped:.0%}",
        "last checkpoint": lambda r: r.checkpoint,
        "held-out NCE loss, before": lambda r: f"{r.held_out[0]:.3f}",
        "held-out NCE loss, after": lambda r: f"{r.held_out[-1]:.3f}",
        "exact perplexity of frequencies": lambda r: f"{np.exp(r.nll[1]):,.0f}",
        "exact perplexity of the model": lambda r: f"{np.exp(r.nll[0]):,.0f}",
    }
    print(f"\n{'classes':32}" + "".join(f"{r.classes:>20,}" for r in results))
    for name, value in rows.items():
        cells = [value(r) for r in results]
        if any(cells):
            print(f"{name:32}" + "".join(f"{cell:>20}" for cell in cells))
    if len(results) > 1:
        print(f"step time, last to first: {results[-1].step / results[0].step:.2f}")


def draw(pyplot: ModuleType, path: Path, results: list[Result]) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for r in results:
        width = max(1, len(r.losses) // 50)
        means = np.convolve(r.losses, np.full(width, 1 / width), "valid")
        axes.plot(np.arange(len(means)) + width, means, label=f"V = {r.classes:,}, {r.step * 1e3:.0f} ms a step")
    axes.set(xlabel="steps", ylabel="NCE loss, running mean")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    result = parser(__doc__.partition("\n")[0])
    result.add_argument("--classes", type=at_least(int, 2), nargs="+", default=[200_000, 20_000_000], metavar="V")
    result.add_argument("--steps", type=at_least(int, 1), default=800, help="of the optimizer, for each V")
    result.add_argument("--corpus", default=None, metavar="FILE", help="UTF-8 text instead of the packaged dictionary")
    result.add_argument("--checkpoint", type=Path, default=None, metavar="FILE", help="go on from here if it exists")
    result.add_argument("--checkpoint-every", type=at_least(int, 1), default=200, metavar="STEPS", help="save so often")
    result.add_argument("--log", type=Path, default=None, metavar="FILE", help="write the loss of every step, as JSON")
    options = result.parse_args()
    if len(options.classes) > 1 and (options.checkpoint or options.log):
        result.error("--checkpoint and --log are of one run: give one number of --classes")
    return options


def main() -> None:
    options = parse()
    require_memory(max(options.classes))
    pyplot = prepare(options.output)
    if options.data is not None:
        sys.path.insert(0, str(options.data))  # the dictionary is looked for as a package
    try:
        corpus = load(options.corpus, min_count=5)
    except CorpusError as error:
        raise DataError(error) from None
    n_words = len(corpus.vocabulary)
    train_on, held_out = (examples_of(text, n_words) for text in (corpus.train, corpus.held_out))
    order = np.random.default_rng(options.seed).permutation(len(held_out.phrase))[:HELD_OUT]
    held_out = Examples(held_out.context[order], held_out.phrase[order])
    print(
        f"{corpus.name}: {len(train_on.phrase):,} phrases of {PHRASE} words to train on, "
        f"{len(np.unique(train_on.phrase)):,} different; {options.steps} steps of {ACCUMULATE} x {BATCH}",
        flush=True,
    )
    warm_up(n_words, train_on)
    results = [train(corpus, train_on, held_out, classes, options) for classes in options.classes]
    report(results)
    path = options.output / "large_vocabulary.png"
    draw(pyplot, path, results)
    print(f"written: {path}")


if __name__ == "__main__":
    run(main)
