"""Tasks of reasoning-gym, which generates and checks them.

- ``ReasoningTasks``: some of its data sets.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...errors import UsageError, nearest
from ...extras import require
from .tasks import SPLITS, Task, TaskSource, in_split, kind_and_number, numbered

DEFAULT = ("basic_arithmetic", "chain_sum", "gcd", "lcm", "prime_factorization", "simple_equations")
_TRIES = 64
_SIZE = 1 << 30


class ReasoningTasks(TaskSource):
    """Tasks named ``dataset/split-number``; answers are scored by the data set itself, in parts where it does so."""

    def __init__(self, names: Sequence[str] | None, counts: Mapping[str, int], seed: int) -> None:
        """Open the data sets.

        Raises:
            MissingDependencyError: reasoning-gym is not installed.
            UsageError: there is no such data set.
        """
        require("source 'reasoning_gym'", "reasoning-gym", {"reasoning_gym": "reasoning-gym"})
        self._names = tuple(dict.fromkeys([names] if isinstance(names, str) else names or DEFAULT))
        with untouched_random():
            from reasoning_gym.factory import DATASETS, create_dataset

            for name in self._names:
                if name not in DATASETS:
                    raise UsageError(f"unknown reasoning_gym data set {name!r}{nearest(name, DATASETS)}")
            self._sets = {name: create_dataset(name, seed=seed * 1_000_003, size=_SIZE) for name in self._names}
        self._counts = counts
        self._last: tuple[tuple[str, str], dict[str, Any]] | None = None

    def list(self, split: str) -> Iterable[str]:
        return numbered(self._names, split, self._counts[split])

    def load(self, split: str, task: str) -> Task:
        entry = self._entry(split, task)
        return Task(task, str(entry["question"]).strip(), str(entry["answer"]))

    def score(self, split: str, task: Task, answer: str) -> float:
        entry = self._entry(split, task.id)
        with untouched_random():
            try:
                value = float(self._sets[kind_and_number(task.id)[0]].score_answer(answer=answer, entry=entry))
            except Exception:  # its checkers parse answers, and raise for some that they cannot
                value = 0.0
        return min(1.0, max(0.0, value))

    def _entry(self, split: str, task: str) -> dict[str, Any]:
        if self._last is None or self._last[0] != (split, task):
            self._last = (split, task), self._find(split, task)
        return self._last[1]

    def _find(self, split: str, task: str) -> dict[str, Any]:
        name, number = kind_and_number(task)
        block = (number * len(SPLITS) + SPLITS.index(split)) * _TRIES
        with untouched_random():
            for place in range(block, block + _TRIES):
                entry = self._sets[name][place]
                if in_split(str(entry["question"]).strip(), split):
                    return entry
        raise UsageError(f"reasoning_gym's {name} has too few different questions for split {split!r}")


@contextlib.contextmanager
def untouched_random() -> Iterator[None]:
    """Give upstream code a global generator in a known state, and put the old one back."""
    import numpy as np

    ours, arrays = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(arrays)
