"""A short tour of every CUDA kernel, for compute-sanitizer: python tests/cuda/sanitized.py.

Small, because each access is followed; shapes, accesses and options are those that take different paths.
"""

from __future__ import annotations

import itertools

import torch

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises

V = 100


def law(kind: str) -> noises.Noise:
    if kind == "alias":
        return noises.Unigram(1 / torch.arange(1, V + 1).double())
    return noises.Uniform(V) if kind == "uniform" else noises.LogUniform(V)


def main() -> None:
    device = torch.device("cuda")
    dims = (1, 7, 32, 33, 64, 100, 128, 250, 300, 512, 1000, 2052)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    kinds = itertools.cycle(("alias", "uniform", "log-uniform"))
    layouts = itertools.cycle((False, True, "padded"))
    for dim, dtype in itertools.product(dims, dtypes):
        hidden = torch.randn(9, dim, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(V, dim, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(V, device=device, dtype=dtype, requires_grad=True)
        target = torch.randint(V, (9, 2), device=device)
        target[0] = -100
        noise = law(next(kinds)).to(device)
        arguments = (hidden, weight, target, noise, 37)
        functional.nce_loss(*arguments, bias=bias, sparse=next(layouts), remove_hits=True).backward()
        target[1, 0] = V  # refused without being read
        functional.nce_loss(*arguments, negatives=torch.randint(V, (9, 40), device=device))
        if dtype == torch.float32:
            functional.hogwild_sgd_(hidden.detach(), weight.detach(), target, noise, 5, 0.01, bias=bias.detach())
    # One class in all pairs: its segment crosses many tiles.
    hidden = torch.randn(600, 40, device=device, requires_grad=True)
    weight = torch.randn(1, 40, device=device, requires_grad=True)
    target = torch.zeros(600, dtype=torch.int64, device=device)
    functional.nce_loss(hidden, weight, target, noises.Uniform(1).to(device), 20, sparse=True).backward()
    noises.Uniform(V).to(device).sample((3, 5))
    torch.cuda.synchronize()
    print("toured", nce_ext.__version__)


if __name__ == "__main__":
    main()
