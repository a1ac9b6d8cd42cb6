"""Statistics of a batch, taken over trained tokens only and never per micro-batch.

- ``masked_sum``, ``masked_mean``, ``masked_var``, ``masked_whiten``: safe against anything at masked
  positions.
- ``turn_cells``, ``Cells``: the (trajectory, turn) cells that per-turn statistics reduce over.
- ``cell_mean``: mean over the tokens of each cell.
- ``trajectory_rows``: the trajectory of each row, and a row of each trajectory.
- ``informative_groups``: groups with something to compare.
- ``turn_entropy``: sum and number of token entropies at each turn index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Minibatch


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum where ``mask``; NaN and infinity elsewhere do not matter."""
    return torch.where(mask.bool(), x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean where ``mask``; 0 when nothing is."""
    return masked_sum(x, mask) / (mask.sum() + 1e-8)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance where ``mask``; needs two positions."""
    count = mask.sum()
    spread = masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return spread * count / (count - 1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance, and with ``shift_mean`` to zero mean; both are statistics of ``mask``."""
    mean, variance = masked_mean(x, mask), masked_var(x, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


@dataclass(frozen=True)
class Cells:
    """The cells of a mask: every turn of every trajectory that has a token in it, by trajectory and then turn."""

    index: Tensor
    """``[B, L]`` cell of each token; 0 where the mask is off, so that it can be used to gather."""
    tokens: Tensor
    """``[C]`` tokens in the cell."""
    trajectory: Tensor
    """``[C]`` trajectory of the cell, numbered from 0 in the order of their ids."""
    turns: Tensor
    """``[J]`` cells of each trajectory; 0 for one without tokens."""
    turn: Tensor
    """``[C]`` turn of the cell; rises within a trajectory."""


def turn_cells(mask: Tensor, trajectory: Tensor, turn: Tensor) -> Cells:
    """Number the (trajectory, turn) pairs of ``mask`` ``[B, L]``; rows of one trajectory share its cells."""
    names, dense = trajectory.unique(return_inverse=True)
    keys = torch.stack((dense[:, None].expand_as(mask)[mask], turn[mask]), dim=1)
    cells, inverse, tokens = keys.unique(dim=0, return_inverse=True, return_counts=True)
    index = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    index[mask] = inverse
    owner = cells[:, 0]
    return Cells(index, tokens, owner, torch.bincount(owner, minlength=len(names)), cells[:, 1])


def cell_mean(x: Tensor, mask: Tensor, cells: Cells) -> Tensor:
    """``[C]`` float64: mean of ``x`` ``[B, L]`` over the tokens of each of the cells of ``mask``."""
    sums = torch.zeros(len(cells.tokens), dtype=torch.float64, device=mask.device)
    return sums.index_add(0, cells.index[mask], x[mask].double()) / cells.tokens


def trajectory_rows(batch: Minibatch) -> tuple[Tensor, Tensor]:
    """``[B]`` number of each row's trajectory, as in ``Cells``, and ``[J]`` one of the rows of each trajectory."""
    names, index = batch.trajectory.unique(return_inverse=True)
    return index, torch.zeros_like(names).scatter_(0, index, torch.arange(len(index), device=index.device))


def informative_groups(batch: Minibatch, returns: Tensor) -> tuple[Tensor, Tensor]:
    """``[G]`` bool: groups whose ``returns`` ``[B]`` differ by more than rounding; ``[B]`` group of each row."""
    names, index = batch.group.unique(return_inverse=True)
    zeros = returns.new_zeros(len(names))
    low, high = (zeros.scatter_reduce(0, index, returns, kind, include_self=False) for kind in ("amin", "amax"))
    return high - low > 1e-9 * torch.maximum(low.abs(), high.abs()).clamp(min=1), index


def turn_entropy(batch: Minibatch, per_turn: bool = True) -> tuple[Tensor, Tensor]:
    """Sum ``[K]`` and number ``[K]`` of old-policy token entropies at each turn index, float64.

    With ``per_turn`` off every token counts as turn 0, so that the quotient is the batch's mean entropy.
    """
    entropy = batch.old_entropy[batch.mask].double().cpu()
    turn = batch.turn[batch.mask].cpu() if per_turn else torch.zeros(len(entropy), dtype=torch.int64)
    return torch.bincount(turn, entropy), torch.bincount(turn).double()
