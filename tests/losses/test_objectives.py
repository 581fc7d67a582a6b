"""Each loss of the family by itself: gradients by differences, closed forms, masks, extremes, and many negatives."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, leaf
from objective_cases import F64, LOSSES, assert_matches, is_softmax, loss, run, truth
from tolerances import assert_close, relative_error
from torch.nn import functional as F

from nce_ext import functional
from nce_ext import noise as noises

ONE_TARGET = "uncorrected target"
FORMS = {
    "per example": {},
    "one loss each": {"reduction": "none"},
    "shared": {"shared": True},
    "shared, one loss each": {"shared": True, "reduction": "none"},
    "unique": {"unique": True},
    "distinct": {"unique": "tf"},
    "hits": {"remove_hits": True, "positive_label": "uniform"},
    "uncorrected": {"correction": "none", "reduction": "sum"},
}


def case_of(name: str, options: dict, **sizes) -> Case:
    """Sizes that the loss takes, with padded targets where it takes several."""
    several = {} if name == ONE_TARGET else {"positives": 2, "pad": True}
    return Case(
        **{"lead": (2, 3), "dim": 5, "classes": 7, "negatives": 6, "dtype": F64, **several, **sizes}, options=options
    )


def skip_without_meaning(name: str, form: str) -> None:
    if name == ONE_TARGET and form in ("unique", "distinct", "uncorrected"):
        pytest.skip("refused, see test_objective_errors")


# Gradients
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "adversarial"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(name, form, backend):
    skip_without_meaning(name, form)
    case = case_of(name, FORMS[form])
    weights = torch.rand(2, 3, dtype=F64)
    inputs = [leaf(t) for t in (case.hidden, case.weight, case.bias, weights)]
    if not is_softmax(name):
        inputs.append(leaf(torch.randn(2, 3, dtype=F64)))

    def value(hidden, weight, bias, weights, *log_z):
        more = {"log_z": log_z[0]} if log_z else {}
        return loss(name, hidden, weight, bias, case, sample_weight=weights, backend=backend, **more)

    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


def eager_adversarial(case, hidden, weight, bias, temperature, margin, held=None):
    """The formula over [k] negatives; ``held`` (hidden, weight, bias) are where the weights of the negatives stand."""

    def scores(hidden, weight, bias, ids):
        return torch.einsum("bd,bcd->bc", hidden, weight[ids]) + bias[ids] + margin

    ids = case.options["negatives"].expand(len(hidden), -1)
    z = scores(hidden, weight, bias, torch.cat([case.target[:, None], ids], 1))
    share = torch.softmax(temperature * scores(*(held or (hidden, weight, bias)), ids), 1)
    return (F.softplus(-z[:, 0]) + (share * F.softplus(z[:, 1:])).sum(1)).mean()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("shared", [False, True])
def test_adversarial_gradients_hold_the_weights(shared, temperature, backend):
    """Differences of the loss whose weights stay where they are, and not those of the loss."""
    ids = torch.tensor([1, 4, 4, 0, 6, 2])
    case = Case(lead=(5,), dim=4, classes=7, dtype=F64, options={"negatives": ids})
    leaves = [leaf(t) for t in (case.hidden, case.weight, case.bias)]
    options = {"adversarial_temperature": temperature, "margin": 0.75, "backend": backend}
    options["negatives"] = ids if shared else ids.repeat(5, 1)
    got = functional.negative_sampling_loss(*leaves[:2], case.target, case.noise, 6, bias=leaves[2], **options)
    got.backward()
    held = [t.detach() for t in leaves]
    torch.testing.assert_close(got, eager_adversarial(case, *held, temperature, 0.75), rtol=1e-13, atol=1e-13)
    for i, parameter in enumerate(leaves):
        step = torch.randn_like(parameter)
        ends, moving = [], []
        for sign in (1, -1):
            moved = [*held[:i], held[i] + sign * 1e-5 * step, *held[i + 1 :]]
            ends.append(eager_adversarial(case, *moved, temperature, 0.75, held))
            moving.append(eager_adversarial(case, *moved, temperature, 0.75))
        slope = (parameter.grad * step).sum()
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-7, atol=1e-9)
        assert abs(slope - (moving[0] - moving[1]) / 2e-5) > 1e-5


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [{}, {"shared": True}, {"unique": True}])
def test_sparse_gradients_are_the_dense_ones_exactly(form, name, dtype, backend):
    skip_without_meaning(name, "unique" if "unique" in form else "")
    for reduction in ("mean", "none"):
        case = case_of(name, {"reduction": reduction, **form}, lead=(20,), dtype=dtype, classes=30, negatives=17)
        upstream = torch.randn(20, dtype=F64 if dtype == F64 else torch.float32) if reduction == "none" else None
        dense = run(name, case, backend, upstream)
        for layout in (True, "padded"):
            sparse = run(name, case, backend, upstream, sparse=layout)
            assert torch.equal(sparse.loss, dense.loss)
            assert torch.equal(sparse.hidden, dense.hidden)
            for part in ("weight", "bias"):
                left, right = getattr(sparse, part), getattr(dense, part)
                assert left.layout == torch.sparse_coo
                if backend == "fused":
                    if layout is True or not form:
                        assert torch.equal(left.to_dense(), right), f"{part}, {layout}"
                    else:  # rows of targets and negatives lie apart, each rounded
                        assert relative_error(left, right) < 2 * torch.finfo(dtype).eps
                else:
                    assert relative_error(left, right) < 10 * torch.finfo(dtype).eps


# Masks and extremes
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("shared", [False, True])
def test_no_mask_makes_nan(name, dtype, shared, backend):
    """Every negative a hit, every target ignored, one negative, one or two classes."""
    patterns = {
        "every negative a hit": (torch.full((4,), 2), torch.full((4, 9), 2)),
        "every target ignored": (torch.full((4,), -100), torch.randint(3, (4, 9))),
        "one negative": (torch.tensor([0, 1, 2, -100]), torch.full((4, 1), 2)),
        "no negative": (torch.tensor([0, 1, 2, -100]), torch.empty((4, 0), dtype=torch.int64)),
    }
    for classes in (1, 2, 3):
        if name == "calibrated" and classes == 1:
            continue
        for pattern, (target, negatives) in patterns.items():
            for reduction in ("mean", "none"):
                options = {"remove_hits": True, "reduction": reduction, "correction": "log_q"}
                case = Case(lead=(4,), dim=8, classes=classes, dtype=dtype, options=options)
                case.target = torch.where(target < 0, target, target.clamp_max(classes - 1))
                negatives = negatives.clamp_max(classes - 1)
                given = negatives[0] if shared else negatives
                got = run(name, case, backend, negatives=given)
                assert all(torch.isfinite(t).all() for t in (got.loss, got.hidden, got.weight, got.bias)), pattern
                if pattern == "every target ignored":
                    assert not any(t.any() for t in (got.loss, got.hidden, got.weight, got.bias))
                if backend == "fused":
                    assert_matches(name, case, backend, negatives=given)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("size", [100.0, 1e4, 6e4])
@pytest.mark.parametrize("shared", [False, True])
def test_extreme_scores(name, dtype, size, shared, backend):
    options = {"remove_hits": True, "correction": "log_q", "reduction": "none"}
    case = Case(lead=(4,), dim=2, classes=6, dtype=dtype, with_bias=False, options=options)
    root = size**0.5 / 2  # rows for which float16 can hold the gradients
    case.hidden = (4 * root * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0.5, 0.5]])).to(dtype)
    case.weight = (root * torch.tensor([[1.0, -1], [-1, 1], [0, 0], [1, 1], [-1, -1], [0.5, 0.1]])).to(dtype)
    case.target = torch.tensor([0, 0, 1, 4])
    for ids in (torch.arange(6), torch.tensor([4, 4, 1]), torch.tensor([3])):
        negatives = ids if shared else ids.repeat(4, 1)
        got = run(name, case, backend, negatives=negatives)
        assert all(torch.isfinite(t).all() for t in (got.loss, got.hidden, got.weight))
        if backend == "fused" or dtype in (F64, torch.float32):
            assert_matches(name, case, backend, negatives=negatives)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shared", [False, True])
def test_scores_that_overflow_give_no_nan_gradient(name, shared, backend):
    """An infinite score stands for the largest finite number."""
    options = {"remove_hits": True, "correction": "log_q", "reduction": "none"}
    case = Case(lead=(3,), dim=1, classes=4, with_bias=False, options=options)
    huge = 1e30
    case.hidden, case.weight = torch.tensor([[huge], [-huge], [0.0]]), torch.tensor([[0.0], [huge], [-huge], [1.0]])
    case.target = torch.tensor([0, 3, 1])
    for ids in (torch.tensor([1, 3]), torch.tensor([2]), torch.arange(4)):
        got = run(name, case, backend, negatives=ids if shared else ids.repeat(3, 1))
        assert not torch.isnan(got.loss).any()
        assert torch.isfinite(got.hidden).all()


# Closed forms
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_softmax_over_every_class_is_cross_entropy(smoothing, shared, backend):
    case = Case(lead=(9,), dim=6, classes=40, dtype=F64)
    case.noise = noises.Uniform(40)
    leaves, others = ([leaf(t) for t in (case.hidden, case.weight, case.bias)] for _ in range(2))
    negatives = torch.arange(40) if shared else torch.stack([torch.randperm(40) for _ in range(9)])
    options = {"bias": leaves[2], "negatives": negatives, "label_smoothing": smoothing, "backend": backend}
    got = functional.sampled_softmax_loss(*leaves[:2], case.target, case.noise, 1, **options)
    wanted = F.cross_entropy(F.linear(*others), case.target, label_smoothing=smoothing)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-14)
    for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_an_uncorrected_target_by_its_definition(smoothing, shared, backend):
    """Cross-entropy of the plain target score against s_j - log(n q_j / (1 - q_target)) of the n that are no hits."""
    case = Case(lead=(8,), dim=6, classes=6, dtype=F64)
    case.target %= 3
    ids = torch.cat([torch.randint(6, (8, 8)), torch.arange(3).expand(8, 3)], 1)  # of which some are hits
    ids = ids[0] if shared else ids
    log_q = case.noise.log_prob(torch.arange(6)).double()
    leaves, others = ([leaf(t) for t in (case.hidden, case.weight, case.bias)] for _ in range(2))
    options = {"bias": leaves[2], "negatives": ids, "label_smoothing": smoothing, "backend": backend}
    got = functional.sampled_softmax_loss(*leaves[:2], case.target, case.noise, 1, correct_positive=False, **options)
    scores, terms = F.linear(*others), []
    for i, y in enumerate(case.target.tolist()):
        kept = [j for j in (ids if shared else ids[i]).tolist() if j != y]
        rest = math.log1p(-float(log_q[y].exp()))
        columns = [scores[i, y], *(scores[i, j] - (math.log(len(kept)) + log_q[j] - rest) for j in kept)]
        terms.append(F.cross_entropy(torch.stack(columns), torch.tensor(0), label_smoothing=smoothing))
    wanted = torch.stack(terms).mean()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shared", [False, True])
def test_smoothing_is_that_of_cross_entropy_over_the_columns(shared, backend):
    """Nothing is masked: negatives are never the target."""
    case = Case(lead=(7,), classes=50, dtype=F64)
    case.target %= 20
    ids = torch.randint(20, 50, (12,) if shared else (7, 12))
    columns = torch.cat([case.target[:, None], ids.expand(7, 12)], 1)
    z = torch.einsum("bd,bcd->bc", case.hidden, case.weight[columns]) + case.bias[columns]
    z = z - case.noise.log_prob(columns).double()
    for smoothing in (0.0, 0.05, 0.5, 1.0):
        wanted = F.cross_entropy(z, torch.zeros(7, dtype=torch.int64), reduction="none", label_smoothing=smoothing)
        got = run("softmax", case, backend, negatives=ids, label_smoothing=smoothing, reduction="none").loss
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shared", [False, True])
def test_adversarial_weights_become_equal_as_the_temperature_falls(shared, backend):
    """The target's term and the mean over the negatives of theirs; linear in the temperature."""
    case = Case(lead=(7,), dtype=F64, negatives=9, options={"shared": shared, "reduction": "none"})
    plain = run("negative sampling", case, backend).loss
    target = run("negative sampling", case, backend, shared=False, negatives=torch.empty(0, dtype=torch.int64)).loss
    wanted, errors = target + (plain - target) / 9, []
    for temperature in (1e-3, 1e-6):
        got = functional.negative_sampling_loss(
            case.hidden, case.weight, case.target, case.noise, 9, bias=case.bias, seed=case.seed, backend=backend,
            adversarial_temperature=temperature, **case.options,
        )  # fmt: skip
        errors.append((got - wanted).abs().max())
    assert 1e-6 < errors[0] < 1e-2
    assert errors[1] < 1.01e-3 * errors[0] + 1e-14


