"""The knowledge-graph example: WordNet in its own format, filtered ranks, scores, and a tiny run."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from load_example import load_example, run_example

pytest.importorskip("tqdm", reason="pip install -r requirements/demo.txt")
pytest.importorskip("matplotlib", reason="pip install -r requirements/demo.txt")


# wndb(5WN): offset, file, type, words in hexadecimal, (word, id)*, pointers, (symbol, offset, type, words)*, | gloss
WORDNET = {
    "noun": """  1 This line stands for the licence.
00000100 03 n 01 entity 0 001 ~ 00000200 n 0000 | all there is
00000200 05 n 02 house_cat 0 cat 1 003 @ 00000100 n 0000 + 00000100 v 0101 %p 00000300 n 0000 | purrs; "a | b"
00000300 05 n 0b tail 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k 0 001 #p 00000200 n 0000 | of a cat
""",
    "verb": """  1 This line stands for the licence.
00000100 29 v 01 purr 0 002 + 00000200 n 0101 + 00000200 n 0102 02 + 02 00 + 08 00 | as a cat does
""",
    "adj": """00000100 00 a 01 feline(a) 0 002 & 00000400 s 0000 \\ 00000200 n 0101 | of cats
00000400 00 s 01 catty 0 001 & 00000100 a 0000 | like cats
""",
    "adv": "00000100 02 r 01 felinely 0 000 | in the manner of cats\n",
}


@pytest.fixture(scope="module")
def kg() -> ModuleType:
    return load_example("knowledge_graph")


def write_wordnet(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"data.{name}").write_text(text)


def write_ring(folder: Path, n: int = 60) -> None:
    """Nouns on a ring: each has the next one as hypernym, the next but one as part, and a derived verb."""
    nouns, verbs = [], []
    for i in range(n):
        pointers = f"@ {(i + 1) % n:08} n 0000 %p {(i + 2) % n:08} n 0000 + {i:08} v 0101 ~ {(i - 1) % n:08} n 0000"
        nouns.append(f"{i:08} 03 n 01 noun_{i} 0 004 {pointers} | gloss\n")
        verbs.append(f"{i:08} 29 v 01 verb_{i} 0 001 + {i:08} n 0101 01 + 02 00 | gloss\n")
    write_wordnet(folder, {"noun": "".join(nouns), "verb": "".join(verbs), "adj": "", "adv": ""})


def test_wordnet_is_read_without_its_inverse_pointers(kg, tmp_path):
    write_wordnet(tmp_path, WORDNET)
    names, triples = kg.read_wordnet(tmp_path)
    assert names == [
        "entity (noun)", "house cat (noun)", "tail (noun)", "purr (verb)", "feline (adj)", "catty (adj)",
        "felinely (adv)",
    ]  # fmt: skip
    symbols = list(kg.RELATIONS)
    assert [(head, symbols[relation], tail) for head, relation, tail in triples] == sorted(
        [(1, "@", 0), (1, "%p", 2), (1, "+", 3), (4, "&", 5), (4, "\\", 1)],
        key=lambda triple: (triple[0], symbols.index(triple[1]), triple[2]),
    )


def test_wordnet_is_found_where_a_package_was_unpacked(kg, tmp_path):
    write_wordnet(tmp_path / "usr" / "share" / "wordnet", WORDNET)
    assert len(kg.read_wordnet(tmp_path)[1]) == 5


def test_split_keeps_pairs_together_and_held_out_entities_known(kg, tmp_path):
    write_ring(tmp_path)
    graph = kg.load(tmp_path, seed=3, held_out=10)
    parts = {name: getattr(graph, name).tolist() for name in ("train", "valid", "test")}
    assert len(parts["valid"]) == len(parts["test"]) == 10
    everything = [tuple(triple) for part in parts.values() for triple in part]
    assert len(everything) == len(set(everything)) == 180
    pairs = {name: {frozenset((head, tail)) for head, _, tail in part} for name, part in parts.items()}
    assert not pairs["train"] & (pairs["valid"] | pairs["test"])
    assert not pairs["valid"] & pairs["test"]
    known = {entity for head, _, tail in parts["train"] for entity in (head, tail)}
    assert known == set(range(len(graph.entities)))
    assert sorted(graph.entities) == sorted(f"{kind} {i} ({kind})" for kind in ("noun", "verb") for i in range(60))

    names = graph.entities
    for head, relation, tail in everything:
        a, b = (int(names[entity].split()[1]) for entity in (head, tail))
        assert (graph.relations[relation], (b - a) % 60) in {("hypernym", 1), ("has part", 2), ("derived form", 0)}


def test_two_triples_of_one_pair_are_never_parted(kg, tmp_path):
    lines = []
    for i in range(40):
        before, after = f"{(i - 1) % 40:08} n 0000", f"{(i + 1) % 40:08} n 0000"
        lines.append(f"{i:08} 03 n 01 word 0 003 @ {after} ^ {after} ^ {before} | gloss\n")
    write_wordnet(tmp_path, {"noun": "".join(lines), "verb": "", "adj": "", "adv": ""})
    graph = kg.load(tmp_path, seed=1, held_out=6)
    parts = [{frozenset(triple[::2]) for triple in part.tolist()} for part in (graph.train, graph.valid, graph.test)]
    assert [len(graph.valid), len(graph.test)] == [6, 6]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40


def test_questions_in_both_directions(kg, tmp_path):
    write_wordnet(tmp_path, WORDNET)
    graph = kg.load(tmp_path, seed=1, held_out=0)
    hypernym, derived = graph.relations.index("hypernym"), graph.relations.index("derived form")
    backwards = graph.relations.index("hypernym, backwards")
    assert graph.inverse[[hypernym, backwards, derived]].tolist() == [backwards, hypernym, derived]
    assert torch.equal(graph.inverse[graph.inverse], torch.arange(len(graph.relations)))
    triples = torch.tensor([[1, hypernym, 0], [1, derived, 3]])
    assert graph.queries(triples).tolist() == [*triples.tolist(), [0, backwards, 1], [3, derived, 1]]
    entity, cat = graph.entities.index("entity (noun)"), graph.entities.index("house cat (noun)")
    assert graph.answers()[cat, hypernym] == [entity]
    assert graph.answers()[entity, backwards] == [cat]
    assert "felinely (adv)" not in graph.entities


@pytest.mark.parametrize(
    ("scores", "target", "known", "rank"),
    [
        ([5, 4, 3, 2], 0, [0], 1),
        ([5, 4, 3, 2], 3, [3], 4),
        ([5, 4, 3, 2], 3, [0, 3, 1], 2),  # the two best are other right answers
        ([5, 4, 3, 2], 2, [3, 2], 3),
        ([1, 1, 1, 1], 1, [1], 2.5),
        ([1, 1, 1, 1], 1, [1, 0], 2),
        ([7, 1, 1, 0], 2, [2], 2.5),
        ([math.nan] * 4, 0, [0], 5),
        ([5, math.nan, 3, 2], 1, [1], 5),
    ],
)
def test_filtered_rank(kg, scores, target, known, rank):
    scores = torch.tensor([scores, [0.0, 1.0, 2.0, 3.0]], dtype=torch.float32)
    assert kg.filtered_ranks(scores, torch.tensor([target, 3]), [known, [3, 0]]).tolist() == [rank, 1]


def test_figures_of_ranks(kg):
    found = kg.figures(torch.tensor([1.0, 2.0, 2.5, 4.0, 10.0, 20.0]))
    assert found == pytest.approx(
        {"MRR": (1 + 1 / 2 + 1 / 2.5 + 1 / 4 + 1 / 10 + 1 / 20) / 6, "Hits@1": 1 / 6, "Hits@3": 3 / 6, "Hits@10": 5 / 6}
    )


def test_complex_scores_and_penalty(kg, monkeypatch):
    monkeypatch.setattr(kg, "HALF", 3)
    torch.manual_seed(0)
    loss_fn = SimpleNamespace(weight=torch.randn(5, 6, dtype=torch.float64))
    model = torch.nn.Module.__new__(kg.ComplEx)
    torch.nn.Module.__init__(model)
    model.n3, model.loss_fn, model.relations = 0.3, loss_fn, torch.nn.Embedding(4, 6, dtype=torch.float64)
    head, relation = torch.tensor([0, 2, 4]), torch.tensor([3, 1, 1])
    hidden, *factors = model.hidden(head, relation)

    def numbers(table: torch.Tensor) -> np.ndarray:
        table = table.detach().numpy()
        return table[:, :3] + 1j * table[:, 3:]

    entities = numbers(loss_fn.weight)
    h, r = entities[head], numbers(model.relations.weight)[relation]
    np.testing.assert_allclose(
        (hidden @ loss_fn.weight.T).detach(), ((h * r)[:, None] * entities.conj()).sum(-1).real, rtol=1e-12
    )
    model.loss_fn = lambda product, tail: 7 * (tail == torch.tensor([1, 1, 0])).all()
    model.hidden = lambda *_: (hidden, *factors)
    loss = model(torch.stack([head, relation, torch.tensor([1, 1, 0])], 1))
    cubes = sum((np.abs(x) ** 3).sum(1).mean() for x in (h, r))
    assert loss.item() == pytest.approx(7 + 0.3 * cubes, rel=1e-9)


def test_knowledge_graph_run(kg, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kg, "HELD_OUT", 10)
    write_ring(tmp_path / "data")
    run_example(kg, monkeypatch, "--data", tmp_path / "data", "--output", tmp_path / "out", "--seconds", "0.5")
    output = capsys.readouterr().out
    assert "120 entities, 160 triples to train on, 10 to test on" in output
    assert (tmp_path / "out" / "knowledge_graph.png").read_bytes().startswith(b"\x89PNG")
    for name in kg.losses(120):
        (row,) = (line for line in output.splitlines() if line[:27].strip() == name)
        epochs, mrr, *hits = map(float, row[27:].split())
        assert epochs > 0
        assert 1 / 120 <= mrr <= 1
        assert hits == sorted(hits)


def test_missing_wordnet_names_the_install_command(kg, nothing_installed, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_example(kg, monkeypatch, "--output", nothing_installed / "out")
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "knowledge_graph.py: error: data.noun is not installed: apt-get install wordnet-base (or give --data DIR)\n"
    )
