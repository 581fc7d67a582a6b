"""The large-vocabulary example, run as a user runs it: killed and resumed, refused checkpoints; and its parts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from load_example import EXAMPLES, load_example
from torch.nn import functional as F

pytest.importorskip("tqdm", reason="pip install -r requirements/demo.txt")
pytest.importorskip("matplotlib", reason="pip install -r requirements/demo.txt")

COMMAND = [sys.executable, "-W", "ignore", str(EXAMPLES / "large_vocabulary.py")]
CLASSES, STEPS, EVERY = 50_000, 80, 10


@pytest.fixture(scope="module")
def large() -> ModuleType:
    return load_example("large_vocabulary")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12,000 words in which a word's first letter is that of its neighbours."""
    rng = np.random.default_rng(0)
    endings = ["a", "e", "i", "o", "u", "an", "en", "in", "on", "un"]
    paragraphs = [
        " ".join(letter + endings[i] for i in rng.zipf(1.5, 60) % len(endings))
        for letter in rng.choice(list("bcdfghjklm"), 200)
    ]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


def command(corpus: Path, output: Path, *arguments: str | Path | int) -> list[str]:
    options = ["--corpus", corpus, "--output", output, "--classes", CLASSES, "--steps", STEPS, *arguments]
    return [*COMMAND, *map(str, options)]


