"""What the examples take for a word, and what of a text is left out."""

# ruff: noqa: RUF001  # letters of other scripts that look like Latin ones

from __future__ import annotations

import argparse
import json
import unicodedata
from types import ModuleType

import numpy as np
import pytest
from load_example import load_example

pytest.importorskip("tqdm", reason="pip install -r requirements/demo.txt")
pytest.importorskip("matplotlib", reason="pip install -r requirements/demo.txt")


@pytest.fixture(scope="module")
def words() -> ModuleType:
    return load_example("_words")


@pytest.fixture(scope="module")
def corpora() -> ModuleType:
    return load_example("_corpus")


@pytest.fixture(scope="module")
def word2vec() -> ModuleType:
    return load_example("word2vec")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The size, in words.", "the size in words"),
        ("Größe und Maß", "größe und maß"),
        ("ΟΔΟΣ και ΣΕΙΡΑ", "οδος και σειρα"),
        ("Привет, мир: Ёлка", "привет мир ёлка"),
        ("שָׁלוֹם עולם", unicodedata.normalize("NFC", "שָׁלוֹם עולם")),
        ("हिन्दी में", "हिन्दी में"),
        ("مرحبا بالعالم", "مرحبا بالعالم"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("ภาษาไทย", "ภาษาไทย"),
        ("e\u0301te\u0301 \u00e9t\u00e9", "été été"),
        ("don\u2019t don't DON\u2018T don\u02bct don\uff07t", "don't don't don't don't don't"),
        ("п\u2019ять L\u2019Été", "п'ять l'été"),
        ("\u2018quoted\u2019 'quoted' \u201cquoted\u201d", "quoted quoted quoted"),
        ("soft\u00adhyphen", "softhyphen"),
        ("12 covid19 x\u00b2 \u2167 \u0663 \u00bd", "covid x"),
        ("snake_case, kebab-case\u2014dash", "snake case kebab case dash"),
        ("\u0301abc \ufe0f \u2764\ufe0f", "abc"),
        ("𐐀𐐁", "𐐨𐐩"),
        ("", ""),
    ],
)
def test_words(words, text, expected):
    found, _ = words.split(text, "words")
    assert found == expected.split()


def test_ascii_words_are_the_same_among_others(words):
    """A text with one foreign letter is read by another pattern."""
    text = "The dog's 2 bones, rock'n'roll; x2y -- 'tis O'Neill's a_b"
    alone, left_out = words.split(text, "words")
    assert alone == ["the", "dog's", "bones", "rock'n", "roll", "x", "y", "tis", "o'neill", "s", "a", "b"]
    assert words.split(f"{text} ж", "words") == ([*alone, "ж"], left_out)


def test_what_is_left_out_is_counted_without_spaces(words):
    assert words.split("a 12,\n\tb\u00a0!", "words") == (["a", "b"], 4)
    assert words.split("größe 12,", "words") == (["größe"], 3)
    assert words.split("don\u2019t", "words")[1] == 0


def test_whitespace_tokens_stay_as_they_are(words):
    text = "New_York\tdon\u2019t 3.14 <unk>\n\u4f60\u597d"
    assert words.split(text, "whitespace") == (["New_York", "don\u2019t", "3.14", "<unk>", "\u4f60\u597d"], 0)


def write(path, paragraphs):
    path.write_text("\n\n".join(paragraphs), "utf-8")
    return str(path)


def test_a_corpus_says_what_it_leaves_out(corpora, tmp_path):
    path = write(tmp_path / "text.txt", ["Größe zählt 1234567890, Größe"] * 99 + ["selten größe zählt"])
    corpus = corpora.load(path, 5)
    assert corpus.vocabulary == ["größe", "zählt"]
    n_letters = 99 * 15 + 16
    assert (corpus.n_left_out, corpus.n_characters) == (99 * 11, 99 * 11 + n_letters)
    first, second, third = corpus.describe().split("\n")
    assert first.startswith("text.txt: 300 words, 3 different")
    assert second.startswith(f"left out: {99 * 11 / (99 * 11 + n_letters):.1%} of the characters")
    assert "and 0.3% of the words" in second
    assert third == "vocabulary 2; 297 words to train on, 2 held out"


