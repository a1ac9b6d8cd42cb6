"""Slot 7, first half: the loss of one token.

- ``ppo``: the clipped surrogate, with an optional second clip for bad actions.
- ``none``: the surrogate without a clip.
- ``gradient_preserving``: the values of ``ppo``, with a gradient where it has clipped good actions.
- ``sequence``: one ratio for a whole row.
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


@register("clip", "none")
def none(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``-A r``: REINFORCE, with importance weights once the policy has moved."""
    return -advantages * log_ratio(logprobs, old_logprobs, mask).exp(), torch.zeros_like(mask)


@register("clip", "gradient_preserving")
def gradient_preserving(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = 3.0,
    both_sides: bool = False,
) -> tuple[Tensor, Tensor]:
    """The values of ``ppo``, where ``A > 0`` and ``r > 1 + high`` with the gradient ``-A (1 + high)`` with respect to
    the log-probability instead of none (AEPO, 2510.14545).

    With ``both_sides`` also ``-A (1 - low)`` where ``A < 0`` and ``r < 1 - low`` (GPPO, 2508.07629). Such tokens count
    as clipped: their gradient is bounded.
    """
    loss, clipped = ppo(logprobs, old_logprobs, advantages, mask, low=low, high=high, dual=dual)
    difference = log_ratio(logprobs, old_logprobs, mask)
    ratio = difference.detach().exp()
    carries = (advantages > 0) & (ratio > 1 + high)
    if both_sides:
        carries = carries | ((advantages < 0) & (ratio < 1 - low))
    # The last factor is exactly 1 and has a gradient of 1.
    carried = -advantages * ratio.clamp(1 - low, 1 + high) * (difference - difference.detach()).exp()
    return torch.where(carries, carried, loss), clipped


@register("clip", "sequence")
def sequence(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
) -> tuple[Tensor, Tensor]:
    """``max(-A s, -A clip(s, 1 - low, 1 + high))`` with the geometric mean ``s`` of a row's ratios (GSPO, 2507.18071).

    Every token of the row has the value ``s`` and the gradient ``s`` with respect to its own log-probability (the
    paper's GSPO-token), so that advantages may differ from token to token. ``s`` is at most e^10. A row is a sequence:
    a whole trajectory, or in ``window`` context one turn.
    """
    current = torch.where(mask, logprobs, 0)
    difference = current.detach() - torch.where(mask, old_logprobs, 0)
    mean = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (current - current.detach() + mean).clamp(max=10).exp()
    plain = -advantages * ratio
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - low, 1 + high))
    clipped = (loss != plain) | ((mean > 10) & (advantages != 0))
    return loss, clipped & mask
