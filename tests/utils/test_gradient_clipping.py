"""Clipping and unscaling of sparse gradients: what PyTorch's functions do with the same gradients made dense."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F
from torch.nn import utils as peer
from torch.utils._python_dispatch import TorchDispatchMode

import nce_ext
from nce_ext import utils

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float64]  # and, to clip, float16
V, D = 11, 3


def parameter(grad: torch.Tensor | None, like: torch.Tensor | None = None) -> torch.nn.Parameter:
    like = grad if like is None else like
    made = torch.nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
    made.grad = grad
    return made


def coo(ids: list[int], values: torch.Tensor, coalesced: bool | None = None) -> torch.Tensor:
    options = {"size": (V, *values.shape[1:]), "is_coalesced": coalesced, "check_invariants": True}
    return torch.sparse_coo_tensor(torch.tensor([ids], dtype=torch.int64), values, **options)


def dyadic(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Multiples of 1/16, so small that sums of some, of their squares too, are exact in every dtype and any order."""
    return (torch.randint(-31, 32, shape) / 16).to(dtype)


def dense(grad: torch.Tensor) -> torch.Tensor:
    """The sum of the rows by numpy in float64; the gradients themselves where they are dense."""
    if not grad.is_sparse:
        return grad.clone()
    summed = np.zeros(grad.shape)
    np.add.at(summed, grad._indices()[0].numpy(), grad._values().double().numpy())
    return torch.from_numpy(summed).to(grad.dtype)


def mixed(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Every kind of gradient: accumulated, coalesced, of a bias, of more dimensions, of no rows, dense, None."""
    return [
        parameter(coo([7, 2, 7, 0, 2, 7], dyadic(6, D, dtype=dtype))),
        parameter(dyadic(4, 5, dtype=dtype)),
        parameter(None, torch.zeros(V, D, dtype=dtype)),
        parameter(coo([1, 4, 9], dyadic(3, D, dtype=dtype), coalesced=True)),
        parameter(coo([10, 10, 3], dyadic(3, dtype=dtype))),
        parameter(coo([5, 5], dyadic(2, 2, 3, dtype=dtype))),
        parameter(coo([], dyadic(0, D, dtype=dtype))),
        parameter(dyadic(7, dtype=dtype)),
    ]


def twins_of(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [parameter(None if p.grad is None else dense(p.grad), p.detach()) for p in parameters]


def assert_as_twins(parameters, twins, rtol: float = 0.0) -> None:
    for i, (got, expected) in enumerate(zip(parameters, twins, strict=True)):
        if expected.grad is None:
            assert got.grad is None
            continue
        options = {"rtol": rtol, "atol": 0, "equal_nan": True, "msg": lambda text, i=i: f"gradient {i}: {text}"}
        torch.testing.assert_close(dense(got.grad), expected.grad, **options)
        if got.grad.is_sparse:
            assert got.grad.is_coalesced()
            assert got.grad._indices()[0].unique().numel() == got.grad._nnz()


def grads_as_they_are(parameters):
    """What may not change: the objects, whether they are coalesced, and their rows."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [(g, g.is_sparse and g.is_coalesced(), (g._values() if g.is_sparse else g).clone()) for g in grads]


def assert_untouched(parameters, before) -> None:
    for (grad, flag, values), (old, old_flag, rows) in zip(grads_as_they_are(parameters), before, strict=True):
        assert (grad is old, flag) == (True, old_flag)
        assert torch.equal(values.nan_to_num(123), rows.nan_to_num(123))


@pytest.mark.parametrize("max_norm", [0.75, 1e4, INF, 0])
@pytest.mark.parametrize("norm_type", [0.5, 1, 2.0, 3, INF, "inf"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_norm_clipping_is_that_of_the_dense_gradients(dtype, norm_type, max_norm):
    parameters = mixed(dtype)
    twins = twins_of(parameters)
    flat = np.abs(np.concatenate([t.grad.double().numpy().ravel() for t in twins if t.grad is not None]))
    expected = peer.clip_grad_norm_(twins, max_norm, norm_type)
    got = utils.clip_grad_norm_(parameters, max_norm, norm_type)
    assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
    eps = torch.finfo(dtype).eps
    rtol = 0.0 if norm_type in (1, 2, INF, "inf") else 8 * eps  # inexact powers, added up in another order
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)
    assert_as_twins(parameters, twins, rtol)
    p = float(norm_type)
    truth = flat.max() if p == INF else (flat**p).sum() ** (1 / p)
    assert float(got) == pytest.approx(truth, rel=4 * eps)


def test_mixed_dtypes_give_the_promoted_one():
    for first, second in itertools.permutations(DTYPES, 2):
        grads = coo([4, 4], dyadic(2, D, dtype=first)), dyadic(5, dtype=second), coo([], dyadic(0, D, dtype=second))
        parameters = [parameter(grad) for grad in grads]
        twins = twins_of(parameters)
        got, expected = utils.clip_grad_norm_(parameters, 0.5), peer.clip_grad_norm_(twins, 0.5)
        assert (got.dtype, float(got)) == (expected.dtype, float(expected))
        assert_as_twins(parameters, twins)


@pytest.mark.parametrize("norm_type", [1, 2, INF])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_a_norm_that_is_not_finite(bad, norm_type):
    """As in PyTorch; only classes without a row, which NaN would fill in a dense gradient, stay as they are."""
    parameters = mixed(torch.float32)
    parameters[0].grad._values()[3, 1] = bad
    twins, before = twins_of(parameters), grads_as_they_are(parameters)
    with pytest.raises(RuntimeError, match=r"total norm of order .* is non-finite"):
        utils.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)
    assert_untouched(parameters, before)
    got, expected = utils.clip_grad_norm_(parameters, 1.0, norm_type), peer.clip_grad_norm_(twins, 1.0, norm_type)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)
    for p, twin in zip(parameters, twins, strict=True):
        if p.grad is not None and p.grad.is_sparse:
            twin.grad[~torch.isin(torch.arange(V), p.grad._indices()[0])] = 0.0
    assert_as_twins(parameters, twins)


