"""Losses whose vocabulary grows or shrinks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nce_ext
from nce_ext import noise as noises
from nce_ext import optim

V, D, K = 20, 8, 5
SEED = torch.tensor([3, 4])
HIDDEN, TARGET = torch.randn(6, D), torch.tensor([1, 2, 3, 0, 14, 7])
OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.25),
    "RowwiseAdagrad": lambda p: optim.RowwiseAdagrad(p, lr=0.1, initial_accumulator_value=0.25),
    "Adam": lambda p: optim.Adam(p, lr=0.1),
    "AdamW": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "torch's Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "torch's Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.25),
}


def law(n_classes: int):
    return noises.Unigram(range(1, n_classes + 1))


def make(loss=nce_ext.NCELoss, n_classes: int = V, **options):
    torch.manual_seed(0)
    return loss(D, n_classes, law(n_classes), K, **options)


def train(loss_fn, optimizer, steps: int = 3, target=TARGET) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(HIDDEN, target, seed=SEED).backward()
        optimizer.step()


@pytest.mark.parametrize("loss", [nce_ext.NCELoss, nce_ext.NegativeSamplingLoss, nce_ext.SampledSoftmaxLoss])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_classes", [V + 7, V, V - 5, 2000])
def test_rows_that_stay_and_new_ones(loss, bias, n_classes, backend):
    loss_fn = make(loss, bias=bias, backend=backend)
    nn.init.normal_(loss_fn.weight, 5)
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    names, identities = [name for name, _ in loss_fn.named_parameters()], [id(p) for p in loss_fn.parameters()]
    noise = law(n_classes)
    loss_fn.resize_classes(n_classes, noise)
    kept = min(V, n_classes)
    assert torch.equal(loss_fn.weight[:kept], before["weight"][:kept])
    assert loss_fn.weight.shape == (n_classes, D)
    new = loss_fn.weight[kept:].detach()
    assert (new.abs() <= D**-0.5).all()
    assert not len(new) or new.std() > 0.5 * D**-0.5 / 3**0.5
    if bias:
        assert torch.equal(loss_fn.bias[:kept], before["bias"][:kept])
        initial = make(loss, n_classes, bias=True).bias.detach()[kept:]
        assert torch.equal(loss_fn.bias.detach()[kept:], initial)
    assert loss_fn.noise is noise
    assert loss_fn.n_classes == n_classes
    assert f"n_classes={n_classes}" in repr(loss_fn)
    assert [name for name, _ in loss_fn.named_parameters()] == names
    assert [id(p) for p in loss_fn.parameters()] == identities
    target = torch.tensor([0, 1, 2, n_classes - 1, 3, 4])
    loss_fn(HIDDEN, target).backward()
    assert loss_fn.weight.grad.shape == (n_classes, D)
    assert torch.isfinite(nce_ext.evaluate.nll(loss_fn, HIDDEN, target))
    assert len(copy.deepcopy(loss_fn).state_dict()["weight"]) == n_classes


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer(name, sparse):
    """Old classes go on as if nothing had happened, as long as the new ones are not touched."""
    if sparse and name == "torch's Adam":
        pytest.skip("takes no sparse gradients")
    whole, grown = make(sparse=sparse), make(sparse=sparse)
    optimizers = [OPTIMIZERS[name](loss_fn.parameters()) for loss_fn in (whole, grown)]
    for loss_fn, optimizer in zip((whole, grown), optimizers, strict=True):
        train(loss_fn, optimizer)
    grown.resize_classes(V + 9, law(V + 9), optimizer=optimizers[1])
    for p, old in zip(grown.parameters(), whole.parameters(), strict=True):
        mine, other = optimizers[1].state[p], optimizers[0].state[old]
        assert mine.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == V:
                assert len(mine[key]) == V + 9
                assert torch.equal(mine[key][:V], value)
                assert mine[key].dtype == value.dtype
                fresh = 0.25 if key == "sum" else 0
                assert (mine[key][V:] == fresh).all() or key in ("row_step", "decayed")
    negatives = torch.tensor([3, 8, 9, 1, 5])
    for loss_fn, optimizer in zip((whole, grown), optimizers, strict=True):
        optimizer.zero_grad()
        loss_fn(HIDDEN, TARGET, negatives=negatives, log_q=(torch.zeros(6), torch.zeros(5))).backward()
        optimizer.step()
    assert torch.equal(grown.weight[:V], whole.weight)
    assert torch.equal(grown.bias[:V], whole.bias)
    train(grown, optimizers[1], target=TARGET + 13)
    assert torch.isfinite(grown.weight).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_of_new_rows(dtype):
    loss_fn = make(dtype=dtype, sparse=True)
    optimizer = optim.AdamW(loss_fn.parameters(), lr=0.1, weight_decay=0.1, rounding="master")
    train(loss_fn, optimizer)
    loss_fn.resize_classes(V + 9, law(V + 9), optimizer=optimizer)
    master = optimizer.state[loss_fn.weight]["master"]
    assert torch.equal(master[V:].to(dtype), loss_fn.weight.detach()[V:])
    new = loss_fn.weight.detach()[V:].clone()
    optimizer.catch_up()
    assert torch.equal(loss_fn.weight.detach()[V:], new)
    train(loss_fn, optimizer, target=TARGET + 13)


def test_an_optimizer_that_has_not_stepped_yet():
    loss_fn = make()
    optimizer = optim.Adam(loss_fn.parameters(), lr=0.1)
    loss_fn.resize_classes(V + 1, law(V + 1), optimizer=optimizer)
    train(loss_fn, optimizer)


def test_tied_and_learned_parameters_stay():
    embedding = nn.Embedding(V, D)
    loss_fn = make(log_z="learned")
    loss_fn.weight = embedding.weight
    loss_fn.weight.grad = torch.zeros(V, D)
    log_z = loss_fn.log_z
    loss_fn.resize_classes(V + 3, law(V + 3))
    assert embedding.weight is loss_fn.weight
    assert len(embedding.weight) == V + 3
    assert loss_fn.weight.grad is None
    assert loss_fn.log_z is log_z


def test_rows_that_were_exchanged_by_hand():
    loss_fn = make()
    loss_fn.weight = nn.Parameter(torch.cat([loss_fn.weight.detach(), torch.ones(4, D)]))
    loss_fn.bias = nn.Parameter(torch.cat([loss_fn.bias.detach(), torch.ones(4)]))
    loss_fn.noise = law(V + 4)
    assert torch.isfinite(loss_fn(HIDDEN, TARGET))
    with pytest.raises(ValueError, match=r"layer must have n_classes = 20 rows in its weight, got 24; a loss's"):
        nce_ext.evaluate.nll(loss_fn, HIDDEN, TARGET)
    loss_fn.resize_classes(V + 4, loss_fn.noise)
    assert torch.isfinite(nce_ext.evaluate.nll(loss_fn, HIDDEN, TARGET))


def test_while_a_graph_of_the_old_rows_is_alive():
    loss_fn = make()
    loss_fn(HIDDEN, TARGET).backward()
    kept = loss_fn.weight.sum()
    loss_fn.resize_classes(V + 2, law(V + 2))
    loss_fn(HIDDEN, TARGET + 6).backward()
    assert loss_fn.weight.grad.shape == (V + 2, D)
    del kept


def pinned():
    loss_fn = make(sparse=True)
    loss_fn._pinned = True
    return loss_fn


def fused():
    loss_fn = make(sparse=True)
    loss_fn.fuse_optimizer(optim.SGD(loss_fn.parameters(), lr=0.1))
    return loss_fn


STRANGER = optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
REFUSALS = {
    "no number": (make, 2.5, law(V), {}, TypeError, r"n_classes must be an int, got float 2\.5"),
    "no class": (make, 0, law(V), {}, ValueError, r"n_classes must be in 1 \.\. 2\^31 - 1, got 0"),
    "no noise": (make, V + 1, None, {}, TypeError, "noise must be an nce_ext.noise distribution, got NoneType"),
    "the old noise": (make, V + 1, law(V), {}, ValueError, "noise must have n_classes = 21 classes, got 20"),
    "no optimizer": (
        make, V + 1, law(V + 1), {"optimizer": 3}, TypeError, "optimizer must be an optimizer, got int 3"
    ),
    "another optimizer": (
        make, V + 1, law(V + 1), {"optimizer": STRANGER}, ValueError,
        "optimizer must have the loss's weight and bias among its parameters",
    ),
    "a fused loss": (fused, V + 1, law(V + 1), {}, ValueError, "loss must not be fused with its optimizer, got one"),
    "a pinned loss": (pinned, V + 1, law(V + 1), {}, ValueError, "loss must not be in pinned memory, got one that is"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_change_nothing(name):
    made, n_classes, noise, options, error, message = REFUSALS[name]
    loss_fn = made()
    before = {key: value.clone() for key, value in loss_fn.state_dict().items()}
    with pytest.raises(error, match=f"^{message}"):
        loss_fn.resize_classes(n_classes, noise, **options)
    assert loss_fn.n_classes == V
    assert all(torch.equal(value, before[key]) for key, value in loss_fn.state_dict().items())
