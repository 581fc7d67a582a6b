"""Update rules as optimizers: their constructors and defaults, and which states each of them keeps."""

from __future__ import annotations

import math
from typing import Any

import torch

from nce_ext.optim.row_optimizer import RowOptimizer
from nce_ext.reference.row_step import ADAGRAD, ADAM, ROWWISE_ADAGRAD, Hyperparameters
from nce_ext.reference.row_step import SGD as SGD_RULE

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RowwiseAdagrad"]


class SGD(RowOptimizer, torch.optim.SGD):
    """``torch.optim.SGD``, with momentum, Nesterov's and weight decay for sparse gradients too.

    The lazy rule, for a touched row w of gradient g::

        g = g + weight_decay * w
        buffer = g if first touch else momentum * buffer + (1 - dampening) * g
        w -= lr * (g + momentum * buffer if nesterov else buffer)

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused: torch's.
        rounding, generator: of 16-bit weights, see :mod:`nce_ext.optim`.

    Raises:
        ValueError: a sparse gradient with ``differentiable=True``, or with more than one sparse dimension; a step that
            raises has changed nothing.
    """

    _dense_optimizer = torch.optim.SGD
    _dense_steps_count = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        rounding: str = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._options_of_rows(rounding, generator)

    def _tables(self, group: dict[str, Any]) -> tuple[str | None, str | None]:
        return ("momentum_buffer" if group["momentum"] else None), None

    def _counts_touches(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"])

    def _hyperparameters(self, group: dict[str, Any], state: dict[str, Any]) -> Hyperparameters:
        return Hyperparameters(
            SGD_RULE, int(state["step"]), float(group["lr"]), float(group["weight_decay"]), momentum=group["momentum"],
            dampening=group["dampening"], nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip


class Adagrad(RowOptimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad``, with weight decay for sparse gradients too.

    The lazy rule is torch's, for a touched row: ``g += weight_decay * w; sum += g * g; w -= lr / (1 + (step - 1) *
    lr_decay) * g / (sqrt(sum) + eps)``, step counting all steps. Duchi et al., JMLR 2011.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize, differentiable, fused:
            torch's.
        rounding, generator: of 16-bit weights, see :mod:`nce_ext.optim`.

    Raises: as :class:`SGD`.
    """

    _dense_optimizer = torch.optim.Adagrad

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rounding: str = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize=maximize,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._options_of_rows(rounding, generator)

    def _tables(self, group: dict[str, Any]) -> tuple[str | None, str | None]:
        return None, "sum"

    def _initial(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def _hyperparameters(self, group: dict[str, Any], state: dict[str, Any]) -> Hyperparameters:
        return adagrad_hyperparameters(ADAGRAD, group, state)


def adagrad_hyperparameters(rule: int, group: dict[str, Any], state: dict[str, Any]) -> Hyperparameters:
    """Collect what a step of either Adagrad takes besides tensors; the decay of its rate is applied here."""
    step = int(state["step"])
    rate = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
    return Hyperparameters(rule, step, rate, group["weight_decay"], eps=group["eps"], maximize=group["maximize"])


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row: a state of 4 bytes a row where Adam's takes 8 an element.

    For every row that has a gradient, sparse or dense::

        g = g + weight_decay * w
        sum += (g * g).mean()
        w -= lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)

    Rows are those of the first dimension; each element of a vector is a row, whose rule then is Adagrad's. It is the
    usual choice for embedding tables too large for more (Mudigere et al., ISCA 2022; Lerer et al., MLSys 2019).

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as ``torch.optim.Adagrad``'s.
        rounding, generator: of 16-bit weights, see :mod:`nce_ext.optim`.

    Raises:
        ValueError: a learning rate, decay, accumulator or eps below 0; a gradient with more than one sparse dimension.
    """

    _one_number_a_row = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        rounding: str = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value,
            eps=eps, maximize=maximize,
        )  # fmt: skip
        for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            if not 0 <= defaults[name] < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {defaults[name]!r}")
        super().__init__(params, defaults)
        self._options_of_rows(rounding, generator)

    def _steps_by_rows(self, p: torch.Tensor, state: dict[str, Any] | None) -> bool:
        return True

    def _tables(self, group: dict[str, Any]) -> tuple[str | None, str | None]:
        return None, "sum"

    def _initial(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def _hyperparameters(self, group: dict[str, Any], state: dict[str, Any]) -> Hyperparameters:
        return adagrad_hyperparameters(ROWWISE_ADAGRAD, group, state)


class _LazyAdam(RowOptimizer):
    """Base class of Adam and AdamW: a first and a second moment for every element, moved where a row is touched."""

    def _options_of_adam(self, bias_correction: str, rounding: str, generator: torch.Generator | None) -> None:
        """Complete the constructor of torch's optimizer by options that it does not know."""
        self._options_of_rows(rounding, generator, bias_correction=bias_correction)

    def _tables(self, group: dict[str, Any]) -> tuple[str | None, str | None]:
        return "exp_avg", "exp_avg_sq"

    def _counts_touches(self, group: dict[str, Any]) -> bool:
        return bool(group["bias_correction"] == "row")

    def _refusal(self, group: dict[str, Any]) -> str | None:
        if group["amsgrad"]:
            return "amsgrad must be False for sparse gradients, got True"
        return super()._refusal(group)

    def _decays(self, group: dict[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"] and group["weight_decay"])

    def _hyperparameters(self, group: dict[str, Any], state: dict[str, Any]) -> Hyperparameters:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        coupled = 0.0 if group["decoupled_weight_decay"] else float(group["weight_decay"])
        return Hyperparameters(
            ADAM, int(state["step"]), float(group["lr"]), coupled, log_decay=float(state.get("log_decay", 0)),
            beta1=beta1, beta2=beta2, eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip


class Adam(_LazyAdam, torch.optim.Adam):
    """``torch.optim.Adam`` with lazy moments for sparse gradients.

    The lazy rule, for a touched row w of gradient g::

        g = g + weight_decay * w
        m += (1 - beta1) * (g - m); v = beta2 * v + (1 - beta2) * g * g
        w -= lr / (1 - beta1**t) * m / (sqrt(v / (1 - beta2**t)) + eps)

    with t the number of the row's own touches, which makes m and v unbiased averages of the gradients the row has had;
    or, with ``bias_correction="global"``, that of all steps, as in ``torch.optim.SparseAdam``: the first steps on a
    rare row are then larger, by up to (1 - beta1) / sqrt(1 - beta2), 3.2 by default. Kingma and Ba, ICLR 2015.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: torch's; ``amsgrad`` and ``differentiable`` are refused for sparse gradients.
        bias_correction: "row" or "global".
        rounding, generator: of 16-bit weights, see :mod:`nce_ext.optim`.

    Raises: as :class:`SGD`; ValueError: ``lr * weight_decay`` of 1 or more where the decay is decoupled.
    """

    _dense_optimizer = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: str = "row",
        rounding: str = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._options_of_adam(bias_correction, rounding, generator)


class AdamW(_LazyAdam, torch.optim.AdamW):
    """``torch.optim.AdamW`` with lazy moments for sparse gradients, and a decay that is late but exact.

    The lazy rule is :class:`Adam`'s without the coupled decay. A touched row is first multiplied by the product of
    ``1 - lr * weight_decay`` over all steps since it was last touched; :meth:`catch_up` does that for all rows. Every
    row is then decayed exactly as in torch. Loshchilov and Hutter, ICLR 2019.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: torch's;
            ``amsgrad`` and ``differentiable`` are refused for sparse gradients.
        bias_correction, rounding, generator: as :class:`Adam`'s.

    Raises: as :class:`Adam`.
    """

    _dense_optimizer = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: str = "row",
        rounding: str = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._options_of_adam(bias_correction, rounding, generator)
