"""The losses as functions of explicit weights: validation, seeds, shapes and reductions around one operator."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from nce_ext import _checks, _library, _ops, reference
from nce_ext.noise import Noise, check_seed, draw_seed

__all__ = ["nce_loss", "negative_sampling_loss"]

CORRECTIONS = ("log_kq", "log_q", "none")
REDUCTIONS = ("mean", "sum", "none")
_DENSE_GRADIENT_LIMIT = 256 * 2**20  # bytes
_warned_dense_gradient = False


def nce_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    *,
    bias: Tensor | None = None,
    shared: bool = False,
    correction: str = "log_kq",
    log_z: float | Tensor = 0.0,
    remove_hits: bool = False,
    candidate_reduction: str = "sum",
    positive_label: str = "one",
    reduction: str = "mean",
    ignore_index: int = -100,
    sparse: bool = False,
    backend: str = "auto",
    negatives: Tensor | None = None,
    log_q: tuple[Tensor, Tensor] | None = None,
    sample_weight: Tensor | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Binary noise-contrastive estimation over k sampled negatives.

    Equivalent to, with ``D, V, k`` the sizes of a row, the vocabulary and the noise sample::

        negatives = noise.sample((*target.shape, k))
        ids = torch.cat([target[..., None], negatives], -1)               # column 0 is the target
        z = (weight[ids] @ hidden[..., None])[..., 0] + bias[ids]         # [..., 1 + k]
        z = z - log_z - math.log(k) - noise.log_prob(ids)
        label = torch.zeros_like(z); label[..., 0] = 1
        loss = F.binary_cross_entropy_with_logits(z, label, reduction="none").sum(-1).mean()

    without ever holding the gathered rows: each is read once, and what is kept for backward is an int32 id and a
    float32 number per candidate. Gutmann and Hyvarinen, "Noise-contrastive estimation", AISTATS 2010; for language
    models Mnih and Teh, ICML 2012.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64; its dtype may differ from weight's, but for float64.
        weight: [V, D], one row a class, rows of stride 1; any distance between rows.
        target: class ids, int64 or int32, [...]; or [..., T] with T positives an example, padded with
            ``ignore_index``. An example whose targets are all ``ignore_index`` contributes nothing.
        noise: the distribution of the negatives, over the same V classes.
        num_negatives: k, 0 .. 2^20; >= 1 under ``correction="log_kq"``.
        bias: [V], of weight's dtype.
        shared: one set of k negatives for all examples instead of k for each.
        correction: what is subtracted from a logit besides ``log_z``: "log_kq" log(k q) (NCE: the logit tends to
            log p), "log_q" log q, "none" nothing (negative sampling).
        log_z: log of the partition function that the model leaves out: a number, a scalar tensor, or one value per
            example, [...]. A tensor that requires a gradient gets one.
        remove_hits: leave out negatives that equal one of the example's targets. NCE's theory keeps them.
        candidate_reduction: "sum" over the candidates of an example, or "mean": divided by their number, k plus the
            number of the example's targets.
        positive_label: with T targets, label "one" for each, or "uniform": 1 / T (T counts the example's valid ones).
        reduction: "mean" over the examples that are not ignored (weighted by ``sample_weight``), "sum", or "none":
            one loss per example, [...]. The mean of no examples is 0.
        ignore_index: the target value that means no target.
        sparse: False gives dense gradients, which every optimizer takes, at O(V D) memory and time a step. True gives
            coalesced COO gradients of weight and bias and a step that does not depend on V; for
            ``torch.optim.SGD``, ``Adagrad`` and ``SparseAdam``.
        backend: "fused" (compiled), "reference" (plain PyTorch), or "auto": fused where it is there.
        negatives: ids to use instead of drawing: [k] for all examples, or [..., k]. k is then their number.
        log_q: (target_log_q, negative_log_q), the log-probabilities to use instead of the noise's: of target's shape,
            and [k] or [..., k], finite. Needs ``negatives``, as those of drawn ids cannot be known in advance.
        sample_weight: [...], multiplies the loss of each example; "mean" divides by its sum.
        seed: int64 [2] on hidden's device; the same seed gives the same negatives. Drawn from ``generator`` if None.
        generator: for the seed; torch's default one if None.

    Returns:
        A float32 tensor (float64 for float64 weights): a scalar, or [...] for ``reduction="none"``.

    Raises:
        TypeError: a wrong type, dtype or layout.
        ValueError: a wrong device, shape, size, option or id; a target that the noise can never draw under a log q
            correction (its log q is -inf). On CUDA ids are not checked, see :func:`nce_ext.set_debug`.
        RuntimeError: ``backend="fused"`` without compiled kernels for the device; differentiating twice.
    """
    _checks.operands(hidden, weight, bias)
    noise = _checks.noise_of(noise, weight)
    lead = _check_examples(hidden, target, log_z, sample_weight)
    _check_options(correction, candidate_reduction, positive_label, reduction, ignore_index)
    n_targets = 1 if target.shape == lead else target.shape[-1]
    k = _check_negatives(negatives, log_q, hidden, target, n_targets, lead, num_negatives, correction)
    subtract_log_q = correction != "none"
    fused = _choose_backend(backend, hidden.device)
    if seed is not None:
        check_seed(seed, hidden.device)
    elif negatives is None:
        seed = draw_seed(hidden.device, generator)
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        if sparse:
            _ops.keep_coalesced(weight)
            _ops.keep_coalesced(bias)
        else:
            _warn_of_dense_gradient(weight)

    n_examples = math.prod(lead)
    flat_hidden = hidden.reshape(n_examples, hidden.shape[-1])
    flat_target = target.reshape(n_examples, n_targets).long().contiguous()
    ids = None if negatives is None else _as_rows(negatives.long(), k, n_examples)
    if ids is None and shared:
        assert seed is not None
        ids = _ops.sample(noise.kind, noise.n_classes, noise.table, seed, 1, k)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    target_log_q = negative_log_q = None
    if subtract_log_q and log_q is not None:
        target_log_q = log_q[0].detach().to(compute).reshape(flat_target.shape).contiguous()
        negative_log_q = _as_rows(log_q[1].detach().to(compute), k, n_examples)
    offset = math.log(k) if correction == "log_kq" else 0.0
    log_z_rows = None
    if isinstance(log_z, Tensor):
        log_z_rows = log_z.to(compute).expand(lead).reshape(n_examples)
    else:
        offset += log_z

    uniform_labels, mean_candidates = positive_label == "uniform", candidate_reduction == "mean"
    if fused:
        learns = torch.is_grad_enabled()
        needs_row_grad = learns and any(t is not None and t.requires_grad for t in (weight, bias, log_z_rows))
        arguments = (
            flat_hidden if flat_hidden.stride(-1) == 1 else flat_hidden.contiguous(),
            weight, bias, flat_target, log_z_rows, seed, noise.table, ids, target_log_q, negative_log_q,
            noise.kind, k, subtract_log_q, offset, remove_hits, uniform_labels, mean_candidates, ignore_index,
            learns and hidden.requires_grad, needs_row_grad, sparse,
        )  # fmt: skip
        losses = _fused_loss(arguments, target, negatives, noise, ignore_index, subtract_log_q, log_q)
    else:
        _checks.ids(target, negatives, noise, ignore_index, subtract_log_q, log_q)
        if ids is None:
            assert seed is not None
            ids = reference.draw(noise.kind, noise.n_classes, noise.table, seed, n_examples, k)
        if subtract_log_q and log_q is None:
            target_log_q = _log_q_or_zero(noise, flat_target)
            negative_log_q = _log_q_or_zero(noise, ids)
        losses = reference.sampled_loss(
            flat_hidden, weight, bias, flat_target, ids.expand(n_examples, k), log_z_rows,
            target_log_q, negative_log_q, offset=offset, remove_hits=remove_hits, uniform_labels=uniform_labels,
            mean_candidates=mean_candidates, ignore_index=ignore_index, sparse=sparse,
        )  # fmt: skip
    return _reduce(losses, flat_target, sample_weight, lead, reduction, ignore_index)


