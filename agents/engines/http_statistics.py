"""What a server says of its tokens' probabilities, made into a completion's statistics.

- ``Reported``: the distribution that the log-probabilities are of.
- ``Answer``: one answer, as far as the server told.
- ``complete``: the completion; what cannot be known is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from .base import Completion, SamplingParams, StopReason

Float32Array = NDArray[np.float32]


class Reported(StrEnum):
    """The distribution that a server's log-probabilities are of."""

    RAW = "raw"
    """softmax(logits): vLLM's default, llama.cpp."""
    TEMPERED = "tempered"
    """softmax(logits / temperature): SGLang's default."""
    PROCESSED = "processed"
    """What was drawn from, filters included: vLLM with ``--logprobs-mode processed_logprobs``."""


@dataclass(frozen=True)
class Answer:
    """One answer of a server."""

    tokens: Sequence[int]
    stop: StopReason
    logprobs: Sequence[float | None] | None = None
    """One per token; fewer where the server left out the last ones, ``None`` where it tells none."""
    top: Sequence[Mapping[int, float]] = field(default_factory=tuple)
    """Per token the log-probabilities of the most probable tokens, and of the sampled one, by token id."""
    exact: Float32Array | None = None
    """float32[6, n] from a server of this package: log-probabilities, raw ones, entropies, raw ones, processed
    log-probabilities, kept log-mass."""
    version: int = 0
    cached_tokens: int = 0


def complete(answer: Answer, params: SamplingParams, reported: Reported, k: int) -> Completion:
    """Make a completion of an answer.

    Where the server reports one distribution only, statistics of another one are known when both are the same
    (temperature 1 or 0, no filter) or the filter's cut lies within the ``k`` most probable tokens; the others are nan.

    Args:
        answer: what the server said.
        params: how the tokens were drawn.
        reported: what its log-probabilities are of.
        k: how many of the most probable tokens it was asked for.
    """
    tokens = np.asarray(answer.tokens, np.int32)
    if answer.exact is not None:
        chances, raw, entropies, raw_entropies, processed, kept = answer.exact
    else:
        given = _column(answer.logprobs or (), len(tokens))
        entropy = _column([_entropy(row) for row in answer.top], len(tokens))
        unknown, nothing = np.full_like(given, np.nan), np.zeros_like(given)
        greedy = params.temperature == 0
        filtered = not greedy and (params.top_k > 0 or params.top_p < 1)
        same = params.temperature in (0, 1)  # greedy statistics are those of temperature 1
        unfiltered = greedy or not filtered or reported is not Reported.PROCESSED
        tempered = unfiltered and (same or reported is not Reported.RAW)
        bare = unfiltered and (same or reported is Reported.RAW)
        chances, entropies = (given, entropy) if tempered else (unknown, unknown)
        raw, raw_entropies = (given, entropy) if bare else (unknown, unknown)
        if greedy:
            processed, kept = nothing, chances
        elif not unfiltered:
            processed, kept = given, unknown
        else:
            kept = nothing
            if filtered:
                kept = _column([_kept(row, params, k) for row in answer.top], len(tokens)) if tempered else unknown
            processed = chances - kept
    return Completion(
        tokens,
        chances,
        raw,
        entropies,
        raw_entropies,
        stop=answer.stop,
        version=answer.version,
        cached_tokens=answer.cached_tokens,
        entropy_top_k=params.entropy_top_k if answer.exact is not None else k,
        processed_logprobs=processed,
        kept_logmass=kept,
    )


def _column(values: Sequence[float | None], n: int) -> Float32Array:
    """float32[n], nan where nothing was told."""
    column = np.full(n, np.nan, np.float32)
    told = [math.nan if value is None else value for value in values[:n]]
    column[: len(told)] = told
    return column


def _entropy(row: Mapping[int, float]) -> float:
    """The lower estimate of ``SamplingParams.entropy_top_k``; nan where nothing was told."""
    return -sum(math.exp(value) * value for value in row.values()) if row else math.nan


def _kept(row: Mapping[int, float], params: SamplingParams, k: int) -> float:
    """Log of the mass that top-k and top-p keep, or nan when the cut lies beyond the ``k`` that were told."""
    chances = np.exp(np.sort(np.fromiter(row.values(), np.float64, len(row)))[::-1][:k])
    if not len(chances):
        return math.nan
    if 0 < params.top_k <= len(chances):
        chances = chances[: params.top_k]
    elif params.top_k or params.top_p >= 1:
        return math.nan
    if params.top_p < 1:
        # Filters work one after the other: top-p is of what top-k has left, renormalised.
        share = chances.cumsum() / (chances.sum() if params.top_k else 1.0)
        if share[-1] < params.top_p:
            return math.nan
        chances = chances[: int(np.searchsorted(share, params.top_p)) + 1]
    return float(np.log(chances.sum()))
