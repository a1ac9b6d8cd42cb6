"""An expert that knows only what the agent has seen, and looks for the rest where it is likely to be.

- ``explorer_action``: the next command.
- ``reveals``: the receptacle whose content a command has just shown.

Imitating the oracle teaches to take what is not there: it goes straight to objects that nobody has seen yet, so a
model learns that every place it goes to holds what it wants. The explorer's actions follow from the observations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache

from .expert import Fact, World, commands, goal_of
from .games import Game
from .published import SPAWN

_LOOKS = ("go to ", "open ", "examine ")
_UNHEARD = 0.1
"""Weight, in percent, of a receptacle type where the published games never have the object."""


def explorer_action(
    game: Game, facts: Iterable[Fact], seen: Collection[str], admissible: Collection[str], names: Mapping[str, str]
) -> str | None:
    """Return what someone does who has looked into the receptacles ``seen`` (PDDL names) and nowhere else.

    As soon as the objects that the goal needs have been seen it acts on it; until then it visits the receptacle where
    the chance of finding one is highest for the turns it costs, by the published games' frequencies.

    Returns:
        A member of ``admissible``, or None when the goal holds already or nothing is left to try.
    """
    known = [fact for fact in facts if fact[0] != "inreceptacle" or fact[2] in seen]
    goal, world = goal_of(game), World(known, names)
    wanted = goal.lamp if goal.lamp is not None and world.holds(goal.object) else goal.object
    command = next(commands(goal, world), None) or next(_explore(wanted, World(known, names), seen), None)
    return command if command in admissible else None


def reveals(command: str, facts: Iterable[Fact], names: Mapping[str, str]) -> str | None:
    """Return the receptacle (PDDL name) whose content ``command`` has shown, given the facts after it."""
    verb = next((verb for verb in _LOOKS if command.startswith(verb)), None)
    if verb is None:
        return None
    shown = command.removeprefix(verb)
    world = World(facts, names)
    receptacle = next((name for name in world.location if names[name] == shown), None)
    return None if receptacle is None or world.shut(receptacle) else receptacle


def _explore(kind: str, world: World, seen: Collection[str]) -> Iterator[str]:
    """Reach the most promising receptacle that has not been looked into."""
    of_type = Counter(world.receptacle_type.get(name, "") for name in world.location)
    weights = _likely(kind)

    def promise(receptacle: str) -> tuple[float, str, int]:
        place = world.receptacle_type.get(receptacle, "")
        turns, name, number = world.effort(receptacle)
        chance = weights.get(place, 0) + _UNHEARD * ((place, kind) in world.can_contain)
        return -chance / of_type[place] / max(turns, 1), name, number

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
