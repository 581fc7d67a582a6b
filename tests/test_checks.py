"""The checks of arguments by themselves: what each lets pass, what it returns, and its message."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nce_ext import _checks
from nce_ext import noise as noises

HUGE = 10**400  # an int beyond every float
PASSES = {
    "any number": ({}, [0, -1.5, 1e308, np.float64(2)]),
    "from a bound on": ({"low": 0}, [0, -0.0, 3]),
    "between bounds": ({"low": 0, "high": 1}, [0, 1, 0.5]),
    "above a bound": ({"above": 0}, [5e-324, 1]),
    "above and up to": ({"above": 0, "high": 1}, [5e-324, 1]),
    "from and below": ({"low": 0, "below": 1}, [0, 1 - 2**-53]),
    "infinity": ({"above": 0, "infinite": True}, [math.inf, 1]),
    "negative infinity": ({"infinite": True}, [-math.inf, math.inf]),
}
REFUSED = {
    "not finite": ({}, [math.inf, -math.inf, math.nan, HUGE, -HUGE], "finite"),
    "below a bound": ({"low": 0}, [-1, -5e-324, math.inf, math.nan, HUGE], "finite and >= 0"),
    "outside bounds": ({"low": 0, "high": 1}, [-0.1, 1.1, math.nan, math.inf, HUGE], "in 0 .. 1"),
    "at an open bound": ({"above": 0}, [0, -1, math.inf, math.nan], "finite and > 0"),
    "at an open lower bound": ({"above": 0, "high": 1}, [0, 1.1, math.nan], "in (0, 1]"),
    "at an open upper bound": ({"low": 0, "below": 1}, [-0.1, 1, math.nan], "in [0, 1)"),
    "at the bounds of an open interval": ({"above": 0, "below": 1}, [0, 1], "in (0, 1)"),
    "NaN where infinity passes": ({"above": 0, "infinite": True}, [0, math.nan, -math.inf], "> 0"),
    "below a bound where infinity passes": ({"low": 0, "infinite": True}, [-1, math.nan], ">= 0"),
    "by words": ({"low": 0, "wanted": "a share"}, [-1, math.nan, "0.5", None, True], "a share"),
}


@pytest.mark.parametrize("name", PASSES)
def test_numbers_that_pass(name):
    options, values = PASSES[name]
    for value in values:
        got = _checks.number("rate", value, **options)
        assert got == value
        assert type(got) in (int, float)


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_are_refused(name):
    options, values, allowed = REFUSED[name]
    for value in values:
        with pytest.raises(ValueError, match=r"^rate must be ") as caught:
            _checks.number("rate", value, **options)
        assert str(caught.value) == f"rate must be {allowed}, got {value!r}"


def test_what_is_no_number():
    for value, got in ((True, "bool True"), ("1", "str '1'"), (None, "NoneType"), (torch.ones(2), "a float32 tensor")):
        with pytest.raises(TypeError, match=rf"^rate must be a number, got {got}"):
            _checks.number("rate", value)


def test_numbers_that_are_converted():
    for value in (True, "1", torch.ones(1), np.float32(1)):
        got = _checks.number("rate", value, convert=True)
        assert got == 1
        assert type(got) is float
    for value in (None, "one", [1], torch.ones(2)):
        with pytest.raises(TypeError, match=r"^rate must be a number, got "):
            _checks.number("rate", value, convert=True)


def test_numpy_scalars_are_the_python_numbers_they_stand_for():
    for value, expected in (
        (np.int8(3), 3), (np.uint64(2**63), 2**63), (np.float32(0.75), 0.75), (np.float16(0.5), 0.5),
        (np.bool_(True), True), (np.str_("x"), "x"),
    ):  # fmt: skip
        got = _checks.plain(value)
        assert got == expected
        assert type(got) is type(expected)
    assert type(_checks.count("k", np.int64(3), 1)) is int
    assert type(_checks.number("rate", np.float32(0.5))) is float
    assert _checks.power(np.float32(0.75)) == 0.75
    for value in (np.bool_(True), np.float64(3)):
        with pytest.raises(TypeError, match=r"^k must be an int, got "):
            _checks.count("k", value, 1)


def test_counts_of_things():
    assert _checks.count("k", 3, 1) == 3
    assert _checks.count("k", 3, 1, 3) == 3
    for value, high, message in ((0, None, ">= 1, got 0"), (0, 3, "in 1 .. 3, got 0"), (4, 3, "in 1 .. 3, got 4")):
        with pytest.raises(ValueError, match=rf"^k must be {message}$"):
            _checks.count("k", value, 1, high)
    with pytest.raises(ValueError, match=r"^k must be few, got 4$"):
        _checks.count("k", 4, 1, 3, wanted="few")
    for value in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match=r"^k must be an int, got "):
            _checks.count("k", value, 1)


def test_reductions():
    for value in _checks.REDUCTIONS:
        _checks.reduction(value)
    with pytest.raises(ValueError, match=r"^reduction must be one of 'mean', 'sum', 'none', got None$"):
        _checks.reduction(None)


def test_instances():
    law = noises.Uniform(3)
    assert _checks.instance("noise", law, noises.Noise, "a distribution") is law
    with pytest.raises(TypeError, match=r"^noise must be a distribution, got int 3$"):
        _checks.instance("noise", 3, noises.Noise, "a distribution")


def test_a_tensor_is_on_somebodys_device():
    meta = torch.device("meta")
    with pytest.raises(ValueError, match=r"^ids must be on hidden's device meta, got cpu$"):
        _checks.tensor("ids", torch.zeros(1), _checks.FLOATS, meta)
    with pytest.raises(ValueError, match=r"^ids must be on the memory's device meta, got cpu$"):
        _checks.tensor("ids", torch.zeros(1), _checks.FLOATS, meta, "the memory")
    value = torch.zeros(1)
    assert _checks.tensor("ids", value, _checks.FLOATS) is value


def test_finite_tensors():
    value = torch.tensor([[0.0, math.nan], [math.inf, 1.0]])
    _checks.finite("x", value[:0])
    _checks.finite("x", value, torch.tensor([[True, False], [False, True]]))
    with pytest.raises(ValueError, match=r"^x must be finite, got nan at index \[0, 1\]$"):
        _checks.finite("x", value)
    with pytest.raises(ValueError, match=r"^x must be finite, got inf at index \[1, 0\]$"):
        _checks.finite("x", value, torch.tensor([[True, False], [True, True]]))


def test_ids_are_checked_on_the_device_first():
    ids = torch.tensor([0, 5])
    assert _checks.class_ids(ids, 6) is ids
    with pytest.raises(ValueError, match=r"^ids must be in 0 \.\. 4, got 5$"):
        _checks.class_ids(ids, 5)
    with pytest.raises(ValueError, match=r"^ids must be on the module's device meta, got cpu$"):
        _checks.class_ids(ids, 5, device=torch.device("meta"))
    _checks.class_ids(ids, 5, ignore_index=5)


def test_powers_are_floats():
    for value, expected in ((2, 2.0), (0.75, 0.75), (True, 1.0), (False, 0.0)):
        got = _checks.power(value)
        assert got == expected
        assert type(got) is float
