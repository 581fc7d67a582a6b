"""tf.nn.nce_loss and sampled_softmax_loss reproduced: losses and gradients that TensorFlow 2 computed.

They are kept in data/tf_candidate_sampling.npz. TensorFlow subtracts log of the expected count of a class, k q for
draws with replacement; our correction subtracts log k by itself, so ``log_q`` is log(expected count) - log k. (In the
softmax a constant cancels, so its log k may stay.) Its targets share one label: ``positive_label="uniform"``.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nce_ext import functional
from nce_ext import noise as noises

DATA = np.load(Path(__file__).parents[1] / "data" / "tf_candidate_sampling.npz")
LOSSES = {"nce": "nce_loss", "sampled_softmax": "sampled_softmax_loss"}
CASES = [
    f"{loss}_T{n_true}_{draws}_{hits}"
    for loss in LOSSES
    for n_true in (1, 2)
    for draws in ("replace", "unique")
    for hits in ("keephits", "drophits")
]
RTOL = 2e-6  # of the largest element: float32 sums in another order


def values(case: str, name: str) -> torch.Tensor:
    return torch.from_numpy(DATA[f"{case}/{name}"])


def rows_to_compare(case: str) -> torch.Tensor:
    """All, but for rows of which a target occurs twice among the negatives when hits are dropped.

    TensorFlow's compute_accidental_hits finds a target's last position among the sampled ids only, so it leaves the
    earlier duplicates in; ``remove_hits`` takes out all of them, as it should.
    """
    labels, sampled = values(case, "labels"), values(case, "sampled")
    if case.endswith("keephits"):
        return torch.ones(len(labels), dtype=torch.bool)
    return ((labels[:, :, None] == sampled).sum(2) <= 1).all(1)


def losses_and_gradients(case: str, backend: str, rows: torch.Tensor, upstream: torch.Tensor, shared: bool):
    """With the negatives as [k], or repeated for every example: two kernels."""
    hidden, weight, bias = (torch.from_numpy(DATA[name]).requires_grad_() for name in ("x", "weight", "bias"))
    sampled, log_count = values(case, "sampled"), values(case, "sampled_ec").log()
    log_k = math.log(len(sampled))
    if not shared:
        sampled, log_count = (t.expand(int(rows.sum()), -1) for t in (sampled, log_count))
    loss = getattr(functional, LOSSES[case.partition("_T")[0]])
    losses = loss(
        hidden[rows], weight, values(case, "labels")[rows], noises.LogUniform(len(weight)), sampled.shape[-1],
        bias=bias, negatives=sampled, log_q=(values(case, "true_ec").log()[rows] - log_k, log_count - log_k),
        positive_label="uniform", remove_hits=case.endswith("drophits"), reduction="none", backend=backend,
    )  # fmt: skip
    losses.backward(upstream[rows])
    return losses.detach(), hidden.grad, weight.grad, bias.grad


def assert_equal(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < RTOL, f"{what}: relative error {error:.2e}"


def test_the_fixture_has_the_rows_that_tell_the_cases_apart():
    assert {name.partition("/")[0] for name in DATA.files} == {*CASES, "x", "weight", "bias"}
    for case in CASES:
        rows = rows_to_compare(case)
        assert rows.sum() >= 3
    hits = [case for case in CASES if (values(case, "labels")[:, :, None] == values(case, "sampled")).any()]
    for loss in LOSSES:
        assert any(case.startswith(loss) and case.endswith("drophits") for case in hits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shared", [True, False])
def test_losses_and_hidden_gradients(case, backend, shared):
    rows = rows_to_compare(case)
    batch = len(rows)
    losses, grad_hidden, _, _ = losses_and_gradients(case, backend, rows, torch.full((batch,), 1 / batch), shared)
    assert_equal(losses, values(case, "loss")[rows], "loss")
    assert_equal(grad_hidden[rows], values(case, "gx")[rows], "gradient of hidden")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shared", [True, False])
def test_table_gradients(case, backend, shared):
    """The gradients of all rows of a batch fall into one table, so rows left out above are added from the formula."""
    rows = rows_to_compare(case)
    batch = len(rows)
    _, _, grad_weight, grad_bias = losses_and_gradients(case, backend, rows, torch.full((batch,), 1 / batch), shared)
    weight, bias = torch.from_numpy(DATA["weight"]), torch.from_numpy(DATA["bias"])
    labels, sampled, hidden = values(case, "labels"), values(case, "sampled"), torch.from_numpy(DATA["x"])
    for row in (~rows).nonzero()[:, 0].tolist():
        last = {int(n): j for j, n in enumerate(sampled)}  # of duplicates, TensorFlow masks this one alone
        masked = {last.get(int(y)) for y in labels[row]}
        columns = [(int(y), values(case, "true_ec")[row, t], 1 / labels.shape[1]) for t, y in enumerate(labels[row])]
        columns += [(int(n), values(case, "sampled_ec")[j], 0) for j, n in enumerate(sampled) if j not in masked]
        classes, expected_counts, label = map(torch.tensor, zip(*columns, strict=True))
        z = weight[classes] @ hidden[row] + bias[classes] - expected_counts.log()
        probability = torch.sigmoid(z) if case.startswith("nce") else torch.softmax(z, 0)
        dz = (probability - label) / batch
        grad_weight.index_add_(0, classes, dz[:, None] * hidden[row])
        grad_bias.index_add_(0, classes, dz)
    assert_equal(grad_weight, values(case, "gw"), "gradient of weight")
    assert_equal(grad_bias, values(case, "gb"), "gradient of bias")
