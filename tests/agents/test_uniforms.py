"""The random numbers of sampled tokens are uniform, independent, and the same on every machine."""

from __future__ import annotations

import numpy as np
from scipy import stats

from agentropy.agents.engines.uniforms import counter_uniforms


def test_counter_uniforms_depend_on_seed_and_counter_only() -> None:
    seeds = np.random.default_rng(0).integers(2**63, size=1000, dtype=np.uint64)
    block = np.stack([counter_uniforms(seeds, np.uint64(n)) for n in range(100)])
    assert block.min() >= 0 and block.max() < 1
    np.testing.assert_array_equal(counter_uniforms(seeds[17:18], np.uint64(42)), block[42, 17:18])
    assert stats.kstest(block.ravel(), "uniform").pvalue > 1e-4
    neighbours = counter_uniforms(np.arange(10_000, dtype=np.uint64), np.uint64(0))
    assert stats.kstest(neighbours, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(block[0], block[1])[0, 1]) < 0.15


def test_counter_uniforms_are_pinned() -> None:
    # Recorded from this implementation: a change would silently alter every seeded rollout.
    values = counter_uniforms(np.array([0, 1, 2**64 - 1], dtype=np.uint64), np.array([0, 5, 9], dtype=np.uint64))
    assert [float(value).hex() for value in values] == [
        "0x1.4e0dba5e9a32fp-1",
        "0x1.8c7e0c58b861cp-1",
        "0x1.c298197bfd912p-1",
    ]
