"""Selectors: pure functions from a signal to the tokens it picks.

- ``outside_band``: tokens whose signal leaves a band.
- ``reaches_turn``: every trained token, provided that some row got as far as a turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Minibatch


def outside_band(signal: Tensor, low: Tensor, high: Tensor, *, strict: bool = False) -> Tensor:
    """Where ``signal`` is not in ``[low, high]``, or with ``strict`` not in ``(low, high)``."""
    return ~((signal > low) & (signal < high)) if strict else (signal < low) | (signal > high)


def reaches_turn(batch: Minibatch, turn: int) -> Tensor:
    """``[B, L]``: the mask if any trained token is of turn ``turn`` or later, else nothing."""
    reached = (batch.mask & (batch.turn >= turn)).any()
    return batch.mask if reached else torch.zeros_like(batch.mask)
