"""The lazy rules of nce_ext.optim in numpy float64, row by row, as their docstrings have them."""

from __future__ import annotations

import numpy as np

DEFAULTS = {
    "SGD": {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False},
    "Adagrad": {"lr": 1e-2, "lr_decay": 0, "weight_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10},
    "RowwiseAdagrad": {"lr": 1e-2, "lr_decay": 0, "weight_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10},
    "Adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "decoupled_weight_decay": False},
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "decoupled_weight_decay": True},
}


class Oracle:
    """A table and its optimizer. ``step`` takes the gradient of each touched row; ``options`` may change between."""

    def __init__(self, rule: str, weight: np.ndarray, **options) -> None:
        self.rule, self.options = rule, {"bias_correction": "row", "maximize": False, **DEFAULTS[rule], **options}
        assert set(self.options) == {"bias_correction", "maximize", *DEFAULTS[rule]}
        self.weight = np.array(weight, np.float64)
        start = self.options.get("initial_accumulator_value", 0)
        self.first = np.zeros_like(self.weight)
        self.second = np.full_like(self.weight, start)
        self.row_second = np.full(len(self.weight), start, np.float64)
        self.touches = np.zeros(len(self.weight), int)
        self.missed = np.ones(len(self.weight))
        self.steps = 0

    def step(self, gradient: dict[int, np.ndarray]) -> None:
        self.steps += 1
        if self.options.get("decoupled_weight_decay"):
            self.missed *= 1 - self.options["lr"] * self.options["weight_decay"]
        for row, g in gradient.items():
            self.touches[row] += 1
            g = np.asarray(g, np.float64) * (-1 if self.options["maximize"] else 1)
            if self.options.get("decoupled_weight_decay"):
                self._decay(row)
            else:
                g = g + self.options["weight_decay"] * self.weight[row]
            self.weight[row] -= getattr(self, "_" + self.rule.removesuffix("W").lower())(row, g)

    def catch_up(self) -> None:
        for row in range(len(self.weight)):
            self._decay(row)

    def _decay(self, row: int) -> None:
        self.weight[row] *= self.missed[row]
        self.missed[row] = 1

    def _sgd(self, row: int, g: np.ndarray) -> np.ndarray:
        momentum = self.options["momentum"]
        if momentum == 0:
            return self.options["lr"] * g
        if self.touches[row] == 1:
            self.first[row] = g
        else:
            self.first[row] = momentum * self.first[row] + (1 - self.options["dampening"]) * g
        return self.options["lr"] * (g + momentum * self.first[row] if self.options["nesterov"] else self.first[row])

    def _adagrad(self, row: int, g: np.ndarray) -> np.ndarray:
        self.second[row] += g * g
        return self._rate() * g / (np.sqrt(self.second[row]) + self.options["eps"])

    def _rowwiseadagrad(self, row: int, g: np.ndarray) -> np.ndarray:
        self.row_second[row] += np.mean(g * g)
        return self._rate() * g / (np.sqrt(self.row_second[row]) + self.options["eps"])

    def _rate(self) -> float:
        return self.options["lr"] / (1 + (self.steps - 1) * self.options["lr_decay"])

    def _adam(self, row: int, g: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.options["betas"]
        t = self.touches[row] if self.options["bias_correction"] == "row" else self.steps
        self.first[row] = beta1 * self.first[row] + (1 - beta1) * g
        self.second[row] = beta2 * self.second[row] + (1 - beta2) * g * g
        unbiased = self.first[row] / (1 - beta1**t), self.second[row] / (1 - beta2**t)
        return self.options["lr"] * unbiased[0] / (np.sqrt(unbiased[1]) + self.options["eps"])
