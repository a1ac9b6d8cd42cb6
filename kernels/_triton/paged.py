"""Decoding attention over block tables, split over keys; rows that share a table stand as one tile of queries.

- ``decode``: the partial results of every split, joined by their log-sum-exps.
- ``decode_kernel``: what it launches; one program per item, tile of its rows, key head and split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted

KEYS = 64
"""Keys per step of a program."""
ROWS = 64
"""Most query rows of one program; at least 16, which a matrix product needs."""
SPLIT = 512
"""Positions per program, until there are ``SPLITS`` of them; decided by the table's width alone."""
SPLITS = 16
WARPS = 4
STAGES = 2


@triton.jit
def decode_kernel(
    query,
    keys,
    values,
    tables,
    starts,
    ends,
    order,
    firsts,
    counts,
    out,
    sums,
    scale,
    stride_query,
    stride_key_block,
    stride_key_head,
    stride_key,
    stride_value_block,
    stride_value_head,
    stride_value,
    stride_table,
    rows,
    query_heads,
    span,
    tiles,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Online softmax of M queries over one split's positions; statistics and sums are float32."""
    item = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.maximum(tl.load(starts + item), split * span)
    end = tl.minimum(tl.load(ends + item), (split + 1) * span)
    count = tl.load(counts + item)
    first = tl.load(firsts + item)

    m = tile * M + tl.arange(0, M)
    local = m // GROUP
    present = local < count
    row = tl.load(order + first + local, mask=present, other=0).to(tl.int64)
    query_head = head * GROUP + m % GROUP
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    at = query + row[:, None] * stride_query + query_head[:, None] * SIZE + d[None, :]
    q = tl.load(at, mask=present[:, None] & (d < SIZE)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)

    top = tl.full([M], -3e38, tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, DV], tl.float32)
    table = tables + item.to(tl.int64) * stride_table
    for base in range(start // N * N, end, N):
        n = base + tl.arange(0, N)
        seen = (n >= start) & (n < end)
        block = tl.load(table + n // BLOCK, mask=seen, other=0).to(tl.int64)
        inside = (n % BLOCK).to(tl.int64)
        key_at = keys + block * stride_key_block + head * stride_key_head + inside * stride_key
        k = tl.load(key_at[None, :] + d[:, None], mask=seen[None, :] & (d < SIZE)[:, None], other=0.0)
        value_at = values + block * stride_value_block + head * stride_value_head + inside * stride_value
        v = tl.load(value_at[:, None] + dv[None, :], mask=seen[:, None] & (dv < VALUE_SIZE)[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher

    place = (split.to(tl.int64) * rows + row) * query_heads + query_head
    some = total > 0
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    tl.store(out + place[:, None] * VALUE_SIZE + dv[None, :], mixed, mask=present[:, None] & (dv < VALUE_SIZE)[None, :])
    tl.store(sums + place, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=present)


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    ends: Tensor,
    order: Tensor,
    firsts: Tensor,
    counts: Tensor,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of the rows of each item over the item's table; returns out [B, Hq, Dv] and lse float32[B, Hq].

    Launches depend on shapes alone, so that the call can be captured in a CUDA graph.

    Args:
        query: [B, Hq, D].
        keys: [N, Hk, block, D].
        values: [N, Hk, block, Dv].
        tables: int64[I, W].
        starts: int64[I]; positions ``starts`` to ``ends`` are read.
        ends: int64[I].
        order: int64[B]; the rows of item i are ``counts[i]`` of them from ``firsts[i]`` on, every row in one item.
        firsts: int64[I].
        counts: int64[I], at most ``most``.
        most: rows of the largest item.
        scale: of the scores.
    """
    rows, heads, size = query.shape
    key_heads, block, value_size = values.shape[1:]
    query = query.contiguous()
    tables = tables.contiguous()
    group = heads // key_heads
    m = min(max(16, triton.next_power_of_2(most * group)), ROWS)
    tiles = triton.cdiv(most * group, m)
    width = tables.shape[1] * block
    splits = min(max(1, triton.cdiv(width, SPLIT)), SPLITS)
    span = triton.cdiv(triton.cdiv(width, splits), KEYS) * KEYS
    out = query.new_empty((splits, rows, heads, value_size), dtype=torch.float32)
    sums = query.new_empty((splits, rows, heads), dtype=torch.float32)
    decode_kernel[(len(tables) * tiles, key_heads, splits)](
        query,
        keys,
        values,
        tables,
        starts,
        ends,
        order,
        firsts,
        counts,
        out,
        sums,
        scale,
        query.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        tables.stride(0),
        rows,
        heads,
        span,
        tiles,
        GROUP=group,
        SIZE=size,
        VALUE_SIZE=value_size,
        BLOCK=block,
        M=m,
        N=KEYS,
        D=max(16, triton.next_power_of_2(size)),
        DV=max(16, triton.next_power_of_2(value_size)),
        UPCAST=interpreted(),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    lse = sums.logsumexp(dim=0)
    weights = (sums - lse.clamp_min(torch.finfo(torch.float32).min)).exp()
    return (out * weights[..., None]).sum(dim=0).to(query.dtype), lse
