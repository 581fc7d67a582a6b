"""A user's program under mypy --strict: what is right passes, and a misspelled option does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nce_ext

RIGHT = """
from __future__ import annotations

import torch
from torch import Tensor, nn

import nce_ext


class Model(nn.Module):
    def __init__(self, n_classes: int, dim: int, counts: list[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, dim)
        noise = nce_ext.noise.Unigram(counts, power=0.75)
        self.loss_fn = nce_ext.NCELoss(dim, n_classes, noise, 20, sparse=True, log_z="learned")
        self.ranking = nce_ext.SampledSoftmaxLoss(dim, n_classes, noise, 20, label_smoothing=0.1, shared=True)
        self.vectors = nce_ext.NegativeSamplingLoss(dim, n_classes, noise, 5, margin=1.0, bias=False)

    def forward(self, context: Tensor, target: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(context)
        loss: Tensor = self.loss_fn(hidden, target) + self.ranking(hidden, target) + self.vectors(hidden, target)
        return loss


model = Model(100, 16, [1] * 100)
optimizer = nce_ext.optim.AdamW(model.parameters(), lr=1e-3, rounding="master")
handle = model.loss_fn.fuse_optimizer(optimizer, max_norm=1.0)
handle.step()
loss = nce_ext.functional.nce_loss(
    torch.randn(4, 16), torch.randn(100, 16), torch.randint(100, (4,)), nce_ext.noise.Uniform(100), 5, reduction="sum"
)
total: float = loss.item()
norm: Tensor = nce_ext.utils.clip_grad_norm_(model.parameters(), 1.0)
of_linear: Tensor = nce_ext.evaluate.nll(nn.Linear(16, 100), torch.randn(4, 16), torch.randint(100, (4,)))
scores: Tensor = model.loss_fn.log_prob(torch.randn(4, 16))
perplexity: Tensor = nce_ext.evaluate.perplexity(model.loss_fn, torch.randn(4, 16), torch.randint(100, (4,)))
contrastive = nce_ext.InfoNCELoss(0.07, learn_temperature=True, symmetric=True)
memory = nce_ext.CrossBatchMemory(64, 16)
past: Tensor = memory.get().keys
"""

WRONG = {
    "NCELoss(4, 9, nce_ext.noise.Uniform(9), 2, spase=True)": "spase",
    "NegativeSamplingLoss(4, 9, nce_ext.noise.Uniform(9), 2, margins=1.0)": "margins",
    "SampledSoftmaxLoss(4, 9, nce_ext.noise.Uniform(9), 2, label_smoothing='0.1')": "label_smoothing",
    "NCELoss('4', 9, nce_ext.noise.Uniform(9), 2)": "incompatible type",
    "optim.Adagrad([], lr=0.1, momentun=0.9)": "momentun",
    "InfoNCELoss(normalise=True)": "normalise",
    "evaluate.perplexity(nce_ext.NCELoss(4, 9, nce_ext.noise.Uniform(9), 2), 1, 2)": "incompatible type",
}


def mypy(program: Path) -> subprocess.CompletedProcess[str]:
    source = Path(nce_ext.__file__).parent.parent
    options = ["--strict", "--no-error-summary", "--python-executable", sys.executable]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", str(program.parent / "cache"), str(program)],
        capture_output=True, text=True, cwd=source, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_a_users_program_is_type_checked(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(RIGHT)
    done = mypy(program)
    assert done.returncode == 0, done.stdout + done.stderr
    program.write_text("import nce_ext\n\n" + "".join(f"nce_ext.{call}\n" for call in WRONG))
    lines = mypy(program).stdout.splitlines()
    for number, (call, word) in enumerate(WRONG.items(), 3):
        assert any(f"program.py:{number}: error" in line and word in line for line in lines), (call, lines)
