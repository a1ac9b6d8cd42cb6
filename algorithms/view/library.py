"""The runs that are looked at.

- ``Library``: finds them, now and while it is used, and answers every key.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ...errors import UsageError
from .saved_run import SavedRun, encode

_DEPTH = 4
"""Folders between one that is named and a run in it."""
_SCAN_SECONDS = 5.0
"""How long a list of runs serves before folders are looked through again."""


class Library:
    """Runs by id. A folder that holds runs is looked through again as it is used, since more may be started.

    Raises:
        UsageError: one of the folders holds no run.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._folders = _told_apart(map(Path, folders))
        self._lock = threading.Lock()
        self._runs: dict[Path, SavedRun] = {}
        self._scanned = 0.0
        for folder in self._folders:
            if next(_find(folder), None) is None:
                raise UsageError(
                    f"'{folder}' holds no run: neither it nor a folder in it has a config.toml beside trajectories"
                )

    def runs(self) -> list[SavedRun]:
        """All runs in the order of their folders; those that were removed are left out."""
        with self._lock:
            now = time.monotonic()
            if not self._runs or now - self._scanned > _SCAN_SECONDS:
                self._scan()
                self._scanned = now
            return list(self._runs.values())

    def all_keys(self) -> Iterator[str]:
        """Every key that now has an answer."""
        yield "runs"
        for run in self.runs():
            yield from (f"runs/{run.id}/{key}" for key in run.all_keys())

    def answer(self, key: str, cursor: str | None = None) -> bytes | None:
        """The JSON of a key; None where there is no such key. ``cursor`` is that of ``SavedRun.answer``.

        Raises:
            UsageError: a file cannot be read.
        """
        if key == "runs":
            return encode({"runs": [run.overview() for run in self.runs()]})
        parts = key.split("/", 2)
        if len(parts) == 3 and parts[0] == "runs":
            for run in self.runs():
                if run.id == parts[1]:
                    return run.answer(parts[2], cursor)
        return None

    def _scan(self) -> None:
        known, self._runs = self._runs, {}
        used = {run.id for run in known.values()}
        for folder, own in self._folders.items():
            for path in _find(folder):
                place = path.resolve()
                if place in self._runs:
                    continue
                run = known.get(place)
                if run is None:
                    inside = path.relative_to(folder).as_posix()
                    name = own if inside == "." else inside if len(self._folders) == 1 else f"{own}/{inside}"
                    run = SavedRun(_id(name, used), name, path)
                    used.add(run.id)
                self._runs[place] = run


def _find(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Run folders at and below ``folder``, sorted; nothing is looked for within a run."""
    try:
        inside = {path.name: path for path in sorted(folder.iterdir())}
    except OSError:
        return
    if "config.toml" in inside and ("trajectories" in inside or "metrics.jsonl" in inside):
        yield folder
    elif depth:
        for name, path in inside.items():
            if not name.startswith(".") and not path.is_symlink() and path.is_dir():
                yield from _find(path, depth - 1)


def _told_apart(folders: Iterable[Path]) -> dict[Path, str]:
    """For people: each folder by as many of its last parts as no other one shares."""
    parts = {folder: folder.resolve().parts for folder in folders}

    def short(own: tuple[str, ...]) -> str:
        others = [other for other in parts.values() if other != own]
        ends = (own[-size:] for size in range(1, len(own) + 1))
        return "/".join(next((end for end in ends if all(other[-len(end) :] != end for other in others)), own))

    return {folder: short(own) for folder, own in parts.items()}


def _id(name: str, used: set[str]) -> str:
    """For keys, which are addresses and file names as well."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "run"
    choices = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(used) + 2))
    return next(choice for choice in choices if choice not in used)
