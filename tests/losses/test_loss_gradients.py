"""Gradients as autograd sees them: gradcheck, sparse against dense, repeatability, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import Case, leaf, run
from tolerances import assert_close, relative_error

from nce_ext import _warnings, functional
from nce_ext import noise as noises

F64 = torch.float64
CHECKS = {
    "plain": {},
    "removed hits": {"remove_hits": True},
    "uncorrected mean over candidates": {"correction": "none", "candidate_reduction": "mean"},
    "uniform labels, one loss each": {"positive_label": "uniform", "reduction": "none"},
    "log q without k": {"correction": "log_q", "reduction": "sum"},
    "shared": {"shared": True},
}


@pytest.mark.parametrize("name", CHECKS)
def test_gradcheck(name, backend):
    case = Case(lead=(2, 3), dim=5, classes=7, negatives=6, positives=2, pad=True, dtype=F64, options=CHECKS[name])
    log_z = torch.randn(2, 3, dtype=F64)
    weights = torch.rand(2, 3, dtype=F64)

    def loss(hidden, weight, bias, log_z, sample_weight):
        return functional.nce_loss(
            hidden, weight, case.target, case.noise, 6, bias=bias, log_z=log_z, sample_weight=sample_weight,
            seed=case.seed, backend=backend, **case.options,
        )  # fmt: skip

    inputs = [leaf(t) for t in (case.hidden, case.weight, case.bias, log_z, weights)]
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


SHAPES = {
    "small": {},
    "one class": {"classes": 1, "negatives": 40},
    "padded": {"positives": 3, "pad": True, "lead": (30,), "classes": 8},
    "bfloat16": {"dtype": torch.bfloat16, "lead": (100,), "classes": 20},
    "float16 under float32": {"dtype": torch.float16, "hidden_dtype": torch.float32, "lead": (100,)},
    "hits": {"lead": (40,), "classes": 4, "options": {"remove_hits": True}},
    "empty": {"lead": (0,)},
    "wide": {"dim": 301, "lead": (33,), "negatives": 33},
}


@pytest.mark.parametrize("name", SHAPES)
def test_sparse_gradient_is_the_dense_one_exactly(name, backend):
    case = Case(**SHAPES[name])
    dense, sparse = run(case, backend), run(case, backend, sparse=True)
    assert torch.equal(sparse.loss, dense.loss)
    assert torch.equal(sparse.hidden, dense.hidden)
    for parameter in ("weight", "bias"):
        left, right = getattr(sparse, parameter), getattr(dense, parameter)
        assert left.layout == torch.sparse_coo
        assert right.layout == torch.strided
        if backend == "fused":
            assert torch.equal(left.to_dense(), right)
        elif right.numel():  # torch adds the duplicates of an uncoalesced gradient in another order, rounding each sum
            assert relative_error(left, right) < 10 * torch.finfo(right.dtype).eps


@pytest.mark.parametrize("name", SHAPES)
def test_a_padded_gradient_is_the_dense_one_in_rows_of_fixed_number(name, native):
    case = Case(**SHAPES[name])
    dense, padded = run(case, "fused"), run(case, "fused", sparse="padded")
    assert torch.equal(padded.loss, dense.loss)
    for parameter in ("weight", "bias"):
        left, right = getattr(padded, parameter), getattr(dense, parameter)
        pairs = case.target.numel() + case.hidden.shape[:-1].numel() * case.negatives
        assert left._nnz() == min(pairs, case.classes)
        assert torch.equal(left.to_dense(), right)
        if left._nnz():
            steps = left._indices()[0].diff()
            spare = int((steps <= 0).sum())  # all of them at class 0, behind the ascending rest
            if spare > 1:
                assert not left._values()[-spare + 1 :].any()


@pytest.mark.parametrize("name", SHAPES)
def test_sparse_gradients_come_coalesced(name, native):
    case = Case(**SHAPES[name])
    weight, bias, hidden = leaf(case.weight), leaf(case.bias), leaf(case.hidden)
    options = {"bias": bias, "seed": case.seed, "sparse": True, "backend": "fused", **case.options}
    loss = functional.nce_loss(hidden, weight, case.target, case.noise, case.negatives, **options)
    for gradient, size in zip(torch.autograd.grad(loss, [weight, bias]), (weight.shape, bias.shape), strict=True):
        assert gradient.is_coalesced()
        rows = gradient.indices()[0]
        assert (rows[1:] > rows[:-1]).all()
        assert gradient.shape == size
        assert gradient.values().shape == (len(rows), *size[1:])
        torch.sparse_coo_tensor(gradient.indices(), gradient.values(), size, check_invariants=True)
    touched = case.noise.sample((hidden.shape[:-1].numel(), case.negatives), seed=case.seed).unique()
    wanted = torch.cat([touched, case.target[case.target != -100].flatten()]).unique() if len(hidden) else touched
    assert set(rows.tolist()) <= set(wanted.tolist())
    if not case.options.get("remove_hits") and not case.pad:
        assert torch.equal(rows, wanted)


def test_stored_gradients_stay_flagged_as_coalesced(native):
    """backward() drops the flag, and SparseAdam and Adagrad would then sort and sum all rows again."""
    case = Case()
    weight, bias, hidden = leaf(case.weight), leaf(case.bias), leaf(case.hidden)
    options = {"bias": bias, "sparse": True, "backend": "fused"}
    for _ in range(3):  # from the second on the gradients of two draws are added
        functional.nce_loss(hidden, weight, case.target, case.noise, case.negatives, **options).backward()
        for parameter in (weight, bias):
            assert parameter.grad.is_coalesced()
            rows = parameter.grad.indices()[0]
            assert (rows[1:] > rows[:-1]).all()


def test_gradients_with_repeated_rows_are_not_flagged_as_coalesced(native):
    case = Case()
    weight, hidden = leaf(case.weight), leaf(case.hidden)
    functional.nce_loss(
        hidden, weight, case.target, case.noise, case.negatives, sparse=True, backend="fused"
    ).backward()  # watches weight
    weight.grad = None
    torch.nn.functional.embedding(torch.tensor([3, 3, 5]), weight, sparse=True).sum().backward()
    assert not weight.grad.is_coalesced()
    assert torch.equal(weight.grad.to_dense()[3], torch.full((weight.shape[1],), 2.0))


# Repeatability
def skewed_case(dtype=torch.float32) -> Case:
    """Over 10^5 pairs, most of them in a few hot rows, so that threads meet in the middle of a segment."""
    case = Case(lead=(5000,), dim=20, classes=3000, negatives=30, dtype=dtype)
    case.noise = noises.Unigram(1 / torch.arange(1, 3001) ** 2.0, power=1.0)
    case.target = torch.randint(3, (5000,))
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_repeat_bit_for_bit_whatever_the_threads(sparse, dtype, native):
    case = skewed_case(dtype)
    results = []
    for threads in (1, 2, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case, "fused", sparse=sparse))
    for other in results[1:]:
        for name in ("loss", "hidden", "weight", "bias"):
            first, second = getattr(results[0], name), getattr(other, name)
            if first.is_sparse:
                assert torch.equal(first._indices(), second._indices())
                first, second = first._values(), second._values()
            assert torch.equal(first, second), name


def test_hot_rows_are_summed_rightly(native):
    """155 000 pairs, half of them in one row."""
    case = skewed_case(F64)
    fused, reference = run(case, "fused"), run(case, "reference")
    for name in ("weight", "bias", "hidden"):
        torch.testing.assert_close(getattr(fused, name), getattr(reference, name), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("classes", [255, 256, 257, 2**16, 2**16 + 1, 70_000, 2**21 + 1])
def test_radix_sort_boundaries(classes, native):
    """The highest class and powers of two are where a sort by digits would lose a bit."""
    corners = [2**i + d for i in range(22) for d in (-1, 0, 1)]
    corners = sorted({c for c in [*corners, classes - 1, classes - 2] if 0 <= c < classes})
    target = torch.tensor(corners).repeat(40)[torch.randperm(40 * len(corners))]
    hidden, weight = torch.randn(len(target), 2), torch.zeros(classes, 2, requires_grad=True)
    options = {"correction": "none", "sparse": True, "reduction": "sum", "backend": "fused"}
    loss = functional.nce_loss(hidden, weight, target, noises.Uniform(classes), 0, **options)
    loss.backward()
    assert weight.grad._indices()[0].tolist() == corners
    expected = torch.zeros(classes, 2, dtype=F64).index_add(0, target, -0.5 * hidden.double())
    assert_close(weight.grad._values(), expected[corners], torch.float32, "values")


# The graph
@pytest.mark.parametrize("sparse", [False, True])
def test_backward_twice_with_retain_graph(sparse, backend):
    case = Case(options={"sparse": sparse})
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    arguments = {"seed": case.seed, "sparse": sparse, "backend": backend}
    loss = functional.nce_loss(hidden, weight, case.target, case.noise, 5, **arguments)
    loss.backward(retain_graph=True)
    once_hidden, once_weight = hidden.grad.clone(), weight.grad.to_dense().clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once_hidden)
    torch.testing.assert_close(weight.grad.to_dense(), 2 * once_weight)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused(native):
    case = Case()
    weight = leaf(case.weight)
    for sparse in (False, True):
        loss = functional.nce_loss(case.hidden, weight, case.target, case.noise, 5, sparse=sparse, backend="fused")
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice \(create_graph=True\)"):
            torch.autograd.grad(loss, weight, create_graph=True)


def test_the_reference_can_be_differentiated_twice():
    case = Case(lead=(3,), dim=2, classes=4, negatives=3, dtype=F64)

    def loss(hidden, weight):
        return functional.nce_loss(hidden, weight, case.target, case.noise, 3, seed=case.seed, backend="reference")

    assert torch.autograd.gradgradcheck(loss, [leaf(case.hidden), leaf(case.weight)])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "log_z", "hidden bias", "weight log_z"])
def test_only_what_is_asked_for_gets_a_gradient(wanted, sparse, backend):
    case = Case(dtype=F64, options={"sparse": sparse, "reduction": "none"})
    upstream = torch.randn(7, dtype=F64)
    log_z = torch.randn(7, dtype=F64)
    everything = run(case, backend, upstream, log_z=log_z)
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias, "log_z": log_z}
    tensors = {name: t.detach().clone().requires_grad_(name in wanted.split()) for name, t in tensors.items()}
    losses = functional.nce_loss(
        tensors["hidden"], tensors["weight"], case.target, case.noise, 5, bias=tensors["bias"],
        log_z=tensors["log_z"], seed=case.seed, backend=backend, **case.options,
    )  # fmt: skip
    losses.backward(upstream)
    assert torch.equal(losses.detach(), everything.loss)
    for name, tensor in tensors.items():
        if name in wanted.split():
            torch.testing.assert_close(tensor.grad, getattr(everything, name), check_layout=True)
        else:
            assert tensor.grad is None


def test_nothing_to_differentiate(backend):
    case = Case()
    options = {"bias": case.bias, "seed": case.seed, "backend": backend}
    frozen = functional.nce_loss(case.hidden, case.weight, case.target, case.noise, 5, **options)
    assert not frozen.requires_grad
    weight = leaf(case.weight)
    with torch.no_grad():
        loss = functional.nce_loss(case.hidden, weight, case.target, case.noise, 5, **options)
    assert not loss.requires_grad
    assert torch.equal(loss, frozen)
    with torch.inference_mode():
        loss = functional.nce_loss(case.hidden, case.weight, case.target, case.noise, 5, **options)
    assert torch.equal(loss, frozen)


def test_forward_leaves_its_inputs_alone(backend):
    case = Case(positives=2, pad=True)
    before = [t.clone() for t in (case.hidden, case.weight, case.bias, case.target, case.seed, case.noise.table)]
    run(case, backend)
    after = (case.hidden, case.weight, case.bias, case.target, case.seed, case.noise.table)
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_a_table_used_twice_adds_its_gradients(backend):
    """Input embedding and output layer in one parameter."""
    case = Case(dtype=F64)
    table = leaf(case.weight)
    words = torch.randint(50, (7,))
    options = {"seed": case.seed, "backend": backend}
    functional.nce_loss(table[words], table, case.target, case.noise, 5, **options).backward()
    inputs, outputs = leaf(case.weight), leaf(case.weight)
    functional.nce_loss(inputs[words], outputs, case.target, case.noise, 5, **options).backward()
    torch.testing.assert_close(table.grad, inputs.grad + outputs.grad)


# The warning about dense gradients
def dense_warnings(classes: int, *, calls: int = 1, **options) -> list[str]:
    """Warnings of forward passes on a table that is never touched beyond a few pages."""
    _warnings.forget()
    weight = torch.empty(classes, 1024).requires_grad_(options.pop("requires_grad", True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            functional.nce_loss(
                torch.zeros(2, 1024), weight, torch.tensor([0, 1]), noises.Uniform(classes), 2, **options
            )
    return [str(w.message) for w in caught if "weight.grad will be dense" in str(w.message)]


def test_a_dense_gradient_over_256_mib_warns_once(unpoisoned, backend):
    limit = 2**16  # rows of 1024 float32: 256 MiB
    (message,) = dense_warnings(limit + 1, calls=3, backend=backend)
    assert "256 MiB for 65537 rows of 1024" in message
    assert "sparse=True" in message
    assert not dense_warnings(limit, backend=backend)
    assert not dense_warnings(limit + 1, sparse=True, backend=backend)
    assert not dense_warnings(limit + 1, requires_grad=False, backend=backend)
    with torch.no_grad():
        assert not dense_warnings(limit + 1, backend=backend)
