"""Measurement of a sampled loss against the exact softmax: bias and variance of its value and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nce_ext import _checks
from nce_ext.losses import SampledSoftmaxLoss
from nce_ext.noise import Noise
from nce_ext.reference.dtypes import compute_dtype


class GradientError(NamedTuple):
    """Error of the sampled gradient g of the mean loss against the exact one G, over all elements of a tensor.

    cosine: <mean g, G> / (|mean g| |G|): 1 where the direction is right, whatever the scale of the loss.
    relative_error: |mean g - G| / |G|. What is left of it as ``draws`` grows is bias.
    standard_error: spread / sqrt(draws), the relative_error that an unbiased g would show.
    spread: sqrt(E |g - mean g|^2) / |G|, the noise of one step.

    NaN where G is 0; the cosine also where the mean of g is.
    """

    cosine: float
    relative_error: float
    standard_error: float
    spread: float


class Diagnosis(NamedTuple):
    """Result of :func:`nce_ext.evaluate.diagnose`; ``print`` shows it as a table.

    n_examples: examples that have a target. All means over examples are over these.
    n_classes: V.
    num_negatives: k.
    draws: sets of negatives drawn.
    exact_loss: mean of sum_t y_t (log Z - s_t), the cross-entropy over all V classes; y as ``positive_label`` says, not
        smoothed.
    sampled_loss: mean over draws of the mean loss of an example.
    loss_offset: what sampled softmax subtracts from the target's score, mean of sum_t y_t log(expected count of t):
        log(k q_t), or the log inclusion probability with ``unique``; 0 where the target is not corrected. It is in the
        value of the loss and not in its gradient. NaN for the binary losses.
    loss_bias: sampled_loss - loss_offset - exact_loss. NaN for NCE and negative sampling, which are binary problems
        whose values are not cross-entropies: compare their gradients.
    loss_std: standard deviation over draws of the mean loss.
    loss_standard_error: loss_std / sqrt(draws), that of sampled_loss and of loss_bias.
    hidden_gradient: of d loss / d hidden against that of exact_loss, the maximum-likelihood gradient.
    weight_gradient: of d loss / d weight.
    effective_sample_size: mean over examples and draws of (sum_j w_j)^2 / sum_j w_j^2, w_j = exp(s_j - log q_j) over
        all k negatives, hits included (the distinct ones and their log inclusion probability with ``unique``). Z is
        known as well as by this many draws from the model's own law; k where q is that law.
    hit_rate: the share of negatives that equal a target of their example.
    expected_hit_rate: the same by the noise's law, mean of sum_t q_t over different targets; with ``unique`` the ratio
        of expected numbers.
    log_z_mean: mean of log Z = logsumexp of all V scores; near ``log_z`` for a model that NCE has normalised.
    log_z_std: standard deviation of log Z over the examples.
    """

    n_examples: int
    n_classes: int
    num_negatives: int
    draws: int
    exact_loss: float
    sampled_loss: float
    loss_offset: float
    loss_bias: float
    loss_std: float
    loss_standard_error: float
    hidden_gradient: GradientError
    weight_gradient: GradientError
    effective_sample_size: float
    hit_rate: float
    expected_hit_rate: float
    log_z_mean: float
    log_z_std: float

    def __str__(self) -> str:
        def row(name: str, *cells: float | str) -> str:
            return f"{name:<20}" + "".join(f"{c:>15}" if isinstance(c, str) else f"{c:>15.4g}" for c in cells)

        binary = math.isnan(self.loss_offset)
        return "\n".join(
            [
                f"{self.draws} draws of {self.num_negatives} negatives, {self.n_examples} examples, "
                f"{self.n_classes} classes",
                row("", "exact", "sampled", "bias", "std error", "std of a draw"),
                row(
                    "loss", self.exact_loss, self.sampled_loss, "not comparable" if binary else self.loss_bias,
                    self.loss_standard_error, self.loss_std,
                ),
                *([] if binary else [row("  its offset", "", self.loss_offset)]),
                row("", "cosine", "relative error", "std error", "std of a draw"),
                row("gradient in hidden", *self.hidden_gradient),
                row("gradient in weight", *self.weight_gradient),
                row("", "measured", "of"),
                row("effective sample", self.effective_sample_size, float(self.num_negatives)),
                row("", "measured", "expected"),
                row("accidental hits", self.hit_rate, self.expected_hit_rate),
                row("", "mean", "std"),
                row("log Z", self.log_z_mean, self.log_z_std),
            ]
        )  # fmt: skip


def diagnose(
    loss_fn: nn.Module, hidden: Tensor, target: Tensor, *, draws: int = 32, seed: int = 0, max_logits: int = 2**24
) -> Diagnosis:
    """Compare a sampled loss with the exact softmax over all classes: bias, variance, effective sample size, log Z.

    Equivalent to the mean and the variance over i of ``loss_fn(hidden, target, seed=torch.tensor([seed, i]))`` and its
    gradients, beside those of ``F.cross_entropy(F.linear(hidden, weight, bias), target)``, with at most ``max_logits``
    logits (or one for each example) in memory. It changes nothing: no parameter, no ``.grad``, no random state. It
    costs O(N V D) for N examples, and two tensors of weight's size.

    Args:
        loss_fn: a ``SampledSoftmaxLoss``, ``NCELoss`` or ``NegativeSamplingLoss``, or another module that is called
            like them and has a parameter ``weight`` [V, D], ``bias`` [V] or None, ``noise`` and ``num_negatives``: that
            is judged by its gradients, as the binary losses are.
        hidden: [..., D].
        target: class ids, [...] or [..., T], at least one of them not ignored.
        draws: sets of negatives, >= 2. The bias is known to about ``standard_error``, which falls like 1 / sqrt(draws).
        seed: the same seed gives the same diagnosis.
        max_logits: size of a chunk, in logits.

    Returns:
        A :class:`Diagnosis`, whose docstring has the formula of every field.

    Raises:
        TypeError: a loss_fn without these parts; a wrong type or dtype.
        ValueError: a number out of range; no target; and what loss_fn itself refuses.
    """
    weight, bias, noise = _parts(loss_fn)
    k = _checks.count("num_negatives", loss_fn.num_negatives, 1)
    _checks.operands(hidden, weight, bias)
    _checks.tensor("target", target, _checks.INTEGERS, hidden.device)
    draws = _checks.count("draws", draws, 2)
    seed = _checks.count("seed", seed, -(2**63), 2**63 - 1)
    max_logits = _checks.count("max_logits", max_logits, 1)
    batch_shape, ignore = hidden.shape[:-1], getattr(loss_fn, "ignore_index", -100)
    if target.shape != batch_shape and (target.dim() != hidden.dim() or target.shape[:-1] != batch_shape):
        raise ValueError(
            f"target must have shape {list(batch_shape)} or {[*batch_shape, 'T']}, got {list(target.shape)}"
        )
    n, n_targets = math.prod(batch_shape), 1 if target.shape == batch_shape else target.shape[-1]
    classes = target.reshape(n, n_targets)
    valid = classes != ignore
    if not valid.any():
        raise ValueError("target must have at least one class that is not ignored, got none")
    if (valid & ((classes < 0) | (classes >= len(weight)))).any():
        raise ValueError(f"target must be in 0 .. {len(weight) - 1} or ignore_index = {ignore}")

    compute = compute_dtype(weight.dtype)
    seeds = [torch.tensor([seed, i], device=hidden.device) for i in range(draws)]
    used = valid.any(1)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        losses, of_hidden, of_weight = _sampled(loss_fn, hidden.detach().to(compute), target, seeds, int(used.sum()))
        examples = _Examples(
            hidden.reshape(n, -1)[used].to(compute),
            torch.where(valid, classes.long(), -1)[used],
            getattr(loss_fn, "positive_label", "one") == "uniform",
        )
        of_hidden.total = of_hidden.total.reshape(n, -1)[used]  # the others are 0
        exact_loss, log_z, hidden_error, weight_error = _exact(examples, weight, bias, of_hidden, of_weight, max_logits)
        sets = [_negatives(loss_fn, noise, k, used, s) for s in seeds]
        effective = sum(_effective_size(examples.hidden, weight, bias, s, max_logits) for s in sets) / draws
        hits, expected = _accidental_hits(examples.classes, sets)
        offset = _offset(loss_fn, examples, sets) if isinstance(loss_fn, SampledSoftmaxLoss) else math.nan
    sampled_loss, std = float(losses.mean()), float(losses.std())
    return Diagnosis(
        len(examples.hidden), len(weight), k, draws, exact_loss, sampled_loss, offset,
        sampled_loss - offset - exact_loss, std, std / math.sqrt(draws), hidden_error, weight_error, effective, hits,
        expected, float(log_z.double().mean()), float(log_z.double().std(correction=0)),
    )  # fmt: skip


def _parts(loss_fn: object) -> tuple[Tensor, Tensor | None, Noise]:
    """Return weight, bias and noise of a sampled loss, and refuse a module that has no such parts."""
    loss_fn = _checks.instance("loss_fn", loss_fn, nn.Module, "a sampled loss module")
    parameters = dict(loss_fn.named_parameters(recurse=False, remove_duplicate=False))
    missing = [] if "weight" in parameters else ["weight"]
    missing += [name for name in ("bias", "noise", "num_negatives") if not hasattr(loss_fn, name)]
    if missing:
        raise TypeError(
            "loss_fn must be a module with a parameter weight and with bias, noise and num_negatives, "
            f"got {type(loss_fn).__name__} without {', '.join(missing)}"
        )
    weight, bias = parameters["weight"], loss_fn.bias
    return weight, bias, _checks.noise_of(loss_fn.noise, Noise, weight)  # type: ignore[return-value]


class _Moments:
    """Moments of gradients that may be sparse: their sum, and the sum of squares of all their elements."""

    def __init__(self, like: Tensor) -> None:
        self.total, self.squares, self.draws = torch.zeros_like(like, requires_grad=False), 0.0, 0

    def add(self, gradient: Tensor) -> None:
        self.total += gradient
        self.squares += _square(gradient.coalesce().values() if gradient.is_sparse else gradient)
        self.draws += 1

    def against(self, exact: Iterable[tuple[slice, Tensor]]) -> GradientError:
        """Compare the mean gradient with the exact one, which is given in parts: slices of rows and their values."""
        product = of_exact = difference = 0.0
        for rows, part in exact:
            mean = self.total[rows] / self.draws
            product += float((mean * part).sum(dtype=torch.float64))
            of_exact += _square(part)
            difference += _square(mean - part)
        of_mean = _square(self.total) / self.draws**2
        variance = max(0.0, self.squares - self.draws * of_mean) / (self.draws - 1)
        norm = math.sqrt(of_exact) or math.nan
        return GradientError(
            product / norm / (math.sqrt(of_mean) or math.nan), math.sqrt(difference) / norm,
            math.sqrt(variance / self.draws) / norm, math.sqrt(variance) / norm,
        )  # fmt: skip


def _square(values: Tensor) -> float:
    """Add up the squares of all elements in float64, without a float64 copy of the whole tensor."""
    return sum((float(part.double().square().sum()) for part in torch.split(values.flatten(), 2**20)), 0.0)


def _sampled(
    loss_fn: nn.Module, hidden: Tensor, target: Tensor, seeds: list[Tensor], n_used: int
) -> tuple[Tensor, _Moments, _Moments]:
    """Compute the mean loss of each draw, float64 [draws], and the moments of its gradients in hidden and in weight.

    The module runs on detached parameters, so that its own see neither a gradient nor a hook.
    """
    parameters = {name: p.detach().to(hidden.dtype) for name, p in loss_fn.named_parameters()}
    weight, hidden = parameters["weight"].requires_grad_(), hidden.requires_grad_()
    share = 1.0 if getattr(loss_fn, "reduction", "mean") == "mean" else 1.0 / n_used
    losses, of_hidden, of_weight = [], _Moments(hidden), _Moments(weight)
    with torch.enable_grad():
        for seed in seeds:
            loss = share * torch.func.functional_call(loss_fn, parameters, (hidden, target), {"seed": seed}).sum()
            losses.append(loss.detach().double())
            by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
            of_hidden.add(by_hidden)
            of_weight.add(by_weight)
    return torch.stack(losses), of_hidden, of_weight


class _Examples:
    """Examples that have a target: hidden [N, D], target classes [N, T] (-1: none), and the labels [N, T] of these."""

    def __init__(self, hidden: Tensor, classes: Tensor, uniform: bool) -> None:
        self.hidden, self.classes = hidden, classes
        self.labels = (classes >= 0).to(hidden.dtype)
        if uniform:
            self.labels /= self.labels.sum(1, keepdim=True)


def _exact(
    examples: _Examples, weight: Tensor, bias: Tensor | None, of_hidden: _Moments, of_weight: _Moments, max_logits: int
) -> tuple[float, Tensor, GradientError, GradientError]:
    """Compute loss and log Z [N] of the full softmax, and the errors of the sampled gradients, in chunks of classes."""
    hidden, classes, labels = examples.hidden, examples.classes, examples.labels
    size = max(1, max_logits // len(hidden))

    def logits() -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows of weight, their values and their logits [N, rows], from the first rows to the last."""
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            table = weight[rows].to(hidden.dtype)
            yield rows, table, F.linear(hidden, table, None if bias is None else bias[rows].to(hidden.dtype))

    log_z = hidden.new_full((len(hidden),), -math.inf)
    of_target = torch.zeros_like(labels)
    for rows, _, scores in logits():
        log_z = torch.logaddexp(log_z, scores.logsumexp(1))
        local = classes - rows.start
        inside = (local >= 0) & (local < scores.shape[1]) & (classes >= 0)
        of_target += torch.where(inside, scores.gather(1, torch.where(inside, local, 0)), 0)

    by_hidden = torch.zeros_like(hidden)

    def by_weight() -> Iterator[tuple[slice, Tensor]]:
        """Yield the exact gradient of rows of weight, and add what these rows give to the gradient of hidden."""
        for rows, table, scores in logits():
            slopes = scores.sub_(log_z[:, None]).exp_().mul_(labels.sum(1, keepdim=True))
            local = classes - rows.start
            inside = (local >= 0) & (local < slopes.shape[1]) & (classes >= 0)
            slopes.scatter_add_(1, torch.where(inside, local, 0), torch.where(inside, -labels, 0))
            slopes /= len(hidden)
            by_hidden.addmm_(slopes, table)
            yield rows, slopes.T @ hidden

    weight_error = of_weight.against(by_weight())  # running through by_weight() also fills by_hidden
    hidden_error = of_hidden.against([(slice(None), by_hidden)])
    loss = (labels * (log_z[:, None] - of_target)).sum(1).mean(dtype=torch.float64)
    return float(loss), log_z, hidden_error, weight_error


