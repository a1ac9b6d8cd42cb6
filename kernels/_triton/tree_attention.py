"""Attention over packed trees on the GPU: tiles that no query sees are never visited.

- ``tree_attention``: as ``kernels.tree_attention``, over ``end``.
- ``Tiles``, ``visible_tiles``: which tiles of keys each tile of queries visits, and the reverse.
- ``forward_kernel``: one tile of queries over its keys.
- ``query_kernel``, ``key_kernel``: gradients of a tile of queries, and of a tile of keys. Each sums in its own fixed
  order, so there are no atomics and results repeat to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import UsageError
from ..dispatch import interpreted

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """Sizes of a program's tiles of queries and keys, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = {
    (2, 32): Config(128, 128, 8, 2),
    (2, 64): Config(128, 128, 8, 2),
    (2, 128): Config(128, 128, 8, 2),
    (4, 32): Config(64, 64, 4, 2),
    (4, 64): Config(64, 64, 8, 1),
    (4, 128): Config(32, 32, 8, 1),
}
"""By bytes per input and the head size, rounded up; none of them spills registers on sm_90."""

BACKWARD = {
    (2, 32): Config(64, 128, 8, 2),
    (2, 64): Config(64, 128, 8, 2),
    (2, 128): Config(64, 64, 8, 2),
    (4, 32): Config(32, 32, 4, 1),
    (4, 64): Config(32, 32, 8, 1),
    (4, 128): Config(32, 16, 8, 1),
}


class Tiles(NamedTuple):
    """Tiles to visit, int32: the first ``count`` of each row of ``order``, in ascending order."""

    key_count: Tensor
    key_order: Tensor
    """[tiles of queries, tiles of keys]."""
    query_count: Tensor
    query_order: Tensor
    """[tiles of keys, tiles of queries]."""


def visible_tiles(end: Tensor, queries: int, keys: int) -> Tiles:
    """Return the tiles with a visible pair, or that may have one, for tiles of these sizes; nothing waits for them.

    A tile of keys may be seen from a tile of queries if it begins no later than the queries end, and one of its
    subtrees ends after the queries begin.
    """
    total = end.shape[0]
    first_query = torch.arange(0, total, queries, device=end.device)
    first_key = torch.arange(0, total, keys, device=end.device)
    reach = torch.nn.functional.pad(end, (0, -total % keys)).view(-1, keys).amax(dim=1)
    visible = (first_key[None, :] < first_query[:, None] + queries) & (reach[None, :] > first_query[:, None])
    return Tiles(*_listed(visible), *_listed(visible.T))


def _listed(visible: Tensor) -> tuple[Tensor, Tensor]:
    # Results of a sort are laid out as its input is, which may be transposed.
    order = torch.sort(~visible, dim=1, stable=True).indices
    return visible.sum(dim=1, dtype=torch.int32), order.to(torch.int32).contiguous()


