"""The losses of the family by name, run on the inputs of cases.py next to the oracle."""

from __future__ import annotations

import math
from typing import Any

import objectives_oracle
import oracle
import torch
from cases import Case, Result, leaf
from objectives_oracle import ADVERSARIAL, BINARY, SOFTMAX
from rounding import TOLERANCE, UNDERFLOW
from tolerances import as_float64, assert_close
from torch import Tensor

from nce_ext import functional

F64 = torch.float64
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "nce": ("nce_loss", {}),
    "negative sampling": ("negative_sampling_loss", {}),
    "adversarial": ("negative_sampling_loss", {"adversarial_temperature": 1.5, "margin": 0.5}),
    "calibrated": ("negative_sampling_loss", {"calibration": 0.75, "candidate_reduction": "mean"}),
    "softmax": ("sampled_softmax_loss", {}),
    "smoothed": ("sampled_softmax_loss", {"label_smoothing": 0.2}),
    "uncorrected target": ("sampled_softmax_loss", {"correct_positive": False}),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "nce_loss": {"correction": "log_kq", "remove_hits": False, "positive_label": "one"},
    "negative_sampling_loss": {"correction": "none", "remove_hits": False, "positive_label": "one"},
    "sampled_softmax_loss": {"correction": "log_kq", "remove_hits": True, "positive_label": "uniform"},
}


def is_softmax(name: str) -> bool:
    return LOSSES[name][0] == "sampled_softmax_loss"


def options_of(name: str, case: Case, more: dict[str, Any]) -> dict[str, Any]:
    return {**LOSSES[name][1], **case.options, **more}


def loss(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case, **more: Any) -> Tensor:
    options = {"seed": case.seed, **options_of(name, case, more)}
    function = getattr(functional, LOSSES[name][0])
    return function(hidden, weight, case.target, case.noise, case.negatives, bias=bias, **options)


def run(name: str, case: Case, backend: str, upstream: Tensor | None = None, **more: Any) -> Result:
    """The library's loss and every gradient."""
    hidden, weight, bias = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
    log_z = options_of(name, case, more).get("log_z")
    if isinstance(log_z, Tensor):
        more = {**more, "log_z": (log_z := leaf(log_z))}
    value = loss(name, hidden, weight, bias, case, backend=backend, **more)
    value.backward(upstream if upstream is not None or value.dim() == 0 else torch.ones_like(value))
    return Result(
        value.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad,
        log_z.grad if isinstance(log_z, Tensor) else None,
    )  # fmt: skip


