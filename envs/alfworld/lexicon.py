"""Every word that ALFWorld's text is made of, for agents that build a vocabulary before they play.

- ``lexicon``: sentence forms, commands, goals, and names of receptacles and objects.
"""

from __future__ import annotations

import re
from functools import cache

from .domain import grammar
from .layouts import rules
from .problem import SENTENCES

HIGHEST_NUMBER = 8
"""Most things of one kind in a room, but for ``MANY``; published rooms reach it."""
MANY = {"cabinet": 32, "drawer": 32, "shelf": 16}
"""Kinds of which rooms have more; published rooms reach 28, 27 and 14."""


@cache
def lexicon() -> tuple[str, ...]:
    """Texts that together hold every word of observations, commands and goals; each numbered name stands once."""
    source = grammar("")
    forms = re.findall(r'"rhs": "(.*?)"', source) + re.findall(r'(?:template|feedback) :: "(.*?)"', source, re.DOTALL)
    # What stands in braces or between hashes is replaced when the text is made; the rest is said as it is.
    sentences = {re.sub(r"\{[^}]*\}|#[^#]*#|[\[\]|]|\\n", " ", form).strip() for form in forms}
    goals = {form.format(obj="", recep="") for forms in SENTENCES.values() for form in forms}
    names = {name.lower() for name in rules().types}
    things = {f"{name} {number + 1}" for name in names for number in range(MANY.get(name, HIGHEST_NUMBER))}
    return tuple(sorted((sentences | goals | names | things) - {""}))
