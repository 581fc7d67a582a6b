"""The shapes that are timed, as named data, and the tensors made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

import nce_ext


@dataclass(frozen=True)
class Case:
    """One training step: ``batch`` hidden vectors of ``dim`` numbers, each with its own ``negatives``."""

    name: str
    batch: int
    dim: int
    negatives: int
    classes: int
    at_least: Mapping[str, float] = field(default_factory=dict)  # baseline -> the speed-up to reach

    def smaller(self) -> Case:
        """An eighth of the examples and classes, for a run that only shows that everything works."""
        return replace(self, batch=self.batch // 8, classes=self.classes // 8, at_least={})

    def sizes(self) -> dict[str, int]:
        return {"B": self.batch, "D": self.dim, "k": self.negatives, "V": self.classes}


STEPS = (
    Case("small rows", 8192, 128, 5, 100_000, {"coalesced": 5, "sparse": 2.5}),
    Case("long rows", 8192, 300, 20, 300_000, {"coalesced": 9, "sparse": 5}),
    Case("many negatives", 1024, 64, 1024, 1_000_000, {"coalesced": 6, "sparse": 4}),
)
NOISES = ("uniform", "zipf")

# Tables well beyond any last-level cache: the rows come from memory, as they do with a large vocabulary.
TABLE_FLOATS = 300 * 2**20
GATHER_DIMS = (256, 300, 512, 1024)
GATHER_BATCH, GATHER_NEGATIVES = 32_768, 20  # so many that the fixed cost of a call does not count

SOFTMAX_BATCH, SOFTMAX_DIM, SOFTMAX_CHUNK = 1024, 128, 256
BREAK_EVEN_NEGATIVES = (5, 20, 100)
BREAK_EVEN_CLASSES = (100, 300, 1_000, 3_000, 10_000)
LARGE_SOFTMAX_CLASSES = (100_000, 1_000_000)  # at LARGE_SOFTMAX_NEGATIVES only: a step takes seconds
LARGE_SOFTMAX_NEGATIVES = 20

SAMPLER_CLASSES = (1_000, 100_000, 1_000_000, 10_000_000)
MULTINOMIAL_LIMIT = 2**24
MEMORY_CLASSES = (10_000, 100_000, 1_000_000, 10_000_000)
MEMORY_CASE = Case("memory", 8192, 64, 20, MEMORY_CLASSES[0])


def zipf(classes: int) -> nce_ext.noise.Unigram:
    """The law of words in text, give or take: the r-th most frequent has probability in proportion to 1 / r."""
    return nce_ext.noise.Unigram(1 / torch.arange(1, classes + 1, dtype=torch.float64), power=1.0)


def make_noise(law: str, classes: int) -> nce_ext.noise.Noise:
    return zipf(classes) if law == "zipf" else nce_ext.noise.Uniform(classes)


@dataclass
class Problem:
    """A case with its tensors. Every program that is compared reads these same ones."""

    case: Case
    law: str
    noise: nce_ext.noise.Noise
    hidden: Tensor
    weight: nn.Parameter
    target: Tensor

    @classmethod
    def make(cls, case: Case, law: str) -> Problem:
        generator = torch.Generator().manual_seed(20)
        noise = make_noise(law, case.classes)
        weight = torch.empty(case.classes, case.dim).uniform_(-0.1, 0.1, generator=generator)
        hidden = torch.empty(case.batch, case.dim).uniform_(-1, 1, generator=generator)
        target = noise.sample((case.batch,), generator=generator)
        return cls(case, law, noise, hidden.requires_grad_(), nn.Parameter(weight), target)

    def params(self) -> dict[str, object]:
        return {**self.case.sizes(), "noise": self.law}

    def loss(self, *, seed: Tensor | None = None, sparse: bool = True) -> Tensor:
        # Without a bias, whose sparse gradient costs eager PyTorch far more than it costs the fused kernels.
        return nce_ext.functional.nce_loss(
            self.hidden, self.weight, self.target, self.noise, self.case.negatives, sparse=sparse, seed=seed
        )

    def step(self) -> None:
        self.loss().backward()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Inside every timed step: each program pays for freeing what it allocates."""
        self.hidden.grad = self.weight.grad = None


def describe(case: Case) -> str:
    """``(8192, 128, 5, 100k)``: the sizes B, D, k, V as the tables print them."""
    sizes = asdict(case)
    return f"({sizes['batch']}, {sizes['dim']}, {sizes['negatives']}, {short(sizes['classes'])})"


def short(number: int) -> str:
    """100k for 100 000, 10M for 10 000 000."""
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{letter}"
    return str(number)
