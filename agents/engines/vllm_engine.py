"""vLLM as an engine, in the trainer's process: paged attention, continuous batching, prefix caching.

- ``VLLMEngine``: for models and batches that the built-in engine is too slow for.
- ``VLLMStream``: its requests that come and go.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ...errors import AgentropyError, UsageError
from .base import Completion, EngineStats, Request, SamplingParams, StopReason, run_all
from .lanes import Tokenizer
from .vllm_runtime import (
    FINEST_TEMPERATURE,
    check_fit,
    checkpoint,
    detached,
    dtype_name,
    import_vllm,
    quiet_start,
    repack_tied_heads,
    save,
    shut_down,
    wipe_cache,
)
from .vllm_statistics import statistics

CACHE_BYTES = 2 << 30
"""Memory of keys and values on a CPU by default; it is taken only as it is written."""
_PREFILL_TOKENS = 8192
"""Tokens of one pass, where the model's length is no more: bounds the memory of its activations."""
_CPU_BLOCK = 32
"""Tokens of a block of the cache on a CPU: what lies beyond the last whole block is computed anew every turn."""
_NAMES = count()
"""Of requests, in all engines of this process."""


@dataclass(slots=True, eq=False)
class _Running:
    """One request on its way."""

    stream: VLLMStream
    ticket: int
    identity: str
    request: Request
    limit: int
    tokens: list[int] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    known: list[list[float]] = field(default_factory=list)
    cached: int = 0


class VLLMStream:
    """See ``Stream``. Streams of one engine share its batch; each hears of its own requests only."""

    def __init__(self, engine: VLLMEngine, params: SamplingParams) -> None:
        self._engine = engine
        self.params = params
        self._running: dict[int, _Running] = {}
        self._ended: dict[int, Completion] = {}
        self._tickets = 0
        self._closed = False

    def add(self, request: Request) -> int:
        """Take a request.

        Raises:
            UsageError: the stream is closed, or a token is outside the vocabulary.
        """
        if self._closed:
            raise UsageError("this stream is closed; expected requests on an open one: engine.stream(params)")
        ticket, self._tickets = self._tickets, self._tickets + 1
        running = self._engine._submit(self, ticket, request)
        if running is None:
            self._ended[ticket] = self._engine._empty(self.params)
        else:
            self._running[ticket] = running
        return ticket

    def step(self) -> list[tuple[int, Completion]]:
        """Advance all running requests by one token; return those that ended, in ticket order."""
        if self._running:
            self._engine._advance()
        ended, self._ended = self._ended, {}
        return sorted(ended.items())

    def cancel(self, ticket: int) -> Completion:
        """End a running request now.

        Raises:
            UsageError: no such request is running.
        """
        if ticket in self._ended:
            return replace(self._ended.pop(ticket), stop=StopReason.CANCELLED)
        if ticket not in self._running:
            raise UsageError(f"ticket {ticket} is not running; expected one of {sorted(self._running)[:8]}")
        return self._engine._cancel(self._running.pop(ticket))

    @property
    def running(self) -> int:
        return len(self._running) + len(self._ended)

    def close(self) -> None:
        for ticket in list(self._running):
            self.cancel(ticket)
        self._ended.clear()
        self._closed = True

    def _end(self, running: _Running, completion: Completion) -> None:
        del self._running[running.ticket]
        self._ended[running.ticket] = completion


