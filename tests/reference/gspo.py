"""GSPO (2507.18071): one importance ratio per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .loss import Loss, aggregate, slope
from .trajectories import PerToken, Token, Trajectory, sequences


def ratio(log_ratios: Sequence[float]) -> tuple[float, float]:
    """``s = exp((1/|y|) Σ_t log r_t)``, and its derivative by the exponent, 0 where s is held at e^10 (verl)."""
    mean = float(np.mean(log_ratios))
    s = float(np.exp(min(mean, 10.0)))
    return s, 0.0 if mean > 10 else s


def token_losses(
    row: list[Token], advantages: PerToken, low: float = 3e-4, high: float = 4e-4
) -> tuple[PerToken, PerToken]:
    """Of every token of one sequence, ``max(-A s, -A clip(s, 1 - low, 1 + high))`` and its derivative by the token's
    log-probability, where s has the value of the sequence's ratio and the derivative of the token's own."""
    s, by_exponent = ratio([token.logp - token.old_logp for token in row])
    losses, slopes = {}, {}
    for token in row:
        a = advantages[token.place]
        loss, derivative = -a * s, -a * by_exponent
        bounded = -a * min(max(s, 1 - low), 1 + high)
        if bounded > loss:
            loss, derivative = bounded, 0.0
        losses[token.place], slopes[token.place] = loss, derivative
    return losses, slopes


def policy_loss(
    trajectories: list[Trajectory],
    advantages: PerToken,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
    mode: str = "seq-mean-token-mean",
    width: int | None = None,
) -> Loss:
    """The aggregated loss of all sequences."""
    losses: PerToken = {}
    slopes: PerToken = {}
    for row in sequences(trajectories):
        of_row = token_losses(row, advantages, low, high)
        losses |= of_row[0]
        slopes |= of_row[1]
    return Loss(aggregate(trajectories, losses, mode, width), logp=slope(trajectories, slopes, mode, width))


def sequence_objective(
    trajectories: list[Trajectory], advantages: PerToken, low: float = 3e-4, high: float = 4e-4
) -> float:
    """The paper's own objective, one term per sequence (Eq. 5), as a loss; for advantages that are equal all over a
    sequence."""
    terms = []
    for row in sequences(trajectories):
        s, _ = ratio([token.logp - token.old_logp for token in row])
        a = advantages[row[0].place]
        terms.append(-min(s * a, min(max(s, 1 - low), 1 + high) * a))
    return float(np.mean(terms))
