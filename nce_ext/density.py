"""Noise-contrastive estimation of unnormalised densities: energy models without a vocabulary."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nce_ext import _checks
from nce_ext.reference.dtypes import compute_dtype

__all__ = ["DensityNCELoss"]


class DensityNCELoss(nn.Module):
    r"""Loss that fits log f, a log-density that need not integrate to 1, by telling data from noise of known density q.

    Equivalent to, with ``ratio`` the noise samples a datum::

        z_data = log_f_data - log_z - math.log(ratio) - log_q_data          # [B]
        z_noise = log_f_noise - log_z - math.log(ratio) - log_q_noise       # [B * ratio]
        loss = F.softplus(-z_data).mean() + ratio * F.softplus(z_noise).mean()

    At the optimum log f - log_z is the log-density of the data, so log_z is the log partition function of f. Gutmann
    and Hyvarinen, "Noise-contrastive estimation of unnormalized statistical models, with applications to natural image
    statistics", JMLR 13, 2012. Any object with ``sample`` and ``log_prob`` is the noise::

        noise = torch.distributions.MultivariateNormal(x_train.mean(0), x_train.T.cov())
        loss_fn = nce_ext.DensityNCELoss(16)
        x_noise = noise.sample((len(x) * 16,))
        loss = loss_fn(energy(x), noise.log_prob(x), energy(x_noise), noise.log_prob(x_noise))

    The noise must be able to produce whatever the data hold and must stay fixed while the model learns. The closer it
    is to the data, and the larger ``noise_ratio``, the smaller the error, down to that of maximum likelihood.

    Args:
        noise_ratio: noise samples a datum, 1 .. 2^20. A whole number: every datum has its own samples.
        log_z: what stands for the log partition function: a number, or "learned" for one trained scalar, the parameter
            ``log_z``, which starts at 0. A number is for an f that has a free constant of its own.
        reduction: "mean" over the data, "sum" over them, or "none": one loss a datum, [B], which is
            softplus(-z_data[i]) plus the sum of softplus(z_noise) over the datum's own noise samples. The mean of no
            data is 0.
        device, dtype: of the learned ``log_z``; float32 if not given.
    """

    def __init__(
        self,
        noise_ratio: int,
        *,
        log_z: float | str = "learned",
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.noise_ratio = _checks.count("noise_ratio", noise_ratio, 1, 2**20)
        _checks.reduction(reduction)
        if dtype is not None and dtype not in _checks.FLOATS:
            raise TypeError(f"dtype must be a floating-point type of at most 64 bits, got {dtype}")
        self.reduction = reduction
        self.log_z: float | Tensor
        if log_z == "learned":
            self.log_z = nn.Parameter(torch.zeros((), device=device, dtype=dtype or torch.float32))
        else:
            self.log_z = float(_checks.number("log_z", log_z, wanted="a finite number or 'learned'"))

    def forward(
        self,
        log_f_data: Tensor,
        log_q_data: Tensor,
        log_f_noise: Tensor,
        log_q_noise: Tensor,
        *,
        log_z: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of B data against B * noise_ratio noise samples.

        Args:
            log_f_data: the model's unnormalised log-density of the data, [B], float32, bfloat16, float16 or float64.
                -inf, a density of zero, makes the loss infinite.
            log_q_data: the noise's log-density of the data, [B], finite, without a gradient.
            log_f_noise: the model's of the noise samples, [B * noise_ratio] or [B, noise_ratio]; samples
                i * noise_ratio .. (i + 1) * noise_ratio - 1 are those of datum i. Where it is -inf the sample
                contributes 0, and its gradient is 0.
            log_q_noise: the noise's of its own samples, of log_f_noise's shape, finite, without a gradient.
            log_z: takes the place of the module's: a number, a scalar tensor, or one value a datum, [B], which serves
                the datum and its own noise samples (a conditional density, with log_z a function of the condition).
                A tensor that requires a gradient gets one.

        Returns:
            float32, or float64 if any of the tensors is: a scalar, or [B] for ``reduction="none"``. Arithmetic is in
            that type too.

        Raises:
            TypeError: a wrong type, dtype or layout.
            ValueError: a wrong device or shape, a log q that requires a gradient or is not finite. On CUDA finiteness
                is not checked, as this would wait for the device: the loss of such a datum or sample is NaN and its
                gradient 0. See :func:`nce_ext.set_debug`.
        """
        log_z = self.log_z if log_z is None else log_z
        named = {
            "log_f_data": log_f_data, "log_q_data": log_q_data, "log_f_noise": log_f_noise, "log_q_noise": log_q_noise,
        }  # fmt: skip
        _check_tensors(named, log_z)
        noise_shape = self._check_shapes(log_f_data, log_q_data, log_f_noise, log_q_noise, log_z)
        _check_fixed_noise(log_q_data=log_q_data, log_q_noise=log_q_noise)

        compute = _compute_dtype(*named.values(), log_z)
        per_datum = log_z[:, None] if isinstance(log_z, Tensor) and log_z.dim() else log_z
        z_data = self._logit(log_f_data, log_q_data, log_z, compute)
        z_noise = self._logit(log_f_noise.reshape(noise_shape), log_q_noise.reshape(noise_shape), per_datum, compute)
        # softplus(z) = -logsigmoid(-z). F.softplus drops the term log1p(e^-z) above z = 20, which float64 can hold.
        loss = -F.logsigmoid(z_data) - F.logsigmoid(-z_noise).sum(1)
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.sum() / max(len(loss), 1)

    def log_density_ratio(self, log_f: Tensor, log_q: Tensor, *, log_z: float | Tensor | None = None) -> Tensor:
        """Compute log f - log_z - log q: how much likelier the model finds a point than the noise does, in nats.

        As a score it tells data from what the noise produces. Where neither data nor noise fell in training the model
        extrapolates, and log f alone is the better sign that a point is out of the distribution. The logit of the loss
        is this less log(noise_ratio).

        Args:
            log_f: [...].
            log_q: of log_f's shape; it may require a gradient here, and be -inf.
            log_z: takes the place of the module's: a number, a scalar tensor, or a tensor of log_f's shape.

        Returns:
            float32, or float64 if any of the tensors is, [...].

        Raises:
            TypeError: a wrong type, dtype or layout.
            ValueError: a wrong device or shape.
        """
        log_z = self.log_z if log_z is None else log_z
        _check_tensors({"log_f": log_f, "log_q": log_q}, log_z)
        if log_q.shape != log_f.shape:
            raise ValueError(f"log_q must have log_f's shape {list(log_f.shape)}, got {list(log_q.shape)}")
        if isinstance(log_z, Tensor) and log_z.dim() and log_z.shape != log_f.shape:
            raise ValueError(f"log_z must be a scalar or of log_f's shape {list(log_f.shape)}, got {list(log_z.shape)}")
        return _log_ratio(log_f, log_q, log_z, _compute_dtype(log_f, log_q, log_z))

    def extra_repr(self) -> str:
        log_z = "learned" if isinstance(self.log_z, Tensor) else f"{self.log_z:g}"
        return f"noise_ratio={self.noise_ratio}, log_z={log_z}, reduction={self.reduction!r}"

    def _logit(self, log_f: Tensor, log_q: Tensor, log_z: float | Tensor, compute: torch.dtype) -> Tensor:
        """Compute the logit that a point is data; NaN where log q is not finite."""
        z = _log_ratio(log_f, log_q, log_z, compute) - math.log(self.noise_ratio)
        return torch.where(log_q.isfinite(), z, math.nan)

    def _check_shapes(
        self, log_f_data: Tensor, log_q_data: Tensor, log_f_noise: Tensor, log_q_noise: Tensor, log_z: float | Tensor
    ) -> tuple[int, int]:
        """Refuse shapes that do not fit each other; return [B, noise_ratio], the shape of the noise samples."""
        if log_f_data.dim() != 1:
            raise ValueError(f"log_f_data must be [B], got shape {list(log_f_data.shape)}")
        n_data = log_f_data.shape[0]
        if log_q_data.shape != log_f_data.shape:
            raise ValueError(f"log_q_data must have log_f_data's shape [{n_data}], got {list(log_q_data.shape)}")
        allowed = [[n_data * self.noise_ratio], [n_data, self.noise_ratio]]
        if list(log_f_noise.shape) not in allowed:
            raise ValueError(
                f"log_f_noise must have shape {allowed[0]} or {allowed[1]} for {n_data} data and "
                f"noise_ratio = {self.noise_ratio}, got {list(log_f_noise.shape)}"
            )
        if log_q_noise.shape != log_f_noise.shape:
            raise ValueError(
                f"log_q_noise must have log_f_noise's shape {list(log_f_noise.shape)}, got {list(log_q_noise.shape)}"
            )
        if isinstance(log_z, Tensor) and log_z.dim() and log_z.shape != log_f_data.shape:
            raise ValueError(f"log_z must be a scalar or of log_f_data's shape [{n_data}], got {list(log_z.shape)}")
        return n_data, self.noise_ratio


