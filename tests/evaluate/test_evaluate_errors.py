"""Refusals of evaluation."""

from __future__ import annotations

import pytest
import torch
from refusals import assert_tested, messages

from nce_ext import evaluate

V, D, B = 10, 4, 3
LAYER = torch.nn.Linear(D, V)
HIDDEN, TARGET = torch.randn(B, D), torch.tensor([1, 2, 3])
SHARD = torch.nn.Linear(D, V)
SHARD.n_classes, SHARD.device_mesh = 2 * V, None  # as a sharded loss says
GROWN = torch.nn.Linear(D, V)
GROWN.n_classes = V - 2
SHRUNK = torch.nn.Linear(D, V)
SHRUNK.n_classes = V + 2


def nll(hidden=HIDDEN, target=TARGET, **options):
    return lambda: evaluate.nll(LAYER, hidden, target, **options)


def topk(k: int, hidden=HIDDEN):
    return lambda: evaluate.topk(LAYER, hidden, k)


EVALUATE = {
    "reduction": (nll(reduction="max"), ValueError, r"reduction must be one of .* got 'max'"),
    "hidden too wide": (nll(torch.randn(B, 5)), ValueError, r"hidden must be \[\.\.\., 4\], got shape \[3, 5\]"),
    "hidden a scalar": (nll(torch.tensor(1.0)), ValueError, r"hidden must be \[\.\.\., 4\], got shape \[\]"),
    "target too short": (nll(target=TARGET[:2]), ValueError, r"target must have shape \[3\], got \[2\]"),
    "target above": (nll(target=TARGET + V), ValueError, r"target must be in 0 \.\. 9 or ignore_index = -100"),
    "target below": (nll(target=TARGET - 2), ValueError, r"target must be in 0 \.\. 9 or ignore_index = -100"),
    "target of floats": (nll(target=TARGET.float()), (TypeError, ValueError), r"target must be .* got .*float32"),
    "a shard": (
        lambda: evaluate.nll(SHARD, HIDDEN, TARGET),
        ValueError,
        r"layer must hold all of its 20 classes, got 10: of a sharded loss take log_prob",
    ),
    "rows that were added": (
        lambda: evaluate.topk(GROWN, HIDDEN, 2),
        ValueError,
        r"layer must have n_classes = 8 rows in its weight, got 10; a loss's resize_classes changes both",
    ),
    "rows that were taken away": (
        lambda: evaluate.nll(SHRUNK, HIDDEN, TARGET),
        ValueError,
        r"layer must have n_classes = 12 rows in its weight, got 10; a loss's resize_classes",
    ),
    "topk zero": (topk(0), ValueError, r"k must be in 1 \.\. 10, got 0"),
    "topk too many": (topk(V + 1), ValueError, r"k must be in 1 \.\. 10, got 11"),
    "topk hidden": (topk(2, torch.randn(B, 5)), ValueError, r"hidden must be \[\.\.\., 4\], got shape \[3, 5\]"),
}


@pytest.mark.parametrize("name", EVALUATE)
def test_refusals_of_evaluation(name):
    call, error, message = EVALUATE[name]
    with pytest.raises(error, match=message):
        call()


def test_every_refusal_in_the_source_is_tested():
    assert_tested([evaluate], messages(EVALUATE))
