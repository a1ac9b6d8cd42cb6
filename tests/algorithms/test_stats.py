"""Rates come with Wilson's interval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from agentropy.algorithms.stats import Proportion, panel_hash


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_equals_scipys_wilson_interval(counts: tuple[int, int]) -> None:
    successes, trials = counts
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert Proportion(successes, trials).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_trials_know_nothing() -> None:
    assert Proportion(0, 0).interval == (0.0, 1.0)


def test_a_panel_is_named_by_its_tasks_whatever_their_order() -> None:
    assert panel_hash(["b", "a"]) == panel_hash(["a", "b"]) != panel_hash(["a", "c"])
