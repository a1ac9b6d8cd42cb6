"""Statistics for people: a rate always comes with its number of tasks and its interval.

- ``Proportion``: successes among trials, with the Wilson interval; ``str()`` gives ``0.31 [0.24, 0.39]``.
- ``Summary``: success before and after a run's training.
- ``panel_hash``: a short name for a fixed set of tasks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054
"""97.5 % point of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """``successes`` of ``trials``; the interval is Wilson's score interval (Wilson 1927) at 95 %.

    >>> str(Proportion(62, 200))
    '0.31 [0.25, 0.38]'
    """

    successes: int
    trials: int

    @property
    def rate(self) -> float:
        """In [0, 1]; NaN without trials."""
        return self.successes / self.trials if self.trials else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end in [0, 1]; (0, 1) without trials."""
        n = self.trials
        if not n:
            return 0.0, 1.0
        p, z2 = self.rate, Z_95 * Z_95
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At 0 and n successes the end is exact; rounding would leave it at 1e-17 beside.
        low = 0.0 if self.successes == 0 else centre - half
        high = 1.0 if self.successes == n else centre + half
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Summary:
    """Held-out success before and after reinforcement learning; equal when there were no steps. ``before`` is None
    where nothing was evaluated before the first step, as in runs that share a start."""

    before: Proportion | None
    after: Proportion
    split: str

    @classmethod
    def of(cls, evaluations: Sequence[Mapping[str, Any]]) -> Summary:
        """From the rows of a run's evaluations, one or more, in order."""
        first, last = evaluations[0], evaluations[-1]
        before, after = (Proportion(row["success/wins"], row["success/tasks"]) for row in (first, last))
        return cls(None if first["step"] else before, after, last["split"])

    def __str__(self) -> str:
        told = f"{self.after}" if self.before is None else f"{self.before} → {self.after}"
        return f"success {told} on {self.after.trials} held-out tasks ({self.split})"


def panel_hash(tasks: Iterable[str]) -> str:
    """Twelve hexadecimal digits of SHA-256 over the sorted ids: equal exactly when the panels are."""
    return hashlib.sha256("\n".join(sorted(tasks)).encode()).hexdigest()[:12]