class _Negatives(NamedTuple):
    """Negatives that a loss draws with one seed."""

    ids: Tensor  # [1, k] if all examples share them, else [N, k]
    log_q: Tensor  # of ids
    log_count: Callable[[Tensor], Tensor]  # log of a class's expected number among an example's ids
    expected_number: float  # of an example's ids


def _negatives(loss_fn: nn.Module, noise: Noise, k: int, used: Tensor, seed: Tensor) -> _Negatives:
    """Draw the negatives that loss_fn draws itself when it is called with this seed."""
    unique, shared = getattr(loss_fn, "unique", False), getattr(loss_fn, "shared", False)
    if unique == "tf":
        ids, trials = noise.sample_distinct(k, seed=seed)
        log_count = partial(noise.log_expected_count_tf, k=k, trials=trials)
        return _Negatives(ids[None], log_count(ids[None]), log_count, k)
    if unique:
        ids = torch.unique(noise.sample((1, k), seed=seed))[None]
        log_count = partial(noise.log_inclusion, trials=k)
        number = log_count(torch.arange(noise.n_classes, device=ids.device)).exp().sum(dtype=torch.float64)
        return _Negatives(ids, log_count(ids), log_count, float(number))
    ids = noise.sample((1 if shared else len(used), k), seed=seed)
    ids = ids if shared else ids[used]
    return _Negatives(ids, noise.log_prob(ids), lambda classes: noise.log_prob(classes) + math.log(k), k)


