"""What all losses do with their arguments before any work: refuse, choose the backend, flatten to rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nce_ext import _checks, _ops
from nce_ext._ops import library as _library
from nce_ext.noise import Noise
from nce_ext.reference import ADVERSARIAL, BINARY, BINARY_OBJECTIVE, SOFTMAX, Objective

CORRECTIONS = ("log_kq", "log_q", "none")
REDUCTIONS = ("mean", "sum", "none")
CUDA_MAX_DIM = 16384  # kMaxDim in csrc/cuda/shapes.cuh


class Call(NamedTuple):
    """Arguments as the operators take them: hidden [B, D], target [B, T], one row an example."""

    lead: torch.Size  # the sizes that were flattened to B
    fused: bool
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    log_z: Tensor | None  # [B]; a number has become part of offset
    seed: Tensor | None
    noise: Noise
    ids: Tensor | None  # negatives given or shared, [B, k] or [1, k]; None: drawn per example
    distinct: bool  # of equal ids, one counts
    target_log_q: Tensor | None  # None: the noise's
    negative_log_q: Tensor | None
    k: int
    one_row: bool  # ids are for all examples, however many there are
    subtract_log_q: bool
    offset: float
    remove_hits: bool
    uniform_labels: bool
    mean_candidates: bool
    ignore_index: int
    objective: Objective
    gradient_layout: int

    @property
    def host_weight(self) -> bool:
        """Whether weight and bias are in host memory, and all else on a GPU."""
        return self.weight.device != self.hidden.device

    @property
    def shared(self) -> bool:
        """Whether all examples have the same negatives, with the same log q."""
        one_log_q = self.negative_log_q is None or self.negative_log_q.shape[0] == 1
        return self.ids is not None and self.one_row and one_log_q

    def log_q(self, ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """log q of the targets and of the negatives ``ids``: as given, else the noise's; None where none is wanted."""
        if not self.subtract_log_q or self.target_log_q is not None:
            return self.target_log_q, self.negative_log_q
        return tuple(self.noise.log_prob(known_ids(self.noise, classes)) for classes in (self.target, ids))  # type: ignore

    def operator_arguments(self) -> tuple[Any, ...]:
        """The first arguments of the operators sampled_loss and scatter_sgd_, which are the same."""
        return (
            self.hidden if self.hidden.stride(-1) == 1 else self.hidden.contiguous(),
            self.weight, self.bias, self.target, self.log_z, self.seed, self.noise.table, self.ids, self.target_log_q,
            self.negative_log_q, self.noise.kind, self.k, self.subtract_log_q, self.offset, self.remove_hits,
            self.uniform_labels, self.mean_candidates, self.ignore_index,
        )  # fmt: skip


