"""The recommender example: MovieLens in its own format, ranks and metrics, its losses, and tiny runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from load_example import load_example, run_example
from torch.nn import functional as F

pytest.importorskip("tqdm", reason="pip install -r requirements/demo.txt")
pytest.importorskip("matplotlib", reason="pip install -r requirements/demo.txt")

MOVIELENS = "pip install --no-deps recbole==1.2.1"
# user, item, rating, time: two users, of whom the second rated in another order than the file has
RATINGS = """user_id:token\titem_id:token\trating:float\ttimestamp:float
7\t30\t3\t100
9\t20\t1\t300
9\t10\t5\t200
7\t10\t4\t50
9\t40\t2\t250
7\t40\t2\t100
"""


@pytest.fixture(scope="module")
def rec() -> ModuleType:
    return load_example("recommender")


def write_ratings(folder: Path, n_users: int = 30, n_items: int = 40) -> None:
    """Users who go through the items in order, each from another one on."""
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(n_users):
        lines += [f"{user}\t{1 + (user + i) % n_items}\t3\t{1000 + i}" for i in range(12)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")


def table(output: str, names: list[str]) -> dict[str, list[str]]:
    """The columns behind each of these names."""
    return {
        name: next(line for line in output.splitlines() if line.startswith(f"{name:17}"))[len(name) :].split()
        for name in names
    }


def test_histories_are_in_the_order_of_time(rec, tmp_path):
    (tmp_path / "ml-100k.inter").write_text(RATINGS)
    histories, n_items = rec.read_histories(tmp_path / "ml-100k.inter")
    assert n_items == 4
    # items 10, 20, 30, 40 become 0 .. 3; those of one second keep the order of the file
    assert [history.tolist() for history in histories] == [[0, 2, 3], [0, 3, 1]]


def test_windows_leave_out_the_last_two_and_predict_the_rest_once(rec, monkeypatch):
    monkeypatch.setattr(rec, "LENGTH", 3)
    histories = [np.arange(8), np.arange(20, 24), np.arange(30, 33)]
    inputs, targets = rec.training_windows(histories)
    assert inputs.shape == targets.shape == (3, 3)
    counted = targets != rec.IGNORE
    assert targets[counted].tolist() == [1, 2, 3, 4, 5, 21]
    assert (targets[counted] == inputs[counted] + 1).all()


def test_padding_on_the_right_changes_nothing(rec):
    torch.manual_seed(0)
    model = rec.SASRec(30).eval()
    items = torch.randint(30, (2, 9))
    longer = F.pad(items, (0, 4))
    torch.testing.assert_close(model(longer)[:, :9], model(items), rtol=1e-5, atol=1e-5)
    changed = items.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 30
    same = (model(changed) - model(items)).abs().amax((0, 2)) < 1e-5
    assert same.tolist() == [True] * 5 + [False] * 4


def test_rank_counts_unseen_items_that_are_not_worse(rec):
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1], [1, 1, 1, 1, 1], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    target = torch.tensor([0, 3, 2, 4, 0])
    seen = [np.array(items, np.int64) for items in ([], [0], [1], [0, 1, 2, 3], [])]
    assert rec.rank(scores, target, seen).tolist() == [0, 2, 3, 0, 4]
    assert rec.rank(scores * math.nan, target, seen).tolist() == [4, 3, 3, 0, 4]


def test_metrics_of_known_ranks(rec):
    ranks = torch.tensor([0, 1, 2, 9, 10, 500])
    assert rec.hit_rate(ranks) == pytest.approx(4 / 6)
    assert rec.hit_rate(ranks, 1) == pytest.approx(1 / 6)
    gains = [1, 1 / math.log2(3), 1 / math.log2(4), 1 / math.log2(11)]
    assert rec.ndcg(ranks) == pytest.approx(sum(gains) / 6)
    assert rec.ndcg(ranks, 2) == pytest.approx(sum(gains[:2]) / 6)


def test_popularity_ranks_by_count(rec):
    histories = [np.array([0, 1, 2]), np.array([3, 1, 0])]
    counts = torch.tensor([10, 20, 30, 40])
    assert rec.popularity(counts, histories, -1).tolist() == [1, 1]  # behind 3, and behind 2
    assert rec.popularity(counts, histories, -2).tolist() == [2, 1]


@pytest.mark.parametrize("corrected", [False, True])
def test_in_batch_loss_is_softmax_over_the_batch(rec, corrected):
    rng = np.random.default_rng(0)
    items, hidden = rng.normal(size=(6, 4)), rng.normal(size=(2, 3, 4))
    target = np.array([[1, 3, rec.IGNORE], [3, 0, 5]])
    log_q = np.log([0.1, 0.2, 0.1, 0.3, 0.1, 0.2])
    make = rec.InBatchLoss(torch.from_numpy(items), torch.from_numpy(log_q) if corrected else None)
    loss = make(torch.from_numpy(hidden), torch.from_numpy(target))

    ids, queries = np.array([1, 3, 3, 0, 5]), hidden[target != rec.IGNORE]
    logits = queries @ items[ids].T - (log_q[ids] if corrected else 0)
    logits[1, 2] = logits[2, 1] = -np.inf  # the same item twice: no negative of itself
    assert loss.item() == pytest.approx((np.log(np.exp(logits).sum(1)) - np.diag(logits)).mean(), rel=1e-6)


def test_losses_train_the_items_of_the_model(rec):
    counts = torch.arange(40)
    made = rec.losses(counts)
    assert len(made) == 4
    hidden = torch.randn(2, 5, rec.DIM)
    target = torch.tensor([[1, 2, 3, 4, 5], [6, 7, rec.IGNORE, rec.IGNORE, rec.IGNORE]])
    for name, make in made.items():
        model = rec.SASRec(40)
        loss_fn = make(model.items.weight)
        own = [parameter for parameter in loss_fn.parameters() if parameter is not model.items.weight]
        assert not own, name
        loss_fn(hidden, target).backward()
        assert model.items.weight.grad[target[target != rec.IGNORE]].abs().amax(1).min() > 0, name


def test_recommender_run(rec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rec, "NEGATIVES", 16)
    write_ratings(tmp_path)
    run_example(rec, monkeypatch, "--data", tmp_path, "--output", tmp_path / "out", "--epochs", "3")
    output = capsys.readouterr().out
    assert "30 users, 40 films, 300 choices to train on" in output
    assert (tmp_path / "out" / "recommender.png").read_bytes().startswith(b"\x89PNG")
    names = [*rec.losses(torch.ones(40)), "popularity"]
    for hits, gain, seconds in table(output, names).values():
        assert 0 <= float(gain) <= float(hits) <= 1
        assert float(seconds) >= 0


def test_recommender_learns_the_order_of_items(rec, tmp_path, monkeypatch):
    monkeypatch.setattr(rec, "BATCH", 4)
    write_ratings(tmp_path)
    histories, n_items = rec.read_histories(tmp_path / "ml-100k.inter")
    counts = torch.bincount(torch.from_numpy(np.concatenate([h[:-2] for h in histories])), minlength=n_items)
    name = "in-batch InfoNCE, log q"
    options = SimpleNamespace(seed=1, epochs=25)
    result = rec.train(name, rec.losses(counts)[name], histories, n_items, options)
    assert rec.ndcg(result.test) > 0.8
    assert rec.ndcg(rec.popularity(counts, histories, -1)) < 0.5


@pytest.fixture
def movielens(rec) -> Path:
    try:
        return rec.find_file("ml-100k.inter", MOVIELENS, wheel="recbole/dataset_example/ml-100k")
    except load_example("_data").DataError as missing:
        pytest.skip(str(missing))


def test_movielens_is_what_it_is_said_to_be(rec, movielens):
    histories, n_items = rec.read_histories(movielens)
    assert (len(histories), n_items, sum(map(len, histories))) == (943, 1682, 100_000)
    assert all(len(set(history.tolist())) == len(history) for history in histories)
    counts = torch.bincount(torch.from_numpy(np.concatenate([h[:-2] for h in histories])), minlength=n_items)
    assert counts.sum() == 100_000 - 2 * 943
    _, targets = rec.training_windows(histories)
    assert (targets != rec.IGNORE).sum() == 100_000 - 3 * 943  # nothing comes before a user's first item
    assert 0.03 < rec.hit_rate(rec.popularity(counts, histories, -1)) < 0.1


@pytest.mark.slow
def test_recommender_reads_the_packaged_ratings(rec, movielens, tmp_path, monkeypatch, capsys):
    for name, value in {"NEGATIVES": 32, "LENGTH": 20, "BATCH": 256}.items():
        monkeypatch.setattr(rec, name, value)
    run_example(rec, monkeypatch, "--output", tmp_path, "--epochs", "1")
    output = capsys.readouterr().out
    assert "943 users, 1,682 films, 98,114 choices to train on" in output
    assert len(table(output, [*rec.losses(torch.ones(9)), "popularity"])) == 5


def test_missing_movielens_names_the_install_command(rec, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "recbole", None)
    monkeypatch.setattr(load_example("_data").importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        run_example(rec, monkeypatch, "--output", tmp_path / "out", "--data", tmp_path)
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        f"recommender.py: error: ml-100k.inter is not installed: {MOVIELENS} (or give --data DIR)\n"
    )
