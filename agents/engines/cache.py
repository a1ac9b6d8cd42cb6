"""The prefix cache: sequences of shared blocks, found by their token ids, bounded in tokens.

- ``PrefixCache``: gives every request a sequence that begins with the longest cached prefix of its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import UsageError
from ...kernels.paged import LayerShape, OutOfBlocks, PagedKV
from .radix import RadixTree, Tokens

_T = TypeVar("_T")

BLOCK = 16
"""Positions per block."""


class PrefixCache:
    """Blocks never exceed ``max_tokens``; a full cache forgets the least recently used sequence that nobody runs.

    A context is continued in place in the sequence that holds exactly its prefix; when the best sequence also holds
    other tokens, or is running, it is forked. The tree only lists tokens whose keys and values have been computed,
    so an interrupted call leaves a valid cache.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        max_tokens: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Create an empty cache for sequences of these layers."""
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._blocks = -(-max_tokens // BLOCK)
        self.kv = PagedKV(
            layers,
            blocks=self._blocks,
            block=BLOCK,
            sequences=max_sequences,
            dtype=dtype,
            device=device,
        )
        self.tree = RadixTree()
        self._running: dict[int, int] = {}
        self._used = np.zeros(max_sequences, dtype=np.int64)
        self._clock = 0

    @property
    def running(self) -> int:
        """Sequences that requests hold."""
        return len(self._running)

    def check(self, positions: int) -> None:
        """Refuse a sequence of ``positions`` tokens that can never fit.

        Raises:
            UsageError: it exceeds the cache.
        """
        if positions > self._max_tokens:
            raise UsageError(
                f"a sequence of {positions} tokens does not fit in cache_tokens={self._max_tokens}; "
                "expected cache_tokens of at least the longest context plus max_tokens"
            )

    def claim(self, context: Tokens, positions: int) -> tuple[int, int] | None:
        """Return a sequence with room for ``context`` and how many of its leading tokens are already computed.

        At least one token is always left to compute, so that its logits are known. Call ``commit`` when the rest
        has been computed and ``finish`` at the end.

        Args:
            context: the tokens.
            positions: the longest that the sequence will get; it must pass ``check``.

        Returns:
            ``None`` when the sequences that are running leave no room.
        """
        need = -(-positions // BLOCK)
        if not self._room(need):
            return None
        ends, shared = self.tree.match(context)
        usable = min(shared, len(context) - 1)
        for sequence in ends:
            if sequence not in self._running and usable == shared == self.kv.length[sequence]:
                self._running[sequence] = need
                return self._grow(sequence, context, usable)
        source = ends[0] if ends and usable else None
        keep = () if source is None else (source,)
        try:
            if source is None:
                sequence = self._evicting(self.kv.new, keep)
            else:
                sequence = self._evicting(lambda: self.kv.fork(source, usable), keep)
        except OutOfBlocks:
            return self._shrink(source, context, usable, need)
        self._running[sequence] = need
        return self._grow(sequence, context, usable, source)

    def _grow(self, sequence: int, context: Tokens, usable: int, source: int | None = None) -> tuple[int, int] | None:
        keep = () if source is None else (source,)
        try:
            self._append(np.array([sequence]), np.array([len(context) - usable]), keep)
        except OutOfBlocks:
            need = self._running[sequence]
            if sequence in self.tree:
                self.tree.remove(sequence)
                self._abandon(sequence)
                return self._afresh(context, need)
            self._abandon(sequence)
            return self._shrink(source, context, usable, need)
        return sequence, usable

    def _afresh(self, context: Tokens, need: int) -> tuple[int, int] | None:
        """Compute all of it: what is cached lies where it leaves no room to go on."""
        try:
            sequence = self._evicting(self.kv.new, ())
        except OutOfBlocks:
            return None
        self._running[sequence] = need
        return self._grow(sequence, context, 0)

    def _shrink(self, source: int | None, context: Tokens, usable: int, need: int) -> tuple[int, int] | None:
        """Continue in the source itself, forgetting what follows the prefix: there is no room beside it."""
        if source is None or source in self._running or source not in self.tree:
            return None
        self.tree.remove(source)
        self.kv.trim(source, usable)
        self._running[source] = need
        try:
            self._append(np.array([source]), np.array([len(context) - usable]))
        except OutOfBlocks:
            self._abandon(source)
            return self._afresh(context, need)
        return source, usable

    def _abandon(self, sequence: int) -> None:
        self._running.pop(sequence, None)
        self.kv.free(sequence)

    def append(self, sequences: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> None:
        """Make room for more tokens in running sequences, by default one in each."""
        self._append(sequences, np.ones_like(sequences) if counts is None else counts)

    def _append(self, sequences: NDArray[np.int64], counts: NDArray[np.int64], keep: Sequence[int] = ()) -> None:
        targets = self.kv.length[sequences] + counts
        self._evicting(lambda: self.kv.append(sequences, targets - self.kv.length[sequences]), keep)

    def duplicate(self, sequence: int, positions: int) -> int | None:
        """Return a running copy of a running sequence, or ``None`` when there is no room."""
        need = -(-positions // BLOCK)
        if not self._room(need):
            return None
        length = int(self.kv.length[sequence])
        child = None
        try:
            child = self._evicting(lambda: self.kv.fork(sequence, length), ())
            self._running[child] = need
            self._evicting(lambda: self.kv.detach(child), ())
        except OutOfBlocks:
            if child is not None:
                self._abandon(child)
            return None
        return child

    def commit(self, sequence: int, tokens: Tokens) -> None:
        """Record that the keys and values of a sequence's ``tokens`` have been computed."""
        if sequence in self.tree:
            self.tree.extend(sequence, tokens)
        else:
            self.tree.insert(sequence, tokens)

    def finish(self, sequence: int, tokens: Tokens) -> None:
        """Give a sequence up: it stays, with ``tokens``, until it is evicted."""
        self.kv.trim(sequence, len(tokens))
        if len(tokens):
            self.commit(sequence, tokens)
            del self._running[sequence]
            self._clock += 1
            self._used[sequence] = self._clock
        else:
            if sequence in self.tree:
                self.tree.remove(sequence)
            self._abandon(sequence)

    def drop(self, prefixes: Sequence[Tokens] | None = None) -> None:
        """Forget sequences that begin with one of ``prefixes``, or all; those that are running go on."""
        if prefixes is None:
            for sequence in self.tree.below(np.empty(0, dtype=np.int32)):
                if sequence not in self._running:
                    self._evict(sequence)
            return
        for prefix in prefixes:
            for sequence in self.tree.below(np.asarray(prefix, dtype=np.int32)):
                if sequence not in self._running:
                    self._evict(sequence)

    def _evict(self, sequence: int) -> None:
        self.tree.remove(sequence)
        self.kv.free(sequence)

    def _evicting(self, call: Callable[[], _T], keep: Sequence[int]) -> _T:
        """Call until it finds room, evicting one sequence after the other.

        Raises:
            OutOfBlocks: nothing is left to evict.
        """
        while True:
            try:
                return call()
            except OutOfBlocks:
                idle = [s for s in self.tree if s not in self._running and s not in keep]
                if not idle:
                    raise
                self._evict(min(idle, key=lambda s: int(self._used[s])))

    def _room(self, need: int) -> bool:
        """Whether one more sequence of ``need`` blocks can run."""
        if len(self._running) >= self._max_sequences:
            return False
        # One more for each: a fork's copy of a block that is not full.
        return sum(self._running.values()) + len(self._running) + need <= self._blocks
