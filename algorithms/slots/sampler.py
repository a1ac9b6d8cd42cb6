"""Slot 1, samplers: what is rolled out and which rows take part. Without any, every task is played independently
``group_size`` times and every row takes part.

- ``GroupFilter``: only groups with something to compare.
- ``Fork``: rollouts that fork where entropy rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...agents.branching import EntropyBranching
from ...errors import UsageError
from ..batch import Minibatch
from ..signals import informative_groups
from .registry import register


@register("sampler", "group_filter")
@dataclass(frozen=True, kw_only=True)
class GroupFilter:
    """Keep groups whose trajectories did not all get the same return, so that each has a gradient (DAPO's dynamic
    sampling, 2503.14476, Eq. 11).

    Returns are the world's, without what other rewards add. A group of one trajectory has nothing to compare and is not
    kept.
    """

    name: ClassVar[str] = "group_filter"
    branching: ClassVar[None] = None
    max_batches: int = 10
    """Rounds of rollouts that may be made until a step has all the groups it asks for."""

    def __post_init__(self) -> None:
        if self.max_batches < 1:
            raise UsageError(f"max_batches must be at least 1 round of rollouts, not {self.max_batches}")

    def keep(self, batch: Minibatch) -> Tensor:
        differ, index = informative_groups(batch, batch.returns)
        return differ[index]


@register("sampler", "fork")
@dataclass(kw_only=True)
class Fork(EntropyBranching):
    """Every group is a tree of episodes (ARPO, AEPO); every row takes part."""

    name: ClassVar[str] = "fork"
    max_batches: ClassVar[int] = 1

    @property
    def branching(self) -> EntropyBranching:
        return self

    def keep(self, batch: Minibatch) -> Tensor:
        return torch.ones(len(batch), dtype=torch.bool, device=batch.mask.device)