def negative_sampling_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, noise: Noise, num_negatives: int, **options
) -> Tensor:
    r"""The negative-sampling loss of word2vec: :func:`nce_loss` with ``correction="none"``.

    Equivalent to ``softplus(-s_0) + sum_j softplus(s_j)`` over the scores of the target and k negatives. Its optimum
    is s = log p(y | x) - log(k q(y)), so it learns good vectors but no probabilities. Mikolov et al., "Distributed
    representations of words and phrases and their compositionality", NeurIPS 2013.

    Args: as :func:`nce_loss`; every option of it is taken.
    """
    return nce_loss(hidden, weight, target, noise, num_negatives, **{"correction": "none", **options})


def _check_options(
    correction: str, candidate_reduction: str, positive_label: str, reduction: str, ignore_index: object
) -> None:
    _checks.one_of("correction", correction, CORRECTIONS)
    _checks.one_of("candidate_reduction", candidate_reduction, ("sum", "mean"))
    _checks.one_of("positive_label", positive_label, ("one", "uniform"))
    _checks.one_of("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")


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


def _choose_backend(backend: str, device: torch.device) -> bool:
    _checks.one_of("backend", backend, ("auto", "fused", "reference"))
    available = _library.fused_available(device)
    if backend == "fused" and not available:
        raise RuntimeError(f"backend='fused' is not available for {device.type}: {_library.why_missing(device)}")
    return available and backend != "reference"


