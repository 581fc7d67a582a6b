"""The losses as modules: they hold the output layer and the options of ``nce_ext.functional``."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nce_ext import _checks
from nce_ext._checks import describe
from nce_ext._sampled.arguments import (
    calibrated_weight,
    check_margin,
    check_objective,
    check_options,
    check_unique,
    gradient_layout,
    negative_sampling_objective,
    softmax_objective,
)
from nce_ext._sampled.loss import reduced_loss
from nce_ext._sampled.resize import initial_bias, initialise_weight, resize_classes
from nce_ext._tables.pages import empty_table
from nce_ext._tables.pinned import PinnedTables
from nce_ext.noise import Noise
from nce_ext.optim.fused_step import FusedStep, fuse
from nce_ext.reference import BINARY_OBJECTIVE, Objective

__all__ = ["NCELoss", "NegativeSamplingLoss", "SampledSoftmaxLoss"]


class _SampledLoss(PinnedTables):
    """An output layer and a loss over its classes; subclasses choose the function and its defaults."""

    _shown: ClassVar[tuple[str, ...]] = ("shared", "unique")  # in the repr, where they are set

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        noise: Noise,
        num_negatives: int,
        *,
        bias: bool = True,
        shared: bool = False,
        unique: bool | str = False,
        correction: str = "log_kq",
        log_z: float | str = 0.0,
        remove_hits: bool = False,
        candidate_reduction: str = "sum",
        positive_label: str = "one",
        reduction: str = "mean",
        ignore_index: int = -100,
        sparse: bool | str = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features = _checks.count("in_features", in_features, 1)
        self.n_classes = n_classes = _checks.count("n_classes", n_classes, 1, 2**31 - 1)
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be an nce_ext.noise distribution, got {describe(noise)}")
        if noise.n_classes != n_classes:
            raise ValueError(f"noise must have n_classes = {n_classes} classes, got {noise.n_classes}")
        self.num_negatives = _checks.count("num_negatives", num_negatives, 0, 2**20)
        ignore_index = check_options(correction, candidate_reduction, positive_label, reduction, ignore_index)
        shared, unique, sparse, remove_hits, log_z = map(_checks.plain, (shared, unique, sparse, remove_hits, log_z))
        objective = self._objective()
        check_unique(unique, correction, objective)
        check_objective(objective, remove_hits, candidate_reduction, log_z, correction)
        _checks.one_of("backend", backend, ("auto", "fused", "reference"))
        gradient_layout(sparse)
        if correction == "log_kq" and num_negatives == 0:
            raise ValueError("num_negatives must be >= 1 with correction='log_kq' (log k is infinite), got 0")
        self.correction, self.remove_hits, self.positive_label = correction, remove_hits, positive_label
        self.shared, self.unique, self.candidate_reduction = shared, unique, candidate_reduction
        self.reduction, self.ignore_index, self.sparse, self.backend = reduction, ignore_index, sparse, backend

        self._fused: FusedStep | None = None
        self.noise = noise if device is None else noise.to(device)
        self.weight = nn.Parameter(empty_table(n_classes, in_features, device, dtype))
        self.bias = nn.Parameter(torch.empty(n_classes, device=device, dtype=dtype)) if bias else None
        if log_z == "learned":
            self.log_z: float | Tensor = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        elif isinstance(log_z, bool) or not isinstance(log_z, (int, float)) or not math.isfinite(log_z):
            raise ValueError(f"log_z must be a finite number or 'learned', got {log_z!r}")
        else:
            self.log_z = float(log_z)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(D), as nn.Linear. Under a log q correction the bias starts at log q.

        So the model starts as the noise, whose partition function is 1, as NCE with log_z = 0 wants it; else it is 0.
        """
        initialise_weight(self.weight)
        if self.bias is not None:
            self.bias.copy_(initial_bias(self.noise, self.correction, 0, self.n_classes))

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        log_q: tuple[Tensor, Tensor] | None = None,
        log_z: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        seed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of ``hidden`` [..., D] against ``target`` [...] or [..., T].

        All arguments are those of :func:`nce_ext.functional.nce_loss`; ``log_z`` given here, say one value per
        example from a network, takes the place of the module's. A softmax loss takes none: it cancels there.
        """
        weight, bias, noise, k = self.weight, self.bias, self.noise, self.num_negatives
        options = dict(
            log_z=self._log_z(log_z), objective=self._objective(), negatives=negatives, log_q=log_q,
            sample_weight=sample_weight, seed=seed, generator=generator, **self._call_options(),
        )  # fmt: skip
        if self._fused is not None and torch.is_grad_enabled():
            return self._fused.loss(reduced_loss, hidden, weight, bias, target, noise, k, options)
        return reduced_loss(hidden, weight, target, noise, k, bias=bias, **options)

    def _objective(self) -> Objective:
        """Say what is made of an example's scores."""
        return BINARY_OBJECTIVE

    def _log_z(self, given: float | Tensor | None) -> float | Tensor:
        """Choose between the call's log_z and the module's."""
        return self.log_z if given is None else given

    def _call_options(self) -> dict[str, Any]:
        """List the options of a call that are the module's own, by their names in ``validate_and_flatten``."""
        return dict(
            shared=self.shared, unique=self.unique, correction=self.correction, remove_hits=self.remove_hits,
            candidate_reduction=self.candidate_reduction, positive_label=self.positive_label, reduction=self.reduction,
            ignore_index=self.ignore_index, sparse=self.sparse, backend=self.backend,
        )  # fmt: skip

    def fuse_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        max_norm: float | None = None,
        process_group: Any = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        hogwild: bool = False,
    ) -> FusedStep:
        """Step on weight and bias inside backward, so that the gradient of their rows never exists.

        Equivalent to, but for rounding (the gradient of a 16-bit weight is not rounded on its way)::

            loss.backward()                     # with sparse=True
            if max_norm is not None:
                nce_ext.utils.clip_grad_norm_([loss_fn.weight, loss_fn.bias], max_norm)
            optimizer.step(); optimizer.zero_grad()     # for weight and bias alone

        The pairs of id and derivative that the gradient is the sum of are sorted once, and every row's sum goes
        straight into its step. ``optimizer.step()`` still steps on all other parameters. Every backward pass through
        the loss is a step; several calls of the loss in one pass are one step; a pass that raises is none.

        ==========================  ==========================================================================
        gradient accumulation       ``accumulate=n``: pairs and hidden vectors of n passes wait for one step
        clipping                    ``max_norm``: of the norm of weight's and bias's gradient
        several processes (DDP)     ``process_group``: pairs are gathered, their gradient averaged as by DDP, and all
                                    copies take the same step; keep the loss outside the DDP module. Without it a loss
                                    refuses to run where several processes train
        mixed precision             ``grad_scaler``: the step is taken unscaled, or left out if not finite, which
                                    ``grad_scaler.update()`` then counts
        tied weights                work: what other uses leave in ``weight.grad`` joins the step (rows are then formed)
        shared negatives,           work, but their gradient rows exist for a moment; not with ``process_group``
        reference backend
        double backward, twice      raise before anything changes
        through one graph
        torch.compile               the loss runs outside the graph
        ``torch.autograd.grad``     gives the gradient of hidden alone, and is no step
        copies of the module        are not fused
        ==========================  ==========================================================================

        Args:
            optimizer: one of ``nce_ext.optim``, that has weight and bias among its parameters.
            accumulate: backward passes a step, >= 1. :meth:`FusedStep.step` takes the step early.
            max_norm: > 0.
            process_group: of ``torch.distributed``; ``dist.group.WORLD`` for all processes.
            grad_scaler: the one that scales the loss.
            hogwild: word2vec's racy way, for plain SGD on float32: pairs are added to their rows as they come, neither
                sorted nor summed, without locks; what two threads add at the same time may be lost, and results differ
                from run to run. Several processes may share the weight (``weight.share_memory_()``).

        Returns:
            A handle, whose ``step()`` takes the step on what has been accumulated so far.

        Raises:
            TypeError: an optimizer that is not of ``nce_ext.optim``; a number of the wrong type.
            ValueError: an optimizer without these parameters; ``accumulate`` or ``max_norm`` out of range; ``hogwild``
                with another rule than plain SGD, another type than float32, ``max_norm``, ``process_group`` or
                ``grad_scaler``.
        """
        self._fused = fuse(
            self.weight, self.bias, optimizer, accumulate=accumulate, max_norm=max_norm, process_group=process_group,
            grad_scaler=grad_scaler, hogwild=hogwild,
        )  # fmt: skip
        return self._fused

    def unfuse_optimizer(self) -> None:
        """Undo :meth:`fuse_optimizer`: backward gives gradients again. What has been accumulated is dropped."""
        self._fused = None

    def resize_classes(self, n_classes: int, noise: Noise, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change the number of classes: of a vocabulary that has grown, or lost its last classes.

        Rows that stay keep their bits, new ones start as ``reset_parameters`` starts them, with the new noise. Weight
        and bias remain the same parameters, so that what is tied to them stays so; their gradients are dropped.

        Args:
            n_classes, noise: as in the constructor; classes ``n_classes`` and above are dropped.
            optimizer: the one that steps on weight and bias, of any kind: rows that stay keep their state, new ones get
                a fresh one. An optimizer that is not given here must be constructed again.

        Raises:
            TypeError, ValueError: as the constructor, before anything changes; an optimizer without these parameters; a
                loss that is fused with its optimizer, or in pinned memory.
        """
        resize_classes(self, n_classes, noise, optimizer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all classes: ``F.linear(hidden, weight, bias)``, [..., V]. Costs O(V D) an example."""
        return F.linear(hidden, self.weight, self.bias)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Exact normalised log-probabilities of all classes: ``log_softmax(logits(hidden), -1)``, [..., V]."""
        return F.log_softmax(self.logits(hidden), -1)

    def predict(self, hidden: Tensor) -> Tensor:
        """The most probable class of each example: ``logits(hidden).argmax(-1)``, [...]."""
        return self.logits(hidden).argmax(-1)

    def extra_repr(self) -> str:
        log_z = "learned" if isinstance(self.log_z, Tensor) else f"{self.log_z:g}"
        return (
            f"in_features={self.in_features}, n_classes={self.n_classes}, num_negatives={self.num_negatives}, "
            f"bias={self.bias is not None}, correction={self.correction!r}, log_z={log_z}, sparse={self.sparse}"
            + "".join(f", {name}={value}" for name in self._shown if (value := getattr(self, name)))
        )


class NCELoss(_SampledLoss):
    """An output layer trained by noise-contrastive estimation, at a cost independent of the number of classes.

    ``NCELoss(D, V, noise, k)`` replaces ``nn.Linear(D, V)`` and ``nn.CrossEntropyLoss()``::

        loss_fn = nce_ext.NCELoss(D, V, nce_ext.noise.Unigram(counts), 20)
        loss = loss_fn(hidden, target)          # training: touches (k + 1) rows an example
        log_p = loss_fn.log_prob(hidden)        # exact, all V classes

    ``weight`` [V, D] and ``bias`` [V] have the names and shapes of a Linear's, so
    ``load_state_dict(linear.state_dict(), strict=False)`` and tying ``loss_fn.weight = embedding.weight`` work.
    The trained scores are close to normalised: logsumexp(logits) is near ``log_z``.

    Args:
        in_features: D.
        n_classes: V, 1 .. 2^31 - 1.
        noise: an ``nce_ext.noise`` distribution over the V classes. For probabilities the law of the data,
            ``Unigram(counts, power=1)``, is best: the model starts there.
        num_negatives: k, noise samples per example.
        log_z: what stands for the log partition function: a number, or "learned" for one trained scalar.
        device, dtype: of the parameters.

    The other options, the formula and what is raised when: :func:`nce_ext.functional.nce_loss`.
    """


class NegativeSamplingLoss(_SampledLoss):
    """word2vec's negative-sampling loss, self-adversarial negative sampling, and gBCE.

    It learns representations, not probabilities: the score tends to log p(y | x) - log(k q(y)), so ``log_prob`` and
    ``nce_ext.evaluate`` describe a softmax over these scores, which nothing has fitted. The bias starts at 0.

    Args:
        adversarial_temperature: weights negatives by the softmax of their scores times this (NSSA); None: all count 1.
        margin: added to every score.
        calibration: t in 0 .. 1 of gBCE, which weakens the target's term; None: none.

    The other options are :class:`NCELoss`'s, with ``correction="none"``; the formula, and what is raised when:
    :func:`nce_ext.functional.negative_sampling_loss`.
    """

    _shown: ClassVar = (*_SampledLoss._shown, "adversarial_temperature", "margin", "calibration")

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        noise: Noise,
        num_negatives: int,
        *,
        adversarial_temperature: float | None = None,
        margin: float = 0.0,
        calibration: float | None = None,
        bias: bool = True,
        shared: bool = False,
        unique: bool | str = False,
        correction: str = "none",
        log_z: float | str = 0.0,
        remove_hits: bool = False,
        candidate_reduction: str = "sum",
        positive_label: str = "one",
        reduction: str = "mean",
        ignore_index: int = -100,
        sparse: bool | str = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # The constructor of the base asks for the objective.
        self.adversarial_temperature, self.calibration = adversarial_temperature, calibration
        super().__init__(
            in_features, n_classes, noise, num_negatives,
            bias=bias, shared=shared, unique=unique, correction=correction, log_z=log_z, remove_hits=remove_hits,
            candidate_reduction=candidate_reduction, positive_label=positive_label, reduction=reduction,
            ignore_index=ignore_index, sparse=sparse, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        if calibration is not None:
            calibrated_weight(calibration, self.num_negatives, self.n_classes)
        self.margin = check_margin(margin)

    def _objective(self) -> Objective:
        return negative_sampling_objective(self.adversarial_temperature, self.calibration)

    def _call_options(self) -> dict[str, Any]:
        return {**super()._call_options(), "calibration": self.calibration, "margin": self.margin}


class SampledSoftmaxLoss(_SampledLoss):
    """Softmax over the target and k sampled negatives (ranking NCE), at a cost independent of the number of classes.

    The classes' scores need not be normalised, and the log q correction takes out the bias towards classes that are
    drawn often. Negatives that equal a target are left out; where targets are so frequent that k q is no longer well
    below 1, use ``unique=True`` or ``correct_positive=False``, or the target goes missing from its own normaliser.

    Args:
        label_smoothing: eps in 0 .. 1, spread over the columns that are not masked.
        correct_positive: False corrects the negatives only, for a target that is given and not sampled.

    The other options are :class:`NCELoss`'s, with ``remove_hits=True`` and ``positive_label="uniform"``; ``log_z`` and
    ``candidate_reduction`` have no meaning here and keep their defaults. The formula, and what is raised when:
    :func:`nce_ext.functional.sampled_softmax_loss`.
    """

    _shown: ClassVar = (*_SampledLoss._shown, "label_smoothing")

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        noise: Noise,
        num_negatives: int,
        *,
        label_smoothing: float = 0.0,
        correct_positive: bool = True,
        bias: bool = True,
        shared: bool = False,
        unique: bool | str = False,
        correction: str = "log_kq",
        log_z: float | str = 0.0,
        remove_hits: bool = True,
        candidate_reduction: str = "sum",
        positive_label: str = "uniform",
        reduction: str = "mean",
        ignore_index: int = -100,
        sparse: bool | str = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # The constructor of the base asks for the objective.
        self.label_smoothing, self.correct_positive = label_smoothing, correct_positive
        super().__init__(
            in_features, n_classes, noise, num_negatives,
            bias=bias, shared=shared, unique=unique, correction=correction, log_z=log_z, remove_hits=remove_hits,
            candidate_reduction=candidate_reduction, positive_label=positive_label, reduction=reduction,
            ignore_index=ignore_index, sparse=sparse, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip

    def _objective(self) -> Objective:
        return softmax_objective(self.label_smoothing, self.correct_positive)

    def _log_z(self, given: float | Tensor | None) -> float | Tensor:
        log_z = super()._log_z(given)
        if isinstance(log_z, Tensor) or log_z != 0:
            raise ValueError(f"log_z must be None or 0.0 with a softmax loss, in which it cancels, got {log_z!r}")
        return log_z
