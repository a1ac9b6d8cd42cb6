"""Rows of tokens that begin alike, packed so that each shared prefix stands once.

- ``TreePack``: one depth-first sequence of the unique tokens, with what a model needs to read it as a tree.
- ``pack_tree``: rows to a pack.
- ``pack_rows``: which rows to pack together under a budget of unique tokens.
- ``tree_mask``: the dense mask of a pack, for references and for models that only take a mask.
- ``TreePlan``, ``plan_tree``: causal batches and rectangles that together compute attention over a pack.

In a pack, key ``k`` is visible to query ``q`` iff ``k <= q < end[k]``. Sequences without shared prefixes, one after
the other, are the special case of a forest of chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError

Ints = NDArray[np.int64]

LEAF = 128
"""Largest causal block that is computed without being halved; a power of two."""

_ALIGN = 4
"""Blocks are padded to a multiple of this: the CPU's products of odd sizes take up to half as long again."""

_WASTE = 10_000
"""Pairs of query and key that padding may add to a batch, in all: less time than a call of its own."""


@dataclass(frozen=True)
class CausalBatch:
    """Rows of ``n`` chains of tokens, padded to ``m``, each attending causally to itself.

    A token of a short shared prefix may stand in several rows: it is a key in all of them, and a query only in the
    first, its own.
    """

    start: int
    """The first packed token if the rows are the ``n * m`` packed tokens that follow, all own; else -1."""

    index: Tensor
    """int64[n, m]: packed tokens; 0 in padding."""

    own_place: Tensor
    """int64[K], places in the flattened batch that are queries; with ``own_token`` int64[K], their packed tokens."""

    own_token: Tensor

    more_place: Tensor
    """int64[E], places of tokens that stand in an earlier row too; with ``more_token`` int64[E]."""

    more_token: Tensor

    drop_place: Tensor
    """Places that are no queries: padding and ``more_place``."""


@dataclass(frozen=True)
class TreePlan:
    """What to compute for attention over a pack: every visible pair stands in exactly one piece.

    Pieces are joined by their log-sum-exp. Each packed token is a query of one row of one batch, and of the
    rectangles above it.
    """

    end: Tensor
    batches: tuple[CausalBatch, ...]
    rectangles: tuple[tuple[int, int, int], ...]
    """(a, b, e): queries [b, e) read all keys [a, b)."""

    longest: int
    """Tokens on the longest path."""

    tiles: dict[tuple[int, int], Any] = field(default_factory=dict, compare=False, repr=False)
    """What the Triton form worked out for tiles of some sizes: the same in every layer."""

    def to(self, device: torch.device | str) -> TreePlan:
        """Return the plan with its tensors on ``device``."""
        batches = tuple(
            replace(batch, **{name: value.to(device) for name, value in vars(batch).items() if name != "start"})
            for batch in self.batches
        )
        return replace(self, end=self.end.to(device), batches=batches, tiles={})


@dataclass(frozen=True)
class TreePack:
    """Unique tokens of some rows in depth-first order; all tensors int64 on one device."""

    tokens: Tensor
    """[T]."""

    positions: Tensor
    """[T]: index of the token in its rows."""

    end: Tensor
    """[T]: one past the last packed token of the subtree that the token begins."""

    prev: Tensor
    """[T]: packed index of the token before it on its path, -1 at the first."""

    place: Tensor
    """[rows, L]: packed index of token t of a row, rows as they were given; -1 beyond the row's length.

    Token t is predicted from the hidden state at ``place[row, t - 1]``; at a branch point several rows read the same.
    """

    @cached_property
    def plan(self) -> TreePlan:
        """The plan of attention over this pack, on its device; made once."""
        return plan_tree(self.end)

    def to(self, device: torch.device | str) -> TreePack:
        """Return the pack and its plan on ``device``; the plan is made where the pack is, so without waiting there."""
        moved = TreePack(*(getattr(self, name).to(device) for name in ("tokens", "positions", "end", "prev", "place")))
        vars(moved)["plan"] = self.plan.to(device)
        return moved


