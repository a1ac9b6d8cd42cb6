"""Slot 4, the baseline: what an outcome is compared with.

- ``group``: the mean and the spread of the samples of the same task.
- ``leave_one_out``: the mean of the other samples of the same task.
- ``none``: nothing; for credits that bring their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register


@register("baseline", "none")
def none(values: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """The values themselves."""
    return values


@register("baseline", "group")
def group(values: Tensor, group: Tensor, count: Tensor, *, std: bool = True, eps: float = 1e-6) -> Tensor:
    """``(value - mean) / (std + eps)`` within a group; ``std`` is unbiased, and off it is left out (Dr.
    GRPO).

    A group whose values are equal gives exactly 0. A group of one has nothing to compare with: mean 0 and
    standard deviation 1 by convention, that is the value itself.
    """
    centred, index, number = _deviations(values, group, count)
    if std:
        squares = torch.zeros_like(number).index_add(0, index, count * centred**2)
        scaled = centred / ((squares / (number - 1).clamp(min=1)).sqrt()[index] + eps)
    else:
        scaled = centred
    return torch.where(number[index] > 1, scaled, values)


@register("baseline", "leave_one_out")
def leave_one_out(values: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """``n / (n - 1) (value - mean)`` within a group of ``n``: a value minus the mean of the others (RLOO, 2402.14740).

    A value that counts several times is one of its own others, as in verl-agent. A group whose values are equal gives
    exactly 0, and so does a group of one, which has no others.
    """
    centred, index, number = _deviations(values, group, count)
    size = number[index]
    return torch.where(size > 1, centred * size / (size - 1).clamp(min=1), 0)


def _deviations(values: Tensor, group: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[N]`` values minus their group's mean, ``[N]`` groups numbered from 0, ``[G]`` samples in each."""
    _, index = group.unique(return_inverse=True)
    zeros = values.new_zeros(int(index.max()) + 1)
    # Relative to the smallest member, so that equal values leave no rounding behind.
    lowest = zeros.scatter_reduce(0, index, values, "amin", include_self=False)
    relative = values - lowest[index]
    number = zeros.index_add(0, index, count.to(values.dtype))
    mean = zeros.index_add(0, index, count * relative) / number.clamp(min=1)
    return relative - mean[index], index, number
