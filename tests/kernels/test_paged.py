"""Blocks that sequences share: nothing leaks, no sibling changes, and attention over tables is attention.

So is the way in: keys are turned by their positions and reach their places in both forms.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels.dispatch import Backend
from agentropy.kernels.paged import LayerShape, OutOfBlocks, PagedKV, copy_blocks, inner_positions, rotate_and_store
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


def build(blocks: int = 24, sequences: int = 8) -> PagedKV:
    shapes = [LayerShape(2, 3, 3), LayerShape(2, 3, 3)]
    return PagedKV(shapes, blocks=blocks, block=BLOCK, sequences=sequences, dtype=torch.float32, device="cpu")


def write(kv: PagedKV, sequence: int, held: list[int], tokens: list[int]) -> None:
    """Append tokens, whose keys and values are their numbers."""
    kv.append(np.array([sequence]), np.array([len(tokens)]))
    kv.flush()
    places = kv.addresses(np.full(len(tokens), sequence), np.arange(len(held), len(held) + len(tokens)))
    block, offset = np.divmod(places, BLOCK)
    for tensor in (*kv.keys, *kv.values):
        tensor[block, :, offset] = torch.tensor(tokens, dtype=torch.float32)[:, None, None]
    held += tokens


def read(kv: PagedKV, sequence: int) -> list[list[float]]:
    """What every layer, head and component holds of a sequence; all alike when nothing was overwritten."""
    length = int(kv.length[sequence])
    block, offset = np.divmod(kv.addresses(np.full(length, sequence), np.arange(length)), BLOCK)
    return [
        tensor[block, head, offset, d].tolist() for tensor in kv.keys + kv.values for head in (0, 1) for d in (0, 2)
    ]


actions = st.lists(
    st.tuples(st.sampled_from(["write", "fork", "free", "trim", "detach"]), st.integers(0, 7), st.integers(1, 9)),
    max_size=60,
)


@given(actions)
@settings(max_examples=100)
def test_no_write_changes_a_sibling_and_no_block_leaks(actions: list[tuple[str, int, int]]) -> None:
    kv = build()
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
                    write(kv, sequence, held[sequence], list(range(token, token + amount)))
                    token += amount
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
            elif action == "detach":
                kv.detach(sequence)
        except OutOfBlocks:
            assert kv.used == len(kv.references) or len(held) == 8
        kv.flush()
        for number, tokens in held.items():
            assert kv.length[number] == len(tokens)
            assert all(part == tokens for part in read(kv, number))
    for number in held:
        kv.free(number)
    assert kv.used == 0 and not kv.references.any()


def test_forks_share_blocks_until_they_write() -> None:
    kv = build()
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


def test_memory_is_zero_and_has_a_block_for_padding() -> None:
    for block, dtype in ((BLOCK, torch.float32), (16, torch.bfloat16), (16, torch.float64)):
        shapes = [LayerShape(2, 4, 6), LayerShape(1, 8, 8)]
        kv = PagedKV(shapes, blocks=5, block=block, sequences=2, dtype=dtype, device="cpu")
        for keys, values, shape in zip(kv.keys, kv.values, shapes, strict=True):
            assert keys.shape == (6, shape.heads, block, shape.key_size)
            assert values.shape == (6, shape.heads, block, shape.value_size)
            assert keys.dtype == values.dtype == dtype and not keys.any() and not values.any()
            assert keys.mT.is_contiguous() and values.is_contiguous()
            assert inner_positions(keys) == (block == 16) and not inner_positions(keys.contiguous())
        kv.keys[0][:] = torch.nan
        kv.zero()
        assert not kv.keys[0].any()


def test_a_block_that_is_read_and_written_at_once_is_read_first() -> None:
    kv = build()
    tensors = (*kv.keys, *kv.values)
    for tensor in tensors:
        tensor[:] = torch.arange(len(tensor))[:, None, None, None]
    copy_blocks(tensors, np.array([0, 1, 5, 5]), np.array([1, 0, 7, 8]))
    for tensor in tensors:
        assert tensor[:9, 1, 2, 0].tolist() == [1, 0, 2, 3, 4, 5, 6, 5, 5]
        assert (tensor == tensor[:, :1, :1, :1]).all()


KINDS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]
"""Types of what is stored and of the cache."""


def stored_case(
    seed: int, tokens: int, heads: tuple[int, int], size: int, kinds: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, ...]:
    """Queries, keys and values of tokens, rotations, positions, places, and a cache that holds sevens."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads[0] + 2 * heads[1], size, generator=generator).to(kinds[0])
    angle = 6 * torch.rand(50, size // 2, generator=generator)
    positions = torch.randint(50, (tokens,), generator=generator)
    places = torch.randperm(6 * 16, generator=generator)[:tokens]
    keys = torch.full((6, heads[1], size, 16), 7.0).to(kinds[1]).mT
    values = torch.full((6, heads[1], 16, size), 7.0).to(kinds[1])
    return qkv, torch.polar(torch.ones_like(angle), angle), positions, places, keys, values


@pytest.mark.parametrize(
    ("backend", "kinds"), [*(("numba", kinds) for kinds in KINDS), *(("torch", kinds) for kinds in KINDS[:3])], ids=str
)
@given(
    tokens=st.integers(0, 40),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda both: (both[0] * both[1], both[1])),
    size=st.sampled_from([2, 4, 16, 20, 64]),
    part=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_keys_are_turned_and_all_reach_their_places(
    backend: Backend,
    kinds: tuple[torch.dtype, torch.dtype],
    tokens: int,
    heads: tuple[int, int],
    size: int,
    part: bool,
    seed: int,
) -> None:
    if backend == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    qkv, rotation, positions, places, keys, values = stored_case(seed, tokens, heads, size, kinds)
    if part:  # of wider memory
        qkv = torch.cat((qkv, qkv), dim=2)[:, :, :size]
    query = rotate_and_store(qkv, heads[0], rotation, positions, places, keys, values, backend=backend)
    pairs = torch.view_as_complex(qkv.double().unflatten(2, (-1, 2)))
    turned = torch.view_as_real(pairs * rotation[positions][:, None].to(torch.complex128)).flatten(2)
    exact = backend == "numba" and kinds[0] == torch.float64
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if exact else {"atol": 1e-6, "rtol": 1e-6}
    rounded = {"atol": 1e-6, "rtol": 2**-8} if torch.bfloat16 in kinds else tolerance
    assert query.dtype in (kinds[0], torch.float32)
    coarse = query.dtype == torch.bfloat16
    torch.testing.assert_close(query.double(), turned[:, : heads[0]], **(rounded if coarse else tolerance))
    block, offset = places // 16, places % 16
    torch.testing.assert_close(keys[block, :, offset].double(), turned[:, heads[0] : -heads[1]], **rounded)
    assert torch.equal(values[block, :, offset], qkv[:, -heads[1] :].to(kinds[1]))
    for tensor in (keys, values):
        assert int((tensor == 7).all(dim=3).all(dim=1).sum()) == 6 * 16 - tokens


def test_what_is_stored_in_bfloat16_is_rounded_to_the_nearest() -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    halves = torch.arange(-(2**31), 2**31, 2**15 * 997, dtype=torch.int64).to(torch.int32)
    patterns = torch.cat((halves, halves - 1, halves + 1)).view(torch.float32)
    patterns = torch.cat((patterns[~patterns.isnan()], torch.tensor([torch.inf, -torch.inf, 3.4e38, -0.0, 1e-45])))
    kept = patterns[: len(patterns) // 16 * 16].flip(0)
    qkv = torch.zeros(len(kept) // 16, 3, 16)
    qkv[:, 2] = kept.view(-1, 16)
    _, rotation, _, _, keys, _ = stored_case(0, 1, (1, 1), 16, (torch.float32, torch.bfloat16))
    keys = torch.zeros(len(qkv) // 16 + 1, 1, 16, 16, dtype=torch.bfloat16).mT
    values = torch.zeros(len(keys), 1, 16, 16, dtype=torch.bfloat16)
    tokens = torch.arange(len(qkv))
    rotate_and_store(qkv, 1, rotation, torch.zeros_like(tokens), tokens, keys, values, backend="numba")
    found = values.flatten()[: len(kept)]
    assert torch.equal(found.view(torch.int16), kept.bfloat16().view(torch.int16))


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_stays_nan_in_bfloat16(sign: int) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    qkv, rotation, positions, places, keys, values = stored_case(0, 1, (1, 1), 4, KINDS[3])
    qkv[0, 2] = torch.tensor(torch.nan).copysign(torch.tensor(float(sign)))
    rotate_and_store(qkv, 1, rotation, positions, places, keys, values, backend="numba")
    assert values[places // 16, 0, places % 16].isnan().all()


def test_blocks_of_other_sizes_are_for_the_torch_form() -> None:
    qkv, rotation, positions, places, keys, values = stored_case(0, 5, (2, 1), 4, KINDS[0])
    given_ = qkv, 2, rotation, positions, places
    plain = keys.contiguous(), values.clone()
    query = rotate_and_store(*given_, *plain)
    torch.testing.assert_close(query, rotate_and_store(*given_, keys, values))
    torch.testing.assert_close(plain[0], keys)
    assert torch.equal(plain[1], values)
    with pytest.raises(UsageError, match="use backend 'auto'"):
        rotate_and_store(*given_, *plain, backend="numba")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="expected at least 1"):
        build(blocks=0)
    query, keys, values, tables, lengths = paged_case(1, rows=4, heads=(4, 2), size=8, width=3)
    with pytest.raises(UsageError, match="Hk dividing Hq"):
        paged_decode(query[:, :3], keys, values, tables, lengths)
    with pytest.raises(UsageError, match="multiples of the block size 16"):
        cascade_decode(query, keys, values, tables, lengths, [4], [8])
