"""Modules of the contrastive losses: InfoNCE (CLIP, two towers), its debiased form, and the loss of SigLIP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nce_ext import _checks
from nce_ext.contrastive import arguments as _arguments
from nce_ext.contrastive import pairwise as _pairwise
from nce_ext.contrastive.capped_exp import capped_exp
from nce_ext.reference.dtypes import compute_dtype

__all__ = ["InfoNCELoss", "SigmoidContrastiveLoss"]


class InfoNCELoss(nn.Module):
    r"""InfoNCE: the cross-entropy of telling each query's own key from the other keys.

    Equivalent to, with ``columns`` the batch's keys followed by the explicit negatives, M = B + K of them::

        columns = torch.cat([key, negatives]); column_ids = torch.cat([ids, negative_ids])
        z = query @ columns.T / temperature - torch.cat([log_q, negative_log_q])      # [B, M]
        hit = ids[:, None] == column_ids; hit.fill_diagonal_(False)
        z = z.masked_fill(hit, -torch.inf)                                            # false negatives
        loss = F.cross_entropy(z, torch.arange(B))                                    # or F.cross_entropy(z, target)

    without holding the [B, M] logits: ``max_logits`` of them at a time, and what is saved for backward is the gradients
    of query, key and negatives. (With ``reduction="none"`` the upstream gradient weighs each row, so backward computes
    the logits anew, chunk by chunk: four matrix products instead of three.)

    van den Oord et al., "Representation learning with contrastive predictive coding", 2018. Recipes:

    * CLIP (Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021):
      ``InfoNCELoss(learn_temperature=True, symmetric=True, normalize=True)(image, text)``.
    * Two towers (Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys
      2019): ``loss(user, item, ids=item_id, log_q=log_of_item_frequency)``; TensorFlow Recommenders' task is this with
      ``reduction="sum"``.
    * Momentum contrast: ``InfoNCELoss(in_batch=False)(query, key.detach(), negatives=memory.keys)``.
    * NT-Xent of two views a, b of B examples (SimCLR): ``loss(torch.cat([a, b]), torch.cat([b, a]),
      ids=torch.arange(B).repeat(2))``; the equal ids take a vector out of its own negatives, so that N = 2 B - 2.

    **Debiased** (Chuang et al., "Debiased contrastive learning", NeurIPS 2020): a share ``debias`` = t of the negatives
    has the query's class. With pos = e^z of the positive and N the row's negatives that are not masked::

        mass = ((e^z of the negatives).sum() - N * t * pos) / (1 - t)
        loss = -log(pos / (pos + max(mass, N * e^(-1 / temperature))))

    in logarithms, so that nothing overflows. The floor is the smallest sum of N cosines, so vectors must have length 1
    (``normalize=True``). ``debias=0`` is InfoNCE, without the floor.

    Args:
        temperature: > 0; the initial one if it is learned.
        learn_temperature: hold log(1 / temperature) as the parameter ``logit_scale``, the key of CLIP's checkpoints.
            1 / temperature never exceeds ``max_scale``: a parameter beyond it counts as the limit, gets no gradient
            that would raise it further, and the whole one that lowers it.
        symmetric: half the loss of query to key, and half that of key to query, whose columns are the batch's queries;
            explicit negatives and ``log_q`` are of keys and have no part in it.
        normalize: divide the vectors by their length; one of zeros stays, with gradient 0.
        debias: t, in [0, 1); not with log q or ``target``, for which the formula has no meaning.
        reduction: "mean" over the batch, "sum", or "none": [B]. The mean of no rows is 0.
        in_batch: whether the other rows' keys are negatives. If not, the columns are the row's own key, then the
            explicit negatives, which must be given.
        max_scale: limit of a learned 1 / temperature; CLIP's is 100.
        max_logits: logits held at a time; more than that only if one row has more.
        device, dtype: of the parameter.

    Example, with a queue of past keys: :class:`nce_ext.CrossBatchMemory`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learn_temperature: bool = False,
        symmetric: bool = False,
        normalize: bool = False,
        debias: float = 0.0,
        reduction: str = "mean",
        in_batch: bool = True,
        max_scale: float = 100.0,
        max_logits: int = 2**22,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_scale = _positive("max_scale", max_scale)
        scale = 1 / _positive("temperature", temperature)
        if learn_temperature and scale > self.max_scale * (1 + 1e-12):
            lowest = f"1 / max_scale = {1 / self.max_scale:g}"
            raise ValueError(f"temperature must be >= {lowest} with learn_temperature=True, got {temperature!r}")
        self.debias = float(_checks.number("debias", debias, 0, below=1, wanted="a number in [0, 1)"))
        _checks.reduction(reduction)
        if symmetric and not in_batch:
            raise ValueError("in_batch must be True with symmetric=True: the other direction has no explicit negatives")
        self.symmetric, self.normalize = symmetric, normalize
        self.reduction, self.in_batch, self.max_logits = reduction, in_batch, _checks.count("max_logits", max_logits, 1)
        self._scale = scale
        self.logit_scale = _parameter(math.log(scale), device, dtype) if learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """Temperature in use: a number, or a detached scalar tensor if it is learned."""
        if self.logit_scale is None:
            return 1 / self._scale
        return self.logit_scale.detach().exp().clamp(max=self.max_scale).reciprocal()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        negatives: Tensor | None = None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
        log_q: Tensor | None = None,
        negative_log_q: Tensor | None = None,
        query_log_q: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of ``query`` [B, D] against ``key`` [B, D]; row i of one belongs to row i of the other.

        Args:
            query, key, negatives: [B, D], [B, D] and [K, D], float32, bfloat16, float16 or float64, which may differ
                but for float64. Arithmetic is float32 (float64); each gets its gradient in its own dtype.
            ids: int64 or int32 [B]: what the keys are. Another key with the row's id is no negative of it.
            negative_ids: [K], the same for the explicit negatives; without it none of them is masked.
            negative_mask: bool [K], False where a negative is left out (an unused slot).
            log_q: [B], log-probability with which each key gets into a batch, subtracted from its column's logit,
                after the temperature. Any constant may be added to all of them. Finite.
            negative_log_q: [K]; with negatives, both or neither.
            query_log_q: [B], the same for the queries where they are columns (``symmetric``).
            target: soft labels, [B, B + K], or [B, 1 + K] with ``in_batch=False``; otherwise the own key has label 1.
                The loss is sum_j t_j (logsumexp(z) - z_j). Finite, >= 0, and 0 on masked columns; rows usually sum to
                1, a row of zeros costs nothing. With ``symmetric=True`` use two losses, of ``target`` and of its
                transpose.

        Returns:
            A float32 tensor (float64 for float64 inputs): a scalar, or [B] for ``reduction="none"``. Finite wherever
            the logits are, whatever is masked; a row without negatives has loss 0.

        Raises:
            TypeError: a wrong type, dtype or layout.
            ValueError: a wrong device, shape or combination; data (``log_q``, ``target``) that requires a gradient;
                values outside their range. Values are checked on the CPU, on CUDA under
                :func:`nce_ext.set_debug` only: there a log q that is not finite makes every loss NaN with gradient 0,
                and labels without meaning do so to their row.
            RuntimeError: differentiating twice.
        """
        data = _pairwise.Data(ids, negative_ids, negative_mask, log_q, negative_log_q, target)
        directions = self._directions(query, key, negatives, data, query_log_q)
        losses = torch.stack([self._losses(*direction, self.reduction != "none") for direction in directions]).mean(0)
        return losses / max(query.shape[0], 1) if self.reduction == "mean" else losses

    @torch.no_grad()
    def mutual_information_bound(
        self,
        query: Tensor,
        key: Tensor,
        *,
        negatives: Tensor | None = None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
        log_q: Tensor | None = None,
        negative_log_q: Tensor | None = None,
        query_log_q: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Estimate a lower bound of the mutual information of query and key, in nats: the mean of log N_i - loss_i.

        N_i is the number of candidates of row i, its own key and the negatives that are not masked: B + K without
        masks. So it never exceeds log N, whatever the truth (van den Oord et al. 2018, section 2.3). In expectation it
        is a bound if the negatives are independent draws of the keys' own law; masking by ``ids`` and negatives of
        another law make it an estimate. ``log_q`` is part of the score. ``symmetric`` averages both directions.

        Args: as :meth:`forward`; ``target`` must be None. No gradient is taken.

        Returns: a scalar; the bound of no rows is 0.

        Raises: as :meth:`forward`. ValueError: with ``target``, or ``debias`` > 0, whose losses bound nothing.
        """
        if target is not None:
            raise ValueError("target must be None for the bound, which is of the own key, got soft labels")
        if self.debias:
            raise ValueError(f"debias must be 0 for the bound, got {self.debias:g}")
        data = _pairwise.Data(ids, negative_ids, negative_mask, log_q, negative_log_q, None)
        options = self._options(False)
        bounds = []
        for direction in self._directions(query, key, negatives, data, query_log_q):
            count = _pairwise.count_negatives(*direction, options)
            bounds.append(count.log1p() - self._losses(*direction, False))
        return torch.stack(bounds).mean(0).sum() / max(query.shape[0], 1)

    def extra_repr(self) -> str:
        learned = self.logit_scale is not None
        return (
            f"temperature={float(self.temperature):g}, learn_temperature={learned}, symmetric={self.symmetric}, "
            f"normalize={self.normalize}, debias={self.debias:g}, in_batch={self.in_batch}, "
            f"reduction={self.reduction!r}"
        )

    def _options(self, total: bool) -> _pairwise.Options:
        """Return the options of the pairwise loss; ``total``: one sum instead of one loss a query."""
        return _pairwise.Options(False, self.in_batch, self.debias, total, torch.is_grad_enabled(), self.max_logits)

    def _losses(
        self, query: Tensor, key: Tensor, negatives: Tensor | None, data: _pairwise.Data, total: bool
    ) -> Tensor:
        """Compute the losses of one direction as :meth:`_directions` returns it: their sum, or [B]."""
        scale = _scale(self._scale, self.logit_scale, query, self.max_scale)
        return _pairwise.losses((query, key, negatives, scale, None), data, self._options(total))

    def _directions(
        self, query: Tensor, key: Tensor, negatives: Tensor | None, data: _pairwise.Data, query_log_q: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor | None, _pairwise.Data]]:
        """Check and prepare the arguments of ``forward``: those of query to key and, if symmetric, of key to query."""
        _arguments.check(query, key, negatives, data, self.in_batch)
        batch = query.shape[0]
        if query_log_q is not None:
            _arguments.check_data("query_log_q", query_log_q, query, _checks.FLOATS, (batch,))
            if not self.symmetric:
                raise ValueError(
                    "query_log_q must be None with symmetric=False, in which no query is a column, got a tensor"
                )
        if negatives is None and not self.in_batch:
            raise ValueError("negatives must be given with in_batch=False, got None")
        if data.target is not None and self.symmetric:
            raise ValueError(
                "target must be None with symmetric=True; use the mean of two losses with symmetric=False, of "
                "(query, key, target) and of (key, query, target.T)"
            )
        for name, value in (("log_q", data.log_q), ("query_log_q", query_log_q), ("target", data.target)):
            if value is not None and self.debias:
                raise ValueError(
                    f"{name} must be None with debias > 0, whose negatives weigh the same and whose positive is one; "
                    "it takes negatives, ids, negative_mask and symmetric"
                )
        _arguments.check_values(data, query, self.in_batch, self.max_logits)
        back = _pairwise.Data(data.ids, None, None, query_log_q, None, None)
        if self.symmetric:
            _arguments.check_values(back, query, True, self.max_logits, "query_log_q")
        query, key, negatives = _prepared(self.normalize, query, key, negatives)
        return [(query, key, negatives, data)] + ([(key, query, None, back)] if self.symmetric else [])


