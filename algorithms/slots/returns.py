"""Slot 3, credit by tokens: what a token's future is worth.

- ``gae``: generalised advantage estimation from a critic's values.
- ``reward_to_go``: the discounted rewards from a token on.

Both go from trained token to trained token of a trajectory, in order of turn and position, also where its turns are
separate rows. What stands between two of them costs no discount, and no reward is lost there: what the returns hold
beyond the rewards of tokens is paid at the last trained token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import UsageError
from ..batch import Minibatch
from .registry import register
from .signatures import Baseline


@register("credit", "gae")
def gae(
    batch: Minibatch,
    returns: Tensor,
    baseline: Baseline,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    unit: Literal["trajectories", "rows"] = "trajectories",
) -> Tensor:
    """``A_t = δ_t + γλ A_{t+1}`` with ``δ_t = r_t + γ V_{t+1} - V_t`` (1506.02438, Eq. 11-16), float64.

    The critic is the baseline; the recipe's own is not asked. ``unit="rows"`` ends at the end of each row, whose last
    trained token is paid the whole return of its trajectory; rewards of single tokens count only as part of it. That is
    verl-agent's rule, where a row is a turn. The skipping of untrained tokens is newer verl's (pull request 2337).

    Raises:
        UsageError: the batch holds no values.
    """
    if batch.values is None:
        raise UsageError(
            "credit 'gae' needs values in the batch, so the learner needs a critic; "
            "it has one when the recipe has the regulariser 'value'"
        )
    if unit == "rows":
        walk = _walk(batch, torch.arange(len(batch), device=batch.mask.device))
        rewards = walk.rewards(torch.zeros_like(batch.token_rewards), returns)
    else:
        walk = _walk(batch, batch.trajectory)
        rewards = walk.rewards(batch.token_rewards, returns)
    values = walk.lay(batch.values)
    ahead = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return walk.spread(_discounted(rewards + gamma * ahead - values, gamma * lam))


@register("credit", "reward_to_go")
def reward_to_go(batch: Minibatch, returns: Tensor, baseline: Baseline, *, gamma: float = 1.0) -> Tensor:
    """``G_t = r_t + γ G_{t+1}`` (REINFORCE++, 2501.03262), float64; nothing is subtracted."""
    walk = _walk(batch, batch.trajectory)
    return walk.spread(_discounted(walk.rewards(batch.token_rewards, returns), gamma))


@dataclass(frozen=True)
class _Walk:
    """The ``N`` trained tokens of a batch as ``J`` lines of at most ``T`` tokens."""

    mask: Tensor
    row: Tensor
    """``[N]``, like the other three."""
    column: Tensor
    line: Tensor
    place: Tensor
    """Number of the token in its line, from 0."""
    tokens: Tensor
    """``[J]`` tokens of each line, at least 1."""

    def lay(self, x: Tensor) -> Tensor:
        """``[B, L]`` → ``[J, T]`` float64, 0 behind the end of a line."""
        width = int(self.tokens.max()) if len(self.tokens) else 0
        table = torch.zeros(len(self.tokens), width, dtype=torch.float64, device=x.device)
        table[self.line, self.place] = x[self.row, self.column].double()
        return table

    def spread(self, table: Tensor) -> Tensor:
        """``[J, T]`` → ``[B, L]``, 0 off the mask."""
        out = table.new_zeros(self.mask.shape)
        out[self.row, self.column] = table[self.line, self.place]
        return out

    def rewards(self, paid: Tensor, returns: Tensor) -> Tensor:
        """``[J, T]``: ``paid`` ``[B, L]``, and at the end of each line what its return holds beyond that."""
        table = self.lay(paid)
        last = self.place == self.tokens[self.line] - 1
        line = self.line[last]
        table[line, self.place[last]] += returns[self.row[last]] - table.sum(1)[line]
        return table


def _walk(batch: Minibatch, owner: Tensor) -> _Walk:
    """One line per value of ``owner`` ``[B]`` that has trained tokens, in order of turn and position."""
    row, column = batch.mask.nonzero(as_tuple=True)
    key = torch.stack((owner[row], batch.turn[row, column], column))
    # Stable sorts, the last key first.
    order = torch.arange(len(row), device=row.device)
    for part in key.flip(0):
        order = order[part[order].argsort(stable=True)]
    row, column = row[order], column[order]
    _, line, tokens = key[0][order].unique_consecutive(return_inverse=True, return_counts=True)
    start = tokens.cumsum(0) - tokens
    place = torch.arange(len(row), device=row.device) - start[line]
    return _Walk(batch.mask, row, column, line, place, tokens)


def _discounted(x: Tensor, factor: float) -> Tensor:
    """``y_t = x_t + factor · y_{t+1}`` along the last dimension, by doubling: log2 T steps instead of T."""
    span = 1
    while span < x.shape[1]:
        x = x + factor**span * torch.nn.functional.pad(x[:, span:], (0, span))
        span *= 2
    return x
