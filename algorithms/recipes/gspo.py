"""GSPO: GRPO whose ratio and clip are those of a whole sequence (2507.18071).

Where released code differs from the paper:

- verl gives each token the sequence's ratio as value and its own log-probability as gradient (the paper's GSPO-token).
  The gradient is the paper's as long as a row's tokens share their advantage; with ``turn_credit`` they do not.
- verl bounds the ratio at e^10, and has no dual clip: its scripts' ``clip_ratio_c`` is not read.
- verl always takes ``seq-mean-token-mean``; here that is the default of ``aggregation``.

A sequence is a row: a whole trajectory, or in ``window`` context one turn, as in verl-agent. Clip ranges are far
narrower than PPO's because the ratio is a mean. The defaults are those of the paper's long answers; ARLArena trained
agents with short turns at ten to a hundred times as much.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..recipe import register
from ..slots import Slots, use
from ..slots.aggregation import Mode
from .common import GroupRelative, PolicyLoss


@register("gspo")
class GSPO(PolicyLoss, GroupRelative):
    """Group-relative advantages under a clip of the sequence's ratio."""

    summary: ClassVar = "group-relative advantages with a clip of the whole sequence's ratio"
    equations: ClassVar = (
        "A_i = (R_i - mean_group R) / (std_group R + 1e-6)",
        "s_i = exp(mean_t (logp_t - old_logp_t)) over the row's action tokens",
        "l_t = max(-A s, -A clip(s, 1 - low, 1 + high)), with the gradient of s going to logp_t alone",
        "loss = mean over rows of the mean of l over their action tokens",
    )
    sources: ClassVar = ("GSPO, arXiv 2507.18071, Eq. 5-7, 13 and 14", "verl core_algos (compute_policy_loss_gspo)")

    aggregation: Mode = "seq-mean-token-mean"
    clip_low: float = Field(3e-4, ge=0, le=1)
    clip_high: float = Field(4e-4, ge=0)

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        clip = use("clip", "sequence", low=self.clip_low, high=self.clip_high)
        return self.with_loss(self.with_groups(slots), clip)
