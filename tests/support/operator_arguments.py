"""Arguments of the operators of the losses by name, small and valid."""

from __future__ import annotations

import torch

from nce_ext import noise as noises

V, D, B, T, K = 11, 6, 5, 2, 4
OBJECTIVE = {
    "objective": 0, "positive_weight": 1.0, "label_smoothing": 0.0, "temperature": 0.0, "correct_positive": True,
}  # fmt: skip
SOFTMAX, ADVERSARIAL = {"objective": 1, "label_smoothing": 0.1}, {"objective": 2, "temperature": 0.5}


def forward_arguments(**changes):
    """Positional arguments of sampled_loss by name, in the order of its schema."""
    noise = noises.Unigram(range(1, V + 1))
    arguments = {
        "hidden": torch.randn(B, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(V, (B, T)),
        "log_z": None,
        "seed": torch.tensor([1, 2]),
        "table": noise.table,
        "negatives": None,
        "target_log_q": None,
        "negative_log_q": None,
        "kind": noise.kind,
        "num_negatives": K,
        "subtract_log_q": True,
        "offset": 1.0,
        "remove_hits": False,
        "uniform_labels": False,
        "mean_candidates": False,
        "ignore_index": -100,
        **OBJECTIVE,
        "needs_hidden_grad": True,
        "needs_row_grad": True,
        "gradient_layout": 0,
    }
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


def shared_arguments(**changes):
    """Positional arguments of shared_loss by name, in the order of its schema."""
    arguments = {
        "hidden": torch.randn(B, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(V, (B, T)),
        "log_z": None,
        "negatives": torch.randint(V, (K,)),
        "target_log_q": -torch.rand(B, T),
        "negative_log_q": -torch.rand(K),
        "row_scale": None,
        "distinct": False,
        "offset": 1.0,
        "remove_hits": True,
        "uniform_labels": False,
        "mean_candidates": False,
        "ignore_index": -100,
        **OBJECTIVE,
        "needs_hidden_grad": True,
        "needs_row_grad": True,
        "gradient_layout": 0,
    }
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


def epilogue_arguments(**changes):
    """Positional arguments of shared_loss_ by name, in the order of its schema."""
    arguments = {
        "logits": torch.randn(B, K),
        "hidden": torch.randn(B, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(V, (B, T)),
        "target_log_q": -torch.rand(B, T),
        "log_z": None,
        "column_shift": torch.randn(K),
        "multiplicity": None,
        "hits": None,
        "row_scale": None,
        "offset": 1.0,
        "uniform_labels": False,
        "mean_candidates": False,
        "n_draws": K,
        "ignore_index": -100,
        **OBJECTIVE,
        "needs_derivatives": True,
        "needs_hidden_grad": True,
    }
    assert set(changes) <= set(arguments)
    return tuple({**arguments, **changes}.values())


def shared_row_arguments(reduced=True, layout=0, with_rows=True, with_bias=True, dtype=torch.float32):
    """Positional arguments of shared_row_grad, from a call of shared_loss."""
    arguments = shared_arguments(row_scale=torch.rand(B) if reduced else None)
    _, target_ids, target_dlogit, _, classes, rows, elements, dlogit, _ = torch.ops.nce_ext.shared_loss(*arguments)
    upstream = torch.randn(1 if reduced else B)
    return (
        target_ids, target_dlogit, upstream, arguments[0], classes, rows, elements, dlogit, V, dtype, with_rows,
        with_bias, layout,
    )  # fmt: skip


def leaf(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, dtype=dtype).requires_grad_()


def row_arguments(with_rows=True, with_bias=True, dtype=torch.float32, hidden_dtype=torch.float32, padded=()):
    ids = torch.randint(V, (B, T + K)).int()
    ids[0, 0] = -1
    return (
        ids, torch.randn(B, T + K), torch.randn(B), torch.randn(B, D).to(hidden_dtype), V, dtype, with_rows, with_bias,
        *padded,
    )  # fmt: skip
