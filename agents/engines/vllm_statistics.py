"""What a server's log-probabilities tell of a completion: numbers in, statistics of every token out.

- ``Statistics``: the float vectors of a ``Completion``.
- ``statistics``: them, from the log-probabilities of the sampled token and of the k most probable ones.
- ``truncated_entropy``: the estimate of the entropy from those.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]


class Statistics(NamedTuple):
    """Vectors float32[n]; see ``Completion``."""

    logprobs: Float32s
    raw_logprobs: Float32s
    entropies: Float32s
    raw_entropies: Float32s
    processed_logprobs: Float32s
    kept_logmass: Float32s


def statistics(
    raw: Float64s, known: Float64s, temperature: float, log_normaliser: Float64s, kept_logmass: Float64s
) -> Statistics:
    """Statistics of n sampled tokens at a temperature; 0 gives those of temperature 1.

    Args:
        raw: float64[n], log-probabilities of the sampled tokens under softmax(logits).
        known: float64[n, k], those of the k most probable tokens, falling.
        temperature: of the sampling.
        log_normaliser: float64[n], log Σ_v exp(raw_v / temperature) over the full vocabulary; 0 at temperature 1.
        kept_logmass: float64[n], log of the tempered mass that top-k and top-p kept; 0 without them. Not read at
            temperature 0, which keeps the most probable token alone.
    """
    scale = temperature or 1.0
    tempered = raw / scale - log_normaliser
    raw_entropies = truncated_entropy(raw, known)
    entropies = raw_entropies
    if scale != 1.0:
        entropies = truncated_entropy(tempered, known / scale - log_normaliser[:, None])
    if not temperature:
        kept_logmass = tempered
    columns = (tempered, raw, entropies, raw_entropies, tempered - kept_logmass, kept_logmass)
    return Statistics(*(column.astype(np.float32) for column in columns))


def truncated_entropy(sampled: Float64s, known: Float64s) -> Float64s:
    """−Σ p log p over the ``known`` [n, k] and, where it is none of them, the ``sampled`` token [n]; a lower bound.

    Of equally probable tokens it is arbitrary which are among the k: one that ties with the last counts as known.
    """
    outside = sampled < known[:, -1]
    return -(_terms(known).sum(axis=1) + np.where(outside, _terms(sampled), 0.0))


def _terms(logprobs: Float64s) -> Float64s:
    """p log p; impossible tokens (-inf) add nothing."""
    return np.exp(logprobs) * np.maximum(logprobs, -1e4)
