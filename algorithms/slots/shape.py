"""Slot 5, shapes: what is done to advantages before they meet a loss; an ordered list.

- ``whiten``: zero mean and unit variance over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Minibatch
from ..signals import masked_whiten
from .registry import register


@register("shape", "whiten")
def whiten(batch: Minibatch, advantages: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale the advantages of all trained tokens of the batch to unit variance, and by default to zero mean.

    Fewer than two trained tokens have no variance and stay as they are.
    """
    if batch.mask.sum() < 2:
        return advantages
    return torch.where(batch.mask, masked_whiten(torch.where(batch.mask, advantages, 0), batch.mask, shift_mean), 0)
