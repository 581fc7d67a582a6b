"""The knowledge-graph and contrastive examples: loaders on small files in the real formats, metrics, tiny runs."""

from __future__ import annotations

import gzip
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from load_example import load_example

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


@pytest.fixture(scope="module")
def con() -> ModuleType:
    return load_example("contrastive")


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch) -> Path:
    """An empty folder; neither Debian's data nor scikit-learn can be found."""
    monkeypatch.setattr(load_example("_data"), "SYSTEM", tmp_path / "usr-share")
    for name in ("sklearn", "sklearn.datasets"):  # another test may have imported the second
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """As ``python examples/NAME.py ARGUMENTS`` does."""
    monkeypatch.setattr(sys, "argv", [example.__file__, *map(str, arguments)])
    example.run(example.main)


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


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_pictures(folder: Path, n: int = 60) -> np.ndarray:
    """Pictures of two classes, with a bright upper or lower half; returns the training pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 100, (2, n, 28, 28))
    labels = np.arange(2 * n).reshape(2, n) % 2
    pictures[:, 0::2, :14] += 150
    pictures[:, 1::2, 14:] += 150
    for part, images, classes in zip(("train", "t10k"), pictures, labels, strict=True):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", classes)
    return pictures[0]


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
    run(kg, monkeypatch, "--data", tmp_path / "data", "--output", tmp_path / "out", "--seconds", "0.5")
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
        run(kg, monkeypatch, "--output", nothing_installed / "out")
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "knowledge_graph.py: error: data.noun is not installed: apt-get install wordnet-base (or give --data DIR)\n"
    )


def test_idx_files_are_read(con, tmp_path):
    for shape in ((3, 4, 5), (7,), (0,)):
        array = np.random.default_rng(0).integers(0, 256, shape)
        write_idx(tmp_path / "array.gz", array)
        found = con.read_idx(tmp_path / "array.gz")
        assert found.dtype == torch.uint8
        assert np.array_equal(found, array)


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b""), gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc")])
def test_broken_idx_file_is_named(con, tmp_path, content):
    path = tmp_path / "array.gz"
    path.write_bytes(content)
    with pytest.raises(con.DataError, match=r"array\.gz is not a gzipped IDX file"):
        con.read_idx(path)


def test_fashion_mnist_is_loaded(con, tmp_path, monkeypatch):
    monkeypatch.setattr(con, "PICTURES", 50)
    written = write_pictures(tmp_path / "usr" / "share" / "datasets" / "fashion-mnist")
    pictures = con.load(tmp_path, seed=1)
    assert pictures.name == "Fashion-MNIST"
    assert pictures.train.shape == (50, 1, 28, 28)
    assert pictures.test.shape == (60, 1, 28, 28)
    rows = {row.tobytes(): i % 2 for i, row in enumerate((written / 255).astype(np.float32))}
    found = [rows[picture.numpy().tobytes()] for picture in pictures.train[:, 0]]
    assert found == pictures.train_labels.tolist()
    assert not torch.equal(pictures.train, con.load(tmp_path, seed=2).train)


def test_digits_stand_in(con, nothing_installed, monkeypatch):
    digits = SimpleNamespace(images=np.full((700, 8, 8), 16.0), target=np.arange(700) % 10)
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", SimpleNamespace(load_digits=lambda: digits))
    pictures = con.load(None, seed=1)
    assert pictures.name == "digits"
    assert pictures.train.shape == (200, 1, 8, 8)
    assert pictures.test.shape == (500, 1, 8, 8)
    assert pictures.train.unique().tolist() == [1.0]
    assert torch.equal(pictures.test_labels, torch.arange(200, 700) % 10)


def test_missing_pictures_name_the_install_commands(con, nothing_installed, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(con, monkeypatch, "--output", nothing_installed / "out")
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "apt-get install dataset-fashion-mnist" in message
    assert "pip install scikit-learn" in message


def test_augmented_pictures_differ_and_stay_in_range(con):
    torch.manual_seed(0)
    pictures = torch.rand(33, 1, 28, 28)
    views = con.augment(pictures), con.augment(pictures)
    for view in views:
        assert view.shape == pictures.shape
        assert view.min() >= 0
        assert view.max() <= 1
    assert ((views[0] - views[1]).abs().amax((1, 2, 3)) > 0.1).all()


def test_probe_finds_what_is_linear_and_no_more(con):
    torch.manual_seed(0)
    features = torch.randn(1500, 5) * torch.tensor([1, 10, 0.1, 1, 0]) + 3
    linear = ((features - 3) @ torch.tensor([0.0, 1, 100, 0, 0]) > 0).long()
    split = 1000
    assert con.probe(features[:split], linear[:split], features[split:], linear[split:]) > 0.95
    noise = torch.randint(2, (1500,))
    assert abs(con.probe(features[:split], noise[:split], features[split:], noise[split:]) - 0.5) < 0.1


def test_step_is_nt_xent(con, monkeypatch):
    """Against the formula of SimCLR in numpy, with the encoder and the augmentation replaced by known vectors."""
    rng = np.random.default_rng(0)
    n, first = 5, rng.normal(size=(5, 3))
    second = first + 0.3 * rng.normal(size=(5, 3))
    views = iter([torch.from_numpy(first)[:, :, None, None], torch.from_numpy(second)[:, :, None, None]])
    monkeypatch.setattr(con, "augment", lambda pictures: next(views))
    loss = con.step(lambda x: x.flatten(1), con.losses()["InfoNCE"], torch.zeros(n, 1, 1, 1))

    vectors = np.concatenate([first, second])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    logits = vectors @ vectors.T / con.TEMPERATURE
    np.fill_diagonal(logits, -np.inf)
    own = logits[np.arange(2 * n), (np.arange(2 * n) + n) % (2 * n)]
    assert loss.item() == pytest.approx((np.log(np.exp(logits).sum(1)) - own).mean(), rel=1e-12)


def test_every_picture_comes_once_an_epoch(con, monkeypatch):
    monkeypatch.setattr(con, "BATCH", 4)
    batches = con.batches(11)
    drawn = [next(batches) for _ in range(4)]
    assert [len(batch) for batch in drawn] == [4] * 4
    assert all(len(set(torch.cat(drawn[i : i + 2]).tolist())) == 8 for i in (0, 2))
    assert sorted(next(con.batches(3)).tolist()) == [0, 1, 2]


def test_contrastive_run(con, tmp_path, monkeypatch, capsys):
    for name, value in {"PICTURES": 60, "BATCH": 20, "LABELS": 30, "CANDIDATES": 40}.items():
        monkeypatch.setattr(con, name, value)
    write_pictures(tmp_path)
    run(con, monkeypatch, "--data", tmp_path, "--output", tmp_path / "out", "--epochs", "2")
    output = capsys.readouterr().out
    assert "Fashion-MNIST: 60 pictures of 28x28 to learn from; 30 of them have labels" in output
    assert (tmp_path / "out" / "contrastive.png").read_bytes().startswith(b"\x89PNG")
    rows = {line[:22].strip(): line[22:].split() for line in output.splitlines() if "%" in line}
    assert rows.keys() == {"pixels", "untrained network", *con.losses()}
    assert rows["pixels"] == ["100.0%"]
    for name in con.losses():
        accuracy, bound, seconds = rows[name]
        assert 0 <= float(accuracy.rstrip("%")) <= 100
        assert float(bound) <= math.log(40)
        assert float(seconds) >= 0  # rounded
