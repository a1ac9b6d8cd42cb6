"""REINFORCE++ (2501.03262), with and without a group's mean as its baseline."""

from __future__ import annotations

from .rewards import token_rewards
from .statistics import compared, whitened
from .trajectories import PerToken, Trajectory, members, spread


def rewards_to_go(trajectories: list[Trajectory], gamma: float) -> PerToken:
    """``G_t = Σ_{k≥t} γ^{k-t} r_k``, where t and k count trained tokens: observations cost no discount."""
    result = {}
    for trajectory in trajectories:
        rewards = token_rewards(trajectory)
        for t, token in enumerate(trajectory.tokens):
            result[token.place] = sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))
    return result


def advantages(trajectories: list[Trajectory], *, gamma: float = 1.0) -> PerToken:
    """Rewards to go, whitened over the batch."""
    return whitened(rewards_to_go(trajectories, gamma))


def group_advantages(trajectories: list[Trajectory]) -> PerToken:
    """REINFORCE++-baseline: returns less their group's mean, whitened over all tokens of the batch."""
    values = []
    for trajectory in trajectories:
        sample = [other.outcome for other in members(trajectories, trajectory.group)]
        values.append(compared(trajectory.outcome, sample, std=False))
    return whitened(spread(trajectories, values))
