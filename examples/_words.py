"""Words of a text in any script, and how much of the text is in none."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata

TOKENS = ("words", "whitespace")
ASCII_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
# Curly, modifier and full-width apostrophes become straight ones; soft hyphens vanish.
SPELLING = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07", "'") | {"\u00ad": None})


def split(text: str, tokens: str) -> tuple[list[str], int]:
    """Split a text into words; returns also the number of characters, spaces aside, that are in none of them.

    A word is letters with their marks, and at most one apostrophe between letters, in lower case (``str.lower``:
    "Größe" is "größe", where case folding would make it "grösse"), composed (NFC) so that a mark is the same however
    it was typed. Digits are no letters. ``tokens="whitespace"`` takes whatever stands between spaces, as it is.
    """
    if tokens == "whitespace":
        return text.split(), 0
    text = text.lower()
    if text.isascii():
        found = ASCII_WORD.findall(text)
    else:
        text = unicodedata.normalize("NFC", text).translate(SPELLING)
        found = _word().findall(text)
    return found, sum(map(len, text.split())) - sum(map(len, found))


@functools.cache
def _word() -> re.Pattern[str]:
    """Compile the pattern of a word, whose letters and marks are those of the interpreter's Unicode."""
    letters, marks = _characters("L"), _characters("M")
    joined = f"[{letters}{marks}]+(?:[\u200c\u200d]+[{letters}{marks}]+)*"  # joiners shape a word, and do not part it
    return re.compile(f"(?=[{letters}]){joined}(?:'(?=[{letters}]){joined})?")


def _characters(category: str) -> str:
    """List the ranges of characters whose category begins so, for a pattern."""
    inside = [unicodedata.category(chr(code)).startswith(category) for code in range(sys.maxunicode + 1)]
    starts = [i for i in range(len(inside)) if inside[i] and not (i and inside[i - 1])]
    stops = [i for i in range(len(inside)) if inside[i] and not (i + 1 < len(inside) and inside[i + 1])]
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, stops, strict=True))
