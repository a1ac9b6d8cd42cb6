"""What a generation engine is: token ids in, token ids with their statistics out.

- ``Request``: one context to continue, with its own seed.
- ``SamplingParams``: how tokens are chosen and where generation stops.
- ``StopReason``: why a completion ended.
- ``Completion``: the sampled tokens with exact log-probabilities and entropies.
- ``EngineStats``: counters of the work done since construction.
- ``Stream``: requests that come and go while the engine runs.
- ``Engine``: the protocol that every engine implements.
- ``run_all``: all completions of a stream, in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError

_LEFT_OUT: NDArray[np.float32] = np.empty(0, dtype=np.float32)


class StopReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """A stop token was sampled, or a stop string appeared; its tokens are part of the completion."""
    LENGTH = "length"
    """``Request.max_tokens`` were sampled."""
    CONTEXT = "context"
    """The model's last position was reached; the completion may be empty."""
    CANCELLED = "cancelled"
    """``Stream.cancel`` ended it; the completion holds what had been sampled and may be empty."""


@dataclass(frozen=True, slots=True)
class Request:
    """One context to continue.

    Attributes:
        tokens: int32[L], the whole context, L >= 1.
        seed: the n-th sampled token's random number depends only on ``(seed, n)``; 0 <= seed < 2**64.
        max_tokens: at most this many tokens are sampled, >= 1.

    Raises:
        UsageError: the context is empty or not a vector of integers, or a number is out of range.
    """

    tokens: NDArray[np.int32]
    seed: int
    max_tokens: int

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens)
        if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise UsageError(
                f"Request.tokens has shape {tokens.shape} and type {tokens.dtype}; "
                "expected a non-empty vector of token ids"
            )
        object.__setattr__(self, "tokens", np.ascontiguousarray(tokens, dtype=np.int32))
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"Request.seed is {self.seed}; expected 0 <= seed < 2**64")
        if self.max_tokens < 1:
            raise UsageError(f"Request.max_tokens is {self.max_tokens}; expected at least 1")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and where generation stops.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token, and log-probabilities and
            entropies are then those of temperature 1.
        top_k: keep the k most probable tokens (ties with the k-th are kept); 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches it; 0 < top_p <= 1.
        stop_token_ids: sampling one of these ends the completion.
        stop_strings: the completion ends with the first token after which its decoded text contains one of
            these; needs an engine with a tokenizer.
        entropy_top_k: 0 for exact entropies, else the estimate −Σ p log p over the k most probable tokens and the
            sampled one, not renormalised: a lower bound, and all that servers such as vLLM can tell.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    entropy_top_k: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; expected a finite number >= 0 (0 is greedy)")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; expected 0 (keep all) or a positive count")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; expected 0 < top_p <= 1")
        if self.entropy_top_k < 0:
            raise UsageError(f"entropy_top_k is {self.entropy_top_k}; expected 0 (exact) or a positive count")
        if isinstance(self.stop_strings, str) or "" in self.stop_strings:
            raise UsageError(f"stop_strings is {self.stop_strings!r}; expected a tuple of non-empty strings")
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in self.stop_token_ids))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens sampled for one request; all vectors have the same length n, which may be 0.

    Entropies are over the full vocabulary where ``entropy_top_k`` is 0, else lower estimates; see ``SamplingParams``.

    Attributes:
        tokens: int32[n], including the stop token.
        logprobs: float32[n], under softmax(logits / temperature) over the full vocabulary, in nats.
        raw_logprobs: float32[n], under softmax(logits).
        entropies: float32[n], of softmax(logits / temperature), in nats.
        raw_entropies: float32[n], of softmax(logits).
        stop: why it ended.
        version: the weights that sampled it.
        cached_tokens: how many context tokens were not computed for this request, 0 <= cached_tokens <= L; all L
            where another request of the batch has the same context.
        entropy_top_k: 0 where the entropies are exact, else the k that they were estimated from.
        processed_logprobs: float32[n], under the distribution that was drawn from: tempered, filtered by top-k and
            top-p, renormalised. Left out, there was no filter: they are ``logprobs``.
        kept_logmass: float32[n], log of the mass that the filters kept, <= 0:
            ``logprobs = processed_logprobs + kept_logmass``. Left out, it is 0.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    raw_logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32]
    raw_entropies: NDArray[np.float32]
    stop: StopReason
    version: int
    cached_tokens: int
    entropy_top_k: int = 0
    processed_logprobs: NDArray[np.float32] = field(default_factory=lambda: _LEFT_OUT)
    kept_logmass: NDArray[np.float32] = field(default_factory=lambda: _LEFT_OUT)

    def __post_init__(self) -> None:
        if self.processed_logprobs is _LEFT_OUT:
            object.__setattr__(self, "processed_logprobs", self.logprobs)
        if self.kept_logmass is _LEFT_OUT:
            object.__setattr__(self, "kept_logmass", np.zeros(len(self.tokens), dtype=np.float32))


@dataclass
class EngineStats:
    """Work done since construction.

    Attributes:
        prefill_tokens: context tokens computed.
        cached_tokens: context tokens taken from the cache or shared with another request of the batch.
        decode_tokens: tokens sampled.
        seconds: time spent inside ``generate`` and ``Stream.step``.
    """

    prefill_tokens: int = 0
    cached_tokens: int = 0
    decode_tokens: int = 0
    seconds: float = 0.0


class Stream(Protocol):
    """Requests that come and go while the engine runs (continuous batching).

    A request joins in the step after it was added; a finished one's place is taken in the same step.
    """

    def add(self, request: Request) -> int:
        """Take a request; return its ticket: 0, 1, 2, … in the order of the calls."""
        ...

    def step(self) -> list[tuple[int, Completion]]:
        """Advance all running requests by at least one token; return those that ended, in ticket order."""
        ...

    def cancel(self, ticket: int) -> Completion:
        """End a running request now, with ``StopReason.CANCELLED`` and what it has."""
        ...

    @property
    def running(self) -> int:
        """Requests that were added and have not ended."""
        ...

    def close(self) -> None:
        """Cancel what runs; the stream takes no more requests. Calling again does nothing."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A function of token ids: the same request with the same weights and seed gives the same tokens."""

    stats: EngineStats
    vocabulary: int
    """Number of token ids: 0 to vocabulary - 1, those of the embedding's padding included."""
    exact: bool
    """Whether its log-probabilities are those of the learner's own forward pass, to rounding."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Continue every request; completions come back in the order of the requests."""
        ...

    def stream(self, params: SamplingParams) -> Stream:
        """Open a stream of requests that share ``params``."""
        ...

    def load_weights(self, state_dict: Mapping[str, Any] | None, version: int) -> None:
        """Take new weights and drop every cache; ``None`` when the shared module was changed in place."""
        ...

    def release(self, prefixes: Sequence[NDArray[np.int32]] | None = None) -> None:
        """Forget cached sequences that begin with one of ``prefixes``; all of them when ``None``."""
        ...

    def close(self) -> None:
        """Free the caches; the engine generates no more."""
        ...


def run_all(stream: Stream, requests: Sequence[Request]) -> list[Completion]:
    """Add ``requests`` to a fresh stream and step until they have ended; completions in their order."""
    tickets = [stream.add(request) for request in requests]
    done: dict[int, Completion] = {}
    while stream.running:
        done.update(stream.step())
    return [done[ticket] for ticket in tickets]
