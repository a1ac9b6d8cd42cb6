"""Truncated and masked importance sampling between the sampler and the trainer (verl's rollout correction)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .trajectories import PerToken, Trajectory


def weights(trajectories: list[Trajectory], *, per_trajectory: bool = False) -> PerToken:
    """``w = π_old / π_sampler`` of each token, or of the whole trajectory for each of its tokens; unbounded but for the
    logarithm, which is kept within ±20."""
    result = {}
    for trajectory in trajectories:
        logs = [token.old_logp - token.rollout_logp for token in trajectory.tokens]
        for token, log in zip(trajectory.tokens, logs, strict=True):
            result[token.place] = float(np.exp(np.clip(sum(logs) if per_trajectory else log, -20, 20)))
    return result


def truncated(values: PerToken, cap: float) -> PerToken:
    """``min(w, cap)`` (TIS)."""
    return {place: min(w, cap) for place, w in values.items()}


def zeroed(values: PerToken, low: float, high: float) -> PerToken:
    """0 outside ``[low, high]`` (IcePop)."""
    return {place: w if low <= w <= high else 0.0 for place, w in values.items()}


def masked(trajectories: list[Trajectory], values: PerToken, low: float, high: float) -> list[Trajectory]:
    """What is left of the episodes without the tokens whose weight is outside ``[low, high]`` (MIS)."""
    left = []
    for trajectory in trajectories:
        turns = []
        for turn in trajectory.turns:
            tokens = [token for token in turn.tokens if low <= values[token.place] <= high]
            if tokens:
                turns.append(replace(turn, tokens=tokens))
        left.append(replace(trajectory, turns=turns))
    return left


def normalised(trajectories: list[Trajectory], values: PerToken, *, per_trajectory: bool = False) -> PerToken:
    """Divided by their mean over all tokens, or over all trajectories that have any; zeros stay zeros."""
    sample = []
    for trajectory in trajectories:
        tokens = trajectory.tokens[:1] if per_trajectory else trajectory.tokens
        sample += [values[token.place] for token in tokens]
    mean = float(np.mean(sample)) if sample else 0.0
    return {place: w / mean if mean > 0 else w for place, w in values.items()}
