"""EMPG: advantages of steps, scaled down where the policy was uncertain (2509.09265).

There is no official code; the defaults are those that a port found by search (ARLArena). What the text leaves open is
an option: ``last_bonus``, ``bonus_gate`` and ``minmax``, each with the port's choice as default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ..recipe import Method, register
from ..slots import Slots, use


@register("empg")
class EMPG(Method):
    """Reshapes the advantages of its base, step by step."""

    summary: ClassVar = "advantages that shrink with a step's entropy, and a bonus for steps that lead to certainty"
    equations: ClassVar = (
        "H_t = mean old-policy entropy of step t's tokens, scaled to [0, 1] over the batch's steps",
        "g_t = exp(-k H_t) / mean exp(-k H) over the batch's steps, f_t = exp(-k' H_t)",
        "A_t <- A_t g_t + ζ f_{t+1}, less its mean over the batch's steps",
    )
    sources: ClassVar = ("EMPG, arXiv 2509.09265, Eq. 7, 8 and 10-12", "WillDreamer/ARLArena at dc1da9f (port)")
    base: ClassVar = "grpo"

    k: float = Field(1.0, ge=0)
    """How much less an uncertain step learns: the most certain step learns ``e^k`` times as much as the least."""
    k_future: float = Field(1.0, ge=0)
    """k', how fast the bonus falls with the entropy of the next step."""
    zeta: float = Field(0.05, ge=0)
    """ζ, weight of the bonus."""
    last_bonus: Literal["zero", "mean", "drop"] = "zero"
    """Bonus of a step without a next one: none, so that centring lowers last steps; the mean of the others; or none and
    no part in the centring."""
    bonus_gate: Literal["none", "success"] = "none"
    """``success``: a bonus only for trajectories that earned more than the mean of their group."""
    minmax: Literal["exact", "percentile"] = "exact"
    """What entropies are scaled by: least and greatest of the batch, or 1st and 99th percentile."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        return slots.extend(shapes=(use("shape", "entropy_modulation", **self.model_dump()),))

    def objection(self, others: Mapping[str, Method]) -> str | None:
        boost = getattr(others.get("aepo"), "entropy_advantage", 0)
        if boost > 0:
            return f"empg damps uncertain steps and entropy_advantage={boost} of aepo boosts them"
        return None