@pytest.mark.parametrize("clip_value", [0, 0.3, 1.5, INF])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_value_clipping_is_that_of_the_dense_gradients(dtype, clip_value):
    parameters = mixed(dtype)
    parameters[0].grad._values()[0, 0] = NAN
    parameters[3].grad._values()[0, 0] = -INF
    twins = twins_of(parameters)
    peer.clip_grad_value_(twins, clip_value)
    assert utils.clip_grad_value_(parameters, clip_value) is None
    assert_as_twins(parameters, twins)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accumulated_gradients_of_a_loss(backend, dtype, steps):
    noise = nce_ext.noise.Unigram(range(1, V + 1))
    sparse, whole = (nce_ext.NCELoss(D, V, noise, 4, sparse=s, backend=backend, dtype=dtype) for s in (True, False))
    whole.load_state_dict(sparse.state_dict())
    for step in range(steps):
        hidden, target = torch.randn(5, D, dtype=dtype), torch.randint(V, (5,))
        for loss_fn in (sparse, whole):
            loss_fn(hidden, target, seed=torch.tensor([1, step])).backward()
    summed = [p.grad.to_dense().double().numpy() for p in sparse.parameters()]
    norm = math.sqrt(sum((g**2).sum() for g in summed))
    got = utils.clip_grad_norm_(sparse.parameters(), 0.1)
    peer.clip_grad_norm_(whole.parameters(), 0.1)
    assert_close(got, norm, dtype, "norm")
    for p, dense_one, grad in zip(sparse.parameters(), whole.parameters(), summed, strict=True):
        assert p.grad.is_coalesced()
        assert_close(p.grad, grad * (0.1 / (norm + 1e-6)), dtype, "gradient")
        assert_close(p.grad, dense_one.grad, dtype, "gradient against the dense one")


def test_coalescing_in_place():
    parameters = mixed(torch.float32)
    twins, objects = twins_of(parameters), [p.grad for p in parameters]
    assert utils.coalesce_grads_(parameters) is None
    assert_as_twins(parameters, twins)
    assert [p.grad._nnz() for p in parameters if p.grad is not None and p.grad.is_sparse] == [3, 3, 2, 1, 0]
    assert parameters[0].grad._indices().tolist() == [[0, 2, 7]]
    assert all(parameters[i].grad is objects[i] for i in (1, 2, 3, 7))
    objects = [p.grad for p in parameters]
    utils.coalesce_grads_(parameters)
    utils.clip_grad_norm_(parameters, 0.5)
    utils.clip_grad_value_(parameters, 0.5)
    assert all(p.grad is old for p, old in zip(parameters, objects, strict=True))


