"""Noise: draws per second and core, and the time to build an alias table."""

from __future__ import annotations

import pytest
import torch

import nce_ext
from bench.cases import MULTINOMIAL_LIMIT, SAMPLER_CLASSES, short, zipf
from bench.timing import Row

DRAWS_NAME = "draws a second on one core, Zipf"
COLUMNS = 20


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("classes", SAMPLER_CLASSES)
def test_draws(classes: int, quick: bool, stopwatch, rows) -> None:
    if quick and classes > 10**6:
        pytest.skip("multinomial takes a second")
    noise = zipf(classes)
    probabilities = noise.log_prob(torch.arange(classes)).exp()
    draws = (100_000 if quick else 1_000_000) // COLUMNS * COLUMNS
    times = stopwatch.compare(
        lambda: noise.sample((draws // COLUMNS, COLUMNS)),
        {"multinomial": lambda: torch.multinomial(probabilities, draws, replacement=True)},
    )
    rows.append(
        times.row(
            DRAWS_NAME,
            {"V": classes, "draws": draws},
            "multinomial",
            work=f"V={short(classes)}",
            label="torch.multinomial",
            unit="M/s",
            per_second=draws / 1e6,
        )
    )


@pytest.mark.usefixtures("one_thread")
def test_draws_beyond_multinomial(quick: bool, stopwatch, rows) -> None:
    classes, draws = MULTINOMIAL_LIMIT + 1, 1_000_000
    with pytest.raises(RuntimeError) as refusal:
        torch.multinomial(torch.ones(classes), 1, replacement=True)
    if quick:
        pytest.skip("the table takes a second to build")
    noise = zipf(classes)
    seconds = stopwatch.compare(lambda: noise.sample((draws // COLUMNS, COLUMNS)), {}).median()
    rows.append(
        Row(
            DRAWS_NAME,
            "V=2^24 + 1",
            {"V": classes, "draws": draws},
            "M/s",
            draws / seconds / 1e6,
            against="torch.multinomial refuses",
            note=str(refusal.value),
        )
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("classes", [10**6, 10**7])
def test_alias_build(classes: int, quick: bool, stopwatch, rows) -> None:
    if quick and classes > 10**6:
        pytest.skip("takes a second")
    counts = torch.randint(1, 1000, (classes,))
    times = stopwatch.compare(lambda: nce_ext.noise.Unigram(counts), {}, most_rounds=7)
    rows.append(
        Row(
            "building an alias table on one thread",
            f"V={short(classes)}",
            {"V": classes},
            "s",
            times.median(),
            shown_as="value",
            at_most=1.0 if classes == 10**7 else None,
        )
    )