def prepare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    *,
    bias: Tensor | None,
    shared: bool,
    correction: str,
    log_z: float | Tensor,
    remove_hits: bool,
    candidate_reduction: str,
    positive_label: str,
    ignore_index: int,
    backend: str,
    negatives: Tensor | None,
    log_q: tuple[Tensor, Tensor] | None,
    seed: Tensor | None,
    generator: torch.Generator | None,
    unique: bool | str = False,
    objective: Objective = BINARY_OBJECTIVE,
    calibration: float | None = None,
    margin: float = 0.0,
    sample_weight: Tensor | None = None,
    reduction: str = "none",
    sparse: bool | str = True,
    host_weight: bool = False,
) -> Call:
    """Check what every loss takes, and flatten it. ``host_weight``: whether the table may be in pinned host memory."""
    _checks.operands(hidden, weight, bias, host_weight=host_weight)
    noise = _checks.noise_of(noise, Noise, weight, hidden.device)
    lead = _check_examples(hidden, target, log_z, sample_weight)
    check_options(correction, candidate_reduction, positive_label, reduction, ignore_index)
    check_unique(unique, correction, objective)
    check_objective(objective, remove_hits, candidate_reduction, log_z, correction)
    layout = gradient_layout(sparse)
    n_targets = 1 if target.shape == lead else target.shape[-1]
    k = _check_negatives(negatives, log_q, hidden, target, n_targets, lead, num_negatives, correction)
    if unique and negatives is not None:
        raise ValueError("unique must be False with negatives: it says how they are drawn")
    if not objective.correct_positive and n_targets > 1:
        raise ValueError(f"target must have one positive an example with correct_positive=False, got {n_targets}")
    if calibration is not None:
        objective = objective._replace(positive_weight=calibrated_weight(calibration, k, noise.n_classes))
    subtract_log_q = correction != "none"
    fused = _choose_backend(backend, hidden.device, weight.shape[1])
    if weight.device != hidden.device:
        _check_host_weight(weight, bias, hidden.device, layout, fused)
    if seed is not None:
        _checks.seed(seed, hidden.device)
    elif negatives is None:
        seed = _ops.draw_seed(hidden.device, generator)

    n_examples = math.prod(lead)
    flat_target = target.reshape(n_examples, n_targets).long().contiguous()
    one_row = shared or bool(unique) or (negatives is not None and negatives.dim() == 1)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    ids = target_log_q = negative_log_q = None
    # In a softmax the number of draws cancels; so it does between negatives.
    offset = math.log(k) if correction == "log_kq" and not unique and objective.kind != SOFTMAX else 0.0
    if negatives is not None:
        ids = _as_rows(negatives.long(), k, n_examples)
        if subtract_log_q and log_q is not None:
            target_log_q = log_q[0].detach().to(compute).reshape(flat_target.shape).contiguous()
            negative_log_q = _as_rows(log_q[1].detach().to(compute), k, n_examples)
    elif unique:
        assert seed is not None
        ids, log_count = _draw_distinct(noise, k, seed, unique)
        if subtract_log_q:
            target_log_q = log_count(known_ids(noise, flat_target)).to(compute)
            negative_log_q = log_count(ids).to(compute)
    elif shared:
        assert seed is not None
        ids = _ops.sample(noise.kind, noise.n_classes, noise.table, seed, 1, k)
    offset -= margin
    log_z_rows = None
    if isinstance(log_z, Tensor):
        log_z_rows = log_z.to(compute).expand(lead).reshape(n_examples)
    else:
        offset += log_z
    return Call(
        lead, fused, hidden.reshape(n_examples, hidden.shape[-1]), weight, bias, flat_target, log_z_rows, seed, noise,
        ids, unique is True, target_log_q, negative_log_q, k, one_row, subtract_log_q, offset, remove_hits,
        positive_label == "uniform", candidate_reduction == "mean", ignore_index, objective, layout,
    )  # fmt: skip


def known_ids(noise: Noise, ids: Tensor) -> Tensor:
    """ids, with 0 in the place of what is none: ignored and bad ones, which are masked later."""
    return torch.where((ids >= 0) & (ids < noise.n_classes), ids, 0)


