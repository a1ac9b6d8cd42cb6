"""RLOO: REINFORCE with the mean of a task's other episodes as baseline (2402.14740).

Where released code differs from the paper:

- verl and verl-agent put the advantage under PPO's clip, which is the default here; the paper has no clip.
- verl-agent takes the mean over all turns of a group's episodes; here, as in the paper, an episode counts once.
- verl gives the only episode of a group its own return as advantage; here it has nothing to compare with and gets 0.
- The paper's β of the KL term differs from task to task; the preset's 0.05 is TRL's default.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..recipe import register
from ..slots import Slots, use
from .common import Clipped


@register("rloo")
class RLOO(Clipped):
    """Leave-one-out advantages, with or without PPO's clip."""

    summary: ClassVar = "REINFORCE with a leave-one-out baseline"
    equations: ClassVar = (
        "A_i = R_i - mean_{j != i} R_j over the group, the same for all action tokens of trajectory i",
        "R_i = return_i - kl_reward_coef sum_t (old_logp_t - ref_logp_t)",
        "clip none: l_t = -A r; clip ppo: l_t = max(-A r, -A clip(r, 1 - low, 1 + high)), at most -A dual where A < 0",
    )
    sources: ClassVar = ("Back to Basics, arXiv 2402.14740", "verl core_algos (with PPO's clip)")
    presets: ClassVar = {"paper": {"clip": "none", "kl_reward_coef": 0.05, "aggregation": "seq-mean-token-sum"}}

    clip: Literal["ppo", "none"] = "ppo"
    """``none`` leaves the ratio unbounded; on policy the gradient is the same."""
    kl_reward_coef: float = Field(0.0, ge=0)
    """Weight of the KL penalty in the return; 0 needs no reference model."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        filled = slots.extend(credit=use("credit", "broadcast"), baseline=use("baseline", "leave_one_out"))
        if self.kl_reward_coef:
            filled = filled.extend(rewards=(use("reward", "kl_penalty", coefficient=self.kl_reward_coef),))
        return self.with_loss(filled, self.ppo_clip() if self.clip == "ppo" else use("clip", "none"))