def _log_ratio(log_f: Tensor, log_q: Tensor, log_z: float | Tensor, compute: torch.dtype) -> Tensor:
    """Compute log f - log q - log_z in the dtype ``compute``."""
    return log_f.to(compute) - log_q.to(compute) - (log_z.to(compute) if isinstance(log_z, Tensor) else log_z)


def _compute_dtype(*values: float | Tensor) -> torch.dtype:
    """Return float64 if any of the tensors is of that dtype, else float32."""
    dtypes = [compute_dtype(value.dtype) for value in values if isinstance(value, Tensor)]
    return functools.reduce(torch.promote_types, dtypes)


def _check_tensors(named: dict[str, Tensor], log_z: float | Tensor) -> None:
    """Refuse what is no floating-point tensor, or is on another device than the first; types come before devices."""
    for name, value in named.items():
        _checks.instance(name, value, Tensor, "a floating-point tensor")
    if isinstance(log_z, Tensor):
        named = {**named, "log_z": log_z}
    else:
        log_z = _checks.number("log_z", log_z, wanted="a finite number or a tensor")
    first = next(iter(named))
    device = named[first].device
    for name, value in named.items():
        if value.device != device:
            raise ValueError(f"{name} must be on {first}'s device {device}, got {value.device}")
    for name, value in named.items():
        _checks.tensor(name, value, _checks.FLOATS)


def _check_fixed_noise(**named: Tensor) -> None:
    """Refuse log-densities of the noise that require a gradient or are not finite."""
    for name, log_q in named.items():
        why = "the noise stays fixed while the model learns"
        _checks.without_gradient(name, log_q, why, "compute it under torch.no_grad() or use .detach()")
    for name, log_q in named.items():
        if _checks.values_are_checked(log_q.device):
            _checks.finite(name, log_q)
