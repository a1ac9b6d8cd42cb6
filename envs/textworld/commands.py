"""What a player writes, as a command of the game.

- ``understand``: the listed command that a text stands for.

The compiled games' parser reads these forms too; ``engine="inform"`` has it whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_LONGEST = 300
"""Characters; no command of any game is so long."""
_WHOLE = {
    "l": "look",
    "i": "inventory",
    "inv": "inventory",
    "take inventory": "inventory",
    "look around": "look",
    **{word: f"go {way}" for way in ("north", "south", "east", "west") for word in (way, way[0], f"go {way[0]}")},
}
_STARTS = (
    ("x ", "examine "),
    ("look at ", "examine "),
    ("get ", "take "),
    ("pick up ", "take "),
    ("put down ", "drop "),
    ("walk ", "go "),
    ("run ", "go "),
    ("shut ", "close "),
)


def understand(text: str, commands: Collection[str]) -> str | None:
    """Return the one of ``commands`` that ``text`` stands for, None where there is none.

    >>> understand("Get the apple", ["take apple from table", "look"])
    'take apple from table'
    """
    if text in commands:
        return text
    if len(text) > _LONGEST:
        return None
    plain = _plain(text)
    plain = _WHOLE.get(plain, plain)
    sourceless = plain.startswith(("take ", "get "))
    for start, verb in _STARTS:
        if plain.startswith(start):
            plain = verb + plain.removeprefix(start)
            break
    known = {_plain(command): command for command in commands}
    if plain in known:
        return known[plain]
    for ours, theirs in ((" in ", " into "), (" onto ", " on ")):
        if plain.startswith(("put ", "insert ")) and ours in plain:
            item, place = plain.split(" ", 1)[1].split(ours, 1)
            for verb in ("put", "insert"):
                if (command := f"{verb} {item}{theirs}{place}") in known:
                    return known[command]
    if sourceless:
        whole = [command for name, command in known.items() if name.startswith(f"{plain} from ")]
        return whole[0] if len(whole) == 1 else None
    return None


def _plain(text: str) -> str:
    """Return ``text`` in lower case, without articles, closing full stop and superfluous spaces."""
    words = re.sub(r"[.!]+\s*$", "", text.casefold()).split()
    return " ".join(word for word in words if word not in ("the", "a", "an"))
