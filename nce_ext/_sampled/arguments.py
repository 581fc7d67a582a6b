"""Arguments of a sampled loss: refused or validated, flattened to one entry an example, and grouped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from nce_ext import _checks, _private_torch
from nce_ext._ops import library
from nce_ext._ops.coo import COALESCED, DENSE, PADDED
from nce_ext._ops.sample import draw_seed
from nce_ext._sampled.call import Call, Candidates, Correction, Labels, Layout, Operands, known_ids
from nce_ext.noise import Noise
from nce_ext.reference import ADVERSARIAL, BINARY, BINARY_OBJECTIVE, SOFTMAX, Objective

T = TypeVar("T")
CORRECTIONS = ("log_kq", "log_q", "none")
CUDA_MAX_DIM = 16384  # kMaxDim in csrc/cuda/shapes.cuh


def validate_and_flatten(
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
    """Check what every loss takes, in the order device, dtype, layout, rank, size, range, and flatten it.

    Options are those of :func:`nce_ext.functional.nce_loss`; ``objective``, ``calibration`` and ``margin`` are what the
    losses differ in. ``host_weight``: whether the table may be in pinned host memory.
    """
    _checks.operands(hidden, weight, bias, host_weight=host_weight)
    noise = _checks.noise_of(noise, Noise, weight, hidden.device)
    if not isinstance(log_z, (Tensor, int, float)):
        log_z = _checks.plain(log_z)
    batch_shape = _check_examples(hidden, target, log_z, sample_weight)
    ignore_index = check_options(correction, candidate_reduction, positive_label, reduction, ignore_index)
    unique, remove_hits = flag(unique), flag(remove_hits)
    check_unique(unique, correction, objective)
    check_objective(objective, remove_hits, candidate_reduction, log_z, correction)
    in_layout = gradient_layout(sparse)
    n_targets = 1 if target.shape == batch_shape else target.shape[-1]
    k = _check_negatives(negatives, log_q, hidden, target, n_targets, batch_shape, num_negatives, correction)
    if unique and negatives is not None:
        raise ValueError("unique must be False with negatives: it says how they are drawn")
    if not objective.correct_positive and n_targets > 1:
        raise ValueError(f"target must have one positive an example with correct_positive=False, got {n_targets}")
    if calibration is not None:
        objective = objective._replace(positive_weight=calibrated_weight(calibration, k, noise.n_classes))
    fused = _choose_backend(backend, hidden.device, weight.shape[1])
    layout = Layout(batch_shape, fused, in_layout)
    if weight.device != hidden.device:
        _check_host_weight(weight, bias, hidden.device, layout)
    if seed is not None:
        _checks.seed(seed, hidden.device)
    elif negatives is None:
        seed = draw_seed(hidden.device, generator)

    n_examples = math.prod(batch_shape)
    operands = Operands(
        hidden=hidden.reshape(n_examples, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        target=target.reshape(n_examples, n_targets).long().contiguous(),
        log_z=None,
    )
    if isinstance(log_z, Tensor):
        log_z_of_examples = log_z.to(operands.compute_dtype).expand(batch_shape).reshape(n_examples)
        operands = operands._replace(log_z=log_z_of_examples)
    # In a softmax the number of draws cancels; so it does between negatives.
    offset = math.log(k) if correction == "log_kq" and not unique and objective.kind != SOFTMAX else 0.0
    offset -= margin
    if not isinstance(log_z, Tensor):
        offset += log_z
    subtract_log_q = correction != "none"
    ids, target_log_q, negative_log_q = None, None, None
    if negatives is not None:
        ids = _by_example(negatives.long(), k, n_examples)
        if subtract_log_q and log_q is not None:
            target_log_q, negative_log_q = _flat_log_q(log_q, operands, k)
    elif unique:
        assert seed is not None
        ids, log_count = _draw_distinct(noise, k, seed, unique)
        if subtract_log_q:
            target_log_q = log_count(known_ids(noise, operands.target)).to(operands.compute_dtype)
            negative_log_q = log_count(ids).to(operands.compute_dtype)
    elif shared:
        assert seed is not None
        ids = noise.draw(seed, 1, k)
    negatives_shared = shared or bool(unique) or (negatives is not None and negatives.dim() == 1)
    return Call(
        operands,
        Candidates(noise, seed, ids, k, negatives_shared, unique is True, remove_hits),
        Correction(target_log_q, negative_log_q, subtract_log_q, offset),
        Labels(positive_label == "uniform", candidate_reduction == "mean", ignore_index),
        objective,
        layout,
    )


def _flat_log_q(log_q: tuple[Tensor, Tensor], operands: Operands, k: int) -> tuple[Tensor, Tensor]:
    """Flatten the caller's log q of targets [B, T] and of negatives [1 or B, k]; none of it gets a gradient."""
    of_targets, of_negatives = (part.detach().to(operands.compute_dtype) for part in log_q)
    n_examples = operands.target.shape[0]
    return of_targets.reshape(operands.target.shape).contiguous(), _by_example(of_negatives, k, n_examples)


