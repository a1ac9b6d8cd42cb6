"""Attention of packed tokens over the cache, planned once per pass for all layers.

- ``StripedAttention``: through views of stripes, without gathering keys; for the CPU.
- ``BlockAttention``: through block tables; for the GPU.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.paged import PagedKV
from ...kernels.paged_attention import merge_lse, paged_decode
from .generic import Array

_CALL_SECONDS = 1e-5
"""What one more attention call costs on a CPU."""
_BYTES_PER_SECOND = 1e10
"""At which keys and values are read by a decoding row."""
_REPEATED_WIDTH = 64
"""From so many new tokens per row on, keys are repeated for grouped heads instead of stacking the heads as queries."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Attention(Protocol):
    """Attention of query [T, Hq, D] over one layer's cached keys; returns [T, Hq x D]."""

    def __call__(self, layer: int, query: Tensor) -> Tensor: ...


class _Call(NamedTuple):
    """Rows in neighbouring stripes that one call serves: positions ``begin`` to ``end`` of each."""

    rows: int
    width: int
    causal: bool
    mask: Tensor | None
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class _Prefix(NamedTuple):
    """Tokens of several rows that all read the same positions of one stripe."""

    tokens: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class StripedAttention:
    """What a row wrote itself is one window of its stripe; rows whose windows fit together share a call.

    A prefix in another sequence's stripe is read once for all rows that share it (cascade; Juravsky et al. 2024),
    and merged with the rest by the log-sum-exps.
    """

    def __init__(self, kv: PagedKV, sequences: Array, starts: Array, counts: Array) -> None:
        """Plan for rows that read ``starts[i] + counts[i]`` tokens, of which the last ``counts[i]`` are queries."""
        self._kv = kv
        self._heads = kv.layers[0].heads
        homes = kv.home[sequences]
        width = -(-int((starts + counts).max()) // kv.block)
        tables = kv.tables[sequences, :width]
        foreign = (tables // kv.stripe != homes[:, None]) & (tables >= 0)
        begins = np.where(foreign.any(axis=1), (width - foreign[:, ::-1].argmax(axis=1)) * kv.block, 0)
        self._calls = self._join(homes, begins, starts, counts)
        self._sizes = [call.rows * call.width for call in self._calls]
        self._prefixes: list[_Prefix] = []
        if begins.any():
            self._share(tables, begins, counts)

    def _views(self, rows: slice, window: slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        kv = self._kv
        if kv.store is None:
            return tuple(k[rows, :, window] for k in kv.keys), tuple(v[rows, :, window] for v in kv.values)
        views = kv.store[:, rows, :, window].unbind()
        return views[: len(kv.keys)], views[len(kv.keys) :]

    def _join(self, homes: Array, begins: Array, starts: Array, counts: Array) -> list[_Call]:
        """A row joins its neighbour's call where padding costs less than a call of its own."""
        layer = self._kv.layers[0]
        position = layer.heads * (layer.key_size + layer.value_size) * self._kv.dtype.itemsize
        worth = _CALL_SECONDS * _BYTES_PER_SECOND / position
        ends = starts + counts
        firsts = [0]
        reach = padding = 0
        rows = list(zip(homes.tolist(), begins.tolist(), counts.tolist(), ends.tolist(), strict=True))
        for row, (home, begin, count, end) in enumerate(rows):
            if row:
                before = rows[row - 1]
                joins = home == before[0] + 1 and begin == before[1] and count == before[2]
                if joins and count > 1:
                    joins = end == before[3]
                elif joins:
                    longer = max(end, reach)
                    more = padding + (row - firsts[-1]) * (longer - reach) + longer - end
                    joins = more - padding <= worth
                    if joins:
                        reach, padding = longer, more
                if joins:
                    continue
                firsts.append(row)
            reach, padding = end, 0
        return [
            self._call(slice(first, last), homes, begins, starts, counts)
            for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True)
        ]

    def _call(self, rows: slice, homes: Array, begins: Array, starts: Array, counts: Array) -> _Call:
        home, begin, width = int(homes[rows.start]), int(begins[rows.start]), int(counts[rows.start])
        count = rows.stop - rows.start
        ends = (starts + counts)[rows]
        end = int(ends.max())
        mask, causal = None, width > 1 and int(starts[rows.start]) == begin
        if width > 1 and not causal:
            hidden = np.arange(begin, end) > np.arange(end - width, end)[:, None]
            mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))
        elif width == 1 and (ends != end).any():
            hidden = np.arange(begin, end) >= ends[:, None]
            mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))[:, None, None]
        keys, values = self._views(slice(home, home + count), slice(begin, end))
        return _Call(count, width, causal, None if mask is None else mask.to(self._kv.dtype), keys, values)

    def _share(self, tables: Array, begins: Array, counts: Array) -> None:
        """Group tokens by the windows of other stripes that their rows read."""
        kv = self._kv
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row in np.flatnonzero(begins).tolist():
            stripes = tables[row, : begins[row] // kv.block] // kv.stripe
            cuts = [0, *(np.flatnonzero(np.diff(stripes)) + 1).tolist(), len(stripes)]
            for a, b in pairwise(cuts):
                groups.setdefault((int(stripes[a]), a * kv.block, b * kv.block), []).append(row)
        lasts = counts.cumsum()
        for (stripe, begin, end), rows in groups.items():
            tokens = np.concatenate([np.arange(lasts[row] - counts[row], lasts[row]) for row in rows])
            keys, values = self._views(slice(stripe, stripe + 1), slice(begin, end))
            self._prefixes.append(_Prefix(torch.from_numpy(tokens), keys, values))

    def __call__(self, layer: int, query: Tensor) -> Tensor:
        """Attention of query [T, Hq, D]; returns [T, Hq x D]."""
        heads, size = self._heads, query.shape[2]
        group = query.shape[1] // heads
        parts, sums = [], []
        for call, q in zip(self._calls, query.split(self._sizes), strict=True):
            keys, values = call.keys[layer], call.values[layer]
            if call.width == 1:
                # The query heads of one key head stand as its query positions: keys are read once.
                out, lse = _flash(q.view(call.rows, heads, group, size), keys, values, attn_mask=call.mask)
                parts.append(out.reshape(call.rows, -1))
                sums.append(lse)
                continue
            q = q.view(call.rows, call.width, heads, group, size)
            mask = call.mask
            if group == 1 or call.width >= _REPEATED_WIDTH:
                if group > 1:
                    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
                q = q.flatten(2, 3).transpose(1, 2)
                out, lse = _flash(q, keys, values, 0.0, call.causal, attn_mask=mask)
                out, lse = out.transpose(1, 2), lse.transpose(1, 2)
            else:
                if mask is None:
                    mask = torch.full((call.width, call.width), -torch.inf, dtype=q.dtype).triu_(1)
                q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
                out, lse = _flash(q, keys, values, attn_mask=mask.repeat(group, 1))
                out = out.unflatten(2, (group, call.width)).permute(0, 3, 1, 2, 4)
                lse = lse.unflatten(2, (group, call.width)).permute(0, 3, 1, 2)
            parts.append(out.reshape(call.rows * call.width, -1))
            sums.append(lse)
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self._prefixes:
            return mixed
        mixed = mixed.view(len(query), heads * group, size)
        total = torch.cat([lse.reshape(-1, heads * group) for lse in sums])
        for tokens, all_keys, all_values in self._prefixes:
            # Every query of the group stands as a query position of one sequence.
            q = query[tokens].unflatten(1, (heads, group)).permute(1, 0, 2, 3).flatten(1, 2)[None]
            out, lse = _flash(q, all_keys[layer], all_values[layer])
            out = out[0].unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)
            lse = lse[0].unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)
            mixed[tokens], total[tokens] = merge_lse(mixed[tokens], total[tokens], out, lse)
        return mixed.flatten(1)


