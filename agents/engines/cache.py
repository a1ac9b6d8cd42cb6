"""The prefix cache: sequences in slots, found by their token ids, bounded in tokens.

- ``PrefixCache``: places contexts in slots so that the longest cached prefix of each is reused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import UsageError
from .arena import KVArena, LayerShape
from .slots import SlotIndex, Tokens

_FIRST_CAPACITY = 256
_CAPACITY_STEP = 64


class PrefixCache:
    """Slots x capacity never exceeds ``max_tokens``; a full cache forgets the least recently used sequence.

    A context is continued in place in the slot that holds exactly its prefix; when the best slot also holds
    other tokens, or serves another request, the prefix is copied to a slot of its own (a fork). The index only
    lists tokens whose keys and values have been computed, so an interrupted call leaves a valid cache.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        max_tokens: int,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Create an empty cache for sequences of these layers."""
        self._max_tokens = max_tokens
        self._max_slots = max_slots
        capacity = min(_FIRST_CAPACITY, max_tokens)
        slots = self._slots_for(capacity)
        self.index = SlotIndex(slots, capacity)
        self.arena = KVArena(layers, slots, capacity, dtype=dtype, device=device)
        self._claimed: set[int] = set()

    def _slots_for(self, capacity: int) -> int:
        return max(1, min(self._max_slots, self._max_tokens // capacity))

    def reserve(self, positions: int) -> int:
        """Make every slot hold ``positions`` tokens; return how many requests can run at once.

        Raises:
            UsageError: one sequence of that length exceeds the cache.
        """
        if positions > self._max_tokens:
            raise UsageError(
                f"a sequence of {positions} tokens does not fit in cache_tokens={self._max_tokens}; "
                "expected cache_tokens of at least the longest context plus max_tokens"
            )
        if positions > self.index.capacity:
            wanted = max(positions, self.index.capacity * 3 // 2)
            wanted = min(-(-wanted // _CAPACITY_STEP) * _CAPACITY_STEP, self._max_tokens)
            slots = self._slots_for(wanted)
            kept = self.index.resize(slots, wanted)
            self.arena = self.arena.resized(slots, wanted, kept, self.index.length[: len(kept)])
        return self.index.slots

    def place(self, contexts: Sequence[Tokens]) -> list[tuple[int, int]]:
        """Claim a slot for each context; return (slot, number of leading tokens already in it).

        At least one token is always left to compute, so that its logits are known. Call ``commit`` when the
        rest has been computed, and ``end`` when the claimed slots are free to be reused.
        """
        placed: list[tuple[int, int] | None] = [None] * len(contexts)
        sources: dict[int, int] = {}
        for i, context in enumerate(contexts):
            slot, shared = self.index.match(context)
            if 0 < shared < len(context) and shared == self.index.length[slot] and slot not in self._claimed:
                self._claimed.add(slot)
                placed[i] = (slot, shared)
            elif shared:
                sources[i] = slot
        for i, context in enumerate(contexts):
            if placed[i] is None:
                placed[i] = self._fork(context, set(sources.values()))
                sources.pop(i, None)
        return [place for place in placed if place is not None]

    def _fork(self, context: Tokens, sources: set[int]) -> tuple[int, int]:
        source, shared = self.index.match(context)
        shared = min(shared, len(context) - 1)
        slot = self.index.victim(self._claimed, sources)
        self._claimed.add(slot)
        if slot != source:
            self.index.clear([slot])
            self.arena.copy(source, [slot], shared)
        self.index.assign(slot, context[:shared])
        return slot, shared

    def commit(self, slots: Sequence[int], contexts: Sequence[Tokens]) -> None:
        """Record that the claimed ``slots`` now hold ``contexts``."""
        for slot, context in zip(slots, contexts, strict=True):
            self.index.assign(slot, context)

    def duplicate(self, slot: int, copies: int) -> list[int]:
        """Claim ``copies`` more slots with the same sequence as ``slot``; return them."""
        length = int(self.index.length[slot])
        context = self.index.tokens[slot, :length].copy()
        targets = []
        for _ in range(copies):
            target = self.index.victim(self._claimed)
            self._claimed.add(target)
            self.index.assign(target, context[:0])
            targets.append(target)
        self.arena.copy(slot, targets, length)
        self.commit(targets, [context] * copies)
        return targets

    def gather(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Exchange slots so that ``slots`` become neighbours; return their new numbers, in the same order.

        Neighbours are attended to through one view, without copying their keys. The window that already holds
        most of them is filled from outside, so a batch that stays together is moved once.
        """
        ordered = np.sort(slots)
        count = len(slots)
        if (np.diff(ordered) != 1).sum() <= count // 16:
            return slots
        starts = np.minimum(ordered, self.index.slots - count)
        inside = np.searchsorted(ordered, starts + count) - np.searchsorted(ordered, starts)
        start = int(starts[inside.argmax()])
        moving = [int(slot) for slot in ordered if not start <= slot < start + count]
        holes = sorted(set(range(start, start + count)) - set(ordered.tolist()))
        renamed = {slot: slot for slot in ordered.tolist()}
        for slot, hole in zip(moving, holes, strict=True):
            length = max(int(self.index.length[slot]), int(self.index.length[hole]))
            self.arena.swap(slot, hole, length)
            self.index.swap(slot, hole)
            self._claimed.discard(slot)
            self._claimed.add(hole)
            renamed[slot] = hole
        return np.array([renamed[slot] for slot in slots.tolist()], dtype=np.int64)

    def end(self) -> None:
        """Give up all claims; the sequences stay until they are evicted."""
        self._claimed.clear()

    def drop(self, prefixes: Sequence[Tokens] | None = None) -> None:
        """Forget sequences that begin with one of ``prefixes``, or all."""
        if prefixes is None:
            self.index.clear()
            return
        for prefix in prefixes:
            if len(prefix) <= self.index.capacity:
                self.index.clear(np.flatnonzero((self.index.tokens[:, : len(prefix)] == prefix).all(axis=1)))
