"""Vectors and what goes with them for the contrastive losses, by their sizes."""

from __future__ import annotations

import torch
from tolerances import as_float64

B, D, K = 9, 7, 5


def vectors(batch=B, dim=D, extra: int | None = K, dtype=torch.float64, scale=0.5):
    sizes = {"query": batch, "key": batch, "negatives": extra}
    return {
        name: (scale * torch.randn(n, dim, dtype=torch.float64)).to(dtype).requires_grad_()
        for name, n in sizes.items()
        if n is not None
    }


def data(*names, batch=B, extra=K, in_batch=True, classes=6):
    columns = (batch if in_batch else 1) + extra
    values = {
        "ids": torch.randint(classes, (batch,)),
        "negative_ids": torch.randint(classes, (extra,), dtype=torch.int32),
        "negative_mask": torch.rand(extra) > 0.4,
        "log_q": -3 * torch.rand(batch, dtype=torch.float64),
        "negative_log_q": -3 * torch.rand(extra, dtype=torch.float64),
        "target": torch.rand(batch, columns, dtype=torch.float64).square(),
    }
    return {name: values[name] for name in names}


def arrays(given: dict) -> dict:
    return {name: value.detach().cpu().numpy() if name.endswith(("ids", "mask")) else as_float64(value)
            for name, value in given.items()}  # fmt: skip
