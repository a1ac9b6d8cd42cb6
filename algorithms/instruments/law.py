"""The law of entropy and performance, R = -a exp(H) + b (The Entropy Mechanism, 2505.22617).

- ``LawFit``: the coefficients and how well they hold. ``fit_law``: ordinary least squares.
- ``law_metrics``: the same as metrics of a training step, from the run's own rows.

Without an intervention on entropy, performance is bought with entropy along one curve, whose end at H = 0 can be told
beforehand: the ceiling b - a. Under a recipe that steers entropy (EPO, a bonus, a corridor) the law need not hold, and
``r2`` and ``heldout_error`` say whether it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError

FEWEST_POINTS = 8
"""Steps before a run's rows carry a fit: with fewer, the noise of single steps decides it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LawFit:
    """R = -a exp(H) + b, with H in nats a token and R in the units of the rewards."""

    a: float
    b: float
    ceiling: float
    """b - a: R where no entropy is left."""
    r2: float
    """1 - Σ residual² / Σ (R - mean R)²; 1 where all rewards are equal."""
    heldout_error: float | None
    """Root mean square error on the later half of the points, of the law fitted to the earlier half; the middle one of
    an odd number is an earlier one. None where the earlier half does not determine a line."""
    points: int
    """Pairs that were used."""
    ceiling_error: float = 0.0
    """Standard error of the ceiling as a prediction of the line at H = 0, for independent residuals of equal size."""

    def predict(self, entropy: float) -> float:
        """R at ``entropy``."""
        return float(self.b - self.a * np.exp(entropy))


def fit_law(entropy: Sequence[float], reward: Sequence[float]) -> LawFit | None:
    """Fit the law to pairs in the order of training.

    The order matters to ``heldout_error`` alone. Pairs with something that is not finite are left out.

    Args:
        entropy: mean entropy of the policy in nats a token, one per checkpoint or step.
        reward: performance there, such as the success rate.

    Returns:
        None with fewer than 3 distinct pairs, or where all have one entropy.

    Raises:
        UsageError: the lengths differ.
    """
    if len(entropy) != len(reward):
        raise UsageError(f"the law needs one reward for each entropy, got {len(entropy)} and {len(reward)}")
    heights, rewards = np.asarray(entropy, np.float64), np.asarray(reward, np.float64)
    with np.errstate(over="ignore"):
        x = np.exp(heights)
    known = np.isfinite(x) & np.isfinite(rewards)
    x, rewards = x[known], rewards[known]
    if len({*zip(x.tolist(), rewards.tolist(), strict=True)}) < 3:
        return None
    line = _line(x, rewards)
    if line is None:
        return None
    a, b = line
    residual = float(((rewards - (b - a * x)) ** 2).sum())
    spread = float(((rewards - rewards.mean()) ** 2).sum())
    # Equal rewards are met exactly; what rounding leaves of their spread says nothing.
    constant = spread <= len(x) * (1e-12 * max(1.0, float(np.abs(rewards).max()))) ** 2
    half = -(-len(x) // 2)
    early, error = _line(x[:half], rewards[:half]), None
    if early is not None:
        error = float(np.sqrt(np.mean((rewards[half:] - (early[1] - early[0] * x[half:])) ** 2)))
    # Of a line's value at exp(0) = 1 (Draper and Smith, Applied Regression Analysis, 1.4).
    offset = float((1 - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    doubt = float(np.sqrt(residual / (len(x) - 2) * (1 / len(x) + offset)))
    return LawFit(a, b, b - a, 1.0 if constant else 1 - residual / spread, error, len(x), doubt)


def law_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of ``LawFit`` as ``law/a``, ``law/ceiling`` and so on, of the training rows so far.

    H is ``entropy/action_mean`` and R ``success/rate``: both are of the same rollouts, by the same weights. The metrics
    are a function of the rows, so a resumed run repeats them. Nothing before ``FEWEST_POINTS`` rows, where the rows
    determine no line, or where success was always the same: nothing has been bought then.
    """
    pairs = [(row["entropy/action_mean"], row["success/rate"]) for row in rows if "success/rate" in row]
    varies = len({rate for _, rate in pairs}) > 1
    fit = fit_law(*zip(*pairs, strict=True)) if len(pairs) >= FEWEST_POINTS and varies else None
    if fit is None:
        return {}
    names = ("a", "b", "ceiling", "ceiling_error", "r2", "heldout_error")
    return {f"law/{name}": value for name in names if (value := getattr(fit, name)) is not None}


def _line(x: Floats, y: Floats) -> tuple[float, float] | None:
    """(a, b) of y = b - a x; None where x is constant to rounding."""
    centred = x - x.mean()
    squares = float(centred @ centred)
    if squares <= len(x) * (1e-12 * float(np.abs(x).max(initial=0.0))) ** 2:
        return None
    a = float(centred @ (y.mean() - y)) / squares
    return a, float(y.mean() + a * x.mean())
