"""AEPO (2510.14545): a budget between fresh rollouts and branches, a penalty on consecutive branches, a clip that keeps
a gradient, and advantages scaled by entropy."""

from __future__ import annotations

import numpy as np

from .trajectories import PerToken, Trajectory


def fresh_rollouts(budget: int, root: float, tool: float, beta: float = 0.5) -> float:
    """``m = k σ(β (H_root - H̄_tool))``, a real number; the rest of the budget k is for branches."""
    return budget / (1 + float(np.exp(-beta * (root - tool))))


def rounded_fresh_rollouts(budget: int, root: float, tool: float, beta: float = 0.5) -> int:
    """The nearest whole number of rollouts, at least one and not more than there are."""
    return min(max(round(fresh_rollouts(budget, root, tool, beta)), 1), budget)


def official_fresh_rollouts(budget: int, root: float, tool: float, beta: float = 0.5) -> int:
    """The released code's: integer part plus one, within [1, budget]."""
    return min(max(int(fresh_rollouts(budget, root, tool, beta)) + 1, 1), budget)


def penalty(consecutive: int, weight: float = 0.05) -> float:
    """``P̂(l) = weight · l`` for l consecutive branches."""
    return weight * consecutive


def probability(delta: float, consecutive: int, alpha: float = 0.5, gamma: float = 0.2, weight: float = 0.05) -> float:
    """``P = (α + γ ΔH) (1 - P̂(l))``, the second factor not below 0."""
    return (alpha + gamma * delta) * max(0.0, 1 - penalty(consecutive, weight))


def chain(
    deltas: list[float], alpha: float = 0.5, gamma: float = 0.2, tau: float = 0.5, weight: float = 0.05
) -> list[tuple[float, bool]]:
    """P and whether it branches, at every decision along one chain; branch iff ``P > τ``, and l counts the decisions in
    a row that did."""
    consecutive = 0
    decided = []
    for delta in deltas:
        p = probability(delta, consecutive, alpha, gamma, weight)
        branches = p > tau
        consecutive = consecutive + 1 if branches else 0
        decided.append((p, branches))
    return decided


def official_branches(
    draw: float, delta: float, consecutive: int, alpha: float = 0.5, gamma: float = 0.2, weight: float = 0.05
) -> bool:
    """The released code's decision for a uniform ``draw``: ``(draw + γ ΔH) · max(0, 1 - P̂) ≥ α``."""
    return (draw + gamma * delta) * max(0.0, 1 - penalty(consecutive, weight)) >= alpha


def official_probability(
    delta: float, consecutive: int, alpha: float = 0.5, gamma: float = 0.2, weight: float = 0.05
) -> float:
    """Share of draws for which ``official_branches``: ``clip(1 - α / (1 - P̂) + γ ΔH, 0, 1)``, 0 once P̂ reaches 1."""
    left = 1 - penalty(consecutive, weight)
    return float(np.clip(1 - alpha / left + gamma * delta, 0, 1)) if left > 0 else 0.0


def preserving_clip(
    advantage: float,
    log_ratio: float,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = 3.0,
    both_sides: bool = False,
) -> tuple[float, float]:
    """PPO's loss, and a derivative by the log ratio that keeps ``-(1 + high) A`` where PPO's upper bound takes it away.

    ``both_sides``: also ``-(1 - low) A`` at the lower bound (GPPO, 2508.07629). The table, r being the ratio:

    ============================  ======================  =======================
    where                         loss                    derivative
    ============================  ======================  =======================
    A > 0, r > 1 + high           -A (1 + high)           -A (1 + high)
    A < 0, r < 1 - low            -A (1 - low)            0, or -A (1 - low)
    A < 0, r > dual               -A dual                 0
    elsewhere                     -A r                    -A r
    ============================  ======================  =======================
    """
    ratio = np.exp(log_ratio)
    if advantage > 0 and ratio > 1 + high:
        return -advantage * (1 + high), -advantage * (1 + high)
    if advantage < 0 and ratio < 1 - low:
        return -advantage * (1 - low), -advantage * (1 - low) if both_sides else 0.0
    if advantage < 0 and dual is not None and ratio > dual:
        return -advantage * dual, 0.0
    return -advantage * ratio, -advantage * ratio


def entropy_factors(
    trajectories: list[Trajectory], weight: float = 0.2, clamp: tuple[float, float] | None = None
) -> PerToken:
    """``1 + a (H - mean) / std`` over all tokens of the batch, std unbiased; 1 where entropies do not differ."""
    tokens = [token for trajectory in trajectories for token in trajectory.tokens]
    entropies = [token.old_entropy for token in tokens]
    if len(set(entropies)) == 1:
        return {token.place: 1.0 for token in tokens}
    mean, deviation = float(np.mean(entropies)), float(np.std(entropies, ddof=1))
    factors = {}
    for token in tokens:
        factor = 1 + weight * (token.old_entropy - mean) / deviation
        factors[token.place] = factor if clamp is None else min(max(factor, clamp[0]), clamp[1])
    return factors


def modulate(
    trajectories: list[Trajectory],
    advantages: PerToken,
    weight: float = 0.2,
    clamp: tuple[float, float] | None = None,
) -> PerToken:
    """``Ã(t) = A (1 + a z(H_t))``."""
    factors = entropy_factors(trajectories, weight, clamp)
    return {place: a * factors[place] for place, a in advantages.items()}