def _draw_distinct(noise: Noise, k: int, seed: Tensor, unique: bool | str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Draw ids [1, k] that all examples share; returns also the log of a class's expected count among the distinct."""
    if unique == "tf":
        if _private_torch.is_batched(seed):
            raise ValueError(
                "unique must not be 'tf' with a seed of each entry of a vmap, whose draws differ in number"
            )
        ids, trials = noise.sample_distinct(k, seed=seed)
        return ids[None], lambda classes: noise.log_expected_count_tf(classes, k, trials)
    ids = noise.draw(seed, 1, k)
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
        check_calibration(calibration)
    if adversarial_temperature is None:
        return Objective()
    temperature = _checks.number("adversarial_temperature", adversarial_temperature, 0)
    if not temperature > 0:
        raise ValueError(f"adversarial_temperature must be positive, got {adversarial_temperature!r}")
    return Objective(ADVERSARIAL, temperature=float(temperature))


def check_calibration(calibration: float) -> float:
    return float(_checks.number("calibration", calibration, 0, 1))


def softmax_objective(label_smoothing: float, correct_positive: bool) -> Objective:
    label_smoothing = float(_checks.number("label_smoothing", label_smoothing, 0, 1))
    correct_positive = flag(correct_positive)
    if not isinstance(correct_positive, bool):
        raise TypeError(f"correct_positive must be True or False, got {correct_positive!r}")
    return Objective(SOFTMAX, label_smoothing=label_smoothing, correct_positive=correct_positive)


def check_margin(margin: float) -> float:
    return float(_checks.number("margin", margin))


def calibrated_weight(calibration: float, k: int, n_classes: int) -> float:
    """Compute gBCE's beta: between k / (V - 1), at calibration 1, and 1, at calibration 0."""
    if n_classes < 2:
        raise ValueError(f"calibration must be None where the noise has one class, got {calibration}")
    return 1 + check_calibration(calibration) * (k / (n_classes - 1) - 1)


def check_objective(
    objective: Objective, remove_hits: bool, candidate_reduction: str, log_z: float | Tensor | str, correction: str
) -> None:
    """Refuse combinations of options that have no meaning."""
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
) -> int:
    """Refuse options that are none; return ignore_index as an int."""
    _checks.one_of("correction", correction, CORRECTIONS)
    _checks.one_of("candidate_reduction", candidate_reduction, ("sum", "mean"))
    _checks.one_of("positive_label", positive_label, ("one", "uniform"))
    _checks.reduction(reduction)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        ignore_index = _checks.plain(ignore_index)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    return ignore_index


def flag(value: T) -> T:
    """Return True and False for numpy's; any other value as it is."""
    return value if value is True or value is False else _checks.plain(value)


def gradient_layout(sparse: object) -> int:
    """Translate the option ``sparse`` to what the operators call gradient_layout."""
    sparse = flag(sparse)
    if sparse is True or sparse is False:
        return COALESCED if sparse else DENSE
    if sparse == "padded":
        return PADDED
    raise ValueError(f"sparse must be True, False or 'padded', got {sparse!r}")


