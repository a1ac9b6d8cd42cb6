"""The messages that an agent writes.

- ``parse``: a message as a ``Search``, an ``Answer`` or an ``Invalid``.
- ``INSTRUCTIONS``: what an agent is told of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

INSTRUCTIONS: Final = (
    "Answer the question with the help of a search engine. In each message write either one search, as "
    "<search>query</search>, to read the passages that match it best, or your final answer, as "
    "<answer>answer</answer>, in as few words as possible. You may think first, in <think>...</think>."
)
EXPECTED: Final = "Write <search>query</search> or <answer>answer</answer>."
EMPTY: Final = "There is nothing between the tags. "
_ACTIONS: Final = ("search", "answer")
_TAGS: Final = tuple(f"<{slash}{name}>" for name in ("think", *_ACTIONS) for slash in ("", "/"))


@dataclass(frozen=True, slots=True)
class Search:
    """A query."""

    query: str
    well_formed: bool
    """The message is one thought at most, then this, and nothing else."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A final answer."""

    text: str
    well_formed: bool


@dataclass(frozen=True, slots=True)
class Invalid:
    """Neither of them."""

    feedback: str


def parse(message: str) -> Search | Answer | Invalid:
    """Read the first search or answer outside thoughts, in time linear in the message.

    Text around it is passed over, and so is a missing closing tag at the end, where a stop string has cut the message;
    neither is well formed. A thought whose opening tag is missing (chat templates write it) is.

    >>> parse("<think>Who wrote it?</think><search>The Silent Orchard</search>")
    Search(query='The Silent Orchard', well_formed=True)
    >>> parse("The answer is <answer> 1871 </answer>")
    Answer(text='1871', well_formed=False)
    """
    rest, clean = _without_thoughts(message)
    found = [(at, name) for name in _ACTIONS if (at := rest.find(f"<{name}>")) >= 0]
    if not found:
        return Invalid(EXPECTED)
    start, name = min(found)
    body = start + len(name) + 2
    end = rest.find(f"</{name}>", body)
    closed = end >= 0
    content = (rest[body:end] if closed else rest[body:]).strip()
    if not content:
        return Invalid(EMPTY + EXPECTED)
    around = rest[:start] + (rest[end + len(name) + 3 :] if closed else "")
    well_formed = clean and closed and not around.strip() and not any(tag in content for tag in _TAGS)
    return Search(content, well_formed) if name == "search" else Answer(content, well_formed)


def _without_thoughts(message: str) -> tuple[str, bool]:
    """Return what lies outside thoughts, and whether there is one thought at most, at the start."""
    opened, closed = message.find("<think>"), message.find("</think>")
    if opened < 0 and closed < 0:
        return message, True
    clean = True
    if closed >= 0 and not 0 <= opened < closed:
        message = "<think>" + message
        opened = 0
    parts, at, thoughts = [], 0, 0
    while (opened := message.find("<think>", at)) >= 0:
        closed = message.find("</think>", opened)
        parts.append(message[at:opened])
        thoughts += 1
        if closed < 0:  # what was meant as an action may follow in the open thought
            at, clean = opened + len("<think>"), False
            break
        at = closed + len("</think>")
    clean = clean and thoughts == 1 and not parts[0].strip()
    return "".join(parts) + message[at:], clean
