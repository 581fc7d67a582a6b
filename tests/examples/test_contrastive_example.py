"""The contrastive example: pictures in their own format, augmentation, the linear probe, and a tiny run."""

from __future__ import annotations

import gzip
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


@pytest.fixture(scope="module")
def con() -> ModuleType:
    return load_example("contrastive")


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
        run_example(con, monkeypatch, "--output", nothing_installed / "out")
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
    run_example(con, monkeypatch, "--data", tmp_path, "--output", tmp_path / "out", "--epochs", "2")
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
