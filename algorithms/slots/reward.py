"""Slot 2, the reward: parts of a trajectory's return.

- ``environment``: what the world paid.
- ``Overlong``: a fine for long trajectories.
- ``kl_penalty``: what each token's distance from the reference model costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError
from ..batch import Minibatch
from .registry import register


@register("reward", "environment")
def environment(batch: Minibatch) -> Tensor:
    """The return of the row's trajectory."""
    return batch.returns


@register("reward", "overlong")
@dataclass(frozen=True, kw_only=True)
class Overlong:
    """0 up to ``length - buffer`` trained tokens of a trajectory, then down in a straight line to ``-factor`` at
    ``length`` and no further (DAPO, 2503.14476, Eq. 13)."""

    length: int
    buffer: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.length:
            raise UsageError(
                f"the overlong buffer must be from 1 to the length of {self.length} tokens, not {self.buffer}; "
                "the fine begins that many tokens before the length"
            )

    def __call__(self, batch: Minibatch) -> Tensor:
        names, index = batch.trajectory.unique(return_inverse=True)
        tokens = torch.zeros_like(names).index_add(0, index, batch.mask.sum(1))[index]
        excess = (tokens - (self.length - self.buffer)).double() / self.buffer
        return -self.factor * excess.clamp(0, 1)


@register("reward", "kl_penalty")
def kl_penalty(batch: Minibatch, *, coefficient: float) -> Tensor:
    """``-coefficient (old_logprobs - ref_logprobs)`` for each trained token, whose expectation is the KL divergence
    (k1, in nats) of the policy that sampled it from the reference.

    Raises:
        UsageError: the batch has no ``ref_logprobs``.
    """
    if batch.ref_logprobs is None:
        raise UsageError(
            "kl_penalty needs ref_logprobs in the batch; set kl_reward_coef=0 to train without a reference"
        )
    return torch.where(batch.mask, -coefficient * (batch.old_logprobs - batch.ref_logprobs).double(), 0)
