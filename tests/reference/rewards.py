"""What tokens are paid."""

from __future__ import annotations

from copy import deepcopy

from .trajectories import Trajectory


def token_rewards(trajectory: Trajectory) -> list[float]:
    """What each token is paid; the last one gets what of the return no token was paid."""
    rewards = [token.reward for token in trajectory.tokens]
    if rewards:
        rewards[-1] += trajectory.outcome - sum(rewards)
    return rewards


def with_kl_penalty(trajectories: list[Trajectory], coefficient: float) -> list[Trajectory]:
    """The same episodes, whose tokens are also paid ``-coefficient (old_logp - ref_logp)`` (k1), which their returns
    include."""
    paid = deepcopy(trajectories)
    for trajectory in paid:
        for token in trajectory.tokens:
            extra = -coefficient * (token.old_logp - token.ref_logp)
            token.reward += extra
            trajectory.outcome += extra
    return paid
