"""Slot 7, first half: the loss of one token.

- ``ppo``: the clipped surrogate, with an optional second clip for bad actions.
- ``log_ratio``: of the current to the old policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``logprobs - old_logprobs`` clamped to ±20, 0 with no gradient where the mask is off."""
    difference = torch.where(mask, logprobs, 0) - torch.where(mask, old_logprobs, 0)
    return difference.clamp(-20, 20)


@register("clip", "ppo")
def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = 3.0,
) -> tuple[Tensor, Tensor]:
    """``max(-A r, -A clip(r, 1 - low, 1 + high))``; where ``A < 0`` at most ``-A dual`` (PPO, 1707.06347;
    dual clip, 1912.09729)."""
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    plain = -advantages * ratio
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)
    # The clipped loss differs from the plain one exactly where the clip took the gradient away.
    return loss, loss != plain
