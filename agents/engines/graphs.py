"""Decoding steps of fixed shapes, replayed as CUDA graphs.

- ``Decoder``: one token for each of several sequences, in buckets of batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.paged import PagedKV
from ...kernels.paged_attention import paged_decode
from .generic import Array


class Decoder:
    """Pads a batch to a power of two, tables too, so that few shapes occur; each is captured once on a GPU.

    A step of a small model is hundreds of launches, which a graph replays as one. Rows of padding write to the block
    that belongs to nobody. Elsewhere the same static step runs as it is.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        """Decode with a runner's arithmetic."""
        self._compute = compute
        self._steps: dict[tuple[int, int], _Step] = {}
        self._kv: PagedKV | None = None

    def forget(self) -> None:
        """Drop what was captured: weights or cache are others now."""
        self._steps.clear()
        self._kv = None

    def run(self, kv: PagedKV, sequences: Array, starts: Array, tokens: Array) -> Tensor:
        """Append one token to each sequence; return logits [n, V]."""
        if self._kv is not kv:
            self.forget()
            self._kv = kv
        count = len(sequences)
        rows = _bucket(count)
        width = _bucket(-(-int(starts.max() + 1) // kv.block))
        blank = len(kv.references)
        ids = np.zeros(rows, dtype=np.int64)
        positions = np.zeros(rows, dtype=np.int64)
        tables = np.full((rows, width), blank, dtype=np.int64)
        ids[:count], positions[:count] = tokens, starts
        own = kv.tables[sequences, :width]
        tables[:count, : own.shape[1]] = np.where(own < 0, blank, own)
        places = np.full(rows, blank * kv.block, dtype=np.int64)
        places[:count] = kv.addresses(sequences, starts)
        inputs = [torch.from_numpy(part) for part in (ids, positions, places, tables, positions + 1)]
        step = self._steps.get((rows, width))
        if step is None:
            step = self._steps[rows, width] = _Step(self._compute, kv, inputs)
        return step(inputs)[:count]


class _Step:
    """One shape of a decoding step with its input buffers."""

    def __init__(self, compute: Callable[..., Tensor], kv: PagedKV, inputs: list[Tensor]) -> None:
        self._inputs = [tensor.to(kv.device) for tensor in inputs]
        ids, positions, places, tables, lengths = self._inputs

        def attend(layer: int, query: Tensor) -> Tensor:
            return paged_decode(query, kv.keys[layer], kv.values[layer], tables, lengths)[0].flatten(1)

        def step() -> Tensor:
            return compute(kv, ids, positions, places, attend, attend, None)

        self._step = step
        self._graph: Any = None
        if kv.device.type == "cuda":
            # Twice outside the graph: libraries choose their kernels and take their workspaces.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
                step()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = step()

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        for buffer, values in zip(self._inputs, inputs, strict=True):
            buffer.copy_(values)
        if self._graph is None:
            return self._step()
        self._graph.replay()
        # The next replay overwrites its own result.
        return self._logits.clone()


def _bucket(number: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(number - 1, 0).bit_length()
