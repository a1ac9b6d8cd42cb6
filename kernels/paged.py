"""Keys and values in blocks that sequences share: reference counts and copy-on-write.

- ``LayerShape``: heads and head sizes of one layer.
- ``OutOfBlocks``: no block is free.
- ``PagedKV``: the blocks of every layer and the table of every sequence.
- ``copy_blocks``: copies of many blocks at once.
- ``rotate_and_store``: rotary positions, and keys and values to their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from .dispatch import Backend, resolve

_NONE = -1
_FIRST_WIDTH = 16


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
    others read gets a copy first. Memory is zeroed: the operating system provides it when it is written, and
    positions that are masked out stay finite. Blocks that were given back last are taken first: they are in memory.

    Attributes:
        keys: per layer [blocks + 1, heads, block, key_size]; on a CPU the positions of a block are innermost in
            memory, see ``ragged_attention``. The last block belongs to nobody: padded rows of a batch may write there.
        values: per layer [blocks + 1, heads, block, value_size].
        tables: int64[sequences, blocks of the longest], the block of every place, -1 where there is none.
        length: int64[sequences], tokens in use.
        references: int64[blocks], how many tables name each block.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        blocks: int,
        block: int = 16,
        sequences: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Make room for ``blocks`` blocks and ``sequences`` sequences.

        Raises:
            UsageError: a number is not positive.
        """
        if min(blocks, block, sequences) < 1:
            raise UsageError(f"PagedKV: blocks={blocks}, block={block}, sequences={sequences}; expected at least 1")
        self.layers = tuple(layers)
        self.block = block
        self.device = torch.device(device)
        self.dtype = dtype
        inner = self.device.type == "cpu"
        self.keys = [self._zeros(blocks + 1, layer.heads, layer.key_size, inner) for layer in self.layers]
        self.values = [self._zeros(blocks + 1, layer.heads, layer.value_size, False) for layer in self.layers]
        self.references = np.zeros(blocks, dtype=np.int64)
        self.tables = np.full((sequences, _FIRST_WIDTH), _NONE, dtype=np.int64)
        self.length = np.zeros(sequences, dtype=np.int64)
        self._alive = np.zeros(sequences, dtype=bool)
        self._copies: dict[int, int] = {}
        # Blocks that nobody reads, the next to take last.
        self._free = list(range(blocks))[::-1]

    def _zeros(self, blocks: int, heads: int, size: int, inner: bool) -> Tensor:
        shape = (blocks, heads, size, self.block) if inner else (blocks, heads, self.block, size)
        if self.device.type == "cpu":
            # numpy leaves zeroing to the operating system, torch writes all of it.
            size_of = self.dtype.itemsize
            found = torch.from_numpy(np.zeros(np.prod(shape) * size_of, dtype=np.uint8)).view(self.dtype).view(shape)
        else:
            found = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return found.mT if inner else found

    @property
    def used(self) -> int:
        """Number of blocks that some sequence reads."""
        return int(np.count_nonzero(self.references))

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
        self.length[child] = length
        return child

    def append(self, sequences: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Make room for ``counts[i]`` more tokens in ``sequences[i]``; copies of shared blocks wait for ``flush``.

        Raises:
            OutOfBlocks: nothing is lost; free a sequence and call again for those whose length has not grown.
        """
        starts = self.length[sequences]
        ends = starts + counts
        self._widen_tables(-(-int(ends.max(initial=0)) // self.block))
        last = (ends - 1) // self.block
        written = self.tables[sequences, np.minimum(starts // self.block, self.tables.shape[1] - 1)]
        ready = (starts % self.block > 0) & (starts // self.block == last) & (self.references[written] == 1)
        for i in np.flatnonzero(~ready):
            sequence, start = int(sequences[i]), int(starts[i])
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
        if self.references[old] == 1:
            return
        self._take(sequence, place)
        self._copy(old, int(self.tables[sequence, place]))
        self._drop(np.array([old]))

    def _take(self, sequence: int, place: int) -> None:
        if not self._free:
            raise OutOfBlocks
        block = self._free.pop()
        self.tables[sequence, place] = block
        self.references[block] = 1
        self._copies.pop(block, None)

    def _copy(self, source: int, target: int) -> None:
        self._copies[target] = self._copies.get(source, source)

    def _drop(self, blocks: NDArray[np.int64]) -> None:
        self.references[blocks] -= 1
        self._free.extend(blocks[self.references[blocks] == 0].tolist())

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
        self._alive[sequence] = False

    def flush(self) -> None:
        """Carry out the copies that wait; call before keys are written or read."""
        if not self._copies:
            return
        pairs = np.array(list(self._copies.items()), dtype=np.int64)
        copy_blocks((*self.keys, *self.values), pairs[:, 1], pairs[:, 0])
        self._copies = {}

    def addresses(self, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where tokens lie, number of the block x ``block`` + offset, for parallel vectors of any shape."""
        return self.tables[sequences, positions // self.block] * self.block + positions % self.block

    def zero(self) -> None:
        """Overwrite everything with zeros, after values that were not finite."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def _widen_tables(self, width: int) -> None:
        if width > self.tables.shape[1]:
            extra = max(width, 2 * self.tables.shape[1]) - self.tables.shape[1]
            self.tables = np.pad(self.tables, ((0, 0), (0, extra)), constant_values=_NONE)


def copy_blocks(tensors: Sequence[Tensor], sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
    """Copy blocks inside each of ``tensors`` [N, heads, block, D]; all are read before any is written.

    Args:
        tensors: changed in place.
        sources: int64[n], blocks to read.
        targets: int64[n], distinct blocks to write.
    """
    read, write = (torch.from_numpy(blocks).to(tensors[0].device) for blocks in (sources, targets))
    for tensor in tensors:
        tensor[write] = tensor[read]


def rotate_and_store(
    qkv: Tensor,
    heads: int,
    rotation: Tensor,
    positions: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Turn queries and keys by their positions and write keys and values to the cache; returns queries [T, Hq, D].

    Args:
        qkv: [T, Hq + 2 Hk, D]; neighbours are the pairs that are turned.
        heads: Hq.
        rotation: complex64[P, D / 2].
        positions: int64[T].
        places: int64[T], as ``PagedKV.addresses`` gives them.
        keys: [N, Hk, block, D], changed in place.
        values: [N, Hk, block, D], changed in place.
        backend: "torch", "numba" (blocks of 16, positions innermost) or "auto".

    Returns:
        In the type of ``qkv``; fp32 for bf16 from the numba form.
    """
    if resolve(backend, qkv, keys, values, numba=has_numba_form(qkv, keys, values)) == "numba":
        from ._numba import paged
        from ._numba.arrays import as_array

        wide = qkv.dtype if qkv.dtype == torch.float64 else torch.float32
        query = torch.empty(len(qkv), heads, qkv.shape[2], dtype=wide)
        turns = torch.view_as_real(rotation).flatten(1)
        parts = (qkv, turns, positions, places, keys.mT, values, query)
        paged.rotate_and_store(*(as_array(part) for part in parts))
        return query
    both, block = heads + keys.shape[1], keys.shape[2]
    states = qkv if qkv.dtype == torch.float64 else qkv.float()
    turned = torch.view_as_complex(states[:, :both].unflatten(-1, (-1, 2))) * rotation[positions][:, None]
    qk = torch.view_as_real(turned).flatten(-2).to(qkv.dtype)
    where, offset = places // block, places % block
    keys[where, :, offset] = qk[:, heads:].to(keys.dtype)
    values[where, :, offset] = qkv[:, both:].to(values.dtype)
    return qk[:, :heads]


def inner_positions(keys: Tensor) -> bool:
    """Whether the 16 positions of each block of keys [N, heads, 16, D] are innermost in memory, for the numba forms."""
    kept = keys.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return kept and keys.shape[2] == 16 and keys.mT.is_contiguous()


def has_numba_form(states: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the numba forms serve states beside a cache of such memory and types."""
    kept = inner_positions(keys) and values.is_contiguous() and values.dtype == keys.dtype
    return kept and (states.dtype == torch.float64) == (keys.dtype == torch.float64)