def drawn(case: Case, n: int, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """Ids, [k] of all examples or [n, k], and what gives the log q (or log expected count) of ids."""
    noise, seed, k = case.noise, options.get("seed", case.seed), case.negatives
    if options.get("unique") == "tf":
        ids, trials = noise.sample_distinct(k, seed=seed)
        return ids, lambda ids: noise.log_expected_count_tf(ids, k, trials)
    if options.get("unique"):
        ids = noise.sample((1, k), seed=seed)[0]
        return ids, lambda ids: noise.log_inclusion(ids, k)
    if options.get("shared"):
        return noise.sample((1, k), seed=seed)[0], noise.log_prob
    return noise.sample((n, k), seed=seed), noise.log_prob


def objective(name: str, options: dict[str, Any], k: int, classes: int) -> objectives_oracle.Options:
    kind = SOFTMAX if is_softmax(name) else ADVERSARIAL if options.get("adversarial_temperature") else BINARY
    weight = 1.0
    if options.get("calibration") is not None:
        alpha, t = k / (classes - 1), options["calibration"]
        weight = alpha * (t * (1 - 1 / alpha) + 1 / alpha) if alpha else 1 - t
    return objectives_oracle.Options(
        kind, weight, options.get("label_smoothing", 0.0), options.get("adversarial_temperature") or 0.0,
        options.get("correct_positive", True), options["positive_label"] == "uniform",
    )  # fmt: skip


def truth(
    name: str, case: Case, upstream: Tensor | None = None, *, small_digits: bool = True, **more: Any
) -> oracle.Truth:
    """The oracle's answer, for the negatives that the seed draws (or the given ones)."""
    options = {**DEFAULTS[LOSSES[name][0]], **options_of(name, case, more)}
    n = case.hidden.shape[:-1].numel()
    target = case.target.reshape(n, -1).long() if n else torch.empty((0, 1), dtype=torch.int64)
    negatives, log_q_of = options.get("negatives"), case.noise.log_prob
    if negatives is None:
        negatives, log_q_of = drawn(case, n, options)
    ids, k = negatives.long(), negatives.shape[-1]
    target_log_q = log_q_of(torch.where(target == options.get("ignore_index", -100), 0, target)).double()
    negative_log_q = log_q_of(ids).double()
    if options.get("log_q") is not None:
        target_log_q = options["log_q"][0].double().reshape(target.shape)
        negative_log_q = options["log_q"][1].double()
    ids, negative_log_q = (v if v.dim() == 1 else v.reshape(n, k) for v in (ids, negative_log_q))
    kept = range(k)
    if options.get("unique") is True:  # each once
        kept = [j for j in range(k) if ids[j] not in ids[:j]]
    ids, negative_log_q = ids.expand(n, k)[:, list(kept)], negative_log_q.expand(n, k)[:, list(kept)]
    offsets = [-options.get("margin", 0.0)]
    if options["correction"] == "none":
        target_log_q, negative_log_q = torch.zeros_like(target_log_q), torch.zeros_like(negative_log_q)
    elif options["correction"] == "log_kq" and not options.get("unique") and not is_softmax(name):
        offsets.append(math.log(k))
    log_z = options.get("log_z", 0.0)
    weights = options.get("sample_weight")
    return objectives_oracle.batch(
        as_float64(case.hidden).reshape(n, case.hidden.shape[-1]), as_float64(case.weight), target.tolist(),
        ids.tolist(), objective(name, options, k, case.classes)._replace(small_digits=small_digits),
        bias=None if case.bias is None else as_float64(case.bias),
        target_log_q=target_log_q.tolist(), negative_log_q=negative_log_q.tolist(), offsets=offsets,
        log_z=as_float64(log_z).reshape(-1) if isinstance(log_z, Tensor) and log_z.dim() else float(log_z),
        remove_hits=options["remove_hits"],
        n_draws=k if options.get("candidate_reduction") == "mean" else None,
        reduction=options.get("reduction", "mean"), ignore_index=options.get("ignore_index", -100),
        sample_weight=None if weights is None else as_float64(weights).reshape(-1),
        upstream=None if upstream is None else as_float64(upstream).reshape(-1),
    )  # fmt: skip


def assert_result(case: Case, got: Result, expected: oracle.Truth, *, apart: bool = False) -> None:
    """Loss and all gradients agree with the oracle to the rounding of their dtypes.

    ``apart``: the rows of targets and of negatives are rounded by themselves, and their sum once more.
    """
    value, scale = expected
    stored = str(case.weight.dtype).removeprefix("torch.")
    rtol, atol = TOLERANCE[stored]
    compute = F64 if case.weight.dtype == F64 else torch.float32
    dtypes = {"loss": compute, "hidden": case.hidden.dtype, "weight": case.weight.dtype, "bias": case.weight.dtype}
    for part, dtype in dtypes.items():
        tensor, exact = getattr(got, part), getattr(value, part)
        if part == "bias" and case.bias is None:
            assert tensor is None
            continue
        assert tensor.dtype == dtype
        size = getattr(scale, part)
        if apart and part in ("weight", "bias"):
            size = size * (1 + 2 * rtol / atol) + 2 * UNDERFLOW[stored] / atol
        assert_close(tensor, exact.reshape(tensor.shape), dtype, part, size)
    if got.log_z is not None:
        exact, size = (v.log_z if got.log_z.dim() else v.log_z.sum() for v in (value, scale))
        assert_close(got.log_z, exact.reshape(got.log_z.shape), got.log_z.dtype, "log_z", size)


def assert_matches(name: str, case: Case, backend: str, upstream: Tensor | None = None, **more: Any) -> None:
    expected = truth(name, case, upstream, small_digits=backend != "reference", **more)
    options = options_of(name, case, more)
    given = [options.get("negatives"), (options.get("log_q") or (None, None))[1]]
    one_row = given[0] is not None and all(t is None or t.dim() == 1 for t in given)
    shared = options.get("shared") or options.get("unique") or one_row
    apart = bool(shared) and options.get("sparse") == "padded"
    assert_result(case, run(name, case, backend, upstream, **more), expected, apart=apart)
