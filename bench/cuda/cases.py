"""The shapes that are timed on a GPU, as named data, and the tensors made from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import nn

import nce_ext
from bench.cases import Case, Problem, describe, make_noise

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
EAGER, COMPILED = 5, 3  # the speed-ups to reach


@dataclass(frozen=True)
class DeviceCase(Case):
    """A training step whose table and hidden vectors are of ``dtype``."""

    dtype: torch.dtype = torch.float32

    def smaller(self) -> DeviceCase:
        """So small that a run on a CPU shows in seconds that everything works."""
        return replace(
            self,
            batch=32,
            dim=min(self.dim, 64),
            negatives=min(self.negatives, 8),
            classes=min(self.classes, 2000),
            at_least={},
        )

    @property
    def pairs(self) -> int:
        return self.batch * (1 + self.negatives)

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        return self.classes * self.row_bytes

    def params(self, law: str) -> dict[str, object]:
        return {**self.sizes(), "dtype": DTYPES[self.dtype], "noise": law}

    def work(self, law: str) -> str:
        sizes = describe(self).strip("()").replace(", ", ",")
        return f"{sizes} {DTYPES[self.dtype]} {law}"


STEPS = (
    DeviceCase("word2vec, small batch", 16_384, 128, 5, 100_000, {"coalesced": EAGER}),
    DeviceCase("word2vec", 65_536, 128, 5, 1_000_000, {"coalesced": EAGER, "compiled": COMPILED}),
    DeviceCase("word2vec, long rows", 65_536, 300, 20, 1_000_000, {"coalesced": EAGER}),
    DeviceCase(
        "language model", 8192, 1024, 64, 128_000, {"coalesced": EAGER, "compiled": COMPILED}, dtype=torch.bfloat16
    ),
    DeviceCase("large language model", 8192, 4096, 64, 128_000, {"coalesced": EAGER}, dtype=torch.bfloat16),
    DeviceCase("recommender", 8192, 128, 1024, 10_000_000, {"coalesced": EAGER}),
    DeviceCase("recommender", 8192, 128, 1024, 10_000_000, {"coalesced": EAGER}, dtype=torch.bfloat16),
)
SMALL_BATCH, WORD2VEC, LONG_ROWS, LANGUAGE_MODEL = STEPS[:4]
COMPILED_STEPS = (WORD2VEC, LANGUAGE_MODEL)
HOGWILD_STEPS = (WORD2VEC, LONG_ROWS)
CONTEXTS_PER_WORD = 6  # (centre, context) pairs that word2vec makes of a word of running text, give or take

GIB = 2**30
ROW_BYTES = (256, 512, 1024, 2048, 4096, 8192, 16_384)
FORWARD_NEGATIVES = (64, 20)
FORWARD_TABLE_BYTES = 8 * GIB  # two orders of magnitude beyond the L2 cache
FORWARD_READ_BYTES = 8 * GIB  # a call then takes milliseconds, of which the launches are a percent
ZIPF_ROWS = 1_000_000  # as in the ceilings

SOFTMAX_STEPS = tuple(
    DeviceCase("full softmax", 8192, 256, 64, 1_000_000, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
)
SOFTMAX_CHUNK = 1024  # examples

DRAWS = 2**26
DRAW_COLUMNS = 64
ALIAS_CLASSES = (1_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
ALIAS_GOAL, ALIAS_GOAL_CLASSES = 60, 1_000_000  # G draws a second, and up to which V
ALIAS_BUILD_LIMIT = 5  # seconds


@functools.lru_cache(maxsize=6)
def device_noise(law: str, classes: int, device: torch.device) -> nce_ext.noise.Noise:
    """An alias table of many millions of classes takes seconds to build."""
    return make_noise(law, classes).to(device)


def fill(t: torch.Tensor, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform in -bound .. bound, a part at a time: no number of elements is too large."""
    for part in t.view(-1).split(2**28):
        part.uniform_(-bound, bound, generator=generator)
    return t


def make_problem(case: DeviceCase, law: str, device: torch.device, weight: torch.Tensor | None = None) -> Problem:
    generator = torch.Generator(device).manual_seed(20)
    noise = device_noise(law, case.classes, device)
    if weight is None:
        weight = fill(torch.empty(case.classes, case.dim, dtype=case.dtype, device=device), 0.1, generator)
    hidden = fill(torch.empty(case.batch, case.dim, dtype=case.dtype, device=device), 1, generator)
    target = noise.sample((case.batch,), generator=generator)
    return Problem(case, law, noise, hidden.requires_grad_(), nn.Parameter(weight), target)
