"""DAPO: GRPO with four changes for long reasoning (2503.14476).

- A higher upper clip, so that unlikely tokens can grow.
- Dynamic sampling: groups whose episodes all got the same return are replaced by new ones.
- Every token counts the same, whatever the length of its row.
- A soft fine for episodes that nearly reach their limit of tokens; off until ``overlong_length`` says where that is.

Where released code differs from the paper:

- When ``max_batches`` rounds of rollouts have not filled a step, the official code (verl's recipe) stops with an error.
  verl-agent keeps every group of the last round, and so the trainer here fills the step up with groups of equal
  returns. They have no policy gradient, and stay out of the loss's denominator.
- The official code keeps groups of one; here they count as groups of equal returns.
- The official script has a dual clip at 10 and verl's default is 3; the paper has none.
- verl-agent adds a KL term of 0.01 and takes group statistics over turns.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..recipe import register
from ..slots import Slots, use
from .common import Clipped, GroupRelative


@register("dapo")
class DAPO(Clipped, GroupRelative):
    """GRPO with a higher clip, filtered groups and a fine for overlong episodes."""

    summary: ClassVar = (
        "GRPO with a higher upper clip, dynamic sampling, token-level loss and a fine for overlong episodes"
    )
    equations: ClassVar = (
        "A_i = (R_i - mean_group R) / (std_group R + 1e-6), for groups whose returns are not all equal",
        "R_i = return_i - overlong_factor clip(1 - (overlong_length - tokens_i) / overlong_buffer, 0, 1)",
        "l_t = max(-A r, -A clip(r, 1 - low, 1 + high)), at most -A dual where A < 0, r = exp(logp - old_logp)",
        "loss = mean of l over all action tokens",
    )
    sources: ClassVar = ("DAPO, arXiv 2503.14476, Eq. 8-13", "verl recipe/dapo (official)", "verl-agent (filter)")
    presets: ClassVar = {
        "paper": {"dual_clip": None, "overlong_length": 20480, "overlong_buffer": 4096},
        "verl-agent": {"group_stats": "turns", "kl_coef": 0.01},
    }

    clip_high: float = Field(0.28, ge=0)
    filter_groups: bool = True
    """Replace groups whose episodes all got the same return."""
    max_batches: int = Field(10, ge=1)
    """Rounds of rollouts that may be made until a step has all the groups it asks for."""
    overlong_length: int | None = Field(None, ge=1)
    """Action tokens of an episode at which the fine is whole; None for no fine."""
    overlong_buffer: int = Field(4096, ge=1)
    """Tokens before ``overlong_length`` at which the fine begins; at most that length."""
    overlong_factor: float = Field(1.0, ge=0)
    """The whole fine."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        filled = self.with_loss(self.with_groups(slots), self.ppo_clip())
        if self.filter_groups:
            filled = filled.extend(samplers=(use("sampler", "group_filter", max_batches=self.max_batches),))
        if self.overlong_length is not None:
            fine = use(
                "reward",
                "overlong",
                length=self.overlong_length,
                buffer=self.overlong_buffer,
                factor=self.overlong_factor,
            )
            filled = filled.extend(rewards=(fine,))
        return filled
