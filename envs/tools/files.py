"""Tasks from files: GSM8K, and the user's own questions and answers.

- ``FileTasks``: JSON lines (plain, ``.gz`` or ``.xz``), JSON or Parquet, one file or a folder of them.
- ``annotated_calls``: the chain of calculations that GSM8K's solutions carry, such as ``<<48/2=24>>``.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UsageError, nearest
from ...extras import require
from .tasks import SPLITS, Task, TaskSource, bucket

_FIELDS = ("question", "answer", "id", "split", "solution")
_ENDINGS = (".jsonl", ".json", ".parquet")
_ALIASES = {"dev": "valid", "val": "valid", "validation": "valid"}
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
_FINAL = "####"


class FileTasks(TaskSource):
    """The rows of some files.

    A row's split is its own field, or else the word ``train``, ``valid``, ``dev`` or ``test`` in the file's name, or
    else ``train``. Where no row is in ``valid`` or ``test``, a tenth of the training rows each, drawn by a hash of the
    question, takes its place.
    """

    def __init__(self, data: str | os.PathLike[str], fields: Mapping[str, str] | None = None) -> None:
        """Read the files.

        Raises:
            UsageError: there are none, one cannot be read, or a row has no question or answer.
            MissingDependencyError: a Parquet file needs pyarrow.
        """
        for name in fields or {}:
            if name not in _FIELDS:
                raise UsageError(f"unknown field {name!r}{nearest(name, _FIELDS)}")
        self._fields = {name: name for name in _FIELDS} | dict(fields or {})
        self._tasks: dict[str, dict[str, Task]] = {split: {} for split in SPLITS}
        for path in _files(Path(data)):
            for place, row in enumerate(_rows(path)):
                split, task = self._task(path, place, row)
                if task.id in self._tasks[split]:
                    raise UsageError(f"{path.name}: two rows of {split} have the id {task.id!r}")
                self._tasks[split][task.id] = task
        train = self._tasks["train"]
        for split, tenth in (("valid", 8), ("test", 9)):
            if not self._tasks[split]:
                self._tasks[split] = {name: task for name, task in train.items() if bucket(task.question) == tenth}
                train = {name: task for name, task in train.items() if name not in self._tasks[split]}
        self._tasks["train"] = train

    def list(self, split: str) -> Iterable[str]:
        return self._tasks[split]

    def load(self, split: str, task: str) -> Task:
        return self._tasks[split][task]

    def _task(self, path: Path, place: int, row: Mapping[str, Any]) -> tuple[str, Task]:
        values = {name: row.get(field) for name, field in self._fields.items()}
        for name in ("question", "answer"):
            if values[name] in (None, []) or not str(values[name]).strip():
                field = self._fields[name]
                raise UsageError(f"{path.name}: row {place + 1} has no {field!r}; fields= says what it is called")
        answers = values["answer"] if isinstance(values["answer"], list) else [values["answer"]]
        answer, *others = map(str, answers)
        solution = str(values["solution"] or "")
        if _FINAL in answer:  # GSM8K as published: the solution, then the answer
            solution, _, answer = answer.rpartition(_FINAL)
        split = str(values["split"] or _split_in(path.name)).lower()
        split = _ALIASES.get(split, split)
        if split not in SPLITS:
            raise UsageError(f"{path.name}: row {place + 1} is of split {split!r}{nearest(split, SPLITS)}")
        name = str(values["id"]) if values["id"] is not None else f"{path.name.split('.')[0]}-{place:06d}"
        question = str(values["question"]).strip()
        return split, Task(name, question, answer.strip(), annotated_calls(solution), tuple(others))


def annotated_calls(solution: str) -> tuple[tuple[str, str], ...]:
    """Return the calculations of a solution as calls of the calculator.

    >>> annotated_calls("He sold 48/2 = <<48/2=24>>24 clips.")
    (('calculator', '48/2'),)
    """
    return tuple(("calculator", found[1].strip()) for found in _ANNOTATION.finditer(solution))


def _split_in(name: str) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    return next((word for word in words if word in (*SPLITS, *_ALIASES)), "train")


def _files(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise UsageError(f"there is no file or folder {data}")
    found = sorted(path for path in data.rglob("*") if path.is_file() and _kind(path) in _ENDINGS)
    if not found:
        raise UsageError(f"{data} has no file ending in {', '.join(_ENDINGS)} (.gz and .xz are read as well)")
    return found


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz").removesuffix(".xz")).suffix


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if _kind(path) == ".parquet":
        require("a Parquet file", "parquet", ["pyarrow"])
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:  # type: ignore[operator]
        try:
            rows = json.load(file) if _kind(path) == ".json" else None
            for number, line in enumerate(file if rows is None else (), 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UsageError(f"{path.name}: line {number} is no JSON object")
                    yield row
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path.name} is not valid JSON: {error}") from error
    if rows is not None:
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UsageError(f"{path.name} is no list of JSON objects")
        yield from rows
