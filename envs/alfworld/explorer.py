"""An expert that knows only what the agent has seen, and looks for the rest where it is likely to be.

- ``explorer_action``: the next command.
- ``reveals``: what a command has just made known.

Imitating the oracle teaches to take what is not there: it goes straight to objects that nobody has seen yet, so a
model learns that every place it goes to holds what it wants. The explorer's actions follow from the observations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Final

from .expert import Fact, World, commands, goal_of
from .games import Game
from .layouts import OPENABLE
from .published import SPAWN

_LOOKS: Final = ("go to ", "open ", "examine ")
_OPENABLE: Final = frozenset(f"{name.lower()}type" for name in OPENABLE)
_UNHEARD: Final = 0.1
"""Weight, in percent, of a receptacle type that may hold the object and in the published games never does."""


def explorer_action(
    game: Game, facts: Iterable[Fact], seen: Collection[str], admissible: Collection[str], names: Mapping[str, str]
) -> str | None:
    """Return what someone does who knows of an episode what its commands have made known.

    As soon as the objects that the goal needs have been seen it acts on it; until then it visits the receptacle where
    the chance of finding one is highest for the turns it costs, by the published games' frequencies.

    Args:
        game: the game being played.
        facts: the true facts now; those that the agent cannot know are left aside.
        seen: what ``reveals`` has returned in this episode.
        admissible: the commands that would work now.
        names: PDDL names (lower case) to display names.

    Returns:
        A member of ``admissible``, or None when the goal holds already or nothing is left to try.
    """
    goal, world = goal_of(game), _known(facts, seen, names)
    wanted = goal.lamp if goal.lamp is not None and world.holds(goal.object) else goal.object
    command = next(chain(commands(goal, world), _explore(wanted, world, seen)), None)
    return command if command in admissible else None


def reveals(command: str, facts: Iterable[Fact], names: Mapping[str, str]) -> str | None:
    """Return the PDDL name of what ``command`` has made known, given the facts after it.

    That is a receptacle whose content was shown, or an object that was put down: it may lie in a receptacle whose
    other content nobody has looked at, when that shares its place with another one.
    """
    if command.startswith("move "):
        moved = command.removeprefix("move ").partition(" to ")[0]
        return next((name for name, shown in names.items() if shown == moved), None)
    verb = next((verb for verb in _LOOKS if command.startswith(verb)), None)
    if verb is None:
        return None
    world, looked_at = World(facts, names), command.removeprefix(verb)
    receptacle = next((name for name in world.location if names[name] == looked_at), None)
    return None if receptacle is None or world.shut(receptacle) else receptacle


def _known(facts: Iterable[Fact], seen: Collection[str], names: Mapping[str, str]) -> World:
    """The world as the agent knows it: what has not been seen is empty, and opens if most of its type do.

    No game starts with a lamp on, a receptacle open, or its goal's object in the state that the goal asks for:
    where these facts hold, the agent has brought them about.
    """
    world = World((fact for fact in facts if fact[0] != "inreceptacle" or fact[2] in seen or fact[1] in seen), names)
    for name, place in world.location.items():
        if name not in seen and place != world.agent:
            opens = world.receptacle_type.get(name) in _OPENABLE
            (world.openable.add if opens else world.openable.discard)(name)
    return world


def _explore(kind: str, world: World, seen: Collection[str]) -> Iterator[str]:
    """Look into the most promising receptacle that has not been looked into."""
    of_type = Counter(world.receptacle_type.get(name, "") for name in world.location)
    weights = _likely(kind)

    def promise(receptacle: str) -> tuple[float, int, str, int]:
        place = world.receptacle_type.get(receptacle, "")
        turns, name, number = world.effort(receptacle)
        chance = weights.get(place, 0) + _UNHEARD * ((place, kind) in world.can_contain)
        return -chance / of_type[place] / max(turns, 1), turns, name, -number  # as the room's description lists them

    unseen = [name for name in world.location if name not in seen]
    if unseen:
        best = min(unseen, key=promise)
        # Nothing to do to reach it: it shares its place with another one, whose content was shown on arrival.
        yield from list(world.reach(best)) or [f"examine {world.names[best]}"]


@cache
def _likely(kind: str) -> dict[str, float]:
    """Percent of the objects of PDDL type ``kind`` per receptacle type, mean over the kinds of rooms that have any."""
    tables = [spawn.places for room in SPAWN.values() for name, spawn in room.items() if f"{name.lower()}type" == kind]
    total: Counter[str] = Counter()
    for places in tables:
        total.update({f"{place.lower()}type": weight for place, weight in places.items()})
    return {place: weight / len(tables) for place, weight in total.items()}
