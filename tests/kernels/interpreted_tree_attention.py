"""Claims about the Triton form of tree attention; run by ``test_tree_attention_triton.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agentropy.kernels._triton import tree_attention as kernels
from agentropy.kernels._triton.tree_attention import Config, visible_tiles
from agentropy.kernels.tree_attention import tree_attention
from agentropy.kernels.trees import TreePack, pack_tree, tree_mask


def forest(seed: int, longest: int = 6) -> TreePack:
    """Three random trees of up to three levels."""
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []

    def grow(row: np.ndarray, left: int) -> None:
        row = np.append(row, rng.integers(0, 50, rng.integers(1, longest + 1)))
        if not left:
            rows.append(row)
        for _ in range(rng.integers(1, 4) if left else 0):
            grow(row, left - 1)

    for _ in range(3):
        grow(np.zeros(0, int), 2)
    return pack_tree(rows)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, none of which the rows fit, in a tree that the interpreter gets through."""
    for name, sizes in (("FORWARD", (16, 32)), ("BACKWARD", (32, 16))):
        monkeypatch.setattr(kernels, name, dict.fromkeys(getattr(kernels, name), Config(*sizes, 4, 1)))


def reference(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~tree_mask(end), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


@pytest.mark.parametrize(
    ("seed", "heads", "sizes", "offset"),
    [(0, (4, 2), (16, 16), 0.0), (1, (3, 1), (24, 40), 0.0), (2, (1, 1), (16, 16), 50.0)],
)
def check_out_and_gradients_equal_dense_attention_in_float64(
    seed: int, heads: tuple[int, int], sizes: tuple[int, int], offset: float
) -> None:
    pack = forest(seed)
    generator = torch.Generator().manual_seed(seed)
    total = len(pack.end)
    shapes = [(heads[0], total, sizes[0]), (heads[1], total, sizes[0]), (heads[1], total, sizes[1])]
    # As transformers hands them over: heads first in memory.
    inputs = [torch.randn(shape, generator=generator).transpose(0, 1).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    # A large offset of all products: statistics must not overflow.
    inputs[0].data[..., 0] = exact[0].data[..., 0] = offset
    inputs[1].data[..., 0] = exact[1].data[..., 0] = 1.0

    out, lse = tree_attention(*inputs, pack, scale=0.3, backend="triton")
    expected, expected_lse = reference(*exact, pack.end, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)
    upstream = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-6


def check_both_forms_agree_and_results_repeat_to_the_bit() -> None:
    pack = forest(4, longest=5)
    inputs = [torch.randn(len(pack.end), heads, 16, requires_grad=True) for heads in (2, 1, 1)]
    results = []
    for backend in ("triton", "triton", "torch"):
        out, lse = tree_attention(*inputs, pack, backend=backend)
        results.append([out, lse, *torch.autograd.grad(out.sum(), inputs)])
    for again, once, other in zip(*results, strict=True):
        assert torch.equal(again, once)
        torch.testing.assert_close(once, other, rtol=0, atol=1e-5)


def check_sixteen_bit_inputs_are_read_as_they_are() -> None:
    pack = forest(5)
    inputs = [torch.randn(len(pack.end), 2, 32).half() for _ in range(3)]
    out, _ = tree_attention(*inputs, pack, backend="triton")
    expected, _ = reference(*(x.double() for x in inputs), pack.end, 32**-0.5)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (16, 32), (32, 16), (128, 64)])
def check_tiles_that_are_visited_hold_all_visible_pairs_and_others_are_skipped(queries: int, keys: int) -> None:
    pack = forest(6, longest=40)
    tiles = visible_tiles(pack.end, queries, keys)
    mask = tree_mask(pack.end)
    shape = tiles.key_order.shape
    visited = torch.zeros(shape, dtype=torch.bool)
    for i in range(shape[0]):
        order = tiles.key_order[i, : tiles.key_count[i]].tolist()
        assert order == sorted(order)
        visited[i, order] = True
    for j in range(shape[1]):
        order = tiles.query_order[j, : tiles.query_count[j]].tolist()
        assert order == visited[:, j].nonzero()[:, 0].tolist()
    for i in range(shape[0]):
        for j in range(shape[1]):
            pairs = mask[i * queries : (i + 1) * queries, j * keys : (j + 1) * keys]
            assert visited[i, j] or not pairs.any()
    if keys == 16:
        assert float(visited.float().mean()) < 0.4, "the trees are apart: most tiles are hidden"


def check_an_empty_pack_and_wrong_heads() -> None:
    empty = torch.zeros(0, 2, 32)
    assert tree_attention(empty, empty, empty, pack_tree([]), backend="triton")[0].shape == (0, 2, 32)
    wide = torch.zeros(1, 1, 256)
    with pytest.raises(ValueError, match="at most 128"):
        tree_attention(wide, wide, wide, pack_tree([[1]]), backend="triton")
