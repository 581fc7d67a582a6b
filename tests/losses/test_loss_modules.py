"""The modules: state, exact helpers, evaluation, and drop-in training."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nce_ext
from nce_ext import evaluate, functional
from nce_ext import noise as noises

V, D, K = 40, 6, 8


def make(**options) -> nce_ext.NCELoss:
    return nce_ext.NCELoss(D, V, noises.Unigram(torch.arange(1, V + 1)), K, **options)


def batch(n: int = 12):
    return torch.randn(n, D), torch.randint(V, (n,))


# State
@pytest.mark.parametrize("bias", [False, True])
def test_state_interchanges_with_linear(bias):
    linear, loss_fn = nn.Linear(D, V, bias=bias), make(bias=bias)
    result = loss_fn.load_state_dict(linear.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["noise.table"]
    hidden, _ = batch()
    assert torch.equal(loss_fn.logits(hidden), linear(hidden))
    with torch.no_grad():
        loss_fn.weight.add_(1)
    result = linear.load_state_dict(loss_fn.state_dict(), strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == ["noise.table"]
    assert torch.equal(loss_fn.logits(hidden), linear(hidden))


def test_tying_with_an_embedding(backend):
    embedding = nn.Embedding(V, D)
    loss_fn = make(bias=False, backend=backend)
    loss_fn.weight = embedding.weight
    words, target = torch.randint(V, (12,)), torch.randint(V, (12,))
    loss_fn(embedding(words), target, seed=torch.tensor([1, 2])).backward()
    separate = make(bias=False, backend=backend)
    with torch.no_grad():
        separate.weight.copy_(embedding.weight)
    hidden = embedding.weight.detach()[words].requires_grad_()
    separate(hidden, target, seed=torch.tensor([1, 2])).backward()
    expected = separate.weight.grad.index_add(0, words, hidden.grad)
    torch.testing.assert_close(embedding.weight.grad, expected)


def test_learned_log_z_is_a_parameter_in_the_state():
    loss_fn = make(log_z="learned")
    assert dict(loss_fn.named_parameters())["log_z"].shape == ()
    assert "log_z" in loss_fn.state_dict()
    assert "log_z" not in make(log_z=1.5).state_dict()
    with torch.no_grad():
        loss_fn.log_z.fill_(2.5)
    other = make(log_z="learned")
    other.load_state_dict(loss_fn.state_dict())
    assert float(other.log_z.detach()) == 2.5
    hidden, target = batch()
    seed = torch.tensor([1, 2])
    constant = make(log_z=2.5)
    constant.load_state_dict(loss_fn.state_dict(), strict=False)
    torch.testing.assert_close(loss_fn(hidden, target, seed=seed), constant(hidden, target, seed=seed))


def test_log_z_of_the_call_takes_the_place_of_the_modules(backend):
    hidden, target = batch()
    loss_fn, seed = make(log_z=3.0, backend=backend), torch.tensor([1, 2])
    given = loss_fn(hidden, target, log_z=torch.zeros(12), seed=seed)
    loss_fn.log_z = 0.0
    torch.testing.assert_close(given, loss_fn(hidden, target, seed=seed))


@pytest.mark.parametrize("log_z", [0.0, "learned"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_separate(how, log_z):
    loss_fn = make(log_z=log_z, sparse=True)
    if how == "deepcopy":
        other = copy.deepcopy(loss_fn)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(loss_fn))
    else:
        buffer = io.BytesIO()
        torch.save(loss_fn, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    hidden, target = batch()
    seed = torch.tensor([1, 2])
    assert torch.equal(other(hidden, target, seed=seed), loss_fn(hidden, target, seed=seed))
    with torch.no_grad():
        other.weight.zero_()
    assert loss_fn.weight.any()


def test_to_dtype_moves_parameters_and_keeps_the_noise(backend):
    loss_fn = make(backend=backend, log_z="learned").to(torch.bfloat16)
    assert {p.dtype for p in loss_fn.parameters()} == {torch.bfloat16}
    assert loss_fn.noise.table.dtype == torch.int32
    hidden, target = batch()
    loss = loss_fn(hidden.bfloat16(), target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert {p.grad.dtype for p in loss_fn.parameters()} == {torch.bfloat16}


def test_dtype_and_device_of_the_constructor():
    loss_fn = make(dtype=torch.float64, log_z="learned", device="cpu")
    assert {p.dtype for p in loss_fn.parameters()} == {torch.float64}
    meta = nce_ext.NCELoss(D, V, noises.Uniform(V), K, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_initial_model_is_the_noise():
    """bias = log q, so that the partition function starts near 1; without a correction it starts at 0."""
    loss_fn = make()
    assert loss_fn.weight.abs().max() <= 1 / math.sqrt(D)
    torch.testing.assert_close(loss_fn.bias.detach(), loss_fn.noise.log_prob(torch.arange(V)))
    assert not nce_ext.NegativeSamplingLoss(D, V, noises.Uniform(V), K).bias.any()
    holes = nce_ext.NCELoss(D, 3, noises.Unigram([1, 0, 1]), K)
    assert torch.isfinite(holes.bias).all()
    with torch.no_grad():
        loss_fn.bias.zero_()
    loss_fn.reset_parameters()
    assert loss_fn.bias.any()


def test_extra_repr():
    text = repr(make(log_z="learned", sparse=True))
    for part in ("NCELoss(", "in_features=6", "n_classes=40", "num_negatives=8", "correction='log_kq'", "log_z=learned",
                 "sparse=True", "Unigram("):  # fmt: skip
        assert part in text
    assert "log_z=1.5" in repr(make(log_z=1.5, bias=False))


# The loss
OPTIONS = {
    "shared": True,
    "correction": "log_q",
    "log_z": 0.5,
    "remove_hits": True,
    "candidate_reduction": "mean",
    "positive_label": "uniform",
    "reduction": "sum",
    "ignore_index": 3,
    "sparse": True,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_function(name, backend):
    """Each option alone changes the result (or the layout of the gradient), and as in the functional form."""
    hidden, target = torch.randn(12, D), torch.randint(V - 6, V, (12, 2))  # often drawn: there are hits
    target[0, 0] = OPTIONS["ignore_index"]
    seed, options = torch.tensor([1, 2]), {name: OPTIONS[name]}
    loss_fn, plain = make(backend=backend, **options), make(backend=backend)
    plain.load_state_dict(loss_fn.state_dict())
    loss = loss_fn(hidden, target, seed=seed)
    expected = functional.nce_loss(
        hidden, loss_fn.weight, target, loss_fn.noise, K, bias=loss_fn.bias, seed=seed, backend=backend, **options
    )
    assert torch.equal(loss, expected)
    loss.backward()
    if name == "sparse":
        assert loss_fn.weight.grad.layout == loss_fn.bias.grad.layout == torch.sparse_coo
    else:
        assert not torch.equal(loss, plain(hidden, target, seed=seed))


def test_negative_sampling_is_nce_without_correction(backend):
    hidden, target = batch()
    negative_sampling = nce_ext.NegativeSamplingLoss(D, V, noises.Uniform(V), K, backend=backend)
    nce = nce_ext.NCELoss(D, V, noises.Uniform(V), K, correction="none", backend=backend)
    nce.load_state_dict(negative_sampling.state_dict())
    seed = torch.tensor([1, 2])
    loss = negative_sampling(hidden, target, seed=seed)
    assert torch.equal(loss, nce(hidden, target, seed=seed))
    ids = torch.cat([target[:, None], noises.Uniform(V).sample((12, K), seed=seed)], 1)
    scores = (nce.weight[ids] @ hidden[:, :, None])[:, :, 0] + nce.bias[ids]
    expected = (F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).sum(1)).mean()
    torch.testing.assert_close(loss, expected)


def test_published_presets(backend):
    """log_z = ln V, and the mean over the candidates, as two well-known implementations have them."""
    hidden, target = batch()
    seed = torch.tensor([1, 2])
    loss_fn = make(log_z=math.log(V), backend=backend)
    ids = torch.cat([target[:, None], loss_fn.noise.sample((12, K), seed=seed)], 1)
    label = F.one_hot(torch.zeros(12, dtype=torch.int64), K + 1).float()
    scores = (loss_fn.weight[ids] @ hidden[:, :, None])[:, :, 0] + loss_fn.bias[ids]
    log_q = loss_fn.noise.log_prob(ids)
    z = scores - math.log(V) - log_q - math.log(K)
    expected = F.binary_cross_entropy_with_logits(z, label, reduction="none").sum(1).mean()
    torch.testing.assert_close(loss_fn(hidden, target, seed=seed), expected)

    blog = make(correction="log_q", candidate_reduction="mean", backend=backend)
    blog.load_state_dict(loss_fn.state_dict())
    expected = F.binary_cross_entropy_with_logits(scores - log_q, label)
    torch.testing.assert_close(blog(hidden, target, seed=seed), expected)


# Exact helpers and evaluation
def test_exact_helpers():
    loss_fn = make()
    hidden = torch.randn(3, 4, D)
    logits = F.linear(hidden, loss_fn.weight, loss_fn.bias)
    torch.testing.assert_close(loss_fn.logits(hidden), logits)
    torch.testing.assert_close(loss_fn.log_prob(hidden), F.log_softmax(logits, -1))
    assert torch.equal(loss_fn.predict(hidden), logits.argmax(-1))
    assert loss_fn.log_prob(hidden).requires_grad


@pytest.mark.parametrize("layer", [nn.Linear(D, V), nn.Linear(D, V, bias=False), make(), make(dtype=torch.float64)])
@pytest.mark.parametrize("max_logits", [1, 7 * V, 2**24])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nll_is_cross_entropy_in_chunks(layer, max_logits, reduction):
    hidden, target = torch.randn(3, 5, D, dtype=layer.weight.dtype), torch.randint(V, (3, 5))
    target[1, 2:] = -100
    logits = F.linear(hidden, layer.weight, layer.bias).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten(), reduction=reduction).detach()
    got = evaluate.nll(layer, hidden, target, reduction=reduction, max_logits=max_logits)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected.reshape(got.shape))
    assert got.shape == ((3, 5) if reduction == "none" else ())
    if reduction == "mean":
        torch.testing.assert_close(evaluate.perplexity(layer, hidden, target, max_logits=max_logits), expected.exp())


def test_nll_ignores_any_index_and_takes_any_leading_shape():
    layer = make()
    hidden, target = torch.randn(7, D), torch.randint(V, (7,))
    target[:3] = 5
    expected = F.cross_entropy(layer.logits(hidden), target, ignore_index=5)
    torch.testing.assert_close(evaluate.nll(layer, hidden, target, ignore_index=5), expected)
    one = evaluate.nll(layer, hidden[6], target[6], ignore_index=-1)
    torch.testing.assert_close(one, F.cross_entropy(layer.logits(hidden[6:]), target[6:]))
    assert evaluate.nll(layer, hidden[:0], target[:0], reduction="none").shape == (0,)
    assert float(evaluate.nll(layer, hidden[:0], target[:0], reduction="sum")) == 0
    assert torch.isnan(evaluate.nll(layer, hidden, torch.full((7,), -100)))


@pytest.mark.parametrize(("hidden_dtype", "dtype"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_nll_of_low_precision(hidden_dtype, dtype):
    layer = make(dtype=dtype)
    hidden, target = torch.randn(9, D).to(hidden_dtype), torch.randint(V, (9,))
    exact = F.cross_entropy(F.linear(hidden.double(), layer.weight.double(), layer.bias.double()), target)
    got = evaluate.nll(layer, hidden, target)
    assert got.dtype == torch.float32
    assert abs(float(got) - float(exact.detach())) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("max_logits", [1, 3 * V, 2**24])
def test_topk_in_chunks(max_logits):
    layer, hidden = make(), torch.randn(2, 5, D)
    values, ids = evaluate.topk(layer, hidden, 4, max_logits=max_logits)
    expected = layer.logits(hidden).topk(4)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(values, expected.values.detach())
    assert [t.shape for t in evaluate.topk(layer, hidden[:0], 4)] == [(0, 5, 4)] * 2
    assert torch.equal(evaluate.topk(layer, hidden[0, 0], V)[1].sort().values, torch.arange(V))


# Drop-in training
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.5}, False),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, False),
    "Adam": (torch.optim.Adam, {"lr": 0.05}, False),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}, False),
    "sparse SGD": (torch.optim.SGD, {"lr": 0.5}, True),
    "SparseAdam": (torch.optim.SparseAdam, {"lr": 0.05}, True),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.2}, True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_lowers_the_exact_loss(name, backend):
    optimizer, options, sparse = OPTIMIZERS[name]
    loss_fn = make(sparse=sparse, backend=backend)
    hidden, target = torch.randn(64, D), torch.randint(V, (64,))
    steps = optimizer(loss_fn.parameters(), **options)
    before = evaluate.nll(loss_fn, hidden, target)
    for _ in range(100):
        steps.zero_grad()
        loss_fn(hidden, target).backward()
        steps.step()
    after = evaluate.nll(loss_fn, hidden, target)
    assert after < before - 0.3, f"{float(before):.3f} -> {float(after):.3f}"


def test_sparse_and_dense_sgd_take_the_same_step(backend):
    hidden, target = batch()
    dense, sparse = make(backend=backend), make(backend=backend, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    untouched = torch.ones(V, dtype=torch.bool)
    for step in range(3):
        seed = torch.tensor([step, 7])
        untouched[target] = False
        untouched[dense.noise.sample((12, K), seed=seed)] = False
        for loss_fn in (dense, sparse):
            loss_fn.zero_grad()
            loss_fn(hidden, target, seed=seed).backward()
            torch.optim.SGD(loss_fn.parameters(), lr=0.1).step()
    torch.testing.assert_close(sparse.weight, dense.weight)
    torch.testing.assert_close(sparse.bias, dense.bias)


def test_a_sparse_step_leaves_untouched_rows_bit_identical(backend):
    loss_fn = make(sparse=True, backend=backend)
    before = loss_fn.weight.detach().clone()
    hidden, target = batch(2)
    loss_fn(hidden, target, negatives=torch.tensor([1, 2])).backward()
    torch.optim.SparseAdam(loss_fn.parameters(), lr=0.1).step()
    changed = (loss_fn.weight.detach() != before).any(1).nonzero()[:, 0].tolist()
    assert set(changed) == {1, 2, *target.tolist()}
