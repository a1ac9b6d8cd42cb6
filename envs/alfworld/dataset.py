"""The published ALFWorld dataset in its usual layout.

- ``DatasetIndex``: the solvable games under ``$ALFWORLD_DATA/json_2.1.1/<split>/<type-...>/<trial>/game.tw-pddl``.

As in the stock environment, games with a movable receptacle or a sliced object are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from ...errors import UsageError
from ..cache import cache_folder
from .games import GOAL_PLACEHOLDER, SPLITS, Game, check_split, unknown_task

GAME_FILE = "game.tw-pddl"
RELEASE = "json_2.1.1"
_SENTENCE = re.compile(r'Your task is to: ([^"]*)"')


class DatasetIndex:
    """The games of one dataset folder. Listing reads every game once; the list is then kept in the user's cache."""

    def __init__(self, data: str | os.PathLike[str] | None = None) -> None:
        """Open ``data``: the folder of ``json_2.1.1``, that folder itself, or None for ``$ALFWORLD_DATA``."""
        self.root = _find(data)
        self._tasks: dict[str, tuple[str, ...]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a folder."""
        return tuple(split for split in SPLITS if (self.root / split).is_dir())

    def tasks(self, split: str) -> tuple[str, ...]:
        """Return the ids (``<type-...>/<trial>``) of the solvable games of ``split`` in sorted order."""
        if split not in self._tasks:
            folder = self.root / check_split(split, self.splits)
            self._tasks[split] = _read_cache(folder) or _write_cache(folder, _scan(folder))
        return self._tasks[split]

    def load(self, split: str, task_id: str) -> Game:
        """Return one game."""
        if task_id not in self.tasks(split):
            raise unknown_task(task_id, split, self.tasks(split))
        path = self.root / split / task_id / GAME_FILE
        try:
            data = json.loads(path.read_text())
            grammar = data["grammar"]
            return Game(
                id=task_id,
                split=split,
                task=_sentence(grammar),
                problem=data["pddl_problem"],
                walkthrough=tuple(data.get("walkthrough") or ()),
                domain=data["pddl_domain"],
                grammar=grammar,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{path} is not a readable game: {error!r}") from error


def _find(data: str | os.PathLike[str] | None) -> Path:
    if data is None:
        data = os.environ.get("ALFWORLD_DATA")
        if not data:
            raise UsageError(
                "source='dataset' needs data= or $ALFWORLD_DATA; `alfworld-download` fetches the dataset, "
                "source='generated' needs none"
            )
    root = Path(data).expanduser().absolute()
    if (root / RELEASE).is_dir():
        root /= RELEASE
    if not any((root / split).is_dir() for split in SPLITS):
        raise UsageError(f"no ALFWorld dataset in {root}: expected {RELEASE}/ with folders {', '.join(SPLITS)}")
    return root


def _scan(folder: Path) -> tuple[str, ...]:
    """Read every game under ``folder`` and return the ids of the solvable ones."""
    tasks = []
    for path in sorted(folder.glob(f"*/*/{GAME_FILE}")):
        task_id = path.parent.relative_to(folder).as_posix()
        if "movable" in task_id or "Sliced" in task_id:
            continue
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is not a readable game: {error!r}") from error
        if data.get("solvable"):
            tasks.append(task_id)
    return tuple(sorted(tasks))


def _cache_file(folder: Path) -> Path:
    key = f"{folder}\0{folder.stat().st_mtime_ns}"
    name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    return cache_folder() / "alfworld" / f"index-{name}.json"


def _read_cache(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(json.loads(_cache_file(folder).read_text()))
    except (OSError, ValueError, TypeError):
        return ()


def _write_cache(folder: Path, tasks: tuple[str, ...]) -> tuple[str, ...]:
    path = _cache_file(folder)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(tasks))
        os.replace(partial, path)
    return tasks


def _sentence(grammar: str) -> str:
    match = _SENTENCE.search(grammar)
    return match.group(1) if match else GOAL_PLACEHOLDER