@triton.jit
def _tile(x, rows, stride, total, UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head, [rows, BLOCK_D], zero beyond what exists."""
    d = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < total
    if BLOCK_D > D:
        mask = mask & (d[None, :] < D)
    values = tl.load(x + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)
    if UPCAST:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(x, values, rows, stride, total, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < total
    if BLOCK_D > D:
        mask = mask & (d[None, :] < D)
    tl.store(x + rows.to(tl.int64)[:, None] * stride + d[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    end,
    out,
    lse,
    count,
    order,
    total,
    heads,
    key_tiles,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """``scale`` includes log2(e): exponentials are powers of two. ``out`` [T, H, DV] and ``lse`` [T, H] are dense."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    a = _tile(q + head * q_head, rows, q_token, total, UPCAST, D, BLOCK_D)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    mass = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK_DV], tl.float32)
    for i in range(0, tl.load(count + tile)):
        columns = tl.load(order + tile.to(tl.int64) * key_tiles + i) * KEYS + tl.arange(0, KEYS)
        b = _tile(k + (head // GROUP) * k_head, columns, k_token, total, UPCAST, D, BLOCK_D)
        ends = tl.load(end + columns, mask=columns < total, other=0)
        z = tl.dot(a, tl.trans(b), input_precision="ieee") * scale
        seen = (columns[None, :] <= rows[:, None]) & (rows[:, None] < ends[None, :])
        z = tl.where(seen, z, float("-inf"))
        highest = tl.maximum(top, tl.max(z, 1))
        # A query may see nothing of its first tiles.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(z - shift[:, None])
        decay = tl.exp2(top - shift)
        c = _tile(v + (head // GROUP) * v_head, columns, v_token, total, UPCAST, DV, BLOCK_DV)
        mass = mass * decay + tl.sum(p, 1)
        sums = tl.dot(p.to(c.dtype), c, sums * decay[:, None], input_precision="ieee")
        top = highest
    mass = tl.where(rows < total, mass, 1.0)
    _store(out + head * DV, sums / mass[:, None], rows, heads * DV, total, DV, BLOCK_DV)
    where = lse + rows.to(tl.int64) * heads + head
    tl.store(where, (top + tl.log2(mass)) / 1.4426950408889634, mask=rows < total)


@triton.jit
def query_kernel(
    grad,
    q,
    k,
    v,
    end,
    lse,
    delta,
    dq,
    count,
    order,
    total,
    heads,
    key_tiles,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dq = sum over keys of p (dO v - delta) k scale; ``grad`` and ``dq`` are dense."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    a = _tile(q + head * q_head, rows, q_token, total, UPCAST, D, BLOCK_D)
    g = _tile(grad + head * DV, rows, heads * DV, total, UPCAST, DV, BLOCK_DV)
    at = rows.to(tl.int64) * heads + head
    log_mass = tl.load(lse + at, mask=rows < total, other=0.0) * 1.4426950408889634
    mean = tl.load(delta + at, mask=rows < total, other=0.0)
    total_a = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for i in range(0, tl.load(count + tile)):
        columns = tl.load(order + tile.to(tl.int64) * key_tiles + i) * KEYS + tl.arange(0, KEYS)
        b = _tile(k + (head // GROUP) * k_head, columns, k_token, total, UPCAST, D, BLOCK_D)
        c = _tile(v + (head // GROUP) * v_head, columns, v_token, total, UPCAST, DV, BLOCK_DV)
        ends = tl.load(end + columns, mask=columns < total, other=0)
        z = tl.dot(a, tl.trans(b), input_precision="ieee") * (scale * 1.4426950408889634)
        seen = (columns[None, :] <= rows[:, None]) & (rows[:, None] < ends[None, :])
        p = tl.where(seen, tl.exp2(z - log_mass[:, None]), 0.0)
        dz = p * (tl.dot(g, tl.trans(c), input_precision="ieee") - mean[:, None])
        total_a = tl.dot(dz.to(b.dtype), b, total_a, input_precision="ieee")
    _store(dq + head * D, total_a * scale, rows, heads * D, total, D, BLOCK_D)


@triton.jit
def key_kernel(
    grad,
    q,
    k,
    v,
    end,
    lse,
    delta,
    dk,
    dv,
    count,
    order,
    total,
    heads,
    query_tiles,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dv = sum over queries of p dO, dk = sum of p (dO v - delta) q scale, over all query heads of the key head."""
    tile = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    columns = tile * KEYS + tl.arange(0, KEYS)
    b = _tile(k + key_head * k_head, columns, k_token, total, UPCAST, D, BLOCK_D)
    c = _tile(v + key_head * v_head, columns, v_token, total, UPCAST, DV, BLOCK_DV)
    ends = tl.load(end + columns, mask=columns < total, other=0)
    total_b = tl.zeros([KEYS, BLOCK_D], tl.float32)
    total_c = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    visits = tl.load(count + tile)
    for i in range(0, visits * GROUP):
        head = key_head * GROUP + i // visits
        rows = tl.load(order + tile.to(tl.int64) * query_tiles + i % visits) * QUERIES + tl.arange(0, QUERIES)
        a = _tile(q + head * q_head, rows, q_token, total, UPCAST, D, BLOCK_D)
        g = _tile(grad + head * DV, rows, heads * DV, total, UPCAST, DV, BLOCK_DV)
        at = rows.to(tl.int64) * heads + head
        log_mass = tl.load(lse + at, mask=rows < total, other=0.0) * 1.4426950408889634
        mean = tl.load(delta + at, mask=rows < total, other=0.0)
        z = tl.dot(b, tl.trans(a), input_precision="ieee") * (scale * 1.4426950408889634)
        seen = (columns[:, None] <= rows[None, :]) & (rows[None, :] < ends[:, None])
        p = tl.where(seen, tl.exp2(z - log_mass[None, :]), 0.0)
        total_c = tl.dot(p.to(g.dtype), g, total_c, input_precision="ieee")
        dz = p * (tl.dot(c, tl.trans(g), input_precision="ieee") - mean[None, :])
        total_b = tl.dot(dz.to(a.dtype), a, total_b, input_precision="ieee")
    key_heads = heads // GROUP
    _store(dk + key_head * D, total_b * scale, columns, key_heads * D, total, D, BLOCK_D)
    _store(dv + key_head * DV, total_c, columns, key_heads * DV, total, DV, BLOCK_DV)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float, tiles: dict[tuple[int, int], Tiles]
) -> tuple[Tensor, Tensor]:
    """As ``kernels.tree_attention``; ``tiles`` keeps what depends on ``end`` alone from call to call.

    Raises:
        UsageError: head sizes above 128, or float64.
    """
    if max(q.shape[2], v.shape[2]) > 128 or q.dtype == torch.float64:
        raise UsageError(
            f"tree_attention: heads of {q.shape[2]} and {v.shape[2]} in {q.dtype}; the Triton form takes heads of at "
            "most 128 in fp32, bfloat16 or float16: use backend 'torch'"
        )
    return _TreeAttention.apply(q, k, v, end, scale, tiles)


def config_of(table: dict[tuple[int, int], Config], q: Tensor, v: Tensor) -> Config:
    """Return the sizes that fit the wider head."""
    wide = max(32, triton.next_power_of_2(max(q.shape[2], v.shape[2])))
    return table[q.element_size(), wide]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float, tiles: dict[tuple[int, int], Tiles]
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        total, heads = q.shape[:2]
        out = q.new_empty((total, heads, v.shape[2]))
        lse = q.new_empty((total, heads), dtype=torch.float32)
        config = config_of(FORWARD, q, v)
        if total:
            found = _tiles(tiles, end, config)
            forward_kernel[(found.key_order.shape[0], heads)](
                q, k, v, end, out, lse, found.key_count, found.key_order, total, heads, found.key_order.shape[1],
                scale * LOG2E, *_strides(q, k, v), **_constants(q, k, v, config),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, end, out, lse)
        ctx.scale, ctx.tiles = scale, tiles
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, end, out, lse = ctx.saved_tensors
        total, heads = q.shape[:2]
        grad = grad.contiguous()
        delta = (grad.float() * out).sum(dim=-1)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        config = config_of(BACKWARD, q, v)
        if total:
            found = _tiles(ctx.tiles, end, config)
            strides, constants = _strides(q, k, v), _constants(q, k, v, config)
            query_tiles, key_tiles = found.key_order.shape
            query_kernel[(query_tiles, heads)](
                grad, q, k, v, end, lse, delta, dq, found.key_count, found.key_order, total, heads, key_tiles,
                ctx.scale, *strides, **constants,
            )  # fmt: skip
            key_kernel[(key_tiles, k.shape[1])](
                grad, q, k, v, end, lse, delta, dk, dv, found.query_count, found.query_order, total, heads,
                query_tiles, ctx.scale, *strides, **constants,
            )  # fmt: skip
        return dq, dk, dv, None, None, None


def _tiles(tiles: dict[tuple[int, int], Tiles], end: Tensor, config: Config) -> Tiles:
    sizes = (config.queries, config.keys)
    if sizes not in tiles:
        tiles[sizes] = visible_tiles(end, *sizes)
    return tiles[sizes]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(q: Tensor, k: Tensor, v: Tensor, config: Config) -> dict[str, Any]:
    return {
        "UPCAST": interpreted(),
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[2])),
        "BLOCK_DV": max(16, triton.next_power_of_2(v.shape[2])),
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
