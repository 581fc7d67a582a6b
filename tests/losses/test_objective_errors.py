"""Refusals of what only some losses have: options out of range, and combinations that have no meaning."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from cases import Case, leaf
from objective_cases import LOSSES
from objective_cases import loss as loss_of
from test_loss_errors import REFUSALS as OF_EVERY_LOSS
from test_loss_errors import B, D, K, V, arguments, ids

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises

NCE, SAMPLING, SOFTMAX = "nce_loss", "negative_sampling_loss", "sampled_softmax_loss"
MODULES: dict[str, type] = {
    NCE: nce_ext.NCELoss, SAMPLING: nce_ext.NegativeSamplingLoss, SOFTMAX: nce_ext.SampledSoftmaxLoss,
}  # fmt: skip


class Refusal(NamedTuple):
    losses: tuple[str, ...]
    changes: dict[str, Any]
    error: type[Exception]
    message: str


ALL, BINARY = tuple(MODULES), (NCE, SAMPLING)
A = "adversarial_temperature"
# Refused by the function and, since they are options, by the module's constructor.
OPTIONS = {
    "unique a string": Refusal(ALL, {"unique": "yes"}, ValueError, r"unique must be True, False or 'tf', got 'yes'"),
    "unique a number": Refusal(ALL, {"unique": 1}, ValueError, r"unique must be True, False or 'tf', got 1"),
    "unique None": Refusal(ALL, {"unique": None}, ValueError, r"unique must be True, False or 'tf', got None"),
    "unique by log q": Refusal(
        ALL, {"unique": True, "correction": "log_q"}, ValueError,
        r"correction must be 'log_kq' or 'none' with unique, whose .* are of all k draws, got 'log_q'",
    ),
    "distinct by log q": Refusal(
        ALL, {"unique": "tf", "correction": "log_q"}, ValueError, r"correction must be 'log_kq' or 'none' with unique"
    ),
    "unique without a corrected target": Refusal(
        (SOFTMAX,), {"unique": True, "correct_positive": False}, ValueError,
        r"unique must be False with correct_positive=False, which is about draws with replacement",
    ),
    "distinct without a corrected target": Refusal(
        (SOFTMAX,), {"unique": "tf", "correct_positive": False}, ValueError, r"unique must be False with correct_pos"
    ),
    "hits without a corrected target": Refusal(
        (SOFTMAX,), {"remove_hits": False, "correct_positive": False}, ValueError,
        r"remove_hits must be True with correct_positive=False, whose negatives are never the target",
    ),
    "no correction without a corrected target": Refusal(
        (SOFTMAX,), {"correction": "none", "correct_positive": False}, ValueError,
        r"correction must be 'log_kq' or 'log_q' with correct_positive=False, got 'none'",
    ),
    "correct_positive a number": Refusal(
        (SOFTMAX,), {"correct_positive": 1}, TypeError, r"correct_positive must be True or False, got 1"
    ),
    "correct_positive None": Refusal(
        (SOFTMAX,), {"correct_positive": None}, TypeError, r"correct_positive must be True or False, got None"
    ),
    "smoothing negative": Refusal(
        (SOFTMAX,), {"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in 0 \.\. 1, got -0\.1"
    ),
    "smoothing above 1": Refusal(
        (SOFTMAX,), {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in 0 \.\. 1, got 1\.5"
    ),
    "smoothing not a number": Refusal(
        (SOFTMAX,), {"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in 0 \.\. 1, got nan"
    ),
    "smoothing a string": Refusal(
        (SOFTMAX,), {"label_smoothing": "0.1"}, TypeError, r"label_smoothing must be a number, got str '0\.1'"
    ),
    "smoothing a bool": Refusal(
        (SOFTMAX,), {"label_smoothing": True}, TypeError, r"label_smoothing must be a number, got bool True"
    ),
    "temperature zero": Refusal((SAMPLING,), {A: 0}, ValueError, rf"{A} must be positive, got 0"),
    "temperature negative": Refusal((SAMPLING,), {A: -1.0}, ValueError, rf"{A} must be finite and >= 0, got -1\.0"),
    "temperature infinite": Refusal((SAMPLING,), {A: math.inf}, ValueError, rf"{A} must be finite and >= 0, got inf"),
    "temperature not a number": Refusal(
        (SAMPLING,), {A: math.nan}, ValueError, rf"{A} must be finite and >= 0, got nan"
    ),
    "temperature a string": Refusal((SAMPLING,), {A: "1"}, TypeError, rf"{A} must be a number, got str '1'"),
    "temperature a bool": Refusal((SAMPLING,), {A: True}, TypeError, rf"{A} must be a number, got bool True"),
    "temperature with a mean": Refusal(
        (SAMPLING,), {A: 1.0, "candidate_reduction": "mean"}, ValueError,
        rf"candidate_reduction must be 'sum' with {A}, got 'mean'",
    ),
    "margin infinite": Refusal((SAMPLING,), {"margin": math.inf}, ValueError, r"margin must be finite, got inf"),
    "margin not a number": Refusal((SAMPLING,), {"margin": math.nan}, ValueError, r"margin must be finite, got nan"),
    "margin None": Refusal((SAMPLING,), {"margin": None}, TypeError, r"margin must be a number, got NoneType"),
    "margin a string": Refusal((SAMPLING,), {"margin": "9"}, TypeError, r"margin must be a number, got str '9'"),
    "calibration negative": Refusal(
        (SAMPLING,), {"calibration": -0.5}, ValueError, r"calibration must be in 0 \.\. 1, got -0\.5"
    ),
    "calibration above 1": Refusal(
        (SAMPLING,), {"calibration": 1.01}, ValueError, r"calibration must be in 0 \.\. 1, got 1\.01"
    ),
    "calibration a string": Refusal(
        (SAMPLING,), {"calibration": "yes"}, TypeError, r"calibration must be a number, got str 'yes'"
    ),
    "calibration a bool": Refusal(
        (SAMPLING,), {"calibration": True}, TypeError, r"calibration must be a number, got bool True"
    ),
}  # fmt: skip
NEGATIVES = torch.zeros(K, dtype=torch.int64)
# Known at the call alone.
CALLS = {
    "unique with negatives": Refusal(
        ALL, {"unique": True, "negatives": NEGATIVES}, ValueError, r"unique must be False with negatives: it says how"
    ),
    "distinct with negatives": Refusal(
        ALL, {"unique": "tf", "negatives": NEGATIVES}, ValueError, r"unique must be False with negatives"
    ),
    "unique with log q": Refusal(
        ALL, {"unique": True, "log_q": (torch.zeros(B), torch.zeros(K))}, ValueError, r"log_q must come with negatives"
    ),
    "more distinct ids than classes": Refusal(
        ALL, {"unique": "tf", "num_negatives": V + 1}, ValueError, r"k must be in 0 \.\. 10 = n_classes, got 11"
    ),
    "more distinct ids than drawable classes": Refusal(
        ALL, {"unique": "tf", "num_negatives": V}, ValueError, r"k must be at most 9, the classes that can be drawn"
    ),
    "unique of nothing": Refusal(
        ALL, {"unique": True, "num_negatives": 0}, ValueError, r"num_negatives must be >= 1 with correction='log_kq'"
    ),
    "unique with a target never drawn": Refusal(
        ALL, {"unique": True, "target": ids(1, 2, V - 1)}, ValueError,
        r"target must be classes that the noise can draw, got class 9 .* \[2\]",
    ),
    "unique with a target above": Refusal(
        ALL, {"unique": True, "target": ids(1, V, 2)}, ValueError, r"target must be in 0 \.\. 9 .* got 10 at index \[1"
    ),
    "several targets without a corrected one": Refusal(
        (SOFTMAX,), {"correct_positive": False, "target": torch.tensor([[1, 2], [3, -100], [-100, -100]])}, ValueError,
        r"target must have one positive an example with correct_positive=False, got 2",
    ),
    "calibration of one class": Refusal(
        (SAMPLING,),
        {
            "calibration": 0.5, "noise": noises.Uniform(1), "weight": torch.zeros(1, D), "bias": torch.zeros(1),
            "target": ids(0, 0, 0),
        },
        ValueError, r"calibration must be None where the noise has one class, got 0\.5",
    ),
}  # fmt: skip
REFUSALS = {**OPTIONS, **CALLS}
CASES = [(name, loss) for name, refusal in REFUSALS.items() for loss in refusal.losses]


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_refusals_of_the_functions(name, loss, backend):
    """Before any work: no random number is drawn, but for distinct ids, and nothing is changed."""
    _, changes, error, message = REFUSALS[name]
    given_arguments = arguments(**{"correction": "log_kq", "backend": backend, **changes})
    tensors = [given_arguments[key] for key in ("hidden", "weight", "bias")]
    before, state = [t.detach().clone() for t in tensors], torch.get_rng_state()
    with pytest.raises(error, match=message):
        getattr(functional, loss)(**given_arguments)
    assert all(torch.equal(t.detach(), old) and t.grad is None for t, old in zip(tensors, before, strict=True))
    if name in OPTIONS:
        assert torch.equal(torch.get_rng_state(), state)


NEW = {"log_z", "candidate_reduction"}  # what the softmax loss does not take


@pytest.mark.parametrize("name", OF_EVERY_LOSS)
@pytest.mark.parametrize("loss", [SAMPLING, SOFTMAX])
def test_what_every_loss_refuses(name, loss, backend):
    changes, error, message = OF_EVERY_LOSS[name]
    given_arguments = arguments(**{"correction": "log_kq", "backend": backend, **changes})
    if loss == SOFTMAX and NEW & set(changes):
        error, message = TypeError, "unexpected keyword argument"
    with pytest.raises(error, match=message):
        getattr(functional, loss)(**given_arguments)


# Constructors
SOFTMAX_MODULE = {
    "log_z": ({"log_z": 1.0}, ValueError, r"log_z must be 0\.0 with a softmax loss, in which it cancels, got 1\.0"),
    "log_z learned": ({"log_z": "learned"}, ValueError, r"log_z must be 0\.0 with a softmax loss, .* got 'learned'"),
    "candidate_reduction": (
        {"candidate_reduction": "mean"}, ValueError, r"candidate_reduction must be 'sum' with a softmax loss, got 'mea"
    ),
}  # fmt: skip


def build(loss: str, **changes: Any):
    options = {"in_features": D, "n_classes": V, "noise": noises.Uniform(V), "num_negatives": K, **changes}
    return MODULES[loss](**options)


@pytest.mark.parametrize(("name", "loss"), [case for case in CASES if case[0] in OPTIONS])
def test_refusals_of_the_constructors(name, loss):
    _, changes, error, message = OPTIONS[name]
    with pytest.raises(error, match=message):
        build(loss, **{"correction": "log_kq", **changes})


@pytest.mark.parametrize("name", SOFTMAX_MODULE)
def test_what_cancels_in_a_softmax(name):
    changes, error, message = SOFTMAX_MODULE[name]
    with pytest.raises(error, match=message):
        build(SOFTMAX, **changes)


def test_calibration_of_one_class():
    with pytest.raises(ValueError, match=r"calibration must be None where the noise has one class, got 0\.5"):
        build(SAMPLING, n_classes=1, noise=noises.Uniform(1), calibration=0.5)


AT_THE_CALL = {
    "log_z": (1.0, r"log_z must be None or 0\.0 with a softmax loss, in which it cancels, got 1\.0"),
    "log_z of each": (torch.zeros(B), r"log_z must be None or 0\.0 with a softmax loss, .* got tensor"),
}


@pytest.mark.parametrize("name", AT_THE_CALL)
def test_log_z_at_the_call(name):
    log_z, message = AT_THE_CALL[name]
    with pytest.raises(ValueError, match=message):
        build(SOFTMAX)(torch.zeros(B, D), ids(1, 2, 3), log_z=log_z)
    assert torch.isfinite(build(SOFTMAX)(torch.zeros(B, D), ids(1, 2, 3), log_z=0.0))


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("option", ["correct_positive", "calibration", A, "margin", "label_smoothing", "log_q"])
def test_an_option_of_another_loss_is_unknown(loss, option):
    own = {NCE: [], SAMPLING: ["calibration", A, "margin"], SOFTMAX: ["correct_positive", "label_smoothing"]}[loss]
    if option not in own:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            build(loss, **{option: 0.5})


# Shared negatives
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_ids_of_shared_negatives_are_refused_in_the_same_words(name, reduction, backend):
    """As for negatives of each example, for which the index has one more number."""
    case = Case(lead=(6,), classes=9, negatives=4, options={"reduction": reduction, "correction": "log_q"})
    case.noise = noises.Unigram([1] * 8 + [0])
    case.target %= 8

    def message(ids: torch.Tensor, **more) -> str:
        hidden, weight = leaf(case.hidden), leaf(case.weight)
        with pytest.raises(ValueError, match="must be") as caught:
            loss_of(name, hidden, weight, case.bias, case, negatives=ids, backend=backend, **more)
        assert hidden.grad is None
        assert weight.grad is None
        return str(caught.value)

    for bad in (9, -1, 2**40, 8):
        ids = torch.tensor([0, bad, 3])
        shared, own = message(ids), message(ids.repeat(6, 1))
        assert own.replace("[0, 1]", "[1]") == shared
        assert shared.startswith("negatives must be ")
        assert str(bad) in shared
    good = torch.arange(3)
    for bad in (9, -1, 2**40, 8):
        case.target[4] = bad
        shared = message(good)
        assert message(good.repeat(6, 1)) == shared
        assert shared.startswith("target must be ")
        assert "at index [4]" in shared
    case.target[4] = 0
    log_q = (torch.tensor([0.0, 0, 0, math.nan, 0, 0]), torch.zeros(3))
    assert message(good, log_q=log_q) == "log_q[0] must be finite, got nan at index [3]"
    log_q = (torch.zeros(6), torch.tensor([0, 0, -math.inf]))
    assert message(good, log_q=log_q) == "log_q[1] must be finite, got -inf at index [2]"


# What is not refused
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (SOFTMAX, {"label_smoothing": 0}),
        (SOFTMAX, {"label_smoothing": 1}),
        (SOFTMAX, {"correct_positive": False, "target": ids(1, 2, 3)[:, None]}),
        (SOFTMAX, {"correct_positive": False, "correction": "log_q"}),
        (SAMPLING, {"calibration": 0}),
        (SAMPLING, {"calibration": 1}),
        (SAMPLING, {"margin": -24}),
        (SAMPLING, {A: 1, "calibration": 0.5}),
        (SAMPLING, {A: 2**-30}),
        (NCE, {"unique": "tf", "num_negatives": V - 1}),
        (NCE, {"unique": True, "num_negatives": 10 * V}),
        (NCE, {"unique": True, "num_negatives": 0, "correction": "none"}),
        (NCE, {"unique": "tf", "num_negatives": 0, "correction": "none"}),
    ],
)
def test_the_ends_of_ranges_are_fine(loss, options, backend):
    assert torch.isfinite(getattr(functional, loss)(**arguments(**{"backend": backend, **options})))
