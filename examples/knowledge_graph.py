#!/usr/bin/env python
"""Link prediction on WordNet: one ComplEx model, trained by four losses for the same time.

``python examples/knowledge_graph.py`` takes about three minutes on two cores. Asked for (dog, hypernym, ?), the model
ranks all entities; the score of t is <hidden, entities[t]>, so the table of entities is the output layer of the loss.
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from _data import find_file, parser, prepare, progress, run
from torch import Tensor, nn
from torch.nn import functional as F

import nce_ext

# The pointers of wndb(5WN), less those that only say another one backwards: hyponym, holonym, domain member.
RELATIONS = {
    "@": "hypernym", "@i": "instance of", "%m": "has member", "%p": "has part", "%s": "has substance", ";c": "topic",
    ";r": "region", ";u": "usage", "\\": "pertains to", "<": "participle of", "*": "entails", ">": "causes",
    "^": "see also", "!": "antonym", "&": "similar to", "$": "verb group", "+": "derived form", "=": "attribute",
}  # fmt: skip
SYMMETRIC = ("!", "&", "$", "+", "=")
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "s": "data.adj", "r": "data.adv"}

HALF = 64  # complex numbers a vector
BATCH = 512
NEGATIVES = 256
LEARNING_RATE = 0.2
HELD_OUT = 2500  # triples to validate on, and as many to test on
VALIDATIONS = 6
VALIDATION_QUESTIONS = 500


@dataclass(frozen=True)
class Graph:
    """Triples of ids. Relation r read backwards is relation inverse[r], which is r itself where r is symmetric."""

    entities: list[str]
    relations: list[str]
    inverse: Tensor
    train: Tensor  # [N, 3]: head, relation, tail
    valid: Tensor
    test: Tensor

    def queries(self, triples: Tensor) -> Tensor:
        """Each triple as two questions: (head, relation, ?) and (tail, inverse relation, ?)."""
        head, relation, tail = triples.T
        return torch.cat([triples, torch.stack([tail, self.inverse[relation], head], 1)])

    def answers(self) -> dict[tuple[int, int], list[int]]:
        """All that is known to answer (head, relation, ?), in any of the three parts."""
        known = defaultdict(list)
        for head, relation, tail in self.queries(torch.cat([self.train, self.valid, self.test])).tolist():
            known[head, relation].append(tail)
        return known


def read_wordnet(data: Path | None) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names of the synsets, and triples (synset, relation, synset), a symmetric relation in one direction only."""
    ids: dict[tuple[str, int], int] = {}
    names: list[str] = []
    pointers: list[tuple[int, str, tuple[str, int]]] = []
    for name in dict.fromkeys(FILES.values()):
        path = find_file(name, "apt-get install wordnet-base", data=data, system="wordnet")
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("  "):
                    continue  # the licence
                field = line.partition(" | ")[0].split()
                synset = ids[name, int(field[0])] = len(names)
                names.append(f"{field[4].partition('(')[0].replace('_', ' ')} ({name.removeprefix('data.')})")
                first = 4 + 2 * int(field[3], 16)  # the words come in pairs, their number in hexadecimal
                for i in range(first + 1, first + 1 + 4 * int(field[first]), 4):
                    if field[i] in RELATIONS:
                        pointers.append((synset, field[i], (FILES[field[i + 2]], int(field[i + 1]))))
    triples = set()
    order = {symbol: relation for relation, symbol in enumerate(RELATIONS)}
    for head, symbol, target in pointers:
        tail = ids[target]
        if symbol in SYMMETRIC and tail < head:
            head, tail = tail, head
        triples.add((head, order[symbol], tail))
    return names, sorted(triples)


def load(data: Path | None, seed: int, held_out: int) -> Graph:
    """WordNet, split at random.

    Two triples that join the same two entities, in whatever direction and by whatever relations, are never parted: the
    one would give the other away. Only triples are held out whose entities both keep a triple in the training part.
    """
    names, triples = read_wordnet(data)
    pairs = defaultdict(list)
    for head, relation, tail in triples:
        pairs[min(head, tail), max(head, tail)].append((head, relation, tail))
    degree = np.bincount([entity for pair in pairs for entity in pair], minlength=len(names))
    parts: dict[str, list[tuple[int, int, int]]] = {"valid": [], "test": [], "train": []}
    ordered = list(pairs)
    for i in np.random.default_rng(seed).permutation(len(ordered)):
        pair = list(ordered[i])
        part = next((part for part in ("valid", "test") if len(parts[part]) < held_out), "train")
        if degree[pair].min() < 2:
            part = "train"
        degree[pair] -= part != "train"
        parts[part] += pairs[ordered[i]]

    appear = np.flatnonzero(degree)
    new_id = torch.full((len(names),), -1)
    new_id[appear] = torch.arange(len(appear))
    tensors = {part: torch.tensor(triples, dtype=torch.int64).view(-1, 3) for part, triples in parts.items()}
    for triples_of_part in tensors.values():
        triples_of_part[:, [0, 2]] = new_id[triples_of_part[:, [0, 2]]]
    one_way = [relation for relation, symbol in enumerate(RELATIONS) if symbol not in SYMMETRIC]
    inverse = torch.arange(len(RELATIONS) + len(one_way))
    inverse[one_way] = torch.arange(len(RELATIONS), len(inverse))
    inverse[len(RELATIONS) :] = torch.tensor(one_way)
    relations = [*RELATIONS.values(), *(f"{list(RELATIONS.values())[relation]}, backwards" for relation in one_way)]
    return Graph([names[i] for i in appear], relations, inverse, **tensors)


