"""How good an answer is.

- ``exact_match``, ``f1``: the measures of SQuAD and HotpotQA, each the best over all accepted answers.
- ``arpo``: the reward of ARPO (Eq. 8).
- ``normalise``: SQuAD's normal form, under which answers are compared.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Iterable

REWARDS = ("em", "f1", "arpo")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalise(text: str) -> str:
    """Return ``text`` in lower case without punctuation, articles and superfluous space.

    >>> normalise("The  Silent Orchard!")
    'silent orchard'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Iterable[str]) -> bool:
    """Whether ``answer`` is one of ``accepted``, normalised."""
    given = normalise(answer)
    return any(given == normalise(gold) for gold in accepted)


def f1(answer: str, accepted: Iterable[str]) -> float:
    """Return the harmonic mean of precision and recall over normalised words, 0 to 1.

    "yes" and "no" share no credit with anything else, as HotpotQA has it.

    >>> f1("the city of Calden", ["Calden"])
    0.5
    """
    return max((_f1(normalise(answer), normalise(gold)) for gold in accepted), default=0.0)


def _f1(given: str, gold: str) -> float:
    if given == gold:
        return 1.0
    if given in _CLOSED or gold in _CLOSED:
        return 0.0
    ours, theirs = given.split(), gold.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def arpo(accuracy: float, well_formed: bool, tools: Collection[str], bonus: float = 0.1) -> float:
    """Return ARPO's reward (Dong et al. 2025, Eq. 8).

    Args:
        accuracy: of the answer, 0 to 1; the paper trains on token F1.
        well_formed: every message had the right form.
        tools: names of the tools that the episode used; ``bonus`` is for having used both search and python.
        bonus: the paper's r_M.

    >>> arpo(0.6, True, {"search", "python"}), arpo(0.0, True, {"search", "python"}), arpo(0.6, False, {"search"})
    (0.7, 0.0, -1.0)
    """
    if not well_formed:
        return -1.0
    if accuracy <= 0:
        return 0.0
    return max(accuracy + bonus * ({"search", "python"} <= set(tools)), accuracy)
