"""Cases of the sharded loss: every loss of the family by every option, and how a rank finds its part of the batch."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import objective_cases
import torch
from cases import Case
from objective_cases import LOSSES, is_softmax
from torch import Tensor

import nce_ext

# Examples of each rank, by the number of ranks; one has none.
SIZES = {1: [9], 2: [6, 3], 3: [5, 0, 4], 4: [1, 3, 0, 5]}
N_EXAMPLES, N_NEGATIVES = 9, 6
MODULES = {
    "nce_loss": nce_ext.NCELoss,
    "negative_sampling_loss": nce_ext.NegativeSamplingLoss,
    "sampled_softmax_loss": nce_ext.SampledSoftmaxLoss,
}


@dataclass(frozen=True)
class Variant:
    """What differs from nine examples of one target among 23 classes, in float32, with weights and reduction "mean"."""

    options: dict[str, Any] = field(default_factory=dict)  # of the constructor
    given: tuple[str, ...] = ()  # among "weights", "ids of all", "ids of each", "log q of all", "log q of each"
    log_z: str = ""  # "", "learned", "scalar", "of each"
    shape: dict[str, Any] = field(default_factory=dict)  # of the Case
    softmax: bool = True  # has a meaning for softmax losses
    uncorrected: bool = True  # and for correct_positive=False


WEIGHTED = ("weights",)
VARIANTS = {
    "plain": Variant(),
    "sum": Variant({"reduction": "sum"}),
    "weighted mean": Variant(given=WEIGHTED),
    "weighted sum": Variant({"reduction": "sum"}, WEIGHTED),
    "none": Variant({"reduction": "none"}),
    "weighted none": Variant({"reduction": "none", "shared": True}, WEIGHTED),
    "sparse": Variant({"sparse": True, "reduction": "none"}),
    "padded": Variant({"sparse": "padded"}),
    "shared": Variant({"shared": True}),
    "shared sparse": Variant({"shared": True, "sparse": True, "reduction": "sum"}, WEIGHTED),
    "shared padded": Variant({"shared": True, "sparse": "padded", "reduction": "none"}),
    "unique": Variant({"unique": True}, uncorrected=False),
    "unique as TensorFlow": Variant({"unique": "tf", "reduction": "sum"}, uncorrected=False),
    "several targets": Variant(shape={"positives": 3, "pad": True}, uncorrected=False),
    "several targets, shared, unique": Variant(
        {"unique": True, "remove_hits": True, "reduction": "none"}, shape={"positives": 2, "pad": True},
        uncorrected=False,
    ),
    "targets of label one": Variant(
        {"positive_label": "one", "remove_hits": True}, shape={"positives": 3, "pad": True}, uncorrected=False
    ),
    "targets of label 1/T": Variant(
        {"positive_label": "uniform", "sparse": True}, shape={"positives": 3, "pad": True}, uncorrected=False
    ),
    "ignored": Variant(shape={"pad": True}),
    "class 3 is ignored": Variant({"ignore_index": 3, "remove_hits": True}, shape={"pad": True}),
    "hits stay": Variant({"remove_hits": False}, uncorrected=False),
    "hits go": Variant({"remove_hits": True, "shared": True}),
    "ids of all": Variant(given=("ids of all",)),
    "ids of all, sparse": Variant({"sparse": True, "correction": "log_q"}, ("ids of all", "log q of all")),
    "ids of all, log q of each": Variant(
        {"reduction": "sum", "correction": "log_kq"}, ("ids of all", "log q of each", "weights")
    ),
    "ids of each": Variant({"remove_hits": True}, ("ids of each",)),
    "ids of each, log q of each": Variant(
        {"reduction": "none", "correction": "log_q"}, ("ids of each", "log q of each")
    ),
    "ids of each, log q of all": Variant({"sparse": True, "correction": "log_kq"}, ("ids of each", "log q of all")),
    "log q": Variant({"correction": "log_q"}),
    "no correction": Variant({"correction": "none"}, uncorrected=False),
    "mean of candidates": Variant(
        {"candidate_reduction": "mean"}, shape={"positives": 2, "pad": True}, softmax=False
    ),
    "number as log z": Variant({"log_z": 0.7}, softmax=False),
    "learned log z": Variant(log_z="learned", softmax=False),
    "learned log z, shared": Variant({"shared": True, "reduction": "sum"}, WEIGHTED, "learned", softmax=False),
    "scalar log z": Variant(log_z="scalar", softmax=False),
    "log z of each": Variant({"reduction": "none"}, log_z="of each", softmax=False),
    "log z of each, shared": Variant({"shared": True}, log_z="of each", softmax=False),
    "no bias": Variant(shape={"with_bias": False}),
    "no bias, shared": Variant({"shared": True}, shape={"with_bias": False}),
    "two dimensions": Variant({"reduction": "none"}, WEIGHTED, shape={"lead": (N_EXAMPLES, 2)}),
    "no negatives": Variant({"correction": "none"}, shape={"negatives": 0}, uncorrected=False),
    "two classes": Variant(shape={"classes": 2}),
    "two classes, shared, sparse": Variant({"shared": True, "sparse": True}, shape={"classes": 2}),
    "many columns": Variant({"sparse": True}, shape={"negatives": 70, "classes": 200, "dim": 33}),
    "many columns, shared": Variant({"shared": True}, shape={"negatives": 700, "classes": 200, "dim": 33}),
    "large scores": Variant({"remove_hits": True}, shape={"scale": 60.0}),
    "large scores, shared": Variant({"shared": True}, shape={"scale": 60.0}),
    "bfloat16 hidden": Variant(shape={"hidden_dtype": torch.bfloat16}),
    "bfloat16": Variant({"sparse": True}, shape={"dtype": torch.bfloat16}),
    "float16, shared": Variant({"shared": True}, shape={"dtype": torch.float16}),
    "float64": Variant(shape={"dtype": torch.float64}),
    "nothing": Variant({"sparse": True}, shape={"lead": (0,)}),
    "nothing, shared": Variant({"shared": True, "reduction": "sum"}, shape={"lead": (0,)}),
}  # fmt: skip


def applies(name: str, variant: Variant) -> bool:
    options = {**LOSSES[name][1], **variant.options}
    if name == "uncorrected target" and not variant.uncorrected:
        return False
    if options.get("adversarial_temperature") and options.get("candidate_reduction") == "mean":
        return False
    return variant.softmax or not is_softmax(name)


CASES = [(name, variant) for name in LOSSES for variant in VARIANTS if applies(name, VARIANTS[variant])]


@dataclass
class Problem:
    """The whole batch and one loss for it; the same on every rank."""

    name: str
    case: Case
    options: dict[str, Any]  # of the constructor
    given: dict[str, Any]  # of the call, for the examples of all ranks
    upstream: Tensor | None
    learned: bool

    def loss_fn(self, dtype: torch.dtype | None = None, **more: Any) -> torch.nn.Module:
        function, own = LOSSES[self.name]
        case = self.case
        options = {**own, **self.options, **more}
        if self.learned:
            options["log_z"] = "learned"
        loss_fn = MODULES[function](
            case.dim, case.classes, case.noise, case.negatives, bias=case.bias is not None, dtype=dtype or case.dtype,
            **options,
        )  # fmt: skip
        with torch.no_grad():
            loss_fn.weight.copy_(case.weight)
            if case.bias is not None:
                loss_fn.bias.copy_(case.bias)
            if self.learned:
                loss_fn.log_z.fill_(0.3)
        return loss_fn

    def truth(self) -> Any:
        more = {**self.options, **self.given}
        if self.learned:
            more["log_z"] = torch.tensor(0.3).to(self.case.dtype)
        return objective_cases.truth(self.name, self.case, self.upstream, **more)


def problem(name: str, variant_name: str, dtype: torch.dtype | None = None) -> Problem:
    variant = VARIANTS[variant_name]
    torch.manual_seed(zlib.crc32(f"{name}/{variant_name}".encode()))
    shape = {"lead": (N_EXAMPLES,), "dim": 5, "classes": 23, "negatives": N_NEGATIVES, **variant.shape}
    case = Case(**{**shape, **({"dtype": dtype, "hidden_dtype": None} if dtype else {}), "options": variant.options})
    k, lead, compute = case.negatives, case.lead, torch.promote_types(case.dtype, torch.float32)
    given: dict[str, Any] = {}
    for what in variant.given:
        if what == "weights":
            given["sample_weight"] = torch.rand(lead, dtype=compute) + 0.1
        elif what.startswith("ids"):
            given["negatives"] = torch.randint(case.classes, (k,) if what == "ids of all" else (*lead, k))
        else:
            of_negatives = torch.randn((k,) if what == "log q of all" else (*lead, k), dtype=compute) - 3
            # Of probabilities: what is left of 1 - q matters for an uncorrected target.
            given["log_q"] = (-torch.rand(case.target.shape, dtype=compute) - 0.1, of_negatives)
    if variant.log_z in ("scalar", "of each"):
        given["log_z"] = torch.randn(lead if variant.log_z == "of each" else (), dtype=compute)
    if not given.get("negatives", torch.zeros(0)).numel():
        given["seed"] = case.seed
    upstream = torch.randn(lead, dtype=compute) if variant.options.get("reduction") == "none" else None
    return Problem(name, case, variant.options, given, upstream, variant.log_z == "learned")


def part(value: Any, lead: tuple[int, ...], begin: int, end: int) -> Any:
    """This rank's rows of what has one for each example."""
    if isinstance(value, tuple):
        return tuple(part(v, lead, begin, end) for v in value)
    if isinstance(value, Tensor) and value.shape[: len(lead)] == lead and value.dim():
        return value[begin:end]
    return value
