"""Gathered contrastive losses on real ranks against numpy float64 over the whole batch, and trained under DDP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contrastive_oracle import Truth, pairwise
from ranks import gathered_cases
from ranks.gathered_cases import CASES
from refusals import assert_tested, messages, parametrized
from tolerances import as_float64, assert_close
from torchrun import torchrun

from nce_ext.contrastive import InfoNCELoss
from nce_ext.distributed import gathered
from nce_ext.distributed.gathered import gather


def results(name: str, world: int) -> list:
    """Of the first ``world`` ranks, as a group."""
    return [rank[str(world)][name] for rank in torchrun("gathered_cases.py", 4)[:world]]


def unit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / length, length


def truth_of(name: str, world: int) -> tuple[Truth, np.ndarray]:
    """Losses of all rows, the gradients of their weighted sum in the leaves, and the weights."""
    loss_fn = gathered_cases.loss_of(name)
    given, upstream, _ = gathered_cases.inputs(name, world)
    arrays = {
        key: value.numpy() if key.endswith(("ids", "mask")) else as_float64(value) for key, value in given.items()
    }
    batch = len(arrays["query"])
    sigmoid = loss_fn.__class__ is not InfoNCELoss
    scale = loss_fn.logit_scale.exp().item() if sigmoid else 1 / float(loss_fn.temperature)
    weights = as_float64(upstream) if loss_fn.reduction == "none" else np.ones(batch)
    if loss_fn.reduction == "mean":
        weights = weights / max(batch, 1)

    vectors = {key: arrays.pop(key) for key in ("query", "key", "negatives") if key in arrays}
    raw = vectors
    if loss_fn.normalize:
        vectors = {key: unit(value)[0] for key, value in vectors.items()}
    log_q_back = arrays.pop("query_log_q", None)
    options = {"scale": scale, "bias": loss_fn.logit_bias.item() if sigmoid else None}
    options |= {"debias": 0.0 if sigmoid else loss_fn.debias}
    symmetric = not sigmoid and loss_fn.symmetric
    half = weights / 2 if symmetric else weights
    there = pairwise(**vectors, **arrays, **options, upstream=half)
    parts = [there]
    if symmetric:
        ids = {"ids": arrays["ids"]} if "ids" in arrays else {}
        back = pairwise(vectors["key"], vectors["query"], **ids, log_q=log_q_back, **options, upstream=half)
        for part in (back.gradients, back.scales):
            part["query"], part["key"] = part["key"], part["query"]
            part["negatives"] = np.zeros_like(there.gradients["negatives"])
        parts.append(back)
    gradients, scales = ({key: sum(part[i][key] for part in parts) for key in there.gradients} for i in (2, 3))
    for key, value in raw.items() if loss_fn.normalize else ():
        u, length = unit(value)
        tangent = gradients[key] - u * (u * gradients[key]).sum(1, keepdims=True)
        gradients[key] = tangent / length
        scales[key] = (scales[key] + np.abs(u) * (np.abs(u) * scales[key]).sum(1, keepdims=True)) / length
    # The parameters are a logarithm of the scale, and the bias.
    gradients["logit_scale"], scales["logit_scale"] = gradients["scale"] * scale, scales["scale"] * scale
    gradients["logit_bias"], scales["logit_bias"] = gradients["bias"], scales["bias"]
    loss, loss_scale = (np.mean([part[i] for part in parts], axis=0) for i in (0, 1))
    return Truth(loss, loss_scale, gradients, scales), weights


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_process(name, world):
    ranks, (truth, weights) = results(name, world), truth_of(name, world)
    case, loss_fn = CASES[name], gathered_cases.loss_of(name)
    wide = torch.promote_types(case.dtype, torch.float32)
    assert {rank["dtype"] for rank in ranks} == {str(wide).removeprefix("torch.")}
    if loss_fn.reduction == "none":
        losses = np.concatenate([np.asarray(rank["loss"], np.float64) for rank in ranks])
        assert_close(losses, truth.loss, wide, "loss", truth.loss_scale)
    else:
        assert len({rank["loss"] for rank in ranks}) == 1
        total = (weights * truth.loss).sum(), (weights * truth.loss_scale).sum()
        assert_close(ranks[0]["loss"], total[0], wide, "loss", total[1])

    for leaf in ranks[0]["gradients"]:
        got = [np.asarray(rank["gradients"][leaf], np.float64) for rank in ranks]
        dtype = wide if leaf.startswith("logit") else case.dtype
        assert {rank["dtypes"][leaf] for rank in ranks} == {str(dtype).removeprefix("torch.")}
        if leaf in ("query", "key"):
            got = [g.reshape(-1, gathered_cases.DIM) / (len(ranks) if case.ddp else 1) for g in got]
            got = [np.concatenate(got)]
        for g in got:  # of the rest every rank has the whole, and the same
            assert np.array_equal(g, got[0])
            assert_close(g, truth.gradients[leaf], dtype, f"gradient of {leaf}", truth.scales[leaf])
    assert all(rank["again"] and rank["no grad"] for rank in ranks)


@pytest.mark.parametrize(("name", "factor"), [("plain", 1), ("clip", 2), ("a row each", 2), ("constant queries", 2)])
def test_what_is_sent_is_linear_in_the_batch(name, factor):
    """Vectors once (twice if symmetric) as long as the longest part, their gradients once, a few numbers beside."""
    batch, longest, world, element = 8, 5, 3, 8
    vectors = factor * (world - 1) * longest * gathered_cases.DIM * element
    data = (world - 1) * longest * 8 * len(CASES[name].data) * (2 if name != "plain" else 1)
    for rank, got in enumerate(results(name, world)):
        others = batch - gathered_cases.PARTS[world][rank]
        gradients = (1 if name == "constant queries" else factor) * others * gathered_cases.DIM * element
        assert vectors + gradients <= got["sent"] <= vectors + gradients + data + (world - 1) * 1024 + 64


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_under_ddp_is_that_of_one_process(world, place):
    model, loss_fn = gathered_cases.Towers(), gathered_cases.clip()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for step in range(3):
        images, texts, _ = gathered_cases.examples(step, world)
        optimizer.zero_grad()
        loss_fn(*model(images, texts)).backward()
        optimizer.step()
    trained = [rank[place] for rank in results("trained", world)]
    assert all(parameters_of_rank == trained[0] for parameters_of_rank in trained)
    for got, want in zip(trained[0], parameters, strict=True):
        assert_close(np.asarray(got), want, torch.float64, "parameter")


def test_rows_of_all_ranks():
    for rank in torchrun("gathered_cases.py", 4):
        assert rank["rows"] == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0], *[[3.0, 3.0]] * 3]


# What rank 1 raises, if it is not what all of them raise.
OWN = {"bad ids on rank 1": "ValueError: ids must have shape [2] for query [2, 5], got [3]"}
REFUSALS = {
    "bad ids on rank 1": f"RuntimeError: a step was refused: rank 1 raised {OWN['bad ids on rank 1']}",
    "D": "ValueError: D must be the same on all ranks, got 5 on ranks 0 and 2 and 4 on rank 1",
    "dtype of query": "ValueError: the dtype of query must be the same on all ranks, got 'float32' on",
    "dtype of key": "ValueError: the dtype of key must be the same on all ranks, got 'float32' on",
    "arguments": "ValueError: the set of arguments must be the same on all ranks, got 'query, key, ids' on ranks 0",
    "gradients": "ValueError: what requires a gradient must be the same on all ranks, got 'key' on ranks 0 and 2",
    "number of negatives": "ValueError: the shape of negatives must be the same on all ranks, got [2, 5] on",
    "negatives": "ValueError: the checksum of negatives must be the same on all ranks, got 0 on ranks 0 and 2",
    "temperature": 'ValueError: loss_fn must be the same on all ranks, got "InfoNCELoss(temperature=0.5, ',
    "log q of sigmoid": "ValueError: log_q must be None with a SigmoidContrastiveLoss, got a float32 tensor",
    "rows": "ValueError: the shape of a row must be the same on all ranks, got [3] on ranks 0 and 2 and [4] on rank 1",
    "types of rows": "ValueError: the dtype of rows must be the same on all ranks, got 'float32' on ranks 0 and 2",
    "a scalar": "ValueError: rows must be a tensor [n, ...], got a float32 tensor",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_on_every_rank(name):
    for r, rank in enumerate(torchrun("gathered_cases.py", 4)[:3]):
        assert rank["refusals"][name].startswith(OWN.get(name, REFUSALS[name]) if r == 1 else REFUSALS[name])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.nn.Identity(),), {}, TypeError, r"loss_fn must be an InfoNCELoss or a SigmoidContrastiveLoss, got Ide"),
        ((InfoNCELoss(in_batch=False),), {}, ValueError, r"loss_fn must have in_batch=True, .* got False"),
        ((InfoNCELoss(),), {"ddp": 1}, TypeError, r"ddp must be True or False, got int 1"),
        ((InfoNCELoss(),), {}, RuntimeError, r"torch.distributed must be initialized .* and is not"),
    ],
)
def test_options(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gather(*arguments, **options)


def test_every_refusal_in_the_source_is_tested():
    assert_tested([gathered], [*messages(parametrized(test_options)), "rows must be a tensor"])
