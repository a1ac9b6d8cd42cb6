"""GRPO (2402.03300) and Dr. GRPO (2503.20783): an episode compared with the others of its task."""

from __future__ import annotations

from .statistics import compared
from .trajectories import PerToken, Trajectory, members, spread


def advantages(trajectories: list[Trajectory], *, std: bool = True, per_turn: bool = False) -> PerToken:
    """``A_i = (R_i - mean_group R) / (std_group R + 1e-6)``; Dr. GRPO leaves out the division.

    ``per_turn``: an episode counts once for each of its turns (verl-agent).
    """
    values = []
    for trajectory in trajectories:
        sample = []
        for other in members(trajectories, trajectory.group):
            sample += [other.outcome] * (len(other.turns) if per_turn else 1)
        values.append(compared(trajectory.outcome, sample, std=std) if sample else 0.0)
    return spread(trajectories, values)
