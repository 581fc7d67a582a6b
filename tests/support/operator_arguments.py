"""Arguments of the operators of the losses by name, small and valid."""

from __future__ import annotations

import torch

from nce_ext import noise as noises
from nce_ext._ops import sampled_loss, shared_loss

V, D, B, T, K = 11, 6, 5, 2, 4
OBJECTIVE = {
    "objective": 0, "positive_weight": 1.0, "label_smoothing": 0.0, "temperature": 0.0, "correct_positive": True,
}  # fmt: skip
LABELS = {"uniform_labels": False, "mean_candidates": False, "ignore_index": -100}
NEEDS = {"needs_hidden_grad": True, "needs_row_grad": True, "gradient_layout": 0}
SOFTMAX, ADVERSARIAL = {"objective": 1, "label_smoothing": 0.1}, {"objective": 2, "temperature": 0.5}


def operands():
    return {
        "hidden": torch.randn(B, D), "weight": torch.randn(V, D), "bias": torch.randn(V),
        "target": torch.randint(V, (B, T)), "log_z": None,
    }  # fmt: skip


def forward_arguments(**changes):
    """Arguments of sampled_loss."""
    noise = noises.Unigram(range(1, V + 1))
    inputs = sampled_loss.SampledLossInputs(
        **operands(), seed=torch.tensor([1, 2]), table=noise.table, kind=noise.kind, num_negatives=K, negatives=None,
        remove_hits=False, target_log_q=None, negative_log_q=None, subtract_log_q=True, offset=1.0, **LABELS,
        **OBJECTIVE, **NEEDS,
    )  # fmt: skip
    return tuple(inputs._replace(**changes))


def shared_arguments(**changes):
    """Arguments of shared_loss."""
    inputs = shared_loss.SharedLossInputs(
        **operands(), negatives=torch.randint(V, (K,)), distinct=False, remove_hits=True,
        target_log_q=-torch.rand(B, T), negative_log_q=-torch.rand(K), offset=1.0, **LABELS, **OBJECTIVE,
        example_weight=None, **NEEDS,
    )  # fmt: skip
    return tuple(inputs._replace(**changes))


def epilogue_arguments(**changes):
    """Arguments of shared_loss_."""
    inputs = shared_loss.SharedEpilogueInputs(
        logits=torch.randn(B, K), **operands(), column_shift=torch.randn(K), multiplicity=None, accidental_hits=None,
        n_draws=K, target_log_q=-torch.rand(B, T), offset=1.0, **LABELS, **OBJECTIVE, example_weight=None,
        needs_derivatives=True, needs_hidden_grad=True,
    )  # fmt: skip
    return tuple(inputs._replace(**changes))


def shared_row_arguments(reduced=True, layout=0, with_rows=True, with_bias=True, dtype=torch.float32):
    """Positional arguments of shared_row_grad, from a call of shared_loss."""
    arguments = shared_arguments(example_weight=torch.rand(B) if reduced else None)
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
