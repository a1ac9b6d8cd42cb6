"""What the tokens of a message are for: thought, action, argument of a tool, or form.

- ``Kind``: those four. ``kinds``: the kind of each piece of a message.
- ``TokenKinds``: the same for tokens, by a tokenizer. ``kind_metrics``: entropy and share of each kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...agents.tree import Tree


class Kind(IntEnum):
    """A token is of the kind of its first character that is not blank; one that decodes to nothing is ``FORM``."""

    THOUGHT = 0
    """Inside ``<think>``; and text around the tags of an action that does nothing."""
    ACTION = 1
    """The command in ``<action>``, the tag that names a tool, a call's name; the whole message where it has no tags."""
    ARGUMENT = 2
    """What a tool is given: inside its tags, after ``"arguments":``, inside the parentheses of a call."""
    FORM = 3
    """Other tags, end tokens, blanks between tags."""


_THINK = re.compile(r"<think>|</think>")
_BLOCK = re.compile(r"<([A-Za-z_][\w.-]*)>(.*?)(</\1>|\Z)", re.DOTALL)
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_LETTER = re.compile(r"[A-Za-z_]")


class _Decoder(Protocol):
    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> Any: ...


def kinds(pieces: Sequence[str]) -> NDArray[np.uint8]:
    """The ``Kind`` of each of the pieces that make up a message, ``[N]``."""
    text = "".join(pieces)
    painted = np.full(len(text) + 1, Kind.ACTION, np.uint8)
    start = _paint_thoughts(text, painted)
    _paint_actions(text, start, painted)
    found = np.full(len(pieces), Kind.FORM, np.uint8)
    place = 0
    for number, piece in enumerate(pieces):
        if piece:
            found[number] = painted[place + min(len(piece) - len(piece.lstrip()), len(piece) - 1)]
        place += len(piece)
    return found


class TokenKinds:
    """Kinds of tokens, decoded one by one; what each decodes to is remembered."""

    def __init__(self, tokenizer: _Decoder) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def __call__(self, tokens: NDArray[np.int32]) -> NDArray[np.uint8]:
        """``[N]`` uint8 for the tokens ``[N]`` of one message."""
        return kinds([self._piece(int(token)) for token in tokens])

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = str(self._tokenizer.decode([token], skip_special_tokens=True))
        return self._pieces[token]


def kind_metrics(trees: Sequence[Tree], kinds_of: TokenKinds) -> dict[str, float]:
    """``entropy/in_thought``, ``_action``, ``_argument``, ``_form``, in nats a token, of those kinds that occur; and
    ``tokens/share_…``, the share of the sampled tokens that are of each kind."""
    nodes = [node for tree in trees for node in tree.nodes if node.sampled and len(node.tokens)]
    if not nodes:
        return {}
    kind = np.concatenate([kinds_of(node.tokens) for node in nodes])
    entropy = np.concatenate([node.entropies for node in nodes]).astype(np.float64)
    known = np.isfinite(entropy)
    metrics: dict[str, float] = {}
    for each in Kind:
        where, name = kind == each, each.name.lower()
        if (where & known).any():
            metrics[f"entropy/in_{name}"] = float(entropy[where & known].mean())
        metrics[f"tokens/share_{name}"] = float(where.mean())
    return metrics


def _paint_thoughts(text: str, painted: NDArray[np.uint8]) -> int:
    """Paint up to the end of the last thought, and say where that is."""
    marks = list(_THINK.finditer(text))
    if not marks:
        return 0
    # A template may open the thought itself, so that the message begins inside it.
    start, inside = 0, marks[0].group() == "</think>"
    for mark in marks:
        painted[start : mark.start()] = Kind.THOUGHT if inside else Kind.ACTION
        painted[mark.start() : mark.end()] = Kind.FORM
        start, inside = mark.end(), mark.group() == "<think>"
    if inside:
        painted[start:] = Kind.THOUGHT
        return len(text)
    return start


def _paint_actions(text: str, start: int, painted: NDArray[np.uint8]) -> None:
    blocks = list(_BLOCK.finditer(text, start))
    if not blocks:
        _paint_command(text, start, len(text), painted)
    place = start
    for block in blocks:
        _paint_rest(text, place, block.start(), painted)
        place = block.end()
        body, end = block.span(2)[0], block.span(2)[1]
        if block.group(1) in ("action", "tool_call"):
            painted[block.start() : body] = Kind.FORM
            _paint_command(text, body, end, painted)
        else:
            painted[block.start() : body] = Kind.ACTION  # the tag names the tool
            painted[body:end] = Kind.ARGUMENT
        painted[end : block.end()] = Kind.FORM
    if blocks:
        _paint_rest(text, place, len(text), painted)


def _paint_rest(text: str, start: int, end: int, painted: NDArray[np.uint8]) -> None:
    painted[start:end] = Kind.THOUGHT if text[start:end].strip() else Kind.FORM


def _paint_command(text: str, start: int, end: int, painted: NDArray[np.uint8]) -> None:
    painted[start:end] = Kind.ACTION
    place = start
    named = _ARGUMENTS.search(text, place, end)
    while place < end:
        if named is not None:
            opening, inner = named.end(), 0
        elif (opening := _call(text, place, end)) >= 0:
            inner = 1
        else:
            return
        closing = _closing(text, opening, end)
        painted[opening + inner : closing - inner] = Kind.ARGUMENT
        place = max(closing, opening + inner)
        # Where there is none ahead there is none later: it is not looked for again.
        named = named and _ARGUMENTS.search(text, place, end)


def _call(text: str, start: int, end: int) -> int:
    """The first parenthesis behind a name, -1 without one. Every word is read once, however long it is."""
    while (opening := text.find("(", start, end)) >= 0:
        first = opening
        while first > start and (text[first - 1].isalnum() or text[first - 1] in "_."):
            first -= 1
        if _LETTER.search(text, first, opening):
            return opening
        start = opening + 1
    return -1


def _closing(text: str, opening: int, end: int) -> int:
    """Behind the bracket that closes the one at ``opening``; the end where none does, or none is open. Brackets in
    quotes do not count."""
    depth, quote, place = 0, "", opening
    while place < end:
        sign = text[place]
        if quote:
            if sign == "\\":
                place += 1
            elif sign == quote:
                quote = ""
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if depth <= 0:
                return place + (depth == 0)
        place += 1
    return end
