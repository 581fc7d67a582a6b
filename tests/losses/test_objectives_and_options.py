"""Every loss with every sampler and option: equal to the float64 oracle, and refused where it has no meaning."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from objective_cases import DEFAULTS, LOSSES, assert_matches, is_softmax, loss

from nce_ext import noise as noises

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SETTINGS = settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORMS = ("shared", "unique", "tf", "given to all", "given to each", "per example")
NOISES = {
    "uniform": noises.Uniform,
    "log-uniform": noises.LogUniform,
    "unigram": lambda n: noises.Unigram(1.0 / torch.arange(1, n + 1), power=1.0),
    "mixture": lambda n: noises.Mixture([noises.LogUniform(n), noises.Uniform(n)], [3, 1]),
}
SIZES = st.fixed_dictionaries(
    {
        "lead": st.one_of(st.just(()), st.tuples(st.integers(0, 12)), st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "dim": st.integers(1, 40),
        "classes": st.one_of(st.integers(1, 4), st.integers(5, 100)),
        "negatives": st.one_of(st.integers(0, 4), st.integers(14, 18), st.integers(30, 40)),
        "positives": st.integers(0, 3),
        "scale": st.sampled_from([0.01, 1.0, 30.0]),
        "with_bias": st.booleans(),
        "pad": st.booleans(),
    }
)
OPTIONS = {
    "form": st.sampled_from(FORMS),
    "noise": st.sampled_from(sorted(NOISES)),
    "correction": st.sampled_from(["log_kq", "log_q", "none"]),
    "remove_hits": st.booleans(),
    "positive_label": st.sampled_from(["one", "uniform"]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "weighted": st.booleans(),
    "with_log_q": st.sampled_from([False, False, "as negatives", "of the other shape"]),
    "ignore_index": st.sampled_from([-100, 0]),
    "sparse": st.sampled_from([False, True, "padded"]),
    "log_z": st.sampled_from([None, 0.0, -1.25, "scalar", "per example"]),
    "candidate_reduction": st.sampled_from(["sum", "mean"]),
    "margin": st.sampled_from([0.0, 2.5]),
}


def belongs(option: str, name: str) -> bool:
    """Whether the loss's function has the option at all."""
    if option == "margin":
        return LOSSES[name][0] == "negative_sampling_loss"
    return option not in ("log_z", "candidate_reduction") or not is_softmax(name)


