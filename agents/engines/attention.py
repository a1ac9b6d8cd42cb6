"""Attention of packed tokens over the cache, planned once per pass for all layers.

- ``plan``: one of the two.
- ``RaggedAttention``: all rows in one call without padding; for the CPU.
- ``BlockAttention``: one query per row through block tables, several padded; for the GPU, and where numba is absent.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dispatch import resolve
from ...kernels.paged import PagedKV, inner_positions
from ...kernels.paged_attention import paged_decode, ragged_attention
from .generic import Array


class Attention(Protocol):
    """Attention of query [T, Hq, D] over one layer's cached keys; returns [T, Hq x D]."""

    def __call__(self, layer: int, query: Tensor) -> Tensor: ...


def plan(kv: PagedKV, sequences: Array, starts: Array, counts: Array) -> Attention:
    """Attention of rows that read ``starts[i] + counts[i]`` tokens, of which the last ``counts[i]`` are queries."""
    keys = kv.keys[0]
    kind = RaggedAttention if resolve("auto", keys, numba=inner_positions(keys)) == "numba" else BlockAttention
    return kind(kv, sequences, starts, counts)


class RaggedAttention:
    """One call per layer for all rows, straight from their blocks."""

    def __init__(self, kv: PagedKV, sequences: Array, starts: Array, counts: Array) -> None:
        """Plan for rows that read ``starts[i] + counts[i]`` tokens, of which the last ``counts[i]`` are queries."""
        self._kv = kv
        width = -(-int((starts + counts).max()) // kv.block)
        self._rows = [torch.from_numpy(part) for part in (kv.tables[sequences, :width], starts, counts)]

    def __call__(self, layer: int, query: Tensor) -> Tensor:
        """Attention of query [T, Hq, D]; returns [T, Hq x D]."""
        return ragged_attention(query, self._kv.keys[layer], self._kv.values[layer], *self._rows)[0].flatten(1)


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
