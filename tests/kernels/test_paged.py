"""Blocks that sequences share: nothing leaks, no sibling changes, and attention over tables is attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels.paged import LayerShape, OutOfBlocks, PagedKV
from agentropy.kernels.paged_attention import cascade_decode, merge_lse, paged_decode

BLOCK = 4


def paged_case(seed: int, *, rows: int, heads: tuple[int, int], size: int, width: int) -> tuple[Tensor, ...]:
    """Query, keys, values, tables and lengths with distinct blocks of 16; unused blocks hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * width + 2
    keys = torch.randn(count, heads[1], 16, size, generator=generator)
    values = torch.randn(count, heads[1], 16, size, generator=generator)
    query = torch.randn(rows, heads[0], size, generator=generator)
    tables = torch.randperm(count - 2, generator=generator).view(rows, width) + 2
    lengths = torch.randint(18, width * 16 + 1, (rows,), generator=generator)
    return query, keys, values, tables, lengths


def attended(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in float64, row by row and head by head."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.zeros(query.shape[:2], dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for row in range(len(query)):
        begin = 0 if starts is None else int(starts[row])
        for head in range(query.shape[1]):
            k = keys[tables[row], head // group].flatten(0, 1)[begin : lengths[row]].double()
            v = values[tables[row], head // group].flatten(0, 1)[begin : lengths[row]].double()
            scores = k @ query[row, head].double() / query.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ v
            lse[row, head] = scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_decoding_is_attention_over_the_table(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    query, keys, values, *where = paged_case(1, rows=4, heads=heads, size=8, width=3)
    given_ = [tensor.to(dtype) for tensor in (query, keys, values)]
    starts = torch.tensor([0, 1, 16, 17])
    for begin in (None, starts):
        out, lse = paged_decode(*given_, *where, starts=begin)
        expected, expected_lse = attended(*given_, *where, starts=begin)
        tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=2e-6)
        assert out.dtype == dtype


def test_rows_without_positions_are_zero() -> None:
    query, keys, values, tables, lengths = paged_case(4, rows=3, heads=(2, 2), size=8, width=4)
    out, lse = paged_decode(query, keys, values, tables, lengths, starts=lengths)
    assert not out.any() and (lse == -torch.inf).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=4), st.integers(0, 2**31 - 1))
@settings(max_examples=30)
def test_a_prefix_read_once_gives_what_reading_it_for_each_row_gives(groups: list[tuple[int, int]], seed: int) -> None:
    rows = sum(size for size, _ in groups)
    if not rows:
        return
    query, keys, values, tables, lengths = paged_case(seed, rows=rows, heads=(6, 2), size=8, width=4)
    first = 0
    for size, shared in groups:
        tables[first : first + size, :shared] = tables[first : first + 1, :shared]
        lengths[first : first + size].clamp_(min=16 * shared)
        first += size
    sizes, shared_tokens = [size for size, _ in groups], [16 * shared for _, shared in groups]
    out = cascade_decode(query, keys, values, tables, lengths, sizes, shared_tokens)
    torch.testing.assert_close(out.double(), attended(query, keys, values, tables, lengths)[0], atol=2e-6, rtol=2e-6)


@given(st.integers(0, 2**31 - 1), st.integers(0, 12))
def test_attention_over_parts_merges_to_attention_over_all(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(3, 12, generator=generator, dtype=torch.float64)
    values = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    parts = []
    for part in (slice(0, cut), slice(cut, 12)):
        parts += [scores[:, part].softmax(1) @ values[part], scores[:, part].logsumexp(1)]
    out, lse = merge_lse(*parts)
    torch.testing.assert_close(out, scores.softmax(1) @ values)
    torch.testing.assert_close(lse, scores.logsumexp(1))
    nothing = torch.full((3,), -torch.inf, dtype=torch.float64)
    out, lse = merge_lse(torch.zeros(3, 4).double(), nothing, torch.zeros(3, 4).double(), nothing)
    assert not out.any() and (lse == -torch.inf).all()


def build(stripe: int, blocks: int = 24, sequences: int = 8) -> PagedKV:
    shapes = [LayerShape(2, 3, 3), LayerShape(2, 3, 3)]
    return PagedKV(
        shapes, blocks=blocks, block=BLOCK, stripe=stripe, sequences=sequences, dtype=torch.float32, device="cpu"
    )


def write(kv: PagedKV, sequence: int, held: list[int], tokens: list[int]) -> None:
    """Append tokens, whose keys and values are their numbers."""
    kv.append(np.array([sequence]), np.array([len(tokens)]))
    kv.flush()
    places = kv.addresses(np.full(len(tokens), sequence), np.arange(len(held), len(held) + len(tokens)))
    stripe, offset = np.divmod(places, kv.stripe * BLOCK)
    for tensor in (*kv.keys, *kv.values):
        tensor[stripe, :, offset] = torch.tensor(tokens, dtype=torch.float32)[:, None, None]
    held += tokens


def read(kv: PagedKV, sequence: int) -> list[list[float]]:
    """What every layer, head and component holds of a sequence; all alike when nothing was overwritten."""
    length = int(kv.length[sequence])
    stripe, offset = np.divmod(kv.addresses(np.full(length, sequence), np.arange(length)), kv.stripe * BLOCK)
    return [
        tensor[stripe, head, offset, d].tolist() for tensor in kv.keys + kv.values for head in (0, 1) for d in (0, 2)
    ]


actions = st.lists(
    st.tuples(
        st.sampled_from(["write", "fork", "free", "trim", "settle", "detach"]), st.integers(0, 7), st.integers(1, 9)
    ),
    max_size=60,
)


@pytest.mark.parametrize("stripe", [1, 6])
@given(actions=actions)
@settings(max_examples=60)
def test_no_write_changes_a_sibling_and_no_block_leaks(stripe: int, actions: list[tuple[str, int, int]]) -> None:
    kv = build(stripe)
    held: dict[int, list[int]] = {}
    token = 0
    for action, pick, amount in actions:
        if not held:
            held[kv.new()] = []
        sequence = sorted(held)[pick % len(held)]
        try:
            if action == "write":
                amount = min(amount, 6 * BLOCK - len(held[sequence]))
                if amount:
                    start = len(held[sequence])
                    write(kv, sequence, held[sequence], list(range(token, token + amount)))
                    token += amount
                    written = kv.tables[sequence, start // BLOCK : -(-len(held[sequence]) // BLOCK)]
                    assert stripe == 1 or (written // stripe == kv.home[sequence]).all()
            elif action == "fork":
                length = min(amount, len(held[sequence]))
                held[kv.fork(sequence, length)] = held[sequence][:length]
            elif action == "free":
                kv.free(sequence)
                del held[sequence]
            elif action == "trim":
                length = min(amount, len(held[sequence]))
                kv.trim(sequence, length)
                held[sequence] = held[sequence][:length]
            elif action == "settle" and stripe > 1:
                table = kv.tables[sequence]
                assert not kv.settle(sequence) or (table[table >= 0] // stripe == kv.home[sequence]).all()
            elif action == "detach":
                kv.detach(sequence)
        except OutOfBlocks:
            assert kv.used * 2 > len(kv.references) or kv.occupied == kv.stripes or len(held) == 8
        kv.flush()
        for number, tokens in held.items():
            assert kv.length[number] == len(tokens)
            assert all(part == tokens for part in read(kv, number))
    for number in held:
        kv.free(number)
    assert kv.used == kv.occupied == 0 and not kv.references.any()


def test_what_is_written_at_once_lies_in_one_stripe() -> None:
    kv = build(stripe=6)
    root = kv.new()
    write(kv, root, [], list(range(BLOCK)))
    parent = kv.fork(root, BLOCK)
    write(kv, parent, list(range(BLOCK)), list(range(3 * BLOCK)))
    child = kv.fork(parent, 3 * BLOCK)
    kv.trim(parent, BLOCK - 1)
    held = list(range(BLOCK - 1))
    # The parent's own stripe is free at the first place and the child's at the second.
    write(kv, parent, held, list(range(100, 100 + 2 * BLOCK)))
    places = kv.tables[parent, : -(-len(held) // BLOCK)]
    assert (places // kv.stripe == kv.home[parent]).all()
    assert all(part == held for part in read(kv, parent))
    assert all(part == [*range(BLOCK), *range(2 * BLOCK)] for part in read(kv, child))


def test_forks_share_blocks_until_they_write() -> None:
    kv = build(1)
    parent = kv.new()
    write(kv, parent, [], list(range(10)))
    forks = [kv.fork(parent, 10) for _ in range(4)]
    assert kv.used == 3 and kv.references.max() == 5
    for number, fork in enumerate(forks):
        write(kv, fork, list(range(10)), [100 + number])
    # Two full blocks are shared; the third is the parent's and four copies.
    assert kv.used == 2 + 5
    assert [read(kv, fork)[0] for fork in forks] == [[*range(10), 100 + n] for n in range(4)]
    assert read(kv, parent)[0] == list(range(10))


def test_wider_stripes_keep_what_is_in_use() -> None:
    kv = build(3)
    first, second = kv.new(), kv.new()
    write(kv, first, [], list(range(9)))
    write(kv, second, [], list(range(20, 30)))
    third = kv.fork(second, 6)
    kv.free(first)
    kv.widen(6, 3)
    assert read(kv, second)[0] == list(range(20, 30)) and read(kv, third)[0] == list(range(20, 26))
    write(kv, third, list(range(20, 26)), list(range(50, 60)))
    assert read(kv, third)[0] == [*range(20, 26), *range(50, 60)]
    assert read(kv, second)[0] == list(range(20, 30))
    with pytest.raises(UsageError, match="expected room"):
        kv.widen(8, 1)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of stripe"):
        build(5)
    kv = build(2)
    with pytest.raises(UsageError, match="expected at most 8"):
        kv.append(np.array([kv.new()]), np.array([9]))
    query, keys, values, tables, lengths = paged_case(1, rows=4, heads=(4, 2), size=8, width=3)
    with pytest.raises(UsageError, match="Hk dividing Hq"):
        paged_decode(query[:, :3], keys, values, tables, lengths)
    with pytest.raises(UsageError, match="multiples of the block size 16"):
        cascade_decode(query, keys, values, tables, lengths, [4], [8])
