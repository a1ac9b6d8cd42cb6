"""Which tasks a policy can solve at all, and how training changes that.

- ``pass_at_k``, ``pass_hat_k``: at least one, and every one, of k samples wins. ``distinct_at_k``: distinct outcomes
  among k samples.
- ``Support``: tasks kept, gained and lost between two sets of samples, with the rates of the invisible leash
  (2507.14843). ``support``: from counts by task. ``detectability``: what a number of samples cannot see.
- ``won_counts``: counts of a stored evaluation. ``visits``: counts at the first and the last visit of training tasks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import UsageError

if TYPE_CHECKING:
    from ...agents.tree import Tree

Counts = Mapping[str, tuple[int, int]]
"""By task: samples that won, and samples in all."""


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]: ...
def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> Any:
    """Probability that at least one of ``k`` samples wins: 1 - C(n - c, k) / C(n, k), the unbiased estimate
    (Chen et al., 2107.03374, Eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5

    Args:
        n: samples of each task; any shape.
        c: those of them that won, 0 to n; broadcasts with n.
        k: 1 to the smallest n.

    Raises:
        UsageError: a count is out of its range.
    """
    samples, won = _checked(n, c, k)
    return _plain(1 - _share(samples, samples - won, k))


@overload
def pass_hat_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_hat_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]: ...
def pass_hat_k(n: ArrayLike, c: ArrayLike, k: int) -> Any:
    """Probability that all of ``k`` samples win: C(c, k) / C(n, k), the unbiased estimate (τ-bench, 2406.12045).

    >>> pass_hat_k(4, 3, 2)
    0.5

    Arguments and errors are those of ``pass_at_k``.
    """
    samples, won = _checked(n, c, k)
    return _plain(_share(samples, won, k))


def distinct_at_k(counts: Sequence[int] | NDArray[np.integer[Any]], k: int) -> float:
    """Expected number of distinct outcomes among ``k`` of n samples: Σ_o 1 - C(n - n_o, k) / C(n, k).

    Args:
        counts: samples with each outcome, each at least 0; n is their sum.
        k: 1 to n.

    Raises:
        UsageError: a count is negative, or k is not in 1 to n.
    """
    each = np.asarray(counts, np.int64)
    return float(np.sum(pass_at_k(np.full(each.shape, each.sum()), each, k)))


def detectability(samples: int, doubt: float = 0.05) -> float:
    """A probability of success from which on ``samples`` samples have a win with probability 1 - ``doubt`` or more.

    It is -ln(doubt) / samples (2507.14843: 3.66e-4 for 8192 samples and 0.05), at most 1; with few samples a somewhat
    smaller one would do, 1 - doubt^(1 / samples). A task that was never won may still be solved less often than this.
    """
    return min(1.0, -math.log(doubt) / samples)


@dataclass(frozen=True)
class Support:
    """Tasks that were won at least once, before and after. Rates are None where nothing could be counted."""

    kept: int
    """Won before and after."""
    gained: int
    """Won after only."""
    lost: int
    """Won before only."""
    never: int
    """Won neither before nor after."""

    @property
    def retention(self) -> float | None:
        """SRR = kept / (kept + lost)."""
        return _ratio(self.kept, self.kept + self.lost)

    @property
    def discovery(self) -> float | None:
        """NDR = gained / (kept + gained)."""
        return _ratio(self.gained, self.kept + self.gained)

    @property
    def dynamic_score(self) -> float | None:
        """SDS, the harmonic mean of retention and discovery."""
        retention, discovery = self.retention, self.discovery
        if retention is None or discovery is None:
            return None
        return 2 * retention * discovery / (retention + discovery) if retention + discovery else 0.0

    @property
    def net_change(self) -> float | None:
        """NSCR = (gained - lost) / (kept + gained + lost), in [-1, 1]; below 0 the support has shrunk."""
        return _ratio(self.gained - self.lost, self.kept + self.gained + self.lost)


def support(before: Counts, after: Counts) -> Support:
    """Compare the tasks that both have.

    Chance alone moves tasks that are rarely won: compare equal numbers of samples, and mind their ``detectability``.

    Raises:
        UsageError: no task is in both.
    """
    shared = before.keys() & after.keys()
    if not shared:
        raise UsageError("the two sets of samples have no task in common; expected evaluations of one panel")
    found = Counter((before[task][0] > 0, after[task][0] > 0) for task in shared)
    return Support(found[True, True], found[False, True], found[True, False], found[False, False])


def won_counts(evaluation: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Counts of a stored evaluation: ``tasks`` with a list of ``won`` for each."""
    return {
        task: (sum(map(bool, won)), len(won)) for task, won in zip(evaluation["tasks"], evaluation["won"], strict=True)
    }


def visits(steps: Iterable[Sequence[Tree]]) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Counts at the first and at the last visit of every task that training visited in two or more steps.

    Args:
        steps: the trees of each step, in order. Episodes whose world failed do not count.
    """
    first: dict[str, tuple[int, int]] = {}
    last: dict[str, tuple[int, int]] = {}
    for trees in steps:
        seen: dict[str, tuple[int, int]] = {}
        for tree in trees:
            played = [episode.won for episode in tree.trajectories if not episode.failed]
            won, samples = seen.get(tree.task, (0, 0))
            seen[tree.task] = won + sum(played), samples + len(played)
        for task, counts in seen.items():
            if task in first:
                last[task] = counts
            else:
                first[task] = counts
    return {task: first[task] for task in last}, last


def _checked(n: ArrayLike, c: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    samples, won = np.broadcast_arrays(np.asarray(n, np.int64), np.asarray(c, np.int64))
    if samples.size and not 1 <= k <= int(samples.min()):
        raise UsageError(f"k must be 1 to the number of samples, {int(samples.min())} here; got {k}")
    if ((won < 0) | (won > samples)).any():
        raise UsageError("every number of wins must be between 0 and the number of samples")
    return samples, won


def _share(n: NDArray[np.int64], m: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """C(m, k) / C(n, k) as a product of k quotients, of which none overflows; 0 where m < k, without a test, since
    then one of the factors is 0."""
    place = np.arange(k, dtype=np.int64)
    return np.prod((m[..., None] - place).clip(0) / (n[..., None] - place), axis=-1)


def _plain(value: NDArray[np.float64]) -> NDArray[np.float64] | float:
    return value if value.ndim else float(value)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
