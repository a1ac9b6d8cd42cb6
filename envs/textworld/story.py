"""A TextWorld game as plain data: its facts as bits, its actions as masks, its texts as parsed templates.

- ``Story``: everything that playing a game needs; made once per game and shared by all its episodes.
- ``Move``: one ground action.
- ``Thing``: a room or an object.
- ``Quest``: what completes or fails a quest.
- ``UnsupportedGameError``: the game has rules or texts beyond those of TextWorld's own generator and challenges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

COOKED = ("fried", "roasted", "grilled")
CUT = ("chopped", "sliced", "diced")
Node = tuple[object, ...]
"""Of a template: ``("text", text)``, ``("name",)``, ``("list", verb, article, holder)`` or ``("if", cases)``.

A case is ``(condition, nodes)``; a condition is a tuple of tests that all must hold; a test is ``(kind, thing)``.
"""


class UnsupportedGameError(Exception):
    """The native engine cannot play this game; the message says what it lacks."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A room or an object."""

    id: str
    kind: str
    """``"room"``, ``"door"``, ``"container"``, ``"supporter"`` or ``"object"``."""
    name: str
    indefinite: str
    """Its indefinite article where it is not "a" or "an"."""
    definite: str
    """Its definite article; "" for doors, whose names stand alone."""
    description: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One ground action: a command in one situation."""

    command: str
    verb: str
    """Name of the rule before its first slash, such as ``"take"``."""
    things: tuple[int, ...]
    """What the command names, in order."""
    needs: int
    """Facts that must hold before, as a mask."""
    adds: int
    removes: int
    lacks: int = 0
    """Facts that must not hold for the action to succeed."""
    recipe: int = 0
    """Facts that must hold for the action to succeed, though it is listed without them."""
    free: int = 0
    """How many free places in the player's hands it needs, in games that limit what the player carries."""
    used: int = 0
    """How many taken places it needs."""
    frees: int = 0
    """How many it frees; negative where it takes them."""


@dataclass(frozen=True, slots=True)
class Quest:
    """What completes or fails a quest: masks of facts, None for events that cannot happen."""

    win: tuple[int, ...]
    fail: tuple[int, ...]
    reward: int
    optional: bool
    repeatable: bool
    winnable: bool
    """It has winning events, so a game that does not list it as optional needs it."""


@dataclass(frozen=True)
class Story:
    """A game, ready to play."""

    objective: str
    max_score: int
    """0 where there is no bound."""
    walkthrough: tuple[str, ...]
    things: tuple[Thing, ...]
    facts: tuple[tuple[str, ...], ...]
    """The fact that each bit stands for."""
    start: int
    """The facts that hold at the start."""
    always: frozenset[tuple[str, ...]]
    """The facts that never change."""
    moves: tuple[Move, ...]
    quests: tuple[Quest, ...]
    capacity: int
    """How much the player can carry; 0 where there is no limit."""
    free: int
    """How much of that is free at the start, as the rules count it."""
    order: tuple[int, ...]
    """Movable things in the order in which lists name them at the start."""
    ingredients: tuple[tuple[int, str, str], ...] = ()
    """Of a recipe: thing, how it must be cooked and how cut."""
    digest: str = ""
    """Hash of the game: equal digests play identically."""

    @cached_property
    def bit(self) -> Mapping[tuple[str, ...], int]:
        """Return the mask of each fact that can change."""
        return {fact: 1 << index for index, fact in enumerate(self.facts)}

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Return the index of each thing by its id."""
        return {thing.id: index for index, thing in enumerate(self.things)}

    def mask(self, *fact: str) -> int:
        """Return the mask of a fact: -1 where it always holds, 0 where it never does."""
        return -1 if fact in self.always else self.bit.get(fact, 0)
