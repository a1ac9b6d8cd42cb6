"""The built-in engine: batched generation with a prefix cache, for any causal language model of transformers.

- ``TorchEngine``: runs on a CPU or one GPU, in the trainer's process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from .base import Completion, EngineStats, Request, SamplingParams, run_all
from .cache import PrefixCache
from .generic import GenericRunner, Runner
from .lanes import Tokenizer
from .llama import LlamaRunner
from .radix import Tokens
from .stream import TorchStream

CACHE_BYTES = 2 << 30
"""Memory of the prefix cache by default; it is taken only as it is written."""
CACHE_TOKENS = 1 << 17
"""Least number of tokens in the prefix cache by default."""

SMALL_PARAMETERS = 20_000_000
"""Of models whose operations are too short to be shared: waking a second thread takes as long as half of them."""


class TorchEngine:
    """Continues token sequences with a transformers model, reusing every prefix that it has seen.

    Keys and values stay in slots between calls, so a later turn computes only its new tokens; identical contexts
    of one call are computed once and forked. The n-th token of a request is drawn with the uniform number
    ``counter_uniforms(seed, n)``, so it depends on no other request; logits of different batch compositions
    agree to rounding (about 1e-6 in fp32). Llama-type models run through ``LlamaRunner``, others through their
    own forward pass. A temperature of 0 reports the statistics of temperature 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 128,
        cache_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fused: bool = True,
    ) -> None:
        """Generate with ``model``; its parameters are shared, unless ``device`` or ``dtype`` asks for a copy.

        Args:
            model: a causal language model of transformers.
            tokenizer: needed for stop strings only.
            max_batch: requests that run at once; more are served in waves.
            cache_tokens: bound of the prefix cache; the longest sequence must fit. By default what fits in
                ``cache_bytes``, and never less than ``CACHE_TOKENS``: a cache that cannot hold all running episodes
                computes their histories anew every turn.
            cache_bytes: memory of the prefix cache where ``cache_tokens`` is not given.
            device: where to compute; the model's own by default.
            dtype: type of weights and cache; the model's own by default.
            fused: use the fused forward pass where the architecture has one.

        Raises:
            UsageError: a bound is not positive, or the model cannot be cached.
        """
        if max_batch < 1 or (cache_tokens is not None and cache_tokens < 2):
            raise UsageError(f"max_batch={max_batch}, cache_tokens={cache_tokens}; expected at least 1 and at least 2")
        first = next(model.parameters())
        self._shared = model
        self._device = torch.device(device) if device is not None else first.device
        self._dtype = dtype or first.dtype
        own = self._device == first.device and self._dtype == first.dtype
        self.model: Any = model
        if not own:
            self.model = copy.deepcopy(model)
            self.model.to(self._device, self._dtype)
        self.modules = list(self.model.modules())
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_positions: int = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.runner: Runner = (
            LlamaRunner(self.model) if fused and LlamaRunner.supports(self.model) else GenericRunner(self.model)
        )
        self.runner.refresh()
        if cache_tokens is None:
            width = sum(layer.heads * (layer.key_size + layer.value_size) for layer in self.runner.layers)
            cache_tokens = max(CACHE_TOKENS, cache_bytes // (width * self._dtype.itemsize))
        self.cache_tokens = cache_tokens
        self.cache = self._new_cache(cache_tokens)
        size = sum(parameter.numel() for parameter in self.model.parameters())
        self._small = self._device.type == "cpu" and size <= SMALL_PARAMETERS
        self.exact = self._dtype == first.dtype
        self.version = 0
        self.stats = EngineStats()
        self._streams: list[TorchStream] = []

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Leave torch one thread on a CPU where the model is small: its operations are shorter than waking a second."""
        count = torch.get_num_threads()
        if count == 1 or not self._small:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(count)

    def _new_cache(self, max_tokens: int) -> PrefixCache:
        return PrefixCache(
            self.runner.layers,
            max_tokens=max_tokens,
            max_sequences=4 * self.max_batch,
            dtype=self._dtype,
            device=self._device,
        )

    def stream(self, params: SamplingParams) -> TorchStream:
        """Open a stream of requests that share ``params``; see ``Engine.stream``.

        Several streams share the cache; each is stepped by itself. Close a stream that is not run to its end.

        Raises:
            UsageError: stop strings are asked of an engine without a tokenizer.
        """
        if params.stop_strings and self.tokenizer is None:
            raise UsageError("stop_strings need a tokenizer; expected TorchEngine(model, tokenizer)")
        stream = TorchStream(self, params)
        self._streams.append(stream)
        return stream

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Continue every request; see ``Engine.generate``.

        Raises:
            UsageError: a token is outside the vocabulary, a sequence exceeds ``cache_tokens``, or stop strings
                are asked of an engine without a tokenizer.
            AgentropyError: the model's logits are not finite.
        """
        stream = self.stream(params)
        try:
            return run_all(stream, requests)
        finally:
            stream.close()

    def forget(self, stream: TorchStream) -> None:
        """Take note that a stream is closed."""
        if stream in self._streams:
            self._streams.remove(stream)

    def reset(self) -> None:
        """Drop every cached sequence and its numbers; running requests are computed again."""
        for stream in self._streams:
            stream.suspend()
        self.cache.drop()
        self.cache.kv.zero()

    def load_weights(self, state_dict: Mapping[str, Any] | None, version: int) -> None:
        """Take new weights and drop the cache; see ``Engine.load_weights``.

        With ``None`` the weights are read again from the module given to the constructor. A state dict is
        loaded into the engine's module, which is that same module when it is shared. Running requests go on under
        the new weights; their completions tell the version of the oldest weights that sampled a token.

        Raises:
            UsageError: the state dict has other names or shapes than the model.
        """
        source = state_dict
        if source is None and self.model is not self._shared:
            source = self._shared.state_dict()
        if source is not None:
            load_into(self.model, source)
        self.runner.refresh()
        for stream in self._streams:
            stream.suspend()
        self.cache.drop()
        self.version = version

    def release(self, prefixes: Sequence[Tokens] | None = None) -> None:
        """Forget cached sequences that begin with one of ``prefixes``, all of them when ``None``; none that runs."""
        self.cache.drop(prefixes)

    def close(self) -> None:
        """Close the streams and free the cache; calling again does nothing."""
        for stream in list(self._streams):
            stream.close()
        self.runner.forget()
        self.cache = self._new_cache(2)


def load_into(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load weights into ``model``; tied ones may be left out.

    Raises:
        UsageError: the state dict has other names or shapes than the model, which stays as it was.
    """
    own = model.state_dict()
    tied: Any = getattr(model, "_tied_weights_keys", None) or ()
    absent = own.keys() - state_dict.keys() - set(tied)
    unexpected = state_dict.keys() - own.keys()
    if absent or unexpected:
        wrong = sorted(absent) + sorted(unexpected)
        raise UsageError(
            f"the weights do not fit the model: '{wrong[0]}' is {'missing' if absent else 'unknown'} "
            f"({len(wrong)} such names); expected the names of model.state_dict()"
        )
    for name, tensor in state_dict.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"the weights do not fit the model: '{name}' has shape {tuple(tensor.shape)}; "
                f"expected {tuple(own[name].shape)}"
            )
    model.load_state_dict(state_dict, strict=False)
