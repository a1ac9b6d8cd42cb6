"""Intervals cover what they should, equals are seldom told apart, and a real effect is found."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agentropy.algorithms.stats import Proportion
from agentropy.benchmarks.comparison import statistics

SEEDS, TASKS, LAST = 5, 128, 2


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 499)


def scores(rng, tasks, *, effect=0.0, spread=0.12):
    """[S, T]: mean success of LAST evaluations. Logits: of a task, of a run, of both together, and the effect."""
    logits = tasks + rng.normal(0, spread, (SEEDS, 1)) + rng.normal(0, 0.6, (SEEDS, TASKS)) + effect
    return rng.binomial(LAST, 1 / (1 + np.exp(-logits))) / LAST


def found(rng, effect, comparisons):
    """How many of the comparisons tell the two apart, and the mean difference."""
    apart, differences = 0, []
    for _ in range(comparisons):
        tasks = rng.normal(-0.5, 1.8, (1, TASKS))
        result = statistics.compare(scores(rng, tasks, effect=effect), scores(rng, tasks), rng)
        apart += statistics.differs(statistics.adjust([result.p])[0], result.difference)
        differences.append(result.difference.value)
    return apart, float(np.mean(differences))


def test_a_recipe_against_itself_is_no_different_in_95_of_100_comparisons():
    apart, mean = found(np.random.default_rng(20), 0.0, 200)
    assert apart <= 10
    assert abs(mean) < 0.01


def test_an_effect_of_ten_points_is_found():
    apart, mean = found(np.random.default_rng(21), 0.66, 100)
    assert mean == pytest.approx(0.1, abs=0.02)
    assert apart >= 80


def test_among_six_equals_hardly_any_family_shows_a_difference():
    rng, families = np.random.default_rng(22), 0
    for _ in range(60):
        tasks = rng.normal(-0.5, 1.8, (1, TASKS))
        baseline = scores(rng, tasks)
        results = [statistics.compare(scores(rng, tasks), baseline, rng) for _ in range(6)]
        adjusted = statistics.adjust([result.p for result in results])
        families += any(statistics.differs(q, result.difference) for q, result in zip(adjusted, results, strict=True))
    assert families <= 3


def test_the_interval_covers_the_mean_of_other_seeds_and_tasks():
    """Its nominal level is 95 %; five seeds are few, so 90 % are asked for."""
    rng, covered = np.random.default_rng(23), 0
    population = scores_mean = np.mean([scores(rng, rng.normal(-0.5, 1.8, (1, TASKS))).mean() for _ in range(2000)])
    for _ in range(100):
        interval = statistics.crossed_interval(scores(rng, rng.normal(-0.5, 1.8, (1, TASKS))), rng)
        covered += interval.low <= population <= interval.high
    assert covered >= 90
    assert 0 < scores_mean < 1


def test_runs_are_the_unit_of_chance():
    """Runs that differ much, on tasks that all win alike: resampling episodes would call the mean certain."""
    table = np.repeat([[0.0], [1.0], [0.0], [1.0]], TASKS, axis=1)
    interval = statistics.crossed_interval(table, np.random.default_rng(0))
    assert interval.high - interval.low >= 0.9


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_a_rate_of_none_or_all_is_not_certain(won):
    interval = statistics.rate_interval(np.full((SEEDS, TASKS), won), np.random.default_rng(0))
    expected = Proportion(round(won * TASKS), TASKS)
    assert (interval.low, interval.high) == pytest.approx(expected.interval)


def test_one_run_has_an_interval_over_tasks_and_no_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 2, (1, TASKS)), rng.integers(0, 2, (1, TASKS))
    result = statistics.compare(ours, theirs, rng)
    assert result.p == 1.0 and math.isnan(result.deviation)
    assert result.difference.low < result.difference.value < result.difference.high
    assert (result.improvement.low, result.improvement.high) == (0.0, 1.0)


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((SEEDS, TASKS)), rng.random((SEEDS, TASKS))
    expected = stats.ttest_rel(ours.mean(1), theirs.mean(1)).pvalue
    assert statistics.compare(ours, theirs, rng).p == pytest.approx(expected)


@pytest.mark.parametrize(("gap", "p"), [(0.0, 1.0), (0.25, 2.0 ** (1 - SEEDS)), (-0.25, 2.0 ** (1 - SEEDS))])
def test_differences_without_spread_are_no_surer_than_their_signs(gap, p):
    """A t-test would call two seeds of a small panel that happen to differ by the same certain."""
    table = np.full((SEEDS, TASKS), 0.5)
    assert statistics.compare(table + gap, table, np.random.default_rng(0)).p == p


def test_rounding_is_no_difference():
    """Equal rates in thirds, whose means differ in the last place only."""
    table = np.full((SEEDS, TASKS), 1 / 3)
    noise = np.where(np.arange(SEEDS) % 2, 1e-16, 2e-16)[:, None]
    result = statistics.compare(table + noise, table, np.random.default_rng(0))
    assert (result.p, result.deviation) == (1.0, 0.0)
    assert result.improvement.value == 0.5


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6), st.lists(st.integers(0, 4), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_improvement_counts_pairs(first, second):
    pairs = [(a > b) + (a == b) / 2 for a in first for b in second]
    result = statistics.improvement(first, second, np.random.default_rng(0))
    assert result.value == pytest.approx(sum(pairs) / len(pairs))
    assert 0 <= result.low <= result.high <= 1
    assert result.value + statistics.improvement(second, first, np.random.default_rng(0)).value == pytest.approx(1)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_intervals_hold_the_value_and_repeat(seeds, tasks, number):
    table = np.random.default_rng(number).integers(0, 2, (seeds, tasks)).astype(float)
    interval = statistics.crossed_interval(table, np.random.default_rng(number))
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval == statistics.crossed_interval(table, np.random.default_rng(number))
    middle = statistics.interquartile_mean(table, np.random.default_rng(number))
    assert middle.value == pytest.approx(stats.trim_mean(table.ravel(), 0.25))


def test_the_smallest_effect_is_found_four_times_in_five():
    rng, seeds, deviation = np.random.default_rng(5), 5, 0.04
    effect = statistics.smallest_effect(deviation, seeds)
    samples = rng.normal(effect, deviation, (20_000, seeds))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)
    assert statistics.smallest_effect(deviation, seeds, 12) > effect > statistics.smallest_effect(deviation, 10)
    assert math.isnan(statistics.smallest_effect(deviation, 1))


def test_tables_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="same seeds and tasks"):
        statistics.compare(np.zeros((2, 3)), np.zeros((2, 4)), np.random.default_rng(0))