@pytest.mark.parametrize("shared", [False, True])
def test_calibration_scales_the_targets_term(shared, backend):
    """By 1 at calibration 0, and by k / (V - 1) at calibration 1, for which the loss of the negatives stays."""
    case = Case(lead=(7,), dtype=F64, negatives=9, options={"shared": shared, "reduction": "none"})
    plain = run("negative sampling", case, backend)
    target = run("negative sampling", case, backend, shared=False, negatives=torch.empty(0, dtype=torch.int64)).loss
    none = run("negative sampling", case, backend, calibration=0)
    assert torch.equal(none.loss, plain.loss)
    assert torch.equal(none.weight, plain.weight)
    for t in (0.25, 1.0):
        alpha = 9 / 49
        beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
        got = run("negative sampling", case, backend, calibration=t).loss
        torch.testing.assert_close(got, plain.loss + (beta - 1) * target, rtol=1e-13, atol=1e-13)


def test_a_margin_is_added_to_every_score(backend):
    case = Case(lead=(7,), dtype=F64)
    with_margin = run("negative sampling", case, backend, margin=1.5).loss
    case.bias = case.bias + 1.5
    torch.testing.assert_close(with_margin, run("negative sampling", case, backend).loss, rtol=1e-14, atol=1e-14)


# Many negatives
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [300, 5000])
@pytest.mark.parametrize("order", ["rising", "falling", "level"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_one_pass_over_many_negatives(name, k, order, dtype, native):
    """The largest score so far changes with every tile, or never."""
    case = Case(lead=(2,), dim=3, classes=k + 1, dtype=dtype, with_bias=False, options={"correction": "log_q"})
    slope = {"rising": 1.0, "falling": -1.0, "level": 0.0}[order]
    case.hidden[:] = torch.tensor([[1.0, 0.25, 0], [0.5, 0, 0.25]])
    case.weight[:, 0] = slope * torch.linspace(-60, 60, k + 1)
    case.target = torch.tensor([k, k // 2])
    ids, log_q = torch.arange(k), (torch.zeros(2), torch.zeros(k))
    for negatives in (ids, ids.repeat(2, 1)):
        for reduction in ("none", "mean"):
            assert_matches(name, case, "fused", negatives=negatives, log_q=log_q, reduction=reduction)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["softmax", ONE_TARGET])
def test_small_softmax_losses_keep_their_digits(name, shared, native):
    """log(1 + e^-60) is 8.8e-27, of which a difference of two float32 numbers near 30 has nothing left."""
    case = Case(lead=(2,), dim=1, classes=3, with_bias=False, options={"correction": "log_q", "reduction": "none"})
    case.hidden, case.weight = torch.ones(2, 1), torch.tensor([[30.0], [-30.0], [-20.0]])
    case.target = torch.tensor([0, 0])
    ids = torch.tensor([1, 2])
    options = {"negatives": ids if shared else ids.repeat(2, 1), "log_q": (torch.full((2,), -0.5), torch.zeros(2))}
    got, expected = run(name, case, "fused", **options), truth(name, case, **options)
    assert expected.value.loss.max() < 1e-20
    for part in ("loss", "hidden"):
        exact = getattr(expected.value, part)
        torch.testing.assert_close(getattr(got, part).double(), torch.from_numpy(exact), rtol=1e-5, atol=0)
    assert_close(got.weight, expected.value.weight, torch.float32, "weight", expected.scale.weight)