class SigmoidContrastiveLoss(nn.Module):
    r"""SigLIP's loss: the binary cross-entropy of every pair of the batch.

    Equivalent to, with y_ij = 1 for the pair of a row and its own key and -1 for all others::

        z = logit_scale * query @ key.T + logit_bias                                  # [B, B]
        loss = -F.logsigmoid(y * z).sum() / B

    without holding the [B, B] logits: ``max_logits`` of them at a time, and what is saved for backward is the
    gradients of query and key (with ``reduction="none"`` backward computes the logits anew). No softmax ties a row's
    pairs together; the keys of other machines, of which none is a positive, are passed as ``negatives``. Zhai et al.,
    "Sigmoid loss for language image pre-training", ICCV 2023.

    Args:
        logit_scale: > 0; the inverse temperature, the initial one if it is learned.
        logit_bias: the initial one if it is learned. -10 keeps the many negatives from ruling the first steps.
        learn: hold log(logit_scale) and the bias as the parameters ``logit_scale`` and ``logit_bias``, the keys of
            SigLIP's checkpoints. Neither is limited.
        normalize: divide the vectors by their length, as SigLIP does; one of zeros stays, with gradient 0.
        reduction: "mean": the sum over all pairs, divided by B; "sum"; or "none": the sum of each row, [B]. The mean of
            no rows is 0.
        max_logits: logits held at a time; more than that only if one row has more.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        *,
        learn: bool = True,
        normalize: bool = False,
        reduction: str = "mean",
        max_logits: int = 2**22,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._scale = _positive("logit_scale", logit_scale)
        self._bias = float(_checks.number("logit_bias", logit_bias, wanted="a finite number"))
        _checks.reduction(reduction)
        self.normalize, self.reduction = normalize, reduction
        self.max_logits = _checks.count("max_logits", max_logits, 1)
        self.logit_scale = _parameter(math.log(self._scale), device, dtype) if learn else None
        self.logit_bias = _parameter(self._bias, device, dtype) if learn else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        negatives: Tensor | None = None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of ``query`` [B, D] against ``key`` [B, D]; row i of one belongs to row i of the other.

        Args: those of :meth:`InfoNCELoss.forward`. Pairs of equal ids that are not a row's own are left out: they are
            neither positive nor negative.

        Returns:
            A float32 tensor (float64 for float64 inputs): a scalar, or [B] for ``reduction="none"``.

        Raises:
            TypeError: a wrong type, dtype or layout.
            ValueError: a wrong device or shape.
            RuntimeError: differentiating twice.
        """
        data = _pairwise.Data(ids, negative_ids, negative_mask, None, None, None)
        _arguments.check(query, key, negatives, data, True)
        batch = query.shape[0]
        query, key, negatives = _prepared(self.normalize, query, key, negatives)
        scale = _scale(self._scale, self.logit_scale, query, None)
        bias = query.new_full((), self._bias) if self.logit_bias is None else self.logit_bias.to(query.dtype)
        options = _pairwise.Options(True, True, 0.0, self.reduction != "none", torch.is_grad_enabled(), self.max_logits)
        losses = _pairwise.losses((query, key, negatives, scale, bias), data, options)
        return losses / max(batch, 1) if self.reduction == "mean" else losses

    def extra_repr(self) -> str:
        scale = self._scale if self.logit_scale is None else math.exp(self.logit_scale.item())
        bias = self._bias if self.logit_bias is None else self.logit_bias.item()
        return (
            f"logit_scale={scale:g}, logit_bias={bias:g}, learn={self.logit_scale is not None}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}"
        )


