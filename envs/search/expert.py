"""How the expert finds an answer.

- ``next_action``: its next message, from whatever point an episode is at.
- ``demonstration``: all its messages for a question when each search finds what it looks for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .passages import Question


def next_action(question: Question, queries: Sequence[str], found: Collection[str]) -> str:
    """Search for the first of the passages that it takes and that was not read yet; answer when all were.

    A chain's titles are in the order in which reading one tells of the next, so that every query is made of names that
    the question or a passage has named. A title that brings up something else is tried with the question beside it,
    then given up.
    """
    for title in question.gold:
        if title not in found:
            for query in (title, f"{title} {question.text}"):
                if query not in queries:
                    return f"<search>{query}</search>"
    return f"<answer>{question.answers[0]}</answer>"


def demonstration(question: Question) -> list[str]:
    """Return a search for each passage, then the answer."""
    return [*(f"<search>{title}</search>" for title in question.gold), f"<answer>{question.answers[0]}</answer>"]
