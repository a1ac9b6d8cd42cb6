"""EMPG (2509.09265): advantages scaled by how sure each step was, plus a bonus for leading to a sure one."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .statistics import compared
from .trajectories import PerToken, Trajectory, members

Step = tuple[int, int]
"""Trajectory (by position in the list) and turn."""


def step_entropies(trajectories: list[Trajectory]) -> dict[Step, float]:
    """``H_t``: mean over the tokens of each step, under the old policy."""
    return {
        (i, turn.index): float(np.mean([token.old_entropy for token in turn.tokens]))
        for i, trajectory in enumerate(trajectories)
        for turn in trajectory.turns
    }


def normalised(
    entropies: dict[Step, float], minmax: Literal["exact", "percentile"] = "exact", eps: float = 1e-8
) -> dict[Step, float]:
    """``(H - min) / (max - min + eps)`` over all steps of the batch (Eq. 12); ``percentile`` takes the 1st and 99th for
    the ends and keeps within [0, 1]."""
    values = list(entropies.values())
    low, high = (min(values), max(values)) if minmax == "exact" else np.percentile(values, [1, 99])
    return {step: float(np.clip((h - low) / (high - low + eps), 0, 1)) for step, h in entropies.items()}


def scalings(normal: dict[Step, float], k: float = 1.0) -> dict[Step, float]:
    """``g = exp(-k H) / mean(exp(-k H))`` (Eq. 10)."""
    mean = float(np.mean([np.exp(-k * h) for h in normal.values()]))
    return {step: float(np.exp(-k * h)) / mean for step, h in normal.items()}


def bonuses(normal: dict[Step, float], k: float = 1.0) -> dict[Step, float]:
    """``f = exp(-k' H_{t+1})`` of the same trajectory's next step (Eq. 11); absent for its last step."""
    return {(i, turn): float(np.exp(-k * normal[i, turn + 1])) for i, turn in normal if (i, turn + 1) in normal}


def modulate(
    trajectories: list[Trajectory],
    advantages: PerToken,
    *,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.05,
    last_bonus: Literal["zero", "mean", "drop"] = "zero",
    successes_only: bool = False,
    minmax: Literal["exact", "percentile"] = "exact",
) -> PerToken:
    """``A g(H_t) + ζ f(H_{t+1})``, less its mean over all steps of the batch (Eq. 7, 8).

    The last step of a trajectory has no bonus, or the mean of those of the others, or (``drop``) no part in the
    centring: it keeps ``A g``. ``successes_only``: bonuses are for trajectories that earned more than their group's
    mean, or more than 0 where they are alone in it.
    """
    normal = normalised(step_entropies(trajectories), minmax)
    g, f = scalings(normal, k), bonuses(normal, k_future)
    if successes_only:
        f = {step: bonus for step, bonus in f.items() if succeeds(trajectories, trajectories[step[0]])}
    mean_bonus = float(np.mean(list(f.values()))) if f else 0.0
    modulated: PerToken = {}
    centred: set[Step] = set()
    of_steps = []
    for i, trajectory in enumerate(trajectories):
        for turn in trajectory.turns:
            step, last = (i, turn.index), (i, turn.index + 1) not in normal
            bonus = f.get(step, 0.0)
            if last and last_bonus == "mean" and (not successes_only or succeeds(trajectories, trajectory)):
                bonus = mean_bonus
            for token in turn.tokens:
                modulated[token.place] = advantages[token.place] * g[step] + zeta * bonus
            if not (last and last_bonus == "drop"):
                centred.add(step)
                of_steps.append(np.mean([modulated[token.place] for token in turn.tokens]))
    centre = float(np.mean(of_steps)) if of_steps else 0.0
    for i, trajectory in enumerate(trajectories):
        for turn in trajectory.turns:
            for token in turn.tokens:
                modulated[token.place] -= centre if (i, turn.index) in centred else 0.0
    return modulated


def succeeds(trajectories: list[Trajectory], trajectory: Trajectory) -> bool:
    """Whether it earned more than the mean of its group; alone, more than 0."""
    outcomes = [other.outcome for other in members(trajectories, trajectory.group)]
    return compared(trajectory.outcome, outcomes, std=False) > 0
