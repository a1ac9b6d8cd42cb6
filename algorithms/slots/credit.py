"""Slot 3, credit: how a trajectory's outcome reaches its tokens.

- ``broadcast``: every trained token gets the whole trajectory's advantage.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..batch import Minibatch
from ..signals import turn_cells
from .registry import register
from .signatures import Baseline


@register("credit", "broadcast")
def broadcast(
    batch: Minibatch,
    returns: Tensor,
    baseline: Baseline,
    *,
    unit: Literal["trajectories", "turns"] = "trajectories",
) -> Tensor:
    """Compare each trajectory's return with its group's and give the result to all of its tokens.

    A trajectory counts once, however many rows it has (spec of GRPO), or with ``unit="turns"`` as many times
    as it has trained turns, which is how verl-agent normalises over rows and favours long trajectories.
    """
    names, index = batch.trajectory.unique(return_inverse=True)
    row = torch.zeros_like(names).scatter_(0, index, torch.arange(len(index), device=index.device))
    count = turn_cells(batch.mask, batch.trajectory, batch.turn).turns if unit == "turns" else torch.ones_like(names)
    advantages = baseline(returns[row], batch.group[row], count)
    return advantages[index][:, None].expand(batch.mask.shape)
