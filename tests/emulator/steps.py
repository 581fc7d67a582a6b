"""Tables with the state of an optimizer, and what a step must leave of them, by textbook formulas."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import draws
import emulated
import numpy as np
from emulated import compute_dtype, stored, widened
from rounding import assert_rounded

SGD, ADAGRAD, ROWWISE, ADAM = 0, 1, 2, 3
NAMES = ("weight", "first", "second", "row_steps", "decayed", "master")
Wide = np.longdouble

MOMENTUM = {"rule": SGD, "momentum": 0.9, "first": True}
ADAM_NUMBERS = {"rule": ADAM, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "first": True, "second": True}
ADAGRAD_NUMBERS = {"rule": ADAGRAD, "eps": 1e-10, "second": True}
ROWWISE_NUMBERS = {"rule": ROWWISE, "eps": 1e-10, "second": True}

# Fields of Table.
RULES: dict[str, dict[str, Any]] = {
    "SGD": {"rule": SGD},
    "SGD, coupled decay": {"rule": SGD, "weight_decay": 0.1},
    "SGD, decoupled decay, maximize": {"rule": SGD, "decoupled": True, "maximize": True},
    "momentum": MOMENTUM,
    "momentum, first touches, dampening": {**MOMENTUM, "dampening": 0.3, "counted": True},
    "Nesterov, coupled decay, maximize": {**MOMENTUM, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    "Nesterov, first touches, decoupled": {**MOMENTUM, "nesterov": True, "counted": True, "decoupled": True},
    "Adagrad": ADAGRAD_NUMBERS,
    "Adagrad, coupled decay, scale": {**ADAGRAD_NUMBERS, "weight_decay": 0.1, "scaled": True},
    "row-wise Adagrad": ROWWISE_NUMBERS,
    "row-wise Adagrad, coupled decay, maximize": {**ROWWISE_NUMBERS, "weight_decay": 0.1, "maximize": True},
    "row-wise Adagrad, decoupled decay, scale": {**ROWWISE_NUMBERS, "decoupled": True, "scaled": True},
    "Adam": ADAM_NUMBERS,
    "Adam, rows' steps, coupled decay": {**ADAM_NUMBERS, "counted": True, "weight_decay": 0.1},
    "Adam, rows' steps, decoupled decay, scale": {**ADAM_NUMBERS, "counted": True, "decoupled": True, "scaled": True},
    "Adam, maximize": {**ADAM_NUMBERS, "maximize": True},
}


@dataclass
class Table:
    rows: int = 20
    dim: int = 12
    dtype: str = "float32"
    rule: int = SGD
    step: int = 7
    rate: float = 0.05
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    first: bool = False
    second: bool = False
    counted: bool = False  # rows count their own steps
    decoupled: bool = False
    mastered: bool = False
    scaled: bool = False
    seed: tuple[int, int] | None = None  # of the rounding
    gap: int = 0  # elements between rows of the weight
    lead: int = 0  # and before them
    contents: int = 0
    arrays: dict[str, np.ndarray | None] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng([self.contents, 5])
        compute, shape = compute_dtype(self.dtype), (self.rows, self.dim)
        full = random.standard_normal(shape)
        weight = emulated.lay_out(stored(full, self.dtype), self.dim + self.gap, self.lead)
        steps = random.integers(0, 4, self.rows).astype(np.int32) if self.counted else None
        first = random.standard_normal(shape).astype(compute) / 3 if self.first else None
        second = None
        if self.second:
            second = random.random(self.rows if self.rule == ROWWISE else shape).astype(compute) / 3
        if steps is not None:
            for state in (first, second):
                if state is not None:
                    state[steps == 0] = 0
        self.log_decay = -0.3 if self.decoupled else 0.0
        self.arrays = {
            "weight": weight,
            "first": first,
            "second": second,
            "row_steps": steps,
            "decayed": self.log_decay * random.random(self.rows) if self.decoupled else None,
            "master": full.astype(np.float32) if self.mastered else None,
        }
        self.scale = np.array([0.75], compute) if self.scaled else None

    @property
    def numbers(self) -> dict[str, Any]:
        names = (
            "rule", "step", "rate", "weight_decay", "log_decay", "momentum", "dampening", "beta1", "beta2", "eps",
            "nesterov", "maximize",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def state(self) -> list[np.ndarray | None]:
        seed = None if self.seed is None else np.array(self.seed, np.int64)
        return [self.arrays[name] for name in NAMES[1:]] + [self.scale, seed]

    def copy(self) -> Table:
        """The same values, laid out the same."""
        other = copy.copy(self)
        other.arrays = {name: None if a is None else a.copy() for name, a in self.arrays.items()}
        other.arrays["weight"] = emulated.lay_out(self.arrays["weight"], self.dim + self.gap, self.lead)
        return other

    def take_step(self, gradient: np.ndarray, classes: np.ndarray | None, **launch: Any) -> None:
        emulated.kernels().row_step(self.arrays["weight"], self.state, gradient, classes, **self.numbers, **launch)

    def take_fused_step(self, pairs: Any, **launch: Any) -> dict[str, np.ndarray]:
        operands = (pairs.ids, pairs.dlogit, pairs.grad_loss, pairs.hidden)
        return emulated.kernels().row_grad_step(*operands, self.arrays["weight"], self.state, **self.numbers, **launch)

    def bits(self) -> dict[str, bytes]:
        return {name: a.tobytes() for name, a in self.arrays.items() if a is not None}

    def expected(self, classes: np.ndarray, gradient: np.ndarray, size: np.ndarray) -> dict[str, tuple]:
        """Values of the rows `classes` after a step, and their scales; `size` is the scale of the gradient."""
        old = {name: None if a is None else widened(a)[classes].astype(Wide) for name, a in self.arrays.items()}
        w = old["weight"] if old["master"] is None else old["master"]
        factor = Wide(1 if self.scale is None else float(self.scale[0]))
        sign = -1 if self.maximize else 1
        g = sign * factor * gradient + Wide(self.weight_decay) * w
        size = factor * size + Wide(self.weight_decay) * np.abs(w)
        if old["decayed"] is not None:
            w = w * np.exp(Wide(self.log_decay) - old["decayed"])[:, None]
        touches = Wide(self.step) if old["row_steps"] is None else (old["row_steps"] + 1)[:, None]
        result: dict[str, tuple] = {}

        def root_error(state, state_size, power):
            """Of state^-power."""
            return np.abs(state_size * power * np.maximum(state, 1e-300) ** (-power - 1))

        if self.rule == SGD:
            move, move_size = g, size
            if old["first"] is not None:
                taken = 1 - self.dampening
                if old["row_steps"] is not None:
                    taken = np.where(touches == 1, 1.0, taken)
                momentum = self.momentum
                b, b_size = momentum * old["first"] + taken * g, momentum * np.abs(old["first"]) + taken * size
                result["first"] = (b, b_size)
                move, move_size = (g + momentum * b, size + momentum * b_size) if self.nesterov else (b, b_size)
            rate = Wide(self.rate)
        elif self.rule == ADAM:
            one, two = Wide(self.beta1), Wide(self.beta2)
            m = one * old["first"] + (1 - one) * g
            # As first + (1 - beta1) (g - first), whose parts are no larger than these.
            m_size = np.abs(old["first"]) + (1 - one) * size
            v, v_size = two * old["second"] + (1 - two) * g**2, two * old["second"] + 2 * (1 - two) * np.abs(g) * size
            result["first"], result["second"] = (m, m_size), (v, v_size)
            right = np.sqrt(v / (1 - two**touches)) + self.eps
            move = m / right
            move_size = m_size / right + np.abs(m) * (v_size / np.maximum(v, 1e-300)) / right
            if self.dtype == "float64":  # 1 - beta^t is, too: of what it leaves, a rounding of beta^t is more
                move_size += (
                    np.abs(move) * 6 / 32 * (one**touches / (1 - one**touches) + two**touches / (1 - two**touches))
                )
            rate = self.rate / (1 - one**touches)
        else:
            squares, squares_size = g**2, 2 * np.abs(g) * size
            if self.rule == ROWWISE:
                squares, squares_size = squares.mean(1), squares_size.mean(1)
            s, s_size = old["second"] + squares, old["second"] + squares_size
            result["second"] = (s, s_size)
            if self.rule == ROWWISE:
                s, s_size = s[:, None], s_size[:, None]
            right = np.sqrt(s) + self.eps
            move, move_size = g / right, size / right + np.abs(g) * root_error(s, s_size, 0.5)
            rate = Wide(self.rate)
        result["weight"] = (w - rate * move, np.abs(w) + rate * move_size)
        if old["master"] is not None:
            result["master"] = result["weight"]
        return result

    def check(self, before: Table, classes: np.ndarray, gradient: np.ndarray, size: np.ndarray | None = None) -> None:
        """Rows of `classes` to rounding, all others bit for bit."""
        gradient = gradient.astype(Wide)
        truth = before.expected(classes, gradient, np.abs(gradient) if size is None else size.astype(Wide))
        others = np.setdiff1d(np.arange(self.rows), classes)
        compute = compute_dtype(self.dtype)
        for name, array in self.arrays.items():
            if array is None:
                continue
            assert array[others].tobytes() == before.arrays[name][others].tobytes(), name
            if name == "row_steps":
                assert np.array_equal(array[classes], before.arrays[name][classes] + 1)
            elif name == "decayed":
                assert (array[classes] == self.log_decay).all()
            else:
                value, scale = truth[name]
                dtype = self.dtype if name == "weight" else compute
                got = widened(array[classes])
                assert_rounded(got, value.astype(np.float64), dtype, name, scale.astype(np.float64))


def random_bits(seed: tuple[int, int], rows: np.ndarray, dim: int) -> np.ndarray:
    """16 bits for each element: Philox of (d // 8, row), whose words serve two elements each, the lower half first."""
    key, nonce = (int(word) % (1 << 64) for word in seed)
    row, d = np.meshgrid(rows.astype(np.uint64), np.arange(dim, dtype=np.uint64), indexing="ij")
    word = draws.WORD
    words = draws.philox4x32([d // np.uint64(8), row, nonce & word, nonce >> 32], [key & word, key >> 32])
    half = d % np.uint64(8)
    chosen = np.choose((half // np.uint64(2)).astype(int), words)
    return ((chosen >> (np.uint64(16) * (half % np.uint64(2)))) & np.uint64(0xFFFF)).astype(np.int64)


def rounded_at_random(values: np.ndarray, bits: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as dtype: away from zero where the part that is cut off and the random bits add up to 1."""
    magnitude = np.abs(values).astype(np.float64)
    exponent = np.floor(np.log2(np.where(magnitude > 0, magnitude, 1.0)))
    digits, smallest = (8, -126) if dtype == "bfloat16" else (11, -14)
    unit = 2.0 ** (np.maximum(exponent, smallest) - digits + 1)
    whole = np.floor(magnitude / unit)
    cut = magnitude / unit - whole
    if dtype == "bfloat16":
        up = cut + bits / 65536 >= 1
    else:
        up = np.where(exponent < smallest, bits / 65536 < cut, cut + (bits >> 3) / 8192 >= 1)
    return stored(np.copysign((whole + up) * unit, values), dtype)
