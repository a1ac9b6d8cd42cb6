"""Slot 6, weights: factors on the losses of tokens, and which tokens stay in the loss. They commute.

- ``RolloutCorrection``: importance weights where the sampler's probabilities differ from the learner's.
- ``shared``: tokens that several rows share count once.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import UsageError, nearest
from ..batch import Minibatch
from .registry import register

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]


@register("weight", "rollout_correction")
@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """``w = exp(old_logprobs - rollout_logprobs)``, bounded; 1 where the batch has no ``rollout_logprobs``.

    Truncated importance sampling (TIS) is the default, masked importance sampling (MIS) is ``mode="mask"``, and IcePop
    is ``band=(low, high)``; all as in verl's rollout correction.
    """

    level: Level = "token"
    """What has one weight: a token, or a whole trajectory, whose weight is the product of its tokens' in all of its
    rows. Log-weights are clamped to ±20."""
    mode: Mode = "truncate"
    """What happens to a weight that is out of bounds. ``truncate``: it becomes ``cap``, or 0 when there is a ``band``.
    ``mask``: its tokens leave the loss and its denominator."""
    cap: float = 2.0
    """Largest weight in bounds; more than 0."""
    band: tuple[float, float] | None = None
    """Smallest and largest weight in bounds, at least 0; replaces ``cap``."""
    normalize: bool = False
    """Divide by the mean weight of the batch's kept tokens, or trajectories, after bounding."""

    def __post_init__(self) -> None:
        for name, value, choices in (("level", self.level, get_args(Level)), ("mode", self.mode, get_args(Mode))):
            if value not in choices:
                raise UsageError(f"rollout_correction has no {name} {value!r}{nearest(str(value), choices)}")
        if not (isinstance(self.cap, Real) and self.cap > 0):
            raise UsageError(f"the cap of rollout_correction must be a number above 0, not {self.cap!r}")
        if self.band is not None and not _is_band(self.band):
            raise UsageError(
                f"the band of rollout_correction must be two numbers with 0 <= low < high, such as (0.5, 2.0), "
                f"not {self.band!r}"
            )

    def __call__(self, batch: Minibatch, advantages: Tensor) -> tuple[Tensor, Tensor]:
        mask = batch.mask
        if batch.rollout_logprobs is None:
            return torch.ones(mask.shape, dtype=torch.float64, device=mask.device), mask
        logs = torch.where(mask, batch.old_logprobs - batch.rollout_logprobs, 0).double()
        names, index = batch.trajectory.unique(return_inverse=True)
        if self.level == "sequence":
            sums = logs.new_zeros(len(names)).index_add(0, index, logs.sum(1))
            logs = sums[index][:, None].expand(mask.shape)
        weight = logs.clamp(-20, 20).exp()
        low, high = (0.0, self.cap) if self.band is None else self.band
        inside = (weight >= low) & (weight <= high)
        keep = mask & inside if self.mode == "mask" else mask
        weight = weight.clamp(max=self.cap) if self.band is None else torch.where(inside, weight, 0)
        if self.normalize:
            share = keep.double()
            if self.level == "sequence":
                share = share / torch.bincount(index, keep.sum(1), len(names))[index][:, None].clamp(min=1)
            mean = (weight * share).sum() / share.sum()
            # No weight is left to scale when all are 0, or nothing is kept.
            weight = weight / mean if mean > 0 else weight
        return weight, keep


def _is_band(band: object) -> bool:
    """Whether ``band`` is two numbers ``0 <= low < high``; tables of a configuration file hold them as a list."""
    if not isinstance(band, tuple | list) or len(band) != 2 or not all(isinstance(end, Real) for end in band):
        return False
    return 0 <= band[0] < band[1]


@register("weight", "shared")
def shared(batch: Minibatch, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """``1 / d`` for a token whose node is trained on in ``d`` rows, so that branches do not count their prefix twice.

    The denominator of the loss stays as it is. 1 where the batch names no nodes.
    """
    weight = torch.ones(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
    if batch.node is None:
        return weight, batch.mask
    row = torch.arange(len(batch), device=batch.mask.device)[:, None].expand(batch.mask.shape)[batch.mask]
    nodes, index = batch.node[batch.mask].unique(return_inverse=True)
    standing = torch.stack((index, row), dim=1).unique(dim=0)[:, 0]
    weight[batch.mask] = 1 / torch.bincount(standing, minlength=len(nodes)).double()[index]
    return weight, batch.mask
