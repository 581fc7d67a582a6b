"""Against the exact softmax over all classes, and the vocabulary size at which both cost the same."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import nn

import nce_ext
from bench.cases import (
    BREAK_EVEN_CLASSES,
    BREAK_EVEN_NEGATIVES,
    LARGE_SOFTMAX_CLASSES,
    LARGE_SOFTMAX_NEGATIVES,
    SOFTMAX_BATCH,
    SOFTMAX_DIM,
    short,
    zipf,
)
from bench.eager import full_softmax
from bench.timing import Row

SIZES = f"(B = {SOFTMAX_BATCH}, D = {SOFTMAX_DIM})"
NAME = f"NCE against the full softmax {SIZES}"
LABELS = {"chunked": "F.linear_cross_entropy", "plain": "F.cross_entropy"}
SCAN = [(k, classes) for k in BREAK_EVEN_NEGATIVES for classes in BREAK_EVEN_CLASSES]
LARGE = [(LARGE_SOFTMAX_NEGATIVES, classes) for classes in LARGE_SOFTMAX_CLASSES]


def fits_in_memory(size: int) -> bool:
    try:
        return size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return False


@pytest.mark.parametrize(("k", "classes"), SCAN + LARGE)
def test_full_softmax(k: int, classes: int, quick: bool, stopwatch, rows) -> None:
    if quick and (k != LARGE_SOFTMAX_NEGATIVES or classes > BREAK_EVEN_CLASSES[-1]):
        pytest.skip("a quick run scans one k, up to 10k classes")
    hidden = torch.randn(SOFTMAX_BATCH, SOFTMAX_DIM, requires_grad=True)
    loss_fn = nce_ext.NCELoss(SOFTMAX_DIM, classes, zipf(classes), k, bias=False, sparse=True)
    target = loss_fn.noise.sample((SOFTMAX_BATCH,))
    weight: nn.Parameter = loss_fn.weight

    def step(loss) -> None:
        loss().backward()
        hidden.grad = weight.grad = None

    baselines = {"chunked": lambda: step(lambda: full_softmax(hidden, weight, target, chunked=True))}
    # Logits, their log-softmax and two gradients are alive at once.
    if fits_in_memory(5 * 4 * SOFTMAX_BATCH * classes):
        baselines["plain"] = lambda: step(lambda: full_softmax(hidden, weight, target, chunked=False))
    least = 5 if classes < LARGE_SOFTMAX_CLASSES[0] else 1
    times = stopwatch.compare(lambda: step(lambda: loss_fn(hidden, target)), baselines, least_rounds=least)

    params = {"B": SOFTMAX_BATCH, "D": SOFTMAX_DIM, "k": k, "V": classes}
    for variant in baselines:
        row = times.row(NAME, params, variant, work=f"k={k} V={short(classes)}", label=LABELS[variant])
        row.in_table = k == LARGE_SOFTMAX_NEGATIVES
        rows.append(row)


@pytest.mark.parametrize("k", BREAK_EVEN_NEGATIVES)
def test_break_even(k: int, rows) -> None:
    """Read off the scan above: between two sizes, the logarithm of the ratio is taken to be linear in log V."""
    fastest: dict[int, float] = {}
    for row in rows:
        if row.name == NAME and row.params["k"] == k:
            classes = row.params["V"]
            fastest[classes] = min(row.ratio, fastest.get(classes, math.inf))
    if len(fastest) < 2:
        pytest.skip("the scan over vocabulary sizes was not run")
    classes, note = break_even(sorted(fastest.items()))
    params = {"B": SOFTMAX_BATCH, "D": SOFTMAX_DIM, "k": k}
    rows.append(
        Row(
            f"break-even {SIZES}: below this V the full softmax costs less",
            f"k={k}",
            params,
            "",
            classes,
            shown_as="value",
            note=note,
        )
    )


def break_even(ratios: list[tuple[int, float]]) -> tuple[float, str]:
    """The V at which the speed-up passes 1 for good; ``ratios`` are (V, speed-up) by rising V."""
    if ratios[-1][1] < 1:
        return ratios[-1][0], "above the largest size measured"
    behind = [i for i, (_, ratio) in enumerate(ratios) if ratio < 1]
    if not behind:
        return ratios[0][0], "below the smallest size measured"
    (low, slow), (high, fast) = ratios[behind[-1]], ratios[behind[-1] + 1]
    part = -math.log(slow) / (math.log(fast) - math.log(slow))
    return round(low * (high / low) ** part), "the fastest full softmax, interpolated on logarithmic scales"