class VLLMEngine:
    """Continues token sequences with vLLM; see ``Engine``.

    Log-probabilities of tokens are exact sums over the full vocabulary, at temperature 1 and at the sampling
    temperature, also under top-k and top-p. Entropies are estimated from the k most probable tokens (see
    ``SamplingParams.entropy_top_k``), and ``Completion.entropy_top_k`` says which k. vLLM's kernels are not those of
    the learner's forward pass: in float32 log-probabilities agree to 1e-5, in bfloat16 to some hundredths, so
    ``exact`` is False. A request's random numbers depend on its seed only, and are not those of ``TorchEngine``.
    A process has room for one such engine at a time, and for none where it belongs to a torch.distributed group.

    Attributes:
        entropy_top_k: the k of entropies where the sampling parameters ask for exact ones.
    """

    exact = False

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 128,
        max_model_len: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        gpu_memory_utilization: float = 0.5,
        cache_bytes: int | None = None,
        block_size: int | None = None,
        entropy_top_k: int = 20,
        enforce_eager: bool = True,
        seed: int = 0,
        prefix_caching: bool = True,
    ) -> None:
        """Start vLLM in this process.

        Args:
            model: a folder, a hub name, or a module. A module is copied, and stays the source of
                ``load_weights(None)``.
            tokenizer: needed for stop strings only.
            max_batch: requests that run at once; more wait.
            max_model_len: longest sequence; the model's own by default.
            dtype: type of weights and cache; the module's or the folder's own by default.
            device: ``"cpu"`` or ``"cuda"``; the one that the installed vLLM is built for by default.
            gpu_memory_utilization: share of the GPU that weights and cache may take.
            cache_bytes: memory of the cache instead; on a CPU ``CACHE_BYTES`` by default.
            block_size: tokens of a block of the cache; 32 on a CPU and vLLM's own choice elsewhere by default.
            entropy_top_k: the k of entropies where ``SamplingParams.entropy_top_k`` is 0.
            enforce_eager: no compilation and no CUDA graphs: starts within seconds.
            seed: of vLLM; requests have their own.
            prefix_caching: keep keys and values between calls.

        Raises:
            MissingDependencyError: vLLM is not installed, or cannot be imported.
            UsageError: an option is out of range, vLLM cannot run the model, or the process has an engine already.
        """
        if min(max_batch, entropy_top_k) < 1 or (max_model_len is not None and max_model_len < 2):
            raise UsageError(
                f"max_batch={max_batch}, entropy_top_k={entropy_top_k}, max_model_len={max_model_len}; "
                "expected at least 1, 1 and 2"
            )
        if not 0 < gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization is {gpu_memory_utilization}; expected 0 to 1")
        self._vllm = import_vllm()
        from vllm.platforms import current_platform

        from .vllm_observer import Observer

        self._on_cpu: bool = current_platform.is_cpu()
        built_for = "cpu" if self._on_cpu else "cuda"
        if device is not None and torch.device(device).type != built_for:
            raise UsageError(f"the vLLM installed here runs on {built_for}, not on {device}; expected '{built_for}'")
        self._shared = model if isinstance(model, PreTrainedModel) else None
        self._observer = Observer
        self._tokenizer = tokenizer
        self.entropy_top_k = entropy_top_k
        options: dict[str, Any] = {
            "dtype": dtype_name(dtype, self._shared),
            "max_model_len": max_model_len,
            "max_num_seqs": max_batch,
            "seed": seed,
            "enforce_eager": enforce_eager,
            "enable_prefix_caching": prefix_caching,
            "kv_cache_memory_bytes": cache_bytes or (CACHE_BYTES if self._on_cpu else None),
            "block_size": block_size or (_CPU_BLOCK if self._on_cpu else None),
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_sleep_mode": not self._on_cpu,
            "logits_processors": [Observer],
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": -1,
            # A prompt computed in pieces draws a token per piece, which would shift the request's random numbers.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": _PREFILL_TOKENS,
            "async_scheduling": False,
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",
        }
        with tempfile.TemporaryDirectory(prefix="agentropy-vllm-") as scratch:
            source = os.fspath(model) if not isinstance(model, PreTrainedModel) else scratch
            if self._shared is not None:
                save(self._shared, scratch)
            self._shapes = checkpoint(source) if Path(source).is_dir() else {}
            self._llm: Any = quiet_start(source, options)
        self._engine = self._llm.llm_engine
        self._max_positions: int = self._engine.model_config.max_model_len
        self.vocabulary: int = self._engine.model_config.get_vocab_size()
        self._tied = bool(getattr(self._engine.model_config.hf_text_config, "tie_word_embeddings", False))
        self._sequences: dict[str, _Running] = {}
        self._version = 0
        self._asleep = False
        self.stats = EngineStats()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Continue every request; see ``Engine.generate``.

        Raises:
            UsageError: a token is outside the vocabulary, stop strings are asked of an engine without a tokenizer,
                or the temperature is too low for vLLM and not 0.
            AgentropyError: the model's logits are not finite.
        """
        for request in requests:
            self._check(request)
        stream = self.stream(params)
        try:
            return run_all(stream, requests)
        finally:
            stream.close()

    def stream(self, params: SamplingParams) -> VLLMStream:
        """Open a stream of requests that share ``params``."""
        self._awake()
        if params.stop_strings and self._tokenizer is None:
            raise UsageError("stop_strings need a tokenizer; expected VLLMEngine(model, tokenizer)")
        if 0 < params.temperature < FINEST_TEMPERATURE:
            raise UsageError(
                f"temperature is {params.temperature}, which vLLM does not sample at; "
                f"expected 0 (greedy) or at least {FINEST_TEMPERATURE}"
            )
        return VLLMStream(self, params)

    def load_weights(self, state_dict: Mapping[str, Any] | None, version: int) -> None:
        """Take new weights in place and drop the cache; see ``Engine.load_weights``.

        With ``None`` they are read again from the module or the folder given to the constructor.

        Raises:
            UsageError: requests are running, or the names or shapes are not the model's.
        """
        self._awake()
        if self._sequences:
            raise UsageError(
                f"{len(self._sequences)} requests are running, and a completion has one version of weights; "
                "expected them ended or cancelled before load_weights"
            )
        source = state_dict
        if source is None and self._shared is not None:
            source = self._shared.state_dict()
        if source is None:
            self._llm.collective_rpc("reload_weights")
        else:
            check_fit(source, self._shapes, self._tied)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": detached(source, self._tied)})
        if self._on_cpu:
            self._llm.apply_model(repack_tied_heads)
        self.release()
        self._version = version

    def release(self, prefixes: Sequence[NDArray[np.int32]] | None = None) -> None:
        """Forget all cached sequences when ``prefixes`` is ``None``; vLLM forgets single ones by itself."""
        if prefixes is None and not self._engine.reset_prefix_cache():
            raise UsageError(f"{len(self._sequences)} requests are running; expected none while the cache is dropped")

    def sleep(self) -> None:
        """Give the memory of weights and cache back to other users of the GPU until ``wake``.

        Raises:
            UsageError: vLLM runs on a CPU, where that frees nothing, or requests are running.
        """
        if self._on_cpu:
            raise UsageError("vLLM frees nothing by sleeping on a CPU; expected close() and a new engine instead")
        if self._sequences:
            raise UsageError(f"{len(self._sequences)} requests are running; expected none before sleep")
        if not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Undo ``sleep``."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Free weights and cache; calling again does nothing."""
        if self._llm is not None:
            for running in list(self._sequences.values()):
                running.stream.close()
            shut_down(self._llm)
            self._llm = self._engine = None

    def _awake(self) -> None:
        if self._llm is None:
            raise UsageError("this engine is closed; expected a new VLLMEngine")
        if self._asleep:
            raise UsageError("this engine sleeps; expected wake() first")

    def _check(self, request: Request) -> None:
        if request.tokens.min() < 0 or request.tokens.max() >= self.vocabulary:
            raise UsageError(
                f"a request holds token {request.tokens.max()} or {request.tokens.min()}; "
                f"expected ids from 0 to {self.vocabulary - 1}"
            )

    def _submit(self, stream: VLLMStream, ticket: int, request: Request) -> _Running | None:
        """Hand a request to vLLM; ``None`` where its context fills the model."""
        self._awake()
        self._check(request)
        room = self._max_positions - len(request.tokens)
        if room <= 0:
            return None
        params = stream.params
        identity = str(next(_NAMES))
        running = _Running(stream, ticket, identity, request, min(room, request.max_tokens))
        filtered = bool(params.temperature) and (params.top_k > 0 or params.top_p < 1)
        observed = filtered or params.temperature not in (0.0, 1.0)
        asked = self._vllm.SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=request.seed,
            max_tokens=running.limit,
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,
            logprobs=self._known(params),
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
            extra_args={"agentropy": identity} if observed else None,
        )
        self._engine.add_request(identity, {"prompt_token_ids": request.tokens.tolist()}, asked)
        self._sequences[identity] = running
        return running

    def _known(self, params: SamplingParams) -> int:
        return min(params.entropy_top_k or self.entropy_top_k, self.vocabulary)

    def _advance(self) -> None:
        """One step of vLLM, for the requests of all streams."""
        self._awake()
        started = time.perf_counter()
        for output in self._engine.step():
            running = self._sequences[output.request_id]
            self._take(running, output)
            if not math.isfinite(running.raw[-1]):
                for other in list(self._sequences.values()):
                    other.stream.close()
                self.release()
                self._llm.collective_rpc(wipe_cache)
                raise AgentropyError(
                    "the model's logits are not finite; its weights have diverged (lower the learning rate)"
                )
            stopped = self._stopped(running)
            if stopped or output.finished:
                if not output.finished:
                    self._engine.abort_request([running.identity])
                longest = running.limit < running.request.max_tokens
                reason = StopReason.CONTEXT if longest else StopReason.LENGTH
                running.stream._end(running, self._finish(running, StopReason.STOP if stopped else reason))
        self.stats.seconds += time.perf_counter() - started

    def _take(self, running: _Running, output: Any) -> None:
        """Append the new tokens of a request, and their log-probabilities."""
        part = output.outputs[0]
        if not running.tokens:
            running.cached = output.num_cached_tokens or 0
            self.stats.cached_tokens += running.cached
            self.stats.prefill_tokens += len(running.request.tokens) - running.cached
        running.tokens.extend(part.token_ids)
        self.stats.decode_tokens += len(part.token_ids)
        numbers = part.logprobs.logprobs
        for start, end in zip(part.logprobs.start_indices, part.logprobs.end_indices, strict=True):
            running.raw.append(numbers[start])
            running.known.append(numbers[start + 1 : end])

    def _stopped(self, running: _Running) -> bool:
        params = running.stream.params
        if running.tokens[-1] in params.stop_token_ids:
            return True
        if not params.stop_strings or self._tokenizer is None:
            return False
        text = str(self._tokenizer.decode(running.tokens))
        return any(stop in text for stop in params.stop_strings)

    def _cancel(self, running: _Running) -> Completion:
        self._engine.abort_request([running.identity])
        return self._finish(running, StopReason.CANCELLED)

    def _finish(self, running: _Running, stop: StopReason) -> Completion:
        """Forget the request and return what it has."""
        del self._sequences[running.identity]
        params, n = running.stream.params, len(running.tokens)
        seen = self._observer.seen.pop(running.identity, None)
        if not n:
            return self._empty(params, stop)
        observed = np.array([seen[i] for i in range(n)] if seen else np.zeros((n, 2)))
        columns = statistics(
            np.array(running.raw), np.array(running.known), params.temperature, observed[:, 0], observed[:, 1]
        )
        return Completion(
            np.array(running.tokens, dtype=np.int32),
            columns.logprobs,
            columns.raw_logprobs,
            columns.entropies,
            columns.raw_entropies,
            stop=stop,
            version=self._version,
            cached_tokens=running.cached,
            entropy_top_k=self._known(params),
            processed_logprobs=columns.processed_logprobs,
            kept_logmass=columns.kept_logmass,
        )

    def _empty(self, params: SamplingParams, stop: StopReason = StopReason.CONTEXT) -> Completion:
        """What has no tokens: a context that fills the model, or a request cancelled before its first token."""
        nothing = np.zeros(0, dtype=np.float32)
        return Completion(
            nothing.astype(np.int32),
            *(nothing,) * 4,
            stop=stop,
            version=self._version,
            cached_tokens=0,
            entropy_top_k=self._known(params),
        )
