"""Refusals of the constructors, and a check that no refusal in the sampled losses' source goes untested."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import assert_tested, messages, refusals_of
from test_hogwild_loss import REFUSALS as OF_HOGWILD
from test_loss_errors import REFUSALS, D, K, V
from test_objective_errors import AT_THE_CALL, SOFTMAX_MODULE
from test_objective_errors import REFUSALS as OF_OBJECTIVES

import nce_ext
from nce_ext import _checks, functional, losses
from nce_ext import noise as noises
from nce_ext._sampled import arguments
from nce_ext._sampled import loss as _sampled

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


def test_every_refusal_in_the_source_is_tested():
    elsewhere = [
        "weight must have at most",  # on CUDA alone: test_installation, test_cuda_operators
        "sparse must be True or 'padded' with a weight in host memory",  # test_pinned_table
        "unique must not be 'tf' with a seed of each entry of a vmap",  # test_loss_transforms
    ]
    elsewhere += ["ids must be", "dtype must be torch.float32 or", "counts must", "trials must"]  # tests/noise
    tables = messages(REFUSALS, CONSTRUCTOR, OF_HOGWILD, OF_OBJECTIVES, SOFTMAX_MODULE, AT_THE_CALL)
    assert_tested([functional, arguments, _sampled, losses, _checks], [*tables, *elsewhere])


def test_refusals_are_found_in_the_source():
    found = refusals_of(arguments)
    assert len(found) > 30
    assert "calibration must" in found
    assert any(message.startswith("unique must be False with negatives") for message in found)
