"""Attention over blocks of keys and values.

- ``ragged_attention``: the last tokens, one or many, of each sequence over its blocks.
- ``merge_lse``: attention over two sets of keys from attention over each.
- ``paged_decode``: one query per sequence over its blocks.
- ``cascade_decode``: likewise, reading a prefix that several sequences share once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .dispatch import Backend, resolve
from .paged import has_numba_form


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
    wide = torch.promote_types(_statistics(query).dtype, _statistics(keys).dtype)
    k, v = (blocks[tables.clamp_min(0)].transpose(1, 2).flatten(2, 3).to(wide) for blocks in (keys, values))
    q = query.to(wide).unflatten(1, (heads, -1)) * scale
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


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last ``counts[i]`` tokens of each sequence, which its blocks hold already.

    The numba form reads blocks of 16 positions that are innermost in memory, as ``PagedKV`` keeps them on a CPU; it
    does without padding and gathering, and shares long calls among torch's number of threads.

    Args:
        query: [T, Hq, D], row after row; those beyond the sum of ``counts`` are padding, and give zeros.
        keys: [N, Hk, block, D].
        values: [N, Hk, block, Dv].
        tables: int64[n, W] on the CPU, the blocks of each row; entries that no position needs may hold anything.
        starts: int64[n] on the CPU, tokens before the queries.
        counts: int64[n] on the CPU, at least 1.
        scale: of the scores; 1 / sqrt(D) by default.
        backend: "torch", "numba" or "auto".

    Returns:
        out [T, Hq, Dv] in the type of ``query`` and the log-sum-exps [T, Hq] in fp32, float64 for float64.

    Raises:
        UsageError: shapes do not fit.
    """
    rows = len(starts)
    if query.dim() != 3 or keys.dim() != 4 or tables.shape[:1] != (rows,) or query.shape[1] % keys.shape[1]:
        raise UsageError(
            f"ragged_attention: query {tuple(query.shape)}, keys {tuple(keys.shape)}, tables {tuple(tables.shape)} for "
            f"{rows} rows; expected [T, Hq, D], [N, Hk, block, D] with Hk dividing Hq, and [rows, W]"
        )
    scale = query.shape[2] ** -0.5 if scale is None else scale
    total = int(counts.sum())
    if total > len(query):
        raise UsageError(f"ragged_attention: {len(query)} queries; expected the sum of counts, {total}, or more")
    if resolve(backend, query, keys, values, numba=has_numba_form(query, keys, values)) == "numba":
        return _ragged_numba(query, keys, values, tables, starts, counts, total, scale)
    out = query.new_empty(*query.shape[:2], values.shape[3])
    lse = _statistics(query.new_empty(0)).new_empty(query.shape[:2])
    out[total:], lse[total:] = 0, -torch.inf
    first = 0
    for table, start, count in zip(tables, starts.tolist(), counts.tolist(), strict=True):
        own = slice(first, first + count)
        first += count
        blocks = table[: -(-(start + count) // keys.shape[2])].to(keys.device).expand(count, -1)
        lengths = torch.arange(start, start + count, device=keys.device) + 1
        out[own], lse[own] = paged_decode(query[own], keys, values, blocks, lengths, scale=scale, backend="torch")
    return out, lse


def _ragged_numba(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    counts: Tensor,
    total: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from ._numba import paged
    from ._numba.arrays import as_array, shares, together

    wide = _statistics(query).contiguous()
    out = wide.new_empty(*query.shape[:2], values.shape[3])
    lse = wide.new_empty(query.shape[:2])
    arrays = [as_array(part) for part in (wide, keys.mT, values, tables.contiguous(), starts, counts)]
    written = as_array(out), as_array(lse)
    factor = arrays[0].dtype.type(scale)
    begins, numbers = arrays[4:6]
    out[total:], lse[total:] = 0, -torch.inf
    keys_read = float(numbers @ (begins + (numbers + 1) / 2))
    cuts = [0, total]
    threads = shares(2 * keys_read * query.shape[1] * query.shape[2])
    if threads > 1:
        # Queries of a row count as its mean one. Cuts are where the kernel begins anew anyway, so they change no bit.
        cost = np.repeat(begins + (numbers + 1) / 2, numbers).cumsum()
        inside = np.arange(total) - np.repeat(numbers.cumsum() - numbers, numbers)
        places = np.flatnonzero(inside % paged.QUERIES == 0)
        shares_of_cost = keys_read * np.arange(1, threads) / threads
        cuts[1:1] = places[np.searchsorted(cost[places], shares_of_cost).clip(max=len(places) - 1)].tolist()
    attend: Any = paged.attend
    together([partial(attend, *arrays, factor, a, b, *written) for a, b in pairwise(cuts)])
    return out.to(query.dtype), lse


def _statistics(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
