#!/usr/bin/env python
"""Word vectors by noise-contrastive estimation, compared with the full softmax given the same wall time.

``python examples/word2vec.py`` trains on the packaged dictionary, about five minutes on two cores;
``--corpus FILE`` takes any UTF-8 text in any script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from _corpus import DICTIONARY_PACKAGE, Batch, Corpus, CorpusError, Text, Windows, load
from _results import (
    UserError,
    draw_curves,
    load_checkpoint,
    nearest_neighbours,
    replacing,
    report,
    save_checkpoint,
    word_similarity,
    write_vectors,
)
from _words import TOKENS
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import nce_ext

LOSSES = ("nce", "negative-sampling", "full-softmax")
LEARNING_RATE = 0.2
FULL_SOFTMAX_BATCH = 128  # its logits stay in the cache: larger batches read fewer words a second, and make fewer steps
HELD_OUT_EXAMPLES = 20_000
CURVE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # parts of the training after which to evaluate
CURVE_SECONDS = (1, 2, 5, 10, 20, 40)  # and times, since a part of a long training is long in coming


class Interrupted(Exception):
    """Ctrl-C, noticed between two steps."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train word vectors with nce_ext, and compare NCE with the full softmax given the same wall time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, text: str, **options) -> None:
        parser.add_argument(name, help=text, **options)

    count, number = _at_least(int, 1), _at_least(float, 0)
    add("--corpus", f"UTF-8 text, paragraphs parted by blank lines; {DICTIONARY_PACKAGE} if not given", metavar="FILE")
    add("--tokens", "words: letters with their marks, in lower case; whitespace: what stands between spaces, as it is, "
        "for text that is tokenised already", choices=TOKENS, default="words")  # fmt: skip
    add("--architecture", "predict a word from its context, or the context from the word",
        choices=("cbow", "skipgram"), default="cbow")  # fmt: skip
    add("--loss", "what to train with; nce is followed by full-softmax for comparison", choices=LOSSES, default="nce")
    add("--no-comparison", "leave the comparison out", action="store_true")
    add("--dim", "size of the vectors", type=count, default=100)
    add("--window", "largest distance of a context word", type=count, default=5)
    add("--negatives", "noise words an example", type=count, default=10)
    add("--power", "noise is proportional to frequency ** power", type=number, default=1.0)
    add("--epochs", "passes over the text", type=count, default=8)
    add("--max-seconds", "stop the training early after this time; 0: never", type=number, default=150.0)
    add("--batch-size", f"predictions a step, about; {FULL_SOFTMAX_BATCH} at most for full-softmax",
        type=count, default=2048)  # fmt: skip
    add("--min-count", "leave out words seen less often", type=count, default=5)
    add("--subsample", "thin out context words above this frequency; 0: do not", type=number, default=1e-4)
    add("--seed", "of all that is random", type=_at_least(int, 0), default=1)
    add("--device", "cpu, cuda, cuda:1, ...", default="cpu")
    add("--output", "where results and checkpoint go", metavar="DIR", default="demo")
    add("--resume", "go on from the checkpoint that Ctrl-C left in --output", action="store_true")
    return parser.parse_args()