class BlockAttention:
    """Decoding rows go through ``paged_decode``; rows with more new tokens gather their keys into one padded call."""

    def __init__(self, kv: PagedKV, sequences: Array, starts: Array, counts: Array) -> None:
        """Plan for rows that read ``starts[i] + counts[i]`` tokens, of which the last ``counts[i]`` are queries."""
        self._kv = kv
        device = kv.device
        ends = counts.cumsum()
        single = np.flatnonzero(counts == 1)
        several = np.flatnonzero(counts > 1)
        self._single = torch.from_numpy(ends[single] - 1).to(device)
        self._tables = self._table(sequences[single], starts[single] + 1)
        self._lengths = torch.from_numpy(starts[single] + 1).to(device)
        self._several = None
        if len(several):
            self._wide = self._table(sequences[several], (starts + counts)[several])
            width = int(counts[several].max())
            inside = np.arange(width) < counts[several, None]
            tokens = (ends - counts)[several, None] + np.arange(width)
            self._several = torch.from_numpy(tokens[inside]).to(device)
            self._padded = torch.from_numpy(np.where(inside, tokens, tokens[:, :1])).to(device)
            self._inside = torch.from_numpy(inside).to(device)
            positions = torch.from_numpy(starts[several, None] + np.arange(width)).to(device)
            reach = torch.arange(self._wide.shape[1] * kv.block, device=device)
            self._mask = (reach <= positions[:, :, None])[:, None]

    def _table(self, sequences: Array, lengths: Array) -> Tensor:
        width = -(-int(lengths.max(initial=1)) // self._kv.block)
        return torch.from_numpy(self._kv.tables[sequences, :width].clip(min=0)).to(self._kv.device)

    def __call__(self, layer: int, query: Tensor) -> Tensor:
        """Attention of query [T, Hq, D]; returns [T, Hq x D]."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        mixed = torch.empty_like(query)
        if len(self._single):
            mixed[self._single] = paged_decode(query[self._single], keys, values, self._tables, self._lengths)[0]
        if self._several is not None:
            k = keys[self._wide].transpose(1, 2).flatten(2, 3)
            v = values[self._wide].transpose(1, 2).flatten(2, 3)
            q = query[self._padded].transpose(1, 2)
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask, enable_gqa=grouped).transpose(1, 2)
            mixed[self._several] = out[self._inside]
        return mixed.flatten(1)
