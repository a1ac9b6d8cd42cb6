"""Attention over block tables on a CPU: one call for ragged rows of one or many queries.

- ``attend``: softmax attention of packed queries.
- ``rotate_and_store``: rotary positions, and keys and values to their places.

Keys lie with the 16 positions of a block innermost, so that the scores of a block are sums of weighted rows of 16
numbers, as its share of the output is: one vector, or two, per step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .scalars import exp, kernel, narrow, prefetch, weighted_rows, widen

QUERIES = 8
"""Queries of a row that read a block while it is in the nearest cache."""


@kernel
def _softmax(row: Any, seen: int, width: int, scale: Any, lanes: Any) -> Any:
    """Weights of the first ``seen`` scores in place, zeros up to ``width``; returns the log-sum-exp of their scaled."""
    for j in range(seen, width):
        row[j] = -np.inf
    # In lanes: numba's maximum over an array is not vector code.
    for j in range(16):
        lanes[j] = row[j]
    for b in range(16, width, 16):
        for j in range(16):
            lanes[j] = row[b + j] if row[b + j] > lanes[j] else lanes[j]
    top = lanes[0]
    for j in range(1, 16):
        top = max(top, lanes[j])
    total = row[0] * 0
    for j in range(seen):
        weight = exp((row[j] - top) * scale)
        row[j] = weight
        total += weight
    share = 1 / total
    for j in range(seen):
        row[j] *= share
    for j in range(seen, width):
        row[j] = 0
    return top * scale + math.log(total)


@kernel
def attend(
    query: Any,
    keys: Any,
    values: Any,
    tables: Any,
    starts: Any,
    counts: Any,
    scale: Any,
    first: int,
    last: int,
    out: Any,
    lse: Any,
) -> None:
    """Attention of the packed queries ``first`` to ``last``; every row's own part is the same however they are cut.

    Args:
        query: [T, Hq, D], the last ``counts[i]`` tokens of each row, row after row.
        keys: [N, Hk, D, 16], positions innermost; int16 holds bfloat16.
        values: [N, Hk, 16, Dv].
        tables: int64[n, W], the blocks of each row.
        starts: int64[n], tokens before the queries.
        counts: int64[n].
        scale: of the scores.
        first: packed query.
        last: one past the last.
        out: [T, Hq, Dv], written.
        lse: [T, Hq], written.
    """
    heads, size = keys.shape[1], keys.shape[2]
    query_heads, value_size = query.shape[1], values.shape[3]
    group = query_heads // heads
    sixteenths = value_size // 16 * 16
    longest = 0
    for row in range(len(starts)):
        longest = max(longest, starts[row] + counts[row])
    width = (longest + 15) // 16 * 16
    scores = np.empty((QUERIES * query_heads, width), query.dtype)
    key_block, value_block = heads * size * 16, heads * value_size * 16
    lanes = np.empty(16, query.dtype)
    nothing = scale * 0
    one = nothing + 1
    begin = 0
    for row in range(len(starts)):
        table = tables[row]
        low, high = max(first - begin, 0), min(last - begin, counts[row])
        for at in range(low, high, QUERIES):
            number = min(QUERIES, high - at)
            blocks = (starts[row] + at + number + 15) // 16
            # One query: the heads that share a key head go together; several: each head's go together.
            together, runs = (group, group) if number == 1 else (1, number)
            q_stride, s_stride, o_stride = size, width, value_size
            if number > 1:
                q_stride, s_stride, o_stride = query_heads * size, query_heads * width, query_heads * value_size
            for b in range(blocks):
                if b + 1 < blocks:
                    prefetch(keys, table[b + 1] * key_block, key_block)
                else:
                    prefetch(values, table[0] * value_block, value_block)
                for head in range(heads):
                    k = (table[b] * heads + head) * size * 16
                    for g in range(head * group, (head + 1) * group, together):
                        s = g * width + b * 16
                        q = ((begin + at) * query_heads + g) * size
                        weighted_rows(scores, s, s_stride, query, q, q_stride, runs, keys, k, size, 16, nothing)
            for i in range(number):
                seen = starts[row] + at + i + 1
                for head in range(query_heads):
                    at_head = scores[i * query_heads + head]
                    lse[begin + at + i, head] = _softmax(at_head, seen, blocks * 16, scale, lanes)
            out[begin + at : begin + at + number] = 0
            for b in range(blocks):
                if b + 1 < blocks:
                    prefetch(values, table[b + 1] * value_block, value_block)
                for head in range(heads):
                    v = (table[b] * heads + head) * 16 * value_size
                    for g in range(head * group, (head + 1) * group, together):
                        s = g * width + b * 16
                        o = ((begin + at) * query_heads + g) * value_size
                        for d in range(0, sixteenths, 16):
                            weighted_rows(
                                out, o + d, o_stride, scores, s, s_stride, runs, values, v + d, 16, value_size, one
                            )
                    for i in range(number if sixteenths < value_size else 0):
                        for g in range(head * group, (head + 1) * group):
                            for j in range(16):
                                weight = scores[i * query_heads + g, b * 16 + j]
                                for d in range(sixteenths, value_size):
                                    out[begin + at + i, g, d] += weight * widen(values[table[b], head, j, d])
        begin += counts[row]


@kernel
def rotate_and_store(qkv: Any, rotation: Any, positions: Any, places: Any, keys: Any, values: Any, query: Any) -> None:
    """Turn queries and keys by their positions; write keys and values to the cache.

    Args:
        qkv: [T, Hq + 2 Hk, D]; rotary pairs are neighbours.
        rotation: [P, D], cosine and sine of each pair, neighbours.
        positions: int64[T].
        places: int64[T], block x 16 + offset.
        keys: [N, Hk, D, 16].
        values: [N, Hk, 16, D].
        query: [T, Hq, D], written.
    """
    query_heads, heads, size = query.shape[1], keys.shape[1], keys.shape[2]
    for t in range(len(qkv)):
        turn = rotation[positions[t]]
        block, offset = places[t] // 16, places[t] % 16
        for head in range(query_heads):
            x, y = qkv[t, head], query[t, head]
            for d in range(0, size, 2):
                a, b = widen(x[d]), widen(x[d + 1])
                y[d] = a * turn[d] - b * turn[d + 1]
                y[d + 1] = a * turn[d + 1] + b * turn[d]
        for head in range(heads):
            x, k, v = qkv[t, query_heads + head], keys[block, head], values[block, head]
            for d in range(0, size, 2):
                a, b = widen(x[d]), widen(x[d + 1])
                k[d, offset] = narrow(a * turn[d] - b * turn[d + 1], keys)
                k[d + 1, offset] = narrow(a * turn[d + 1] + b * turn[d], keys)
            x = qkv[t, query_heads + heads + head]
            for d in range(size):
                v[offset, d] = narrow(widen(x[d]), values)
