"""RLOO (2402.14740): an episode compared with the mean of the others of its task."""

from __future__ import annotations

import numpy as np

from .trajectories import PerToken, Trajectory, members, spread


def advantages(trajectories: list[Trajectory]) -> PerToken:
    """``A_i = R_i - mean_{j≠i} R_j``; 0 for an episode alone."""
    values = []
    for trajectory in trajectories:
        others = [other.outcome for other in members(trajectories, trajectory.group) if other is not trajectory]
        values.append(trajectory.outcome - float(np.mean(others)) if others else 0.0)
    return spread(trajectories, values)