def _parameter(value: float, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """Make a scalar parameter."""
    return nn.Parameter(torch.tensor(value, device=device, dtype=dtype))


def _scale(fixed: float, log_scale: Tensor | None, like: Tensor, limit: float | None) -> Tensor:
    """Return the factor of the logits, a scalar tensor of like's dtype: fixed, or e^log_scale, at most the limit."""
    if log_scale is None:
        return like.new_full((), fixed)
    log_scale = log_scale.to(like.dtype)
    return log_scale.exp() if limit is None else capped_exp(log_scale, limit)


def _prepared(
    normalize: bool, query: Tensor, key: Tensor, negatives: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convert the vectors to the dtype of the arithmetic, and divide them by their length if ``normalize``.

    The conversion is autograd's, so each gradient is rounded to the dtype of its input.
    """
    compute = compute_dtype(query.dtype)
    vectors = [None if t is None else t.to(compute) for t in (query, key, negatives)]
    if normalize:
        vectors = [None if t is None else _unit_length(t) for t in vectors]
    return tuple(vectors)  # type: ignore[return-value]


def _unit_length(x: Tensor) -> Tensor:
    """Divide vectors [n, D] by their lengths; one of zeros stays.

    Each is first divided by its largest element, since squares of large or small elements are out of range.
    """
    largest = x.detach().abs().amax(1, keepdim=True)
    x = x / torch.where(largest > 0, largest, math.inf)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(largest > 0, length, 1)


def _positive(name: str, value: object) -> float:
    """Raise unless the value is a finite number > 0; return it as a float."""
    return float(_checks.number(name, value, above=0, wanted="a finite number > 0"))