def _effective_size(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, negatives: _Negatives, max_logits: int
) -> float:
    """Compute the mean over examples of (sum_j w_j)^2 / sum_j w_j^2, w_j = exp(s_j - log q_j)."""
    shared, gathered = negatives.ids.shape[0] == 1, 1 if negatives.ids.shape[0] == 1 else hidden.shape[1]
    size, total = max(1, max_logits // (negatives.ids.shape[1] * gathered)), 0.0
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        x, ids, log_q = hidden[chunk], negatives.ids, negatives.log_q
        if shared:
            scores = F.linear(x, weight[ids[0]].to(x.dtype))
        else:
            ids, log_q = ids[chunk], log_q[chunk]
            scores = torch.einsum("nd,nkd->nk", x, weight[ids].to(x.dtype))
        log_w = scores - log_q if bias is None else scores + bias[ids].to(x.dtype) - log_q
        total += float((2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp().sum(dtype=torch.float64))
    return total / len(hidden)


def _accidental_hits(classes: Tensor, sets: list[_Negatives]) -> tuple[float, float]:
    """Compute the share of negatives that equal a target of their example, and the share to expect."""
    earlier = torch.ones(classes.shape[1:] * 2, dtype=torch.bool, device=classes.device).tril(-1)
    different = (classes >= 0) & ~((classes[:, :, None] == classes[:, None, :]) & earlier).any(2)
    hits = numbers = expected = expected_numbers = 0.0
    for ids, _, log_count, number in sets:
        hits += int((ids[:, :, None] == classes[:, None, :]).any(2).sum())
        numbers += len(classes) * ids.shape[1]
        counts = log_count(classes.clamp_min(0)).exp()
        expected += float(torch.where(different, counts, 0).sum(dtype=torch.float64))
        expected_numbers += len(classes) * number
    return hits / numbers, expected / expected_numbers


def _offset(loss_fn: SampledSoftmaxLoss, examples: _Examples, sets: list[_Negatives]) -> float:
    """Compute ``loss_offset`` of :class:`Diagnosis`: the mean of what is subtracted from the targets' scores."""
    if loss_fn.correction == "none" or not loss_fn.correct_positive:
        return 0.0
    classes, labels = examples.classes, examples.labels.double()
    logs = [(labels * torch.where(labels > 0, s.log_count(classes.clamp_min(0)), 0)).sum(1).mean() for s in sets]
    return float(torch.stack(logs).mean())
