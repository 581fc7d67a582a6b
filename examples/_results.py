"""What a run leaves behind: figures about the vectors, the files, the checkpoint."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS_OF = ("water", "music", "king", "horse", "money", "sun", "bread", "ship")


class UserError(Exception):
    """Something the user can put right; the message is one line."""


def word_similarity(vectors: Tensor, vocabulary: list[str]) -> dict:
    """Spearman correlation of cosines with the human judgements of WordSim-353."""
    spec = importlib.util.find_spec("gensim")
    if not spec or not spec.origin:
        return {"spearman": None, "pairs": 0, "why": "gensim, which brings the word pairs, is not installed"}
    from scipy.stats import spearmanr

    path = Path(spec.origin).parent / "test" / "test_data" / "wordsim353.tsv"
    with path.open(encoding="utf-8") as lines:
        rows = [row for row in csv.reader(lines, delimiter="\t") if not row[0].startswith("#")]
    index = {word: i for i, word in enumerate(vocabulary)}
    pairs = [(index.get(a.lower()), index.get(b.lower()), float(judgement)) for a, b, judgement, *_ in rows]
    pairs = [pair for pair in pairs if None not in pair]
    if len(pairs) < 3:
        return {"spearman": None, "pairs": len(pairs), "why": "too few of its words are in the vocabulary"}
    left, right, human = zip(*pairs, strict=True)
    cosine = F.cosine_similarity(vectors[list(left)], vectors[list(right)])
    spearman = float(spearmanr(cosine, human).statistic)
    if math.isnan(spearman):
        return {"spearman": None, "pairs": len(pairs), "why": "all cosines are equal"}
    return {"spearman": spearman, "pairs": len(pairs), "why": None}


def nearest_neighbours(vectors: Tensor, vocabulary: list[str], n: int = 6) -> dict[str, list[str]]:
    """Neighbours of eight words: the listed ones that the text has, then its own words of middling frequency."""
    index = {word: i for i, word in enumerate(vocabulary)}
    asked = [word for word in NEIGHBOURS_OF if word in index]
    asked += [word for word in vocabulary[min(100, len(vocabulary) // 2) :] if word not in asked]
    unit = F.normalize(vectors, dim=1)
    result = {}
    for word in asked[: len(NEIGHBOURS_OF)]:
        cosine = unit @ unit[index[word]]
        cosine[index[word]] = -math.inf
        result[word] = [vocabulary[i] for i in cosine.topk(min(n, len(vocabulary) - 1)).indices.tolist()]
    return result


def report(results: dict) -> None:
    for name, run in results["runs"].items():
        similarity = run["wordsim353"]
        spearman = (
            f"not measured: {similarity['why']}"
            if similarity["spearman"] is None
            else f"{similarity['spearman']:.3f} on {similarity['pairs']} pairs"
        )
        print(
            f"\n{name}: {run['words']:,} words in {run['seconds']:.1f} s, {run['words_per_second']:,.0f} words/s, "
            f"{run['seconds_per_million_words']:.2f} s per 1M words\n"
            f"  held-out negative log-likelihood {run['held_out_nll']:.4f} nats, "
            f"perplexity {run['held_out_perplexity']:.1f}\n"
            f"  log Z {run['log_z_mean']:+.3f} on average, spread {run['log_z_std']:.3f}\n"
            f"  WordSim-353 Spearman {spearman}"
        )
    print(f"\nnearest neighbours ({results['options']['loss']})")
    for word, neighbours in results["neighbours"].items():
        print(f"  {word:>10}: {', '.join(neighbours)}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when all is written: no half-written file is ever seen."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_vectors(path: Path, vectors: Tensor, vocabulary: list[str]) -> None:
    """word2vec's text format."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f"{len(vocabulary)} {vectors.shape[1]}\n")
        for word, vector in zip(vocabulary, vectors.tolist(), strict=True):
            file.write(f"{word} {' '.join(map('{:.6g}'.format, vector))}\n")


def draw_curves(path: Path, runs: dict[str, dict]) -> None:
    """Held-out NLL over training time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, run in runs.items():
        label = f"{name}: {run['words_per_second']:,.0f} words/s, perplexity {run['held_out_perplexity']:.0f}"
        axes.plot(*zip(*run["curve"], strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="training time (s)", ylabel="held-out negative log-likelihood (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


def save_checkpoint(path: Path, identity: dict, trainings: dict[str, dict]) -> None:
    with replacing(path) as temporary:
        torch.save({"identity": identity, "trainings": trainings}, temporary)


def load_checkpoint(path: Path, identity: dict) -> dict[str, dict]:
    """The states of the trainings, if ``identity`` (options and text) is that of the checkpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, trainings = state["identity"], state["trainings"]
    except FileNotFoundError:
        raise UserError(f"there is nothing to resume: {path} does not exist") from None
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this program ({type(error).__name__})") from None
    changed = [f"{key} was {found.get(key)}, now {value}" for key, value in identity.items() if found.get(key) != value]
    if changed:
        raise UserError(f"{path} belongs to a run with other options: {'; '.join(changed)}")
    return trainings
