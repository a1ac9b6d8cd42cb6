"""REINFORCE++ (2501.03262): rewards-to-go, whitened over the batch, without a critic.

Details that matter:

- the running return is carried through observations (verl's pull request 7300); where it is reset at each of them, no
  action before the last observation earns anything;
- the clip is PPO's, and the paper's KL term is part of the reward (``kl_reward_coef``).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..recipe import register
from ..slots import Slots, use
from .common import Clipped


@register("reinforce_pp")
class ReinforcePlusPlus(Clipped):
    """One scale for the advantages of all tasks; a group may be of one unless it is the baseline."""

    summary: ClassVar = "rewards-to-go whitened over the batch, with PPO's clipped loss and no critic"
    equations: ClassVar = (
        "A_t = G_t = r_t + gamma G_t+1 over the trained tokens of a trajectory",
        "baseline group: A_i = R_i - mean_group R, the same for all action tokens of trajectory i",
        "A <- (A - mean A) / std A over the trained tokens of the batch",
        "l_t = max(-A ρ, -A clip(ρ, 1 - low, 1 + high)), at most -A dual where A < 0, ρ = exp(logp - old_logp)",
        "loss = agg(l) + kl_coef agg(KL(policy || reference))",
    )
    sources: ClassVar = (
        "REINFORCE++, arXiv 2501.03262",
        "verl core_algos (REINFORCE++-baseline; returns carried through observations, pull request 7300)",
    )

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount from one trained token to the next; unused with ``baseline="group"``."""
    baseline: Literal["none", "group"] = "none"
    """``group``: every token of a trajectory gets its return minus the group's mean (REINFORCE++-baseline)."""
    kl_reward_coef: float = Field(0.0, ge=0)
    """Weight of a KL penalty in each token's reward; 0 needs no reference model."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        filled = self.with_loss(slots, self.ppo_clip()).extend(shapes=(use("shape", "whiten"),))
        if self.baseline == "group":
            group = use("baseline", "group", std=False)
            filled = filled.extend(credit=use("credit", "broadcast"), baseline=group)
        else:
            credit = use("credit", "reward_to_go", gamma=self.gamma)
            filled = filled.extend(credit=credit, baseline=use("baseline", "none"))
        if self.kl_reward_coef:
            filled = filled.extend(rewards=(use("reward", "kl_penalty", coefficient=self.kl_reward_coef),))
        return filled
