"""Where the tasks of the tool environment come from.

- ``Task``: a question, its answer, and calls of tools that lead to it.
- ``TaskSource``: what each source offers. ``open_source``: open one.
- ``SOURCES``, ``SPLITS``: their names.
- ``numbered``, ``kind_and_number``: the ids of tasks that are generated.
- ``bucket``, ``in_split``: which tenth of all questions one falls into, which keeps splits disjoint.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import UsageError, nearest
from .answers import same_answer

SOURCES = ("generated", "gsm8k", "reasoning_gym", "file")
SPLITS = ("train", "valid", "test")
NUM_TASKS: Mapping[str, int] = {"train": 10_000, "valid": 200, "test": 200}


@dataclass(frozen=True, slots=True)
class Task:
    """One question."""

    id: str
    question: str
    answer: str
    calls: tuple[tuple[str, str], ...] = ()
    """Tool (``"python"`` or ``"calculator"``) and text of each call; the last one's output is the answer."""
    others: tuple[str, ...] = ()
    """Further answers that are right."""

    @property
    def digest(self) -> str:
        """Hash of the content."""
        text = "\0".join([self.question, self.answer, *self.others])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class TaskSource(ABC):
    """Tasks of the splits ``train``, ``valid`` and ``test``."""

    @abstractmethod
    def list(self, split: str) -> Iterable[str]:
        """Return the ids of a split; an empty one is no error."""

    @abstractmethod
    def load(self, split: str, task: str) -> Task:
        """Return a task that exists."""

    def score(self, split: str, task: Task, answer: str) -> float:
        """Return how right an answer to a task of ``split`` is, 0 to 1."""
        return float(any(same_answer(answer, right) for right in (task.answer, *task.others)))


def open_source(
    name: str,
    data: str | os.PathLike[str] | None = None,
    *,
    difficulty: int = 1,
    kinds: Sequence[str] | None = None,
    num_tasks: Mapping[str, int] | None = None,
    task_seed: int = 0,
    fields: Mapping[str, str] | None = None,
) -> TaskSource:
    """Open a source.

    Args:
        name: one of ``SOURCES``.
        data: file or folder of ``gsm8k`` and ``file``.
        difficulty: 1 to 3; of ``generated``.
        kinds: of ``generated`` tasks, or the names of ``reasoning_gym``'s data sets.
        num_tasks: tasks per split that are generated; a split left out keeps its number.
        task_seed: another number, not negative, generates other tasks.
        fields: names of ``question``, ``answer``, ``id``, ``split`` and ``solution`` in the files.

    Raises:
        UsageError: there is no such source, or an argument is wrong or belongs to another source.
        MissingDependencyError: the source's package is not installed.
    """
    if name not in SOURCES:
        raise UsageError(f"unknown source of tasks {name!r}{nearest(name, SOURCES)}")
    counts = dict(NUM_TASKS)
    for split, count in (num_tasks or {}).items():
        if split not in SPLITS:
            raise UsageError(f"unknown split {split!r} in num_tasks{nearest(split, SPLITS)}")
        if count < 0:
            raise UsageError(f"num_tasks must not be negative, got {count} for {split!r}")
        counts[split] = count
    if task_seed < 0:
        raise UsageError(f"task_seed must not be negative, got {task_seed}")
    if name in ("gsm8k", "file"):
        from .files import FileTasks

        if data is None:
            raise UsageError(f"source {name!r} needs data=, the path of a JSON-lines or Parquet file or of its folder")
        return FileTasks(data, fields)
    if data is not None:
        raise UsageError(f"source {name!r} takes no data=; source='file' reads files")
    if name == "generated":
        from .generated import GeneratedTasks

        return GeneratedTasks(difficulty, kinds, counts, task_seed)
    from .reasoning import ReasoningTasks

    return ReasoningTasks(kinds, counts, task_seed)


def numbered(kinds: Sequence[str], split: str, count: int) -> Iterable[str]:
    """Return ids such as ``days/train-000012`` for ``count`` tasks of all kinds in turn."""
    return (f"{kinds[number % len(kinds)]}/{split}-{number // len(kinds):06d}" for number in range(count))


def kind_and_number(task: str) -> tuple[str, int]:
    """Undo ``numbered``."""
    kind, _, rest = task.partition("/")
    return kind, int(rest.partition("-")[2])


def bucket(question: str) -> int:
    """Return 0 to 9; equal questions fall into the same one."""
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % 10


def in_split(question: str, split: str) -> bool:
    """Whether a generated question belongs to ``split``: eight tenths are training's, one tenth each other's."""
    return {8: "valid", 9: "test"}.get(bucket(question), "train") == split
