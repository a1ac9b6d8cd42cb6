"""Attention of ragged rows over their blocks: a softmax per query, whatever lies beside a row and however work is cut.

The numba form, and the torch form beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels.dispatch import Backend
from agentropy.kernels.paged import inner_positions
from agentropy.kernels.paged_attention import ragged_attention

pytest.importorskip("numba", reason="numba is not installed")

WIDE = {torch.float32: (2e-6, 2e-6), torch.float64: (1e-12, 1e-12), torch.bfloat16: (2e-6, 2**-8)}
"""Absolute and relative error of what comes out in this type."""

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]
"""Types of the queries and of the cache."""

Row = tuple[int, int]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call is worth as many threads as torch has."""
    monkeypatch.setattr("agentropy.kernels._numba.arrays._WORTH", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ragged_case(
    seed: int,
    rows: list[Row],
    *,
    heads: tuple[int, int],
    size: int,
    value_size: int,
    kinds: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    padding: int = 0,
) -> tuple[Tensor, ...]:
    """Query, keys, values, tables, starts and counts with scattered blocks.

    What no row reads holds nan in keys, and in values, which have weights of zero there, what is finite but large;
    places that no position needs name blocks that do not exist.
    """
    generator = torch.Generator().manual_seed(seed)
    needs = [-(-(start + count) // 16) for start, count in rows]
    total = sum(needs) + 2
    keys = torch.full((total, heads[1], size, 16), torch.nan).mT
    values = torch.full((total, heads[1], 16, value_size), 1e30)
    order = torch.randperm(total, generator=generator)[2:].split(needs)
    tables = torch.full((len(rows), max(needs) + 1), 10**12)
    for (start, count), table, own in zip(rows, tables, order, strict=True):
        table[: len(own)] = own
        places = torch.arange(start + count)
        block, offset = own[places // 16], places % 16
        keys[block, :, offset] = torch.randn(len(places), heads[1], size, generator=generator)
        values[block, :, offset] = torch.randn(len(places), heads[1], value_size, generator=generator)
    starts, counts = (torch.tensor(part) for part in zip(*rows, strict=True))
    query = torch.randn(int(counts.sum()) + padding, heads[0], size, generator=generator)
    assert inner_positions(keys.to(kinds[1]))
    return query.to(kinds[0]), keys.to(kinds[1]), values.to(kinds[1]), tables, starts, counts


def attended(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    counts: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in float64, query by query and head by head."""
    out = torch.zeros(*query.shape[:2], values.shape[3], dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    token = 0
    for table, start, count in zip(tables, starts.tolist(), counts.tolist(), strict=True):
        own = table[: -(-(start + count) // 16)]
        k = keys[own].double().transpose(1, 2).flatten(0, 1).repeat_interleave(group, dim=1)
        v = values[own].double().transpose(1, 2).flatten(0, 1).repeat_interleave(group, dim=1)
        for seen in range(start + 1, start + count + 1):
            scores = torch.einsum("hd,shd->hs", query[token].double(), k[:seen]) * scale
            out[token] = torch.einsum("hs,shd->hd", scores.softmax(dim=1), v[:seen])
            lse[token] = scores.logsumexp(dim=1)
            token += 1
    return out, lse


def assert_attends(case: tuple[Tensor, ...], backend: Backend, scale: float | None = None) -> None:
    out, lse = ragged_attention(*case, scale=scale, backend=backend)
    expected, expected_lse = attended(*case, scale=scale)
    absolute, relative = WIDE[case[0].dtype]
    torch.testing.assert_close(out.double(), expected, atol=absolute, rtol=relative)
    absolute, relative = WIDE[lse.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, atol=absolute, rtol=relative)
    assert out.dtype == case[0].dtype
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)


def parts(rows: list[Row]) -> Iterator[tuple[slice, slice]]:
    """The queries of each row, and the row itself."""
    first = 0
    for row, (_, count) in enumerate(rows):
        yield slice(first, first + count), slice(row, row + 1)
        first += count


rows_ = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=4)
groups = st.tuples(st.integers(1, 3), st.integers(1, 4)).map(lambda both: (both[0] * both[1], both[0]))
sizes = st.sampled_from([4, 16, 20, 32, 64])


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
@pytest.mark.parametrize("backend", ["numba", "torch"])
@given(rows=rows_, heads=groups, size=sizes, value_size=sizes, padding=st.integers(0, 3), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_every_query_sees_its_row_up_to_itself(
    backend: Backend,
    kinds: tuple[torch.dtype, torch.dtype],
    rows: list[Row],
    heads: tuple[int, int],
    size: int,
    value_size: int,
    padding: int,
    seed: int,
) -> None:
    shape = {"heads": heads, "size": size, "value_size": value_size}
    case = ragged_case(seed, rows, **shape, kinds=kinds, padding=padding)
    assert_attends(case, backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_scores_are_scaled_as_asked(backend: Backend, scale: float) -> None:
    case = ragged_case(1, [(20, 9), (0, 1)], heads=(4, 2), size=16, value_size=16, kinds=(torch.float64,) * 2)
    assert_attends(case, backend, scale)


def test_scores_far_apart_leave_one_weight() -> None:
    case = ragged_case(2, [(40, 3), (7, 1)], heads=(2, 1), size=16, value_size=16)
    out, lse = ragged_attention(case[0] * 1e4, *case[1:], backend="numba")
    expected, expected_lse = attended(case[0] * 1e4, *case[1:])
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0, rtol=1e-6)


@given(rows=rows_, heads=groups, size=sizes, seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_both_forms_agree(rows: list[Row], heads: tuple[int, int], size: int, seed: int) -> None:
    case = ragged_case(seed, rows, heads=heads, size=size, value_size=size, padding=2)
    for one, other in zip(*(ragged_attention(*case, backend=form) for form in ("numba", "torch")), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
@given(rows=rows_, heads=groups, size=sizes, seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_rows_alone_give_the_same_bits(
    kinds: tuple[torch.dtype, torch.dtype], rows: list[Row], heads: tuple[int, int], size: int, seed: int
) -> None:
    query, keys, values, *more = ragged_case(seed, rows, heads=heads, size=size, value_size=size, kinds=kinds)
    together = ragged_attention(query, keys, values, *more, backend="numba")
    for own, row in parts(rows):
        alone = ragged_attention(query[own], keys, values, *(x[row] for x in more), backend="numba")
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part, whole[own])


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_rows_alone_give_the_same_bits_though_together_they_are_worth_more_threads(number: int, threads: None) -> None:
    rows = [(200, 40), (13, 7), (150, 33), (0, 1), (90, 1)]
    query, keys, values, *more = ragged_case(0, rows, heads=(12, 3), size=20, value_size=20)
    torch.set_num_threads(number)
    together = ragged_attention(query, keys, values, *more, backend="numba")
    torch.set_num_threads(1)
    for own, row in parts(rows):
        alone = ragged_attention(query[own], keys, values, *(x[row] for x in more), backend="numba")
        assert torch.equal(alone[0], together[0][own]) and torch.equal(alone[1], together[1][own])


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
@pytest.mark.parametrize("size", [4, 20, 64])
@pytest.mark.parametrize(
    "rows", [[(0, 1)], [(3, 1), (90, 1), (17, 1)], [(5, 33), (0, 7), (100, 1)], [(40, 203)]], ids=str
)
def test_the_number_of_threads_changes_no_bit(
    kinds: tuple[torch.dtype, torch.dtype], size: int, rows: list[Row], threads: None
) -> None:
    case = ragged_case(3, rows, heads=(6, 2), size=size, value_size=size, kinds=kinds, padding=1)
    torch.set_num_threads(1)
    expected = ragged_attention(*case, backend="numba")
    for number in (2, 3, 5):
        torch.set_num_threads(number)
        for _ in range(2):
            for one, other in zip(ragged_attention(*case, backend="numba"), expected, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_padding_gives_zeros_and_no_mass(backend: Backend, threads: None) -> None:
    case = ragged_case(4, [(0, 3), (30, 1)], heads=(2, 2), size=16, value_size=20, padding=5)
    case[0][4:] = torch.nan
    torch.set_num_threads(2)
    out, lse = ragged_attention(*case, backend=backend)
    assert out[:4].isfinite().all() and not out[4:].any()
    assert lse[:4].isfinite().all() and (lse[4:] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_no_rows_are_all_padding(backend: Backend) -> None:
    query, keys, values, tables, starts, counts = ragged_case(5, [(0, 3)], heads=(2, 2), size=16, value_size=16)
    out, lse = ragged_attention(query, keys, values, tables[:0], starts[:0], counts[:0], backend=backend)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
def test_nan_of_a_row_shows_in_that_row_alone(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    query, keys, values, *more = ragged_case(6, [(20, 9), (20, 9)], heads=(2, 1), size=16, value_size=16, kinds=kinds)
    keys[more[0][0, 0], 0, 3] = torch.nan
    for backend in ("torch", "numba"):
        out, lse = ragged_attention(query, keys, values, *more, backend=backend)  # type: ignore[arg-type]
        assert out[9:].isfinite().all() and lse[9:].isfinite().all()
        assert out[:9].isnan().all() and lse[:9].isnan().all(), backend


def test_other_memory_is_for_the_torch_form() -> None:
    case = ragged_case(7, [(20, 9), (3, 1)], heads=(4, 2), size=16, value_size=16)
    query, keys, values, *more = case
    expected = ragged_attention(*case, backend="torch")
    for layout in ((keys.contiguous(), values), (keys, values.mT.contiguous().mT)):
        for one, other in zip(ragged_attention(query, *layout, *more), expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6)
        with pytest.raises(UsageError, match="use backend 'auto'"):
            ragged_attention(query, *layout, *more, backend="numba")


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_queries_that_are_a_part_of_other_memory_are_read_rightly(backend: Backend) -> None:
    query, *more = ragged_case(8, [(20, 9), (3, 1)], heads=(4, 2), size=16, value_size=16)
    wide = torch.full((len(query), 7, 16), torch.nan)
    wide[:, 1:5] = query
    assert_attends((wide[:, 1:5], *more), backend)


@pytest.mark.parametrize("kinds", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_mixed_types_give_what_the_torch_form_gives(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    case = ragged_case(9, [(20, 9), (3, 1)], heads=(4, 2), size=16, value_size=16, kinds=kinds)
    expected, _ = attended(*case)
    out, _ = ragged_attention(*case)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_what_does_not_fit_is_refused(backend: Backend) -> None:
    query, keys, values, tables, starts, counts = ragged_case(1, [(3, 2)] * 2, heads=(4, 2), size=16, value_size=16)
    for wrong in (
        (query[:, :3], keys, values, tables, starts, counts),
        (query[0], keys, values, tables, starts, counts),
        (query, keys[0], values, tables, starts, counts),
        (query, keys, values, tables[:1], starts, counts),
    ):
        with pytest.raises(UsageError, match="Hk dividing Hq"):
            ragged_attention(*wrong, backend=backend)