def run(corpus: Path, output: Path, *arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    line = command(corpus, output, *arguments)
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def checkpointed(output: Path) -> list[str | Path | int]:
    return ["--checkpoint", output / "run.ckpt", "--checkpoint-every", EVERY, "--log", output / "log.json"]


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that wrote checkpoints and was left alone."""
    output = tmp_path_factory.mktemp("unbroken")
    result = run(corpus, output, *checkpointed(output))
    assert result.returncode == 0, result.stderr
    (output / "stdout").write_text(result.stdout)
    return output


def test_it_learns_clips_and_prints_its_table(unbroken, large):
    log = json.loads((unbroken / "log.json").read_text())
    assert (log["classes"], log["first"], len(log["loss"]), len(log["norm"])) == (CLASSES, 0, STEPS, STEPS)
    assert np.mean(log["loss"][-5:]) < np.mean(log["loss"][:5]) - 0.1
    printed = (unbroken / "stdout").read_text()
    clipped = np.mean(np.array(log["norm"]) > large.MAX_NORM)
    assert clipped > 0
    assert re.search(rf"steps clipped +{clipped:.0%}\n", printed)
    cells = dict(re.findall(r"^(held-out .*|exact .*\w) +([\d.,]+)$", printed, re.MULTILINE))
    figures = {name.strip(): float(cell.replace(",", "")) for name, cell in cells.items()}
    assert figures["held-out NCE loss, after"] < figures["held-out NCE loss, before"]
    assert figures["exact perplexity of the model"] < figures["exact perplexity of frequencies"]
    assert (unbroken / "large_vocabulary.png").read_bytes().startswith(b"\x89PNG")


def test_killed_run_goes_on_to_the_same_losses(unbroken, corpus, tmp_path):
    checkpoint = tmp_path / "run.ckpt"
    line = command(corpus, tmp_path, *checkpointed(tmp_path))
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "log.json").exists()

    resumed = run(corpus, tmp_path, *checkpointed(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["first"] in range(EVERY, STEPS, EVERY)
    assert f"resumed from step {log['first']} of {STEPS}" in resumed.stdout
    expected = json.loads((unbroken / "log.json").read_text())
    assert log["loss"] == expected["loss"]
    assert log["norm"] == expected["norm"]
    for name in ("held-out NCE loss, before", "held-out NCE loss, after", "exact perplexity of the model"):
        of_both = [re.findall(f"{name} .*", text) for text in (resumed.stdout, (unbroken / "stdout").read_text())]
        assert of_both[0] == of_both[1] != []
    assert not list(tmp_path.glob("*.tmp"))


def test_checkpoint_of_other_settings_is_one_line(unbroken, corpus, tmp_path):
    path = tmp_path / "run.ckpt"
    shutil.copy(unbroken / "run.ckpt", path)
    result = run(corpus, tmp_path, *checkpointed(tmp_path), "--classes", 60_000, "--seed", 2)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"{path} belongs to a run with other settings: classes was 50000, now 60000; seed was 1" in result.stderr


def test_checkpoint_of_two_runs_is_refused(corpus, tmp_path):
    result = run(corpus, tmp_path, *checkpointed(tmp_path), "--classes", 1000, 2000)
    assert result.returncode == 2
    assert "give one number of --classes" in result.stderr


def test_more_classes_than_memory_are_refused(large):
    with pytest.raises(load_example("_data").DataError, match=r"2,147,483,647 classes take .* give fewer --classes"):
        large.require_memory(2**31 - 1)


@pytest.fixture
def training(large):
    """On 200 examples of a vocabulary of 50 words, in batches of 64."""
    rng = np.random.default_rng(0)
    context = torch.from_numpy(rng.integers(0, 51, (200, large.CONTEXT)).astype(np.int32))
    examples = large.Examples(context, rng.integers(0, 2**32, 200).astype(np.uint64))
    return lambda seed=1: large.Training(50, examples, 1000, 20, seed)


@pytest.fixture
def few(large, monkeypatch):
    for name, value in {"DIM": 8, "BATCH": 64, "NEGATIVES": 32}.items():
        monkeypatch.setattr(large, name, value)


def dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense().clone()


def norm_of(gradients: list[torch.Tensor]) -> float:
    return sum(g.double().square().sum() for g in gradients).sqrt().item()


def test_step_is_taken_on_the_clipped_mean_of_the_batches(training, few, large):
    trained, other = training(), training()
    torch.manual_seed(5)
    sums = [torch.zeros_like(p) for p in other.parameters]
    losses = []
    for i in range(large.ACCUMULATE):
        other.optimizer.zero_grad()
        loss = other.model(*other.batch(i))
        loss.backward()
        losses.append(loss.item())
        for total, parameter in zip(sums, other.parameters, strict=True):
            total += dense(parameter.grad) / large.ACCUMULATE
    norm = norm_of(sums)
    assert norm > large.MAX_NORM
    torch.manual_seed(5)
    trained.step()
    assert trained.losses == pytest.approx([np.mean(losses)], rel=1e-6)
    assert trained.norms == pytest.approx([norm], rel=1e-6)
    for total, parameter in zip(sums, trained.parameters, strict=True):
        torch.testing.assert_close(dense(parameter.grad), total * (large.MAX_NORM / norm), rtol=1e-4, atol=1e-8)
    assert norm_of([dense(p.grad) for p in trained.parameters]) == pytest.approx(large.MAX_NORM, rel=1e-4)


def test_restored_training_is_the_saved_one_to_the_bit(training, few, large, tmp_path):
    rows = load_example("_row_checkpoint")
    saved, restored = training(), training()
    for _ in range(3):
        saved.step()
    torch.manual_seed(7)
    rows.save(tmp_path / "c", {"a": 1}, saved.parameters, saved.optimizer, saved.more())
    noise = torch.rand(5)
    where = [p.data_ptr() for p in restored.parameters]
    restored.restore(tmp_path / "c", rows.read(tmp_path / "c", {"a": 1}))
    torch.testing.assert_close(torch.rand(5), noise, rtol=0, atol=0)
    assert where == [p.data_ptr() for p in restored.parameters]
    assert restored.losses == saved.losses
    assert restored.scheduler.state_dict() == saved.scheduler.state_dict()
    before, after = saved.optimizer.state_dict(), restored.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    tables = rows.row_tables(saved.parameters, saved.optimizer)
    assert len(tables) == 3
    assert not all((of_parameter["row_step"] > 0).all() for of_parameter in tables.values())
    for i, (p, q) in enumerate(zip(saved.parameters, restored.parameters, strict=True)):
        assert torch.equal(p, q)
        assert before["state"][i].keys() == after["state"][i].keys()
        for name, value in before["state"][i].items():
            other = after["state"][i][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    with zipfile.ZipFile(tmp_path / "c") as archive:
        touched = int((tables[max(tables)]["row_step"] > 0).sum())
        assert archive.getinfo(f"{max(tables)}/exp_avg").file_size == 4 * touched


def test_failed_write_leaves_the_last_checkpoint(training, few, tmp_path, monkeypatch):
    rows = load_example("_row_checkpoint")
    trained = training()
    trained.step()
    arguments = (tmp_path / "c", {}, trained.parameters, trained.optimizer, trained.more())
    rows.save(*arguments)
    whole = (tmp_path / "c").read_bytes()
    trained.step()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "fsync", full)
    with pytest.raises(load_example("_data").DataError, match=r"cannot write .*c: No space left on device"):
        rows.save(*arguments)
    assert (tmp_path / "c").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("kind", ["truncated", "foreign", "bit", "missing"])
def test_damaged_checkpoint_is_named(kind, training, few, tmp_path):
    rows = load_example("_row_checkpoint")
    path, trained = tmp_path / "c", training()
    trained.step()
    rows.save(path, {}, trained.parameters, trained.optimizer, trained.more())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        middle = next(info for info in archive.infolist() if info.filename.endswith("/exp_avg"))
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "foreign":
        path.write_bytes(b"no checkpoint")
    elif kind == "bit":  # of a row's state
        data[middle.header_offset + middle.file_size // 2] ^= 1
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other", b"")
    fresh = training()
    with pytest.raises(load_example("_data").DataError, match=r"/c is not a whole checkpoint \(.*remove it") as error:
        fresh.restore(path, rows.read(path, {}))
    assert "\n" not in str(error.value)


def test_exact_nll_is_that_of_all_logits_of_decayed_rows(training, few, large, monkeypatch):
    monkeypatch.setattr(large, "ROWS_AT_ONCE", 300)
    trained, decay = training(), 1.0
    start = trained.model.output.weight.detach().clone()
    for _ in range(3):
        decay *= 1 - trained.optimizer.param_groups[0]["lr"] * large.WEIGHT_DECAY
        trained.step()
    examples = large.Examples(trained.context, np.arange(200).astype(np.uint64) << np.uint64(24))
    model, frequencies = large.exact_nll(trained, examples)
    untouched = trained.optimizer.state[trained.model.output.weight]["row_step"] == 0
    assert untouched.sum() > 100
    torch.testing.assert_close(trained.model.output.weight[untouched], start[untouched] * decay, rtol=1e-6, atol=0)
    hidden = trained.model.hidden(examples.context.long()).double()
    output, target = trained.model.output, large.buckets(examples.phrase, 1000)
    logits = F.linear(hidden, output.weight.double(), output.bias.double())
    assert model == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)
    counts = torch.bincount(trained.target, minlength=1000).double()
    law = (counts + large.SMOOTHING * 200 / 1000) / (200 * (1 + large.SMOOTHING))
    assert frequencies == pytest.approx(-law[target].log().mean().item(), rel=1e-6)


def test_examples_are_the_phrases_of_a_paragraph(large):
    text = load_example("_corpus").Text(np.array([3, 1, 4, 1, 4, 2], np.int32), np.array([0, 5, 6]))
    examples = large.examples_of(text, 5)
    assert examples.context.tolist() == [[5, 5, 5, 5], [5, 5, 5, 3], [5, 5, 3, 1], [5, 3, 1, 4]]
    ids = large.buckets(examples.phrase, 20_000_000)
    assert ids[1] == ids[3]  # 1 4
    assert len(set(ids.tolist())) == 3


def test_buckets_are_equally_full(large):
    """Of all phrases of 300 words: chi-square of 64 buckets, whose mean is 63 and standard deviation 11."""
    words = np.stack(np.meshgrid(np.arange(300), np.arange(300)), -1).reshape(-1).astype(np.int32)
    text = load_example("_corpus").Text(words, np.arange(0, len(words) + 1, 2))
    counts = np.bincount(large.buckets(large.examples_of(text, 300).phrase, 64), minlength=64)
    assert counts.sum() == 300**2
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 63 + 5 * 11.3
