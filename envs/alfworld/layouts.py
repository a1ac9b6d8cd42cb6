"""The rooms of generated games: ALFWorld's 120 floor plans and its table of what may lie where.

- ``Receptacle``, ``Room``: a place that holds objects; a floor plan with its receptacles, object types and free cells.
- ``room``, ``rooms``: one floor plan by number; the floor plans of a split.
- ``Rules``, ``rules``: ALFWorld's constants: which receptacle holds which object, what can be heated, cooled, cleaned.
- ``HELD_OUT``: the rooms that only ``valid_unseen`` uses.
- ``OPENABLE``: the receptacle types of which some can be opened.

ALFWorld's files give receptacles with the agent's pose in front of them. Receptacles that the published games have on
top of these (burners, bins, hangers, some drawers) stand in the poses of their siblings, or in free cells of their own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

from .published import MORE_RECEPTACLES, STANDARD
from .upstream import upstream

KINDS: Final[dict[str, range]] = {
    "kitchen": range(1, 31),
    "living_room": range(201, 231),
    "bedroom": range(301, 331),
    "bathroom": range(401, 431),
}
HELD_OUT: Final[frozenset[int]] = frozenset({9, 10, 29, 215, 219, 226, 308, 315, 325, 404, 424, 425})
"""The four unseen rooms of the published set, and eight more that its train split does not use either."""

OPENABLE: Final = frozenset({"Cabinet", "Drawer", "Fridge", "Microwave", "Safe"})
_CELL: Final = 0.25
"""Grid step of ALFWorld's poses in metres."""


@dataclass(frozen=True, slots=True)
class Receptacle:
    """A place that holds objects."""

    name: str
    """PDDL name, e.g. ``Drawer_bar__plus_00_dot_64_bar_...``."""
    type: str
    location: str
    """PDDL name of the pose from which it is reached; neighbours may share one."""
    openable: bool


@dataclass(frozen=True, slots=True)
class Room:
    """A floor plan."""

    number: int
    kind: str
    receptacles: tuple[Receptacle, ...]
    objects: frozenset[str]
    """Types of objects that this room has."""
    starts: tuple[str, ...]
    """Locations from which no receptacle is reached, one per free cell."""

    def of_type(self, type: str) -> tuple[Receptacle, ...]:
        """Return the receptacles of ``type``."""
        return tuple(receptacle for receptacle in self.receptacles if receptacle.type == type)

    @property
    def receptacle_types(self) -> tuple[str, ...]:
        """Return the types of receptacles, sorted."""
        return tuple(sorted({receptacle.type for receptacle in self.receptacles}))


@dataclass(frozen=True, slots=True)
class Rules:
    """ALFWorld's constants."""

    holds: dict[str, frozenset[str]]
    """Receptacle type to the object types that may be put there."""
    properties: dict[str, frozenset[str]]
    """Predicate (``cleanable``, ``heatable``, ...) to the object types that have it."""
    types: frozenset[str]
    """Every type of object and receptacle, furniture and slices included."""


@lru_cache(maxsize=1)
def rules() -> Rules:
    """Return the constants of ALFWorld's package."""
    constants = upstream().constants
    properties = {name.lower(): frozenset(types) for name, types in constants["VAL_ACTION_OBJECTS"].items()}
    properties["isReceptacleObject"] = frozenset(constants["MOVABLE_RECEPTACLES"])
    holds = {name: frozenset(types) for name, types in constants["VAL_RECEPTACLE_OBJECTS"].items()}
    return Rules(holds, properties, frozenset(constants["OBJECTS_WSLICED"]))


@lru_cache(maxsize=2)
def rooms(unseen: bool) -> dict[str, tuple[Room, ...]]:
    """Return the rooms per kind: the held-out ones, or all others."""
    return {
        kind: tuple(room(number) for number in numbers if (number in HELD_OUT) == unseen)
        for kind, numbers in KINDS.items()
    }


@cache
def room(number: int) -> Room:
    """Return a floor plan by its number (1-30 kitchens, 201-230 living rooms, 301-330 bedrooms, 401-430 bathrooms)."""
    plan = upstream().floor_plans[number]
    objects = set(plan.objects)
    placed = [
        Receptacle(mangle(name), kind, _location(*pose), kind in OPENABLE)
        for name, pose in sorted(plan.poses.items())
        for kind in [_type(name)]
    ]
    cells = [(x, z) for x, z in plan.cells]
    placed += _more(number, objects, placed, cells)
    taken = {receptacle.location for receptacle in placed}
    starts = tuple(start for x, z in cells if (start := _location(x, z, 0, 30)) not in taken)
    kind = next(kind for kind, numbers in KINDS.items() if number in numbers)
    return Room(number, kind, tuple(placed), frozenset(objects), starts)


def mangle(name: str) -> str:
    """Return ALFRED's ``Mug|+01.20|-00.30`` as a PDDL name.

    >>> mangle("Mug|+01.20|-00.30")
    'Mug_bar__plus_01_dot_20_bar__minus_00_dot_30'
    """
    for plain, spelt in (("|", "_bar_"), ("-", "_minus_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_")):
        name = name.replace(plain, spelt)
    return name


def _type(name: str) -> str:
    parts = name.split("|")
    return parts[-1] if parts[-1].endswith("Basin") else parts[0]


def _location(x: float, z: float, rotation: float, horizon: float) -> str:
    return mangle(f"loc|{round(x / _CELL)}|{round(z / _CELL)}|{round(rotation / 90)}|{round(horizon)}")


def _more(
    number: int, objects: set[str], placed: list[Receptacle], cells: list[tuple[float, float]]
) -> list[Receptacle]:
    """The receptacles that ALFWorld's poses lack; they do not open, as in the published games."""
    have = Counter(receptacle.type for receptacle in placed)
    missing = Counter({kind: count for kind, count in STANDARD.items() if kind in objects and not have[kind]})
    missing.update(MORE_RECEPTACLES.get(number, {}))
    added: list[Receptacle] = []
    for kind, count in sorted(missing.items()):
        siblings = [receptacle.location for receptacle in placed if receptacle.type == kind]
        for index in range(count):
            # Spread over the room by a fixed stride; two neighbours (burners, hangers) share a pose.
            x, z = cells[(37 * (len(added) // 2) + 11) % len(cells)]
            location = siblings[index % len(siblings)] if siblings else _location(x, z, len(added) // 2 % 4, 45)
            place = f"{x:+06.2f}|{0.5 + 0.01 * len(added):+06.2f}|{z:+06.2f}"
            # A basin is named after what it belongs to, as in ALFWorld's files: its text says the type once.
            name = mangle(
                f"{kind.removesuffix('Basin')}|{place}|{kind}" if kind.endswith("Basin") else f"{kind}|{place}"
            )
            added.append(Receptacle(name, kind, location, openable=False))
    return added
