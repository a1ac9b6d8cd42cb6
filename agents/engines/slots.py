"""Which token sequence each cache slot holds, and which slot continues a context best.

- ``SlotIndex``: longest cached prefix by token ids, least recently used eviction.
- ``common_prefixes``: lengths of the prefixes that neighbours in a sorted list share.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

_EMPTY = -1


class SlotIndex:
    """Token ids of every slot as one matrix, so that a context is compared with all of them at once.

    A slot's ``length`` tokens are those whose keys and values are in the cache. Token ids are never negative;
    unused positions hold -1, which no context matches.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        """Create ``slots`` empty slots of ``capacity`` positions."""
        self.tokens = np.full((slots, capacity), _EMPTY, dtype=np.int32)
        self.length = np.zeros(slots, dtype=np.int64)
        self._used = np.zeros(slots, dtype=np.int64)
        self._clock = 0

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self.length)

    @property
    def capacity(self) -> int:
        """Positions per slot."""
        return self.tokens.shape[1]

    def match(self, context: Tokens, without: Collection[int] = ()) -> tuple[int, int]:
        """Return the slot that shares the longest prefix with ``context``, and that prefix's length.

        Among equals the slot with the fewest tokens beyond the prefix wins, then the lowest number, so that a
        continuation finds its own slot. Slots in ``without`` are passed over; without any match the length is 0.
        """
        width = min(len(context), int(self.length.max(initial=0)))
        if width == 0:
            return 0, 0
        differs = self.tokens[:, :width] != context[:width]
        shared = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
        if without:
            shared[list(without)] = 0
        best = np.flatnonzero(shared == shared.max())
        slot = int(best[self.length[best].argmin()])
        return slot, int(shared[slot])

    def victim(self, keep: Collection[int], spare: Collection[int] = ()) -> int:
        """Return the slot to overwrite: an empty or else the least recently used one outside ``keep``.

        Slots in ``spare`` are taken only when there is no other.

        Raises:
            ValueError: every slot is in ``keep``.
        """
        age = self._used.copy()
        age[self.length == 0] = -1
        forbidden = np.iinfo(np.int64).max
        age[list(spare)] = forbidden - 1
        age[list(keep)] = forbidden
        slot = int(age.argmin())
        if age[slot] == forbidden:
            raise ValueError("every slot is in use")
        return slot

    def assign(self, slot: int, context: Tokens) -> None:
        """Record that ``slot`` now holds exactly ``context``."""
        self.tokens[slot, : len(context)] = context
        self.tokens[slot, len(context) : max(int(self.length[slot]), len(context))] = _EMPTY
        self.length[slot] = len(context)
        self.touch([slot])

    def append(self, slots: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Record one more token in each of ``slots``."""
        self.tokens[slots, self.length[slots]] = tokens
        self.length[slots] += 1

    def touch(self, slots: Sequence[int] | NDArray[np.int64]) -> None:
        """Mark ``slots`` as just used."""
        self._clock += 1
        self._used[slots] = self._clock

    def clear(self, slots: Sequence[int] | NDArray[np.int64] | None = None) -> None:
        """Empty ``slots``, or all of them."""
        which = slice(None) if slots is None else list(slots)
        self.tokens[which] = _EMPTY
        self.length[which] = 0

    def swap(self, a: int, b: int) -> None:
        """Exchange the records of two slots."""
        for array in (self.tokens, self.length, self._used):
            array[[a, b]] = array[[b, a]]

    def resize(self, slots: int, capacity: int) -> NDArray[np.int64]:
        """Change the shape, keeping the most recently used sequences that fit.

        Returns:
            The old numbers of the sequences kept; they become slots 0, 1, … in the same order.
        """
        held = np.flatnonzero((self.length > 0) & (self.length <= capacity))
        kept = np.sort(held[np.argsort(-self._used[held], kind="stable")][:slots])
        old = (self.tokens, self.length, self._used)
        width = min(capacity, self.capacity)
        self.tokens = np.full((slots, capacity), _EMPTY, dtype=np.int32)
        self.length = np.zeros(slots, dtype=np.int64)
        self._used = np.zeros(slots, dtype=np.int64)
        self.tokens[: len(kept), :width] = old[0][kept, :width]
        self.length[: len(kept)] = old[1][kept]
        self._used[: len(kept)] = old[2][kept]
        return kept


def common_prefixes(ordered: Sequence[Tokens]) -> NDArray[np.int64]:
    """Return for every sequence the length of the prefix it shares with the one before it (0 for the first)."""
    shared = np.zeros(len(ordered), dtype=np.int64)
    for i, (before, after) in enumerate(pairwise(ordered), start=1):
        width = min(len(before), len(after))
        differs = before[:width] != after[:width]
        shared[i] = differs.argmax() if differs.any() else width
    return shared
