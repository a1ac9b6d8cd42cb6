"""The built-in engine: batched generation with a prefix cache, for any causal language model of transformers.

- ``TorchEngine``: runs on a CPU or one GPU, in the trainer's process.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import AgentropyError, UsageError
from .base import Completion, EngineStats, Request, SamplingParams, StopReason
from .cache import PrefixCache
from .drawing import Generation, Tokenizer
from .generic import GenericRunner, Runner, evaluating
from .llama import LlamaRunner
from .slots import Tokens, common_prefixes

_SHARED_WORTH_WAITING = 16
"""A request waits for another one's prefill when that spares it more tokens than this."""
_PREFILL_TOKENS = 8192
"""Tokens of one prefill pass: bounds the memory of its activations."""
CACHE_BYTES = 2 << 30
"""Memory of the prefix cache by default; it is taken only as it is written."""
CACHE_TOKENS = 1 << 17
"""Least number of tokens in the prefix cache by default."""


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
                ``CACHE_BYTES``, and never less than ``CACHE_TOKENS``: a cache that cannot hold all running episodes
                computes their histories anew every turn.
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
        self._model: Any = model
        if not own:
            self._model = copy.deepcopy(model)
            self._model.to(self._device, self._dtype)
        self._tokenizer = tokenizer
        self._max_batch = max_batch
        self._max_positions = getattr(self._model.config, "max_position_embeddings", None) or 2**31
        self.vocabulary = self._model.get_input_embeddings().weight.shape[0]
        self._runner: Runner = (
            LlamaRunner(self._model) if fused and LlamaRunner.supports(self._model) else GenericRunner(self._model)
        )
        self._runner.refresh()
        if cache_tokens is None:
            width = sum(layer.heads * (layer.key_size + layer.value_size) for layer in self._runner.layers)
            cache_tokens = max(CACHE_TOKENS, CACHE_BYTES // (width * self._dtype.itemsize))
        self._cache = PrefixCache(
            self._runner.layers,
            max_tokens=cache_tokens,
            max_slots=4 * max_batch,
            dtype=self._dtype,
            device=self._device,
        )
        self._version = 0
        self.stats = EngineStats()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Continue every request; see ``Engine.generate``.

        Raises:
            UsageError: a token is outside the vocabulary, a sequence exceeds ``cache_tokens``, or stop strings
                are asked of an engine without a tokenizer.
            AgentropyError: the model's logits are not finite.
        """
        started = time.perf_counter()
        if params.stop_strings and self._tokenizer is None:
            raise UsageError("stop_strings need a tokenizer; expected TorchEngine(model, tokenizer)")
        for request in requests:
            if request.tokens.min() < 0 or request.tokens.max() >= self.vocabulary:
                raise UsageError(
                    f"a request holds token {request.tokens.max()} or {request.tokens.min()}; "
                    f"expected ids from 0 to {self.vocabulary - 1}"
                )
        completions = [self._empty(params)] * len(requests)
        room = [self._max_positions - len(request.tokens) for request in requests]
        waiting = [i for i in range(len(requests)) if room[i] > 0]
        try:
            with torch.inference_mode(), evaluating(self._model):
                if waiting:
                    lengths = [len(requests[i].tokens) + min(room[i], requests[i].max_tokens) for i in waiting]
                    wave = min(self._max_batch, self._cache.reserve(max(lengths)))
                    for start in range(0, len(waiting), wave):
                        rows = waiting[start : start + wave]
                        done = self._wave([requests[i] for i in rows], [room[i] for i in rows], params)
                        self._cache.end()
                        for i, completion in zip(rows, done, strict=True):
                            completions[i] = completion
        finally:
            self._cache.end()
        self.stats.seconds += time.perf_counter() - started
        return completions

    def load_weights(self, state_dict: Mapping[str, Any] | None, version: int) -> None:
        """Take new weights and drop the cache; see ``Engine.load_weights``.

        With ``None`` the weights are read again from the module given to the constructor. A state dict is
        loaded into the engine's module, which is that same module when it is shared.

        Raises:
            UsageError: the state dict has other names or shapes than the model.
        """
        source = state_dict
        if source is None and self._model is not self._shared:
            source = self._shared.state_dict()
        if source is not None:
            try:
                missing, unexpected = self._model.load_state_dict(source, strict=False)
            except RuntimeError as error:
                raise UsageError(f"the weights do not fit the model: {error}") from error
            absent = set(missing) - set(getattr(self._model, "_tied_weights_keys", None) or ())
            if absent or unexpected:
                wrong = sorted(absent) + sorted(unexpected)
                raise UsageError(
                    f"the weights do not fit the model: '{wrong[0]}' is {'missing' if absent else 'unknown'} "
                    f"({len(wrong)} such names); expected the names of model.state_dict()"
                )
        self._runner.refresh()
        self._cache.drop()
        self._version = version

    def release(self, prefixes: Sequence[Tokens] | None = None) -> None:
        """Forget cached sequences that begin with one of ``prefixes``; all of them when ``None``."""
        self._cache.drop(prefixes)

    def close(self) -> None:
        """Free the cache; calling again does nothing."""
        self._cache = PrefixCache(
            self._runner.layers, max_tokens=2, max_slots=1, dtype=self._dtype, device=self._device
        )

    def _wave(self, requests: Sequence[Request], room: Sequence[int], params: SamplingParams) -> list[Completion]:
        """Generate for requests that fit the cache together."""
        slots, cached, logits = self._prefill([request.tokens for request in requests])
        slots = self._cache.gather(slots)
        order = np.argsort(slots)
        generation = Generation(
            slots=slots[order],
            lengths=np.array([len(requests[i].tokens) for i in order]),
            seeds=np.array([requests[i].seed for i in order], dtype=np.uint64),
            limits=np.array([min(requests[i].max_tokens, room[i]) for i in order]),
            params=params,
            tokenizer=self._tokenizer,
        )
        logits = logits[torch.from_numpy(order).to(logits.device)]
        while len(generation.active):
            rows = generation.step(logits)
            if not len(rows):
                break
            drawn = generation.tokens[-1][rows]
            where = generation.slots[rows]
            starts = generation.lengths[rows] + len(generation.tokens) - 1
            logits = self._runner.forward(self._cache.arena, where, starts, list(drawn[:, None]))
            self._cache.index.append(where, drawn)
        if not generation.finite:
            self._cache.drop()
            self._cache.arena.zero()
            raise AgentropyError(
                "the model's logits are not finite; its weights have diverged (lower the learning rate)"
            )
        tokens, statistics, counts, stopped = generation.columns()
        self.stats.decode_tokens += int(counts.sum())
        completions = [self._empty(params)] * len(requests)
        for row, (i, count) in enumerate(zip(order, counts, strict=True)):
            logprobs, raw_logprobs, entropies, raw_entropies = statistics[:, row, :count].astype(np.float32)
            reason = StopReason.CONTEXT if requests[i].max_tokens > room[i] else StopReason.LENGTH
            completions[i] = Completion(
                tokens[row, :count].astype(np.int32),
                logprobs,
                raw_logprobs,
                entropies,
                raw_entropies,
                stop=StopReason.STOP if stopped[row] else reason,
                version=self._version,
                cached_tokens=int(cached[i]),
                entropy_top_k=params.entropy_top_k,
            )
        return completions

    def _empty(self, params: SamplingParams) -> Completion:
        """What a context that already fills the model's positions gets."""
        nothing = np.zeros(0, dtype=np.float32)
        tokens = nothing.astype(np.int32)
        return Completion(
            tokens,
            nothing,
            nothing,
            nothing,
            nothing,
            stop=StopReason.CONTEXT,
            version=self._version,
            cached_tokens=0,
            entropy_top_k=params.entropy_top_k,
        )

    def _prefill(self, contexts: Sequence[Tokens]) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
        """Compute what is not cached; return every context's slot, cached length and next-token logits [n, V].

        Distinct contexts are taken in sorted order, so that those sharing a prefix are neighbours: the first of
        them leads, and the others wait for it when its prefix spares them work.
        """
        keys = [context.astype(">i4").tobytes() for context in contexts]
        members: dict[bytes, list[int]] = {}
        for i, key in enumerate(keys):
            members.setdefault(key, []).append(i)
        groups = [members[key] for key in sorted(members)]
        distinct = [contexts[group[0]] for group in groups]
        shared = common_prefixes(distinct)
        slots = np.zeros(len(contexts), dtype=np.int64)
        cached = np.zeros(len(contexts), dtype=np.int64)
        rows: list[Tensor | None] = [None] * len(distinct)
        pending = list(range(len(distinct)))
        while pending:
            leaders, pending = self._leaders(distinct, shared, pending)
            places = self._cache.place([distinct[g] for g in leaders])
            placed = np.array(places, dtype=np.int64)
            for batch in self._batches([distinct[g] for g in leaders], placed):
                ordered = batch[np.argsort(placed[batch, 0])]
                starts = placed[ordered, 1]
                chosen = [distinct[leaders[k]] for k in ordered]
                new = [context[start:] for context, start in zip(chosen, starts, strict=True)]
                logits = self._runner.forward(self._cache.arena, placed[ordered, 0], starts, new)
                self._cache.commit(placed[ordered, 0].tolist(), chosen)
                for k, row in zip(ordered, logits, strict=True):
                    rows[leaders[k]] = row
            for g, (slot, start) in zip(leaders, places, strict=True):
                first, *copies = groups[g]
                slots[first], cached[first] = slot, start
                self.stats.prefill_tokens += len(distinct[g]) - start
                self.stats.cached_tokens += start
                if copies:
                    slots[copies] = self._cache.duplicate(slot, len(copies))
                    cached[copies] = len(distinct[g])
                    self.stats.cached_tokens += len(distinct[g]) * len(copies)
        by_context: list[Tensor | None] = [None] * len(contexts)
        for group, row in zip(groups, rows, strict=True):
            for i in group:
                by_context[i] = row
        return slots, cached, torch.stack([row for row in by_context if row is not None])

    def _leaders(
        self, distinct: Sequence[Tokens], shared: NDArray[np.int64], pending: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Split pending contexts into those to compute now and those that gain by waiting for one of them."""
        leaders: list[int] = []
        followers: list[int] = []
        common = 0
        previous = -1
        for g in pending:
            span = shared[previous + 1 : g + 1]
            common = min(common, int(span.min())) if leaders else 0
            previous = g
            if common > _SHARED_WORTH_WAITING:
                known = self._cache.index.match(distinct[g])[1]
                if min(common, len(distinct[g]) - 1) - known > _SHARED_WORTH_WAITING:
                    followers.append(g)
                    continue
            leaders.append(g)
            common = len(distinct[g])
        return leaders, followers

    @staticmethod
    def _batches(contexts: Sequence[Tokens], placed: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Split a prefill into passes of bounded size, rows of neighbouring slots together."""
        order = np.argsort(placed[:, 0])
        new = np.array([len(contexts[k]) for k in order]) - placed[order, 1]
        passes = (new.cumsum() - 1) // _PREFILL_TOKENS
        return [order[passes == number] for number in np.unique(passes)]
