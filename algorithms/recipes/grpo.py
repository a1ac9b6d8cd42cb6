"""GRPO: compare the episodes of one task with each other (2402.03300)."""

from __future__ import annotations

from typing import ClassVar

from ..recipe import register
from ..slots import Slots
from .common import Clipped, GroupRelative


@register("grpo")
class GRPO(Clipped, GroupRelative):
    """Group-relative advantages under PPO's clipped loss; what most other methods here stand on."""

    summary: ClassVar = "group-relative advantages with PPO's clipped loss"
    equations: ClassVar = (
        "A_i = (R_i - mean_group R) / (std_group R + 1e-6), the same for all action tokens of trajectory i",
        "turn_credit w: A_i + w (G_it - mean_group G) / (std_group G + 1e-6), G_it = sum_k turn_gamma^k r_i,t+k",
        "l_t = max(-A r, -A clip(r, 1 - low, 1 + high)), at most -A dual where A < 0, r = exp(logp - old_logp)",
        "loss = agg(l) + kl_coef agg(KL(policy || reference))",
    )
    sources: ClassVar = ("DeepSeekMath, arXiv 2402.03300", "verl core_algos (aggregation modes, dual clip)")
    presets: ClassVar = {
        "paper": {"aggregation": "seq-mean-token-mean", "dual_clip": None, "kl_coef": 0.04},
        "verl-agent": {"group_stats": "turns", "kl_coef": 0.01},
    }

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        return self.with_loss(self.with_groups(slots), self.ppo_clip())
