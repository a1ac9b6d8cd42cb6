"""Keys and values in blocks that sequences share: reference counts and copy-on-write.

- ``LayerShape``: heads and head sizes of one layer.
- ``OutOfBlocks``: no block is free.
- ``PagedKV``: the blocks of every layer and the table of every sequence.
- ``copy_blocks``: copies of many blocks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError

_NONE = -1


@dataclass(frozen=True)
class LayerShape:
    """Heads and head sizes of one layer's keys and values."""

    heads: int
    key_size: int
    value_size: int


class OutOfBlocks(Exception):
    """No block, or no place for another sequence, is free: free a sequence and call again."""


class PagedKV:
    """Blocks of keys and values, and which of them each sequence reads.

    A block is ``block`` positions of all heads. A fork shares its parent's blocks; whoever writes into a block that
    others read gets a copy first. Blocks come in stripes of ``stripe``: the i-th block of a sequence is the i-th of
    some stripe, so that what a sequence writes itself lies in one piece and is read through a view. With
    ``stripe=1`` any block serves any place. Memory is zeroed: the operating system provides it when it is written,
    and positions that are masked out stay finite.

    Attributes:
        keys: per layer [stripes, heads, stripe x block, key_size]; ``values`` likewise. With ``stripe=1`` there is
            one more block at the end, which belongs to nobody.
        store: all of them in one tensor, the keys of every layer first; ``None`` where layers differ.
        tables: int64[sequences, blocks of the longest], the block of every place, -1 where there is none.
        length: int64[sequences], tokens in use.
        home: int64[sequences], the stripe that the sequence writes to, or -1.
        references: int64[blocks], how many tables name each block.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        blocks: int,
        block: int = 16,
        stripe: int = 1,
        sequences: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Make room for ``blocks`` blocks, a multiple of ``stripe``, and ``sequences`` sequences.

        Raises:
            UsageError: a number is not positive, or the stripes are not whole.
        """
        if min(blocks, block, stripe, sequences) < 1 or blocks % stripe:
            raise UsageError(
                f"PagedKV: blocks={blocks}, block={block}, stripe={stripe}, sequences={sequences}; "
                "expected positive numbers and a multiple of stripe blocks"
            )
        self.layers = tuple(layers)
        self.block = block
        self.stripe = stripe
        self.device = torch.device(device)
        self.dtype = dtype
        self._shape(blocks // stripe)
        self.references = np.zeros(blocks, dtype=np.int64)
        self.tables = np.full((sequences, stripe if stripe > 1 else 16), _NONE, dtype=np.int64)
        self.length = np.zeros(sequences, dtype=np.int64)
        self.home = np.full(sequences, _NONE, dtype=np.int64)
        self._alive = np.zeros(sequences, dtype=bool)
        # Per stripe: references to its blocks, and one for the sequence that writes to it.
        self._held = np.zeros(blocks // stripe, dtype=np.int64)
        self._copies: dict[int, int] = {}
        # Without stripes: blocks that nobody reads, the next to take last.
        self._free = list(range(blocks))[::-1] if stripe == 1 else []

    def _shape(self, stripes: int) -> None:
        # One more block where padded rows of a batch may write.
        rows = stripes + 1 if self.stripe == 1 else stripes

        def zeros(heads: int, size: int, *more: int) -> Tensor:
            shape = (*more, rows, heads, self.stripe * self.block, size)
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        first = self.layers[0]
        self.store = None
        if all(layer == first and layer.value_size == first.key_size for layer in self.layers):
            self.store = zeros(first.heads, first.key_size, 2 * len(self.layers))
            tensors = list(self.store.unbind())
            self.keys, self.values = tensors[: len(self.layers)], tensors[len(self.layers) :]
            return
        self.keys = [zeros(layer.heads, layer.key_size) for layer in self.layers]
        self.values = [zeros(layer.heads, layer.value_size) for layer in self.layers]

    @property
    def stripes(self) -> int:
        """Number of stripes."""
        return len(self._held)

    @property
    def used(self) -> int:
        """Number of blocks that some sequence reads."""
        return int(np.count_nonzero(self.references))

    @property
    def occupied(self) -> int:
        """Number of stripes in which some block is read or that some sequence writes to."""
        return int(np.count_nonzero(self._held))

    def new(self) -> int:
        """Return an empty sequence.

        Raises:
            OutOfBlocks: there are as many sequences as there may be.
        """
        sequence = int(self._alive.argmin())
        if self._alive[sequence]:
            raise OutOfBlocks
        self._alive[sequence] = True
        return sequence

    def fork(self, parent: int, length: int) -> int:
        """Return a sequence that shares the first ``length`` tokens of ``parent``.

        Raises:
            OutOfBlocks: there are as many sequences as there may be.
        """
        child = self.new()
        count = -(-length // self.block)
        shared = self.tables[parent, :count]
        self.tables[child, :count] = shared
        self.references[shared] += 1
        np.add.at(self._held, shared // self.stripe, 1)
        self.length[child] = length
        return child

    def append(self, sequences: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Make room for ``counts[i]`` more tokens in ``sequences[i]``; copies of shared blocks wait for ``flush``.

        Raises:
            OutOfBlocks: nothing is lost; free a sequence and call again for those whose length has not grown.
            UsageError: a sequence would outgrow its stripe.
        """
        starts = self.length[sequences]
        ends = starts + counts
        if self.stripe > 1 and len(ends) and int(ends.max()) > self.stripe * self.block:
            raise UsageError(f"PagedKV: a sequence of {ends.max()} tokens; expected at most {self.stripe * self.block}")
        if self.stripe == 1:
            self._widen_tables(-(-int(ends.max(initial=0)) // self.block))
        last = (ends - 1) // self.block
        written = self.tables[sequences, np.minimum(starts // self.block, self.tables.shape[1] - 1)]
        ready = (starts % self.block > 0) & (starts // self.block == last) & (self.references[written] == 1)
        if self.stripe > 1:
            ready &= written // self.stripe == self.home[sequences]
        for i in np.flatnonzero(~ready):
            sequence, start = int(sequences[i]), int(starts[i])
            if self.stripe > 1:
                self._in_one_piece(sequence, start // self.block, int(last[i]) + 1)
            if start % self.block:
                self._own(sequence, start // self.block)
            for place in range(-(-start // self.block), int(last[i]) + 1):
                if self.tables[sequence, place] == _NONE:
                    self._take(sequence, place)
            self.length[sequence] = ends[i]
        self.length[sequences] = ends

    def detach(self, sequence: int) -> None:
        """Give the sequence its own copy of a last block that is not full, as its next ``append`` would.

        Raises:
            OutOfBlocks: no block is free.
        """
        length = int(self.length[sequence])
        if length % self.block:
            self._own(sequence, length // self.block)

    def _own(self, sequence: int, place: int) -> None:
        """Give the sequence a block of its own at ``place``, with what its present block holds."""
        old = int(self.tables[sequence, place])
        if self.references[old] == 1 and (self.stripe == 1 or old // self.stripe == self.home[sequence]):
            return
        self._take(sequence, place)
        self._copy(old, int(self.tables[sequence, place]))
        self._drop(np.array([old]))

    def _in_one_piece(self, sequence: int, first: int, end: int) -> None:
        """Move to a fresh stripe where others hold a block of the present one at these places."""
        home = int(self.home[sequence])
        if home != _NONE:
            blocks = home * self.stripe + np.arange(first, end)
            if (self.references[blocks] > (self.tables[sequence, first:end] == blocks)).any():
                self._move(sequence)

    def _move(self, sequence: int) -> None:
        """Let the sequence write to a stripe of which nobody reads anything."""
        fresh = int(self._held.argmin())
        if self._held[fresh]:
            raise OutOfBlocks
        if self.home[sequence] != _NONE:
            self._held[self.home[sequence]] -= 1
        self.home[sequence] = fresh
        self._held[fresh] += 1

    def _take(self, sequence: int, place: int) -> None:
        if self.stripe == 1:
            if not self._free:
                raise OutOfBlocks
            block = self._free.pop()
        else:
            home = int(self.home[sequence])
            if home == _NONE or self.references[home * self.stripe + place]:
                # The stripe's block at this place belongs to others: what follows goes to a fresh stripe.
                self._move(sequence)
            block = int(self.home[sequence]) * self.stripe + place
        self.tables[sequence, place] = block
        self.references[block] = 1
        self._held[block // self.stripe] += 1
        self._copies.pop(block, None)

    def _copy(self, source: int, target: int) -> None:
        self._copies[target] = self._copies.get(source, source)

    def _drop(self, blocks: NDArray[np.int64]) -> None:
        self.references[blocks] -= 1
        if self.stripe == 1:
            self._free.extend(blocks[self.references[blocks] == 0].tolist())
        np.subtract.at(self._held, blocks // self.stripe, 1)

    def trim(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence after the first ``length``."""
        count = -(-length // self.block)
        tail = self.tables[sequence, count:]
        self._drop(tail[tail != _NONE])
        tail[:] = _NONE
        self.length[sequence] = min(length, int(self.length[sequence]))

    def free(self, sequence: int) -> None:
        """Give a sequence's blocks back; those that others share stay."""
        self.trim(sequence, 0)
        if self.home[sequence] != _NONE:
            self._held[self.home[sequence]] -= 1
        self.home[sequence] = _NONE
        self._alive[sequence] = False

    def settle(self, sequence: int) -> bool:
        """Copy what a sequence reads elsewhere to its own stripe; return whether all of it could be.

        Raises:
            OutOfBlocks: the sequence has no stripe yet and none is free.
        """
        count = -(-int(self.length[sequence]) // self.block)
        table = self.tables[sequence, :count]
        if self.home[sequence] == _NONE and count:
            self._move(sequence)
        own = self.home[sequence] * self.stripe + np.arange(count)
        places = np.flatnonzero(table != own)
        if self.references[own[places]].any():
            return False
        for place in places.tolist():
            old = int(table[place])
            self._take(sequence, place)
            self._copy(old, int(table[place]))
            self._drop(np.array([old]))
        return True

    def flush(self) -> None:
        """Carry out the copies that wait; call before keys are written or read."""
        if not self._copies:
            return
        pairs = np.array(list(self._copies.items()), dtype=np.int64)
        copy_blocks((*self.keys, *self.values), pairs[:, 1], pairs[:, 0], self.stripe, self.block)
        self._copies = {}

    def addresses(self, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where tokens lie, stripe x (stripe x block) + offset, for parallel vectors of any shape."""
        return self.tables[sequences, positions // self.block] * self.block + positions % self.block

    def zero(self) -> None:
        """Overwrite everything with zeros, after values that were not finite."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def widen(self, stripe: int, stripes: int) -> None:
        """Change the shape to ``stripes`` stripes of ``stripe`` blocks, at least as many as are in use.

        Raises:
            UsageError: what is in use does not fit.
        """
        self.flush()
        kept = np.flatnonzero(self._held)
        if stripe < self.stripe or len(kept) > stripes or self.stripe == 1:
            raise UsageError(f"PagedKV: {len(kept)} stripes of {self.stripe} blocks in use; expected room for them")
        number = np.full(self.stripes, _NONE, dtype=np.int64)
        number[kept] = np.arange(len(kept))
        old = self.stripe
        references = np.zeros((stripes, stripe), dtype=np.int64)
        references[: len(kept), :old] = self.references.reshape(-1, old)[kept]
        used = np.flatnonzero(references.any(axis=0))
        top = (int(used[-1]) + 1 if len(used) else 0) * self.block
        held = np.zeros(stripes, dtype=np.int64)
        held[: len(kept)] = self._held[kept]
        tables = np.full((len(self.tables), stripe), _NONE, dtype=np.int64)
        tables[:, : self.tables.shape[1]] = np.where(
            self.tables == _NONE, _NONE, number[self.tables // old] * stripe + self.tables % old
        )
        self.tables, self.references, self._held = tables, references.ravel(), held
        self.home = np.where(self.home == _NONE, _NONE, number[self.home])
        self.stripe = stripe
        before = (*self.keys, *self.values)
        self._shape(stripes)
        rows = torch.from_numpy(kept).to(self.device)
        for tensor, wide in zip(before, (*self.keys, *self.values), strict=True):
            wide[: len(kept), :, :top] = tensor[rows, :, :top]

    def _widen_tables(self, width: int) -> None:
        if width > self.tables.shape[1]:
            extra = max(width, 2 * self.tables.shape[1]) - self.tables.shape[1]
            self.tables = np.pad(self.tables, ((0, 0), (0, extra)), constant_values=_NONE)


def copy_blocks(
    tensors: Sequence[Tensor], sources: NDArray[np.int64], targets: NDArray[np.int64], stripe: int, block: int
) -> None:
    """Copy blocks inside each of ``tensors`` [stripes, heads, stripe x block, D]; all are read before any is written.

    Args:
        tensors: changed in place.
        sources: int64[n], blocks to read.
        targets: int64[n], distinct blocks to write.
        stripe: blocks per stripe.
        block: positions per block.
    """
    device = tensors[0].device
    read, write = (
        tuple(torch.from_numpy(part).to(device) for part in np.divmod(ids, stripe)) for ids in (sources, targets)
    )
    for tensor in tensors:
        blocks = tensor.unflatten(2, (stripe, block))
        blocks[write[0], :, write[1]] = blocks[read[0], :, read[1]]