def faults(name: str, sizes: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """What has no meaning, as the pattern of the refusal."""
    form, correction, found = options["form"], options["correction"], []
    k, classes = sizes["negatives"], sizes["classes"]
    if form in ("unique", "tf") and correction == "log_q":
        found.append(r"correction must be 'log_kq' or 'none' with unique.* got 'log_q'")
    if form == "tf" and k > classes:
        found.append(rf"k must be in 0 \.\. {classes} .*got {k}")
    if k == 0 and correction == "log_kq":
        found.append(r"num_negatives must be >= 1 with correction='log_kq' .* got 0")
    if name == "adversarial" and options["candidate_reduction"] == "mean":
        found.append(r"candidate_reduction must be 'sum' with adversarial_temperature, got 'mean'")
    if name == "calibrated" and classes == 1:
        found.append(r"calibration must be None where the noise has one class, got 0\.75")
    if name == "uncorrected target":
        if form in ("unique", "tf"):
            found.append(r"unique must be False with correct_positive=False")
        if not options["remove_hits"]:
            found.append(r"remove_hits must be True with correct_positive=False")
        if correction == "none":
            found.append(r"correction must be 'log_kq' or 'log_q' with correct_positive=False, got 'none'")
        if sizes["positives"] > 1:
            found.append(rf"target must have one positive .*correct_positive=False, got {sizes['positives']}")
    if form.startswith("given") and options["with_log_q"] and correction == "none":
        found.append(r"log_q must be None with correction='none'")
    if not form.startswith("given") and options["with_log_q"]:
        found.append(r"log_q must (come with negatives|be None with correction='none')")
    return found


@st.composite
def problems(draw, meaningful: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A loss, sizes and options; with ``meaningful`` each fault is mended."""
    name, sizes = draw(st.sampled_from(sorted(LOSSES))), draw(SIZES)
    options = {option: draw(values) for option, values in OPTIONS.items()}
    for option in OPTIONS:
        if not belongs(option, name):
            options.pop(option)
    if meaningful:
        mends = {
            "correction must be 'log_kq' or 'none'": (options, "correction", "log_kq"),
            "k must be": (sizes, "negatives", sizes["classes"]),
            "num_negatives must be": (sizes, "negatives", 1),
            "candidate_reduction must be": (options, "candidate_reduction", "sum"),
            "calibration must be": (sizes, "classes", 3),
            "unique must be": (options, "form", "shared"),
            "remove_hits must be": (options, "remove_hits", True),
            "correction must be 'log_kq' or 'log_q'": (options, "correction", "log_kq"),
            "target must have": (sizes, "positives", 1),
            "log_q must": (options, "with_log_q", False),
        }
        while found := faults(name, sizes, options):
            (mend,) = (mend for start, mend in mends.items() if found[0].startswith(start))
            mend[0][mend[1]] = mend[2]
    return name, sizes, options


def build(sizes: dict[str, Any], options: dict[str, Any], dtype, hidden_dtype) -> Case:
    """The case, with what the grid's options stand for in its own."""
    own = {key: value for key, value in options.items() if key not in ("form", "noise", "weighted", "with_log_q")}
    case = Case(**sizes, dtype=dtype, hidden_dtype=hidden_dtype, options=own)
    case.noise, form, k, lead = NOISES[options["noise"]](case.classes), options["form"], case.negatives, case.lead
    if form in ("shared", "unique", "tf"):
        own["shared" if form == "shared" else "unique"] = "tf" if form == "tf" else True
    elif form != "per example":
        own["negatives"] = torch.randint(case.classes, (k,) if form == "given to all" else (*lead, k))
    compute = F64 if dtype == F64 else F32
    if options["with_log_q"]:
        to_all = (form == "given to all") == (options["with_log_q"] == "as negatives")
        of_negatives = -3 * torch.rand((k,) if to_all else (*lead, k))
        own["log_q"] = (-3 * torch.rand(case.target.shape) - 0.1, of_negatives)
    if options["weighted"]:
        own["sample_weight"] = torch.rand(lead, dtype=compute)
    if own.get("log_z", 0.0) is None:
        del own["log_z"]
    elif isinstance(own.get("log_z"), str):
        own["log_z"] = torch.randn(() if own["log_z"] == "scalar" else lead, dtype=compute)
    return case


def upstream_of(case: Case) -> torch.Tensor | None:
    compute = F64 if case.weight.dtype == F64 else F32
    return torch.randn(case.lead, dtype=compute) if case.options["reduction"] == "none" else None


@SETTINGS
@given(problem=problems(meaningful=True), seed=st.integers(0, 2**31))
def test_both_backends_give_the_oracles_loss_and_gradients(backend, problem, seed):
    torch.manual_seed(seed)
    name, sizes, options = problem
    case = build(sizes, options, F64, None)
    assert_matches(name, case, backend, upstream_of(case))


@SETTINGS
@given(
    problem=problems(meaningful=True),
    seed=st.integers(0, 2**31),
    dtypes=st.tuples(*[st.sampled_from([F32, BF16, F16])] * 2),
)
def test_the_kernels_are_exact_in_every_storage(native, problem, seed, dtypes):
    torch.manual_seed(seed)
    name, sizes, options = problem
    case = build(sizes, options, *dtypes)
    assert_matches(name, case, "fused", upstream_of(case))


@settings(SETTINGS, max_examples=1000)
@given(problem=problems(meaningful=False), seed=st.integers(0, 2**31))
def test_what_has_no_meaning_is_refused_and_nothing_else(backend, problem, seed):
    torch.manual_seed(seed)
    name, sizes, options = problem
    case = build(sizes, options, F64, None)
    found = faults(name, sizes, options)
    if not found:
        assert torch.isfinite(loss(name, case.hidden, case.weight, case.bias, case, backend=backend)).all()
        return
    with pytest.raises(ValueError, match="|".join(found)) as caught:
        loss(name, case.hidden, case.weight, case.bias, case, backend=backend)
    assert re.search(r" must ", str(caught.value))


def test_the_grid_has_every_loss():
    assert {function for function, _ in LOSSES.values()} == set(DEFAULTS)
