"""How a batch is cut into forward passes.

- ``Part``: the rows of one pass.
- ``parts``: all of them, each row with a trained token once.

A trajectory tree's shared prefix is computed once: rows that begin with the same tokens, whichever tree they are of,
are packed depth first, together with other rows up to a budget of tokens (arXiv 2511.00413 calls it tree training).
The loss still sees rows, so that nothing that a recipe says of them changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.tree_attention import supports_tree_attention
from ..kernels.trees import TreePack, pack_rows, pack_tree
from .batch import Minibatch


class Part(NamedTuple):
    """Rows of a batch that go through a model together."""

    rows: Tensor
    """Their numbers in the batch, int64."""
    width: int
    """Of the longest, up to its last trained token."""
    batch: Minibatch
    """The rows alone, cut to that width."""
    pack: TreePack | None
    """Their tokens as a tree, without the last one of each, which predicts nothing; None for padded rows."""

    @property
    def computed(self) -> int:
        """Tokens that a model computes for it, padding included."""
        return len(self.rows) * (self.width - 1) if self.pack is None else len(self.pack.tokens)


_PASS = 200
"""What a pass costs besides its tokens, in tokens."""


def parts(batch: Minibatch, max_tokens: int, *, packed: bool, workers: int = 1) -> Iterator[Part]:
    """Passes of at most ``max_tokens`` computed tokens; a row longer than that goes alone.

    Args:
        batch: with tokens; rows without a trained token are left out.
        max_tokens: bounds the memory of a pass, and changes nothing else but rounding.
        packed: as trees; else rows of similar length are padded to one width.
        workers: threads that take the passes in turn; more of them make more and smaller passes, if that is faster.

    Raises:
        UsageError: the batch has no tokens.
    """
    if batch.tokens is None:
        raise UsageError("the learner needs the batch's tokens")
    extent = batch.extent.cpu()
    if not packed:
        budget = max_tokens if workers == 1 else min(max_tokens, -(-int(extent.sum()) // (2 * workers)))
        for rows in batch.microbatches(max(1, budget)):
            width = int(extent[rows].max())
            yield Part(rows, width, batch.select(rows, width), None)
        return
    trained = extent.nonzero()[:, 0]
    tokens = batch.tokens.cpu().numpy()
    read = [tokens[row, : int(extent[row]) - 1] for row in trained.tolist()]
    for chosen in _dealt(read, max_tokens, workers):
        rows = trained[chosen]
        width = int(extent[rows].max())
        pack = pack_tree([read[index] for index in chosen]).to(batch.mask.device)
        yield Part(rows, width, batch.select(rows, width), pack)


def _dealt(read: Sequence[NDArray[np.int64]], max_tokens: int, workers: int) -> list[NDArray[np.int64]]:
    """The rows of each pass: for one worker as few passes as fit, for more what ends first. Cutting a tree computes its
    shared prefix twice."""
    if workers == 1:
        return pack_rows(read, max_tokens)
    total = sum(map(len, read))
    best: tuple[int, list[NDArray[np.int64]]] | None = None
    for share in (1, 2, 3, 4):
        dealt = pack_rows(read, min(max_tokens, -(-total // (share * workers)) + 1))
        costs = [_PASS + _unique([read[row] for row in rows]) for rows in dealt]
        slowest = max(sum(costs[worker::workers]) for worker in range(workers))
        if best is None or slowest < best[0]:
            best = slowest, dealt
    assert best is not None
    return best[1]


def _unique(ordered: Sequence[NDArray[np.int64]]) -> int:
    """Distinct tokens of a tree, from its rows in the order of their tokens."""
    count = sum(map(len, ordered))
    for before, row in pairwise(ordered):
        width = min(len(before), len(row))
        same = before[:width] == row[:width]
        count -= width if same.all() else int(same.argmin())
    return count


def packable(model: nn.Module) -> bool:
    """Whether ``model`` computes packed trees as it computes rows."""
    return supports_tree_attention(model)
