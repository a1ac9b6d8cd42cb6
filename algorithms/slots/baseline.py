"""Slot 4, the baseline: what an outcome is compared with.

- ``group``: the other samples of the same task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register


@register("baseline", "group")
def group(values: Tensor, group: Tensor, count: Tensor, *, std: bool = True, eps: float = 1e-6) -> Tensor:
    """``(value - mean) / (std + eps)`` within a group; ``std`` is unbiased, and off it is left out (Dr.
    GRPO).

    A group whose values are equal gives exactly 0. A group of one has nothing to compare with: mean 0 and
    standard deviation 1 by convention, that is the value itself.
    """
    _, index = group.unique(return_inverse=True)
    zeros = values.new_zeros(int(index.max()) + 1)
    # Relative to the smallest member, so that equal values leave no rounding behind.
    lowest = zeros.scatter_reduce(0, index, values, "amin", include_self=False)
    relative = values - lowest[index]
    number = zeros.index_add(0, index, count.to(values.dtype))
    mean = zeros.index_add(0, index, count * relative) / number.clamp(min=1)
    centred = relative - mean[index]
    if std:
        variance = zeros.index_add(0, index, count * centred**2) / (number - 1).clamp(min=1)
        scaled = centred / (variance.sqrt()[index] + eps)
    else:
        scaled = centred
    return torch.where(number[index] > 1, scaled, values)
