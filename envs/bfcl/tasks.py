"""The benchmark's 800 multi-turn tasks and what their gold calls lead to.

- ``SPLITS``: names of the splits, the training one first.
- ``Task``: a task as the benchmark has it.
- ``Gold``: state and results that the gold calls lead to.
- ``names``: task ids of a split and some categories.
- ``load``: the task of an id.
- ``gold``: play a task's gold calls.

A scenario has the same number in all four categories, so the splits divide the numbers: those that leave 3 when divided
by 4 are for testing (50 scenarios, 200 tasks), the others for training (150 scenarios, 600 tasks). Scenarios of one
simulator lie next to each other, so both splits have their share of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from .calls import Call, read
from .simulators import Simulators, functions, parameters
from .source import answers, questions

SPLITS = ("train", "test")
PER_CATEGORY = 200
MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
"""What the benchmark's user says in the turn that brings a withheld function."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task as the benchmark has it."""

    name: str
    """``"<category>/<number>"``."""
    benchmark_id: str
    category: str
    messages: tuple[str, ...]
    """Of the user, one for each turn."""
    simulators: tuple[str, ...]
    withheld: Mapping[int, tuple[str, ...]]
    """Turn that brings functions to their names; they are not offered before it."""
    gold: tuple[tuple[Call, ...], ...]
    """Of each turn; in a turn without any, the user asks for what cannot be done."""
    config: str
    """JSON text of the simulators' configuration."""

    @property
    def long_context(self) -> bool:
        """Whether the simulators give very long results."""
        return self.category == "long_context"


@dataclass(frozen=True, slots=True)
class Gold:
    """State and results that the gold calls lead to."""

    states: tuple[bytes, ...]
    """Of the simulators: at the start, and after each turn."""
    results: tuple[tuple[str, ...], ...]
    """Of each turn's calls."""
    wanted: frozenset[str]
    """All results."""


def names(split: str, categories: Iterable[str]) -> Iterator[str]:
    """Yield the ids of the tasks of ``split``."""
    for category in categories:
        for number in range(PER_CATEGORY):
            if (number % 4 == 3) == (split == "test"):
                yield f"{category}/{number:03d}"


@lru_cache(maxsize=1024)
def load(root: Path, name: str) -> Task:
    """Return the task of an id, read from the package's files in ``root``."""
    category, _, number = name.partition("/")
    entry = json.loads(_lines(root / questions(category))[int(number)])
    answer = json.loads(_lines(root / answers(category))[int(number)])
    simulators = tuple(entry["involved_classes"])
    return Task(
        name=name,
        benchmark_id=entry["id"],
        category=category,
        messages=tuple(turn[0]["content"] if turn else MORE_FUNCTIONS for turn in entry["question"]),
        simulators=simulators,
        withheld={int(turn): tuple(names) for turn, names in entry.get("missed_function", {}).items()},
        gold=tuple(tuple(_named(root, simulators, text) for text in turn) for turn in answer["ground_truth"]),
        config=json.dumps(entry["initial_config"]),
    )


@lru_cache(maxsize=1024)
def gold(root: Path, name: str) -> Gold:
    """Play the gold calls of the task of an id."""
    task = load(root, name)
    simulators = Simulators.start(root, task.simulators, json.loads(task.config), task.long_context)
    states, results = [simulators.save()], []
    for turn in task.gold:
        results.append(tuple(simulators.play(call) for call in turn))
        state = simulators.save()
        states.append(state if state != states[-1] else states[-1])
    return Gold(tuple(states), tuple(results), frozenset(text for turn in results for text in turn))


@cache
def _lines(path: Path) -> tuple[bytes, ...]:
    return tuple(path.read_bytes().splitlines())


def _named(root: Path, simulators: tuple[str, ...], text: str) -> Call:
    """Return a gold call with a name for each argument."""
    (call,) = read(text).calls
    (owner,) = (simulator for simulator in simulators if call.name in functions(root, simulator))
    return Call(
        call.name, {**dict(zip(parameters(root, owner, call.name), call.positional, strict=False)), **call.arguments}
    )