def pack_tree(sequences: Sequence[Sequence[int] | Ints], *, roots: Sequence[int] | None = None) -> TreePack:
    """Pack rows of token ids into a forest in which equal beginnings stand once.

    Roots come in the order of their numbers, siblings in the order of their tokens; a row that is the beginning of
    another adds nothing.

    Args:
        sequences: token ids >= 0 per row; rows may be empty, equal, or the beginning of others.
        roots: a number per row; rows with different numbers share nothing. All may share by default.

    Raises:
        UsageError: a token id is negative, a row is not one-dimensional, or ``roots`` has another length.
    """
    matrix, lengths = _padded(sequences)
    order, shared = _sorted(matrix, lengths, roots)
    ordered, lengths = matrix[order], lengths[order]
    rows, columns = ordered.shape
    base = np.concatenate([[0], np.cumsum(lengths - shared)])
    total = int(base[-1])
    base = base[:-1]
    time = np.arange(columns)

    # Row r has its own tokens from shared[r] on: the token at (r, t) was added by the last row up to r that has t.
    begins = shared[:, None] <= time
    owner = np.maximum.accumulate(np.where(begins, np.arange(rows)[:, None], 0), axis=0)
    place = (base - shared)[owner] + time
    place[time >= lengths[:, None]] = -1
    # Its subtree ends where the next row after it begins at or before t.
    after = np.full((rows + 1, columns), total)
    np.minimum.accumulate(np.where(begins, base[:, None], total)[::-1], axis=0, out=after[:rows][::-1])

    row, column = np.nonzero(begins & (time < lengths[:, None]))
    prev = np.where(column > 0, place[row, column - 1], -1)
    unordered = np.empty_like(place)
    unordered[order] = place
    columns = int(lengths.max(initial=0))
    arrays = (ordered[row, column], column, after[row + 1, column], prev, unordered[:, :columns])
    return TreePack(*(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in arrays))


def pack_rows(
    sequences: Sequence[Sequence[int] | Ints], budget: int, *, roots: Sequence[int] | None = None
) -> list[Ints]:
    """Return the indices of the rows of each pack, so that no pack has more than ``budget`` unique tokens.

    Rows that begin alike go together: rows are taken in the order of their roots and tokens, and a pack ends where
    the next row would exceed the budget. A row that is longer than the budget goes alone.

    Raises:
        UsageError: as ``pack_tree``, or the budget is not positive.
    """
    if budget < 1:
        raise UsageError(f"pack_rows: budget is {budget}; expected at least 1 token")
    matrix, lengths = _padded(sequences)
    order, shared = _sorted(matrix, lengths, roots)
    cuts, used = [0], 0
    for at, (length, common) in enumerate(zip(lengths[order].tolist(), shared.tolist(), strict=True)):
        used += length - common
        if used > budget and at > cuts[-1]:
            cuts.append(at)
            used = length
    return [part for part in np.split(order, cuts[1:]) if part.size]


def tree_mask(end: Tensor) -> Tensor:
    """Return bool[T, T]: entry (q, k) says whether query q sees key k."""
    index = torch.arange(end.shape[0], device=end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])


def plan_tree(end: Tensor) -> TreePlan:
    """Plan attention over the forest that ``end`` int64[T] describes.

    A chain of tokens without a branch is a segment [a, b) with one end e. Its descendants [b, e) read it as one
    rectangle if it is long; if it is short, its tokens are repeated before each descendant's instead, which costs
    fewer operations than joining results.

    Raises:
        UsageError: no forest in depth-first order has such ends.
    """
    ends = end.cpu().numpy()
    total = len(ends)
    begins = np.ones(total, dtype=bool)
    begins[1:] = ends[1:] != ends[:-1]
    starts = np.flatnonzero(begins)
    stops = np.append(starts, total)[1:]
    segments = list(zip(starts.tolist(), stops.tolist(), ends[starts].tolist(), strict=True))

    parents: list[int] = []
    depths: list[int] = []
    above: list[int] = []
    for number, (a, b, e) in enumerate(segments):
        while above and segments[above[-1]][2] <= a:
            above.pop()
        parent = above[-1] if above else -1
        if not b <= e <= (segments[parent][2] if above else total):
            raise UsageError(f"plan_tree: end[{a}] is {e}; expected the end of a subtree, in depth-first order")
        parents.append(parent)
        depths.append(b - a + (depths[parent] if above else 0))
        above.append(number)

    leaves = [int(b == e) for _, b, e in segments]
    repeat = [True] * len(segments)
    for number in range(len(segments) - 1, -1, -1):
        a, b, e = segments[number]
        repeat[number] = repeat[number] and (b == e or _short(b - a, leaves[number], e - b))
        if parents[number] >= 0:
            leaves[parents[number]] += leaves[number]
            repeat[parents[number]] &= repeat[number]

    chains: list[tuple[Ints, int]] = []
    seen: set[int] = set()
    for number, (a, b, e) in enumerate(segments):
        if b < e and repeat[number]:
            continue
        pieces, own, parent = [np.arange(a, b)], b - a, parents[number]
        while parent >= 0 and repeat[parent]:
            pieces.append(np.arange(*segments[parent][:2]))
            if parent not in seen:
                seen.add(parent)
                own += len(pieces[-1])
            parent = parents[parent]
        chain = np.concatenate(pieces[::-1])
        chains.append((chain, len(chain) - own))
    rectangles = tuple(segments[n] for n in range(len(segments)) if segments[n][1] < segments[n][2] and not repeat[n])
    batches = tuple(_batch(group) for group in _groups(chains))
    plan = TreePlan(torch.from_numpy(ends), batches, rectangles, max(depths, default=0))
    return plan if end.device.type == "cpu" else plan.to(end.device)


