"""The in-place step: the exact one where nothing races, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, run
from tolerances import assert_close

from nce_ext import functional

RATE = 0.125


def step(case: Case, backend: str, **more):
    """The step on copies: losses, gradient of hidden, weight and bias afterwards."""
    weight = case.weight.clone()
    bias = None if case.bias is None else case.bias.clone()
    options = {"seed": case.seed, "bias": bias, **case.options, **more, "backend": backend}
    losses, gradient = functional.hogwild_sgd_(
        case.hidden, weight, case.target, case.noise, case.negatives, RATE, **options
    )
    return losses, gradient, weight, bias


CASES = {
    "plain": {},
    "several targets": {"positives": 3, "pad": True, "lead": (20,)},
    "ignored": {"pad": True, "lead": (40,)},
    "nce": {"options": {"correction": "log_kq", "log_z": 1.5, "remove_hits": True}},
    "means": {"positives": 2, "options": {"candidate_reduction": "mean", "positive_label": "uniform"}},
    "no bias": {"with_bias": False},
    "double": {"dtype": torch.float64},
    "bfloat16 hidden": {"hidden_dtype": torch.bfloat16},
    "two leading sizes": {"lead": (3, 4)},
    "shared": {"options": {"shared": True}},
    "empty": {"lead": (0,)},
}


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_that_of_the_gradient(name, backend):
    case = Case(**CASES[name])
    losses, gradient, weight, bias = step(case, backend)
    wanted = run(case, backend, **{"correction": "none", **case.options, "reduction": "none"})
    assert losses.shape == case.hidden.shape[:-1]
    assert gradient.shape == case.hidden.shape
    assert not losses.requires_grad
    assert torch.equal(losses, wanted.loss)
    assert_close(gradient, wanted.hidden, case.hidden.dtype, "hidden", None if gradient.numel() else 1.0)
    for name, got, before, grad in (
        ("weight", weight, case.weight, wanted.weight),
        ("bias", bias, case.bias, wanted.bias),
    ):
        if before is not None:
            assert_close(got, before.double() - RATE * grad.to_dense().double(), case.weight.dtype, name)


def test_repeated_steps_lower_the_loss(backend):
    case = Case(lead=(64,), classes=200)
    weight = case.weight.clone()
    arguments = (case.hidden, weight, case.target, case.noise, 5, 0.05)
    first = functional.hogwild_sgd_(*arguments, seed=case.seed, backend=backend)[0].sum()
    for _ in range(50):
        last = functional.hogwild_sgd_(*arguments, seed=case.seed, backend=backend)[0].sum()
    assert last < 0.5 * first


def test_what_made_hidden_can_be_trained(backend):
    case = Case()
    layer = torch.nn.Linear(3, case.dim)
    hidden = layer(torch.randn(7, 3))
    _, gradient = functional.hogwild_sgd_(hidden, case.weight, case.target, case.noise, 5, RATE, backend=backend)
    hidden.backward(gradient)
    assert layer.weight.grad.abs().sum() > 0


REFUSALS = {
    "learning_rate a string": ({"learning_rate": "0.1"}, ValueError, r"learning_rate must be a finite number, got"),
    "learning_rate infinite": ({"learning_rate": math.inf}, ValueError, r"learning_rate must be a finite number"),
    "weight expanded": (
        {"weight": torch.zeros(1, 16).expand(50, 16)}, ValueError, r"weight must have rows that do not overlap",
    ),
    "target above": ({"target": torch.full((7,), 50)}, ValueError, r"target must be in 0 .. 49"),
    "correction": ({"correction": "kq"}, ValueError, r"correction must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_change_nothing(name, backend):
    changes, error, message = REFUSALS[name]
    case = Case()
    arguments = {
        "hidden": case.hidden, "weight": case.weight, "target": case.target, "noise": case.noise, "num_negatives": 5,
        "learning_rate": RATE, "backend": backend, **changes,
    }  # fmt: skip
    before = arguments["weight"].clone()
    with pytest.raises(error, match=message):
        functional.hogwild_sgd_(**arguments)
    assert torch.equal(arguments["weight"], before)
