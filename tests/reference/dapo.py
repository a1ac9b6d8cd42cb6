"""DAPO (2503.14476): what it adds to GRPO: a fine for length, and groups that teach nothing are left out."""

from __future__ import annotations

from dataclasses import replace

from .trajectories import Trajectory, members


def overlong(tokens: int, length: int, buffer: int, factor: float = 1.0) -> float:
    """The fine (Eq. 13): none up to ``length - buffer`` tokens, ``-factor`` from ``length`` on, in between a line."""
    if tokens <= length - buffer:
        return 0.0
    if tokens <= length:
        return factor * ((length - buffer) - tokens) / buffer
    return -factor


def with_overlong(trajectories: list[Trajectory], length: int, buffer: int, factor: float = 1.0) -> list[Trajectory]:
    """The same episodes with the fine in their returns."""
    return [
        replace(trajectory, outcome=trajectory.outcome + overlong(len(trajectory.tokens), length, buffer, factor))
        for trajectory in trajectories
    ]


def informative(trajectories: list[Trajectory]) -> list[Trajectory]:
    """The episodes of groups whose returns are not all the same."""
    kept = []
    for trajectory in trajectories:
        outcomes = {other.outcome for other in members(trajectories, trajectory.group)}
        if len(outcomes) > 1:
            kept.append(trajectory)
    return kept