def _at_least(kind: type, low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


class FullSoftmax(nn.Linear):
    """nn.Linear and F.cross_entropy: what NCELoss replaces. The bias starts, as there, at the log frequencies."""

    def __init__(self, dim: int, frequencies: np.ndarray) -> None:
        super().__init__(dim, len(frequencies))
        with torch.no_grad():
            self.bias.copy_(torch.from_numpy(np.log(frequencies)))

    def forward(self, hidden: Tensor, target: Tensor, *, seed: Tensor | None = None) -> Tensor:
        return F.cross_entropy(super().forward(hidden), target)


class WordModel(nn.Module):
    """The mean of input vectors, and an output layer with its loss."""

    def __init__(self, loss: str, frequencies: np.ndarray, options: argparse.Namespace) -> None:
        super().__init__()
        n_words, sampled = len(frequencies), loss != "full-softmax"
        self.embedding = nn.Embedding(n_words, options.dim, sparse=True)
        if sampled:
            kind = nce_ext.NCELoss if loss == "nce" else nce_ext.NegativeSamplingLoss
            noise = nce_ext.noise.Unigram(frequencies, options.power)
            self.output = kind(options.dim, n_words, noise, options.negatives, sparse=True)
        else:
            self.output = FullSoftmax(options.dim, frequencies)
        nn.init.uniform_(self.embedding.weight, -0.5 / options.dim, 0.5 / options.dim)
        nn.init.zeros_(self.output.weight)  # so the first predictions are the bias

    def hidden(self, batch: Batch) -> Tensor:
        return F.embedding_bag(batch.members, self.embedding(batch.words), batch.offsets, mode="mean")

    def forward(self, batch: Batch, seed: Tensor) -> Tensor:
        return self.output(self.hidden(batch), batch.targets, seed=seed)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adagrad for the input and for the output.

        The full softmax moves every row on every step. Without a start above 0 the accumulators would make the first
        of these tiny gradients, mostly of words that did not occur, as large a step as any: it then ends worse.
        """
        dense = isinstance(self.output, FullSoftmax)
        options = {"initial_accumulator_value": 1e-5, "fused": True} if dense else {}
        return [
            torch.optim.Adagrad(self.embedding.parameters(), lr=LEARNING_RATE),
            torch.optim.Adagrad(self.output.parameters(), lr=LEARNING_RATE, **options),
        ]


class Training:
    """A model on its way.

    Step number n is a function of the parameters, n and --seed alone, so a checkpoint needs no random state.
    """

    def __init__(self, loss: str, corpus: Corpus, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.loss, self.corpus, self.options = loss, corpus, options
        self.device = torch.device(options.device)
        self.skip_gram = options.architecture == "skipgram"

        frequencies = corpus.counts / corpus.counts.sum()
        self.keep = np.minimum(1, np.sqrt(options.subsample / frequencies)) if options.subsample else None
        if self.skip_gram and self.keep is not None:
            frequencies = frequencies * self.keep  # there the targets are the thinned-out words
        self.model = WordModel(loss, frequencies / frequencies.sum(), options).to(self.device)
        self.optimizers = self.model.optimizers()

        examples = min(options.batch_size, FULL_SOFTMAX_BATCH) if loss == "full-softmax" else options.batch_size
        self.words_a_step = max(1, examples // (options.window + 1)) if self.skip_gram else examples
        self.steps_an_epoch = -(-len(corpus.train.words) // self.words_a_step)
        held_out = HELD_OUT_EXAMPLES // (2 * options.window) if self.skip_gram else HELD_OUT_EXAMPLES
        self.held_out = self._windows(corpus.held_out, 0).batch(0, held_out, cut=False).to(self.device)
        if not len(self.held_out.targets):
            why = "subsampling left" if self.keep is not None else "there is"
            advice = " (--subsample 0 keeps all words)" if self.keep is not None else ""
            raise CorpusError(f"{corpus.name} is too small: {why} no context word beside a held-out one{advice}")

        self.step, self.words, self.seconds, self.done = 0, 0, 0.0, False
        self.curve: list[tuple[float, float]] = []  # (seconds, held-out NLL)

    def _windows(self, text: Text, epoch: int) -> Windows:
        return Windows(text, self.keep, self.options.window, self.skip_gram, (self.options.seed, epoch))

    def state_dict(self) -> dict:
        progress = {name: getattr(self, name) for name in ("step", "words", "seconds", "done", "curve")}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"model": self.model.state_dict(), "optimizers": optimizers, "progress": progress}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        vars(self).update(state["progress"])

    def run(self, interrupted: Callable[[], bool], by_clock: float | None = None) -> None:
        """Train for --epochs, or for ``by_clock`` seconds; the learning rate falls to 0 over them.

        The seconds are those of training: evaluation and the progress bar do not count.
        """
        n_steps = self.options.epochs * self.steps_an_epoch
        n_words = None if by_clock else self.options.epochs * len(self.corpus.train.words)
        bar = tqdm(desc=self.loss, total=n_words, initial=self.words, unit="word", unit_scale=True, mininterval=0.5)
        epoch = mean_loss = None
        with bar:
            if not self.curve:
                self.curve.append((0.0, self.held_out_nll()))
            while not self.done:
                if interrupted():
                    raise Interrupted
                seconds_before, progress_before = self.seconds, self._progress(by_clock)
                started = time.perf_counter()
                if epoch != self.step // self.steps_an_epoch:
                    epoch = self.step // self.steps_an_epoch
                    windows = self._windows(self.corpus.train, epoch)
                loss, words = self.train_step(windows, LEARNING_RATE * (1 - min(1.0, progress_before)))
                self.words += words
                self.seconds += time.perf_counter() - started

                progress = self._progress(by_clock)
                self.done = progress >= 1 or (by_clock is None and 0 < self.options.max_seconds <= self.seconds)
                mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
                bar.set_postfix(loss=f"{mean_loss:.3f}", held_out=f"{self.curve[-1][1]:.3f}", refresh=False)
                bar.update(words)
                due = any(progress_before < part <= progress for part in CURVE)
                due |= any(seconds_before < seconds <= self.seconds for seconds in CURVE_SECONDS)
                if self.done or due:
                    self.curve.append((self.seconds, self.held_out_nll()))
            if interrupted():
                raise Interrupted
        if by_clock is None and self.step < n_steps:
            print(f"{self.loss}: --max-seconds ended the training after {self.step / n_steps:.0%} of its steps")

    def _progress(self, by_clock: float | None) -> float:
        """The part of the training that is behind: of its steps, or of ``by_clock`` seconds."""
        return self.seconds / by_clock if by_clock else self.step / (self.options.epochs * self.steps_an_epoch)

    def train_step(self, windows: Windows, learning_rate: float) -> tuple[float, int]:
        """The loss, and the number of words read."""
        batch = windows.batch(self.step % self.steps_an_epoch * self.words_a_step, self.words_a_step).to(self.device)
        seed = torch.tensor([self.options.seed, self.step], device=self.device)
        self.step += 1
        if not len(batch.targets):
            return 0.0, batch.n_positions
        self.model.zero_grad()
        loss = self.model(batch, seed)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
        return loss.item(), batch.n_positions

    @torch.no_grad()
    def held_out_nll(self) -> float:
        return nce_ext.evaluate.nll(self.model.output, self.model.hidden(self.held_out), self.held_out.targets).item()

    @torch.no_grad()
    def log_z(self) -> Tensor:
        """The log of the sum of exponential scores of all words, for each held-out context."""
        layer = self.model.output
        chunks = self.model.hidden(self.held_out).split(max(1, 2**24 // len(layer.weight)))
        return torch.cat([torch.logsumexp(F.linear(chunk, layer.weight, layer.bias), 1) for chunk in chunks])

    def vectors(self) -> Tensor:
        return self.model.embedding.weight.detach().cpu()

    def figures(self) -> dict:
        log_z, nll = self.log_z(), self.curve[-1][1]
        return {
            "words": self.words,
            "epochs": self.step / self.steps_an_epoch,
            "seconds": self.seconds,
            "words_per_second": self.words / self.seconds,
            "seconds_per_million_words": 1e6 * self.seconds / self.words,
            "held_out_nll": nll,
            "held_out_perplexity": math.exp(nll),
            "log_z_mean": log_z.mean().item(),
            "log_z_std": log_z.std(correction=0).item(),
            "wordsim353": word_similarity(self.vectors(), self.corpus.vocabulary),
            "curve": self.curve,
        }


@contextlib.contextmanager
def noticing_interrupts() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only sets a flag, so that no step is cut in half; the second acts at once."""
    seen = False

    def notice(number: int, frame: object) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, notice)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    trainings: dict[str, Training], names: list[str], corpus: Corpus, options: argparse.Namespace, saved: dict
) -> None:
    """Fill ``trainings``: the first model for --epochs, the second for as many seconds as that took."""
    with noticing_interrupts() as interrupted:
        for name in names:
            training = Training(name, corpus, options)
            if name in saved:
                training.load_state_dict(saved[name])
            trainings[name] = training
            training.run(interrupted, by_clock=None if name == names[0] else trainings[names[0]].seconds)


