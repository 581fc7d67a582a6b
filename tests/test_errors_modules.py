"""Refusals of the constructors and of evaluation, and a check that no refusal in the source goes untested."""

from __future__ import annotations

import ast
import inspect
import math
import re

import pytest
import test_contrastive_errors
import test_density
import test_diagnose
import test_family_errors
import test_fused_step_errors
import test_gathered
import test_host_weight
import test_optim_errors
import test_sharded
import test_utils
import torch
from test_errors import REFUSALS, B, D, K, V, ids
from test_hogwild import REFUSALS as OF_HOGWILD

import nce_ext
from nce_ext import (
    _call,
    _checks,
    _collectives,
    _ddp,
    _diagnose,
    _fused_step,
    _gathered,
    _pairwise,
    _pinned,
    _queue,
    _row_optimizer,
    _sampled,
    _sharded,
    _sharded_state,
    contrastive,
    density,
    evaluate,
    functional,
    losses,
    optim,
    utils,
)
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
SHARD = torch.nn.Linear(D, V)
SHARD.n_classes = 2 * V  # as a sharded loss says


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
    "a shard": (
        lambda: evaluate.nll(SHARD, HIDDEN, TARGET),
        ValueError,
        r"layer must hold all of its 20 classes, got 10: of a sharded loss take log_prob",
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


def parametrized(*tests) -> list:
    """The tuples of parametrized tests that have no table."""
    return [values for test in tests for mark in test.pytestmark for values in mark.args[1]]


def messages(*tables) -> list[str]:
    """The last string of each refusal, be it a tuple or a table's row."""
    rows = [row for table in tables for row in (table.values() if isinstance(table, dict) else table)]
    return [getattr(row, "message", None) or next(v for v in row[::-1] if isinstance(v, str)) for row in rows]


OF_SAMPLED_LOSSES = messages(
    REFUSALS, CONSTRUCTOR, OF_HOGWILD, test_family_errors.REFUSALS, test_family_errors.SOFTMAX_MODULE,
    test_family_errors.AT_THE_CALL, test_host_weight.REFUSALS,
    [(r"weight must have at most",)],  # on CUDA alone, test_packaging and test_cuda
)  # fmt: skip
OF_CONTRASTIVE_LOSSES = messages(
    test_contrastive_errors.VECTORS, test_contrastive_errors.DATA,
    parametrized(
        test_contrastive_errors.test_options_of_info_nce, test_contrastive_errors.test_options_of_siglip,
        test_contrastive_errors.test_enqueue_changes_nothing_when_it_refuses,
        test_contrastive_errors.test_sizes_of_the_memory,
    ),
    [(r"target must be None for the bound",), (r"debias must be 0 for the bound",)],  # test_bounds
)  # fmt: skip
OF_DENSITIES = messages(test_density.REFUSALS, test_density.OF_THE_RATIO, test_density.CONSTRUCTOR)
OF_OPTIMIZERS = messages(test_optim_errors.OPTIONS, test_optim_errors.REFUSALS)
OF_SHARDS = list(test_sharded.REFUSALS.values())
TABLES = {
    functional: OF_SAMPLED_LOSSES, _call: OF_SAMPLED_LOSSES, _sampled: OF_SAMPLED_LOSSES, losses: OF_SAMPLED_LOSSES,
    _checks: OF_SAMPLED_LOSSES, evaluate: messages(EVALUATE), _diagnose: messages(test_diagnose.REFUSALS),
    contrastive: OF_CONTRASTIVE_LOSSES, _pairwise: OF_CONTRASTIVE_LOSSES, _queue: OF_CONTRASTIVE_LOSSES,
    density: OF_DENSITIES, utils: messages(test_utils.REFUSALS), _pinned: messages(test_host_weight.REFUSALS),
    optim: OF_OPTIMIZERS, _row_optimizer: OF_OPTIMIZERS,
    _fused_step: [
        *messages(test_fused_step_errors.OF_FUSE, test_fused_step_errors.AT_THE_CALL),
        "weight must be float32 with hogwild=True",  # test_hogwild_takes_float32_alone
        "weight must be on hidden's device",  # test_host_weight
        "optimizer must have the loss's",  # test_the_optimizer_must_have_the_parameters
    ],
    _sharded: OF_SHARDS, _sharded_state: OF_SHARDS,
    # Of groups of processes: test_collectives, test_gathered, test_ddp_hook.
    _collectives: ["group must be one of which this process", "group must be a ProcessGroup or None"],
    _gathered: [*messages(parametrized(test_gathered.test_options)), "rows must be a tensor"],
    _ddp: ["module must hold no loss with", "parameters must be tensors", "parameters must have row-sparse"],
}  # fmt: skip


def refusals_of(module) -> list[str]:
    """The beginnings of the messages that the source has, up to the first thing that is filled in."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name, text = ast.unparse(node.func), node.args[0]
        if isinstance(text, ast.JoinedStr):
            text = text.values[0]
        if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
            continue
        if name in ("ValueError", "TypeError"):
            found.append(text.value)
        elif re.fullmatch(r"_checks\.(tensor|one_of|count|number|batch_shaped)", name):
            found.append(f"{text.value} must")
    return found


@pytest.mark.parametrize("module", TABLES, ids=lambda module: module.__name__)
def test_every_refusal_in_the_source_is_in_a_table(module):
    """A message that no pattern above begins like is a refusal without a test."""
    patterns = [re.split(r"\.[*\d]|\(\w+\|", p.replace("\\", ""))[0] for p in TABLES[module]]
    for message in refusals_of(module):
        assert any(len(p) > 5 and (message.startswith(p) or p.startswith(message)) for p in patterns), (
            f"{module.__name__}: no test of the refusal {message!r}"
        )


def test_refusals_are_found_in_the_source():
    found = {module: refusals_of(module) for module in TABLES}
    assert len(found[_call]) > 30
    assert "calibration must" in found[_call]
    assert any(message.startswith("unique must be False with negatives") for message in found[_call])
    assert sum(map(bool, found.values())) >= 9
