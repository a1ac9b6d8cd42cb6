"""What the runs of a grid have left in their folders.

- ``Run``: the evaluations, training rows and costs of one run. ``read_run``: from its folder.
- ``Evaluation``: every episode of one pass over a panel.
- ``Costs``: what had been spent by a step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...algorithms.runs import evaluation_files, read_rows
from ...errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Every episode of one pass over a panel."""

    step: int
    tasks: tuple[str, ...]
    won: Floats
    """[T, samples], 0 or 1."""
    turns: Floats
    """[T, samples]: commands, or calls of tools, in an episode."""

    @property
    def rates(self) -> Floats:
        """[T]: share of each task's episodes that won."""
        return self.won.mean(1)


@dataclass(frozen=True)
class Costs:
    """What training had spent by a step; evaluations are apart."""

    episodes: int = 0
    env_steps: float = 0.0
    """Commands given to environments; those before a fork count once."""
    tokens: float = 0.0
    """Sampled."""
    seconds: float = 0.0
    """Of rollouts and updates."""


@dataclass(frozen=True)
class Run:
    """One run of a grid."""

    folder: Path
    seed: int
    evaluations: Mapping[str, tuple[Evaluation, ...]]
    """Of each split, in the order of steps."""
    train: tuple[Mapping[str, Any], ...]
    """Training rows of ``metrics.jsonl``."""
    costs: tuple[Costs, ...]
    """By the end of each training row."""

    def spent_by(self, step: int) -> Costs:
        """What had been spent by the end of ``step``; nothing by step 0."""
        return max(
            (cost for row, cost in zip(self.train, self.costs, strict=True) if row["step"] <= step),
            key=lambda cost: cost.episodes,
            default=Costs(),
        )


def read_run(folder: Path, seed: int, splits: Sequence[str]) -> Run:
    """Read a finished run.

    Raises:
        UsageError: an evaluation is missing or cannot be read.
    """
    train = tuple(row for row in read_rows(folder / "metrics.jsonl") if row["phase"] == "train")
    spent, costs = Costs(), []
    for row in train:
        spent = Costs(
            spent.episodes + row["episodes"],
            spent.env_steps + row["env/steps"],
            spent.tokens + row["tokens/sampled"],
            spent.seconds + row["time/rollout_seconds"] + row["time/update_seconds"],
        )
        costs.append(spent)
    return Run(folder, seed, {split: read_evaluations(folder, split) for split in splits}, train, tuple(costs))


def read_evaluations(folder: Path, split: str) -> tuple[Evaluation, ...]:
    """Every evaluation of a run on ``split``, in the order of steps.

    Raises:
        UsageError: there is none, or one cannot be read.
    """
    found = []
    for path in evaluation_files(folder, split):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            won, turns = np.array(data["won"], np.float64), np.array(data["turns"], np.float64)
            found.append(Evaluation(data["step"], tuple(data["tasks"]), won, turns))
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"cannot read the evaluation '{path}': {error}") from error
    if not found:
        raise UsageError(f"'{folder}' has no evaluation on {split}")
    return tuple(found)
