"""The texts of TextWorld's games: Inform 7's substitutions, read once and printed for a situation.

- ``parse``: a description as a template.
- ``inform_text``: what Inform makes of the quotation marks and line breaks in a source text.
- ``clean``: what an interpreter of the compiled game prints, without its banner, prompt and status line.
- ``listing``: names as a sentence lists them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .story import Node, UnsupportedGameError

_STATUS = re.compile(r"\n*>[ \n]*(-= .* =-\d+/-?\d+)?\s*$")
_BANNER = re.compile(r"\A\s*_{8}[^\n]*\n(?:[^\n]*[$|_\\][^\n]*\n)+", re.MULTILINE)
_NOTE = re.compile(r"\A\s*\(the [^()\n]*\)\n")
_QUESTION = re.compile(r"\n+Would you like to RESTART, .*\Z", re.DOTALL)
_MARK = re.compile(r"\[([^\]]*)\]")
_LISTS = re.compile(r"(is-are )?(a |the )?list of things (?:in|on) (?:the )?(\w+)")
_LONE_QUOTE = re.compile(r"(?<![^\W_])'|'(?![^\W_])")


def clean(text: str) -> str:
    """Return ``text`` without what is not the game's: banner, prompt, status line, the parser's note, closing question.

    Of several empty lines one is left.

    >>> clean("\\nYou open the chest.\\n\\n\\n\\n>      -= Attic =-0/5")
    'You open the chest.'
    """
    text = _STATUS.sub("", text)
    text = _NOTE.sub("", _QUESTION.sub("", _BANNER.sub("", text)))
    text = re.sub(r"^ +(\*\*\* .* \*\*\*)", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip()


def inform_text(source: str) -> str:
    """Return ``source`` as Inform prints it: a quotation mark that is no apostrophe becomes double.

    >>> inform_text("It's a 'thing'.")
    'It\\'s a "thing".'
    """
    return _LONE_QUOTE.sub('"', source)


def parse(source: str, room: bool) -> tuple[Node, ...]:
    """Return the template of a description.

    Args:
        source: as the game's file has it.
        room: of a room, where Inform sets the lines; in other texts the line breaks count.

    Raises:
        UnsupportedGameError: it has a substitution that is not among those of TextWorld's grammars.
    """
    if room:  # each condition ends a text of its own
        parts = re.split(r"(?<=\[end if\])", source)
        source = "".join(inform_text(part) for part in parts)
        source = re.sub(r"[ \t]*\n[ \t]*", "\n", source)
        source = re.sub(r"\n+", lambda found: " " if len(found[0]) == 1 else "\n\n", source)
    else:
        source = inform_text(source)
    tokens = _MARK.split(source)
    nodes, at = _block(tokens, 0)
    if at < len(tokens):
        raise UnsupportedGameError(f"a text with [{tokens[at]}] out of place")
    return nodes


def listing(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    >>> listing(["a knife", "an apple", "a bed"])
    'a knife, an apple and a bed'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _block(tokens: Sequence[str], at: int) -> tuple[tuple[Node, ...], int]:
    """Return the nodes from token ``at`` (texts are even, marks odd) to the mark that ends the block, and its place."""
    nodes: list[Node] = []
    while at < len(tokens):
        token = tokens[at]
        if at % 2 == 0:
            if token:
                nodes.append(("text", token))
            at += 1
            continue
        mark = " ".join(token.lower().split())
        if mark.startswith(("else", "otherwise", "end if")):
            break
        if mark.startswith("if "):
            node, at = _branches(tokens, at)
            nodes.append(node)
            continue
        nodes.append(_substitution(mark))
        at += 1
    return tuple(nodes), at


def _branches(tokens: Sequence[str], at: int) -> tuple[Node, int]:
    cases: list[tuple[tuple[tuple[str, str], ...], tuple[Node, ...]]] = []
    condition = _condition(tokens[at].lower().split(maxsplit=1)[1])
    while True:
        nodes, at = _block(tokens, at + 1)
        cases.append((condition, nodes))
        mark = " ".join(tokens[at].lower().split()) if at < len(tokens) else "end if"
        if mark == "end if":
            return ("if", tuple(cases)), at + 1
        condition = () if mark in ("otherwise", "else") else _condition(re.sub(r"^(else|otherwise) if ", "", mark))


def _condition(source: str) -> tuple[tuple[str, str], ...]:
    """Return the tests that ``source`` joins; "" stands for the thing described."""
    tests: list[tuple[str, str]] = []
    for part in source.split(" and "):
        for pattern, kind in _TESTS:
            found = re.fullmatch(pattern, " ".join(part.split()))
            if found:
                tests.append((kind, found[1] if found.groups() else ""))
                break
        else:
            raise UnsupportedGameError(f"a text that depends on [if {part}]")
    return tuple(tests)


_TESTS = (
    (r"(?:the )?(\w+_\w+) is open", "open"),
    (r"(?:the )?(\w+_\w+) is closed", "closed"),
    (r"(?:the )?(\w+_\w+) is locked", "locked"),
    ("open", "open"),
    ("closed", "closed"),
    ("locked", "locked"),
    (r"there is something (?:in|on) (?:the )?(\w+)", "holds"),
    (r"there is nothing (?:in|on) (?:the )?(\w+)", "empty"),
    (r"(?:the )?(\w+_\w+) contains nothing", "empty"),
)


def _substitution(mark: str) -> Node:
    if mark == "noun":
        return ("name",)
    if mark == "line break":
        return ("text", "\n")
    found = _LISTS.fullmatch(mark)
    if found is None:
        raise UnsupportedGameError(f"a text with [{mark}]")
    verb, article, holder = found.groups()
    return ("list", bool(verb), (article or "").strip(), holder)
