"""GiGPO: a second advantage, among the turns of a group that began with the same observation (2505.10978).

It differs from verl-agent's code in three details:

- a fine for an invalid command is part of the turn's reward, and so of the values of the turns before it; verl-agent
  subtracts it after the discounting;
- similar observations are clustered in alphabetical order, so that the order of rows does not matter;
- a trajectory counts once in the episode's statistics, as in the paper; ``group_stats="turns"`` and the presets count
  rows, as the code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..recipe import Method, register
from ..slots import Slots, use

_VERL_AGENT = {"group_stats": "turns", "kl_coef": 0.01}
_OWN_CREDIT = ("ppo", "reinforce_pp")


@register("gigpo")
class GiGPO(Method):
    """Adds ``ω A^S`` to the advantages of its base."""

    summary: ClassVar = "a step-level advantage among turns that began with the same observation"
    equations: ClassVar = (
        "A = A^E + ω A^S, A^E the base's advantage of the trajectory",
        "R_t = sum_{k>=t} γ^(k-t) r_k over the turns of the trajectory",
        "A^S_t = (R_t - mean R) / (std R + 1e-6) over the group's turns with the same observation; 0 for a single one",
    )
    sources: ClassVar = ("GiGPO, arXiv 2505.10978", "langfengQ/verl-agent, gigpo/core_gigpo.py (official)")
    base: ClassVar = "grpo"
    presets: ClassVar = {
        "alfworld": _VERL_AGENT | {"normalize_std": True},
        "webshop": _VERL_AGENT | {"normalize_std": False},
    }

    step_weight: float = Field(1.0, ge=0)
    """ω, weight of the step's advantage; 0 is the base."""
    step_gamma: float = Field(0.95, ge=0, le=1)
    """γ, discount of the rewards of later turns in a step's value."""
    similarity: float | None = Field(None, gt=0, le=1)
    """Observations that resemble each other this much count as the same; None asks for equal texts."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        credit: Any = slots.credit
        # What the base counts once in a group's statistics; other credits than these two know no such unit.
        unit = credit.options["unit"] if credit.name in ("broadcast", "turns") else "trajectories"
        options = {"weight": self.step_weight, "gamma": self.step_gamma, "similarity": self.similarity}
        return slots.extend(credit=use("credit", "anchors", unit=unit, **options))

    def objection(self, others: Mapping[str, Method]) -> str | None:
        for name, method in others.items():
            if name in _OWN_CREDIT:
                return f"{name} has a credit of its own, which gigpo would replace"
            turn_credit = getattr(method, "turn_credit", 0.0)
            if turn_credit > 0:
                return f"gigpo and turn_credit={turn_credit} of {name} each give turns an advantage of their own"
        return None
