"""Slot 3, credit: how a trajectory's outcome reaches its tokens.

- ``broadcast``: every trained token gets the whole trajectory's advantage.
- ``turns``: on top of that, a turn's tokens get how the rewards from this turn on compare with other turns'.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...errors import UsageError
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


@register("credit", "turns")
def turns(
    batch: Minibatch,
    returns: Tensor,
    baseline: Baseline,
    *,
    weight: float = 1.0,
    gamma: float = 0.5,
    unit: Literal["trajectories", "turns"] = "trajectories",
) -> Tensor:
    """Add to the trajectory's advantage, times ``weight``, that of each turn.

    A turn's value is ``Σ_k γ^k r_{t+k}``, the discounted rewards of its trajectory from turn ``t`` on, and is compared
    with those of all turns of all trajectories of the group. What a single command has cost or gained is then held
    against that command, which the trajectory's sum cannot do. GiGPO (2505.10978) has the same two levels, and compares
    a turn with those that began with the same observation.

    Raises:
        UsageError: the batch does not say what each turn paid.
    """
    if batch.turn_rewards is None:
        raise UsageError("credit by turns needs turn_rewards; build the batch with Minibatch.from_trees")
    cells = turn_cells(batch.mask, batch.trajectory, batch.turn)
    names, index = batch.trajectory.unique(return_inverse=True)
    row = torch.zeros_like(names).scatter_(0, index, torch.arange(len(index), device=index.device))
    ahead = batch.turn_rewards[row].double()
    for turn in reversed(range(ahead.shape[1] - 1)):
        ahead[:, turn] += gamma * ahead[:, turn + 1]
    number = torch.zeros_like(cells.tokens).scatter_(0, cells.index[batch.mask], batch.turn[batch.mask])
    values = ahead[cells.trajectory, number]
    compared = baseline(values, batch.group[row][cells.trajectory], torch.ones_like(number))
    return broadcast(batch, returns, baseline, unit=unit) + weight * compared[cells.index]
