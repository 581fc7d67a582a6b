"""Row-sparse gradients under DistributedDataParallel on real ranks against the dense training of one process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from ranks.ddp_training import DIM, STEPS, Model, batches
from refusals import assert_tested
from tolerances import assert_close
from torchrun import torchrun

import nce_ext
from nce_ext.distributed import RowSparseDDP, ddp

WORLDS = [1, 2, 3]


def reports(world: int) -> list[dict]:
    """Of the first ``world`` ranks, as a group."""
    return [rank[str(world)] for rank in torchrun("ddp_training.py", 3)[:world]]


@functools.cache
def one_process(world: int) -> list[dict[str, dict[str, np.ndarray]]]:
    """Dense gradients and parameters after each step, of the mean over ranks of their losses."""
    model = Model(20, sparse=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(world):
            for batch in batches(step, rank, world):
                (model(*batch) / world).backward()
        gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        optimizer.step()
        steps.append({"gradients": gradients, "parameters": {n: p.detach().numpy().copy()
                                                             for n, p in model.named_parameters()}})  # fmt: skip
    return steps


def dense(bits: Any, shape: tuple[int, ...], sparse: bool) -> np.ndarray:
    if not sparse:
        return np.asarray(bits)
    ids, rows = bits
    assert ids == sorted(set(ids))
    out = np.zeros(shape)
    out[ids] = np.reshape(rows, (len(ids), *shape[1:]))
    return out


SPARSE = ("embedding.weight", "loss_fn.weight", "loss_fn.bias")


@pytest.mark.parametrize("kind", ["small", "large", "padded"])
@pytest.mark.parametrize("world", WORLDS)
def test_training_is_that_of_one_process(world, kind):
    ranks = [rank[kind] for rank in reports(world)]
    for step, truth in enumerate(one_process(world)):
        for name, want in truth["gradients"].items():
            got = dense(ranks[0][step]["gradients"][name], want.shape, name in SPARSE)
            assert_close(got, want, torch.float64, f"gradient of {name} in step {step}")
            assert_close(ranks[0][step]["parameters"][name], truth["parameters"][name], torch.float64, name)
    for rank in ranks:
        assert rank[-1]["parameters"] == ranks[0][-1]["parameters"]
        for mine, theirs in zip(rank, ranks[0], strict=True):  # JSON of a float tells all its bits
            assert mine["gradients"] == theirs["gradients"]


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_sent_depends_on_the_touched_rows_alone(world):
    for rank in range(world):
        small, large = reports(world)[rank]["small"], reports(world)[rank]["large"]
        assert [s["sent"] for s in small] == [s["sent"] for s in large]
        assert all(s["sent while accumulating"] == 0 for s in small)
    # Step 0: three messages; ids and rows of what the rank with most rows touches, for three parameters.
    longest = [0, 0]
    for rank in range(world):
        words, targets, negatives = next(batches(0, rank, world))
        touched = len(words.unique()), len(torch.cat([targets, negatives.flatten()]).unique())
        longest = [max(a, b) for a, b in zip(longest, touched, strict=True)]
    of_embedding, of_loss = longest[0] * (4 + 8 * DIM), longest[1] * (4 + 8 * DIM) + longest[1] * (4 + 8)
    want = (world - 1) * (3 * 512 + of_embedding + of_loss)
    assert [rank["small"][0]["sent"] for rank in reports(world)] == [want] * world


@pytest.mark.parametrize("world", WORLDS)
def test_the_hook_serves_a_plain_ddp(world):
    table, weight, bias = (rank for rank in reports(world)[0]["hook"])
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 2), torch.nn.Linear(2, 1))
    (sum(model(torch.tensor([1, 1, rank])).sum() for rank in range(world)) / world).backward()
    assert_close(dense(table, (6, 2), True), model[0].weight.grad, torch.float32, "embedding")
    assert_close(weight, model[1].weight.grad, torch.float32, "weight")
    assert_close(bias, model[1].bias.grad, torch.float32, "bias")
    assert all(rank["hook"] == reports(world)[0]["hook"] for rank in reports(world))


@pytest.mark.parametrize("world", WORLDS)
def test_reduced_by_hand(world):
    for rank in reports(world):
        first, second, nothing = rank["by hand"]["reduced"]
        want = np.zeros((8, 2))
        for r in range(1, world):
            want[3] += np.array([5.0, 7.0 + r]) / world
            want[r] += np.array([10.0, 20.0]) / world
        if world == 1:
            assert first is None
        else:
            assert_close(dense(first, (8, 2), True), want, torch.float64, "with a rank without gradient")
        of_seven = np.mean([1.0 + r for r in range(world)])
        assert second[0] == [0, 7]
        assert_close(second[1], [np.float64(np.float32(0.1)), of_seven], torch.float32, "a vector")
        assert nothing is None
        assert rank["by hand"]["dtypes"] == ["torch.float64", "torch.float32"][world == 1 :]


def test_refusals_leave_the_gradients_alone():
    alone, others = reports(3)[1]["by hand"], [reports(3)[rank]["by hand"] for rank in (0, 2)]
    refusal = "TypeError: parameters must have row-sparse gradients, got a float32 tensor of shape [8, 2] at index 2"
    assert alone["dense"] == refusal
    assert all(rank["dense"] == f"RuntimeError: a step was refused: rank 1 raised {refusal}" for rank in others)
    for rank in reports(3):
        told = rank["by hand"]
        assert told["number"] == (
            "ValueError: the number of parameters must be the same on all ranks, got 1 on rank 0 and 2 on ranks 1 and 2"
        )
        assert told["shape"] == (
            "ValueError: the shape of the gradient must be the same on all ranks, "
            "got [8, 2] on rank 0, [9, 2] on rank 1 and [10, 2] on rank 2"
        )
        assert told["dtype"] == (
            "ValueError: the dtype of the gradient must be the same on all ranks, "
            "got 'torch.float32' on ranks 0 and 2 and 'torch.float64' on rank 1"
        )
        assert told["kept"]
    assert reports(3)[0]["by hand"]["no tensor"] == "TypeError: parameters must be tensors, got NoneType at index 0"
    assert "rank 0 raised TypeError: parameters must be tensors" in reports(3)[2]["by hand"]["no tensor"]


def test_a_fused_loss_is_refused():
    """Its gradient never comes, and DDP would wait for it."""
    loss_fn = nce_ext.NCELoss(4, 6, nce_ext.noise.Uniform(6), 2, sparse=True)
    loss_fn.fuse_optimizer(nce_ext.optim.SGD(loss_fn.parameters()))
    with pytest.raises(ValueError, match="module must hold no loss with a fused optimizer"):
        RowSparseDDP(torch.nn.Sequential(loss_fn))


def test_every_refusal_in_the_source_is_tested():
    tested = ["module must hold no loss with", "parameters must be tensors", "parameters must have row-sparse"]
    assert_tested([ddp], tested)
