"""Reading the tags and function calls in what an agent says; the time is linear in the length, whatever it says.

- ``blocks``: the ``<tag>…</tag>`` blocks of a text.
- ``function_calls``: the names of the functions that a text calls in JSON.
- ``count_calls``: how many tools a text calls.
- ``TOOL_TAGS``: the tags that are calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

TOOL_TAGS = ("search", "python", "calculator", "tool_call")
_TAG = re.compile(r"<(/?)(\w{1,64})>")
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One ``<tag>…</tag>``."""

    tag: str
    content: str
    start: int
    """Of the opening tag in the text."""
    end: int
    """After the closing tag."""


def blocks(text: str, tags: Collection[str]) -> list[Block]:
    """Return the blocks of these tags, in order. What is inside a block, or opened and never closed, is none.

    >>> [(block.tag, block.content) for block in blocks("<a>1<b>2</b></a><b>3</b><a>", ("a", "b"))]
    [('a', '1<b>2</b>'), ('b', '3')]
    """
    found = []
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        closing, name = tag.groups()
        if name not in tags:
            continue
        if opened is None:
            opened = None if closing else tag
        elif closing and name == opened[2]:
            found.append(Block(name, text[opened.end() : tag.start()], opened.start(), tag.end()))
            opened = None
    return found


def function_calls(text: str) -> list[str] | None:
    """Return the names that a JSON object or list of objects calls, None where the text is no such JSON.

    A call is an object with ``name`` and ``arguments`` or ``parameters``, also inside ``{"function": …}`` and a fence.

    >>> function_calls('[{"name": "ls", "arguments": {}}, {"name": "cd", "arguments": {"folder": "x"}}]')
    ['ls', 'cd']
    """
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    if not text.startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    names = []
    for item in value if isinstance(value, list) else [value]:
        item = item.get("function", item) if isinstance(item, dict) else item
        if not (isinstance(item, dict) and isinstance(item.get("name"), str)):
            return None
        if not ("arguments" in item or "parameters" in item):
            return None
        names.append(item["name"])
    return names or None


def count_calls(text: str, tools: Collection[str] | None = None) -> int:
    """Return how many tools ``text`` calls, thoughts left aside.

    Args:
        text: what an agent says.
        tools: names of tags and functions that count; None counts ``TOOL_TAGS`` and any function.

    >>> count_calls("<think><search>not this</search></think><search>this</search>")
    1
    >>> count_calls('<tool_call>{"name": "ls", "arguments": {}}</tool_call>', tools=("cd",))
    0
    """
    counted = TOOL_TAGS if tools is None else tools
    found = [block for block in blocks(text, {"think", "tool_call", *counted}) if block.tag != "think"]
    if not found:
        called = function_calls(text[_thought_end(text) :]) or []
        return len(called) if tools is None else sum(name in tools for name in called)
    number = 0
    for block in found:
        names = function_calls(block.content) if block.tag == "tool_call" else None
        if names is None or tools is None:
            number += len(names) if names else block.tag in counted
        else:
            number += sum(name in tools for name in names)
    return number


def _thought_end(text: str) -> int:
    """Return where the last thought of ``text`` ends."""
    thoughts = blocks(text, ("think",))
    return thoughts[-1].end if thoughts else 0
