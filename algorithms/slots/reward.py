"""Slot 2, the reward: parts of a trajectory's return.

- ``environment``: what the world paid.
"""

from __future__ import annotations

from torch import Tensor

from ..batch import Minibatch
from .registry import register


@register("reward", "environment")
def environment(batch: Minibatch) -> Tensor:
    """The return of the row's trajectory."""
    return batch.returns
