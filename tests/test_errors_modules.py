"""Refusals of the constructors and of evaluation, and a check that no refusal in the source goes untested."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from test_errors import REFUSALS, B, D, K, V, ids
from test_hogwild import REFUSALS as OF_HOGWILD

import nce_ext
from nce_ext import _call, _checks, evaluate, functional, losses
from nce_ext import noise as noises

CONSTRUCTOR = {
    "in_features zero": ({"in_features": 0}, ValueError, r"in_features must be >= 1, got 0"),
    "in_features a float": ({"in_features": 4.0}, TypeError, r"in_features must be an int, got float 4\.0"),
    "n_classes zero": ({"n_classes": 0}, ValueError, r"n_classes must be in 1 \.\. 2147483647, got 0"),
    "n_classes too many": ({"n_classes": 2**31}, ValueError, r"n_classes must be in 1 \.\. 2147483647, got 2147483648"),
    "noise over other classes": ({"n_classes": 9}, ValueError, r"noise must have n_classes = 9 classes, got 10"),
    "noise missing": ({"noise": None}, TypeError, r"noise must be an nce_ext\.noise distribution, got NoneType"),
    "counts as noise": ({"noise": torch.ones(V)}, TypeError, r"noise must be .* got a float32 tensor"),
    "k negative": ({"num_negatives": -1}, ValueError, r"num_negatives must be in 0 \.\. 1048576, got -1"),
    "k zero": ({"num_negatives": 0}, ValueError, r"num_negatives must be >= 1 with correction='log_kq'"),
    "k a string": ({"num_negatives": "5"}, TypeError, r"num_negatives must be an int, got str '5'"),
    "log_z unknown": ({"log_z": "auto"}, ValueError, r"log_z must be a finite number or 'learned', got 'auto'"),
    "log_z infinite": ({"log_z": -math.inf}, ValueError, r"log_z must be a finite number or 'learned', got -inf"),
    "correction": ({"correction": "kq"}, ValueError, r"correction must be one of .* got 'kq'"),
    "candidate_reduction": (
        {"candidate_reduction": "none"},
        ValueError,
        r"candidate_reduction must be one of .* 'none'",
    ),
    "positive_label": ({"positive_label": "two"}, ValueError, r"positive_label must be one of .* got 'two'"),
    "reduction": ({"reduction": "batchmean"}, ValueError, r"reduction must be one of .* got 'batchmean'"),
    "ignore_index": ({"ignore_index": "pad"}, TypeError, r"ignore_index must be an int, got 'pad'"),
    "sparse": ({"sparse": "yes"}, ValueError, r"sparse must be True, False or 'padded', got 'yes'"),
    "backend": ({"backend": "native"}, ValueError, r"backend must be one of .* got 'native'"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_refusals_of_the_constructor(name):
    changes, error, message = CONSTRUCTOR[name]
    options = {"in_features": D, "n_classes": V, "noise": noises.Uniform(V), "num_negatives": K, **changes}
    with pytest.raises(error, match=message):
        nce_ext.NCELoss(**options)


LAYER = torch.nn.Linear(D, V)
HIDDEN, TARGET = torch.randn(B, D), torch.tensor([1, 2, 3])


def nll(hidden=HIDDEN, target=TARGET, **options):
    return lambda: evaluate.nll(LAYER, hidden, target, **options)


def topk(k: int, hidden=HIDDEN):
    return lambda: evaluate.topk(LAYER, hidden, k)


EVALUATE = {
    "reduction": (nll(reduction="max"), ValueError, r"reduction must be one of .* got 'max'"),
    "hidden too wide": (nll(torch.randn(B, 5)), ValueError, r"hidden must be \[\.\.\., 4\], got shape \[3, 5\]"),
    "hidden a scalar": (nll(torch.tensor(1.0)), ValueError, r"hidden must be \[\.\.\., 4\], got shape \[\]"),
    "target too short": (nll(target=TARGET[:2]), ValueError, r"target must have shape \[3\], got \[2\]"),
    "target above": (nll(target=ids(1, V, 2)), ValueError, r"target must be in 0 \.\. 9 or ignore_index = -100"),
    "target below": (nll(target=ids(1, -1, 2)), ValueError, r"target must be in 0 \.\. 9 or ignore_index = -100"),
    "target of floats": (nll(target=TARGET.float()), (TypeError, ValueError), r"target must be .* got .*float32"),
    "topk zero": (topk(0), ValueError, r"k must be in 1 \.\. 10, got 0"),
    "topk too many": (topk(V + 1), ValueError, r"k must be in 1 \.\. 10, got 11"),
    "topk hidden": (topk(2, torch.randn(B, 5)), ValueError, r"hidden must be \[\.\.\., 4\], got shape \[3, 5\]"),
}


@pytest.mark.parametrize("name", EVALUATE)
def test_refusals_of_evaluation(name):
    call, error, message = EVALUATE[name]
    with pytest.raises(error, match=message):
        call()


def test_every_refusal_in_the_source_is_in_a_table():
    """A message that no pattern above matches is a refusal without a test."""
    patterns = [r.message for r in REFUSALS.values()] + [
        m for _, _, m in (*CONSTRUCTOR.values(), *EVALUATE.values(), *OF_HOGWILD.values())
    ]
    arguments_named = {re.match(r"\\?[\w ]+", p.replace("\\", "")).group().split()[0] for p in patterns}
    for module in (functional, _call, losses, evaluate, _checks):
        for name in re.findall(r'Error\(\s*f?"(\w+) must', inspect.getsource(module)):
            assert name in arguments_named, f"{module.__name__}: no test of the refusal of {name}"
