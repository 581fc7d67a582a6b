"""Vocabulary sharding in real processes: every loss and option against one process, agreement, refusals and bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from refusals import assert_tested

from nce_ext.distributed.vocab_parallel import loss as _sharded
from nce_ext.distributed.vocab_parallel import state as _sharded_state

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no Gloo", allow_module_level=True)

from ranks import sharded_cases, sharded_checks
from torchrun import torchrun

from nce_ext.reference import ADVERSARIAL, BINARY, SOFTMAX, Objective
from nce_ext.reference.objective import ReducedExamples

# Ranks: backend, what the results are compared with, and which cases: every n-th.
RUNS = {
    1: ("auto", "formula", 4),
    2: ("auto", "one process", 1),
    3: ("auto", "formula", 1),
    4: ("reference", "one process", 4),
}


def assert_passed(reports: list, n_checks: int) -> None:
    assert all(report["ran"] == reports[0]["ran"] for report in reports)
    assert len(reports[0]["ran"]) >= n_checks
    failures = {name: text for report in reports for name, text in report["failures"].items()}
    assert not failures, "\n\n".join(f"{name}\n{text}" for name, text in failures.items())


def test_some_losses_and_gradients():
    """Every 12th of the cases below, so that each loss is among them."""
    assert {name for name, _ in sharded_cases.CASES[::12]} == set(sharded_cases.LOSSES)
    assert_passed(torchrun("sharded_losses.py", 2, "auto", "one process", 12), 25)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RUNS)
def test_losses_and_gradients_are_those_of_one_process(ranks):
    """In float64 to 1e-12 of the unsharded loss, in other types to the rounding of the formula."""
    reports = torchrun("sharded_losses.py", ranks, *RUNS[ranks], timeout=300)
    assert len(reports) == ranks
    assert_passed(reports, 300 // RUNS[ranks][2])


def test_the_cases_are_all_there():
    """Every loss, by every option that has a meaning for it."""
    assert len(sharded_cases.CASES) > 300
    assert {name for name, _ in sharded_cases.CASES} == set(sharded_cases.LOSSES)
    assert {variant for _, variant in sharded_cases.CASES} == set(sharded_cases.VARIANTS)
    assert any(0 in sizes for sizes in sharded_cases.SIZES.values())


@pytest.fixture(scope="module")
def checks() -> list:
    return torchrun("sharded_checks.py", 3, timeout=300)


@pytest.mark.slow
def test_refusals_agreement_and_autograd(checks):
    assert_passed(checks, 40)


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_vocabulary_nor_on_the_negatives(checks):
    """The formula of docs/sharding.md is asserted by the ranks."""
    for report in checks:
        found = report["results"]["bytes_do_not_depend_on_the_vocabulary"]
        assert len(found) == 8
        assert len(set(found.values())) == 1


# The objectives, of columns in any number of parts


@pytest.mark.parametrize(
    "objective",
    [
        Objective(), Objective(BINARY, positive_weight=0.3), Objective(ADVERSARIAL, temperature=2.0),
        Objective(SOFTMAX), Objective(SOFTMAX, label_smoothing=0.2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parts", [1, 2, 5, 30])
def test_sums_of_parts_are_sums_of_the_whole(objective, parts):
    z = 30 * torch.randn(8, 40, dtype=torch.float64)
    count = torch.randint(0, 3, z.shape).double()
    count[0] = 0  # nothing counts
    count[1, 1:] = 0  # one column, in one part
    cuts = [0, *sorted(torch.randint(0, 41, (parts - 1,)).tolist()), 40]  # parts may be empty
    partial = [objective.partial(z[:, a:b], count[:, a:b]) for a, b in itertools.pairwise(cuts)]
    largest, sums = objective.partial(z, count)
    common = torch.stack([part for part, _ in partial]).amax(0)
    assert torch.equal(common, largest)
    added = sum(objective.rebase(*part, common) for part in partial)
    assert torch.allclose(added, sums, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(BINARY, positive_weight=0.3), Objective(SOFTMAX), Objective(SOFTMAX, label_smoothing=0.2),
        Objective(SOFTMAX, correct_positive=False),
    ],
)  # fmt: skip
def test_derivatives_are_those_of_the_losses(objective):
    """The weights of adversarial negatives are no part of the derivative; the others are differentiated here."""
    n_targets = 1 if not objective.correct_positive else 3
    z, count = torch.randn(6, 5 + n_targets, dtype=torch.float64), torch.randint(0, 3, (6, 5)).double()
    positive = torch.rand(6, n_targets) < 0.8
    count = torch.where(positive.any(1, keepdim=True), count, 0)
    log_q = -torch.rand(6, n_targets, dtype=torch.float64)

    def examples(z: torch.Tensor) -> ReducedExamples:
        of_negatives = z[:, n_targets:]
        scores = torch.where(positive, z[:, :n_targets], 0)
        reduced = objective.partial(of_negatives, count)
        return objective.reduced_examples(positive, positive.double(), log_q, None, scores, *reduced)

    found = examples(z)
    step = 1e-5
    for column in range(z.shape[1]):
        shift = torch.zeros_like(z)
        shift[:, column] = step
        difference = (examples(z + shift).losses() - examples(z - shift).losses()) / (2 * step)
        slope = torch.cat([found.of_targets(), found.of_negatives(z[:, n_targets:], count)], 1)[:, column]
        assert torch.allclose(slope, difference, rtol=1e-6, atol=1e-9)


def test_a_target_with_all_of_the_probability_keeps_its_last_digits():
    z = torch.tensor([[100.0]], dtype=torch.float64)
    one = torch.ones((1, 1), dtype=torch.float64)
    objective = Objective(SOFTMAX)
    reduced = objective.partial(torch.tensor([[40.0]], dtype=torch.float64), one)
    found = objective.reduced_examples(one.bool(), one, None, None, z, *reduced)
    rest = torch.exp(torch.tensor(-60.0, dtype=torch.float64))
    assert torch.allclose(found.losses(), rest, rtol=1e-12, atol=0)
    assert torch.allclose(found.of_targets(), -rest, rtol=1e-12, atol=0)


def test_every_refusal_in_the_source_is_tested():
    assert_tested([_sharded, _sharded_state], [row[-1] for row in sharded_checks.OTHERS.values()])
