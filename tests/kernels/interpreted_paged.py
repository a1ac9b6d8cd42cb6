"""Claims about the Triton form of decoding attention; run by ``test_paged_triton.py``."""

import pytest
import torch

from agentropy.kernels import paged_attention as paged
from agentropy.kernels._triton import paged as form
from tests.kernels.test_paged import attended, paged_case


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("size", [16, 24, 64])
def check_decoding_is_attention_over_the_table(heads: tuple[int, int], size: int) -> None:
    seed = int(torch.seed() % 2**31)
    print(f"seed {seed}")
    case = paged_case(seed, rows=5, heads=heads, size=size, width=9)
    starts = torch.tensor([0, 3, 0, 17, 5])
    for begin in (None, starts):
        out, lse = paged.paged_decode(*case, starts=begin, backend="triton")
        expected, expected_lse = attended(*case, starts=begin)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=2e-6)


def check_splits_and_tiles_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "SPLIT", 64)
    monkeypatch.setattr(form, "ROWS", 16)
    case = paged_case(3, rows=6, heads=(6, 2), size=16, width=20)
    out, lse = paged.paged_decode(*case, backend="triton")
    expected, expected_lse = attended(*case)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=2e-6)


def check_rows_without_positions_are_zero() -> None:
    query, keys, values, tables, lengths = paged_case(4, rows=3, heads=(2, 2), size=16, width=4)
    out, lse = paged.paged_decode(query, keys, values, tables, lengths, starts=lengths, backend="triton")
    assert not out.any() and (lse == -torch.inf).all()


def check_a_prefix_read_once_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "SPLIT", 64)
    query, keys, values, tables, lengths = paged_case(5, rows=9, heads=(6, 2), size=16, width=8)
    tables[1:6, :3] = tables[0, :3]
    tables[7:, :2] = tables[6, :2]
    lengths.clamp_(min=49)
    groups, shared = [6, 1, 2], [48, 0, 0]
    out = paged.cascade_decode(query, keys, values, tables, lengths, groups, shared, backend="triton")
    expected, _ = attended(query, keys, values, tables, lengths)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
