"""A pack holds every row, each shared beginning once, in depth-first order; packs keep to their budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.errors import UsageError
from agentropy.kernels import trees
from agentropy.kernels.trees import pack_rows, pack_tree, plan_tree, tree_mask

# Two tokens make rows that share, repeat and extend one another.
ROWS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), max_size=7)), max_size=12)


def prefixes(rows: list[list[int]], roots: list[int]) -> set[tuple[int, tuple[int, ...]]]:
    """All beginnings, each a node of the tree: the slow definition of unique tokens."""
    return {(root, tuple(row[: t + 1])) for row, root in zip(rows, roots, strict=True) for t in range(len(row))}


@given(ROWS)
def test_a_pack_holds_every_row_and_each_shared_beginning_once(cases: list[tuple[int, list[int]]]) -> None:
    rows, roots = [row for _, row in cases], [root for root, _ in cases]
    pack = pack_tree(rows, roots=roots)
    assert len(pack.tokens) == len(prefixes(rows, roots))
    assert pack.place.shape == (len(rows), max(map(len, rows), default=0))
    nodes: dict[int, tuple[int, tuple[int, ...]]] = {}
    for row, root, place in zip(rows, roots, pack.place.tolist(), strict=True):
        assert all(p == -1 for p in place[len(row) :])
        path = place[: len(row)]
        assert pack.tokens[path].tolist() == row
        assert pack.positions[path].tolist() == list(range(len(row)))
        assert pack.prev[path].tolist() == [-1, *path][: len(row)]
        for t, p in enumerate(path):
            assert nodes.setdefault(p, (root, tuple(row[: t + 1]))) == (root, tuple(row[: t + 1]))
    mask = tree_mask(pack.end)
    for q, (root, path_q) in nodes.items():
        for k, (other, path_k) in nodes.items():
            assert bool(mask[q, k]) == (root == other and path_q[: len(path_k)] == path_k)


@given(ROWS, st.booleans())
def test_the_pieces_of_a_plan_cover_every_visible_pair_once(cases: list[tuple[int, list[int]]], repeat: bool) -> None:
    pack = pack_tree([row for _, row in cases], roots=[root for root, _ in cases])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "_short", lambda *_: repeat)
        plan = plan_tree(pack.end)
    pairs = torch.zeros(len(pack.end), len(pack.end), dtype=torch.int64)
    for batch in plan.batches:
        states = torch.zeros(batch.index.numel(), dtype=torch.int64)
        states[batch.own_place], states[batch.more_place] = 1, 2
        assert torch.equal((states != 1).nonzero()[:, 0], batch.drop_place)
        flat = batch.index.view(-1)
        assert torch.equal(flat[batch.own_place], batch.own_token)
        assert torch.equal(flat[batch.more_place], batch.more_token)
        for index, state in zip(batch.index, states.view(batch.index.shape), strict=True):
            known = int((state > 0).sum())
            assert bool((state[:known] > 0).all()), "padding comes last, so that causal queries never see it"
            for t in range(known):
                if state[t] == 1:
                    pairs[index[t], index[: t + 1]] += 1
    for a, b, e in plan.rectangles:
        pairs[b:e, a:b] += 1
    assert torch.equal(pairs, tree_mask(pack.end).long())
    assert plan.longest == max((len(row) for _, row in cases), default=0)
    if not repeat:
        assert not any(batch.more_place.numel() for batch in plan.batches)


@given(ROWS, st.integers(1, 12))
def test_packs_keep_to_the_budget_and_hold_each_row_once(cases: list[tuple[int, list[int]]], budget: int) -> None:
    rows, roots = [row for _, row in cases], [root for root, _ in cases]
    packs = pack_rows(rows, budget, roots=roots)
    assert sorted(np.concatenate([np.zeros(0, int), *packs]).tolist()) == list(range(len(rows)))
    sizes = [len(prefixes([rows[i] for i in pack], [roots[i] for i in pack])) for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    for pack, following in itertools.pairwise(packs):
        both = [*pack, following[0]]
        grown = len(prefixes([rows[i] for i in both], [roots[i] for i in both]))
        assert grown > budget, "the next row would have fitted"


def test_rows_that_share_go_into_one_pack_whatever_their_order() -> None:
    first, second = np.arange(100), np.arange(100, 200)
    rows = [np.append(start, [500 + i]) for i in range(4) for start in (first, second)]
    packs = pack_rows(rows, 110)
    assert [sorted(pack.tolist()) for pack in packs] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [len(pack_tree([rows[i] for i in pack]).tokens) for pack in packs] == [104, 104]


def test_a_small_tree_reads_as_drawn() -> None:
    pack = pack_tree([[7, 8, 9], [7, 8], [7, 5], [4]])
    # 4 | 7 -> 5, 7 -> 8 -> 9
    assert pack.tokens.tolist() == [4, 7, 5, 8, 9]
    assert pack.positions.tolist() == [0, 0, 1, 1, 2]
    assert pack.end.tolist() == [1, 5, 3, 5, 5]
    assert pack.prev.tolist() == [-1, -1, 1, 1, 3]
    assert pack.place.tolist() == [[1, 3, 4], [1, 3, -1], [1, 2, -1], [0, -1, -1]]
    assert pack.plan is pack.plan
    assert pack.to("cpu").plan.longest == 3


def test_large_token_ids_keep_their_order_and_do_not_collide() -> None:
    rows = [[2**40 + 1], [2**40], [1], [256], [255]]
    assert pack_tree(rows).tokens.tolist() == [1, 255, 256, 2**40, 2**40 + 1]


def test_a_long_shared_prefix_is_one_rectangle_and_a_short_one_is_repeated() -> None:
    def star(prefix: int, suffix: int) -> list[np.ndarray]:
        return [np.append(np.arange(prefix), np.full(suffix, 5000 + i)) for i in range(8)]

    assert pack_tree(star(1000, 100)).plan.rectangles == ((0, 1000, 1800),)
    short = pack_tree(star(40, 460)).plan
    assert short.rectangles == ()
    assert sum(batch.more_token.numel() for batch in short.batches) == 7 * 40


def test_rows_of_one_length_that_share_nothing_are_one_view() -> None:
    plan = pack_tree(np.arange(4 * 512).reshape(4, 512)).plan
    assert [(batch.start, tuple(batch.index.shape)) for batch in plan.batches] == [(0, (4, 512))]


@settings(max_examples=20)
@given(st.integers(1, 2000))
def test_halvings_lead_to_blocks_of_at_most_a_leaf(length: int) -> None:
    assert length <= trees.LEAF << trees.halvings(length)
    assert not trees.halvings(length) or length > trees.LEAF << (trees.halvings(length) - 1)


def test_wrong_input_is_named() -> None:
    with pytest.raises(UsageError, match="row 1 has the token id -1"):
        pack_tree([[1], [2, -1]])
    with pytest.raises(UsageError, match="row 0 has shape"):
        pack_tree([np.zeros((2, 2), int)])
    with pytest.raises(UsageError, match="1 roots for 2 rows"):
        pack_tree([[1], [2]], roots=[0])
    with pytest.raises(UsageError, match="budget is 0"):
        pack_rows([[1]], 0)
    for end in ([3, 2], [1, 1], [0], [2, 3, 3]):
        with pytest.raises(UsageError, match=r"end\[\d\] is"):
            plan_tree(torch.tensor(end))
