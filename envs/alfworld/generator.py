"""Procedural ALFWorld games: the published tasks, rooms and wording, placed anew by seed.

- ``GeneratedGames``: the index of generated games.
- ``GAMES``: how many games each split has by default.

A task id such as ``pick_heat_then_place_in_recep-Egg-None-Fridge-7/generated_train_00042`` ends in the game's number.
Type, room, object and receptacle come from a small stream of (namespace, seed, split, number); the placement of all
objects from a second one, drawn when the game is loaded. Any game can so be made alone, at any time, on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from ...errors import UsageError, nearest
from .domain import display_names, domain_pddl, grammar
from .expert import parse_problem, plan
from .games import SPLITS, TASK_TYPES, Game, check_split, unknown_task
from .layouts import Room, rooms, rules
from .placement import LAMP, Stream, furnish, roomy
from .problem import STATE, Spec, problem_pddl, sentences
from .published import DESTINATIONS, EXAMINED, SPAWN, TASK_MIX

GAMES: Final[Mapping[str, int]] = MappingProxyType({"train": 10_000, "valid_seen": 200, "valid_unseen": 200})
_NAMESPACE: Final = 0xA1F
_NUMBER: Final = re.compile(r"/generated_(\w+)_(\d{5,})$")


class GeneratedGames:
    """Games that need no download. ``valid_unseen`` plays in rooms that the other splits never use."""

    def __init__(
        self,
        *,
        num_games: Mapping[str, int] | None = None,
        task_types: Collection[str] | None = None,
        seed: int = 0,
    ) -> None:
        """Describe the games; none is made yet.

        Args:
            num_games: games per split, before ``task_types`` filters them; splits left out keep their default.
            task_types: the task types to keep; None keeps all six.
            seed: a non-negative number; another one gives other games.
        """
        sizes = dict(GAMES)
        for split, number in (num_games or {}).items():
            sizes[check_split(split)] = number
        for kind in task_types or ():
            if kind not in TASK_TYPES:
                raise UsageError(f"unknown ALFWorld task type {kind!r}{nearest(kind, TASK_TYPES)}")
        if seed < 0 or min(sizes.values()) < 0:
            raise UsageError(f"seed and num_games must not be negative, got seed={seed} and num_games={sizes}")
        self._sizes = sizes
        self._kinds = frozenset(task_types or TASK_TYPES)
        self._seed = seed

    @property
    def splits(self) -> tuple[str, ...]:
        """The three splits."""
        return SPLITS

    def tasks(self, split: str) -> tuple[str, ...]:
        """Return the ids of ``split`` in sorted order."""
        check_split(split)
        return _ids(self._seed, split, self._sizes[split], self._kinds)

    def load(self, split: str, task_id: str) -> Game:
        """Make one game; the list of tasks is not needed for it."""
        check_split(split)
        match = _NUMBER.search(task_id)
        if match is None or match[1] != split or int(match[2]) >= self._sizes[split]:
            raise unknown_task(task_id, split, self.tasks(split))
        number = int(match[2])
        spec = _spec(self._seed, split, number)
        if _id(spec, split, number) != task_id or spec.task_type not in self._kinds:
            raise unknown_task(task_id, split, self.tasks(split))
        return _game(spec, split, task_id, Stream(_NAMESPACE, self._seed, SPLITS.index(split), number, 1))


def _spec(seed: int, split: str, number: int) -> Spec:
    stream = Stream(_NAMESPACE, seed, SPLITS.index(split), number, 0)
    possible = _possible(split == "valid_unseen")
    task_type = stream.weighted({kind: sum(mix.values()) for kind, mix in TASK_MIX.items()})
    choices = possible[task_type]
    kind = stream.weighted({kind: TASK_MIX[task_type][kind] for kind in choices})
    room, objects = stream.choice(choices[kind])
    name, receptacles = stream.choice(objects)
    return Spec(task_type, name, stream.choice(receptacles), room)


@lru_cache(maxsize=16)
def _ids(seed: int, split: str, size: int, kinds: frozenset[str]) -> tuple[str, ...]:
    """Return the sorted ids of a split: the same for all environments of a process, and 15 ms for each 1,000 games."""
    specs = ((number, _spec(seed, split, number)) for number in range(size))
    return tuple(sorted(_id(spec, split, number) for number, spec in specs if spec.task_type in kinds))


def _id(spec: Spec, split: str, number: int) -> str:
    return f"{spec.title}/generated_{split}_{number:05d}"


def _game(spec: Spec, split: str, task_id: str, stream: Stream) -> Game:
    room = spec.room
    placing = spec.task_type in ("pick_and_place_simple", "pick_two_obj_and_place")
    objects = furnish(
        stream,
        room,
        target=spec.object,
        copies=2 if spec.task_type == "pick_two_obj_and_place" else 1,
        avoid=spec.receptacle if placing else None,
        lamp=spec.receptacle == LAMP,
    )
    start = stream.choice(room.starts)
    sentence = stream.choice(sentences(spec))
    problem = problem_pddl(spec, objects, start, task_id.partition("/")[2])
    parsed = parse_problem(problem)
    names = display_names(parsed.objects)
    walkthrough = plan(parsed.goal, parsed.facts, names)
    return Game(
        id=task_id,
        split=split,
        task=sentence,
        problem=problem,
        walkthrough=tuple(walkthrough),
        domain=domain_pddl(),
        grammar=grammar(sentence),
    )


Choices = Mapping[str, tuple[tuple[Room, tuple[tuple[str, tuple[str, ...]], ...]], ...]]
"""Room kind to its rooms, each with the objects that a task can name and the receptacles these can go to."""


@lru_cache(maxsize=2)
def _possible(unseen: bool) -> Mapping[str, Choices]:
    """Per task type, every goal that some room of the split can be furnished for."""
    possible: dict[str, Choices] = {}
    for task_type, mix in TASK_MIX.items():
        choices = {}
        for kind in mix:
            found = [(room, _goals(task_type, room)) for room in rooms(unseen)[kind]]
            if any(goals for _, goals in found):
                choices[kind] = tuple((room, goals) for room, goals in found if goals)
        possible[task_type] = choices
    return possible


def _goals(task_type: str, room: Room) -> tuple[tuple[str, tuple[str, ...]], ...]:
    here = sorted(name for name in room.objects & SPAWN[room.kind].keys() if roomy(room.number, name))
    if task_type == "look_at_obj_in_light":
        return tuple((name, (LAMP,)) for name in here if name in EXAMINED) if LAMP in here else ()
    can = ""
    if task_type in STATE:
        can, _, station = STATE[task_type]
        if not room.of_type(station):
            return ()
    goals = []
    for name in here:
        if can and name not in rules().properties[can]:
            continue
        receptacles = tuple(
            receptacle
            for receptacle in DESTINATIONS[task_type]
            if room.of_type(receptacle)
            and name in rules().holds[receptacle]
            and (can or roomy(room.number, name) - {receptacle})
        )
        if receptacles:
            goals.append((name, receptacles))
    return tuple(goals)