class ComplEx(nn.Module):
    """score(h, r, t) = Re(sum h r conj(t)), in complex numbers (Trouillon et al., ICML 2016).

    In real ones: <hidden, t>, where hidden is the product h r, and every vector holds real parts, then imaginary ones.
    """

    def __init__(self, n_relations: int, loss_fn: nn.Module, n3: float) -> None:
        super().__init__()
        self.n3 = n3  # weight of the penalty
        self.loss_fn = loss_fn  # its weight is the table of entities, which serves the heads as well
        self.relations = nn.Embedding(n_relations, loss_fn.weight.shape[1])

    def hidden(self, head: Tensor, relation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The product, and its two factors."""
        h, r = F.embedding(head, self.loss_fn.weight, sparse=True), self.relations(relation)
        (a, b), (c, d) = h.chunk(2, 1), r.chunk(2, 1)
        return torch.cat([a * c - b * d, a * d + b * c], 1), h, r

    def forward(self, queries: Tensor) -> Tensor:
        """The loss, and the nuclear 3-norm, without which the model learns by heart (Lacroix et al., ICML 2018).

        As each triple is asked in both directions, the norm of the heads is that of all entities.
        """
        head, relation, tail = queries.T
        product, *factors = self.hidden(head, relation)
        cubes = [(x[:, :HALF].square() + x[:, HALF:].square() + 1e-12).pow(1.5).sum(1).mean() for x in factors]
        return self.loss_fn(product, tail) + self.n3 * sum(cubes)


def losses(n_entities: int) -> dict[str, tuple[nn.Module, float]]:
    """Four losses, and the penalty's weight that did best, of a few, on the validation triples.

    All see the same noise: one set of NEGATIVES entities for a batch, each as likely as any other.

    At scores of 0 the k negatives of plain negative sampling pull k times as hard as the target. With the margin
    log(1/k) they balance; those of self-adversarial sampling and of the softmax have weights that sum to 1, and do so.
    """
    options = (2 * HALF, n_entities, nce_ext.noise.Uniform(n_entities), NEGATIVES)
    common = {"bias": False, "shared": True, "sparse": True}
    sampling = functools.partial(nce_ext.NegativeSamplingLoss, *options, remove_hits=True, **common)
    return {
        "sampled softmax": (nce_ext.SampledSoftmaxLoss(*options, **common), 0.2),
        "self-adversarial sampling": (sampling(adversarial_temperature=1.0), 0.1),
        "negative sampling, margin": (sampling(margin=-math.log(NEGATIVES)), 0.2),
        "negative sampling": (sampling(), 0.1),
    }


def filtered_ranks(scores: Tensor, target: Tensor, known: list[list[int]]) -> Tensor:
    """Rank, from 1, of each row's target among all entities but the other right answers; ties share their mean rank.

    ``known`` lists each row's right answers. Overwrites ``scores`` [B, V].
    """
    own = scores.gather(1, target[:, None])
    rows = torch.repeat_interleave(torch.arange(len(known)), torch.tensor([len(answers) for answers in known]))
    scores[rows, torch.tensor([answer for answers in known for answer in answers], dtype=torch.int64)] = -torch.inf
    scores.scatter_(1, target[:, None], -torch.inf)
    below, equal = (scores < own).sum(1), (scores == own).sum(1)
    return 1 + scores.shape[1] - below - equal / 2  # counted from below, so that a NaN is last and not first


def figures(ranks: Tensor) -> dict[str, float]:
    """Mean reciprocal rank, and the share of ranks up to 1, 3 and 10."""
    return {"MRR": (1 / ranks).mean().item()} | {f"Hits@{n}": (ranks <= n).float().mean().item() for n in (1, 3, 10)}


@torch.no_grad()
def evaluate(model: ComplEx, queries: Tensor, answers: dict[tuple[int, int], list[int]]) -> Tensor:
    """Filtered ranks of the tails, 128 questions at a time."""
    ranks = []
    for head, relation, tail in (chunk.T for chunk in queries.split(128)):
        scores = model.loss_fn.logits(model.hidden(head, relation)[0])
        known = [answers[question] for question in zip(head.tolist(), relation.tolist(), strict=True)]
        ranks.append(filtered_ranks(scores, tail, known))
    return torch.cat(ranks)


def mean_reciprocal_rank(model: ComplEx, queries: Tensor, answers: dict[tuple[int, int], list[int]]) -> float:
    return figures(evaluate(model, queries, answers))["MRR"]


def batches(queries: Tensor) -> Iterator[Tensor]:
    while True:
        yield from queries[torch.randperm(len(queries))].split(BATCH)


def train(name: str, model: ComplEx, graph: Graph, seconds: float, validate: Callable[[], float]) -> dict:
    """Train for so many seconds, in which the learning rate falls to 0; validation does not count."""
    optimizer = torch.optim.Adagrad(model.parameters(), lr=LEARNING_RATE)
    queries = graph.queries(graph.train)
    elapsed, read, curve = 0.0, 0, [(0.0, validate())]
    with progress(desc=name, total=seconds, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}") as bar:
        for batch in batches(queries):
            started = time.perf_counter()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - elapsed / seconds)
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            optimizer.step()
            spent = time.perf_counter() - started
            elapsed, read = elapsed + spent, read + len(batch)
            bar.update(min(spent, seconds - bar.n))
            if elapsed >= min(seconds, seconds * len(curve) / VALIDATIONS):
                curve.append((elapsed, validate()))
                bar.set_postfix(loss=f"{loss.item():.3f}", MRR=f"{curve[-1][1]:.3f}")
            if elapsed >= seconds:
                break
    return {"curve": curve, "epochs": read / len(queries)}


@torch.no_grad()
def show_answers(model: ComplEx, graph: Graph, queries: Tensor, answers: dict[tuple[int, int], list[int]]) -> None:
    """The three entities that the model finds most likely, those left out that are known from the training part."""
    scores = model.loss_fn.logits(model.hidden(queries[:, 0], queries[:, 1])[0])
    for row, (head, relation, tail) in zip(scores, queries.tolist(), strict=True):
        row[[answer for answer in answers[head, relation] if answer != tail]] = -torch.inf
        best = [f"*{graph.entities[i]}*" if i == tail else graph.entities[i] for i in row.topk(3).indices.tolist()]
        print(f"  {graph.entities[head]}, {graph.relations[relation]}: {', '.join(best)}")


def draw(pyplot: ModuleType, path: Path, runs: dict[str, dict]) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, result in runs.items():
        axes.plot(*zip(*result["curve"], strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="training time (s)", ylabel="validation MRR, filtered", title="WordNet link prediction by ComplEx")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__.partition("\n")[0], seconds=30).parse_args()
    pyplot = prepare(options.output)
    graph = load(options.data, options.seed, HELD_OUT)
    answers, validation, test = graph.answers(), graph.queries(graph.valid), graph.queries(graph.test)
    validation = validation[:: max(len(validation) // VALIDATION_QUESTIONS, 1)]
    print(
        f"WordNet: {len(graph.entities):,} entities, {len(graph.train):,} triples to train on, {len(graph.test):,} to "
        f"test on, each asked for its head and for its tail",
        flush=True,
    )
    runs, models = {}, {}
    for name, (loss_fn, n3) in losses(len(graph.entities)).items():
        torch.manual_seed(options.seed)
        loss_fn.reset_parameters()
        model = models[name] = ComplEx(len(graph.inverse), loss_fn, n3)
        validate = functools.partial(mean_reciprocal_rank, model, validation, answers)
        runs[name] = train(name, model, graph, options.seconds, validate)
        runs[name] |= figures(evaluate(model, test, answers))

    columns = ("MRR", "Hits@1", "Hits@3", "Hits@10")
    print(f"\n{'loss':<27}{'epochs':>8}" + "".join(f"{column:>10}" for column in columns))
    for name, result in runs.items():
        print(f"{name:<27}{result['epochs']:>8.1f}" + "".join(f"{result[column]:>10.3f}" for column in columns))
    print("filtered; a split of our own, harder than WN18RR's: two triples of one pair of entities are never parted")
    best = max(runs, key=lambda name: runs[name]["MRR"])
    print(f"\nsome test questions, answered by {best} (the right answer between asterisks)")
    show_answers(models[best], graph, test[torch.randperm(len(test))[:8]], answers)
    path = options.output / "knowledge_graph.png"
    draw(pyplot, path, runs)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run(main)
