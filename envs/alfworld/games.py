"""What an ALFWorld game is, and the index that finds games, whatever their source.

- ``Game``: one game's problem, domain, grammar, task sentence and walkthrough.
- ``GameIndex``: the protocol of a source of games: sorted ids per split, and loading one by id.
- ``RecentGames``: the games that stay loaded.
- ``Playable``: the protocol of a game on one of the two engines.
- ``open_index``: the index for ``source="generated" | "dataset" | "pack"``.
- ``TASK_TYPES``, ``SPLITS``: the six task types and the three splits.
- ``goal_template``: a grammar without its task sentence.
- ``check_split``: a split's name, or an error that names the nearest.
- ``task_type``: the type part of a task id.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from ...errors import UsageError, nearest

SPLITS = ("train", "valid_seen", "valid_unseen")
SOURCES = ("generated", "dataset", "pack")
TASK_TYPES = (
    "look_at_obj_in_light",
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_two_obj_and_place",
)
Point = TypeVar("Point")
Loaded = TypeVar("Loaded")
GOAL_PLACEHOLDER = "UNKNOWN GOAL"
"""Stands for the task sentence in the grammar that all games share."""


@dataclass(frozen=True)
class Game:
    """One game: a PDDL problem under a domain, and the grammar that tells it."""

    id: str
    """``<type>-<object>-<movable>-<receptacle>-<scene>/<trial>``, unique within a source."""
    split: str
    task: str
    """The goal as a sentence, e.g. ``"put a hot potato in fridge."``."""
    problem: str
    walkthrough: tuple[str, ...]
    """Commands that win from the start; empty where none is known."""
    domain: str
    grammar: str
    """TextWorld grammar with the task sentence filled in."""

    @property
    def task_type(self) -> str:
        """One of ``TASK_TYPES`` (the first part of the id)."""
        return task_type(self.id)

    @cached_property
    def digest(self) -> str:
        """Hash of everything that the engine reads: equal digests play identically."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.domain, self.problem, self.grammar):
            digest.update(part.encode())
            digest.update(b"\0")
        return digest.hexdigest()


class GameIndex(Protocol):
    """A source of games."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that this source holds."""
        ...

    def tasks(self, split: str) -> tuple[str, ...]:
        """Return the ids of ``split`` in sorted order; ``UsageError`` for a split that is not there."""
        ...

    def load(self, split: str, task_id: str) -> Game:
        """Return one game; ``UsageError`` for an unknown id."""
        ...


class Playable(Protocol[Point]):
    """A game ready to play; both engines offer it. Points are never changed, so episodes may share them."""

    root: Point
    """The point where every episode starts; a point has ``won``."""
    intro: str
    """The first text."""
    names: Mapping[str, str]
    """Display name of every object that occurs in a fact, by its PDDL name."""

    def admissible(self, point: Point, /) -> tuple[str, ...]:
        """Return the commands that do something at ``point``, sorted."""
        ...

    def step(self, point: Point, command: str, /) -> tuple[Point, str] | None:
        """Return the point after ``command`` and the text that tells of it, or None where it is not admissible."""
        ...

    def facts(self, point: Point, /) -> frozenset[tuple[str, ...]]:
        """Return the atoms that hold at ``point``, as predicate and arguments in PDDL names."""
        ...


class RecentGames(Generic[Loaded]):
    """Loaded games by ``Game.digest``: the ``capacity`` used last, shared by every environment of the process."""

    def __init__(self, load: Callable[[Game], Loaded], capacity: int) -> None:
        """Start empty; ``load`` makes what is not there, one game at a time."""
        self._load = load
        self._capacity = capacity
        self._games: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, game: Game) -> Loaded:
        """Return ``game``, loaded."""
        with self._lock:
            loaded = self._games.pop(game.digest, None) or self._load(game)
            self._games[game.digest] = loaded
            if len(self._games) > self._capacity:
                self._games.popitem(last=False)
            return loaded


def open_index(
    source: str,
    data: str | os.PathLike[str] | None = None,
    *,
    num_games: Mapping[str, int] | None = None,
    game_seed: int = 0,
) -> GameIndex:
    """Open a source of games.

    Args:
        source: ``"generated"``, ``"dataset"`` (the published layout) or ``"pack"``.
        data: folder or file of the source; a dataset falls back on ``$ALFWORLD_DATA``, ``generated`` takes none.
        num_games: of ``generated`` alone: games per split; a split left out keeps its default.
        game_seed: of ``generated`` alone: another non-negative number gives other games.

    Raises:
        UsageError: unknown source, data that is not there, or an option of another source.
    """
    if source == "generated":
        if data is not None:
            raise UsageError("source='generated' takes no data; drop data= or choose source='pack' or 'dataset'")
        from .generator import GeneratedGames

        return GeneratedGames(num_games=num_games, seed=game_seed)
    for name, given in (("num_games", num_games is not None), ("game_seed", game_seed != 0)):
        if given and source in SOURCES:
            raise UsageError(f"source={source!r} takes no {name}; drop it or choose source='generated'")
    if source == "dataset":
        from .dataset import DatasetIndex

        return DatasetIndex(data)
    if source == "pack":
        from .pack import open_pack

        if data is None:
            raise UsageError("source='pack' needs data=, the path of the pack file or of its folder")
        return open_pack(data)
    raise UsageError(f"unknown ALFWorld source {source!r}{nearest(source, SOURCES)}")


def check_split(split: str, available: Iterable[str] = SPLITS) -> str:
    """Return ``split`` if it is one of the three and in ``available``; raise ``UsageError`` otherwise."""
    if split not in SPLITS:
        raise UsageError(f"unknown ALFWorld split {split!r}{nearest(split, SPLITS)}")
    available = tuple(available)
    if split not in available:
        raise UsageError(f"split {split!r} is not in this source, which has {', '.join(available) or 'no split'}")
    return split


def unknown_task(task_id: object, split: str, tasks: Iterable[str]) -> UsageError:
    """Return the error for a task id that is not in ``split``."""
    return UsageError(f"unknown task {task_id!r} in split {split!r}{_close(str(task_id), tuple(tasks))}")


def goal_template(grammar: str, task: str) -> str:
    """Return ``grammar`` with the sentence ``task`` replaced by ``GOAL_PLACEHOLDER``; all games then share one text."""
    return grammar.replace(f"Your task is to: {task}", f"Your task is to: {GOAL_PLACEHOLDER}")


def task_type(task_id: str) -> str:
    """Return the task type that a task id starts with."""
    return task_id.split("-", 1)[0]


def _close(task_id: str, tasks: tuple[str, ...]) -> str:
    """As ``nearest``, but thousands of ids are never listed."""
    suggestion = nearest(task_id, tasks)
    return suggestion if "did you mean" in suggestion else f"; tasks() lists the {len(tasks)} valid ids"
