"""Slot 7, second half: from the losses of tokens to one number.

- ``MODES``: the names. Every mode returns the coefficients ``c`` of ``loss = Σ c · ℓ`` with denominators of
  the whole batch, so that any split of the rows adds up to the same loss.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..batch import Minibatch
from ..signals import turn_cells
from .registry import register

Mode = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
    "turn-mean",
]
MODES: tuple[str, ...] = get_args(Mode)


@register("aggregation", "token-mean")
def token_mean(batch: Minibatch, keep: Tensor) -> Tensor:
    """Every token counts the same (DAPO, 2503.14476; verl's default)."""
    return keep.double() / keep.sum().clamp(min=1)


@register("aggregation", "token-sum")
def token_sum(batch: Minibatch, keep: Tensor) -> Tensor:
    """The sum over tokens."""
    return keep.double()


@register("aggregation", "seq-mean-token-sum")
def seq_mean_token_sum(batch: Minibatch, keep: Tensor) -> Tensor:
    """Sum over a row's tokens, then mean over the rows that have any."""
    return keep.double() / _rows(keep)


@register("aggregation", "seq-mean-token-sum-norm")
def seq_mean_token_sum_norm(batch: Minibatch, keep: Tensor, *, length: int | None = None) -> Tensor:
    """Sum over tokens divided by rows and by a constant ``length`` (Dr. GRPO, 2503.20783).

    When ``length`` is None the width of the mask stands in for it, as in verl; padding then changes the loss.
    """
    return keep.double() / (_rows(keep) * (length or keep.shape[1]))


@register("aggregation", "seq-mean-token-mean")
def seq_mean_token_mean(batch: Minibatch, keep: Tensor) -> Tensor:
    """Mean over a row's tokens, then over the rows that have any (GRPO, 2402.03300)."""
    return keep.double() / keep.sum(1, keepdim=True).clamp(min=1) / _rows(keep)


@register("aggregation", "turn-mean")
def turn_mean(batch: Minibatch, keep: Tensor) -> Tensor:
    """Mean over a turn's tokens, then a trajectory's turns, then trajectories (EPO, 2509.22576, Eq. 2)."""
    cells = turn_cells(keep, batch.trajectory, batch.turn)
    if not len(cells.tokens):
        return keep.double()
    trajectories = (cells.turns > 0).sum()
    share = 1 / (cells.tokens.double() * cells.turns[cells.trajectory] * trajectories)
    return torch.where(keep, share[cells.index], 0.0)


def _rows(keep: Tensor) -> Tensor:
    return keep.any(1).sum().clamp(min=1)
