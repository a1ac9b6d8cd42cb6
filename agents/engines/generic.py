"""The forward pass of any causal language model of transformers over slots of cached keys and values.

- ``Runner``: what the engine asks of a forward pass.
- ``evaluating``: a module in evaluation mode for a while.
- ``GenericRunner``: calls the model's own ``forward`` with a cache assembled from the slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from ...errors import UsageError
from .arena import KVArena, LayerShape


class Runner(Protocol):
    """A model's forward pass over slots; see ``LlamaRunner.forward`` for the arguments."""

    layers: Sequence[LayerShape]

    def refresh(self) -> None:
        """Take note that the module's weights have changed."""
        ...

    def forward(
        self,
        arena: KVArena,
        slots: NDArray[np.int64],
        starts: NDArray[np.int64],
        tokens: Sequence[NDArray[np.integer[Any]]],
    ) -> Tensor:
        """Append tokens to slots and return the logits [n, V] of each row's last token."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block; every submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
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
        with torch.inference_mode(), evaluating(self._model):
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

    def forward(
        self,
        arena: KVArena,
        slots: NDArray[np.int64],
        starts: NDArray[np.int64],
        tokens: Sequence[NDArray[np.integer[Any]]],
    ) -> Tensor:
        """Append ``tokens[i]`` to slot ``slots[i]`` at position ``starts[i]``; return logits of each last token."""
        if not self._padded and len(slots) > 1:
            rows = [slice(i, i + 1) for i in range(len(slots))]
            return torch.cat([self.forward(arena, slots[i], starts[i], tokens[i]) for i in rows])
        device = arena.keys[0].device
        counts = np.array([len(row) for row in tokens], dtype=np.int64)
        past, new = int(starts.max()), int(counts.max())
        where = torch.from_numpy(slots).to(device)
        cache = DynamicCache()
        if past:
            for number, (keys, values) in enumerate(zip(arena.keys, arena.values, strict=True)):
                cache.update(keys[where, :, :past], values[where, :, :past], number)
        ids = np.zeros((len(slots), new), dtype=np.int64)
        real = np.arange(new) < counts[:, None]
        ids[real] = np.concatenate(tokens)
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
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            for i, (slot, start, count) in enumerate(zip(slots, starts, counts, strict=True)):
                arena.keys[number][slot, :, start : start + count] = layer.keys[i, :, past : past + count]
                arena.values[number][slot, :, start : start + count] = layer.values[i, :, past : past + count]
        chosen = picked if "logits_to_keep" in self._accepts else counts - 1
        return logits[torch.arange(len(slots), device=device), torch.from_numpy(chosen).to(device)]
