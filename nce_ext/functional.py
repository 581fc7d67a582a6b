"""The losses as functions of explicit weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nce_ext import _checks
from nce_ext._ops.row_grad import GradientPairs
from nce_ext._ops.sampled_loss import sampled_loss
from nce_ext._ops.scatter_step import scatter_step_
from nce_ext._sampled.arguments import (
    check_margin,
    negative_sampling_objective,
    softmax_objective,
    validate_and_flatten,
)
from nce_ext._sampled.loss import inputs_of, reduced_loss, run_with_id_errors
from nce_ext.noise import Noise
from nce_ext.reference.dtypes import compute_dtype

__all__ = ["hogwild_sgd_", "nce_loss", "negative_sampling_loss", "sampled_softmax_loss"]


def nce_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    *,
    bias: Tensor | None = None,
    shared: bool = False,
    unique: bool | str = False,
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
        weight: [V, D], one row a class, rows of stride 1; any distance between rows. With hidden on CUDA, weight and
            bias may both be in pinned host memory (docs/host_memory.md): then ``sparse`` is True or "padded".
        target: class ids, int64 or int32, [...]; or [..., T] with T positives an example, padded with
            ``ignore_index``. An example whose targets are all ``ignore_index`` contributes nothing.
        noise: the distribution of the negatives, over the same V classes.
        num_negatives: k, 0 .. 2^20; >= 1 under ``correction="log_kq"``.
        bias: [V], of weight's dtype.
        shared: one set of k negatives for all examples instead of k for each. The rows of the k negatives are then
            gathered once, and the scores are matrix products: cheaper for large batches, and k can be much larger. On
            the CPU equal draws are merged into one column that counts as often as it was drawn.
        unique: draw without replacement; all examples share the negatives. True: the distinct ones of k draws, each
            corrected by the log of the probability that k draws include its class, log(1 - (1 - q)^k), in the place
            of log(k q). "tf": TensorFlow's way, k distinct ids found by rejection, with its approximate expected
            counts; drawing them waits for the device on CUDA.
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
            the optimizers of ``nce_ext.optim``. "padded" gives COO gradients of always
            min(B (k + T), V) rows, the spare ones zero, at class 0: on CUDA the host then never waits for the number of
            touched rows. With shared negatives it has min(B T, V) + k rows, of classes that may repeat. True turns into
            it while a CUDA graph is captured.
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
    return reduced_loss(
        hidden, weight, target, noise, num_negatives, bias=bias, shared=shared, unique=unique, correction=correction,
        log_z=log_z, remove_hits=remove_hits, candidate_reduction=candidate_reduction, positive_label=positive_label,
        ignore_index=ignore_index, backend=backend, negatives=negatives, log_q=log_q, seed=seed, generator=generator,
        sample_weight=sample_weight, reduction=reduction, sparse=sparse,
    )  # fmt: skip


def negative_sampling_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    *,
    adversarial_temperature: float | None = None,
    margin: float = 0.0,
    calibration: float | None = None,
    bias: Tensor | None = None,
    shared: bool = False,
    unique: bool | str = False,
    correction: str = "none",
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
    r"""The negative-sampling loss of word2vec, self-adversarial negative sampling (NSSA), and gBCE.

    Equivalent to, with the scores ``s`` [..., 1 + k] of the target (column 0) and the negatives::

        z = s + margin
        weights = softmax(adversarial_temperature * z[..., 1:], -1).detach()    # or 1 without a temperature
        loss = beta * softplus(-z[..., 0]) + (weights * softplus(z[..., 1:])).sum(-1)

    Without options it is word2vec's (Mikolov et al., "Distributed representations of words and phrases and their
    compositionality", NeurIPS 2013), whose optimum is s = log p(y | x) - log(k q(y)): it learns good vectors but no
    probabilities.

    Args: as :func:`nce_loss`, with ``correction="none"`` by default, and
        adversarial_temperature: > 0: negatives are weighted by their own scores, so that hard ones count (Sun et al.,
            "RotatE", ICLR 2019, without its factor 1/2). The weights get no gradient.
        margin: added to every score; RotatE's gamma, whose scores are negative distances. Where k is large,
            -log(k) keeps k negatives at score 0 from pulling k times as hard as the target.
        calibration: t of gBCE, in 0 .. 1 (Petrov and Macdonald, "gSASRec", RecSys 2023): the target's term is
            multiplied by beta = 1 + t (k / (V - 1) - 1), which is what raising its probability
            sigmoid(s) to the power beta does. At t = 1, with uniform noise, sigmoid(s) learns p(y | x) unbiased. Needs
            V >= 2; "mean" as ``candidate_reduction`` gives the published scale.

    Raises:
        As :func:`nce_loss`. ValueError: a temperature that is not positive, a margin that is not finite, a calibration
            outside 0 .. 1; ``candidate_reduction="mean"`` with a temperature, whose weights are an average already.
    """
    return reduced_loss(
        hidden, weight, target, noise, num_negatives,
        objective=negative_sampling_objective(adversarial_temperature, calibration), calibration=calibration,
        margin=check_margin(margin), bias=bias, shared=shared, unique=unique, correction=correction, log_z=log_z,
        remove_hits=remove_hits, candidate_reduction=candidate_reduction, positive_label=positive_label,
        ignore_index=ignore_index, backend=backend, negatives=negatives, log_q=log_q, seed=seed, generator=generator,
        sample_weight=sample_weight, reduction=reduction, sparse=sparse,
    )  # fmt: skip


def sampled_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    noise: Noise,
    num_negatives: int,
    *,
    label_smoothing: float = 0.0,
    correct_positive: bool = True,
    bias: Tensor | None = None,
    shared: bool = False,
    unique: bool | str = False,
    correction: str = "log_kq",
    remove_hits: bool = True,
    positive_label: str = "uniform",
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
    r"""Softmax over the target and k sampled negatives: ranking NCE.

    Equivalent to, with the scores ``s`` [..., 1 + k] of the target (column 0) and the negatives::

        z = s - math.log(k) - noise.log_prob(ids)                         # log expected counts
        z[..., 1:] = z[..., 1:].masked_fill(ids[..., 1:] == target[..., None], -inf)
        loss = F.cross_entropy(z.flatten(0, -2), torch.zeros_like(target).flatten(), label_smoothing=label_smoothing)

    in one pass over the rows. Unlike NCE it never asks that scores be normalised. As k grows its gradient tends to
    that of the full softmax with ``unique``, with ``remove_hits=False`` or with ``correct_positive=False``. The
    default, hits removed from draws with replacement, is the most used form and the right one while k q(target) stays
    well below 1; beyond that the target is missing from its own normaliser. Bengio and Senecal, "Adaptive importance
    sampling to accelerate training of a neural probabilistic language model", 2008; Jean et al., ACL 2015; consistency:
    Ma and Collins, EMNLP 2018.

    Args: as :func:`nce_loss`, but for
        label_smoothing: eps in 0 .. 1: labels are (1 - eps) y + eps sum(y) / n over the n columns that are not masked.
        correct_positive: False leaves the target's score uncorrected, and corrects the negatives by the log of
            n q(j) / (1 - q(target)), n the number of those that are not masked: the positive is given, not sampled, and
            the negatives are drawn from what is left ("Correcting the LogQ correction", RecSys 2025). One target an
            example; needs ``remove_hits``.
        remove_hits: leave out negatives that equal one of the example's targets.
        positive_label: with T targets, labels "uniform": 1 / T (T counts the example's valid ones), or "one" for each:
            the sum over targets of the loss of each.

    Raises:
        As :func:`nce_loss`. ValueError: a smoothing outside 0 .. 1; ``correct_positive=False`` with several targets,
            ``unique``, ``remove_hits=False`` or ``correction="none"``.
    """
    return reduced_loss(
        hidden, weight, target, noise, num_negatives,
        objective=softmax_objective(label_smoothing, correct_positive), bias=bias, shared=shared, unique=unique,
        correction=correction, log_z=0.0, remove_hits=remove_hits, candidate_reduction="sum",
        positive_label=positive_label, ignore_index=ignore_index, backend=backend, negatives=negatives, log_q=log_q,
        seed=seed, generator=generator, sample_weight=sample_weight, reduction=reduction, sparse=sparse,
    )  # fmt: skip


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

    On CUDA one kernel samples and reads the rows, and another adds to them by atomics: no gradient of the rows ever
    exists, and nothing is sorted; 8 bytes a pair (id and derivative) lie between the two. Every example reads the
    weights as they were, but additions come in no order, so the rows differ slightly from run to run (Recht et al.,
    "Hogwild!: a lock-free approach to parallelizing stochastic gradient descent", NeurIPS 2011; it is how word2vec
    trains). Elsewhere the step is the exact one above. autograd is not involved; train what made ``hidden`` by
    ``hidden.backward(gradient)``.

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
    learning_rate = _checks.number("learning_rate", learning_rate, wanted="a finite number")
    options: dict[str, Any] = dict(
        bias=bias, shared=shared, correction=correction, log_z=log_z, remove_hits=remove_hits,
        candidate_reduction=candidate_reduction, positive_label=positive_label, ignore_index=ignore_index,
        backend=backend, negatives=negatives, log_q=log_q, seed=seed, generator=generator,
    )  # fmt: skip
    call = validate_and_flatten(hidden, weight, target, noise, num_negatives, **options)
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise ValueError(f"weight must have rows that do not overlap to be changed in place, got {weight.stride()}")
    if call.layout.fused and hidden.device.type == "cuda":
        if weight.dtype != torch.float32:
            raise TypeError(f"weight must be float32 to be changed in place on CUDA, got {weight.dtype}")
        inputs = inputs_of(call, grad_enabled=False)._replace(needs_hidden_grad=True, needs_row_grad=True)
        id_check_args = (target, negatives, noise, ignore_index, call.correction.subtract_log_q, log_q)
        made = run_with_id_errors(lambda: sampled_loss(inputs), id_check_args, hidden.device)
        ones = made.loss.new_ones(1).expand_as(made.loss)  # what a backward pass from their sum would begin with
        pairs = GradientPairs(made.ids, made.dlogit, ones, inputs.hidden)
        scatter_step_(pairs, weight.detach(), None if bias is None else bias.detach(), float(learning_rate))
        return made.loss.reshape(call.layout.batch_shape), made.grad_hidden.reshape(hidden.shape)
    with torch.enable_grad():
        compute = compute_dtype(weight.dtype)
        leaves = [t.detach().requires_grad_() for t in (hidden.to(compute), weight, bias) if t is not None]
        options["bias"] = leaves[2] if bias is not None else None
        losses = nce_loss(leaves[0], leaves[1], target, noise, num_negatives, reduction="none", sparse=True, **options)
        gradient, *steps = torch.autograd.grad(losses.sum(), leaves)
    for parameter, step in zip((weight, bias), steps, strict=False):
        assert parameter is not None
        parameter.add_(step, alpha=-learning_rate)
    return losses.detach(), gradient
