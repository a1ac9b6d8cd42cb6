"""Slot 5, shapes: what is done to advantages before they meet a loss; an ordered list.

- ``whiten``: zero mean and unit variance over the batch.
- ``shared_prefix_mean``: ARPO's hard credit, for tokens that several trajectories share.
- ``entropy_modulation``: EMPG; uncertain steps learn less, and steps that lead to certainty are paid.
- ``entropy_factor``: AEPO; uncertain tokens learn more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...errors import UsageError
from ..batch import Minibatch
from ..signals import Cells, cell_mean, masked_whiten, trajectory_rows, turn_cells
from .baseline import group as group_baseline
from .registry import register


@register("shape", "whiten")
def whiten(batch: Minibatch, advantages: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale the advantages of all trained tokens of the batch to unit variance, and by default to zero mean.

    Fewer than two trained tokens have no variance and stay as they are.
    """
    if batch.mask.sum() < 2:
        return advantages
    return torch.where(batch.mask, masked_whiten(torch.where(batch.mask, advantages, 0), batch.mask, shift_mean), 0)


@register("shape", "shared_prefix_mean")
def shared_prefix_mean(batch: Minibatch, advantages: Tensor) -> Tensor:
    """Give a token the mean of its advantages in the trajectories that contain it: ``(1/d) Σ Â_i`` (ARPO, 2507.19849).

    Two rows hold the same token when both hold its tree node; a trajectory counts once, however many of its rows do.
    Tokens of one trajectory alone, and all of them when the batch has no ``node``, keep their advantage.
    """
    if batch.node is None:
        return advantages
    width = batch.mask.shape[1]
    node = torch.where(batch.mask, batch.node, -1)
    position = torch.arange(width, device=node.device).expand(node.shape)
    begins = torch.ones_like(batch.mask)
    begins[:, 1:] = node[:, 1:] != node[:, :-1]
    offset = position - torch.where(begins, position, 0).cummax(1).values
    here = node >= 0
    owner, rows = trajectory_rows(batch)
    # One number per token of the tree and trajectory, and from these, one per token of the tree.
    copy = (node * width + offset) * len(rows) + owner[:, None]
    copies, which, repeats = copy[here].unique(return_inverse=True, return_counts=True)
    own = torch.zeros(len(copies), dtype=torch.float64, device=node.device)
    own = own.index_add(0, which, advantages[here].double()) / repeats
    _, token, holders = copies.div(len(rows), rounding_mode="floor").unique(return_inverse=True, return_counts=True)
    shared = torch.zeros(len(holders), dtype=torch.float64, device=node.device).index_add(0, token, own) / holders
    merged = torch.where(batch.mask, advantages, 0).double()
    merged[here] = shared[token[which]]
    return merged


