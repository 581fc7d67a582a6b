"""Every refusal of the contrastive losses and the memory: the exception, and a message that says what is allowed."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from refusals import assert_tested, messages, parametrized

from nce_ext import contrastive
from nce_ext.contrastive import CrossBatchMemory, InfoNCELoss, SigmoidContrastiveLoss, pairwise
from nce_ext.contrastive import memory as _memory

B, D, K = 4, 3, 2


class Refusal(NamedTuple):
    changes: dict
    error: type[Exception]
    message: str
    options: dict = {}  # noqa: RUF012


def arguments(**changes) -> dict:
    torch.manual_seed(0)
    return {
        "query": torch.randn(B, D),
        "key": torch.randn(B, D),
        "negatives": torch.randn(K, D),
        **changes,
    }


def elsewhere(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


IDS, LOG_Q = torch.arange(B), torch.zeros(B)
VECTORS = {
    "key elsewhere": Refusal({"key": elsewhere(B, D)}, ValueError, r"key must be on query's device cpu, got meta"),
    "query elsewhere": Refusal({"query": elsewhere(B, D)}, ValueError, r"key must be on query's device meta, got cpu"),
    "negatives elsewhere": Refusal(
        {"negatives": elsewhere(K, D)}, ValueError, r"negatives must be on query's device cpu, got meta"
    ),
    "ids elsewhere": Refusal(
        {"ids": elsewhere(B, dtype=torch.int64)}, ValueError, r"ids must be on query's device cpu, got meta"
    ),
    "query no tensor": Refusal({"query": [[1.0]]}, TypeError, r"query must be a float32 or .* tensor, got list"),
    "key no tensor": Refusal({"key": None}, TypeError, r"key must be a float32 or .* tensor, got NoneType"),
    "query of integers": Refusal(
        {"query": torch.ones(B, D, dtype=torch.int64)}, TypeError, r"query must be .*, got a int64 tensor of shape"
    ),
    "key of another width": Refusal(
        {"key": torch.ones(B, D).double()}, TypeError, r"query and key must both be float64 or neither, got .*float32"
    ),
    "negatives of another width": Refusal(
        {"negatives": torch.ones(K, D).double()}, TypeError, r"query and negatives must both be float64 or neither"
    ),
    "ids of floats": Refusal({"ids": LOG_Q}, TypeError, r"ids must be a int64 or int32 tensor, got a float32"),
    "mask of integers": Refusal(
        {"negative_mask": torch.ones(K, dtype=torch.int64)}, TypeError, r"negative_mask must be a bool tensor, got"
    ),
    "sparse": Refusal({"key": torch.ones(B, D).to_sparse()}, TypeError, r"key must be dense, got layout"),
    "query of rank 3": Refusal(
        {"query": torch.ones(B, D, 1)}, ValueError, r"query must be \[B, D\] with D >= 1, got shape \[4, 3, 1\]"
    ),
    "no columns": Refusal(
        {"query": torch.ones(B, 0), "key": torch.ones(B, 0)}, ValueError, r"query must be \[B, D\] with D >= 1, got"
    ),
    "more keys": Refusal(
        {"key": torch.ones(B + 1, D)}, ValueError, r"key must have query's shape \[4, 3\], got \[5, 3\]"
    ),
    "negatives of another D": Refusal(
        {"negatives": torch.ones(K, D + 1)}, ValueError, r"negatives must be \[K, 3\] for query's D = 3, got .*\[2, 4\]"
    ),
    "ids too short": Refusal(
        {"ids": IDS[:2]}, ValueError, r"ids must have shape \[4\] for query \[4, 3\], got \[2\]"
    ),
    "negative_ids too long": Refusal(
        {"ids": IDS, "negative_ids": IDS}, ValueError, r"negative_ids must have shape \[2\] for query .*, got \[4\]"
    ),
    "negative_ids alone": Refusal(
        {"negative_ids": IDS[:K]}, ValueError, r"ids must be given with negative_ids, to which .*, got None"
    ),
    "negative_ids of nothing": Refusal(
        {"negatives": None, "ids": IDS, "negative_ids": IDS}, ValueError,
        r"negative_ids must be None without negatives, got a tensor",
    ),
    "mask of nothing": Refusal(
        {"negatives": None, "negative_mask": IDS > 0}, ValueError,
        r"negative_mask must be None without negatives, got a tensor",
    ),
}  # fmt: skip

SOFT = torch.full((B, B + K), 1 / (B + K))
DATA = {
    "log_q of integers": Refusal(
        {"log_q": IDS, "negative_log_q": LOG_Q[:K]}, TypeError, r"log_q must be a float32 or .* tensor, got a int64"
    ),
    "log_q too short": Refusal({"log_q": LOG_Q[:1]}, ValueError, r"log_q must have shape \[4\] for .*, got \[1\]"),
    "negative_log_q of nothing": Refusal(
        {"negatives": None, "log_q": LOG_Q, "negative_log_q": LOG_Q}, ValueError,
        r"negative_log_q must be None without negatives, got a tensor",
    ),
    "log_q of keys alone": Refusal(
        {"log_q": LOG_Q}, ValueError, r"negative_log_q must be given with log_q, as all columns are compared, got None"
    ),
    "log_q of negatives alone": Refusal(
        {"negative_log_q": LOG_Q[:K]}, ValueError, r"log_q must be given with negative_log_q, as all .*, got None"
    ),
    "log_q that learns": Refusal(
        {"log_q": LOG_Q.clone().requires_grad_(), "negative_log_q": LOG_Q[:K]}, ValueError,
        r"log_q must not require a gradient \(none is taken of it\), got one that does; use log_q.detach\(\)",
    ),
    "log_q of nobody": Refusal(
        {"negatives": None, "log_q": torch.tensor([0.0, -math.inf, 0, 0])}, ValueError,
        r"log_q must be finite, got -inf at index \[1\]",
    ),
    "negative_log_q unknown": Refusal(
        {"log_q": LOG_Q, "negative_log_q": torch.tensor([0.0, math.nan])}, ValueError,
        r"negative_log_q must be finite, got nan at index \[1\]",
    ),
    "query_log_q in one direction": Refusal(
        {"query_log_q": LOG_Q}, ValueError,
        r"query_log_q must be None with symmetric=False, in which no query is a column, got a tensor",
    ),
    "query_log_q too long": Refusal(
        {"query_log_q": torch.zeros(5)}, ValueError, r"query_log_q must have shape \[4\] for", {"symmetric": True}
    ),
    "query_log_q of nobody": Refusal(
        {"query_log_q": LOG_Q - math.inf}, ValueError, r"query_log_q must be finite, got -inf at", {"symmetric": True}
    ),
    "target too narrow": Refusal(
        {"target": SOFT[:, :B]}, ValueError, r"target must have shape \[4, 6\] for query \[4, 3\], got \[4, 4\]"
    ),
    "target of the batch": Refusal(
        {"target": SOFT}, ValueError, r"target must have shape \[4, 3\] for .*, got \[4, 6\]", {"in_batch": False}
    ),
    "target of integers": Refusal({"target": SOFT.long()}, TypeError, r"target must be a float32 or .*, got a int64"),
    "target that learns": Refusal(
        {"target": SOFT.clone().requires_grad_()}, ValueError, r"target must not require a gradient.*target.detach\(\)"
    ),
    "negative label": Refusal(
        {"target": SOFT.index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(-0.5))}, ValueError,
        r"target must be finite and >= 0, got -0.5 at index \[2, 5\]",
    ),
    "infinite label": Refusal(
        {"target": SOFT.index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(math.inf))}, ValueError,
        r"target must be finite and >= 0, got inf at index \[3, 0\]",
    ),
    "label of a masked key": Refusal(
        {"target": SOFT, "ids": torch.tensor([0, 7, 1, 7])}, ValueError,
        r"target must be 0 where ids or negative_mask leave a column out, got 0.16\d* at index \[1, 3\]",
    ),
    "label of a masked negative": Refusal(
        {"target": SOFT, "negative_mask": torch.tensor([True, False])}, ValueError,
        r"target must be 0 where .* leave a column out, got 0.16\d* at index \[0, 5\]", {"max_logits": 1},
    ),
    "label of a masked negative, explicit alone": Refusal(
        {"target": SOFT[:, :3], "ids": IDS, "negative_ids": torch.tensor([9, 2])}, ValueError,
        r"target must be 0 where .* leave a column out, got 0.16\d* at index \[2, 2\]", {"in_batch": False},
    ),
    "target both ways": Refusal(
        {"target": SOFT}, ValueError, r"target must be None with symmetric=True; use the mean of", {"symmetric": True}
    ),
    "no negatives": Refusal(
        {"negatives": None}, ValueError, r"negatives must be given with in_batch=False, got None", {"in_batch": False}
    ),
    "log_q debiased": Refusal(
        {"log_q": LOG_Q, "negative_log_q": LOG_Q[:K]}, ValueError, r"log_q must be None with debias > 0, whose",
        {"debias": 0.1},
    ),
    "target debiased": Refusal(
        {"target": SOFT}, ValueError, r"target must be None with debias > 0, .* takes negatives, ids", {"debias": 0.1}
    ),
    "query_log_q debiased": Refusal(
        {"query_log_q": LOG_Q}, ValueError, r"query_log_q must be None with debias", {"debias": 0.1, "symmetric": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", [InfoNCELoss, SigmoidContrastiveLoss])
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_and_ids(name, loss):
    refusal = VECTORS[name]
    with pytest.raises(refusal.error, match=refusal.message):
        loss()(**arguments(**refusal.changes))


@pytest.mark.parametrize("name", DATA)
def test_data(name):
    refusal = DATA[name]
    with pytest.raises(refusal.error, match=refusal.message):
        InfoNCELoss(**refusal.options)(**arguments(**refusal.changes))


def test_data_that_learns_is_fine_where_nothing_does():
    with torch.no_grad():
        InfoNCELoss()(**arguments(target=SOFT.clone().requires_grad_()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": 0}, ValueError, r"temperature must be a finite number > 0, got 0"),
        ({"temperature": math.nan}, ValueError, r"temperature must be a finite number > 0, got nan"),
        ({"temperature": "0.1"}, ValueError, r"temperature must be a finite number > 0, got '0.1'"),
        ({"temperature": 0.001, "learn_temperature": True}, ValueError, r"temperature must be >= 1 / max_scale = 0.01"),
        ({"max_scale": -1}, ValueError, r"max_scale must be a finite number > 0, got -1"),
        ({"debias": 1.0}, ValueError, r"debias must be a number in \[0, 1\), got 1.0"),
        ({"debias": True}, ValueError, r"debias must be a number in \[0, 1\), got True"),
        ({"reduction": "max"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"max_logits": 0}, ValueError, r"max_logits must be >= 1, got 0"),
        ({"max_logits": 1e6}, TypeError, r"max_logits must be an int, got float"),
        ({"symmetric": True, "in_batch": False}, ValueError, r"in_batch must be True with symmetric=True: the other"),
    ],
)
def test_options_of_info_nce(changes, error, message):
    with pytest.raises(error, match=message):
        InfoNCELoss(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logit_scale": 0.0}, ValueError, r"logit_scale must be a finite number > 0, got 0.0"),
        ({"logit_bias": math.inf}, ValueError, r"logit_bias must be a finite number, got inf"),
        ({"reduction": None}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got None"),
        ({"max_logits": True}, TypeError, r"max_logits must be an int, got bool True"),
    ],
)
def test_options_of_siglip(changes, error, message):
    with pytest.raises(error, match=message):
        SigmoidContrastiveLoss(**changes)


def test_bounds():
    given = arguments(target=SOFT)
    with pytest.raises(
        ValueError, match=r"target must be None for the bound, which is of the own key, got soft labels"
    ):
        InfoNCELoss().mutual_information_bound(**given)
    with pytest.raises(ValueError, match=r"debias must be 0 for the bound, got 0.1"):
        InfoNCELoss(debias=0.1).mutual_information_bound(**arguments())
    with pytest.raises(ValueError, match=r"ids must have shape \[4\]"):
        InfoNCELoss().mutual_information_bound(**arguments(ids=IDS[:1]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'idz'"):
        InfoNCELoss().mutual_information_bound(**arguments(idz=IDS))


KEYS = torch.ones(5, D)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": elsewhere(5, D)}, ValueError, r"keys must be on the memory's device cpu, got meta"),
        ({"keys": KEYS.long()}, TypeError, r"keys must be a float32 or .* tensor, got a int64"),
        ({"keys": KEYS[:, :2]}, ValueError, r"keys must be \[B, 3\], got shape \[5, 2\]"),
        ({"keys": KEYS[0]}, ValueError, r"keys must be \[B, 3\], got shape \[3\]"),
        ({"ids": elsewhere(5, dtype=torch.int64)}, ValueError, r"ids must be on the memory's device cpu, got meta"),
        ({"ids": torch.zeros(5)}, TypeError, r"ids must be a int64 or int32 tensor, got a float32"),
        ({"ids": torch.arange(4)}, ValueError, r"ids must have shape \[5\], got \[4\]"),
        ({"log_q": torch.zeros(5, 1)}, ValueError, r"log_q must have shape \[5\], got \[5, 1\]"),
        ({"ids": None}, ValueError, r"ids must be given, as in the first batch of this memory, got None"),
        ({"log_q": torch.zeros(5)}, ValueError, r"log_q must be None, as in the first batch .*, got a tensor"),
    ],
)
def test_enqueue_changes_nothing_when_it_refuses(changes, error, message):
    memory = CrossBatchMemory(4, D)
    memory.enqueue(KEYS, torch.arange(5))
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    with pytest.raises(error, match=message):
        memory.enqueue(**{"keys": KEYS, "ids": torch.arange(5), **changes})
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, r"size must be >= 1, got 0"),
        ((3, 1.5), {}, TypeError, r"dim must be an int, got float 1.5"),
        ((3, 3), {"dtype": torch.int64}, TypeError, r"dtype must be a float32, bfloat16, .* type, got torch.int64"),
    ],
)
def test_sizes_of_the_memory(arguments, options, error, message):
    with pytest.raises(error, match=message):
        CrossBatchMemory(*arguments, **options)


def test_every_refusal_in_the_source_is_tested():
    of_the_bound = [(r"target must be None for the bound",), (r"debias must be 0 for the bound",)]  # test_bounds
    without_table = parametrized(
        test_options_of_info_nce, test_options_of_siglip, test_enqueue_changes_nothing_when_it_refuses,
        test_sizes_of_the_memory,
    )  # fmt: skip
    assert_tested([contrastive, pairwise, _memory], messages(VECTORS, DATA, without_table, of_the_bound))
