"""Negatives that all examples share: equal to the same negatives for each, in every chunk, layout and reduction."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from allocations import Allocations
from cases import Case, leaf
from objective_cases import F64, LOSSES, assert_matches, assert_result, is_softmax, loss, run, truth

from nce_ext import _warnings, functional
from nce_ext import noise as noises
from nce_ext._sampled import shared as _shared

ONE_TARGET = "uncorrected target"
PARTS = ("loss", "hidden", "weight", "bias")


def case_of(name: str, **sizes) -> Case:
    several = {} if name == ONE_TARGET else {"positives": 2, "pad": True}
    return Case(**{"lead": (4, 5), "dim": 6, "classes": 30, "negatives": 21, "dtype": F64, **several, **sizes})


def assert_equal_results(one, other, **tolerances) -> None:
    for part in PARTS:
        left, right = (t.to_dense() if t.is_sparse else t for t in (getattr(one, part), getattr(other, part)))
        torch.testing.assert_close(left, right, **(tolerances or {"rtol": 1e-12, "atol": 1e-13}))


# Against negatives of each example
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("remove_hits", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shared_is_the_same_ids_for_each(name, remove_hits, reduction, backend):
    if name == ONE_TARGET and not remove_hits:
        pytest.skip("refused, see test_objective_errors")
    case = case_of(name, options={"remove_hits": remove_hits, "reduction": reduction})
    ids = case.noise.sample((1, 21), seed=case.seed)[0]
    upstream = torch.randn(4, 5, dtype=F64) if reduction == "none" else None
    shared = run(name, case, backend, upstream, shared=True)
    assert_equal_results(shared, run(name, case, backend, upstream, negatives=ids.expand(4, 5, 21)))
    assert_equal_results(shared, run(name, case, backend, upstream, negatives=ids), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_duplicates_are_merged_and_count_as_often_as_they_occur(name, dtype, native):
    """k = 64 of 5 classes; the log q of equal ids may differ, and they are then columns of their own."""
    case = case_of(name, classes=5, negatives=64, dtype=dtype)
    assert_matches(name, case, "fused", shared=True)
    ids, of_target = torch.randint(5, (64,)), -torch.rand(case.target.shape, dtype=dtype) - 0.1
    by_class, by_draw = -torch.rand(5, dtype=dtype)[ids], -torch.rand(64, dtype=dtype)
    for negative_log_q in (by_class, by_draw, by_draw.round(decimals=1)):
        for sparse in (False, True):
            more = {"negatives": ids, "log_q": (of_target, negative_log_q), "correction": "log_q", "sparse": sparse}
            assert_matches(name, case, "fused", **more)


def test_columns_are_sorted_and_merged(native):
    ids = torch.tensor([4, 1, 4, 7, 1, 4])
    columns = _shared.SharedColumns(ids, None, 10, distinct=False)
    assert columns.ids.tolist() == [1, 4, 7]
    assert columns.multiplicity.tolist() == [2, 3, 1]
    assert _shared.SharedColumns(ids, None, 10, distinct=True).multiplicity is None
    columns = _shared.SharedColumns(ids, torch.tensor([0.0, 1, 0, 0, 2, 5]), 10, distinct=False)
    assert columns.ids.tolist() == [1, 1, 4, 4, 7]
    assert columns.hits(torch.tensor([[4, 0], [1, 9]])).tolist() == [[[2, 4], [0, 0]], [[0, 2], [5, 5]]]
    assert bool(_shared.SharedColumns(torch.tensor([1, 10]), None, 10, distinct=False).bad)
    assert not len(_shared.SharedColumns(torch.empty(0, dtype=torch.int64), None, 10, distinct=False).ids)


# Without replacement
def log_inclusion(noise, ids: torch.Tensor, k: int) -> np.ndarray:
    q = np.exp(noise.log_prob(ids, dtype=F64).numpy())
    return np.log(1 - (1 - q) ** k)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != ONE_TARGET])
def test_unique_counts_each_id_once_by_its_inclusion(name, backend):
    """The distinct ids by hand, with log q that numpy has computed, are given to every example."""
    case = case_of(name, classes=12, negatives=20)
    drawn = case.noise.sample((1, 20), seed=case.seed)[0]
    ids = drawn.unique()
    assert 1 < len(ids) < 20
    log_q = tuple(
        torch.from_numpy(log_inclusion(case.noise, t.clamp_min(0), 20)).reshape(t.shape) for t in (case.target, ids)
    )
    plain = {"candidate_reduction": "sum"} if name == "calibrated" else {}
    more = {"calibration": None} if name == "calibrated" else {}  # its k counts the draws
    got = run(name, case, backend, unique=True, correction="log_kq", **plain, **more)
    wanted = run(name, case, backend, negatives=ids, log_q=log_q, correction="log_q", **plain, **more)
    assert_equal_results(got, wanted, rtol=1e-5, atol=1e-6)
    assert_matches(name, case, backend, unique=True, correction="log_kq")
    uncorrected = run(name, case, backend, unique=True, correction="none", **plain, **more)
    wanted = run(name, case, backend, negatives=ids, correction="none", **plain, **more)
    assert_equal_results(uncorrected, wanted)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != ONE_TARGET])
def test_unique_as_in_tensorflow(name, backend):
    case = case_of(name, classes=40, negatives=20)
    ids, trials = case.noise.sample_distinct(20, seed=case.seed)
    assert len(ids.unique()) == 20 < int(trials)
    log_q = tuple(
        torch.from_numpy(log_inclusion(case.noise, t.clamp_min(0), int(trials))).reshape(t.shape)
        for t in (case.target, ids)
    )
    got = run(name, case, backend, unique="tf", correction="log_kq")
    wanted = run(name, case, backend, negatives=ids, log_q=log_q, correction="log_q")
    assert_equal_results(got, wanted, rtol=1e-5, atol=1e-6)
    assert_matches(name, case, backend, unique="tf", correction="log_kq")


@pytest.mark.parametrize("name", ["softmax", "adversarial", "nce"])
def test_unique_of_one_class(name, backend):
    assert_matches(name, case_of(name, classes=1, negatives=9), backend, unique=True, correction="log_kq")


def test_the_divisor_of_mean_counts_the_draws(backend):
    """Also those that unique leaves out."""
    case = Case(lead=(5,), classes=4, negatives=30, dtype=F64, options={"reduction": "none", "unique": True})
    total = run("nce", case, backend).loss
    torch.testing.assert_close(run("nce", case, backend, candidate_reduction="mean").loss, total / 31)


# Chunks
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_change_nothing(name, rows, reduction, monkeypatch, native):
    case = case_of(name, options={"shared": True, "reduction": reduction})
    upstream = torch.randn(4, 5, dtype=F64) if reduction == "none" else None
    whole = run(name, case, "fused", upstream)
    columns = len(case.noise.sample((1, 21), seed=case.seed).unique())
    monkeypatch.setitem(_shared.CHUNK_BYTES, "cpu", rows * columns * 8 + 7)
    sizes, operator = [], _shared.shared_loss_
    monkeypatch.setattr(_shared, "shared_loss_", lambda inputs: (sizes.append(len(inputs.logits)), operator(inputs))[1])
    chunked = run(name, case, "fused", upstream)
    assert sizes == [rows] * (20 // rows) + [20 % rows] * (20 % rows > 0)
    assert_equal_results(chunked, whole, rtol=1e-14, atol=1e-14)
    assert_result(case, chunked, truth(name, case, upstream))
    monkeypatch.setitem(_shared.CHUNK_BYTES, "cpu", 1)
    assert_equal_results(run(name, case, "fused", upstream), whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("works", [False, True])
def test_products_without_one_dnn(works, monkeypatch, native):
    monkeypatch.setattr(_shared, "_one_dnn_works", lambda: works)
    for name in LOSSES:
        case = case_of(name, lead=(33,), dim=19, dtype=torch.float32, options={"shared": True})
        assert_matches(name, case, "fused")
        assert_matches(name, case, "fused", torch.randn(33), reduction="none")


# Reductions
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sparse", [False, True, "padded"])
def test_gradients_made_in_the_forward_pass(name, reduction, sparse, native):
    """mean and sum are those of the losses of ``reduction="none"``, whatever comes from above."""
    case = case_of(name, options={"shared": True, "sparse": sparse})
    weights = torch.rand(4, 5, dtype=F64)
    ignored = case.target == -100 if case.target.dim() == 2 else (case.target == -100).all(-1)
    total = weights[~ignored].sum() if reduction == "mean" else 1.0
    leaves, others = ([leaf(t) for t in (case.hidden, case.weight, case.bias)] for _ in range(2))
    one = loss(name, *leaves, case, reduction=reduction, sample_weight=weights, backend="fused")
    each = loss(name, *others, case, reduction="none", backend="fused")
    torch.testing.assert_close(one, (each * weights).sum() / total, rtol=1e-13, atol=1e-14)
    (3.5 * one).backward()
    (3.5 * (each * weights).sum() / total).backward()
    for got, wanted in zip(leaves, others, strict=True):
        torch.testing.assert_close(got.grad.to_dense(), wanted.grad.to_dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sample_weights_and_log_z_get_gradients(name, reduction, native):
    case = case_of(name, options={"shared": True, "reduction": reduction})
    weights, log_z = torch.rand(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64)
    more = {} if is_softmax(name) else {"log_z": log_z}
    each = run(name, case, "fused", reduction="none", **more).loss
    learned = weights.clone().requires_grad_()
    run(name, case, "fused", sample_weight=learned, **more)
    counted = torch.ones(4, 5, dtype=F64)
    if case.target.dim() == 3:
        counted = (case.target != -100).any(-1).double()
    total = (weights * counted).sum()
    mean = (each * weights).sum() / total
    wanted = (each - mean * counted) / total if reduction == "mean" else each
    torch.testing.assert_close(learned.grad, wanted, rtol=1e-11, atol=1e-13)
    assert_matches(name, case, "fused", sample_weight=weights, **more)
    if more:
        assert_matches(name, case, "fused", log_z=torch.tensor(0.5, dtype=F64))


# The graph
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "hidden bias", "weight bias"])
def test_only_what_is_asked_for_gets_a_gradient(name, reduction, wanted, native):
    for sparse in (False, True):
        case = case_of(name, options={"shared": True, "reduction": reduction, "sparse": sparse})
        upstream = torch.randn(4, 5, dtype=F64) if reduction == "none" else None
        everything = run(name, case, "fused", upstream)
        tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
        tensors = {part: t.detach().clone().requires_grad_(part in wanted.split()) for part, t in tensors.items()}
        value = loss(name, *tensors.values(), case, backend="fused")
        value.backward(upstream)
        torch.testing.assert_close(value.detach(), everything.loss)
        for part, tensor in tensors.items():
            if part in wanted.split():
                torch.testing.assert_close(tensor.grad, getattr(everything, part), check_layout=True)
            else:
                assert tensor.grad is None


@pytest.mark.parametrize("name", ["nce", "softmax"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sparse", [False, True])
def test_backward_twice_and_never_differentiated_twice(name, reduction, sparse, native):
    case = case_of(name, options={"shared": True, "reduction": reduction, "sparse": sparse})
    hidden, weight, bias = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
    value = loss(name, hidden, weight, bias, case, backend="fused").sum()
    first = torch.autograd.grad(value, [hidden, weight, bias], retain_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice \(create_graph=True\)"):
        torch.autograd.grad(value, [hidden, weight], create_graph=True)
    second = torch.autograd.grad(value, [hidden, weight, bias])
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_is_no_work(reduction, native):
    case = case_of("softmax", options={"shared": True, "reduction": reduction})
    frozen = loss("softmax", case.hidden, case.weight, case.bias, case, backend="fused")
    assert not frozen.requires_grad
    with torch.no_grad():
        again = loss("softmax", leaf(case.hidden), leaf(case.weight), case.bias, case, backend="fused")
    assert torch.equal(again, frozen)
    torch.testing.assert_close(frozen, run("softmax", case, "fused").loss)


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_and_table_of_any_strides(name, native):
    case = case_of(name, options={"shared": True})
    values = case.hidden.clone()
    case.weight = torch.cat([case.weight, torch.full_like(case.weight, math.nan)], 1)[:, :6]
    for hidden in (
        values.transpose(0, 1).contiguous().transpose(0, 1),
        values.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        values.repeat_interleave(2, -1)[..., ::2],
        values[:1].expand(4, 5, 6),
    ):
        case.hidden = hidden
        assert_matches(name, case, "fused")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stored_gradients_are_coalesced(name, reduction, native):
    """Classes strictly ascend and are those that were touched, unless their negatives were all hits."""
    case = case_of(name, classes=300, negatives=40, options={"shared": True, "sparse": True, "reduction": reduction})
    for step in range(3):
        got = run(name, case, "fused", seed=torch.tensor([step, 1]))
        ids = case.noise.sample((1, 40), seed=torch.tensor([step, 1]))
        touched = torch.cat([case.target[case.target >= 0].flatten(), ids.flatten()]).unique()
        for gradient in (got.weight, got.bias):
            assert gradient.is_coalesced()
            assert torch.equal(gradient.indices()[0], touched)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sparse", [False, True, "padded"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch(name, sparse, reduction, backend):
    for unique in (False, name != ONE_TARGET):
        case = case_of(name, lead=(0,), options={"shared": True, "sparse": sparse, "reduction": reduction})
        got = run(name, case, backend, unique=unique, correction="log_kq")
        assert got.loss.shape == ((0,) if reduction == "none" else ())
        assert not got.loss.any()
        assert got.hidden.shape == (0, 6)
        for part, size in (("weight", (30, 6)), ("bias", (30,))):
            assert getattr(got, part).shape == size
            assert not getattr(got, part).to_dense().any()


# Cost
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_grows_with_batch_times_negatives(name, reduction, monkeypatch, native):
    """Beyond a chunk of scores, that is."""
    sizes = {"lead": (600,), "dim": 8, "classes": 5000, "negatives": 500, "dtype": torch.float32}
    case = case_of(name, **sizes, options={"shared": True, "reduction": reduction})
    monkeypatch.setitem(_shared.CHUNK_BYTES, "cpu", 4 * 500 * 10)
    leaves = [leaf(t) for t in (case.hidden, case.weight, case.bias)]
    with Allocations(leaves) as allocations:
        loss(name, *leaves, case, backend="fused").backward()
    assert allocations.largest == 5000 * 8  # the gradient
    with Allocations(leaves) as allocations:
        loss(name, *leaves, case, backend="fused", reduction="none").sum().backward()
    assert allocations.largest >= 300 * 500


def hints(batch: int, k: int, classes: int, calls: int = 1, **options) -> list[str]:
    _warnings.forget()
    hidden, weight, noise = torch.zeros(batch, 2), torch.zeros(classes, 2), noises.Uniform(classes)
    target = torch.zeros(batch, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            functional.sampled_softmax_loss(hidden, weight, target, noise, k, **options)
    return [str(w.message) for w in caught if "candidates read" in str(w.message)]


def test_a_hint_where_rows_are_read_many_times_over(backend):
    (message,) = hints(40, 10, 109, calls=3, backend=backend)
    assert message.startswith("40 examples of 10 + 1 candidates read 440 rows of a table of 109: ")
    assert "shared=True" in message
    assert "F.linear_cross_entropy" in message
    assert not hints(40, 10, 110, backend=backend)
    for options in ({"shared": True}, {"unique": True}, {"unique": "tf"}, {"negatives": torch.arange(10)}):
        assert not hints(40, 10, 109, backend=backend, **options)
    assert hints(40, 10, 109, backend=backend, negatives=torch.arange(10).expand(40, 10))