def _fused_loss(arguments: tuple, *ids: Any) -> Tensor:
    """The kernel checks ids as it reads them; once it has refused one, they are searched for the words to say so."""
    if torch.compiler.is_compiling():
        return _ops.sampled_loss(*arguments)
    try:
        return _ops.sampled_loss(*arguments)
    except RuntimeError:
        _checks.ids(*ids)
        raise


def _warn_of_dense_gradient(weight: Tensor) -> None:
    global _warned_dense_gradient
    size = weight.numel() * weight.element_size()
    if size > _DENSE_GRADIENT_LIMIT and weight.requires_grad and not _warned_dense_gradient:
        _warned_dense_gradient = True
        warnings.warn(
            f"weight.grad will be dense: {size / 2**20:.0f} MiB for {weight.shape[0]} rows of {weight.shape[1]} are "
            "written on every step. sparse=True makes the step independent of the number of rows "
            "(with torch.optim.SGD, Adagrad or SparseAdam).",
            UserWarning,
            stacklevel=3,
        )


def _as_rows(values: Tensor, k: int, n_examples: int) -> Tensor:
    """[1, k] if all examples share them, else [B, k]."""
    return values.reshape((1, k) if values.dim() == 1 else (n_examples, k)).contiguous()


def _log_q_or_zero(noise: Noise, ids: Tensor) -> Tensor:
    """log q where the id is one; ignored and bad ids are masked later."""
    valid = (ids >= 0) & (ids < noise.n_classes)
    return noise.log_prob(torch.where(valid, ids, 0))


def _reduce(
    losses: Tensor, target: Tensor, sample_weight: Tensor | None, lead: torch.Size, reduction: str, ignore_index: int
) -> Tensor:
    scale = None if sample_weight is None else sample_weight.reshape(-1).to(losses.dtype)
    if scale is not None:
        losses = losses * scale
    if reduction == "none":
        return losses.reshape(lead)
    total = losses.sum()
    if reduction == "sum":
        return total
    valid = target != ignore_index
    valid = valid[:, 0] if target.shape[1] == 1 else valid.any(1)
    if scale is None:
        return total / valid.sum().clamp(min=1)
    denominator = torch.where(valid, scale, 0).sum()
    return total / torch.where(denominator == 0, 1, denominator)
