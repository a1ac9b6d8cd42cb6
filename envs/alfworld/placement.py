"""Filling a room with objects as the published games do.

- ``Stream``: a small random stream that is the same on every platform and numpy version.
- ``Placed``: an object, its type and the receptacle it lies in or on.
- ``places``: the receptacle types in a room where an object type may start.
- ``roomy``: those of them that take any number of objects.
- ``furnish``: all objects of one game.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeVar

import numpy as np

from .layouts import Receptacle, Room, mangle, room, rules
from .published import SPAWN

Choice = TypeVar("Choice")

_SINGLE: Final = frozenset(
    {"CoffeeMachine", "HandTowelHolder", "StoveBurner", "Toaster", "ToiletPaperHanger", "TowelHolder"}
)
"""Receptacle types with room for one object."""
LAMP: Final = "DeskLamp"


class Stream:
    """Random draws made from the raw 64-bit words of PCG64, whose stream numpy guarantees for good."""

    __slots__ = ("_bits",)

    def __init__(self, *key: int) -> None:
        """Seed with ``key``, non-negative integers; different keys give independent streams."""
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, n: int) -> int:
        """Return an integer of [0, n), uniform up to a bias of ``n / 2**64``."""
        return (int(self._bits.random_raw()) * n) >> 64

    def choice(self, options: Sequence[Choice]) -> Choice:
        """Return one of ``options``, uniformly."""
        return options[self.below(len(options))]

    def weighted(self, weights: Mapping[Choice, int]) -> Choice:
        """Return a key with probability proportional to its weight."""
        at = self.below(sum(weights.values()))
        for option, weight in weights.items():
            at -= weight
            if at < 0:
                return option
        raise AssertionError("weights changed while drawing")


@dataclass(frozen=True, slots=True)
class Placed:
    """An object of a game."""

    name: str
    type: str
    receptacle: Receptacle


@cache
def places(number: int, type: str) -> Mapping[str, int]:
    """Return the weights of the receptacle types of room ``number`` where objects of ``type`` start; may be empty.

    Frequencies of the published games, restricted to what the room has; where it has none of these, all receptacles
    that may hold the object are equally likely.
    """
    here = room(number)
    row = SPAWN[here.kind].get(type)
    known = {kind: weight for kind, weight in row.places.items() if here.of_type(kind)} if row else {}
    if known or row is None:
        return known
    holds = rules().holds
    return {kind: 1 for kind in here.receptacle_types if type in holds.get(kind, ())}


def roomy(number: int, type: str) -> set[str]:
    """Return the receptacle types of ``places`` that never fill up."""
    return places(number, type).keys() - _SINGLE


def furnish(
    stream: Stream, here: Room, *, target: str, copies: int, avoid: str | None, lamp: bool
) -> tuple[Placed, ...]:
    """Draw the objects of one game.

    Args:
        stream: where the draws come from.
        here: the room.
        target: the object type that the goal names.
        copies: its least number of instances.
        avoid: a receptacle type in which no target may start.
        lamp: whether the room must have its desk lamp.
    """
    free = {receptacle.name for receptacle in here.receptacles}
    objects: list[Placed] = []
    taken: set[str] = set()
    for kind in sorted(here.objects & SPAWN[here.kind].keys()):
        counts = dict(zip((1, 2, 3), SPAWN[here.kind][kind].counts, strict=True))
        least = copies if kind == target else int(lamp and kind == LAMP)
        for _ in range(max(stream.weighted(counts), least)):
            receptacle = _receptacle(stream, here, kind, free, avoid if kind == target else None)
            if receptacle is None:
                break
            if receptacle.type in _SINGLE:
                free.discard(receptacle.name)
            objects.append(Placed(_name(stream, kind, taken), kind, receptacle))
    return tuple(objects)


def _receptacle(stream: Stream, here: Room, kind: str, free: set[str], avoid: str | None) -> Receptacle | None:
    weights = {
        where: weight
        for where, weight in places(here.number, kind).items()
        if where != avoid and any(receptacle.name in free for receptacle in here.of_type(where))
    }
    if not weights:
        return None
    where = stream.weighted(weights)
    return stream.choice([receptacle for receptacle in here.of_type(where) if receptacle.name in free])


def _name(stream: Stream, kind: str, taken: set[str]) -> str:
    """An ALFRED name with random coordinates: they order, and so number, the objects of one type."""
    while True:
        x, y, z = (stream.below(1000) / 100 - 5, stream.below(200) / 100, stream.below(1000) / 100 - 5)
        name = mangle(f"{kind}|{x:+06.2f}|{y:+06.2f}|{z:+06.2f}")
        if name not in taken:
            taken.add(name)
            return name
