"""An expert that reads the true facts of a game and says what to do next.

- ``Goal``, ``parse_goal``: what a game asks for, read from its PDDL.
- ``Problem``, ``parse_problem``: the objects, initial facts and goal of a PDDL problem.
- ``plan``: the commands that win from a state.
- ``oracle_action``: the first of these, if it is admissible.
- ``World``, ``commands``, ``goal_of``: what these are made of.

Facts are tuples ``(predicate, *arguments)`` in lower case; ``names`` maps PDDL names to display names. The expert keeps
no memory: it plans anew from whatever state the game is in, so it also recovers from anyone's mistakes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from .games import Game

Fact = tuple[str, ...]

_STATIONS: Final = {
    "isclean": ("clean", ("sinkbasintype", "sinktype")),
    "ishot": ("heat", ("microwavetype",)),
    "iscool": ("cool", ("fridgetype",)),
}
"""State to the command that brings it about and the receptacle types where it works."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a game asks for; all names are lower-case PDDL types."""

    object: str
    receptacle: str | None
    """Where the objects must lie; None when one must be held under a lamp."""
    lamp: str | None
    state: str | None
    """``isclean``, ``ishot`` or ``iscool``."""
    count: int
    """How many objects must lie in one receptacle."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A PDDL problem."""

    objects: tuple[str, ...]
    facts: frozenset[Fact]
    goal: Goal


def parse_goal(problem: str) -> Goal:
    """Read the goal of a PDDL problem of one of the six task types."""
    text = problem[problem.index("(:goal") :].lower()
    objects = dict(re.findall(r"\(objecttype \?(\w+) (\w+)\)", text))
    receptacle = re.search(r"\(receptacletype \?\w+ (\w+)\)", text)
    state = next((state for state in _STATIONS if f"({state} " in text), None)
    wanted = objects.get("o") or objects["o1"]
    count = 2 if "o2" in objects else 1
    return Goal(wanted, receptacle and receptacle[1], objects.get("ot"), state, count)


@lru_cache(maxsize=64)
def parse_problem(problem: str) -> Problem:
    """Read a PDDL problem whose initial facts are plain atoms; the generator and the native engine ask for the same."""
    init = problem.index("(:init")
    declared = problem[problem.index("(:objects") : init]
    atoms = re.findall(r"\(([^():]+)\)", problem[init : problem.index("(:goal")].lower())
    return Problem(
        objects=tuple(name.lower() for name in re.findall(r"(\S+)\s+-\s+\w+", declared)),
        facts=frozenset(tuple(atom.split()) for atom in atoms),
        goal=parse_goal(problem),
    )


def oracle_action(
    game: Game, facts: Iterable[Fact], admissible: Collection[str], names: Mapping[str, str]
) -> str | None:
    """Return the expert's next command in the state that ``facts`` describe.

    Args:
        game: the game being played.
        facts: the true facts now.
        admissible: the commands that would work now.
        names: PDDL names (lower case) to display names.

    Returns:
        A member of ``admissible``, or None when the goal holds already or cannot be reached.
    """
    command = next(commands(goal_of(game), World(facts, names)), None)
    return command if command in admissible else None


def plan(goal: Goal, facts: Iterable[Fact], names: Mapping[str, str]) -> list[str]:
    """Return the commands that lead from ``facts`` to ``goal``; empty when it holds or cannot be reached."""
    return list(commands(goal, World(facts, names)))


@lru_cache(maxsize=4096)
def _goal(problem: str) -> Goal:
    return parse_goal(problem)


def goal_of(game: Game) -> Goal:
    """Return what ``game`` asks for."""
    return _goal(game.problem)