def _check_examples(hidden: Tensor, target: Tensor, log_z: float | Tensor, sample_weight: Tensor | None) -> torch.Size:
    """Check the shapes of what has one entry an example; returns hidden's leading sizes."""
    batch_shape = hidden.shape[:-1]
    _checks.tensor("target", target, (torch.int64, torch.int32), hidden.device)
    multiple = target.dim() == hidden.dim() and target.shape[:-1] == batch_shape and target.shape[-1] >= 1
    if target.shape != batch_shape and not multiple:
        raise ValueError(
            f"target must have shape {list(batch_shape)}, or {[*batch_shape, 'T']} with T >= 1 positives, got "
            f"{list(target.shape)}"
        )
    if isinstance(log_z, Tensor):
        _checks.tensor("log_z", log_z, _checks.FLOATS, hidden.device)
        if log_z.dim():
            _checks.batch_shaped("log_z", log_z, batch_shape, None)
    elif isinstance(log_z, bool) or not isinstance(log_z, (int, float)) or not abs(log_z) < math.inf:
        raise ValueError(f"log_z must be a finite number or a tensor, got {log_z!r}")
    if sample_weight is not None:
        _checks.tensor("sample_weight", sample_weight, _checks.FLOATS, hidden.device)
        _checks.batch_shaped("sample_weight", sample_weight, batch_shape, None)
    return batch_shape


def _check_negatives(
    negatives: Tensor | None,
    log_q: tuple[Tensor, Tensor] | None,
    hidden: Tensor,
    target: Tensor,
    n_targets: int,
    batch_shape: torch.Size,
    num_negatives: int,
    correction: str,
) -> int:
    """Check negatives and their log q; returns the number of negatives k."""
    k = _checks.count("num_negatives", num_negatives, 0, 2**20)
    if negatives is not None:
        _checks.tensor("negatives", negatives, (torch.int64, torch.int32), hidden.device)
        if negatives.dim() < 1:
            raise ValueError("negatives must be [k] or [..., k], got a scalar")
        k = _checks.count("the number of negatives", negatives.shape[-1], 0, 2**20)
        if negatives.dim() > 1:
            _checks.batch_shaped("negatives", negatives, batch_shape, k)
    if k == 0 and correction == "log_kq":
        raise ValueError("num_negatives must be >= 1 with correction='log_kq' (log k is infinite), got 0")
    if math.prod(batch_shape) * (k + n_targets) >= 2**32:
        raise ValueError(
            f"hidden must have fewer than 2^32 / (k + T) examples a call, got {math.prod(batch_shape)} with k = {k}; "
            "split it"
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
            _checks.batch_shaped("log_q[1]", log_q[1], batch_shape, k)
    return k


def _choose_backend(backend: str, device: torch.device, dim: int) -> bool:
    _checks.one_of("backend", backend, ("auto", "fused", "reference"))
    available = library.fused_available(device)
    if backend == "fused" and not available:
        raise RuntimeError(f"backend='fused' is not available for {device.type}: {library.why_missing(device)}")
    if not available and backend == "auto" and device.type == "cuda" and not torch.compiler.is_compiling():
        library.warn_of_reference(device)
    fused = available and backend != "reference"
    if fused and device.type == "cuda" and dim > CUDA_MAX_DIM:
        raise ValueError(
            f"weight must have at most {CUDA_MAX_DIM} columns for the CUDA kernels, got {dim}; "
            "backend='reference' takes any number"
        )
    if fused and _private_torch.inside_vmap():
        raise RuntimeError("the compiled kernels cannot run under torch.func.vmap; backend='reference' works")
    return fused


def _check_host_weight(weight: Tensor, bias: Tensor | None, device: torch.device, layout: Layout) -> None:
    if not layout.fused:
        raise ValueError(f"weight must be on hidden's device {device} for the reference backend, got {weight.device}")
    if layout.gradient_layout == DENSE and any(t is not None and t.requires_grad for t in (weight, bias)):
        raise ValueError("sparse must be True or 'padded' with a weight in host memory, got False")
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"weight must be on hidden's device {device} while a CUDA graph is captured, got {weight.device}: the host "
            "has to wait for its gradient"
        )


def _by_example(values: Tensor, k: int, n_examples: int) -> Tensor:
    """Flatten values that all examples share to [1, k], others to [B, k]."""
    return values.reshape((1, k) if values.dim() == 1 else (n_examples, k)).contiguous()
