"""Dr. GRPO: GRPO without its two biases (2503.20783).

- No division by the group's standard deviation, which favours tasks that are nearly always or nearly never solved.
- No division by a row's own length, which favours short successes and long failures.

The loss is a sum over tokens divided by rows and by a constant: in the released code (sail-sg/understand-r1-zero) the
longest response allowed, in verl the width of the batch, which is padded to that. Here batches are as wide as their
longest row, so the scale moves a little from batch to batch; a length in the slot's own table holds it still:
``slots={"aggregation": {"type": "seq-mean-token-sum-norm", "length": 3000}}``.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..recipe import register
from ..slots import Slots
from ..slots.aggregation import Mode
from .common import Clipped, GroupRelative


@register("dr_grpo")
class DrGRPO(Clipped, GroupRelative):
    """GRPO with other defaults."""

    summary: ClassVar = "GRPO without division by a group's spread or a row's length"
    equations: ClassVar = (
        "A_i = R_i - mean_group R, the same for all action tokens of trajectory i",
        "l_t = max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(logp - old_logp)",
        "loss = sum(l) / (rows * length), length a constant",
    )
    sources: ClassVar = (
        "Understanding R1-Zero-Like Training, arXiv 2503.20783",
        "sail-sg/understand-r1-zero at dfca49d (official)",
    )

    aggregation: Mode = "seq-mean-token-sum-norm"
    dual_clip: float | None = Field(None, gt=1)
    normalize_std: bool = False

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        return self.with_loss(self.with_groups(slots), self.ppo_clip())
