"""Inputs of the loss by their sizes, and one call that runs nce_ext on them next to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import torch
from tolerances import as_float64, assert_close
from torch import Tensor

import nce_ext
from nce_ext import functional


@dataclass
class Case:
    """Leading shape ``lead``, T positives (0: target without that dimension), V classes of D numbers, k negatives."""

    lead: tuple[int, ...] = (7,)
    dim: int = 16
    classes: int = 50
    negatives: int = 5
    positives: int = 0
    dtype: torch.dtype = torch.float32
    hidden_dtype: torch.dtype | None = None
    scale: float = 1.0
    with_bias: bool = True
    pad: bool = False  # replace some targets by ignore_index
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden = self.scale * torch.randn(*self.lead, self.dim, dtype=torch.float64)
        self.weight = torch.randn(self.classes, self.dim, dtype=torch.float64) / self.dim**0.5
        self.hidden = self.hidden.to(self.hidden_dtype or self.dtype)
        self.weight = self.weight.to(self.dtype)
        self.bias = torch.randn(self.classes, dtype=torch.float64).to(self.dtype) if self.with_bias else None
        shape = (*self.lead, self.positives) if self.positives else self.lead
        self.target = torch.randint(self.classes, shape)
        if self.pad and self.target.numel():
            ignore = self.options.get("ignore_index", -100)
            self.target = torch.where(torch.rand(shape) < 0.3, ignore, self.target)
        # Every count is positive, and the law is far from uniform.
        self.noise = nce_ext.noise.Unigram(1.0 / torch.arange(1, self.classes + 1).double())
        self.seed = torch.randint(-(2**62), 2**62, (2,))

    def with_options(self, **options: Any) -> Case:
        """The same tensors under other options."""
        other = replace(self, options=options)
        for name in ("hidden", "weight", "bias", "target", "noise", "seed"):
            setattr(other, name, getattr(self, name))
        return other


@dataclass
class Result:
    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    log_z: Tensor | None


def leaf(tensor: Tensor | None) -> Tensor | None:
    """A leaf that requires a gradient, with the strides of the tensor."""
    return None if tensor is None else tensor.detach().requires_grad_()


def run(case: Case, backend: str, upstream: Tensor | None = None, **more: Any) -> Result:
    """The library's loss and every gradient."""
    options = {"seed": case.seed, **case.options, **more, "backend": backend}
    hidden, weight, bias = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
    log_z = options.get("log_z")
    if isinstance(log_z, Tensor):
        options["log_z"] = log_z = leaf(log_z)
    loss = functional.nce_loss(hidden, weight, case.target, case.noise, case.negatives, bias=bias, **options)
    loss.backward(upstream if upstream is not None or loss.dim() == 0 else torch.ones_like(loss))
    return Result(
        loss.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad,
        log_z.grad if isinstance(log_z, Tensor) else None,
    )  # fmt: skip


def as_rows(values: Tensor, n: int, k: int) -> Tensor:
    """[1, k] of what all examples share, else [n, k]."""
    return values.reshape(1 if values.numel() != n * k or n == 1 else n, k)


def truth(case: Case, upstream: Tensor | None = None, **more: Any) -> oracle.Truth:
    """The oracle's answer, for the negatives that the seed draws (or the given ones)."""
    options = {**case.options, **more}
    options.pop("sparse", None)
    lead = case.hidden.shape[:-1]
    n = lead.numel()
    shared, negatives, log_q = options.pop("shared", False), options.pop("negatives", None), options.pop("log_q", None)
    target = case.target.reshape(n, -1).long() if n else torch.empty((0, 1), dtype=torch.int64)
    if negatives is None:
        k = case.negatives
        negatives = case.noise.sample((1 if shared else n, k), seed=options.pop("seed", case.seed))
    else:
        options.pop("seed", None)
        k = negatives.shape[-1]
    ignore = options.get("ignore_index", -100)
    negatives = as_rows(negatives.long(), n, k)
    log_q_of = lambda ids: case.noise.log_prob(torch.where(ids == ignore, 0, ids)).double()  # noqa: E731
    if log_q is None:
        target_log_q, negative_log_q = log_q_of(target), case.noise.log_prob(negatives).double()
    else:
        target_log_q = log_q[0].double().reshape(target.shape)
        negative_log_q = as_rows(log_q[1].double(), n, k)
    for name in ("sample_weight", "log_z"):
        if isinstance(options.get(name), Tensor):
            value = as_float64(options[name])
            options[name] = value.reshape(-1) if value.ndim else float(value)
    return oracle.nce(
        as_float64(case.hidden).reshape(n, case.hidden.shape[-1]),
        as_float64(case.weight),
        target.tolist(),
        negatives.expand(n, k).tolist(),
        bias=None if case.bias is None else as_float64(case.bias),
        target_log_q=target_log_q.tolist(),
        negative_log_q=negative_log_q.expand(n, k).tolist(),
        upstream=None if upstream is None else as_float64(upstream).reshape(-1),
        **options,
    )


def assert_matches(case: Case, backend: str, upstream: Tensor | None = None, **more: Any) -> None:
    """Loss and all gradients agree with the oracle to the rounding of their dtypes."""
    got, (value, scale) = run(case, backend, upstream, **more), truth(case, upstream, **more)
    compute = torch.float64 if case.weight.dtype == torch.float64 else torch.float32
    dtypes = {"loss": compute, "hidden": case.hidden.dtype, "weight": case.weight.dtype, "bias": case.weight.dtype}
    for name, dtype in dtypes.items():
        tensor, exact = getattr(got, name), getattr(value, name)
        if name == "bias" and case.bias is None:
            assert tensor is None
            continue
        assert tensor.dtype == dtype
        assert_close(tensor, exact.reshape(tensor.shape), dtype, name, getattr(scale, name))
    if got.log_z is not None:
        per_example = got.log_z.dim() > 0
        exact, size = (v.log_z if per_example else v.log_z.sum() for v in (value, scale))
        assert_close(got.log_z, exact.reshape(got.log_z.shape), got.log_z.dtype, "log_z", size)