class World:
    """The facts, indexed, and kept up to date by the commands that its methods yield."""

    def __init__(self, facts: Iterable[Fact], names: Mapping[str, str]) -> None:
        rows: defaultdict[str, list[Any]] = defaultdict(list)
        for predicate, *arguments in facts:
            rows[predicate].append(arguments)
        self.names = names
        self.receptacle_type: dict[str, str] = dict(rows["receptacletype"])
        self.object_type: dict[str, str] = dict(rows["objecttype"])
        self.location: dict[str, str] = dict(rows["receptacleatlocation"])
        self.can_contain = {(place, kind) for place, kind in rows["cancontain"]}
        self.openable = {name for (name,) in rows["openable"]}
        self.opened = {name for (name,) in rows["opened"]}
        self.pickupable = {name for (name,) in rows["pickupable"]}
        self.toggled = {name for (name,) in rows["istoggled"]}
        self.states = {state: {name for (name,) in rows[state]} for state in _STATIONS}
        self.inside: defaultdict[str, set[str]] = defaultdict(set)
        """Object to the receptacles that it is in: overlapping ones can both claim it."""
        for name, receptacle in rows["inreceptacle"]:
            self.inside[name].add(receptacle)
        self.agent = next((where for _, where in rows["atlocation"]), "")
        self.held: str | None = next((name for _, name in rows["holds"]), None)

    def of_type(self, kinds: Collection[str]) -> list[str]:
        """Return the receptacles of these types that can be reached."""
        return [name for name in self.location if self.receptacle_type.get(name) in kinds]

    def effort(self, receptacle: str) -> tuple[int, str, int]:
        """Order receptacles by the commands needed to get into them, then as a person would list them."""
        kind, _, number = self.names[receptacle].rpartition(" ")
        away = self.location[receptacle] != self.agent
        return away + self.shut(receptacle), kind, int(number)

    def holds(self, kind: str) -> bool:
        """Whether the agent holds an object of type ``kind``."""
        return self.held is not None and self.object_type.get(self.held) == kind

    def go(self, receptacle: str) -> Iterator[str]:
        if self.agent != self.location[receptacle]:
            self.agent = self.location[receptacle]
            yield f"go to {self.names[receptacle]}"

    def take(self, name: str, receptacle: str) -> Iterator[str]:
        yield from self.reach(receptacle)
        self.inside[name].discard(receptacle)
        self.held = name
        yield f"take {self.names[name]} from {self.names[receptacle]}"

    def put(self, receptacle: str) -> Iterator[str]:
        yield from self.reach(receptacle)
        assert self.held is not None
        held, self.held = self.held, None
        self.inside[held].add(receptacle)
        yield f"move {self.names[held]} to {self.names[receptacle]}"

    def drop(self) -> Iterator[str]:
        """Put down what is held in the nearest receptacle that may contain it."""
        if self.held is None:
            return
        kind = self.object_type.get(self.held, "")
        homes = [name for name in self.location if (self.receptacle_type.get(name, ""), kind) in self.can_contain]
        if homes:
            yield from self.put(min(homes, key=self.effort))

    def shut(self, receptacle: str) -> bool:
        """Whether it must be opened first."""
        return receptacle in self.openable and receptacle not in self.opened

    def reach(self, receptacle: str) -> Iterator[str]:
        """Go there and open it."""
        yield from self.go(receptacle)
        if self.shut(receptacle):
            self.opened.add(receptacle)
            yield f"open {self.names[receptacle]}"


def commands(goal: Goal, world: World) -> Iterator[str]:
    """Yield the commands that lead to ``goal``, as far as ``world`` knows of what is needed."""
    if goal.lamp is not None:
        yield from _look(goal, goal.lamp, world)
    elif goal.receptacle is not None:
        yield from _place(goal, goal.receptacle, world)


def _look(goal: Goal, lamp_type: str, world: World) -> Iterator[str]:
    """Hold the object, then stand by a lamp that was switched on."""
    if not world.holds(goal.object):
        yield from world.drop()
        source = _source(goal, world, placed=set())
        if world.held is not None or source is None:
            return
        yield from world.take(*source)
    lamps = [
        (lamp not in world.toggled, world.effort(receptacle), lamp, receptacle)
        for lamp, kind in world.object_type.items()
        if kind == lamp_type
        for receptacle in world.inside[lamp] & world.location.keys()
    ]
    if not lamps:
        return
    dark, _, lamp, receptacle = min(lamps)
    yield from world.go(receptacle)
    if dark:
        world.toggled.add(lamp)
        yield f"use {world.names[lamp]}"


def _place(goal: Goal, receptacle_type: str, world: World) -> Iterator[str]:
    """Bring objects to the receptacle that already has most of them, each by way of the station that readies it."""
    targets = world.of_type((receptacle_type,))
    if not targets:
        return
    empty_handed = not world.holds(goal.object)

    def order(name: str) -> tuple[int, tuple[int, str, int]]:
        placed, (turns, kind, number) = len(_placed(goal, name, world)), world.effort(name)
        # Of two that hold one each, always the same: by distance, the one just left would look better every time.
        return -placed, (0 if placed and empty_handed else turns, kind, number)

    target = min(targets, key=order)
    while len(placed := _placed(goal, target, world)) < goal.count:
        if not world.holds(goal.object):
            yield from world.drop()
            source = _source(goal, world, placed)
            if world.held is not None or source is None:
                return
            yield from world.take(*source)
        held = world.held
        if goal.state is not None and held is not None and held not in world.states[goal.state]:
            verb, kinds = _STATIONS[goal.state]
            stations = world.of_type(kinds)
            if not stations:
                return
            station = min(stations, key=world.effort)
            yield from world.go(station)
            world.states[goal.state].add(held)
            yield f"{verb} {world.names[held]} with {world.names[station]}"
            continue
        yield from world.put(target)


def _placed(goal: Goal, target: str, world: World) -> set[str]:
    """The objects in ``target`` that count towards the goal; one that is held can be among them."""
    return {
        name
        for name, kind in world.object_type.items()
        if kind == goal.object and target in world.inside[name]
        if goal.state is None or name in world.states[goal.state]
    }


def _source(goal: Goal, world: World, placed: set[str]) -> tuple[str, str] | None:
    """The wanted object that takes the fewest commands to get and make ready, and the receptacle it lies in."""
    ready = world.states[goal.state] if goal.state is not None else set()
    sources = []
    for name, kind in world.object_type.items():
        if kind == goal.object and name in world.pickupable and name not in placed:
            for receptacle in world.inside[name] & world.location.keys():
                commands, *order = world.effort(receptacle)
                sources.append((commands - 2 * (name in ready), order, name, receptacle))
    if not sources:
        return None
    *_, name, receptacle = min(sources)
    return name, receptacle
