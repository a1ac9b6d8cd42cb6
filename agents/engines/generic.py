"""The forward pass of any causal language model of transformers over the cache's blocks.

- ``Runner``: what the engine asks of a forward pass.
- ``evaluating``: modules in evaluation mode for a while.
- ``GenericRunner``: calls the model's own ``forward`` with a cache gathered from the blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from ...errors import UsageError
from ...kernels.paged import LayerShape, PagedKV

Array = NDArray[np.int64]


class Runner(Protocol):
    """A model's forward pass over cached sequences; see ``LlamaRunner.forward`` for the arguments."""

    layers: Sequence[LayerShape]

    def refresh(self) -> None:
        """Take note that the module's weights have changed."""
        ...

    def forget(self) -> None:
        """Let go of the cache that it last worked on."""
        ...

    def forward(self, kv: PagedKV, sequences: Array, starts: Array, counts: Array, tokens: Array) -> Tensor:
        """Append tokens to sequences and return the logits [n, V] of each one's last token."""
        ...


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch dropout off inside the block; each of ``modules`` gets its own mode back."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class GenericRunner:
    """Works for every model whose cache is one tensor of keys and one of values per layer.

    Rows are padded on the right twice, between the cached and the new tokens and after the new ones; masks and
    explicit positions make the padding invisible. Sliding windows count padding as distance, so models that
    have them run one row at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        """Probe ``model`` with one token for the shape of its cache.

        Raises:
            UsageError: the model keeps another kind of state (a recurrence, for example).
        """
        self._model: Any = model
        self._accepts = set(inspect.signature(model.forward).parameters)
        config: Any = model.config
        kinds = set(getattr(config, "layer_types", None) or [])
        self._padded = not (getattr(config, "sliding_window", None) or kinds - {"full_attention"})
        self.layers: Sequence[LayerShape] = self._probe()

    def _probe(self) -> list[LayerShape]:
        cache = DynamicCache()
        device = next(self._model.parameters()).device
        with torch.inference_mode(), evaluating(self._model.modules()):
            self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=cache)
        shapes = []
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != 1:
                break
            shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3]))
        if not shapes or len(shapes) != len(cache.layers):
            raise UsageError(
                f"{type(self._model).__name__} keeps a state other than attention keys and values; "
                "expected a transformer model whose cache can be cut at any token"
            )
        return shapes

    def refresh(self) -> None:
        """Nothing to do: the module itself computes."""

    def forget(self) -> None:
        """Nothing to do: nothing is kept."""

    def forward(self, kv: PagedKV, sequences: Array, starts: Array, counts: Array, tokens: Array) -> Tensor:
        """Append ``counts[i]`` tokens to ``sequences[i]`` at ``starts[i]``; return logits of each one's last token."""
        if not self._padded and len(sequences) > 1:
            ends = counts.cumsum()
            parts = []
            for i, end in enumerate(ends.tolist()):
                row = slice(i, i + 1)
                own = tokens[end - int(counts[i]) : end]
                parts.append(self.forward(kv, sequences[row], starts[row], counts[row], own))
            return torch.cat(parts)
        device = kv.device
        past, new = int(starts.max()), int(counts.max())
        cache = DynamicCache()
        if past:
            places = kv.addresses(sequences[:, None], np.minimum(np.arange(past), np.maximum(starts - 1, 0)[:, None]))
            block, offset = self._where(kv, np.where(starts[:, None] > 0, places, 0))
            for number, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
                cache.update(keys[block, :, offset].transpose(1, 2), values[block, :, offset].transpose(1, 2), number)
        ids = np.zeros((len(sequences), new), dtype=np.int64)
        real = np.arange(new) < counts[:, None]
        ids[real] = tokens
        seen = np.concatenate((np.arange(past) < starts[:, None], real), axis=1).astype(np.int64)
        positions = starts[:, None] + np.minimum(np.arange(new), counts[:, None] - 1)
        ends, picked = np.unique(counts - 1, return_inverse=True)
        inputs = {
            "input_ids": ids,
            "attention_mask": seen,
            "position_ids": positions,
            "cache_position": np.arange(past, past + new),
            "logits_to_keep": ends,
        }
        given = {k: torch.from_numpy(v).to(device) for k, v in inputs.items() if k in self._accepts}
        logits = self._model(**given, past_key_values=cache, use_cache=True).logits
        block, offset = self._where(kv, kv.addresses(np.repeat(sequences, counts), positions[real]))
        inside = torch.from_numpy(real).to(device)
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            kv.keys[number][block, :, offset] = layer.keys[:, :, past:].transpose(1, 2)[inside]
            kv.values[number][block, :, offset] = layer.values[:, :, past:].transpose(1, 2)[inside]
        chosen = picked if "logits_to_keep" in self._accepts else counts - 1
        return logits[torch.arange(len(sequences), device=device), torch.from_numpy(chosen).to(device)]

    @staticmethod
    def _where(kv: PagedKV, places: Array) -> tuple[Tensor, Tensor]:
        block, offset = np.divmod(places, kv.block)
        return torch.from_numpy(block).to(kv.device), torch.from_numpy(offset).to(kv.device)
