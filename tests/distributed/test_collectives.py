"""The collectives on real ranks against numpy, what they send, and how ranks fail together."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from refusals import assert_tested
from torchrun import torchrun

from nce_ext.distributed import collectives as _collectives
from nce_ext.distributed.collectives import Collectives

WORLD, PARTS = 3, [2, 0, 4]


def ranks(what: str) -> list[dict]:
    return [rank[what] for rank in torchrun("gathered_collectives.py", WORLD)]


def rows(rank: int) -> np.ndarray:
    """What the rank passes: whole numbers, which every dtype holds exactly, as it does their sums."""
    return np.arange(6.0)[:, None] * np.array([1.0, -2.0]) + 10 * rank


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("world", [1, WORLD])
def test_collectives(world, dtype):
    given, parts = [rows(rank) for rank in range(world)], PARTS[:world]
    for rank, told in enumerate(ranks("values") if world > 1 else ranks("alone")[:1]):
        got = told[dtype]
        assert got["even"] == np.concatenate(given).tolist()
        uneven = np.concatenate([t[:n] for t, n in zip(given, parts, strict=True)])
        assert got["uneven"] == uneven.tolist()
        assert got["strided"] == np.concatenate([t.T for t in given]).tolist()
        assert got["sum"] == sum(given).tolist()
        assert got["max"] == np.max(given, axis=0).tolist()
        whole = np.concatenate([sum(given)] * 2)[: sum(parts)]
        start = sum(parts[:rank])
        assert got["scattered"] == whole[start : start + parts[rank]].tolist()
        assert got["kept"]


def test_collectives_of_other_types_and_of_nothing():
    for told in ranks("values"):
        assert told["sizes"] == [0, 3, 6]
        assert told["integers"] == [[1], [2], [2]]
        assert told["booleans"] == [False, True, False]
        assert told["nothing"] == told["nothing scattered"] == [0, 3]
        assert told["nothing wide"] == [6, 0]


def test_one_seed_for_all_drawn_on_rank_0_alone():
    told = ranks("values")
    for name, rank_0 in (("seed", 100), ("seed of torch", 0)):
        want = torch.randint(-(2**63), 2**63 - 1, (2,), generator=torch.Generator().manual_seed(rank_0)).tolist()
        assert [t[name] for t in told] == [want] * WORLD
    generators = [torch.Generator().manual_seed(100 + rank) for rank in range(WORLD)]
    torch.randint(-(2**63), 2**63 - 1, (2,), generator=generators[0])
    assert [t["drawn"] for t in told] == [torch.randint(1000, (1,), generator=g).item() for g in generators]


def test_bytes_sent():
    """As a ring sends them: for 3 ranks, 6 rows of 5 float32."""
    whole, row = 6 * 5 * 4, 5 * 4
    for rank, told in enumerate(ranks("costs")):
        assert told["agree"] == 2 * 512
        assert 2 * (512 + 600) < told["long agree"] < 2 * (512 + 700)
        assert told["all_gather"] == 2 * whole
        assert told["uneven all_gather"] == 2 * 4 * row
        assert told["all_reduce"] == 2 * whole * 2 // 3
        assert told["reduce_scatter"] == whole - (rank + 1) * row
        assert told["seed"] == (16 if rank < 2 else 0)


SAME = "must be the same on all ranks, got"
ALL = {
    "number": f"ValueError: n_classes {SAME} 100 on ranks 0 and 1 and 101 on rank 2",
    "text": f"ValueError: dtype {SAME} 'float64' on rank 0 and 'float32' on ranks 1 and 2",
    "shape": f"ValueError: weight {SAME} [3, 4] on rank 0, [3, 5] on rank 1 and [3, 6] on rank 2",
    "missing": f"ValueError: seed {SAME} 5 on ranks 0 and 2 and nothing on rank 1",
    "the first": f"ValueError: a {SAME} 0 on rank 0, 1 on rank 1 and 2 on rank 2",
    "call": f"ValueError: the call {SAME} 'agree' on rank 0 and 'sizes' on ranks 1 and 2",
    "not agreed": "RuntimeError: agree() or sizes() must be the first call in a step, got a collective of data",
    "nested": "RuntimeError: agree() or sizes() must be the first call in a step, got a collective of data",
    "agreed": "no error, but 3.0",
    "alike": "no error, but None",
    "no group": "TypeError: group must be a ProcessGroup or None, got str 'world'",
}


@pytest.mark.parametrize("name", ALL)
def test_disagreement_is_the_same_error_on_every_rank(name):
    assert [told[name] for told in ranks("disagreements")] == [ALL[name]] * WORLD


def test_what_a_rank_refuses_the_others_are_told():
    """And all can go on: what follows in the same run has worked."""
    told = ranks("disagreements")
    own, refused = "TypeError: hidden must be dense", "RuntimeError: a step was refused: "
    assert [t["one refuses"] for t in told] == [f"{refused}rank 2 raised {own}"] * 2 + [own]
    both = "rank 1 raised ValueError: ids of rank 1; rank 2 raised ValueError: ids of rank 2"
    assert [t["two refuse"] for t in told] == [refused + both, "ValueError: ids of rank 1", "ValueError: ids of rank 2"]
    assert all(t["long"].endswith("yTrue' on rank 1") for t in told)


def test_groups_of_others():
    refusal = "ValueError: group must be one of which this process is a rank, got one without it"
    told = [t["not a member"] for t in ranks("disagreements")]
    assert told == [refusal, "no error, but 0", "no error, but 1"]


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be initialized \(.*\), and is not"):
        Collectives()


# What the others are told of rank 1, and how long they may wait for it.
SHORT = 4.0  # failing_steps.TIMEOUT
FAILURES = {
    "raises": (r"RuntimeError: a step failed: rank 1 raised MemoryError: not enough memory", 60),
    "raises in backward": (r"RuntimeError: a step failed: rank 1 raised MemoryError: not enough memory", 60),
    "store lost": (
        r"RuntimeError: a collective failed, and the group's store does not answer: the process that hosts",
        60,
    ),
    "late": (r"RuntimeError: a collective failed: rank 1 is missing \(no sign for 0\.5 s\)", SHORT),
    "absent": (r"RuntimeError: a collective failed: rank 1 is missing \(no sign for 0\.5 s\)", SHORT),
    "dies": (r"RuntimeError: a collective failed: rank 1 is missing \(no sign for 5 s\)", 60),
}


RAISING, MISSING = list(FAILURES)[:3], list(FAILURES)[3:]


@pytest.mark.parametrize("name", [*RAISING, *(pytest.param(name, marks=pytest.mark.slow) for name in MISSING)])
def test_a_failing_rank_is_named_and_nothing_has_changed(name):
    message, timeout = FAILURES[name]
    missing = name in MISSING
    reports = torchrun("failing_steps.py", WORLD, *(MISSING if missing else RAISING), fails=missing)
    assert (reports[1] is None) == missing  # it has died in the end
    for told in (reports[0][name], reports[2][name]):
        assert re.match(message, told["error"])
        assert told["seconds"] < timeout
        if name != "absent":
            assert told["unchanged"]
            for later in ("later", "anew"):
                assert re.match(rf"{message}.*\. The group cannot be used again: start anew", told[later])


def test_every_refusal_in_the_source_is_tested():
    tested = [
        "group must be one of which this process",
        "group must be a ProcessGroup or None",
    ]
    assert_tested([_collectives], tested)
