"""Where the examples look for their data and packages, and what they say of what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from load_example import load_example


@pytest.fixture
def data() -> ModuleType:
    return load_example("_data")


def test_a_file_is_looked_for_where_the_user_says_then_installed_then_in_wheels(data, tmp_path, monkeypatch):
    """Each place is found once the places before it lack the file."""
    monkeypatch.setattr(data, "SYSTEM", tmp_path / "share")
    wheels = tmp_path / "wheels"
    monkeypatch.syspath_prepend(str(wheels))
    given = tmp_path / "given"
    places = [
        given,
        given / "usr/share/set",
        given / "made_up/folder",
        tmp_path / "share/set",
        wheels / "made_up/folder",
    ]
    for place in places:
        place.mkdir(parents=True)
        (place / "names.txt").write_text("")

    def look(name: str = "names.txt") -> Path:
        return data.find_file(name, "pip install made-up==1.0", data=given, system="set", wheel="made_up/folder")

    for place in places:
        assert look() == place / "names.txt"
        (place / "names.txt").unlink()
    with pytest.raises(data.DataError) as error:
        look()
    assert str(error.value) == "names.txt is not installed: pip install made-up==1.0 (or give --data DIR)"


def test_require(data):
    assert data.require("json", "") is sys.modules["json"]
    with pytest.raises(data.DataError, match=r"^made_up is not installed: pip install made-up$"):
        data.require("made_up.part", "pip install made-up")
