"""Whatever the shapes, duplicates, masks and options: finite, and equal to the oracle on both backends."""

from __future__ import annotations

import torch
from cases import Case, assert_matches, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native import require_native

SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIZES = st.fixed_dictionaries(
    {
        "lead": st.one_of(st.just(()), st.tuples(st.integers(0, 40)), st.tuples(st.integers(0, 4), st.integers(0, 5))),
        "dim": st.integers(1, 70),
        "classes": st.one_of(st.integers(1, 4), st.integers(5, 300)),
        "negatives": st.one_of(st.integers(1, 4), st.integers(14, 18), st.integers(30, 70)),
        "positives": st.integers(0, 4),
        "scale": st.sampled_from([0.01, 1.0, 30.0]),
        "with_bias": st.booleans(),
        "pad": st.booleans(),
    }
)
OPTIONS = st.fixed_dictionaries(
    {
        "correction": st.sampled_from(["log_kq", "log_q", "none"]),
        "log_z": st.sampled_from([0.0, 2.5, -1.0]),
        "remove_hits": st.booleans(),
        "candidate_reduction": st.sampled_from(["sum", "mean"]),
        "positive_label": st.sampled_from(["one", "uniform"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "shared": st.booleans(),
        "ignore_index": st.sampled_from([-100, 0]),
        "sparse": st.booleans(),
    }
)


@SETTINGS
@given(sizes=SIZES, options=OPTIONS, seed=st.integers(0, 2**31))
def test_both_backends_give_the_oracles_loss_and_gradients(backend, sizes, options, seed):
    torch.manual_seed(seed)
    case = Case(**sizes, dtype=torch.float64, options=options)
    assert_matches(case, backend)


@SETTINGS
@given(
    sizes=SIZES,
    options=OPTIONS,
    seed=st.integers(0, 2**31),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
)
def test_the_kernels_are_exact_in_every_storage(native, sizes, options, seed, dtypes):
    torch.manual_seed(seed)
    assert_matches(Case(**sizes, hidden_dtype=dtypes[0], dtype=dtypes[1], options=options), "fused")


@SETTINGS
@given(
    batch=st.integers(1, 12),
    classes=st.integers(1, 6),
    given_negatives=st.lists(st.integers(0, 5), min_size=1, max_size=50),
    targets=st.lists(st.integers(-1, 5), min_size=1, max_size=4),
    per_example=st.booleans(),
)
def test_any_duplicates_and_hits_among_given_negatives(backend, batch, classes, given_negatives, targets, per_example):
    options = {"remove_hits": True, "ignore_index": -1, "reduction": "sum"}
    case = Case(lead=(batch,), classes=classes, positives=len(targets), dtype=torch.float64, options=options)
    case.target = torch.tensor(targets).clamp_max(classes - 1).repeat(batch, 1)
    negatives = torch.tensor(given_negatives) % classes
    if per_example:
        negatives = torch.stack([negatives.roll(i) for i in range(batch)])
    assert_matches(case, backend, negatives=negatives)
    assert_matches(case, backend, negatives=negatives, remove_hits=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(0, 30), extra=st.integers(0, 10), k=st.integers(1, 40), seed=st.integers(-(2**63), 2**63 - 1))
def test_an_examples_loss_does_not_depend_on_its_neighbours(batch, extra, k, seed):
    """A batch split anywhere gives the same bits: a draw knows its example, and arithmetic does not know the batch."""
    require_native()
    case = Case(lead=(batch + extra,), dim=9, negatives=k, options={"reduction": "none"})
    case.seed = torch.tensor([seed, 1])
    whole = run(case, "fused")
    case.hidden, case.target = case.hidden[:batch], case.target[:batch]
    part = run(case, "fused")
    assert torch.equal(part.loss, whole.loss[:batch])
    assert torch.equal(part.hidden, whole.hidden[:batch])
