"""Statistics of a comparison, from scipy: intervals over seeds and tasks, paired tests, corrections.

- ``crossed_interval``: of a mean over seeds and tasks, both of which are samples. ``rate_interval``: of rates.
- ``compare``: one recipe against another on the same tasks and seeds. ``adjust``: many comparisons at once.
  ``differs``: whether two can be told apart.
- ``improvement``: how often a run of one recipe beats a run of the other. ``smallest_effect``: what could be found.
- ``interquartile_mean``: over the runs of several panels.

Runs are the unit of chance: all episodes of a run share its weights. So a test looks at one number per run, and a
bootstrap draws whole runs and whole tasks (the pigeonhole bootstrap: Owen 2007, Annals of Applied Statistics 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ...algorithms.stats import Proportion

Floats = NDArray[np.float64]

RESAMPLES = 4999
ALPHA = 0.05
"""Share of comparisons of equals that may come out as different."""
POWER = 0.8
DIGITS = 12
ROUNDING = 10.0**-DIGITS
"""Rates that differ by less are the same rate."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """A recipe less its baseline, on one panel."""

    difference: Interval
    """Mean over seeds and tasks, with the interval of the crossed bootstrap."""
    p: float
    """Of the paired t-test over seeds; 1 with fewer than two seeds, which nothing can be told from. Where all seeds
    differ by the same, the t-test has no deviation to go by: then it is the chance that all differences of equals have
    one sign."""
    improvement: Interval
    """See ``improvement``."""
    deviation: float
    """Standard deviation over seeds of the difference; NaN with fewer than two."""
    seeds: int


def crossed_interval(scores: ArrayLike, rng: np.random.Generator) -> Interval:
    """Mean of ``scores`` [S, T], and its percentile interval when seeds and tasks are both drawn anew, whole.

    What there is only one of is not drawn: the interval of one seed is of that run alone.
    """
    table = np.asarray(scores, np.float64)
    value = float(table.mean())
    if np.ptp(table) == 0:
        return Interval(value, value, value)
    drawn = [axis for axis in (0, 1) if table.shape[axis] > 1]

    def mean(*chosen: NDArray[np.int64], axis: int = -1) -> Floats:
        rows, columns = (chosen[drawn.index(each)] if each in drawn else np.zeros((1, 1), np.int64) for each in (0, 1))
        return table[rows[..., :, None], columns[..., None, :]].mean((-1, -2))

    return Interval(value, *_bootstrap([np.arange(table.shape[axis]) for axis in drawn], mean, rng))


def rate_interval(won: ArrayLike, rng: np.random.Generator) -> Interval:
    """``crossed_interval`` of rates, whose resamples say nothing where all are 0, or all 1: there it is Wilson's, of as
    many trials as tasks."""
    table = np.asarray(won, np.float64)
    value, tasks = float(table.mean()), table.shape[1]
    if 0 < value < 1:
        return crossed_interval(table, rng)
    return Interval(value, *Proportion(round(value) * tasks, tasks).interval)


def compare(scores: ArrayLike, baseline: ArrayLike, rng: np.random.Generator) -> Comparison:
    """``scores`` less ``baseline``, each [S, T]: rows are the same seeds, columns the same tasks."""
    ours, theirs = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"scores {ours.shape} and baseline {theirs.shape} must be of the same seeds and tasks")
    seeds = len(ours)
    by_seed = (ours - theirs).mean(1)
    p, deviation = 1.0, math.nan
    if seeds > 1:
        if np.ptp(by_seed) > ROUNDING:
            deviation = float(by_seed.std(ddof=1))
            p = float(stats.ttest_1samp(by_seed, 0.0).pvalue)
        else:
            deviation = 0.0
            p = 2.0 ** (1 - seeds) if abs(by_seed[0]) > ROUNDING else 1.0
    difference = crossed_interval(ours - theirs, rng)
    # Runs that won equally often are a tie, in whatever order their episodes are added up.
    better = improvement(ours.mean(1).round(DIGITS), theirs.mean(1).round(DIGITS), rng)
    return Comparison(difference, p, better, deviation, seeds)


def differs(q: float, difference: Interval) -> bool:
    """Whether two recipes can be told apart: the paired test over seeds, corrected to ``q``, and the interval over
    seeds and tasks both say so. Among equals, the two together say so in fewer than 5 % of comparisons."""
    return bool(q < ALPHA) and not difference.low <= 0 <= difference.high


def adjust(p: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's q-values. Where no recipe differs, no more than 5 % of whole families show any."""
    return [float(q) for q in stats.false_discovery_control(p, method="bh")] if p else []


def improvement(scores: ArrayLike, baseline: ArrayLike, rng: np.random.Generator) -> Interval:
    """Chance that a run scores above one of the baseline, ties counting half (Agarwal et al. 2021, section 4.3).

    ``scores`` [S] and ``baseline`` [S']; the value is Mann and Whitney's U over S S'.
    """
    ours, theirs = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    value = float(stats.mannwhitneyu(ours, theirs).statistic) / (len(ours) * len(theirs))
    if min(len(ours), len(theirs)) < 2:
        return Interval(value, 0.0, 1.0)

    def chance(first: Floats, second: Floats, axis: int = -1) -> Floats:
        gap = np.sign(first[..., :, None] - second[..., None, :])
        return (gap.mean((-1, -2)) + 1) / 2

    return Interval(value, *_bootstrap([ours, theirs], chance, rng))


def interquartile_mean(scores: ArrayLike, rng: np.random.Generator) -> Interval:
    """Mean of the middle half of ``scores`` [S, P], one number per run and panel (Agarwal et al. 2021), and its
    interval over seeds."""
    table = np.asarray(scores, np.float64)

    def middle(rows: NDArray[np.int64], axis: int = -1) -> Floats:
        chosen = table[rows]
        return stats.trim_mean(chosen.reshape(*chosen.shape[:-2], -1), 0.25, axis=-1)

    every = np.arange(len(table))
    value = float(middle(every))
    if len(table) < 2 or np.ptp(table) == 0:
        return Interval(value, value, value)
    return Interval(value, *_bootstrap([every], middle, rng))


def smallest_effect(deviation: float, seeds: int, comparisons: int = 1) -> float:
    """The difference that a paired t-test over ``seeds`` finds 4 times in 5, where differences of single seeds vary by
    ``deviation``; with ``comparisons`` others beside it, as if it had to be found first (Bonferroni). NaN with fewer
    than two seeds.
    """
    if seeds < 2 or not math.isfinite(deviation):
        return math.nan
    freedom = seeds - 1
    threshold = float(stats.t.ppf(1 - ALPHA / comparisons / 2, freedom))

    def missing(noncentrality: float) -> float:
        return float(stats.nct.cdf(threshold, freedom, noncentrality)) - (1 - POWER)

    return float(optimize.brentq(missing, 0.0, 2 * threshold + 20)) * deviation / math.sqrt(seeds)


def _bootstrap(data: Sequence[NDArray[Any]], statistic: Any, rng: np.random.Generator) -> tuple[float, float]:
    found = stats.bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=500,
        vectorized=True,
        paired=False,
        method="percentile",
        confidence_level=1 - ALPHA,
        rng=rng,
    ).confidence_interval
    return float(found.low), float(found.high)
