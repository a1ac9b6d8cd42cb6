"""GRPO: compare the episodes of one task with each other (2402.03300)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ..recipe import Method, register
from ..slots import Slots, use
from ..slots.aggregation import Mode
from ..slots.regulariser import Estimator


@register("grpo")
class GRPO(Method):
    """Group-relative advantages under PPO's clipped loss; the base of every other method here."""

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

    group_stats: Literal["trajectories", "turns"] = "trajectories"
    """What counts once in a group's statistics; ``turns`` reproduces verl-agent, where long episodes weigh
    more."""
    turn_credit: float = Field(0.0, ge=0)
    """Weight of a second advantage, which compares each turn's discounted rewards with those of the group's other
    turns; 0 is GRPO. For worlds that pay or fine single turns."""
    turn_gamma: float = Field(0.5, ge=0, le=1)
    """Discount of a turn's rewards in ``turn_credit``."""
    normalize_std: bool = True
    """Divide by the group's standard deviation; off, it is Dr. GRPO's advantage."""
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    dual_clip: float | None = Field(3.0, gt=1)
    """Bound on the ratio where the advantage is negative; None for none."""
    aggregation: Mode = "token-mean"
    kl_coef: float = Field(0.0, ge=0)
    """0 needs no reference model."""
    kl_estimator: Estimator = "k3"

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        credit = use("credit", "broadcast", unit=self.group_stats)
        if self.turn_credit:
            credit = use("credit", "turns", weight=self.turn_credit, gamma=self.turn_gamma, unit=self.group_stats)
        parts: dict[str, Any] = {
            "credit": credit,
            "baseline": use("baseline", "group", std=self.normalize_std),
            "clip": use("clip", "ppo", low=self.clip_low, high=self.clip_high, dual=self.dual_clip),
            "aggregation": use("aggregation", self.aggregation),
        }
        if self.kl_coef:
            kl = use(
                "regulariser",
                "kl",
                coefficient=self.kl_coef,
                estimator=self.kl_estimator,
                agg=self.aggregation,
            )
            parts["regularisers"] = (kl,)
        return slots.extend(**parts)
