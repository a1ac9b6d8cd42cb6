"""Attention of one query per sequence over blocks of keys and values.

- ``merge_lse``: attention over two sets of keys from attention over each.
- ``paged_decode``: one query per sequence over its blocks.
- ``cascade_decode``: likewise, reading a prefix that several sequences share once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from .dispatch import Backend, resolve


def merge_lse(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys: outputs [..., D] with log-sum-exps [...] of their scores.

    A set without keys has a log-sum-exp of -inf and any finite output. Statistics are float32, float64 if given.
    """
    top = torch.maximum(lse_a, lse_b)
    base = top.clamp_min(torch.finfo(top.dtype).min)
    weight_a, weight_b = (lse_a - base).exp(), (lse_b - base).exp()
    total = weight_a + weight_b
    share = torch.where(total > 0, weight_b / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    merged = torch.lerp(a.to(share.dtype), b.to(share.dtype), share[..., None])
    return merged.to(a.dtype), base + total.log()


def paged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence over its blocks; returns out [B, Hq, D] and lse [B, Hq].

    Args:
        query: [B, Hq, D]; Hq is a multiple of the key heads.
        keys: [N, Hk, block, D]; ``values`` likewise.
        values: [N, Hk, block, Dv].
        tables: int64[B, W], the block of every place; entries that no position needs may hold any valid block.
        lengths: int64[B]; positions ``starts`` to ``lengths`` are read.
        starts: int64[B], 0 if left out. A row with no positions gives zeros and -inf.
        scale: of the scores; 1 / sqrt(D) by default.
        backend: "torch", "triton" or "auto".

    Raises:
        UsageError: shapes do not fit.
    """
    if query.dim() != 3 or keys.dim() != 4 or tables.shape[:1] != query.shape[:1] or query.shape[1] % keys.shape[1]:
        raise UsageError(
            f"paged_decode: query {tuple(query.shape)}, keys {tuple(keys.shape)}, tables {tuple(tables.shape)}; "
            "expected [B, Hq, D], [N, Hk, block, D] with Hk dividing Hq, and [B, W]"
        )
    scale = query.shape[2] ** -0.5 if scale is None else scale
    starts = torch.zeros_like(lengths) if starts is None else starts
    if resolve(backend, query, keys, values) == "triton":
        from ._triton.paged import decode

        rows = torch.arange(len(query), device=query.device)
        return decode(query, keys, values, tables, starts, lengths, rows, rows, torch.ones_like(rows), 1, scale)
    reach = torch.arange(tables.shape[1] * keys.shape[2], device=query.device)
    seen = (reach >= starts[:, None]) & (reach < lengths[:, None])
    heads = keys.shape[1]
    k = _statistics(keys[tables.clamp_min(0)].transpose(1, 2).flatten(2, 3))
    v = _statistics(values[tables.clamp_min(0)].transpose(1, 2).flatten(2, 3))
    q = _statistics(query).unflatten(1, (heads, -1)) * scale
    scores = (q @ k.transpose(2, 3)).masked_fill(~seen[:, None, None], -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    return (weights @ v).flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def cascade_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    groups: Sequence[int],
    shared: Sequence[int],
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``paged_decode`` whose rows share prefixes: each prefix is read once for its group; returns [B, Hq, D].

    Args:
        query: [B, Hq, D]; rows of one group are neighbours. The other tensors as in ``paged_decode``.
        keys: [N, Hk, block, D].
        values: [N, Hk, block, Dv].
        tables: int64[B, W].
        lengths: int64[B].
        groups: rows of each group; they sum to B.
        shared: per group the tokens that all its tables share, a multiple of the block size or 0.
        scale: of the scores.
        backend: "torch", "triton" or "auto".

    Raises:
        UsageError: the groups do not cover the rows, or a prefix ends inside a block.
    """
    block = keys.shape[2]
    if sum(groups) != len(query) or len(groups) != len(shared) or any(length % block for length in shared):
        raise UsageError(
            f"cascade_decode: groups {list(groups)} and shared {list(shared)} for {len(query)} rows; "
            f"expected sizes that sum to the rows, and multiples of the block size {block}"
        )
    scale = query.shape[2] ** -0.5 if scale is None else scale
    device = query.device
    sizes = torch.tensor(groups, device=device)
    prefix = torch.tensor(shared, device=device)
    firsts = sizes.cumsum(0) - sizes
    starts = prefix.repeat_interleave(sizes, output_size=len(query))
    tail, tail_lse = paged_decode(query, keys, values, tables, lengths, starts=starts, scale=scale, backend=backend)
    if resolve(backend, query, keys, values) == "triton":
        from ._triton.paged import decode

        order, nothing = torch.arange(len(query), device=device), torch.zeros_like(prefix)
        items = tables[firsts], nothing, prefix, order, firsts, sizes
        head, head_lse = decode(query, keys, values, *items, max(groups), scale)
        return merge_lse(head, head_lse, tail, tail_lse)[0]
    # The rows of a group stand as query heads of one sequence.
    head, head_lse = torch.zeros_like(tail), torch.full_like(tail_lse, -torch.inf)
    heads, first = keys.shape[1], 0
    for number, (size, length) in enumerate(zip(groups, shared, strict=True)):
        rows = slice(first, first + size)
        first += size
        if size and length:
            stacked = query[rows].unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2).flatten(0, 1)[None]
            out, lse = paged_decode(
                stacked,
                keys,
                values,
                tables[rows][:1, : length // block],
                prefix[number : number + 1],
                scale=scale,
                backend="torch",
            )
            head[rows] = out.view(heads, size, -1, out.shape[2]).transpose(0, 1).flatten(1, 2)
            head_lse[rows] = lse.view(heads, size, -1).transpose(0, 1).flatten(1, 2)
    return merge_lse(head, head_lse, tail, tail_lse)[0]


def _statistics(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