def test_a_gradient_given_twice_is_what_pytorch_makes_of_it():
    """Once more in the norm, and scaled once more; so also a gradient that two parameters have."""
    grads = coo([4, 4], dyadic(2, D)), coo([2, 4], dyadic(2, D)), coo([2, 4], dyadic(2, D), coalesced=True)
    for grad, shared in itertools.product(grads, (False, True)):
        p, twin = parameter(grad.clone()), parameter(dense(grad))
        given, twins = ([p, parameter(p.grad)], [twin, parameter(twin.grad)]) if shared else ([p, p], [twin, twin])
        assert utils.clip_grad_norm_(given, 0.25) == peer.clip_grad_norm_(twins, 0.25)
        assert given[0].grad is given[1].grad
        assert_as_twins(given, twins)


def test_gradients_in_the_same_memory_are_scaled_once_each():
    """Autograd gives two embeddings whose rows are added one tensor of rows."""
    p, q = (torch.nn.Parameter(torch.zeros(V, D)) for _ in range(2))
    picked = (F.embedding(torch.tensor([i]), w, sparse=True).sum(0) for i, w in enumerate((p, q)))
    (sum(picked) * torch.tensor([1.0, 2.0, 2.0])).sum().backward()
    assert p.grad._values().data_ptr() == q.grad._values().data_ptr()
    twins = twins_of([p, q])
    assert utils.clip_grad_norm_([p, q], 1.0) == peer.clip_grad_norm_(twins, 1.0)
    assert_as_twins([p, q], twins)
    rows, row = dyadic(2, D), dyadic(1, D)
    parameters = [parameter(coo([1, 5], rows, coalesced=True)), parameter(rows)]
    parameters.append(parameter(coo([3, 8], row.expand(2, D), coalesced=True)))
    parameters.append(parameter(coo([8, 8, 1], row.expand(3, D))))
    parameters.append(parameter(coo([5, 1, 5], dyadic(D, 3).T)))
    twins = twins_of(parameters)
    assert utils.clip_grad_norm_(parameters, 0.5) == peer.clip_grad_norm_(twins, 0.5)
    assert parameters[1].grad is rows
    assert_as_twins(parameters, twins)


def test_nothing_waits_for_a_value():
    """On CUDA that would be for the device; only the number of rows that are summed is waited for, before."""

    names = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    parameters = mixed(torch.float32)
    scaler, optimizer = scaled(parameters)
    utils.coalesce_grads_(parameters)
    with Calls():
        utils.unscale_(scaler, optimizer)
        utils.clip_grad_norm_(parameters, 1.0)
        utils.clip_grad_value_(parameters, 0.1)
    assert {"_foreach_norm", "_foreach_mul_", "_foreach_clamp_max_"} <= names
    assert not {"_local_scalar_dense", "nonzero", "equal"} & names


