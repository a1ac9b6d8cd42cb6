"""What the trajectories of a step are, in one small file beside them, so that nobody need read all of them to choose.

- ``pack``: trees as a compressed file and its index, both as bytes. ``StepIndex``: an index.
- ``load_index``: that of a file of trees, made from the trees where it is missing or of other trees.
- ``read_entry``: one tree of the file. ``step_file``, ``step_files``: the files of a run. ``describe``: the columns of
  one tree.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import UsageError

INDEX_VERSION = 1
"""Of the index file; a file of another version is not read, and the index is made from the trees."""

COLUMNS = ("reward", "score", "turns", "won", "truncated", "failed", "forks", "left", "left_at", "tokens", "entropy")
"""One value for each trajectory. ``won``, ``truncated`` and ``failed`` are 0 or 1; ``forks`` counts the trajectories
that left this one; ``left`` is the one that it left itself, and ``left_at`` the turn, both -1 where it left none;
``tokens`` are the sampled ones on its walk, and ``entropy`` their mean in nats, None without any."""

_NAME = re.compile(r"step-(\d+)\.jsonl\.gz")
_CHUNK = 1 << 16
_TRAILER = 8
"""Bytes at the end of a gzip member: checksum and length of what it holds."""


@dataclass(frozen=True)
class StepIndex:
    """The trees of one step, in the order of the file."""

    check: str
    """Size of the file of trees in bytes, and its last bytes, which are a checksum of the last tree."""
    offsets: list[int] | None
    """Where each tree begins in the compressed file, and where the last one ends; None where they share a member."""
    tasks: list[str]
    splits: list[str]
    trajectories: list[int]
    """How many each tree has."""
    columns: dict[str, list[Any]]
    """``COLUMNS`` over the trajectories of all trees."""

    def __len__(self) -> int:
        return len(self.tasks)


def step_files(run: Path) -> dict[int, Path]:
    """The files of saved trees by step, in the order of the steps."""
    found = ((_NAME.fullmatch(path.name), path) for path in (run / "trajectories").glob("step-*.jsonl.gz"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def step_file(run: Path, step: int) -> Path:
    """Where a run keeps the trees of a step."""
    return run / "trajectories" / f"step-{step:06d}.jsonl.gz"


def index_file(trees: Path) -> Path:
    """Where the index of a file of trees lies."""
    return trees.with_name(trees.name.removesuffix(".jsonl.gz") + ".index.json")


def pack(entries: Iterable[Mapping[str, Any]]) -> tuple[bytes, bytes]:
    """The file of trees, and its index. Each tree is a gzip member of its own, which can be read without the others.

    Args:
        entries: of ``Tree.to_dict``.
    """
    builder, members = _Builder(), []
    for entry in entries:
        builder.add(entry)
        line = json.dumps(entry, separators=(",", ":")) + "\n"
        # mtime=0: equal trees give equal files.
        members.append(gzip.compress(line.encode(), compresslevel=5, mtime=0))
    data = b"".join(members) or gzip.compress(b"", mtime=0)
    offsets = [0, *accumulate(map(len, members))]
    index = builder.index(f"{len(data)}-{data[-_TRAILER:].hex()}", offsets)
    return data, json.dumps({"version": INDEX_VERSION, **asdict(index)}, separators=(",", ":")).encode()


def load_index(trees: Path, *, rebuild: bool = True) -> StepIndex | None:
    """The index of a file of trees.

    Returns:
        None where it must be made from the trees and ``rebuild`` is off.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        with open(trees, "rb") as file:
            check = _check(file)
            index = _stored(index_file(trees), check)
            if index is None and rebuild:
                file.seek(0)
                index = _rebuilt(file, check)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise UsageError(f"cannot read '{trees}': {error}") from error
    return index


