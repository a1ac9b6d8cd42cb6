"""PPO with a critic (1707.06347), over the trained tokens of a trajectory.

Details that matter:

- an observation between two actions costs no discount, and the token before it sees the value of the token after it;
- the critic's targets are taken before advantages are whitened;
- ``verl-agent`` gives every turn the whole return, and its critic learns that from each turn's prompt alone.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..recipe import register
from ..slots import Slots, use
from .common import Clipped


@register("ppo")
class PPO(Clipped):
    """Advantages from a critic; episodes are not compared with each other, so a group may be of one."""

    summary: ClassVar = "a critic's generalised advantages with PPO's clipped loss"
    equations: ClassVar = (
        "A_t = d_t + gamma lam A_t+1, d_t = r_t + gamma V_t+1 - V_t, over the trained tokens of a trajectory",
        "R_t = A_t + V_t; then A <- (A - mean A) / std A over the batch (whiten)",
        "l_t = max(-A ρ, -A clip(ρ, 1 - low, 1 + high)), at most -A dual where A < 0, ρ = exp(logp - old_logp)",
        "value loss = value_coef 1/2 agg(max((v - R)^2, (clip(v, V - value_clip, V + value_clip) - R)^2))",
        "loss = agg(l) + value loss + kl_coef agg(KL(policy || reference))",
    )
    sources: ClassVar = (
        "PPO, arXiv 1707.06347",
        "GAE, arXiv 1506.02438",
        "verl core_algos (skipped observations, pull request 2337; value loss)",
        "verl-agent (advantages inside each turn, preset)",
    )
    presets: ClassVar = {"verl-agent": {"gae_unit": "rows", "kl_coef": 0.01}}

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount from one trained token to the next."""
    lam: float = Field(1.0, ge=0, le=1)
    """λ: how far advantages look past the critic; 1 is the return minus the value."""
    gae_unit: Literal["trajectories", "rows"] = "trajectories"
    """Where advantages end. ``rows``: at the end of each row, whose last trained token is paid the whole return."""
    whiten: bool = True
    """Scale the batch's advantages to zero mean and unit variance."""
    value_coef: float = Field(1.0, gt=0)
    """Weight of the value loss."""
    value_clip: float | None = Field(0.5, gt=0)
    """A value that has moved further than this towards its target, from the one before the update, moves no further;
    None for no limit."""
    kl_reward_coef: float = Field(0.0, ge=0)
    """Weight of a KL penalty in each token's reward; 0 needs no reference model."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        credit = use("credit", "gae", gamma=self.gamma, lam=self.lam, unit=self.gae_unit)
        value = use("regulariser", "value", coefficient=self.value_coef, clip=self.value_clip, agg=self.aggregation)
        filled = self.with_loss(slots, self.ppo_clip())
        filled = filled.extend(credit=credit, baseline=use("baseline", "none"), regularisers=(value,))
        if self.whiten:
            filled = filled.extend(shapes=(use("shape", "whiten"),))
        if self.kl_reward_coef:
            filled = filled.extend(rewards=(use("reward", "kl_penalty", coefficient=self.kl_reward_coef),))
        return filled
