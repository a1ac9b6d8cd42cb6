"""What the page is told of one run, from its folder alone; the run may be under way.

- ``SavedRun``: answers by key. ``encode``: a value as JSON that every browser reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
import tomllib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from ...agents.tree import Tree
from ...errors import UsageError
from ..instruments.alarms import alarms
from ..instruments.credit import Credit, credit_path, load_credit
from ..instruments.law import fit_law
from ..runs import TIME_PREFIX, finite
from .index import COLUMNS, StepIndex, load_index, read_entry, step_file, step_files
from .metrics import MetricsFile, Row
from .pieces import Pieces, find_pieces
from .tree_answer import credit_answer, tree_answer

_QUIET_SECONDS = 300.0
"""A run that writes nothing for so long, and for ``_QUIET_STEPS`` times what its last step took, is not under way."""
_QUIET_STEPS = 5
_TICK_SECONDS = 1.0
_KEPT_BYTES = 32 << 20
"""Of answers that are kept, and of the one that was given last, however large."""
_SECRET = re.compile(r"(^|[_-])((api)?key|token|secret|password|passwd|credentials?|authorization)$", re.IGNORECASE)
_LOGIN = re.compile(r"//[^/@\s]+@")
_HIDDEN = "(hidden)"

Stamp = tuple[int, ...]


class SavedRun:
    """One run folder. Its methods may be called from several threads."""

    def __init__(self, id: str, name: str, path: Path) -> None:
        self.id, self.name, self.path = id, name, path
        self._lock = threading.RLock()
        self._metrics = MetricsFile(path / "metrics.jsonl")
        self._steps: dict[int, tuple[Stamp, StepIndex | None]] = {}
        """What is known of each file of trees; None where it cannot be read."""
        self._config: tuple[Stamp, str, dict[str, Any]] = ((), "", {})
        self._credit: tuple[object, Credit | None] = (None, None)
        self._pieces: Pieces | None = None
        self._told: tuple[object, dict[str, Any]] = (None, {})
        self._answers: OrderedDict[str, tuple[object, bytes]] = OrderedDict()

    def overview(self) -> dict[str, Any]:
        """The run's entry in the list of runs; asked for every other second, and made anew when a file changed."""
        with self._lock:
            stamps = tuple(_stamp(self.path / part) for part in ("config.toml", "metrics.jsonl", "trajectories"))
            updated = self._updated()
            # What changed just now may change again within the clock's tick.
            if stamps != self._told[0] or time.time() - (updated or 0.0) < _TICK_SECONDS:
                self._told = (stamps, self._describe())
            told = self._told[1]
            return told | {"live": self._live(told["step"], told["steps"], updated), "updated": updated}

    def _describe(self) -> dict[str, Any]:
        """What of ``overview`` is the same until a file changes."""
        config = self._read_config()[1]
        self._metrics.refresh()
        rows, steps = self._metrics.rows, self._index_steps(rebuild=False)
        algorithm, model = _table(config, "algorithm"), _table(config, "model")
        held_out = [row for row in rows if row["phase"] == "eval" and row.get("success/rate") is not None]
        readable = None if steps is None else [index for index in steps.values() if index is not None]
        return {
            "id": self.id,
            "name": self.name,
            "algorithm": algorithm.get("name"),
            "preset": algorithm.get("preset"),
            "env": _table(config, "env").get("id"),
            "model": model.get("path") or model.get("type"),
            "seed": config.get("seed"),
            "step": max((row["step"] for row in rows if row["phase"] == "train"), default=0),
            "steps": _table(config, "train").get("steps"),
            "success": _success(held_out[-1]) if held_out else None,
            # Runs that share a start are not evaluated before their first step.
            "before": _success(held_out[0]) if held_out and not held_out[0]["step"] else None,
            "alarms": [asdict(alarm) for alarm in alarms(rows)],
            "trees": None if readable is None else sum(map(len, readable)),
            "trajectories": None if readable is None else sum(sum(index.trajectories) for index in readable),
            "index": None if steps is None else _name(steps),
            "metrics": self._metrics.cursor,
            "credit": any((self.path / "trajectories").glob("step-*.credit.npz")),
        }

    def all_keys(self) -> Iterator[str]:
        """Every key below the run's own that now has an answer."""
        yield from ("config", "evaluations", "index", "law", "metrics")
        for step, index in self._require_steps().items():
            for number in range(len(index) if index is not None else 0):
                yield f"trees/{step}/{number}"

    def answer(self, key: str, cursor: str | None = None) -> bytes | None:
        """The JSON of a key below the run's own; None where there is no such key.

        Args:
            key: one of ``all_keys``.
            cursor: of ``metrics``, where the reader has seen all before it.

        Raises:
            UsageError: a file cannot be read.
        """
        part, *rest = key.split("/")
        with self._lock:
            if part == "trees" and len(rest) == 2 and all(re.fullmatch(r"\d{1,9}", number) for number in rest):
                return self._tree(int(rest[0]), int(rest[1]))
            if rest:
                return None
            if part == "metrics":
                self._metrics.refresh()
                restart, rows = self._metrics.after(cursor)
                return encode({"cursor": self._metrics.cursor, "restart": restart, "rows": rows})
            if part == "index":
                return self._index()
            if part == "config":
                text, values = self._read_config()
                return encode({"toml": text, "values": values})
            if part == "evaluations":
                return self._evaluations()
            if part == "law":
                return self._law()
        return None

    def _tree(self, step: int, number: int) -> bytes | None:
        path, key = step_file(self.path, step), f"trees/{step}/{number}"
        credit, pieces = credit_path(self.path, step), self._tokenizer()
        for _ in range(2):
            index = self._index_step(step, path, rebuild=True) if path.exists() else None
            if index is None or not number < len(index):
                return None
            stamp = (index.check, _stamp(credit), pieces is not None)
            body = self._recall(key, stamp)
            if body is not None:
                return body
            entry = read_entry(path, index, number)
            if entry is not None:
                # Trees of older versions lack fields, and those of newer ones are refused.
                entry = Tree.from_dict(entry).to_dict()
                value = {"step": step, "tree": number, **tree_answer(entry, pieces)}
                value["credit"] = credit_answer(self._read_credit(credit), number, entry)
                return self._keep(key, stamp, encode(value))
            # The step was written anew since its index was read.
        return None

    def _index(self) -> bytes:
        steps = self._require_steps()
        stamp = _name(steps)
        body = self._recall("index", stamp)
        return self._keep("index", stamp, encode(_columns(steps))) if body is None else body

    def _law(self) -> bytes:
        self._metrics.refresh()
        train = [row for row in self._metrics.rows if row["phase"] == "train"]
        pairs = [(row.get("entropy/action_mean"), row.get("success/rate")) for row in train]
        points = [pair for pair in pairs if all(isinstance(v, int | float) and math.isfinite(v) for v in pair)]
        fit = fit_law(*zip(*points, strict=True)) if points else None
        return encode(None if fit is None else asdict(fit) | {"points": points})

    def _evaluations(self) -> bytes:
        found = []
        for path in (self.path / "evaluations").glob("step-*.json"):
            try:
                value = json.loads(path.read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                found.append(value)
        found.sort(key=lambda value: (value["step"], str(value.get("split"))))
        return encode({"evaluations": found})

    def _recall(self, key: str, stamp: object) -> bytes | None:
        """An answer that was kept, if what it was made of has not changed since."""
        found = self._answers.get(key)
        if found is None or found[0] != stamp:
            return None
        self._answers.move_to_end(key)
        return found[1]

    def _keep(self, key: str, stamp: object, body: bytes) -> bytes:
        self._answers[key] = (stamp, body)
        self._answers.move_to_end(key)
        size = sum(len(kept) for _, kept in self._answers.values())
        while size > _KEPT_BYTES and len(self._answers) > 1:
            size -= len(self._answers.popitem(last=False)[1][1])
        return body

    def _index_steps(self, *, rebuild: bool) -> dict[int, StepIndex | None] | None:
        """The index of every step; None where one would have to be made, and ``rebuild`` is off."""
        with self._lock:
            files = step_files(self.path)
            for step, path in files.items():
                self._index_step(step, path, rebuild=rebuild)
            self._steps = {step: self._steps[step] for step in files if step in self._steps}
            whole = len(self._steps) == len(files)
            return {step: index for step, (_, index) in self._steps.items()} if whole else None

    def _index_step(self, step: int, path: Path, *, rebuild: bool) -> StepIndex | None:
        """The index of one step; None where the file cannot be read, and where it would have to be made."""
        stamp = _stamp(path)
        if step in self._steps and self._steps[step][0] == stamp:
            return self._steps[step][1]
        self._steps.pop(step, None)
        try:
            index = load_index(path, rebuild=rebuild)
        except UsageError:
            self._steps[step] = (stamp, None)
            return None
        if index is not None:
            self._steps[step] = (stamp, index)
            if rebuild:
                self._told = (None, {})  # Its trajectories may be counted from now on.
        return index

    def _read_credit(self, path: Path) -> Credit | None:
        """The newest one is kept: trees of a step are asked for one after another."""
        stamp = (str(path), _stamp(path))
        if self._credit[0] != stamp:
            try:
                self._credit = (stamp, load_credit(path))
            except (FileNotFoundError, UsageError):
                self._credit = (stamp, None)
        return self._credit[1]

    def _require_steps(self) -> dict[int, StepIndex | None]:
        steps = self._index_steps(rebuild=True)
        assert steps is not None
        return steps

    def _tokenizer(self) -> Pieces | None:
        if self._pieces is None:
            model = _table(self._read_config()[1], "model").get("path")
            self._pieces = find_pieces(self.path, model)
        return self._pieces

    def _read_config(self) -> tuple[str, dict[str, Any]]:
        """The configuration as text and values, without what is secret; empty where it cannot be read."""
        path = self.path / "config.toml"
        stamp = _stamp(path)
        if self._config[0] != stamp:
            try:
                text = path.read_text(encoding="utf-8")
                values = tomllib.loads(text)
            except (OSError, ValueError):
                text, values = "", {}
            shown = _without_secrets(values)
            self._config = (stamp, text if shown == values else tomli_w.dumps(shown), shown)
        return self._config[1], self._config[2]

    def _updated(self) -> float | None:
        """When its files last changed, in seconds since 1970."""
        places = ("metrics.jsonl", "trajectories", "checkpoints", "evaluations")
        times = [stamp[-1] for place in places if (stamp := _stamp(self.path / place))]
        return max(times, default=0) / 1e9 or None

    def _live(self, done: int, total: Any, updated: float | None) -> bool:
        rows = self._metrics.rows
        held_out = {row["step"] for row in rows if row["phase"] == "eval"}
        ended = isinstance(total, int) and done >= total and total in held_out
        if ended or updated is None:
            return False
        last = rows[-1] if rows else {}
        took = sum(
            v for k, v in last.items() if k.startswith(TIME_PREFIX) and "seconds" in k and isinstance(v, int | float)
        )
        return time.time() - updated < max(_QUIET_SECONDS, _QUIET_STEPS * took)


def encode(value: Any) -> bytes:
    """JSON in ASCII; numbers that are not finite become null."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        return json.dumps(finite(value), separators=(",", ":"), allow_nan=False).encode()


def _columns(steps: Mapping[int, StepIndex | None]) -> dict[str, Any]:
    """The trajectories of all steps as columns."""
    tasks: dict[str, int] = {}
    splits: dict[str, int] = {}
    columns: dict[str, list[Any]] = {name: [] for name in ("step", "tree", "trajectory", "task", "split", *COLUMNS)}
    for step, index in steps.items():
        if index is None:
            continue
        for number, count in enumerate(index.trajectories):
            columns["step"] += [step] * count
            columns["tree"] += [number] * count
            columns["trajectory"] += range(count)
            columns["task"] += [tasks.setdefault(index.tasks[number], len(tasks))] * count
            columns["split"] += [splits.setdefault(index.splits[number], len(splits))] * count
        for name in COLUMNS:
            columns[name] += index.columns[name]
    return {
        "index": _name(steps),
        "count": len(columns["step"]),
        "steps": [step for step, index in steps.items() if index is not None],
        "unreadable": [step for step, index in steps.items() if index is None],
        "tasks": list(tasks),
        "splits": list(splits),
        "columns": columns,
    }


def _name(steps: Mapping[int, StepIndex | None]) -> str:
    """Twelve hexadecimal digits that change when a step does."""
    text = "\n".join(f"{step} {index.check if index is not None else ''}" for step, index in steps.items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _success(row: Row) -> dict[str, Any]:
    names = {"rate": "success/rate", "low": "success/low", "high": "success/high", "tasks": "success/tasks"}
    return {"step": row["step"], "split": row.get("split")} | {name: row.get(key) for name, key in names.items()}


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = config.get(name)
    return table if isinstance(table, Mapping) else {}


def _without_secrets(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item, name) for item in value]
    if isinstance(value, str):
        return _HIDDEN if value and _SECRET.search(name) else _LOGIN.sub(f"//{_HIDDEN}@", value)
    return value
