"""Means, deviations and entropies, with the small constants of the papers' code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .trajectories import PerToken


def compared(value: float, sample: Sequence[float], *, std: bool = True) -> float:
    """``(value - mean) / (std + 1e-6)`` within ``sample``, std unbiased; a sample of one has mean 0 and std 1."""
    if len(sample) == 1:
        return value
    centred = value - float(np.mean(sample))
    return centred / (float(np.std(sample, ddof=1)) + 1e-6) if std else centred


def whitened(values: PerToken) -> PerToken:
    """``(x - mean) / sqrt(var + 1e-8)`` over all tokens, var unbiased; fewer than two stay as they are.

    verl's ``masked_whiten`` also adds 1e-8 to the number of tokens, which single precision does not see.
    """
    if len(values) < 2:
        return dict(values)
    mean, variance = np.mean(list(values.values())), np.var(list(values.values()), ddof=1)
    return {place: float((x - mean) / np.sqrt(variance + 1e-8)) for place, x in values.items()}


def shannon(logits: Sequence[float]) -> float:
    """``-Σ p log p`` in nats."""
    weights = np.exp(np.asarray(logits, float) - np.max(logits))
    chances = weights / weights.sum()
    return float(-(chances * np.log(chances)).sum())


def renyi_2(logits: Sequence[float]) -> float:
    """``-log Σ p²`` in nats."""
    weights = np.exp(np.asarray(logits, float) - np.max(logits))
    chances = weights / weights.sum()
    return float(-np.log((chances**2).sum()))
