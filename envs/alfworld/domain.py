"""ALFWorld's PDDL domain, its text grammar and the names it shows for PDDL objects.

- ``domain_pddl``: the domain that all published games share.
- ``grammar``: the grammar of a game with its task sentence filled in.
- ``display_names``: ``potato_bar__plus_01_dot_20_bar_...`` to ``potato 1``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from .upstream import upstream

_HELP = re.compile(r'feedback :: "#help\.feedback#";\s*grammar :: """\s*(\{.*?\})\s*""";', re.DOTALL)
_GOAL = "UNKNOWN GOAL"


@lru_cache(maxsize=1)
def domain_pddl() -> str:
    """Return the domain of the published games.

    ALFWorld's file comments out one line of it, which lets objects be cleaned in any ``SinkType`` receptacle.
    """
    text = upstream().domain
    text = text.replace(";(receptacleType ?r SinkType)", "(receptacleType ?r SinkType)")
    return re.sub(r"\n\s*\)\s*$", "\n)\n", text)


@lru_cache(maxsize=1)
def _grammar_template() -> str:
    """The published grammar: the task sentence brings its own full stop and the help text is a literal."""
    text = upstream().grammar

    def literal(match: re.Match[str]) -> str:
        return f'feedback :: "{json.loads(match.group(1))["help.feedback"][0]["rhs"]}";'

    return _HELP.sub(literal, text).replace(f"{_GOAL}.", _GOAL)


def grammar(task: str) -> str:
    """Return the grammar of a game whose goal reads ``task``, such as ``"put a mug in desk."``."""
    return _grammar_template().replace(_GOAL, task)


def display_names(ids: Iterable[str]) -> dict[str, str]:
    """Map PDDL object names of one game to the names its text uses.

    Names are lower-case, as the translator writes them. Objects of one kind are numbered from the last to the
    first in sorted order; names without a coordinate are kept as they are.

    >>> display_names(["mug_bar__plus_01_dot_00", "mug_bar__minus_01_dot_00", "agent1"])
    {'agent1': 'agent1', 'mug_bar__minus_01_dot_00': 'mug 2', 'mug_bar__plus_01_dot_00': 'mug 1'}
    """
    order = sorted({name.lower() for name in ids})
    kinds = {name: _kind(name) for name in order}
    left = Counter(kind for kind in kinds.values() if kind)
    shown = {}
    for name in order:
        kind = kinds[name]
        shown[name] = f"{kind} {left[kind]}" if kind else name
        left[kind] -= 1
    return shown


def _kind(name: str) -> str:
    kind, bar, _ = name.partition("_bar_")
    if not bar:
        return ""
    return f"{kind}basin" if "basin" in name else kind
