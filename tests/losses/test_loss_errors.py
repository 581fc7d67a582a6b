"""Every refusal: the exception, and a message that names the argument and shows what was got. Nothing is changed."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest
import torch

from nce_ext import functional
from nce_ext import noise as noises

V, D, B, K = 10, 4, 3, 5


class Refusal(NamedTuple):
    changes: dict
    error: type[Exception]
    message: str


def arguments(**changes):
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(B, D, requires_grad=True),
        "weight": torch.randn(V, D, requires_grad=True),
        "target": torch.tensor([1, 2, 3]),
        "noise": noises.Unigram([1] * (V - 1) + [0]),
        "num_negatives": K,
        "bias": torch.randn(V, requires_grad=True),
        **changes,
    }


# A table that came to the meta device by itself: its law is nowhere.
UNKNOWN = noises.Unigram([1] * V)
UNKNOWN.table = UNKNOWN.table.to("meta")


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


LOG_Q = (torch.zeros(B), torch.zeros(K))
REFUSALS = {
    # device
    "weight elsewhere": Refusal(
        {"weight": torch.empty(V, D, device="meta")}, ValueError, r"weight must be on hidden's device cpu, got meta"
    ),
    "hidden elsewhere": Refusal(
        {"hidden": torch.empty(B, D, device="meta")}, ValueError, r"weight must be on hidden's device meta, got cpu"
    ),
    "bias elsewhere": Refusal(
        {"bias": torch.empty(V, device="meta")}, ValueError, r"bias must be on hidden's device cpu, got meta"
    ),
    "target elsewhere": Refusal(
        {"target": torch.empty(B, dtype=torch.int64, device="meta")}, ValueError, r"target must be on .* cpu, got meta"
    ),
    "noise elsewhere": Refusal(
        {"noise": UNKNOWN},
        ValueError,
        r"noise must be on hidden's device cpu, got meta; load its state_dict",
    ),
    "log_z elsewhere": Refusal(
        {"log_z": torch.empty(B, device="meta")}, ValueError, r"log_z must be on .* cpu, got meta"
    ),
    "negatives elsewhere": Refusal(
        {"negatives": torch.empty(K, dtype=torch.int64, device="meta")}, ValueError, r"negatives must be on .* got meta"
    ),
    "sample_weight elsewhere": Refusal(
        {"sample_weight": torch.empty(B, device="meta")}, ValueError, r"sample_weight must be on .* got meta"
    ),
    "seed elsewhere": Refusal(
        {"seed": torch.empty(2, dtype=torch.int64, device="meta")}, ValueError, r"seed must be on cpu, got meta"
    ),
    "log_q elsewhere": Refusal(
        {"negatives": torch.zeros(K, dtype=torch.int64), "log_q": (torch.empty(B, device="meta"), torch.zeros(K))},
        ValueError,
        r"log_q\[0\] must be on .* got meta",
    ),
    # type and dtype
    "hidden of integers": Refusal(
        {"hidden": torch.ones(B, D, dtype=torch.int64)}, TypeError, r"hidden must be a float32 or .* got a int64 tensor"
    ),
    "hidden a list": Refusal({"hidden": [[1.0] * D]}, TypeError, r"hidden must be a .* tensor, got list"),
    "complex weight": Refusal(
        {"weight": torch.randn(V, D, dtype=torch.complex64)}, TypeError, r"weight must be .* got a complex64 tensor"
    ),
    "float64 weight": Refusal(
        {"weight": torch.randn(V, D, dtype=torch.float64)},
        TypeError,
        r"hidden and weight must both be float64 or neither, got torch\.float32 and torch\.float64",
    ),
    "float64 hidden": Refusal(
        {"hidden": torch.randn(B, D, dtype=torch.float64)}, TypeError, r"both be float64 or neither, got torch\.float64"
    ),
    "bias of another dtype": Refusal(
        {"bias": torch.randn(V).half()}, TypeError, r"bias must be a float32 tensor, got a float16 tensor"
    ),
    "float target": Refusal(
        {"target": torch.tensor([1.0, 2, 3])}, TypeError, r"target must be a int64 or int32 tensor, got a float32"
    ),
    "bool target": Refusal(
        {"target": torch.tensor([True, False, True])}, TypeError, r"target must be a int64 or int32 tensor, got a bool"
    ),
    "target a list": Refusal({"target": [1, 2, 3]}, TypeError, r"target must be a int64 or int32 tensor, got list"),
    "noise a tensor": Refusal(
        {"noise": torch.ones(V)}, TypeError, r"noise must be an nce_ext\.noise distribution, got a float32 tensor"
    ),
    "k a float": Refusal({"num_negatives": 5.0}, TypeError, r"num_negatives must be an int, got float 5\.0"),
    "k a bool": Refusal({"num_negatives": True}, TypeError, r"num_negatives must be an int"),
    "float negatives": Refusal(
        {"negatives": torch.zeros(K)}, TypeError, r"negatives must be a int64 or int32 tensor, got a float32 tensor"
    ),
    "integer log_z": Refusal(
        {"log_z": torch.zeros(B, dtype=torch.int64)}, TypeError, r"log_z must be a float32 or .* got a int64 tensor"
    ),
    "integer sample_weight": Refusal(
        {"sample_weight": ids(1, 1, 1)}, TypeError, r"sample_weight must be a float32 or .* got a int64 tensor"
    ),
    "sample_weight a list": Refusal({"sample_weight": [1.0] * B}, TypeError, r"sample_weight must be .* got list"),
    "seed a number": Refusal({"seed": 3}, TypeError, r"seed must be an int64 tensor of shape \[2\], got int 3"),
    "seed of floats": Refusal({"seed": torch.zeros(2)}, TypeError, r"seed must be an int64 tensor .* got a float32"),
    "integer log_q": Refusal(
        {"negatives": ids(1, 2), "log_q": (torch.zeros(B), ids(0, 0))}, TypeError, r"log_q\[1\] must be a float32 or"
    ),
    "log_q not a pair": Refusal({"negatives": ids(1, 2), "log_q": torch.zeros(3)}, TypeError, r"log_q must be a pair"),
    "log_q of three": Refusal(
        {"negatives": ids(1, 2), "log_q": (torch.zeros(B),) * 3}, TypeError, r"log_q must be a pair"
    ),
    "ignore_index a float": Refusal({"ignore_index": -100.0}, TypeError, r"ignore_index must be an int, got -100\.0"),
    "ignore_index None": Refusal({"ignore_index": None}, TypeError, r"ignore_index must be an int, got None"),
    # layout
    "sparse weight": Refusal(
        {"weight": torch.eye(V)[:, :D].to_sparse()}, TypeError, r"weight must be dense, got layout"
    ),
    "sparse hidden": Refusal({"hidden": torch.eye(B, D).to_sparse()}, TypeError, r"hidden must be dense, got layout"),
    "transposed weight": Refusal(
        {"weight": torch.randn(D, V).t()}, ValueError, r"weight must have rows with stride 1 .* got strides \(1, 10\)"
    ),
    # rank
    "hidden a scalar": Refusal(
        {"hidden": torch.tensor(1.0)}, ValueError, r"hidden must be \[\.\.\., D\], got a scalar"
    ),
    "weight 1-D": Refusal({"weight": torch.randn(V)}, ValueError, r"weight must be \[n_classes, D\], got shape \[10\]"),
    "weight 3-D": Refusal({"weight": torch.randn(V, D, 1)}, ValueError, r"weight must be .* got shape \[10, 4, 1\]"),
    "negatives a scalar": Refusal(
        {"negatives": torch.tensor(1)}, ValueError, r"negatives must be \[k\] or \[\.\.\., k\], got a scalar"
    ),
    # size
    "hidden too wide": Refusal(
        {"hidden": torch.randn(B, D + 1)},
        ValueError,
        r"hidden must have weight's D = 4 as its last size, got .*\[3, 5\]",
    ),
    "weight without rows": Refusal(
        {"weight": torch.empty(0, D)},
        ValueError,
        r"weight must have at least one row and one column, got shape \[0, 4\]",
    ),
    "weight without columns": Refusal(
        {"weight": torch.empty(V, 0), "hidden": torch.empty(B, 0)}, ValueError, r"weight must have at least one row"
    ),
    "bias too short": Refusal(
        {"bias": torch.randn(V - 1)}, ValueError, r"bias must be contiguous of shape \[10\], got .*\[9\]"
    ),
    "bias 2-D": Refusal({"bias": torch.randn(V, 1)}, ValueError, r"bias must be .*shape \[10\], got .*\[10, 1\]"),
    "bias a column": Refusal(
        {"bias": torch.randn(V, 2)[:, 0]}, ValueError, r"bias must be contiguous .* got .*strides \[2\]"
    ),
    "noise over other classes": Refusal(
        {"noise": noises.Uniform(V + 1)}, ValueError, r"noise must have weight's 10 classes, got 11"
    ),
    "target too short": Refusal(
        {"target": ids(1, 2)}, ValueError, r"target must have shape \[3\], or \[3, 'T'\] .* got \[2\]"
    ),
    "target with two more dimensions": Refusal(
        {"target": torch.zeros(B, 2, 2, dtype=torch.int64)}, ValueError, r"target must have shape .* got \[3, 2, 2\]"
    ),
    "target without positives": Refusal(
        {"target": torch.zeros(B, 0, dtype=torch.int64)}, ValueError, r"with T >= 1 positives, got \[3, 0\]"
    ),
    "target a scalar": Refusal({"target": torch.tensor(1)}, ValueError, r"target must have shape \[3\].* got \[\]"),
    "log_z too long": Refusal({"log_z": torch.zeros(B + 1)}, ValueError, r"log_z must have shape \[3\] .* got \[4\]"),
    "log_z a column": Refusal({"log_z": torch.zeros(B, 1)}, ValueError, r"log_z must have shape \[3\] .* got \[3, 1\]"),
    "sample_weight a scalar": Refusal(
        {"sample_weight": torch.tensor(1.0)}, ValueError, r"sample_weight must have shape \[3\] .* got \[\]"
    ),
    "negatives of another batch": Refusal(
        {"negatives": torch.zeros(B + 1, K, dtype=torch.int64)},
        ValueError,
        r"negatives must have shape \[3, 5\] .* got \[4, 5\]",
    ),
    "seed of three": Refusal({"seed": ids(1, 2, 3)}, ValueError, r"seed must have shape \[2\], got \[3\]"),
    "target log_q too short": Refusal(
        {"negatives": torch.zeros(K, dtype=torch.int64), "log_q": (torch.zeros(B - 1), torch.zeros(K))},
        ValueError,
        r"log_q\[0\] must have target's shape \[3.*\], got \[2\]",
    ),
    "negative log_q too long": Refusal(
        {"negatives": torch.zeros(K, dtype=torch.int64), "log_q": (torch.zeros(B), torch.zeros(K + 1))},
        ValueError,
        r"log_q\[1\] must have shape \[3, 5\] .* got \[6\]",
    ),
    "too many pairs": Refusal(
        {
            "hidden": torch.zeros(1, D).expand(2**21, D),
            "target": torch.zeros(1, dtype=torch.int64).expand(2**21),
            "num_negatives": 2**13,
        },
        ValueError,
        r"hidden must have fewer than 2\^32 / \(k \+ T\) examples a call, got 2097152 with k = 8192",
    ),
    # range
    "k negative": Refusal({"num_negatives": -1}, ValueError, r"num_negatives must be in 0 \.\. 1048576, got -1"),
    "k too large": Refusal({"num_negatives": 2**20 + 1}, ValueError, r"num_negatives must be in 0 .* got 1048577"),
    "too many given negatives": Refusal(
        {"negatives": torch.zeros(1, dtype=torch.int64).expand(2**20 + 1)},
        ValueError,
        r"the number of negatives must be in 0 \.\. 1048576, got 1048577",
    ),
    "k zero under log_kq": Refusal({"num_negatives": 0}, ValueError, r"num_negatives must be >= 1 with .*'log_kq'.* 0"),
    "no given negatives under log_kq": Refusal(
        {"negatives": torch.zeros(0, dtype=torch.int64)}, ValueError, r"must be >= 1 with correction='log_kq'"
    ),
    "target above": Refusal(
        {"target": ids(1, V, 3)}, ValueError, r"target must be in 0 \.\. 9 or ignore_index = -100, got 10 at index \[1"
    ),
    "target below": Refusal(
        {"target": ids(1, 2, -1)}, ValueError, r"target must be in 0 \.\. 9 .* got -1 at index \[2"
    ),
    "target far above": Refusal({"target": ids(1, 2**40, 3)}, ValueError, r"target must be in .* got 1099511627776"),
    "target at another ignore_index": Refusal(
        {"target": ids(1, -100, 3), "ignore_index": -1}, ValueError, r"ignore_index = -1, got -100 at index \[1"
    ),
    "one of several targets": Refusal(
        {"target": torch.tensor([[1, 2], [3, 12], [-100, 4]])},
        ValueError,
        r"target must be .* got 12 at index \[1, 1\]",
    ),
    "target never drawn": Refusal(
        {"target": ids(1, 2, V - 1)},
        ValueError,
        r"target must be classes that the noise can draw, got class 9 .* \[2\]",
    ),
    "target never drawn under log_q": Refusal(
        {"target": ids(V - 1, 2, 3), "correction": "log_q"},
        ValueError,
        r"target must be classes that the noise can draw, got class 9 .* \[0\]",
    ),
    "given negative never drawn": Refusal(
        {"negatives": ids(1, V - 1)},
        ValueError,
        r"negatives must be classes that the noise can draw, got class 9 .* \[1\]",
    ),
    "negatives above": Refusal(
        {"negatives": ids(1, V)}, ValueError, r"negatives must be in 0 \.\. 9, got 10 at index \[1\]"
    ),
    "negatives at ignore_index": Refusal({"negatives": ids(-100, 1)}, ValueError, r"negatives must be in .* got -100"),
    "target log_q infinite": Refusal(
        {"negatives": ids(1, 2), "log_q": (torch.tensor([-1.0, -math.inf, -1.0]), torch.zeros(2))},
        ValueError,
        r"log_q\[0\] must be finite, got -inf at index \[1\]",
    ),
    "negative log_q not a number": Refusal(
        {"negatives": ids(1, 2), "log_q": (torch.zeros(B), torch.tensor([-1.0, math.nan]))},
        ValueError,
        r"log_q\[1\] must be finite, got nan at index \[1\]",
    ),
    "log_z infinite": Refusal({"log_z": math.inf}, ValueError, r"log_z must be a finite number or a tensor, got inf"),
    "log_z not a number": Refusal({"log_z": math.nan}, ValueError, r"log_z must be a finite number .* got nan"),
    "log_z a string": Refusal({"log_z": "learned"}, (TypeError, ValueError), r"log_z must be .* got 'learned'"),
    # options
    "correction": Refusal(
        {"correction": "logq"}, ValueError, r"correction must be one of 'log_kq', 'log_q', 'none', got"
    ),
    "candidate_reduction": Refusal(
        {"candidate_reduction": "max"}, ValueError, r"candidate_reduction must be one of 'sum', 'mean', got 'max'"
    ),
    "positive_label": Refusal(
        {"positive_label": 1}, ValueError, r"positive_label must be one of 'one', 'uniform', got 1"
    ),
    "sparse": Refusal({"sparse": "coo"}, ValueError, r"sparse must be True, False or 'padded', got 'coo'"),
    "sparse a number": Refusal({"sparse": 1}, ValueError, r"sparse must be True, False or 'padded', got 1"),
    "reduction": Refusal({"reduction": None}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got None"),
    "backend": Refusal(
        {"backend": "cuda"}, ValueError, r"backend must be one of 'auto', 'fused', 'reference', got 'cuda'"
    ),
    "log_q without negatives": Refusal({"log_q": LOG_Q}, ValueError, r"log_q must come with negatives"),
    "log_q without correction": Refusal(
        {"negatives": torch.zeros(K, dtype=torch.int64), "log_q": LOG_Q, "correction": "none"},
        ValueError,
        r"log_q must be None with correction='none'",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_of_the_loss(name, backend):
    changes, error, message = REFUSALS[name]
    given = arguments(**({"backend": backend} | changes))
    tensors = [given[key] for key in ("hidden", "weight", "bias") if torch.is_tensor(given[key])]
    tensors = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided and t.numel() < 10**6]
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(error, match=message):
        functional.nce_loss(**given)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), old)
        assert tensor.grad is None


@pytest.mark.parametrize("position", [0, 2500, 4999])
@pytest.mark.parametrize("name", ["target", "negatives"])
@pytest.mark.parametrize("shared", [False, True])
def test_one_bad_id_in_a_large_batch(name, position, shared, backend):
    """Wherever it is, whichever thread meets it: it is named, and the next call is as if nothing had happened."""
    torch.set_num_threads(2)
    hidden, weight = torch.randn(5000, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target, negatives = torch.randint(V, (5000,)), torch.randint(V, (5000, K))
    if shared:
        negatives, position = torch.randint(V, (100,)), position if name == "target" else position // 50
    before = weight.detach().clone()

    def loss():
        return functional.nce_loss(
            hidden, weight, target, noises.Uniform(V), K, negatives=negatives, correction="log_q", backend=backend
        )

    good = loss().detach()
    ids = target if name == "target" else negatives
    kept = ids[position].clone()
    ids[position] = V
    where = [position] if ids.dim() == 1 else [position, 0]
    with pytest.raises(ValueError, match=rf"{name} must be in 0 \.\. 9.* got 10 at index {re.escape(str(where))}"):
        loss()
    assert torch.equal(weight.detach(), before)
    ids[position] = kept
    assert torch.equal(loss().detach(), good)


def test_checks_come_in_their_order():
    """Device, dtype, layout, rank, size, range: the first fault is named when there are several."""
    faults = [
        ({"weight": torch.empty(V, D, device="meta")}, "device"),
        ({"target": torch.tensor([1.0, 2.0, 99.0])}, "target must be a int64"),
        ({"target": torch.tensor([[1, 99]])}, "target must have shape"),
        ({"target": ids(1, 2, 99)}, "target must be in"),
    ]
    for i, (changes, message) in enumerate(faults):
        later = {key: value for other, _ in reversed(faults[i:]) for key, value in other.items()}
        with pytest.raises((TypeError, ValueError), match=message):
            functional.nce_loss(**arguments(**{**later, **changes}))


def test_a_refusal_draws_no_random_number():
    """But for ids, which are checked where they are read."""
    for name in ("float target", "bias too short", "k negative", "reduction", "seed of three"):
        given = arguments(**REFUSALS[name].changes)
        state = torch.get_rng_state()
        with pytest.raises(REFUSALS[name].error):
            functional.nce_loss(**given)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("correction", ["log_kq", "log_q"])
def test_what_cannot_be_drawn_is_no_matter_when_it_is_not_needed(correction, backend):
    """An ignored target, an uncorrected loss, or log q from the caller."""
    never = V - 1
    for changes in (
        {"target": ids(1, 2, never), "correction": "none"},
        {"target": ids(1, never, 3), "ignore_index": never, "correction": correction},
        {
            "target": ids(1, 2, never), "negatives": ids(never, 1), "log_q": (torch.zeros(B), torch.zeros(2)),
            "correction": correction,
        },
    ):  # fmt: skip
        assert torch.isfinite(functional.nce_loss(**arguments(backend=backend, **changes)))