def test_the_packaged_dictionary_is_read_as_ever(corpora):
    try:
        corpus = corpora.load(None, 5)
    except corpora.CorpusError as error:
        pytest.skip(str(error))
    assert corpus.sha256 == "473a791421167526d385eefa3a8ed41af90ed065df769e3b7126763cd7068051"
    assert (corpus.n_words, corpus.n_types, len(corpus.vocabulary)) == (3_306_588, 146_183, 34_898)


@pytest.mark.parametrize("skip_gram", [False, True])
def test_a_text_without_context_words_makes_empty_batches(corpora, skip_gram):
    text = corpora.Text(np.zeros(6, np.int32), np.array([0, 3, 6]))
    windows = corpora.Windows(text, np.zeros(1), 2, skip_gram, (1, 0))
    for cut in (False, True):
        batch = windows.batch(0, 4, cut=cut)
        assert (len(batch.targets), len(batch.words), batch.n_positions) == (0, 0, 4)


def options(word2vec, monkeypatch, *arguments) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["word2vec.py", *arguments])
    return word2vec.parse_arguments()


SMALL = ["--dim", "4", "--min-count", "1", "--negatives", "2", "--subsample", "0"]


@pytest.mark.parametrize("by_clock", [None, 300.0])
def test_the_curve_has_points_by_time_and_by_progress(word2vec, corpora, monkeypatch, tmp_path, by_clock):
    """A step takes half a second by this clock, and all of them 300 s."""
    path = write(tmp_path / "text.txt", ["alpha beta gamma delta"] * 151)
    opts = options(word2vec, monkeypatch, *SMALL, "--batch-size", "1", "--epochs", "1", "--max-seconds", "0")
    training = word2vec.Training("nce", corpora.load(path, 1), opts)
    assert training.steps_an_epoch == 600

    clock = [0.0]

    def step(windows, learning_rate):
        clock[0] += 0.5
        training.step += 1
        return 1.0, 1

    monkeypatch.setattr(word2vec.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "held_out_nll", lambda: 300.0 - training.seconds)
    training.run(lambda: False, by_clock)
    by_progress = [300 * part for part in word2vec.CURVE]
    assert [seconds for seconds, _ in training.curve] == sorted({0, 1, 2, 5, 10, 20, 40, *by_progress, 300})
    assert all(nll == 300 - seconds for seconds, nll in training.curve)


def test_a_resumed_curve_goes_on(word2vec, corpora, monkeypatch, tmp_path):
    path = write(tmp_path / "text.txt", ["alpha beta gamma delta"] * 151)
    opts = options(word2vec, monkeypatch, *SMALL, "--batch-size", "16", "--epochs", "2", "--max-seconds", "0")
    monkeypatch.setattr(word2vec.time, "perf_counter", lambda: 0.0)  # so that no point is by time
    corpus = corpora.load(path, 1)
    whole, first, rest = (word2vec.Training("nce", corpus, opts) for _ in range(3))
    whole.run(lambda: False)
    with pytest.raises(word2vec.Interrupted):
        first.run(lambda: first.step == 31)
    rest.load_state_dict(first.state_dict())
    rest.run(lambda: False)
    assert [nll for _, nll in rest.curve] == [nll for _, nll in whole.curve]
    assert len(rest.curve) == len(word2vec.CURVE) + 2


def test_a_text_in_cyrillic_trains(word2vec, monkeypatch, tmp_path, capsys):
    path = write(tmp_path / "text.txt", ["Мама мыла раму, а папа читал газету 5 раз"] * 40)
    for tokens, first in (("words", "мама"), ("whitespace", "Мама")):
        output = tmp_path / tokens
        arguments = ["--corpus", path, "--output", str(output), *SMALL, "--epochs", "1", "--no-comparison"]
        monkeypatch.setattr("sys.argv", ["word2vec.py", *arguments, "--tokens", tokens])
        assert word2vec.main() == 0, capsys.readouterr().err
        lines = (output / "vectors.txt").read_text("utf-8").splitlines()
        assert first in {line.split(" ")[0] for line in lines[1:]}
        figures = json.loads((output / "results.json").read_text("utf-8"))["corpus"]
        assert (figures["characters_left_out"] > 0) == (tokens == "words")
        assert "left out: " in capsys.readouterr().out