def read_entry(trees: Path, index: StepIndex, number: int) -> dict[str, Any] | None:
    """Tree ``number`` of a file, as ``Tree.to_dict`` gave it; None where ``index`` is of other trees.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        with open(trees, "rb") as file:
            if _check(file) != index.check:
                return None
            if index.offsets is None:
                file.seek(0)
                lines = gzip.decompress(file.read()).splitlines()
                return json.loads(lines[number])
            start, stop = index.offsets[number : number + 2]
            file.seek(start)
            return json.loads(gzip.decompress(file.read(stop - start)))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"cannot read '{trees}': {error}") from error


def describe(entry: Mapping[str, Any]) -> dict[str, list[Any]]:
    """``COLUMNS`` over the trajectories of one tree."""
    nodes, trajectories = entry["nodes"], entry["trajectories"]
    entropies = [_total(node) for node in nodes]
    walks = [_walk(nodes, trajectory["leaves"]) for trajectory in trajectories]
    departures = _departures(entry, walks)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for trajectory, walk, (left, left_at) in zip(trajectories, walks, departures, strict=True):
        own = [entropies[node] for node in dict.fromkeys(walk)]
        tokens, total = sum(count for count, _ in own), math.fsum(total for _, total in own)
        mean = total / tokens if tokens else math.nan
        values = {
            **{name: trajectory[name] for name in ("reward", "score", "turns")},
            **{name: int(trajectory.get(name, False)) for name in ("won", "truncated", "failed")},
            "forks": 0,
            "left": left,
            "left_at": left_at,
            "tokens": tokens,
            "entropy": round(mean, 6) if math.isfinite(mean) else None,
        }
        for name, value in values.items():
            columns[name].append(value)
    for left in columns["left"]:
        if left >= 0:
            columns["forks"][left] += 1
    return columns


def _total(node: Mapping[str, Any]) -> tuple[int, float]:
    """Sampled tokens of a node and the sum of their entropies."""
    if not node["sampled"]:
        return 0, 0.0
    entropies = np.frombuffer(base64.b64decode(node["entropies"]), "<f4")
    return len(entropies), float(entropies.sum(dtype=np.float64))


def _walk(nodes: Sequence[Mapping[str, Any]], leaves: Sequence[int]) -> list[int]:
    """The nodes of all walks of a trajectory, one behind the other."""
    walk: list[int] = []
    for leaf in leaves:
        back = []
        while leaf != -1:
            back.append(leaf)
            leaf = nodes[leaf]["parent"]
        walk += reversed(back)
    return walk


def _departures(entry: Mapping[str, Any], walks: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each trajectory, which one it left and at which turn; (-1, -1) where it left none.

    What a fork noted counts. Where nothing was noted, the later one leaves the one that first went on from the last
    place that they share; to begin at one prompt is no fork.
    """
    nodes, trajectories = entry["nodes"], entry["trajectories"]
    places: dict[tuple[int, int], int] = {}  # A place is all that was said before; 0 is the start.
    went_on: dict[int, int] = {}
    departures = []
    for number, walk in enumerate(walks):
        departure, place, shared = (-1, -1), 0, True
        for depth, node in enumerate(walk):
            if shared and (place, node) not in places:
                shared = False
                if depth > 1 and place in went_on:
                    turns = (nodes[later]["turn"] for later in walk[depth:] if nodes[later]["role"] == "action")
                    departure = went_on[place], next(turns, -1)
            went_on.setdefault(place, number)
            place = places.setdefault((place, node), len(places) + 1)
        fork = trajectories[number].get("info", {}).get("fork")
        if fork is not None and 0 <= fork["parent"] < len(trajectories):
            departure = fork["parent"], fork["turn"]
        departures.append(departure)
    return departures


class _Builder:
    """Gathers what an index says of trees, one after the other."""

    def __init__(self) -> None:
        self._tasks: list[str] = []
        self._splits: list[str] = []
        self._trajectories: list[int] = []
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, entry: Mapping[str, Any]) -> None:
        self._tasks.append(entry["task"])
        self._splits.append(entry["split"])
        self._trajectories.append(len(entry["trajectories"]))
        for name, values in describe(entry).items():
            self._columns[name] += values

    def index(self, check: str, offsets: list[int] | None) -> StepIndex:
        return StepIndex(check, offsets, self._tasks, self._splits, self._trajectories, self._columns)


def _check(file: BinaryIO) -> str:
    size = file.seek(0, 2)
    file.seek(max(0, size - _TRAILER))
    return f"{size}-{file.read().hex()}"


def _stored(path: Path, check: str) -> StepIndex | None:
    """What an index file says, if it is one, and of the trees that have this ``check``."""
    try:
        stored = json.loads(path.read_bytes())
        if stored.pop("version") != INDEX_VERSION or stored["check"] != check:
            return None
        return StepIndex(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _rebuilt(file: BinaryIO, check: str) -> StepIndex:
    builder, offsets, alone = _Builder(), [0], True
    for stop, text in _members(file):
        lines = text.splitlines()
        offsets.append(stop)
        alone &= len(lines) == 1
        for line in lines:
            builder.add(json.loads(line))
    return builder.index(check, offsets if alone else None)


def _members(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each gzip member ends, and what it holds."""
    stop, data = 0, b""
    while data or (data := file.read(_CHUNK)):
        member, parts = zlib.decompressobj(wbits=31), []
        while not member.eof:
            # What follows a member is copied: chunks keep that short.
            data = data or file.read(_CHUNK)
            if not data:
                raise EOFError("the file ends within a tree")
            parts.append(member.decompress(data))
            stop += len(data) - len(member.unused_data)
            data = member.unused_data
        yield stop, b"".join(parts)