def test_what_may_be_given():
    grad = coo([4, 4], torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
    for wrap in (lambda p: p, lambda p: [p], lambda p: (q for q in [p]), lambda p: {p}, lambda p: iter((p,))):
        p, q = parameter(grad), parameter(grad)
        assert utils.clip_grad_norm_(wrap(p), 1.0) == 5.0
        utils.clip_grad_value_(wrap(p), 0.25)
        assert p.grad.to_dense()[4].tolist() == [0.25, 0.25]
        utils.coalesce_grads_(wrap(q))
        assert q.grad._nnz() == 1
    for nothing in ([], [parameter(None, torch.zeros(3))], torch.zeros(2)):
        assert torch.equal(utils.clip_grad_norm_(nothing, 1.0), torch.tensor(0.0))
        assert utils.clip_grad_value_(nothing, 1.0) is None
        utils.coalesce_grads_(nothing)
    for call in (utils.coalesce_grads_, partial(utils.clip_grad_norm_, max_norm=1)):
        with pytest.warns(UserWarning, match=r"empty iterator.* used-up") as caught:
            call(p for p in [])
        assert caught[0].filename == __file__


COST = """
import resource, torch
from nce_ext import utils
def step(n_classes):
    weight = torch.zeros(1, 1).expand(n_classes, 64).requires_grad_()
    rows = torch.randint(n_classes, (1, 100))
    weight.grad = torch.sparse_coo_tensor(rows.repeat(1, 2), torch.randn(200, 64), weight.shape, check_invariants=False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    utils.unscale_(scaler, torch.optim.SGD([weight], 1.0))
    utils.clip_grad_norm_(weight, 1e-9)
    utils.clip_grad_value_(weight, 1e-12)
    assert weight.grad._nnz() <= 100 and float(weight.grad._values().abs().max()) <= 1e-12
step(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(50_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_depend_on_the_vocabulary():
    """One byte a class would take 48 MiB; a dense gradient 12 GiB."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COST], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16


def scaled(parameters, scale: float = 1024.0) -> tuple[torch.amp.GradScaler, torch.optim.Optimizer]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    scaler.scale(torch.zeros(()))
    return scaler, torch.optim.SGD(parameters, lr=0.5)


@pytest.mark.parametrize("bad", [None, INF, NAN], ids=str)
@pytest.mark.parametrize("where", [0, 1, 3], ids=["accumulated", "dense", "coalesced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscaled_steps_are_those_of_the_dense_gradients(dtype, bad, where):
    parameters = mixed(dtype)
    if bad is not None:
        grad = parameters[where].grad
        (grad._values() if grad.is_sparse else grad)[1, 1] = bad
    twins = twins_of(parameters)
    (scaler, optimizer), (dense_scaler, dense_optimizer) = scaled(parameters), scaled(twins)
    utils.unscale_(scaler, optimizer)
    dense_scaler.unscale_(dense_optimizer)
    assert_as_twins(parameters, twins)
    total = utils.clip_grad_norm_(parameters, 1e-4)
    expected = peer.clip_grad_norm_(twins, 1e-4)
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)
    for of_scaler, of_optimizer in ((scaler, optimizer), (dense_scaler, dense_optimizer)):
        of_scaler.step(of_optimizer)
        of_scaler.update()
    assert scaler.get_scale() == dense_scaler.get_scale() == (1024 if bad is None else 512)
    assert bool(parameters[0].any()) == (bad is None)
    for p, twin in zip(parameters, twins, strict=True):
        assert torch.equal(p, twin)


def test_a_sum_that_overflows_is_found():
    """The scaler alone looks at each row of a class, all finite, and lets the step pass."""

    def step(unscale) -> tuple[float, bool]:
        p = parameter(coo([4, 4], torch.full((2, D), 3e38)))
        scaler, optimizer = scaled([p], 2.0)
        unscale(scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale(), bool(p.isfinite().all())

    assert step(utils.unscale_) == (1.0, True)
    assert step(lambda scaler, optimizer: utils.coalesce_grads_(optimizer.param_groups[0]["params"])) == (1.0, True)
    assert step(lambda scaler, optimizer: scaler.unscale_(optimizer))[0] == 2.0


def test_a_scaler_that_refuses_or_is_disabled_changes_nothing():
    def refused(error, message):
        before = grads_as_they_are(parameters)
        with pytest.raises(error, match=message):
            utils.unscale_(scaler, optimizer)
        assert_untouched(parameters, before)

    parameters = mixed(torch.float16)
    before, (scaler, optimizer) = grads_as_they_are(parameters), scaled(parameters)
    utils.unscale_(torch.amp.GradScaler("cpu", enabled=False), optimizer)
    assert_untouched(parameters, before)
    refused(ValueError, "unscale FP16 gradients")
    parameters = mixed(torch.float32)
    scaler, (_, optimizer) = torch.amp.GradScaler("cpu"), scaled(parameters)
    refused(AssertionError, "_scale is None")
    scaler.scale(torch.zeros(()))
    utils.unscale_(scaler, optimizer)
    parameters[0].grad = coo([2, 2], dyadic(2, D))
    refused(RuntimeError, "already been called")
