"""A loss whose optimizer is fused next to the same loss with gradients, clipping and an optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from objective_cases import LOSSES
from optim_cases import assert_same, make
from torch import Tensor, nn

import nce_ext

MODULES = {
    "nce_loss": nce_ext.NCELoss,
    "negative_sampling_loss": nce_ext.NegativeSamplingLoss,
    "sampled_softmax_loss": nce_ext.SampledSoftmaxLoss,
}


def loss_of(name: str, case: Case, **options: Any) -> nn.Module:
    """The module of this name with the weight and the bias of the case."""
    function, own = LOSSES[name]
    loss_fn = MODULES[function](
        case.dim, case.classes, case.noise, case.negatives,
        **{"bias": case.bias is not None, "dtype": case.dtype, "sparse": True, **own, **case.options, **options},
    )  # fmt: skip
    with torch.no_grad():
        loss_fn.weight.copy_(case.weight)
        if case.bias is not None:
            loss_fn.bias.copy_(case.bias)
    return loss_fn


def rows_of(loss_fn: nn.Module) -> list[nn.Parameter]:
    return [p for p in (loss_fn.weight, loss_fn.bias) if p is not None]


class Twins:
    """``fused`` and ``plain`` start alike; ``handle`` is the fused one's."""

    def __init__(
        self,
        name: str,
        case: Case,
        optimizer: str = "AdamW, all",
        *,
        fuse: dict[str, Any] | None = None,
        rates: dict[str, Any] | None = None,
        encoder: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.case = case
        self.fused, self.plain = (loss_of(name, case, **options) for _ in range(2))
        self.encoders = [nn.Identity(), nn.Identity()]
        if encoder is not None:
            self.encoders = [encoder, nn.Linear(encoder.in_features, encoder.out_features, dtype=case.dtype)]
            self.encoders[1].load_state_dict(encoder.state_dict())
        self.optimizers = [
            make(optimizer, [*loss_fn.parameters(), *encoder.parameters()], **(rates or {}))
            for loss_fn, encoder in zip((self.fused, self.plain), self.encoders, strict=True)
        ]
        self.max_norm = (fuse or {}).get("max_norm")
        self.handle = self.fused.fuse_optimizer(self.optimizers[0], **(fuse or {}))

    def backward(self, which: int, hidden: Tensor, target: Tensor, upstream: Tensor | None = None, **call: Any) -> Any:
        """Loss and gradient of hidden, 0 for the fused loss and 1 for the plain one."""
        hidden = hidden.detach().requires_grad_(call.pop("learns", True))
        loss = (self.fused, self.plain)[which](self.encoders[which](hidden), target, **call)
        loss.backward(upstream)
        return loss.detach(), hidden.grad

    def step_plain(self) -> None:
        if self.max_norm is not None:
            nce_ext.utils.clip_grad_norm_(rows_of(self.plain), self.max_norm)
        self.step(1)

    def step(self, which: int) -> None:
        """What a training loop does after backward."""
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()

    def backward_both(self, *given: Any, exact: bool = True, **call: Any) -> None:
        """Losses and gradients of hidden are the same to the last bit, or to rounding."""
        for one, other in zip(*(self.backward(which, *given, **call) for which in (0, 1)), strict=True):
            if exact or one is None:
                assert_same(one, other)
            else:
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)

    def both(self, *given: Any, **call: Any) -> None:
        """One training step of each."""
        self.backward_both(*given, **call)
        assert all(p.grad is None for p in rows_of(self.fused))
        self.step(0)
        self.step_plain()

    def assert_same(self, state: bool = True) -> None:
        """Weights and state, to the last bit."""
        assert_same(list(self.fused.parameters()), list(self.plain.parameters()))
        assert_same(list(self.encoders[0].parameters()), list(self.encoders[1].parameters()))
        if state:
            assert_same(*(optimizer.state_dict() for optimizer in self.optimizers))

    def assert_close(self, tolerance: float = 1e-13) -> None:
        """Weights, of float64, to rounding; their order of magnitude is 1."""
        for p, q in zip(self.fused.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)

    def moved(self) -> bool:
        return not torch.equal(self.fused.weight, self.case.weight)


def batches(case: Case, *sizes: int) -> list[dict[str, Any]]:
    """hidden, target and seed of fresh batches of these sizes."""
    shape = (case.positives,) if case.positives else ()
    made = []
    for size in sizes:
        target = torch.randint(case.classes, (size, *shape))
        if case.pad:
            target = torch.where(torch.rand(target.shape) < 0.3, -100, target)
        hidden = torch.randn(size, case.dim, dtype=torch.float64).to(case.hidden.dtype)
        made.append({"hidden": hidden, "target": target, "seed": torch.randint(2**62, (2,))})
    return made
