"""The losses as modules: they hold the output layer and the options, and call ``nce_ext.functional``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nce_ext import _call, _checks, functional
from nce_ext._memory import empty_table
from nce_ext.noise import Noise, describe

__all__ = ["NCELoss", "NegativeSamplingLoss"]


class _SampledLoss(nn.Module):
    """An output layer and a loss over its classes; subclasses choose the default correction."""

    _correction = "log_kq"

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        noise: Noise,
        num_negatives: int,
        *,
        bias: bool = True,
        shared: bool = False,
        correction: str | None = None,
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
        self.in_features = _checks.count("in_features", in_features, 1)
        self.n_classes = _checks.count("n_classes", n_classes, 1, 2**31 - 1)
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be an nce_ext.noise distribution, got {describe(noise)}")
        if noise.n_classes != n_classes:
            raise ValueError(f"noise must have n_classes = {n_classes} classes, got {noise.n_classes}")
        self.num_negatives = _checks.count("num_negatives", num_negatives, 0, 2**20)
        self.correction = self._correction if correction is None else correction
        _call.check_options(self.correction, candidate_reduction, positive_label, reduction, ignore_index)
        _checks.one_of("backend", backend, ("auto", "fused", "reference"))
        _call.gradient_layout(sparse)
        if self.correction == "log_kq" and num_negatives == 0:
            raise ValueError("num_negatives must be >= 1 with correction='log_kq' (log k is infinite), got 0")
        self.shared, self.remove_hits, self.candidate_reduction = shared, remove_hits, candidate_reduction
        self.positive_label, self.reduction, self.ignore_index = positive_label, reduction, ignore_index
        self.sparse, self.backend = sparse, backend

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

        So the model starts as the noise distribution, whose partition function is 1: the value that NCE with
        log_z = 0 trains towards. Without a correction the bias starts at 0.
        """
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is None:
            return
        if self.correction == "none":
            self.bias.zero_()
        else:
            ids = torch.arange(self.n_classes, device=self.noise.table.device)
            floor = -math.log(self.n_classes * 2.0**32)  # of a class that is never drawn
            self.bias.copy_(self.noise.log_prob(ids).clamp_min(floor))

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
        example from a network, takes the place of the module's.
        """
        return functional.nce_loss(
            hidden,
            self.weight,
            target,
            self.noise,
            self.num_negatives,
            bias=self.bias,
            shared=self.shared,
            correction=self.correction,
            log_z=self.log_z if log_z is None else log_z,
            remove_hits=self.remove_hits,
            candidate_reduction=self.candidate_reduction,
            positive_label=self.positive_label,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            sparse=self.sparse,
            backend=self.backend,
            negatives=negatives,
            log_q=log_q,
            sample_weight=sample_weight,
            seed=seed,
            generator=generator,
        )

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
        noise: an ``nce_ext.noise`` distribution over the V classes.
        num_negatives: k, noise samples per example.
        log_z: what stands for the log partition function: a number, or "learned" for one trained scalar.
        device, dtype: of the parameters.

    The other options, the formula and what is raised when: :func:`nce_ext.functional.nce_loss`.
    """


class NegativeSamplingLoss(_SampledLoss):
    """word2vec's negative-sampling loss: ``NCELoss`` with ``correction="none"`` and the bias starting at 0.

    It learns representations, not probabilities: the score tends to log p(y | x) - log(k q(y)), so ``log_prob`` and
    ``nce_ext.evaluate`` describe a softmax over these scores, which nothing has fitted. The options are
    :class:`NCELoss`'s; the formula is in :func:`nce_ext.functional.negative_sampling_loss`.
    """

    _correction = "none"
