"""The simulator's own solutions: where they are kept, and how far an episode has followed one.

- ``gold_path``: the solution of a variation; shipped with the package, kept on disk, or else written by the simulator.
- ``stored``: one that is shipped.
- ``Played``: an action of an episode. ``free``: whether one only looks. ``next_action``: what a solution does next.

The simulator needs 0.2 to 18 s to write a solution, since it plays the task for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import lzma
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cache import cache_folder
from . import tasks as catalogue
from .simulator import Simulator

SHIPPED = Path(__file__).with_name("gold.json.xz")
"""Solutions under the simplifications ``"easy"``: of each version of the simulator, of each task, of each variation."""


@dataclass(frozen=True, slots=True)
class Played:
    """An action of an episode."""

    action: str
    idle: bool
    """It left the world as it was."""


def gold_path(simulator: Simulator, task: str, variation: int, simplifications: str) -> tuple[str, ...]:
    """Return the simulator's solution under ``simplifications``, which are resolved (not ``"easy"``)."""
    if simplifications == catalogue.resolve(("easy",), task) and (path := stored(task, variation)):
        return path
    kept = cached_at(task, variation, simplifications)
    try:
        return tuple(json.loads(kept.read_text("utf-8")))
    except (OSError, ValueError):  # not there, or cut off by a full disk
        pass
    path = simulator.gold(task, variation, simplifications)
    _write(kept, json.dumps(path))
    return path


def stored(task: str, variation: int) -> tuple[str, ...]:
    """Return the solution under ``"easy"`` that is shipped for the installed version, ``()`` where none is."""
    return tuple(_shipped(version()).get(task, {}).get(str(variation), ()))


def cached_at(task: str, variation: int, simplifications: str) -> Path:
    """Return the file that keeps a solution."""
    flags = "".join(str(int(name in simplifications.split(","))) for name in catalogue.SIMPLIFICATIONS)
    return cache_folder() / "scienceworld" / version() / flags / task / f"{variation:04d}.json"


@functools.cache
def version() -> str:
    """Return the version of the simulator."""
    return importlib.metadata.version("scienceworld")


def free(action: str) -> bool:
    """Whether an action that is understood only looks."""
    return action.strip() in ("look around", "inventory")


def next_action(path: Sequence[str], played: Iterable[Played]) -> str | None:
    """Return what ``path`` does next; None at its end, or where the world is not as it would be on the path.

    Actions that changed nothing may have come between, and looking may have been left out.
    """
    at = 0
    for step in played:
        ahead = at
        while ahead < len(path) and path[ahead] != step.action and free(path[ahead]):
            ahead += 1
        if ahead < len(path) and path[ahead] == step.action:
            at = ahead + 1
        elif not step.idle:
            return None
    return path[at] if at < len(path) else None


@functools.cache
def _shipped(version: str) -> dict[str, dict[str, list[str]]]:
    try:
        with lzma.open(SHIPPED, "rt", encoding="utf-8") as file:
            return dict(json.load(file).get(version, {}))
    except FileNotFoundError:
        return {}


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all; what cannot be kept is computed again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        pass
