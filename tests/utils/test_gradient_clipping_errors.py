"""Refusals of clipping and unscaling, which leave the gradients alone."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from refusals import assert_tested, messages
from test_gradient_clipping import NAN, D, V, assert_untouched, coo, grads_as_they_are, parameter

from nce_ext import utils

GOOD = parameter(coo([4, 4], torch.ones(2, D)))
TWO_INDICES = parameter(torch.eye(V).to_sparse())
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    COMPRESSED = torch.eye(V).to_sparse_csr()
COMPRESSED.grad = COMPRESSED.clone()
SCALER, SGD = torch.amp.GradScaler("cpu"), torch.optim.SGD([GOOD, TWO_INDICES], 1.0)


def norm(parameters=GOOD, max_norm=1.0, **options):
    return partial(utils.clip_grad_norm_, parameters, max_norm, **options)


BY_INDEX = r"parameters\[1\]\.grad must have sparse_dim\(\) == 1, one index a row, got 2"
OF_LAYOUT = r"parameters\[1\]\.grad must be dense or COO, got layout torch\.sparse_csr"
REFUSALS = {
    "a module": (norm(torch.nn.Linear(2, 2)), TypeError, r"parameters must be a tensor or an iterable .* got Linear"),
    "named": (norm([("weight", GOOD)]), TypeError, r"parameters must be tensors, got tuple at index 0"),
    "None among them": (norm([GOOD, None]), TypeError, r"parameters must be tensors, got NoneType at index 1"),
    "two sparse dimensions": (norm([GOOD, TWO_INDICES]), TypeError, BY_INDEX),
    "compressed": (norm([GOOD, COMPRESSED]), TypeError, OF_LAYOUT),
    "of coalescing": (partial(utils.coalesce_grads_, [GOOD, TWO_INDICES]), TypeError, BY_INDEX),
    "of unscaling": (partial(utils.unscale_, SCALER, SGD), TypeError, BY_INDEX),
    "max_norm negative": (norm(max_norm=-1), ValueError, r"max_norm must be >= 0, got -1\.0"),
    "max_norm NaN": (norm(max_norm=NAN), ValueError, r"max_norm must be >= 0, got nan"),
    "max_norm None": (norm(max_norm=None), TypeError, r"max_norm must be a number, got NoneType"),
    "norm_type zero": (norm(norm_type=0), ValueError, r"norm_type must be > 0, got 0\.0"),
    "norm_type NaN": (norm(norm_type=NAN), ValueError, r"norm_type must be > 0, got nan"),
    "norm_type a name": (norm(norm_type="fro"), TypeError, r"norm_type must be a number, got str 'fro'"),
    "clip_value < 0": (partial(utils.clip_grad_value_, GOOD, -0.5), ValueError, r"clip_value must be >= 0, got -0\.5"),
    "clip_value NaN": (partial(utils.clip_grad_value_, GOOD, NAN), ValueError, r"clip_value must be >= 0, got nan"),
    "clip_value [1]": (partial(utils.clip_grad_value_, GOOD, [1]), TypeError, r"clip_value must be a number, got list"),
    "scaler": (partial(utils.unscale_, SGD, SCALER), TypeError, r"scaler must be a torch\.amp\.GradScaler, got SGD"),
    "optimizer": (partial(utils.unscale_, SCALER, [GOOD]), TypeError, r"optimizer must be an optimizer .* got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    call, error, message = REFUSALS[name]
    before = grads_as_they_are([GOOD, TWO_INDICES])
    with pytest.raises(error, match=message):
        call()
    assert_untouched([GOOD, TWO_INDICES], before)


def test_every_refusal_in_the_source_is_tested():
    assert_tested([utils], messages(REFUSALS))