@register("shape", "entropy_modulation")
def entropy_modulation(
    batch: Minibatch,
    advantages: Tensor,
    *,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.05,
    last_bonus: Literal["zero", "mean", "drop"] = "zero",
    bonus_gate: Literal["none", "success"] = "none",
    minmax: Literal["exact", "percentile"] = "exact",
) -> Tensor:
    """``A · g(H_t) + ζ · f(H_{t+1})``, less its mean over the batch's steps (EMPG, 2509.09265, Eq. 7, 8 and 10 to 12).

    A step is a turn of a trajectory, and ``H_t`` in ``[0, 1]`` the mean of its tokens' ``old_entropy``, scaled by the
    least and the greatest of the batch. ``g = exp(-k H_t)`` over its mean, ``f = exp(-k_future H_{t+1})``. Statistics
    count every step once, however long it is; where advantages differ inside a step, each token keeps its own and the
    step's mean is what is centred.

    Args:
        last_bonus: f of a step without a next one, which the paper leaves open. ``zero``, so that the centring lowers
            last steps by the mean bonus; ``mean`` of the others, which takes that away; ``drop`` leaves them with
            ``A · g`` and out of the centring, whose mean is then one over steps that have a next one.
        bonus_gate: ``success`` gives the bonus only to trajectories that earned more than the mean of their group (than
            0, alone in it), so that a group of equal returns is not drawn to certainty without a reason.
        minmax: ``percentile`` scales by the 1st and 99th percentile of the steps, and cuts off what is beyond.
    """
    cells = turn_cells(batch.mask, batch.trajectory, batch.turn)
    if not len(cells.tokens):
        return advantages
    entropy = _unit_range(cell_mean(batch.old_entropy, batch.mask, cells), minmax)
    certainty = torch.exp(-k * entropy)
    scale = certainty / certainty.mean()
    follows = torch.zeros_like(cells.turn, dtype=torch.bool)
    # Cells come in order, so that the next turn of a trajectory, if there is one, is the next cell.
    follows[:-1] = (cells.trajectory[1:] == cells.trajectory[:-1]) & (cells.turn[1:] == cells.turn[:-1] + 1)
    paid = _succeeds(batch, cells) if bonus_gate == "success" else torch.ones_like(follows)
    bonus = torch.where(follows & paid, torch.exp(-k_future * entropy.roll(-1)), 0)
    if last_bonus == "mean":
        bonus = torch.where(~follows & paid, bonus.sum() / (follows & paid).sum().clamp(min=1), bonus)
    shaped = torch.where(batch.mask, advantages, 0) * scale[cells.index] + zeta * bonus[cells.index]
    centred = follows if last_bonus == "drop" else torch.ones_like(follows)
    mean = torch.where(centred, cell_mean(shaped, batch.mask, cells), 0).sum() / centred.sum().clamp(min=1)
    return torch.where(batch.mask, shaped - mean * centred[cells.index], 0)


@register("shape", "entropy_factor")
def entropy_factor(
    batch: Minibatch, advantages: Tensor, *, weight: float = 0.2, clamp: Sequence[float] | None = None
) -> Tensor:
    """``A · (1 + weight · (H - μ) / σ)``: tokens sampled with more entropy learn more (AEPO, 2510.14545).

    ``H`` is ``old_entropy``; μ and σ (unbiased) are those of all trained tokens of the batch, so that the factor's mean
    is 1. It is 1 everywhere when there is one token, or one entropy. ``clamp`` holds the factor between two numbers;
    without it, a token ``1 / weight`` deviations below the mean learns the opposite.

    Raises:
        UsageError: ``clamp`` is not a lower and an upper bound.
    """
    if clamp is not None and (len(clamp) != 2 or clamp[0] > clamp[1]):
        raise UsageError(f"clamp is {list(clamp)}; expected a lower and an upper bound, such as [0, 2]")
    entropy = batch.old_entropy[batch.mask].double()
    if len(entropy) < 2:
        return advantages
    # Relative to the least, so that equal entropies leave no rounding behind.
    entropy = entropy - entropy.min()
    spread = entropy.std()
    factor = 1 + weight * torch.where(spread > 0, (entropy - entropy.mean()) / spread, 0)
    if clamp is not None:
        factor = factor.clamp(*clamp)
    shaped = torch.zeros_like(batch.mask, dtype=torch.float64)
    shaped[batch.mask] = advantages[batch.mask] * factor
    return shaped


def _unit_range(entropy: Tensor, minmax: Literal["exact", "percentile"]) -> Tensor:
    """``[C]`` from 0 at the least to 1 at the greatest; 0 when all are equal."""
    if minmax == "percentile":
        low, high = torch.quantile(entropy, entropy.new_tensor([0.01, 0.99]))
    else:
        low, high = entropy.aminmax()
    return ((entropy - low) / (high - low + 1e-8)).clamp(0, 1)


def _succeeds(batch: Minibatch, cells: Cells) -> Tensor:
    """``[C]`` bool: the cell's trajectory earned more than the mean of its group's trajectories."""
    _, rows = trajectory_rows(batch)
    better = group_baseline(batch.returns[rows], batch.group[rows], torch.ones_like(rows), std=False) > 0
    return better[cells.trajectory]
