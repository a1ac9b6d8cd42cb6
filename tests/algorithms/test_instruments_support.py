"""Support of a policy: pass@k and its kin, and tasks kept, gained and lost."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.instruments.support import (
    Support,
    detectability,
    distinct_at_k,
    pass_at_k,
    pass_hat_k,
    support,
    visits,
    won_counts,
)
from agentropy.errors import UsageError

counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


def test_golden_values():
    """By hand: of the 6 pairs of 4 samples, 3 hold the only win; of the 3 pairs in 3 wins, 6 pairs in all."""
    assert pass_at_k(4, 1, 2) == 3 / 6 and pass_hat_k(4, 3, 2) == pytest.approx(3 / 6)
    assert pass_at_k(10, 0, 10) == 0 and pass_at_k(10, 1, 10) == 1 and pass_hat_k(10, 9, 10) == 0


@given(counts)
def test_both_are_the_shares_of_binomials(drawn):
    n, c, k = drawn
    at = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(at, abs=1e-12)
    assert pass_hat_k(n, c, k) == pytest.approx(math.comb(c, k) / math.comb(n, k), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 2), (6, 3, 3), (4, 4, 1)])
def test_both_equal_the_count_over_all_draws(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(draw) for draw in draws]))
    assert pass_hat_k(n, c, k) == pytest.approx(np.mean([all(draw) for draw in draws]))


def test_they_are_unbiased():
    """The expectation over the number of wins, which is binomial, is 1 - (1 - p)^k, and p^k."""
    n, p, k = 9, 0.3, 4
    wins = np.arange(n + 1)
    chances = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in wins])
    samples = np.full(n + 1, n)
    assert chances @ pass_at_k(samples, wins, k) == pytest.approx(1 - (1 - p) ** k)
    assert chances @ pass_hat_k(samples, wins, k) == pytest.approx(p**k)


def test_arrays_broadcast_and_large_numbers_do_not_overflow():
    wins = np.array([[0, 1], [5000, 10000]])
    found = pass_at_k(10000, wins, 8192)
    assert found.shape == (2, 2) and found[0].tolist() == pytest.approx([0, 0.8192]) and (found[1] == 1).all()
    assert pass_at_k(np.zeros(0, int), np.zeros(0, int), 3).shape == (0,)


@given(counts)
def test_more_samples_help_one_and_harm_all(drawn):
    n, c, k = drawn
    if k < n:
        assert pass_at_k(n, c, k) <= pass_at_k(n, c, k + 1) + 1e-12
        assert pass_hat_k(n, c, k) >= pass_hat_k(n, c, k + 1) - 1e-12
    assert pass_hat_k(n, c, k) <= pass_at_k(n, c, k) + 1e-12


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 2), (4, -1, 2), (4, 2, 5), (4, 2, 0)])
def test_counts_out_of_range_are_named(n, c, k):
    for estimate in (pass_at_k, pass_hat_k):
        with pytest.raises(UsageError, match=r"k must be|number of wins"):
            estimate(n, c, k)


def test_distinct_outcomes_are_those_of_all_draws():
    outcomes = "aaabbc"
    draws = list(itertools.combinations(outcomes, 3))
    assert distinct_at_k([3, 2, 1], 3) == pytest.approx(np.mean([len(set(draw)) for draw in draws]))
    assert distinct_at_k([3, 2, 1], 1) == pytest.approx(1) and distinct_at_k([3, 2, 1, 0], 6) == pytest.approx(3)


def test_rates_of_support_by_hand():
    """The paper's rates with 6 kept, 2 gained, 4 lost: 0.6, 0.25, their harmonic mean, and -2 of 12."""
    rates = Support(kept=6, gained=2, lost=4, never=1)
    assert (rates.retention, rates.discovery) == (0.6, 0.25)
    assert rates.dynamic_score == pytest.approx(2 / (1 / 0.6 + 1 / 0.25))
    assert rates.net_change == pytest.approx(-2 / 12)
    nothing = Support(kept=0, gained=0, lost=0, never=3)
    assert (nothing.retention, nothing.discovery, nothing.dynamic_score, nothing.net_change) == (None,) * 4
    assert Support(kept=0, gained=1, lost=1, never=0).dynamic_score == 0


def test_only_tasks_of_both_sets_are_compared():
    before = {"a": (1, 4), "b": (0, 4), "c": (2, 4), "d": (0, 4), "only": (4, 4)}
    after = {"a": (4, 4), "b": (1, 4), "c": (0, 4), "d": (0, 4)}
    assert support(before, after) == Support(kept=1, gained=1, lost=1, never=1)
    assert support(after, before) == Support(kept=1, gained=1, lost=1, never=1)
    with pytest.raises(UsageError, match="no task in common"):
        support(before, {"other": (1, 1)})


def test_an_evaluation_on_disk_gives_its_counts():
    stored = json.loads('{"tasks": ["a", "b"], "won": [[true, false, true], [false, false, false]]}')
    assert won_counts(stored) == {"a": (2, 3), "b": (0, 3)}


def test_the_golden_detectability():
    assert detectability(8192) == pytest.approx(3.66e-4, rel=1e-3)
    for samples in (1, 2, 3, 8, 100):
        assert 0 < detectability(samples) <= 1
        assert 1 - (1 - detectability(samples)) ** samples >= 0.95


def test_first_and_last_visit_are_of_tasks_that_came_again():
    def played(task, *won):
        tree = Tree(task, "train")
        tree.trajectories = [Trajectory((), won=each) for each in won] + [Trajectory((), won=True, failed=True)]
        return tree

    steps = [
        [played("a", True, False), played("b", False, False)],
        [played("a", True, True), played("c", True)],
        [played("a", False, False), played("b", True, False), played("b", True, True)],
    ]
    first, last = visits(steps)
    assert first == {"a": (1, 2), "b": (0, 2)} and last == {"a": (0, 2), "b": (3, 4)}
    assert support(first, last) == Support(kept=0, gained=1, lost=1, never=0)
