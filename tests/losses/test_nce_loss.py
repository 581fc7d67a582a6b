"""Loss and all gradients against the oracle, on both backends: sizes, dtypes, options, masks and memory layouts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import Case, assert_matches, run, truth
from tolerances import EAGER_MARGIN, as_float64, assert_close, relative_error

import nce_ext
from nce_ext import functional

F64 = torch.float64


# Sizes
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 17, 64, 100, 130, 300])
def test_any_row_length(dim, dtype, backend):
    assert_matches(Case(dim=dim, dtype=dtype, negatives=9), backend)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("k", [1, 5, 15, 16, 17, 31, 32, 33, 100])
def test_any_number_of_negatives(k, dtype, backend):
    case = Case(negatives=k, dtype=dtype)
    assert_matches(case, backend)
    assert_matches(case.with_options(remove_hits=True), backend)


@pytest.mark.parametrize("correction", ["none", "log_q"])
def test_no_negatives(correction, backend):
    assert_matches(Case(negatives=0, options={"correction": correction}), backend)
    assert_matches(Case(negatives=0, positives=3, pad=True, options={"correction": correction}), backend)


@pytest.mark.parametrize("classes", [1, 2, 50, 5000])
@pytest.mark.parametrize("remove_hits", [False, True])
def test_any_vocabulary(classes, remove_hits, backend):
    assert_matches(Case(classes=classes, negatives=20, options={"remove_hits": remove_hits}), backend)


@pytest.mark.parametrize("batch", [0, 1, 7, 64])
@pytest.mark.parametrize("positives", [0, 1, 2, 3])
def test_any_batch_and_number_of_positives(batch, positives, backend):
    assert_matches(Case(lead=(batch,), positives=positives, pad=positives > 1), backend)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 0, 3), (1, 1, 1, 2)])
@pytest.mark.parametrize("positives", [0, 2])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_leading_shape(lead, positives, reduction, backend):
    case = Case(lead=lead, positives=positives, options={"reduction": reduction})
    assert run(case, backend).loss.shape == (lead if reduction == "none" else ())
    assert_matches(case, backend)


def test_an_empty_batch_has_loss_and_gradients_zero(backend):
    for reduction in ("mean", "sum"):
        got = run(Case(lead=(0,), options={"reduction": reduction}), backend)
        assert float(got.loss) == 0
        assert got.weight.shape == (50, 16)
        assert not got.weight.any()
        assert got.hidden.shape == (0, 16)


# Storage types
MIXES = list(itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2))


@pytest.mark.parametrize(("hidden_dtype", "dtype"), [*MIXES, (F64, F64)])
@pytest.mark.parametrize("dim", [5, 64, 130])
def test_storage_types_round_once(hidden_dtype, dtype, dim):
    """The compiled kernels accumulate in float32 and round a result once, whatever the mix of storage types."""
    backend = "fused" if nce_ext.build_info()["simd"] else pytest.skip("no compiled kernels")
    case = Case(lead=(40,), dim=dim, hidden_dtype=hidden_dtype, dtype=dtype, classes=30, negatives=21)
    assert_matches(case, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_is_no_worse_than_eager_in_low_precision(dtype):
    """The reference gathers and scatters in the storage type, so its row gradients round once a pair."""
    case = Case(lead=(40,), dim=64, dtype=dtype, classes=30, negatives=21)
    got, expected = run(case, "reference"), truth(case).value
    hidden, weight, bias = (t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias))
    ids = torch.cat([case.target[:, None], case.noise.sample((40, 21), seed=case.seed)], 1)
    z = (weight[ids] @ hidden[:, :, None])[:, :, 0] + bias[ids] - (math.log(21) + case.noise.log_prob(ids)).to(dtype)
    label = torch.zeros_like(z)
    label[:, 0] = 1
    eager = torch.nn.functional.binary_cross_entropy_with_logits(z, label, reduction="none").sum(1).mean()
    eager.backward()
    assert_close(got.loss, expected.loss, torch.float32, "loss")
    for name, leaf in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        ours = relative_error(getattr(got, name), getattr(expected, name))
        theirs = relative_error(leaf.grad, getattr(expected, name))
        assert ours <= EAGER_MARGIN * theirs, f"{name}: {ours} against eager's {theirs}"


# Options
@pytest.mark.parametrize("correction", ["log_kq", "log_q", "none"])
@pytest.mark.parametrize("positive_label", ["one", "uniform"])
@pytest.mark.parametrize("candidate_reduction", ["sum", "mean"])
@pytest.mark.parametrize("remove_hits", [False, True])
def test_every_combination_of_options(correction, positive_label, candidate_reduction, remove_hits, backend):
    options = {
        "correction": correction,
        "positive_label": positive_label,
        "candidate_reduction": candidate_reduction,
        "remove_hits": remove_hits,
    }
    case = Case(lead=(12,), classes=9, negatives=18, positives=3, pad=True, dtype=F64, options=options)
    for reduction in ("mean", "sum", "none"):
        assert_matches(case, backend, torch.randn(12, dtype=F64) if reduction == "none" else None, reduction=reduction)


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("with_log_q", [False, True])
@pytest.mark.parametrize("remove_hits", [False, True])
def test_given_negatives(index, per_example, with_log_q, remove_hits, backend):
    case = Case(lead=(2, 3), positives=2, classes=12, dtype=F64, options={"remove_hits": remove_hits})
    case.target = case.target.to(index)
    negatives = torch.randint(12, (2, 3, 35) if per_example else (35,)).to(index)
    log_q = (-3 * torch.rand(2, 3, 2), -3 * torch.rand(negatives.shape)) if with_log_q else None
    assert_matches(case, backend, negatives=negatives, log_q=log_q)
    one_target = Case(lead=(2, 3), classes=12, dtype=F64)
    assert_matches(one_target, backend, negatives=negatives, log_q=log_q and (log_q[0][..., 0], log_q[1]))


def test_log_q_of_negatives_may_be_shared_or_not(backend):
    case = Case(lead=(5,), dtype=F64)
    shared, own = torch.randint(50, (8,)), torch.randint(50, (5, 8))
    for negatives in (shared, own):
        for negative_log_q in (-torch.rand(8, dtype=F64), -torch.rand(5, 8, dtype=F64)):
            assert_matches(case, backend, negatives=negatives, log_q=(-torch.rand(5, dtype=F64), negative_log_q))


def test_log_q_gets_no_gradient(backend):
    case = Case()
    log_q = (torch.rand(7, requires_grad=True), torch.rand(4, requires_grad=True))
    run(case, backend, negatives=torch.tensor([1, 2, 3, 4]), log_q=log_q)
    assert log_q[0].grad is None
    assert log_q[1].grad is None


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_shared_negatives_are_one_draw(shape, backend):
    case = Case(lead=shape, negatives=33, options={"shared": True})
    assert_matches(case, backend)
    ids = case.noise.sample((1, 33), seed=case.seed)[0]
    given = run(case, backend, shared=False, negatives=ids)
    assert torch.equal(run(case, backend).loss, given.loss)


@pytest.mark.parametrize("shape", ["number", "scalar", "per example"])
def test_log_z(shape, backend):
    case = Case(lead=(2, 5), dtype=F64)
    log_z = {"number": 1.75, "scalar": torch.tensor(1.75, dtype=F64), "per example": torch.randn(2, 5, dtype=F64)}
    for reduction, upstream in (("mean", None), ("none", torch.randn(2, 5, dtype=F64))):
        assert_matches(case, backend, upstream, log_z=log_z[shape], reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sample_weight(reduction, backend):
    case = Case(lead=(3, 4), positives=2, pad=True, dtype=F64, options={"reduction": reduction})
    weight = torch.rand(3, 4, dtype=F64)
    upstream = torch.randn(3, 4, dtype=F64) if reduction == "none" else None
    assert_matches(case, backend, upstream, sample_weight=weight)
    weight[0] = 0
    assert_matches(case, backend, upstream, sample_weight=weight)


def test_sample_weights_of_zero_give_zero(backend):
    got = run(Case(), backend, sample_weight=torch.zeros(7))
    assert float(got.loss) == 0
    assert not got.weight.any()


def test_sample_weight_gets_its_gradient(backend):
    case = Case(dtype=F64)
    weight = torch.rand(7, dtype=F64, requires_grad=True)
    losses = run(case, backend, reduction="none").loss
    run(case, backend, sample_weight=weight, reduction="sum")
    torch.testing.assert_close(weight.grad, losses)


# Masks
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 10**12])
@pytest.mark.parametrize("positives", [0, 1, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_targets(ignore_index, positives, reduction, backend):
    options = {"ignore_index": ignore_index, "reduction": reduction, "remove_hits": True}
    case = Case(lead=(20,), classes=10, negatives=12, positives=positives, pad=True, dtype=F64, options=options)
    assert (case.target == ignore_index).any()
    assert_matches(case, backend, torch.randn(20, dtype=F64) if reduction == "none" else None)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_batch_that_is_ignored_gives_exact_zeros(reduction, sparse, backend):
    case = Case(options={"reduction": reduction, "sparse": sparse})
    case.target = torch.full((7,), -100)
    got = run(case, backend)
    for value in (got.loss, got.hidden, got.weight, got.bias):
        assert not (value.to_dense() if value.is_sparse else value).any()  # NaN counts as true


def test_ignored_examples_do_not_read_what_they_hold(backend):
    """Not a number in the hidden vector of an ignored example reaches neither loss nor gradients."""
    case = Case(dtype=F64)
    case.target[2] = -100
    clean = run(case, backend)
    case.hidden[2] = math.nan
    got = run(case, backend)
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(got.weight, clean.weight)
    assert torch.equal(got.hidden, clean.hidden)


def test_when_every_negative_is_a_hit(backend):
    case = Case(classes=1, negatives=40, dtype=F64, options={"remove_hits": True})
    assert_matches(case, backend)
    case = Case(lead=(6,), negatives=40, dtype=F64, options={"remove_hits": True})
    hits = case.target[:, None].expand(6, 40).contiguous()
    assert_matches(case, backend, negatives=hits)
    alone = run(case, backend, negatives=hits, correction="none").loss
    torch.testing.assert_close(alone, run(case, backend, negatives=hits[:, :0], correction="none").loss)


def test_hits_of_any_positive_are_removed_in_any_column(backend):
    """Positive 2 of 3 among 100 negatives, once in each column in turn."""
    case = Case(lead=(100,), positives=3, classes=200, dtype=F64, options={"remove_hits": True})
    case.target = torch.tensor([[150, 160, 170]]).repeat(100, 1)
    negatives = torch.randint(100, (100, 100))
    negatives[torch.arange(100), torch.arange(100)] = 160
    assert_matches(case, backend, negatives=negatives, reduction="none")


def test_duplicates_count_as_often_as_they_occur(backend):
    case = Case(lead=(9,), dtype=F64, classes=5, positives=3, negatives=0)
    case.target = torch.full((9, 3), 2)
    assert_matches(case, backend, negatives=torch.tensor([4, 4, 4, 2, 2, 0]))


# Extremes
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("size", [30.0, 90.0, 100.0, 1e4])
def test_extreme_logits(size, dtype, backend):
    case = Case(lead=(4,), dim=2, classes=6, dtype=dtype, with_bias=False, options={"correction": "none"})
    case.hidden = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0.5, 0.5]], dtype=dtype)
    case.weight = size * torch.tensor([[1.0, -1], [-1, 1], [0, 0], [1, 1], [-1, -1], [0.5, 0.1]], dtype=dtype)
    case.target = torch.tensor([0, 0, 1, 4])
    negatives = torch.arange(6)
    assert_matches(case, backend, negatives=negatives)
    got = run(case, backend, negatives=negatives)
    assert all(torch.isfinite(t).all() for t in (got.loss, got.hidden, got.weight))


def test_small_losses_keep_their_digits(backend):
    """softplus(-30) is 9.4e-14, which 1 + e^-30 has lost in float32."""
    case = Case(lead=(1,), dim=1, classes=2, with_bias=False, options={"correction": "none", "reduction": "sum"})
    case.hidden, case.weight = torch.ones(1, 1), torch.tensor([[30.0], [-30.0]])
    case.target = torch.tensor([0])
    for negatives in (torch.tensor([1]), torch.full((17,), 1)):
        got, expected = run(case, backend, negatives=negatives), truth(case, negatives=negatives).value
        assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(got.hidden) == pytest.approx(float(expected.hidden[0, 0]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_scores_of_finite_inputs_do_not_make_nan_of_masked_columns(dtype, backend):
    """Scores of removed hits and ignored examples overflow; what is left is finite."""
    case = Case(lead=(3,), dim=4, classes=4, dtype=dtype, options={"remove_hits": True, "correction": "none"})
    huge = torch.finfo(dtype).max
    case.hidden = torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 1], [huge, huge, huge, huge]], dtype=dtype)
    case.weight = torch.eye(4, dtype=dtype)
    case.weight[3] = torch.finfo(dtype).max
    case.target = torch.tensor([0, 1, -100])
    got = run(case, backend, negatives=torch.tensor([2, 0, 1, 0]))
    assert all(torch.isfinite(t).all() for t in (got.loss, got.hidden, got.weight, got.bias))


# Upstream gradients
@pytest.mark.parametrize("sparse", [False, True])
def test_upstream_gradients_of_any_form(sparse, backend):
    case = Case(lead=(4, 3), dtype=F64, options={"reduction": "none", "sparse": sparse})
    for upstream in (
        torch.randn(4, 3, dtype=F64),
        torch.zeros(4, 3, dtype=F64),
        torch.tensor(2.0, dtype=F64).expand(4, 3),
        torch.randn(3, 4, dtype=F64).t(),
        torch.randn(4, 6, dtype=F64)[:, ::2],
    ):
        assert_matches(case, backend, upstream)


def test_same_seed_same_loss_on_both_backends(native):
    """Also for the noises whose log q is computed while drawing."""
    noises = (nce_ext.noise.Uniform(500), nce_ext.noise.LogUniform(500), nce_ext.noise.Unigram(torch.rand(500)))
    for noise, correction in itertools.product(noises, ("log_kq", "log_q", "none")):
        case = Case(lead=(30,), classes=500, negatives=37, options={"correction": correction, "reduction": "none"})
        case.noise = noise
        fused, reference = run(case, "fused"), run(case, "reference")
        for name in ("loss", "hidden", "weight", "bias"):
            assert_close(getattr(fused, name), as_float64(getattr(reference, name)), torch.float32, name)


def test_auto_is_fused_where_there_are_kernels(native):
    case = Case()
    assert torch.equal(run(case, "auto").loss, run(case, "fused").loss)


def test_generator_draws_the_seed(backend):
    case = Case(negatives=30)

    def loss(generator):
        return functional.nce_loss(
            case.hidden, case.weight, case.target, case.noise, 30, generator=generator, backend=backend
        )

    first = loss(torch.Generator().manual_seed(1))
    assert torch.equal(loss(torch.Generator().manual_seed(1)), first)
    assert not torch.equal(loss(torch.Generator().manual_seed(2)), first)
    torch.manual_seed(4)
    first = loss(None)
    assert not torch.equal(loss(None), first)
    torch.manual_seed(4)
    assert torch.equal(loss(None), first)


def test_negative_sampling_loss_is_the_uncorrected_loss(backend):
    case = Case(positives=2)
    options = {"bias": case.bias, "seed": case.seed, "backend": backend}
    arguments = (case.hidden, case.weight, case.target, case.noise, 5)
    loss = functional.negative_sampling_loss(*arguments, **options)
    assert torch.equal(loss, functional.nce_loss(*arguments, correction="none", **options))
