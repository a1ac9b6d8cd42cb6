"""Random numbers of sampled tokens, each a pure function of where it is used.

- ``counter_uniforms``: uniform numbers that depend only on a seed and a counter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX_A
    state = (state ^ (state >> np.uint64(27))) * _MIX_B
    return state ^ (state >> np.uint64(31))


def counter_uniforms(seeds: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return float64 uniforms in [0, 1), each a pure function of its ``(seed, counter)``.

    The stream of a seed is SplitMix64 (Steele, Lea and Flood 2014) started at the mixed seed, so that
    neighbouring seeds do not share a stream; counter n takes its n-th output, the upper 53 bits.

    Args:
        seeds: uint64[N].
        counters: uint64[N] or a scalar array.
    """
    with np.errstate(over="ignore"):
        key = _splitmix64(np.asarray(seeds, dtype=np.uint64) + _GOLDEN)
        bits = _splitmix64(key + (np.asarray(counters, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