def _draw_distinct(noise: Noise, k: int, seed: Tensor, unique: bool | str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Ids [1, k] that all examples share, and the log of a class's expected count among the distinct ones."""
    if unique == "tf":
        ids, trials = noise.sample_distinct(k, seed=seed)
        return ids[None], lambda classes: noise.log_expected_count_tf(classes, k, trials)
    ids = _ops.sample(noise.kind, noise.n_classes, noise.table, seed, 1, k)
    return ids, lambda classes: noise.log_inclusion(classes, k)


def check_unique(unique: object, correction: str, objective: Objective) -> None:
    if unique is not True and unique is not False and unique != "tf":
        raise ValueError(f"unique must be True, False or 'tf', got {unique!r}")
    if unique and correction == "log_q":
        raise ValueError(
            "correction must be 'log_kq' or 'none' with unique, whose expected counts are of all k draws, got 'log_q'"
        )
    if unique and not objective.correct_positive:
        raise ValueError("unique must be False with correct_positive=False, which is about draws with replacement")


def negative_sampling_objective(adversarial_temperature: float | None, calibration: float | None) -> Objective:
    if calibration is not None:
        _checks.number("calibration", calibration, 0, 1)
    if adversarial_temperature is None:
        return Objective()
    if not _checks.number("adversarial_temperature", adversarial_temperature, 0) > 0:
        raise ValueError(f"adversarial_temperature must be positive, got {adversarial_temperature!r}")
    return Objective(ADVERSARIAL, temperature=float(adversarial_temperature))


def softmax_objective(label_smoothing: float, correct_positive: bool) -> Objective:
    _checks.number("label_smoothing", label_smoothing, 0, 1)
    if not isinstance(correct_positive, bool):
        raise TypeError(f"correct_positive must be True or False, got {correct_positive!r}")
    return Objective(SOFTMAX, label_smoothing=float(label_smoothing), correct_positive=correct_positive)


def check_margin(margin: float) -> float:
    return float(_checks.number("margin", margin))


def calibrated_weight(calibration: float, k: int, n_classes: int) -> float:
    """gBCE's beta: between k / (V - 1), at calibration 1, and 1, at calibration 0."""
    if n_classes < 2:
        raise ValueError(f"calibration must be None where the noise has one class, got {calibration}")
    return 1 + calibration * (k / (n_classes - 1) - 1)


def check_objective(
    objective: Objective, remove_hits: bool, candidate_reduction: str, log_z: float | Tensor | str, correction: str
) -> None:
    """Combinations that have no meaning."""
    name = {SOFTMAX: "a softmax loss", ADVERSARIAL: "adversarial_temperature"}.get(objective.kind, "")
    if objective.kind != BINARY and candidate_reduction != "sum":
        raise ValueError(f"candidate_reduction must be 'sum' with {name}, got {candidate_reduction!r}")
    if objective.kind == SOFTMAX and (isinstance(log_z, (Tensor, str)) or log_z != 0):
        raise ValueError(f"log_z must be 0.0 with {name}, in which it cancels, got {log_z!r}")
    if not objective.correct_positive:
        if not remove_hits:
            raise ValueError(
                "remove_hits must be True with correct_positive=False, whose negatives are never the target"
            )
        if correction == "none":
            raise ValueError("correction must be 'log_kq' or 'log_q' with correct_positive=False, got 'none'")


def check_options(
    correction: str, candidate_reduction: str, positive_label: str, reduction: str, ignore_index: object
) -> None:
    _checks.one_of("correction", correction, CORRECTIONS)
    _checks.one_of("candidate_reduction", candidate_reduction, ("sum", "mean"))
    _checks.one_of("positive_label", positive_label, ("one", "uniform"))
    _checks.one_of("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")


def gradient_layout(sparse: object) -> int:
    """What an operator calls the option ``sparse``."""
    if sparse is True or sparse is False:
        return _ops.COALESCED if sparse else _ops.DENSE
    if sparse == "padded":
        return _ops.PADDED
    raise ValueError(f"sparse must be True, False or 'padded', got {sparse!r}")


def _check_examples(hidden: Tensor, target: Tensor, log_z: float | Tensor, sample_weight: Tensor | None) -> torch.Size:
    """hidden's leading sizes."""
    lead = hidden.shape[:-1]
    _checks.tensor("target", target, (torch.int64, torch.int32), hidden.device)
    multiple = target.dim() == hidden.dim() and target.shape[:-1] == lead and target.shape[-1] >= 1
    if target.shape != lead and not multiple:
        raise ValueError(
            f"target must have shape {list(lead)}, or {[*lead, 'T']} with T >= 1 positives, got {list(target.shape)}"
        )
    if isinstance(log_z, Tensor):
        _checks.tensor("log_z", log_z, _checks.FLOATS, hidden.device)
        if log_z.dim():
            _checks.batch_shaped("log_z", log_z, lead, None)
    elif isinstance(log_z, bool) or not isinstance(log_z, (int, float)) or not abs(log_z) < math.inf:
        raise ValueError(f"log_z must be a finite number or a tensor, got {log_z!r}")
    if sample_weight is not None:
        _checks.tensor("sample_weight", sample_weight, _checks.FLOATS, hidden.device)
        _checks.batch_shaped("sample_weight", sample_weight, lead, None)
    return lead


def _check_negatives(
    negatives: Tensor | None,
    log_q: tuple[Tensor, Tensor] | None,
    hidden: Tensor,
    target: Tensor,
    n_targets: int,
    lead: torch.Size,
    num_negatives: int,
    correction: str,
) -> int:
    """The number of negatives k."""
    k = _checks.count("num_negatives", num_negatives, 0, 2**20)
    if negatives is not None:
        _checks.tensor("negatives", negatives, (torch.int64, torch.int32), hidden.device)
        if negatives.dim() < 1:
            raise ValueError("negatives must be [k] or [..., k], got a scalar")
        k = _checks.count("the number of negatives", negatives.shape[-1], 0, 2**20)
        if negatives.dim() > 1:
            _checks.batch_shaped("negatives", negatives, lead, k)
    if k == 0 and correction == "log_kq":
        raise ValueError("num_negatives must be >= 1 with correction='log_kq' (log k is infinite), got 0")
    if math.prod(lead) * (k + n_targets) >= 2**32:
        raise ValueError(
            f"hidden must have fewer than 2^32 / (k + T) examples a call, got {math.prod(lead)} with k = {k}; split it"
        )
    if log_q is not None:
        if correction == "none":
            raise ValueError("log_q must be None with correction='none', which subtracts no log q")
        if negatives is None:
            raise ValueError("log_q must come with negatives: the log q of ids that are yet to be drawn is not known")
        if not isinstance(log_q, (tuple, list)) or len(log_q) != 2:
            raise TypeError("log_q must be a pair (target_log_q, negative_log_q)")
        _checks.tensor("log_q[0]", log_q[0], _checks.FLOATS, hidden.device)
        _checks.tensor("log_q[1]", log_q[1], _checks.FLOATS, hidden.device)
        if log_q[0].shape != target.shape:
            raise ValueError(f"log_q[0] must have target's shape {list(target.shape)}, got {list(log_q[0].shape)}")
        if log_q[1].dim() != 1 or log_q[1].shape[0] != k:
            _checks.batch_shaped("log_q[1]", log_q[1], lead, k)
    return k


def _choose_backend(backend: str, device: torch.device, dim: int) -> bool:
    _checks.one_of("backend", backend, ("auto", "fused", "reference"))
    available = _library.fused_available(device)
    if backend == "fused" and not available:
        raise RuntimeError(f"backend='fused' is not available for {device.type}: {_library.why_missing(device)}")
    if not available and backend == "auto" and device.type == "cuda" and not torch.compiler.is_compiling():
        _library.warn_of_reference(device)
    fused = available and backend != "reference"
    if fused and device.type == "cuda" and dim > CUDA_MAX_DIM:
        raise ValueError(
            f"weight must have at most {CUDA_MAX_DIM} columns for the CUDA kernels, got {dim}; "
            "backend='reference' takes any number"
        )
    return fused


def _check_host_weight(weight: Tensor, bias: Tensor | None, device: torch.device, layout: int, fused: bool) -> None:
    if not fused:
        raise ValueError(f"weight must be on hidden's device {device} for the reference backend, got {weight.device}")
    if layout == _ops.DENSE and any(t is not None and t.requires_grad for t in (weight, bias)):
        raise ValueError("sparse must be True or 'padded' with a weight in host memory, got False")
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"weight must be on hidden's device {device} while a CUDA graph is captured, got {weight.device}: the host "
            "has to wait for its gradient"
        )


def _as_rows(values: Tensor, k: int, n_examples: int) -> Tensor:
    """[1, k] if all examples share them, else [B, k]."""
    return values.reshape((1, k) if values.dim() == 1 else (n_examples, k)).contiguous()
