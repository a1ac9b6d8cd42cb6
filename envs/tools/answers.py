"""Whether an answer is right: numbers by value, everything else by its words.

- ``same_answer``: compare an answer with the expected one.
- ``number``: the value of a text that is one number, however it is written.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_MOST_DIGITS = 4000
_PLAIN = re.compile(r"([+-]?)(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?\Z")
_RATIO = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*/\s*([+-]?\d+(?:\.\d+)?)\Z")
_MIXED = re.compile(r"([+-]?)(\d+)\s+(\d+)\s*/\s*(\d+)\Z")
_GROUPS = re.compile(r"([+-]?\d{1,3}(?:[, ]\d{3})+)(\.\d+)?\Z")
_COMMAND = re.compile(r"\\(?:boxed|text|mathrm|mbox)\s*\{([^{}]*)\}")
_FRAC = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=\d)\s*(?:[^\W\d_]|°)\D*(?:(?<=m)[23])?\Z")
_LABEL = re.compile(r"\A(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*", re.IGNORECASE)
_CURRENCY = "$€£¥₹"


def same_answer(answer: str, expected: str, tolerance: float = 1e-6) -> bool:
    """Whether two answers say the same.

    Where the expected one is a number, so must the other be: ``1,000``, ``$1000.00``, ``1000 apples`` and ``2000/2``
    are all 1000, and ``50%`` is 50. They may differ by ``tolerance``, or by that part of the expected value if it is
    no whole number. Other texts are compared without case, accents, quotes, white space at commas and a last point.

    >>> same_answer("$1,000.00", "1000"), same_answer("3/4", "0.75"), same_answer("1000.5", "1000")
    (True, True, False)
    """
    value = number(expected)
    if value is None:
        return _words(answer) == _words(expected)
    other = number(answer)
    if other is None:
        return False
    margin = Fraction(tolerance)
    if value.denominator > 1 and abs(value) > 1:
        margin *= abs(value)
    return abs(other - value) <= margin


def number(text: str) -> Fraction | None:
    """Return the value of a text that is one number with or without a unit, None for any other."""
    if len(text) > _MOST_DIGITS:
        return None
    text = _clean(text)
    text = text.strip(_CURRENCY + " ")
    for currency in _CURRENCY:
        text = text.replace("-" + currency, "-")
    for candidate in (text, _UNIT.sub("", text).rstrip("% " + _CURRENCY), text.rstrip("% ")):
        value = _value(candidate.strip())
        if value is not None:
            return value
    return None


def _value(text: str) -> Fraction | None:
    if grouped := _GROUPS.match(text):
        text = grouped[1].replace(",", "").replace(" ", "") + (grouped[2] or "")
    try:
        if plain := _PLAIN.match(text):
            return Fraction(f"{plain[1]}{plain[2]}{'e' + plain[3] if plain[3] else ''}")
        if ratio := _RATIO.match(text):
            return Fraction(ratio[1]) / Fraction(ratio[2])
        if mixed := _MIXED.match(text):
            value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
            return -value if mixed[1] == "-" else value
    except (ZeroDivisionError, ValueError):
        return None
    return None


def _clean(text: str) -> str:
    """Take away what typesetting adds."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-").replace("\\$", "$")
    text = text.replace("\\%", "%").replace("\\!", "").replace("\\,", "").replace("⁄", "/").strip()
    for _ in range(4):
        before = text
        text = _COMMAND.sub(r"\1", text)
        text = _FRAC.sub(r"\1/\2", text)
        if text == before:
            break
    text = text.removeprefix("$").removesuffix("$").strip() if text.count("$") == 2 else text
    text = _LABEL.sub("", text).removeprefix("=").strip()
    return text[:-1].rstrip() if text.endswith(".") else text


def _words(text: str) -> str:
    """Return a text without what does not matter in it."""
    text = unicodedata.normalize("NFKD", _clean(text[:20_000])).casefold()
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    text = re.sub(r"\s*,\s*", ", ", re.sub(r"\s+", " ", text))
    return text.strip(" \"'`“”‘’*")
