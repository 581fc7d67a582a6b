"""The losses as functions of explicit weights: validation, seeds, shapes and reductions around one operator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nce_ext import _call, _checks, _ops, reference
from nce_ext.noise import Noise

__all__ = ["hogwild_sgd_", "nce_loss", "negative_sampling_loss"]

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
    sparse: bool | str = False,
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
            ``torch.optim.SGD``, ``Adagrad`` and ``SparseAdam``. "padded" gives COO gradients of always
            min(B (k + T), V) rows, the spare ones zero, at class 0: on CUDA the host then never waits for the number of
            touched rows. True turns into it while a CUDA graph is captured.
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
    call = _call.prepare(
        hidden, weight, target, noise, num_negatives, bias=bias, shared=shared, correction=correction, log_z=log_z,
        remove_hits=remove_hits, candidate_reduction=candidate_reduction, positive_label=positive_label,
        ignore_index=ignore_index, backend=backend, negatives=negatives, log_q=log_q, seed=seed, generator=generator,
        sample_weight=sample_weight, reduction=reduction, sparse=sparse,
    )  # fmt: skip
    learns = torch.is_grad_enabled()
    if learns and not torch.compiler.is_compiling():
        if sparse:
            _ops.keep_coalesced(weight)
            _ops.keep_coalesced(bias)
        else:
            _warn_of_dense_gradient(weight)

    given = (target, negatives, noise, ignore_index, call.subtract_log_q, log_q)
    if call.fused:
        needs_row_grad = learns and any(t is not None and t.requires_grad for t in (weight, bias, call.log_z))
        arguments = (*call.operator_arguments(), learns and hidden.requires_grad, needs_row_grad, call.gradient_layout)
        losses = _fused(_ops.sampled_loss, arguments, given)
    else:
        losses = _reference_loss(call, given, sparse=bool(sparse))
    return _reduce(losses, call.target, sample_weight, call.lead, reduction, ignore_index)


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


@torch.no_grad()
def hogwild_sgd_(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    learning_rate: float,
    *,
    bias: Tensor | None = None,
    shared: bool = False,
    correction: str = "none",
    log_z: float | Tensor = 0.0,
    remove_hits: bool = False,
    candidate_reduction: str = "sum",
    positive_label: str = "one",
    ignore_index: int = -100,
    backend: str = "auto",
    negatives: Tensor | None = None,
    log_q: tuple[Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of SGD on weight and bias inside the forward pass: in place, and on CUDA racy by design.

    Equivalent to, where no class occurs twice in the batch::

        losses = nce_loss(hidden, weight, target, noise, num_negatives, correction="none", reduction="none")
        losses.sum().backward()
        weight -= learning_rate * weight.grad; bias -= learning_rate * bias.grad
        return losses, hidden.grad

    On CUDA a single kernel samples, reads the rows, and adds to them by atomics: no gradient of the rows ever exists,
    nothing is sorted, and nothing is saved. An example may read a row that others have changed already, and additions
    come in no order, so the result differs slightly from run to run (Recht et al., "Hogwild!: a lock-free approach to
    parallelizing stochastic gradient descent", NeurIPS 2011; it is how word2vec trains). Elsewhere the step is
    the exact one above: every example reads the weights as they were. autograd is not involved; train what made
    ``hidden`` by ``hidden.backward(gradient)``.

    Args: as :func:`nce_loss`, but for
        weight: on CUDA float32; every row is written by many, so it must not be expanded (its stride of rows >= D).
        learning_rate: a finite number; the step is that of the sum over examples, not of the mean.
        correction: "none" (negative sampling, as in word2vec) unless asked otherwise.

    Returns:
        The loss of each example [...], and the gradient of their sum in hidden, [..., D] in float32 (float64).

    Raises:
        As :func:`nce_loss`. TypeError: a weight that is not float32, on CUDA. On CUDA an example with a bad id changes
        nothing and has loss NaN.
    """
    if (
        isinstance(learning_rate, bool)
        or not isinstance(learning_rate, (int, float))
        or not math.isfinite(learning_rate)
    ):
        raise ValueError(f"learning_rate must be a finite number, got {learning_rate!r}")
    options: dict[str, Any] = dict(
        bias=bias, shared=shared, correction=correction, log_z=log_z, remove_hits=remove_hits,
        candidate_reduction=candidate_reduction, positive_label=positive_label, ignore_index=ignore_index,
        backend=backend, negatives=negatives, log_q=log_q, seed=seed, generator=generator,
    )  # fmt: skip
    call = _call.prepare(hidden, weight, target, noise, num_negatives, **options)
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise ValueError(f"weight must have rows that do not overlap to be changed in place, got {weight.stride()}")
    if call.fused and hidden.device.type == "cuda":
        if weight.dtype != torch.float32:
            raise TypeError(f"weight must be float32 to be changed in place on CUDA, got {weight.dtype}")
        given = (target, negatives, noise, ignore_index, call.subtract_log_q, log_q)
        losses, gradient = _fused(_ops.scatter_sgd_, (*call.operator_arguments(), True, float(learning_rate)), given)
        return losses.reshape(call.lead), gradient.reshape(hidden.shape)
    with torch.enable_grad():
        compute = torch.promote_types(weight.dtype, torch.float32)
        leaves = [t.detach().requires_grad_() for t in (hidden.to(compute), weight, bias) if t is not None]
        options["bias"] = leaves[2] if bias is not None else None
        losses = nce_loss(leaves[0], leaves[1], target, noise, num_negatives, reduction="none", sparse=True, **options)
        gradient, *steps = torch.autograd.grad(losses.sum(), leaves)
    for parameter, step in zip((weight, bias), steps, strict=False):
        assert parameter is not None
        parameter.add_(step, alpha=-learning_rate)
    return losses.detach(), gradient


def _fused(operator: Callable[..., Any], arguments: tuple, given: tuple) -> Any:
    """The CPU kernels check ids as they read them; once one is refused, it is searched for the words to say so.

    On CUDA ids are checked beforehand, and only under set_debug(True).
    """
    hidden = arguments[0]
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if hidden.device.type != "cpu":
        _checks.ids(*given)
    try:
        return operator(*arguments)
    except RuntimeError:
        _checks.ids(*given)
        raise


def _reference_loss(call: _call.Call, given: tuple, *, sparse: bool) -> Tensor:
    _checks.ids(*given)
    noise, ids, n_examples = call.noise, call.ids, call.hidden.shape[0]
    if ids is None:
        assert call.seed is not None
        ids = reference.draw(noise.kind, noise.n_classes, noise.table, call.seed, n_examples, call.k)
    target_log_q, negative_log_q = call.target_log_q, call.negative_log_q
    if call.subtract_log_q and target_log_q is None:
        target_log_q, negative_log_q = _log_q_or_zero(noise, call.target), _log_q_or_zero(noise, ids)
    return reference.sampled_loss(
        call.hidden, call.weight, call.bias, call.target, ids.expand(n_examples, call.k), call.log_z, target_log_q,
        negative_log_q, offset=call.offset, remove_hits=call.remove_hits, uniform_labels=call.uniform_labels,
        mean_candidates=call.mean_candidates, ignore_index=call.ignore_index, sparse=sparse,
    )  # fmt: skip


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
