"""Options that several methods share.

- ``PolicyLoss``: aggregation and the KL term. ``Clipped``: PPO's clip on top.
- ``GroupRelative``: how the episodes of one task are compared.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..recipe import Method
from ..slots import Slots, use
from ..slots.aggregation import Mode
from ..slots.regulariser import Estimator


class PolicyLoss(Method):
    """From the losses of tokens to one number, and the distance to a reference model."""

    aggregation: Mode = "token-mean"
    """How the losses of tokens become one number."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL term in the loss; 0 needs no reference model."""
    kl_estimator: Estimator = "k3"
    """``k3+`` and ``k1+`` have the gradient of k2."""

    def with_loss(self, slots: Slots, clip: Any) -> Slots:
        """``slots`` with this clip, the aggregation and the KL term."""
        filled = slots.extend(clip=clip, aggregation=use("aggregation", self.aggregation))
        if not self.kl_coef:
            return filled
        options = {"coefficient": self.kl_coef, "estimator": self.kl_estimator, "agg": self.aggregation}
        return filled.extend(regularisers=(use("regulariser", "kl", **options),))


class Clipped(PolicyLoss):
    """PPO's clipped surrogate."""

    clip_low: float = Field(0.2, ge=0, le=1)
    """How far below 1 a ratio still has a gradient where the advantage is negative."""
    clip_high: float = Field(0.2, ge=0)
    """The same above 1, where it is positive."""
    dual_clip: float | None = Field(3.0, gt=1)
    """Bound on the ratio where the advantage is negative; None for none."""

    def ppo_clip(self) -> Any:
        return use("clip", "ppo", low=self.clip_low, high=self.clip_high, dual=self.dual_clip)


class GroupRelative(Method):
    """Advantages that compare the episodes of one task with each other."""

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

    def with_groups(self, slots: Slots) -> Slots:
        """``slots`` with this credit and baseline."""
        credit = use("credit", "broadcast", unit=self.group_stats)
        if self.turn_credit:
            credit = use("credit", "turns", weight=self.turn_credit, gamma=self.turn_gamma, unit=self.group_stats)
        return slots.extend(credit=credit, baseline=use("baseline", "group", std=self.normalize_std))
