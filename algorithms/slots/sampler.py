"""Slot 1, the sampler: which rows take part.

- ``flat``: all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Minibatch
from .registry import register


@register("sampler", "flat")
def flat(batch: Minibatch) -> Tensor:
    """Every task is rolled out independently ``group_size`` times and every row takes part."""
    return torch.ones(len(batch), dtype=torch.bool, device=batch.mask.device)
