"""From the losses of tokens to one number: clips, aggregations and the distance to a reference model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .trajectories import PerToken, Trajectory, sequences

Surrogate = Callable[[float, float], tuple[float, float]]
"""``(advantage, log ratio of current to old policy) → (loss, its derivative by the log ratio)``."""


@dataclass
class Loss:
    """A number, and its derivatives by the log-probability, the entropy and the value of each token (0 if absent)."""

    value: float = 0.0
    logp: PerToken = field(default_factory=dict)
    entropy: PerToken = field(default_factory=dict)
    values: PerToken = field(default_factory=dict)

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.value + other.value,
            *(
                {place: mine.get(place, 0.0) + others.get(place, 0.0) for place in mine.keys() | others.keys()}
                for mine, others in (
                    (self.logp, other.logp),
                    (self.entropy, other.entropy),
                    (self.values, other.values),
                )
            ),
        )


def aggregate(trajectories: list[Trajectory], losses: PerToken, mode: str, width: int | None = None) -> float:
    """One number from the losses of tokens; ``width`` is the constant of ``seq-mean-token-sum-norm``."""
    if not any(trajectory.turns for trajectory in trajectories):
        return 0.0
    if mode == "turn-mean":
        of_trajectories = []
        for trajectory in trajectories:
            of_turns = [
                sum(losses.get(token.place, 0.0) for token in turn.tokens) / len(turn.tokens)
                for turn in trajectory.turns
            ]
            if of_turns:
                of_trajectories.append(sum(of_turns) / len(of_turns))
        return sum(of_trajectories) / len(of_trajectories)
    rows = [[losses.get(token.place, 0.0) for token in row] for row in sequences(trajectories)]
    if mode == "token-mean":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if mode == "token-sum":
        return sum(sum(row) for row in rows)
    if mode == "seq-mean-token-sum":
        return sum(sum(row) for row in rows) / len(rows)
    if mode == "seq-mean-token-sum-norm":
        assert width is not None
        return sum(sum(row) / width for row in rows) / len(rows)
    assert mode == "seq-mean-token-mean"
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def slope(trajectories: list[Trajectory], slopes: PerToken, mode: str, width: int | None = None) -> PerToken:
    """Derivative of ``aggregate`` by each token's input, given that of the token's own loss: it is linear."""
    return {place: aggregate(trajectories, {place: value}, mode, width) for place, value in slopes.items()}


def unclipped(advantage: float, log_ratio: float) -> tuple[float, float]:
    """``-A r``."""
    ratio = np.exp(log_ratio)
    return -advantage * ratio, -advantage * ratio


def ppo_clip(
    advantage: float, log_ratio: float, low: float = 0.2, high: float = 0.2, dual: float | None = 3.0
) -> tuple[float, float]:
    """``max(-A r, -A clip(r, 1 - low, 1 + high))``, and where A < 0 at most ``-A dual``; flat where a bound holds."""
    ratio = np.exp(log_ratio)
    loss, derivative = -advantage * ratio, -advantage * ratio
    bounded = -advantage * min(max(ratio, 1 - low), 1 + high)
    if bounded > loss:
        loss, derivative = bounded, 0.0
    if dual is not None and advantage < 0 and loss > -advantage * dual:
        loss, derivative = -advantage * dual, 0.0
    return loss, derivative


def policy_loss(
    trajectories: list[Trajectory],
    advantages: PerToken,
    surrogate: Surrogate,
    mode: str = "token-mean",
    width: int | None = None,
    weights: PerToken | None = None,
) -> Loss:
    """The aggregated surrogate, where a token's loss counts ``weights`` times.

    Log ratios are kept within ±20 and have no derivative beyond (verl).
    """
    losses, slopes = {}, {}
    for trajectory in trajectories:
        for token in trajectory.tokens:
            log_ratio = token.logp - token.old_logp
            loss, derivative = surrogate(advantages[token.place], min(max(log_ratio, -20.0), 20.0))
            if abs(log_ratio) > 20:
                derivative = 0.0
            factor = 1.0 if weights is None else weights[token.place]
            losses[token.place] = factor * loss
            slopes[token.place] = factor * derivative
    return Loss(aggregate(trajectories, losses, mode, width), logp=slope(trajectories, slopes, mode, width))


def kl_estimate(d: float, estimator: str) -> tuple[float, float]:
    """An estimate of KL(policy || reference) from ``d = logp - ref_logp`` of a sampled token, and its derivative by
    ``d``; k3 is at most 10 (verl), and a ``+`` takes the derivative of k2."""
    name = estimator.removesuffix("+")
    if name == "k1":
        value, derivative = d, 1.0
    elif name == "k2":
        value, derivative = d**2 / 2, d
    else:
        value, derivative = np.exp(-d) + d - 1, 1 - np.exp(-d)
        if value > 10:
            value, derivative = 10.0, 0.0
    return value, d if estimator.endswith("+") else derivative


def kl_loss(
    trajectories: list[Trajectory], coefficient: float, estimator: str, mode: str, width: int | None = None
) -> Loss:
    """``coefficient · agg(KL)``."""
    losses, slopes = {}, {}
    for trajectory in trajectories:
        for token in trajectory.tokens:
            estimate, derivative = kl_estimate(token.logp - token.ref_logp, estimator)
            losses[token.place] = coefficient * estimate
            slopes[token.place] = coefficient * derivative
    return Loss(aggregate(trajectories, losses, mode, width), logp=slope(trajectories, slopes, mode, width))
