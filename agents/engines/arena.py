"""Keys and values of every cached sequence, in slots of equal size.

- ``KVArena``: per layer one tensor of keys and one of values, with forks by copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """Heads and head sizes of one layer's keys and values."""

    heads: int
    key_size: int
    value_size: int


class KVArena:
    """Slots of keys and values; rows in use are worked on in place through views.

    Memory is zeroed, so the operating system provides it only when it is written, and positions that are
    masked out stay finite.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        slots: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``slots`` slots of ``capacity`` positions for every layer."""
        self.layers = tuple(layers)
        self.slots = slots
        self.capacity = capacity

        def zeros(heads: int, size: int) -> Tensor:
            return torch.zeros(slots, heads, capacity, size, dtype=dtype, device=device)

        self.keys = [zeros(layer.heads, layer.key_size) for layer in layers]
        """Per layer [slots, heads, capacity, key_size]."""
        self.values = [zeros(layer.heads, layer.value_size) for layer in layers]
        """Per layer [slots, heads, capacity, value_size]."""

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of one slot to others: a fork."""
        if not targets or not length:
            return
        index = torch.as_tensor(targets, device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            if len(targets) == 1:
                tensor[targets[0], :, :length] = tensor[source, :, :length]
            else:
                tensor[:, :, :length].index_copy_(0, index, tensor[source, :, :length].expand(len(targets), -1, -1, -1))

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots."""
        for tensor in (*self.keys, *self.values):
            held = tensor[a, :, :length].clone()
            tensor[a, :, :length] = tensor[b, :, :length]
            tensor[b, :, :length] = held

    def zero(self) -> None:
        """Overwrite everything with zeros, after values that were not finite."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def resized(self, slots: int, capacity: int, kept: NDArray[np.int64], lengths: NDArray[np.int64]) -> KVArena:
        """Return an arena of another shape whose slot i holds the first ``lengths[i]`` of slot ``kept[i]``."""
        first = self.keys[0]
        arena = KVArena(self.layers, slots, capacity, dtype=first.dtype, device=first.device)
        pairs = zip((*self.keys, *self.values), (*arena.keys, *arena.values), strict=True)
        for old, new in pairs:
            for target, (source, length) in enumerate(zip(kept, lengths, strict=True)):
                new[target, :, :length] = old[source, :, :length]
        return arena