def halvings(length: int) -> int:
    """Return how often causal rows of ``length`` are halved before blocks are at most ``LEAF`` long."""
    return max(0, (max(1, length) - 1).bit_length() - (LEAF - 1).bit_length())


def _short(length: int, leaves: int, queries: int) -> bool:
    """Whether repeating a segment before its leaves costs less than a rectangle: both in pairs of query and key."""
    return (leaves - 1) * length * length < queries * (4 + length / 2) + 2000


def _groups(chains: list[tuple[Ints, int]]) -> list[list[tuple[Ints, int]]]:
    """Chains of similar length together, as far as the padding costs less than another call."""
    groups: list[list[tuple[Ints, int]]] = []
    waste, longest = 0, 0
    for chain in sorted(chains, key=lambda chain: -len(chain[0])):
        length = len(chain[0])
        waste += (longest * longest - length * length) // 2
        if not groups or waste > _WASTE:
            groups.append([])
            waste, longest = 0, length
        groups[-1].append(chain)
    return groups


def _batch(chains: list[tuple[Ints, int]]) -> CausalBatch:
    """``chains``: packed tokens, and how many of the first ones are own to an earlier chain."""
    longest = len(chains[0][0])
    step = _ALIGN << halvings(longest)
    width = -(-longest // step) * step
    index = np.zeros((len(chains), width), dtype=np.int64)
    state = np.zeros((len(chains), width), dtype=np.int8)  # 0 padding, 1 own, 2 stands in an earlier chain
    for row, (chain, foreign) in enumerate(chains):
        index[row, : len(chain)] = chain
        state[row, : len(chain)] = 1
        state[row, :foreign] = 2
    flat = index.ravel()
    own, more, drop = (np.flatnonzero(chosen) for chosen in (state == 1, state == 2, state != 1))
    plain = not drop.size and bool((np.diff(flat) == 1).all())
    arrays = (index, own, flat[own], more, flat[more], drop)
    return CausalBatch(int(flat[0]) if plain else -1, *(torch.from_numpy(array) for array in arrays))


def _padded(sequences: Sequence[Sequence[int] | Ints]) -> tuple[Ints, Ints]:
    """Rows as int64[rows, L >= 1] padded with -1, and their lengths."""
    rows = [np.asarray(row, dtype=np.int64) for row in sequences]
    for number, row in enumerate(rows):
        if row.ndim != 1:
            raise UsageError(f"tree of rows: row {number} has shape {row.shape}; expected one dimension of token ids")
        if row.size and row.min() < 0:
            raise UsageError(f"tree of rows: row {number} has the token id {row.min()}; expected ids >= 0")
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    matrix = np.full((len(rows), max(1, lengths.max(initial=0))), -1, dtype=np.int64)
    for row, values in zip(matrix, rows, strict=True):
        row[: len(values)] = values
    return matrix, lengths


def _sorted(matrix: Ints, lengths: Ints, roots: Sequence[int] | None) -> tuple[Ints, Ints]:
    """Order by root, then tokens; and how many first tokens each row shares with the one before it in that order."""
    root = np.zeros(len(matrix), dtype=np.int64) if roots is None else np.asarray(roots, dtype=np.int64)
    if root.shape != lengths.shape:
        raise UsageError(f"tree of rows: {root.size} roots for {len(lengths)} rows; expected one per row")
    # Bytes of big-endian numbers compare as the numbers do; padding, as 0, comes first.
    keys = (matrix + 1).astype(">i8")
    numbers = root.tolist()
    order = np.array(sorted(range(len(keys)), key=lambda row: (numbers[row], keys[row].tobytes())), dtype=np.int64)
    ordered = matrix[order]
    equal = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    equal &= (root[order][1:] == root[order][:-1])[:, None]
    shared = np.zeros(len(order), dtype=np.int64)
    shared[1:] = np.where(equal.all(axis=1), equal.shape[1], equal.argmin(axis=1))
    return order, shared
