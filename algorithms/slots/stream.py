"""Slot 9, the stream: the weight of the source that a row comes from.

- ``on_policy``: one source, weight 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Minibatch
from .registry import register


@register("stream", "on_policy")
def on_policy(batch: Minibatch) -> Tensor:
    """Every row was just sampled by the policy that is being trained."""
    return torch.ones(len(batch), dtype=torch.float64, device=batch.mask.device)
