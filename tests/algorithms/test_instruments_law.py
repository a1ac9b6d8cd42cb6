"""The law of entropy and performance, and alarms over the rows of a run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.algorithms.instruments.alarms import BASELINE, PERSISTENCE, alarm_metrics, alarms
from agentropy.algorithms.instruments.law import FEWEST_POINTS, fit_law, law_metrics
from agentropy.algorithms.stats import Proportion
from agentropy.errors import UsageError

coefficients = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)
heights = st.lists(st.floats(0, 3), min_size=4, max_size=40).filter(lambda values: max(values) - min(values) > 0.1)


def train_row(step, entropy=0.6, won=40, episodes=128):
    success = Proportion(won, episodes)
    low, high = success.interval
    figures = {"success/rate": success.rate, "success/low": low, "success/high": high}
    return {"phase": "train", "step": step, "entropy/action_mean": entropy, **figures}


def run_of(entropies=None, wins=None):
    count = len(entropies or wins)
    entropies, wins = entropies or [0.6] * count, wins or [40] * count
    return [train_row(step, *each) for step, each in enumerate(zip(entropies, wins, strict=True), start=1)]


@given(coefficients, coefficients, heights)
def test_the_fit_recovers_known_coefficients(a, b, entropy):
    fit = fit_law(entropy, [b - a * math.exp(height) for height in entropy])
    if fit is None:  # fewer than three distinct checkpoints
        assert len({math.exp(height) for height in entropy}) < 3
        return
    assert fit.a == pytest.approx(a, rel=1e-6) and fit.b == pytest.approx(b, rel=1e-6, abs=1e-6)
    assert fit.ceiling == pytest.approx(b - a, rel=1e-6, abs=1e-6) == pytest.approx(fit.predict(0.0), abs=1e-9)
    assert fit.r2 == pytest.approx(1, abs=1e-6) and fit.points == len(entropy)


def test_golden_coefficients_of_noisy_checkpoints():
    """Values of ``scipy.stats.linregress`` on (-exp(H), R), and of the same on the first four of seven points."""
    entropy = [1.2, 0.9, 0.7, 0.55, 0.4, 0.3, 0.2]
    reward = [0.12, 0.21, 0.33, 0.36, 0.47, 0.45, 0.55]
    fit = fit_law(entropy, reward)
    assert (fit.a, fit.b, fit.r2) == pytest.approx(
        (0.19775165106656933, 0.7396296807364582, 0.9374753889619568), rel=1e-9
    )
    assert fit.heldout_error == pytest.approx(0.08100663122121834, rel=1e-9)


def test_the_fit_is_least_squares_of_a_plain_reference():
    rng = np.random.default_rng(0)
    entropy, reward = rng.uniform(0.1, 2, 30), rng.uniform(0, 1, 30)
    design = np.stack([-np.exp(entropy), np.ones(30)], 1)
    a, b = np.linalg.lstsq(design, reward, rcond=None)[0]
    fit = fit_law(entropy, reward)
    assert (fit.a, fit.b) == pytest.approx((a, b), rel=1e-9)
    early = np.linalg.lstsq(design[:15], reward[:15], rcond=None)[0]
    assert fit.heldout_error == pytest.approx(np.sqrt(np.mean((design[15:] @ early - reward[15:]) ** 2)), rel=1e-9)


def test_the_standard_error_of_the_ceiling_is_its_spread_over_noisy_runs():
    rng = np.random.default_rng(0)
    entropy = np.linspace(1.2, 0.2, 12)
    fits = [fit_law(entropy, 1.1 - 0.4 * np.exp(entropy) + rng.normal(0, 0.05, 12)) for _ in range(2000)]
    assert np.std([fit.ceiling for fit in fits]) == pytest.approx(
        np.mean([fit.ceiling_error for fit in fits]), rel=0.05
    )
    assert np.mean([fit.ceiling for fit in fits]) == pytest.approx(0.7, abs=0.005)


@given(st.floats(-2, 2), st.permutations(range(7)))
def test_a_shift_of_rewards_moves_the_ceiling_alone_and_order_does_not_matter_to_the_fit(shift, order):
    entropy = [1.2, 0.9, 0.7, 0.55, 0.4, 0.3, 0.2]
    reward = [0.12, 0.21, 0.33, 0.36, 0.47, 0.45, 0.55]
    fit = fit_law(entropy, reward)
    moved = fit_law([entropy[place] for place in order], [reward[place] + shift for place in order])
    assert moved.a == pytest.approx(fit.a) and moved.ceiling == pytest.approx(fit.ceiling + shift)
    assert moved.r2 == pytest.approx(fit.r2)


@pytest.mark.parametrize(
    ("entropy", "reward"),
    [
        ([], []),
        ([0.5, 0.4], [0.1, 0.2]),
        ([0.5, 0.4, 0.5, 0.4], [0.1, 0.2, 0.1, 0.2]),
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]),
        ([0.5, 0.4, math.nan], [0.1, 0.2, 0.3]),
        ([0.5, 0.4, 1e4], [0.1, 0.2, 0.3]),
    ],
)
def test_too_little_to_fit_gives_nothing(entropy, reward):
    assert fit_law(entropy, reward) is None


def test_equal_rewards_are_a_law_without_slope():
    fit = fit_law([0.5, 0.6, 0.9, 0.7], [0.3] * 4)
    assert (fit.a, fit.ceiling, fit.r2) == pytest.approx((0, 0.3, 1))


def test_a_missing_reward_is_an_error():
    with pytest.raises(UsageError, match="got 3 and 2"):
        fit_law([1, 2, 3], [1, 2])


def test_metrics_of_the_law_begin_when_there_are_points_enough_and_follow_from_the_rows():
    rows = run_of(
        [0.9 - 0.05 * step for step in range(FEWEST_POINTS)], [20 + 3 * step for step in range(FEWEST_POINTS)]
    )
    assert law_metrics(rows[:-1]) == {}
    metrics = law_metrics(rows)
    names = ("a", "b", "ceiling", "ceiling_error", "r2", "heldout_error")
    assert set(metrics) == {f"law/{name}" for name in names}
    assert metrics["law/a"] > 0 and metrics["law/r2"] > 0.95
    assert law_metrics([json.loads(json.dumps(row)) for row in rows]) == metrics


def test_a_quiet_run_raises_no_alarm():
    rng = np.random.default_rng(0)
    falling = [0.66 * 0.98**step * rng.uniform(0.85, 1.15) for step in range(34)]
    assert alarms(run_of(falling, [int(40 + step + rng.integers(-15, 15)) for step in range(34)])) == []


def test_entropy_that_collapses_is_told_once_when_it_persists():
    rows = run_of([0.6, 0.62, 0.58, 0.6, 0.61, 0.1, 0.6, 0.1, 0.1, 0.1, 0.09, 0.08])
    (alarm,) = alarms(rows)
    assert (alarm.step, alarm.kind) == (10, "entropy collapse")
    assert "from 0.600 to 0.100" in alarm.text
    assert alarms(rows[:9]) == []


def test_entropy_that_explodes_is_told_but_not_where_there_is_next_to_none():
    rows = run_of([0.6, 0.62, 0.58, 0.6, 0.61, 1.1, 1.4, 2.0])
    assert [(alarm.step, alarm.kind) for alarm in alarms(rows)] == [(8, "entropy explosion")]
    assert alarms(run_of([0.05] * 5 + [0.15] * 5)) == []


def test_entropy_that_explodes_with_the_first_update_does_not_become_the_baseline():
    """The entropies of a run that its first updates broke."""
    (alarm,) = alarms(run_of([1.23, 4.82, 5.81, 6.09, 6.34, 6.41], [0] * 6))
    assert (alarm.step, alarm.kind) == (4, "entropy explosion") and "from 1.230 to 6.090" in alarm.text
    assert alarms(run_of([1.23, 4.8, 5.8, 6.1, 1.3, 1.2, 1.3, 1.2])) == [alarms(run_of([1.23, 4.8, 5.8, 6.1]))[0]]


def test_an_alarm_ends_when_bounds_are_kept_and_can_come_again():
    low, fine = [0.1] * PERSISTENCE, [0.6] * PERSISTENCE
    rows = run_of([0.6] * BASELINE + low + fine + low)
    assert [alarm.step for alarm in alarms(rows)] == [8, 14]
    states = [alarm_metrics(rows[: k + 1])[0]["alarm/entropy_collapse"] for k in range(len(rows))]
    assert states == [0.0] * 7 + [1.0] * 3 + [0.0] * 3 + [1.0]
    raised = [alarm_metrics(rows[: k + 1])[1] for k in range(len(rows))]
    assert [alarm for each in raised for alarm in each] == alarms(rows)


def test_success_collapses_by_its_interval_only():
    wins = [30, 50, 55, 52, 50]
    assert [alarm.kind for alarm in alarms(run_of(wins=[*wins, 12, 9, 10]))] == ["success collapse"]
    assert alarms(run_of(wins=[*wins, 40, 41, 39])) == []  # worse, and still most of what it was
    assert alarms(run_of(wins=[*wins, 12, 9, 50, 10])) == []  # chance
    few = [train_row(step, won=won, episodes=4) for step, won in enumerate([1, 2, 2, 2, 1, 0, 0, 0], start=1)]
    assert alarms(few) == []  # the same fall over 4 episodes a step says nothing


def test_rows_without_figures_and_of_other_phases_are_passed_over():
    rows = run_of([0.6] * BASELINE + [0.1] * PERSISTENCE)
    noise = [{"phase": "eval", "step": 0, "entropy/action_mean": 9.0, "success/rate": 1.0}, {"phase": "sft", "step": 1}]
    blank = [{"phase": "train", "step": 6}, {**train_row(7), "entropy/action_mean": math.nan}]
    assert alarms([*noise, *rows[:6], *blank, *noise, *rows[6:]]) == alarms(rows) != []
    assert alarms([]) == []


def test_success_that_never_changed_has_no_law():
    rows = [{"entropy/action_mean": 1 - step / 20, "success/rate": 0.0} for step in range(12)]
    assert law_metrics(rows) == {}
    assert law_metrics([*rows, {"entropy/action_mean": 0.3, "success/rate": 0.1}])["law/ceiling"] > 0