def finish(trainings: dict[str, Training], corpus: Corpus, options: argparse.Namespace, output: Path) -> None:
    """Measure, print and write."""
    training = trainings[options.loss]
    results = {
        "options": {name: value for name, value in vars(options).items() if name != "resume"},
        "build": nce_ext.build_info(),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "words": corpus.n_words,
            "types": corpus.n_types,
            "characters": corpus.n_characters,
            "characters_left_out": corpus.n_left_out,
            "vocabulary": len(corpus.vocabulary),
            "train_words": len(corpus.train.words),
            "held_out_words": len(corpus.held_out.words),
            "held_out_examples": len(training.held_out.targets),
        },
        "runs": {name: training.figures() for name, training in trainings.items()},
        "neighbours": nearest_neighbours(training.vectors(), corpus.vocabulary),
    }
    report(results)
    write_vectors(output / "vectors.txt", training.vectors(), corpus.vocabulary)
    draw_curves(output / "held_out_nll.png", results["runs"])
    with replacing(output / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {output}: results.json, held_out_nll.png, vectors.txt")


def run(options: argparse.Namespace) -> None:
    output = Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        torch.empty(0, device=options.device)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from None
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use --device {options.device}: {str(error).splitlines()[0]}") from None

    corpus = load(options.corpus, options.min_count, options.tokens)
    checkpoint = output / "checkpoint.pt"
    identity = {name: value for name, value in vars(options).items() if name not in ("output", "resume", "corpus")}
    identity["text"] = corpus.sha256
    saved = load_checkpoint(checkpoint, identity) if options.resume else {}
    print(corpus.describe(), flush=True)
    compare = options.loss == "nce" and not options.no_comparison
    names = [options.loss, "full-softmax"] if compare else [options.loss]
    trainings: dict[str, Training] = {}
    try:
        train(trainings, names, corpus, options, saved)
        finish(trainings, corpus, options, output)
    except (Interrupted, KeyboardInterrupt) as stop:
        between_steps = isinstance(stop, Interrupted) or all(
            name in trainings and trainings[name].done for name in names
        )
        if not between_steps:
            raise
        states = saved | {name: training.state_dict() for name, training in trainings.items()}
        save_checkpoint(checkpoint, identity, states)
        print(f"interrupted: saved {checkpoint}; --resume goes on from there", file=sys.stderr)
        raise Interrupted from None
    checkpoint.unlink(missing_ok=True)


def main() -> int:
    options = parse_arguments()
    for stream in (sys.stdout, sys.stderr):  # of a terminal that lacks a word's letters
        stream.reconfigure(errors="backslashreplace")
    try:
        run(options)
    except (CorpusError, UserError) as error:
        print(f"word2vec.py: error: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        return 130
    except KeyboardInterrupt:
        print("interrupted: nothing saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
