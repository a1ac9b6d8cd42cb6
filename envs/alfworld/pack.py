"""Packs: a whole dataset as one compressed JSON-lines file.

- ``open_pack``: a pack that the environments of a process share.
- ``PackIndex``: reads a pack (``.jsonl.xz`` or ``.jsonl.gz``), one pass per split.
- ``write_pack``: writes a pack from a dataset in the published layout.

A line holds ``split``, ``id``, ``task``, ``problem`` and ``walkthrough``. The domain and the grammar that all games
share lie beside it as ``domain.pddl`` and ``grammar.twl2``; without them, those of the ``alfworld`` wheel are taken.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from ...errors import UsageError
from .games import GOAL_PLACEHOLDER, SPLITS, Game, check_split, goal_template, unknown_task

NAMES = ("games.jsonl.xz", "games.jsonl.gz")
SUFFIXES = (".xz", ".gz")
FIELDS = frozenset({"split", "id", "task", "problem", "walkthrough"})


class _Entry(NamedTuple):
    task: str
    walkthrough: tuple[str, ...]
    problem: bytes
    """Compressed: a split of 3,553 games takes 24 MB instead of 180."""


def open_pack(path: str | os.PathLike[str]) -> PackIndex:
    """Open a pack; environments of one process share what they read, as long as the file stays the same."""
    file = _find(Path(path).expanduser())
    return _opened(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(file: Path, mtime_ns: int) -> PackIndex:
    return PackIndex(file)


class PackIndex:
    """The games of one pack; a split is read on first use and kept compressed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path``, a pack file or the folder that holds one; nothing is read yet."""
        self.path = _find(Path(path).expanduser())
        self._entries: dict[str, dict[str, _Entry]] = {}

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits in the file, in the usual order (one pass over it)."""
        found = {line["split"] for line in self._lines()}
        return tuple(split for split in SPLITS if split in found)

    def tasks(self, split: str) -> tuple[str, ...]:
        """Return the ids of ``split`` in sorted order."""
        return tuple(self._split(split))

    def load(self, split: str, task_id: str) -> Game:
        """Return one game."""
        entries = self._split(split)
        if task_id not in entries:
            raise unknown_task(task_id, split, entries)
        entry = entries[task_id]
        return Game(
            id=task_id,
            split=split,
            task=entry.task,
            problem=zlib.decompress(entry.problem).decode(),
            walkthrough=entry.walkthrough,
            domain=self._domain,
            grammar=self._grammar.replace(GOAL_PLACEHOLDER, entry.task),
        )

    def _split(self, split: str) -> dict[str, _Entry]:
        if split not in self._entries:
            check_split(split)
            entries = {
                line["id"]: _Entry(
                    line["task"], tuple(line["walkthrough"]), zlib.compress(line["problem"].encode(), level=1)
                )
                for line in self._lines()
                if line["split"] == split
            }
            if not entries:
                check_split(split, self.splits)
            self._entries[split] = dict(sorted(entries.items()))
        return self._entries[split]

    def _lines(self) -> Iterator[dict]:
        with _open(self.path, self.path.suffix, "rb") as file:
            try:
                for text in file:
                    line = json.loads(text)
                    if not line.keys() >= FIELDS:
                        raise ValueError(f"a line lacks {', '.join(sorted(FIELDS - line.keys()))}")
                    yield line
            except (lzma.LZMAError, EOFError, OSError, ValueError) as error:
                raise UsageError(f"{self.path} is not a readable pack: {error}") from error

    @cached_property
    def _domain(self) -> str:
        path = self.path.with_name("domain.pddl")
        if path.exists():
            return path.read_text()
        from .domain import domain_pddl

        return domain_pddl()

    @cached_property
    def _grammar(self) -> str:
        path = self.path.with_name("grammar.twl2")
        if path.exists():
            return path.read_text()
        from .domain import grammar

        return grammar(GOAL_PLACEHOLDER)


def write_pack(root: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, int]:
    """Write the dataset under ``root`` (the published layout) as a pack and return the number of games per split.

    Args:
        root: as for ``DatasetIndex``; every split found there is written.
        out: the pack's file, ending in ``.jsonl.xz`` or ``.jsonl.gz``, or the folder that receives a
            ``games.jsonl.xz``; domain and grammar are written beside it.

    Raises:
        UsageError: the suffix is neither, or games differ in domain or grammar, which one pack cannot hold.
    """
    from .dataset import DatasetIndex

    out = Path(out).expanduser()
    if out.is_dir() or not out.suffix:
        out /= NAMES[0]
    if out.suffix not in SUFFIXES:
        raise UsageError(f"a pack's name ends in .jsonl.xz or .jsonl.gz, got {out.name!r}")
    index = DatasetIndex(root)
    shared: tuple[str, str] | None = None
    counts = dict.fromkeys(index.splits, 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        with _open(partial, out.suffix, "wb") as file:
            for split in index.splits:
                for task_id in index.tasks(split):
                    game = index.load(split, task_id)
                    common = (game.domain, goal_template(game.grammar, game.task))
                    shared = shared or common
                    if common != shared:
                        raise UsageError(f"game {task_id} has another domain or grammar than the games before it")
                    line = {
                        "split": split,
                        "id": task_id,
                        "task": game.task,
                        "problem": game.problem,
                        "walkthrough": game.walkthrough,
                    }
                    file.write(json.dumps(line).encode() + b"\n")
                    counts[split] += 1
        if shared is None:
            raise UsageError(f"no games to pack under {root}")
        out.with_name("domain.pddl").write_text(shared[0])
        out.with_name("grammar.twl2").write_text(shared[1])
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _open(path: Path, suffix: str, mode: Literal["rb", "wb"]) -> IO[bytes]:
    return cast(IO[bytes], lzma.open(path, mode) if suffix == ".xz" else gzip.open(path, mode))


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in NAMES:
            if (path / name).exists():
                return path / name
        raise UsageError(f"no pack in {path}; expected {' or '.join(NAMES)}")
    if not path.exists():
        raise UsageError(f"no such pack: {path}; write one with `agentropy data pack`, or use source='generated'")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"a pack's name ends in .jsonl.xz or .jsonl.gz, got {path.name!r}")
    return path
