"""The plain references themselves: golden values of the papers' equations and of the released code, in float64.

A reference that is wrong makes a library that is wrong in the same way look right, so none of these numbers comes from
the library: they were computed from the formulas of the papers and of verl, verl-agent, ARPO, AEPO and EPO as released.
"""

from __future__ import annotations

import ast
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ..reference import (
    aepo,
    arpo,
    dapo,
    empg,
    epo,
    gigpo,
    grpo,
    gspo,
    loss,
    ppo,
    reinforce_pp,
    rewards,
    rloo,
    rollout_correction,
    statistics,
)
from ..reference.trajectories import PerToken, Token, Trajectory, Turn

MICRO = 1e-6
"""The tables have six decimals."""


def close(expected, tolerance=MICRO):
    return pytest.approx(expected, abs=tolerance)


def episodes(outcomes, turns=None, groups=None):
    """One episode per outcome; ``turns[i]`` are the numbers of tokens of its turns, by default one turn of one."""
    turns = turns or [[1]] * len(outcomes)
    made = []
    for row, (outcome, lengths) in enumerate(zip(outcomes, turns, strict=True)):
        column, own = 0, []
        for index, length in enumerate(lengths):
            own.append(Turn(index, [Token((row, column + offset)) for offset in range(length)]))
            column += length
        group = 0 if groups is None else groups[row]
        made.append(Trajectory(group, outcome, own, [0.0] * len(lengths), [""] * len(lengths)))
    return made


def first_tokens(trajectories: list[Trajectory], values: PerToken) -> list[float]:
    """The value of each episode's first token."""
    return [values[trajectory.tokens[0].place] for trajectory in trajectories]


def all_tokens(trajectories: list[Trajectory], values: PerToken) -> list[float]:
    return [values[token.place] for trajectory in trajectories for token in trajectory.tokens]


def derivative(function, token: Token, name: str, width: float = 1e-6) -> float:
    """Central difference of ``function()`` by one field of a token."""
    start = getattr(token, name)
    values = []
    for side in (1, -1):
        setattr(token, name, start + side * width)
        values.append(function())
    setattr(token, name, start)
    return (values[0] - values[1]) / (2 * width)


def test_the_references_know_nothing_but_numpy_and_the_standard_library():
    for file in Path(loss.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1
                names = [] if node.level else [node.module]
            assert {name.split(".")[0] for name in names} <= {"numpy", *sys.stdlib_module_names}


class TestStatistics:
    def test_whitening_divides_by_the_unbiased_deviation(self):
        white = statistics.whitened({(0, 0): 1.0, (0, 1): 2.0, (0, 3): 4.0})
        assert list(white.values()) == close([-0.872872, -0.218218, 1.091089])
        assert statistics.whitened({(0, 0): 3.0}) == {(0, 0): 3.0}

    def test_entropies_of_three_logits(self):
        assert statistics.shannon([2, 1, 0]) == close(0.832396)
        assert statistics.renyi_2([2, 1, 0]) == close(0.672280)
        assert 1 - math.exp(-statistics.renyi_2([2, 1, 0])) == close(0.489457)

    def test_the_expected_squared_gradient_of_a_softmax_is_one_minus_its_collision_probability(self):
        """EMPG, Proposition 1."""
        weights = np.exp([2.0, 1.0, 0.0])
        chances = weights / weights.sum()
        squares = [float(((np.eye(3)[action] - chances) ** 2).sum()) for action in range(3)]
        assert float(chances @ squares) == close(0.489457)


class TestLoss:
    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("token-mean", 2.5),
            ("token-sum", 10.0),
            ("seq-mean-token-sum", 5.0),
            ("seq-mean-token-sum-norm", 1.25),
            ("seq-mean-token-mean", 3.0),
            ("turn-mean", 3.0),
        ],
    )
    def test_aggregations_of_rows_of_three_tokens_and_one(self, mode, expected):
        losses = {(0, 0): 1.0, (0, 1): 2.0, (0, 2): 3.0, (1, 0): 4.0}
        assert loss.aggregate(episodes([0, 0], [[3], [1]]), losses, mode, width=4) == close(expected, 1e-12)

    def test_a_turn_counts_once_however_long_it_is(self):
        one = episodes([0], [[1, 9]])
        entropies = {token.place: float(token.place[1] == 0) for token in one[0].tokens}
        assert loss.aggregate(one, entropies, "turn-mean") == 0.5
        assert loss.aggregate(one, entropies, "token-mean") == close(0.1, 1e-12)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "value", "by_log_ratio"),
        [
            (1.1, 1, -1.1, -1.1),
            (1.5, 1, -1.2, 0),
            (0.5, 1, -0.5, -0.5),
            (1.1, -1, 1.1, 1.1),
            (0.5, -1, 0.8, 0),
            (1.5, -1, 1.5, 1.5),
            (5, -1, 3.0, 0),
        ],
    )
    def test_ppo_clip(self, ratio, advantage, value, by_log_ratio):
        assert loss.ppo_clip(advantage, math.log(ratio)) == (close(value), close(by_log_ratio))

    @pytest.mark.parametrize(
        ("d", "k1", "k2", "k3"), [(0.1, 0.1, 0.005, 0.004837), (-0.5, -0.5, 0.125, 0.148721), (0.0, 0, 0, 0)]
    )
    def test_kl_estimators(self, d, k1, k2, k3):
        assert [loss.kl_estimate(d, name)[0] for name in ("k1", "k2", "k3")] == close([k1, k2, k3])
        assert loss.kl_estimate(d, "k3+") == (loss.kl_estimate(d, "k3")[0], d)

    @pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "turn-mean", "seq-mean-token-sum-norm"])
    def test_written_derivatives_equal_central_differences(self, mode):
        """Of the clipped surrogate and of every estimator of the KL term whose gradient is that of its value."""
        rng = np.random.default_rng(0)
        made = episodes([0, 0, 0], [[3, 1], [2], [1, 4, 2]])
        advantages = {}
        for token in (token for trajectory in made for token in trajectory.tokens):
            token.logp, token.old_logp, token.ref_logp = rng.normal(0, 0.5, 3)
            advantages[token.place] = float(rng.normal())
        for function in (
            lambda: loss.policy_loss(made, advantages, loss.ppo_clip, mode, 9),
            lambda: loss.policy_loss(made, advantages, loss.unclipped, mode, 9, dict.fromkeys(advantages, 0.3)),
            lambda: loss.kl_loss(made, 0.2, "k1", mode, 9),
            lambda: loss.kl_loss(made, 0.2, "k2", mode, 9),
            lambda: loss.kl_loss(made, 0.2, "k3", mode, 9),
        ):
            written = function().logp
            for trajectory in made:
                for token in trajectory.tokens:
                    assert derivative(lambda f=function: f().value, token, "logp") == close(written[token.place], 1e-9)


class TestGroups:
    def test_grpo(self):
        made = episodes([1, 0, 0, 1])
        assert first_tokens(made, grpo.advantages(made)) == close([0.866024, -0.866024, -0.866024, 0.866024])
        assert first_tokens(made, grpo.advantages(made, std=False)) == [0.5, -0.5, -0.5, 0.5]
        made = episodes([2, 0, 1, -1])
        assert first_tokens(made, grpo.advantages(made)) == close([1.161894, -0.387298, 0.387298, -1.161894])

    def test_grpo_of_an_episode_alone_and_of_two_tasks(self):
        made = episodes([0.7, 1, 0], groups=[0, 1, 1])
        assert first_tokens(made, grpo.advantages(made)) == close([0.7, 0.707106, -0.707106])

    def test_grpo_with_one_vote_per_episode_or_per_turn(self):
        made = episodes([1, 0], [[1], [1, 1, 1]])
        assert all_tokens(made, grpo.advantages(made)) == close([0.707106, -0.707106, -0.707106, -0.707106])
        assert all_tokens(made, grpo.advantages(made, per_turn=True)) == close(
            [1.499997, -0.499999, -0.499999, -0.499999]
        )

    @pytest.mark.parametrize(
        ("outcomes", "expected"),
        [
            ([1, 0, 0, 1], [0.666667, -0.666667, -0.666667, 0.666667]),
            ([2, 0, 1, -1], [2, -0.666667, 0.666667, -2]),
            ([0.7], [0]),
        ],
    )
    def test_rloo(self, outcomes, expected):
        made = episodes(outcomes)
        assert first_tokens(made, rloo.advantages(made)) == close(expected)

    def test_the_kl_penalty_is_paid_to_tokens_and_held_by_returns(self):
        made = episodes([1], [[2]])
        made[0].tokens[0].old_logp, made[0].tokens[1].old_logp = -1.0, -2.0
        made[0].tokens[0].ref_logp, made[0].tokens[1].ref_logp = -1.5, -1.0
        (paid,) = rewards.with_kl_penalty(made, 0.1)
        assert [token.reward for token in paid.tokens] == close([-0.05, 0.1], 1e-12)
        assert paid.outcome == close(1.05, 1e-12) and made[0].outcome == 1
        assert rewards.token_rewards(paid) == close([-0.05, 1.1], 1e-12)

    @pytest.mark.parametrize(
        ("tokens", "fine"), [(16000, 0), (16384, 0), (18432, -0.5), (20480, -1), (30000, -1), (0, 0)]
    )
    def test_dapos_fine_for_length(self, tokens, fine):
        assert dapo.overlong(tokens, 20480, 4096) == fine
        assert dapo.overlong(tokens, 20480, 4096, 0.5) == fine / 2

    def test_dapo_leaves_out_groups_of_equal_returns(self):
        made = episodes([1, 1, 0, 1, 0.5], groups=[0, 0, 1, 1, 2])
        assert [trajectory.group for trajectory in dapo.informative(made)] == [1, 1]
        fined = dapo.with_overlong(episodes([1.0, 1.0], [[6, 2], [1]]), 10, 4)
        assert [trajectory.outcome for trajectory in fined] == [0.5, 1.0]


class TestDiscounts:
    def rewarded(self, paid, groups=None):
        """Episodes of one turn, whose tokens are paid as given and whose returns are the sums."""
        made = episodes([sum(row) for row in paid], [[len(row)] for row in paid], groups)
        for trajectory, row in zip(made, paid, strict=True):
            for token, reward in zip(trajectory.tokens, row, strict=True):
                token.reward = reward
        return made

    def test_reinforce_pp_spends_no_discount_on_observations(self):
        """Rewards 0, 0, 1 of which the second token is an observation: it does not exist here."""
        made = self.rewarded([[0, 1]])
        assert all_tokens(made, reinforce_pp.rewards_to_go(made, 0.5)) == [0.5, 1]

    def test_reinforce_pp_whitens_the_batch(self):
        made = self.rewarded([[0, 0, 1], [0, -1]])
        assert all_tokens(made, reinforce_pp.rewards_to_go(made, 0.9)) == close([0.81, 0.9, 1, -0.9, -1], 1e-12)
        assert all_tokens(made, reinforce_pp.advantages(made, gamma=0.9)) == close(
            [0.636574, 0.724987, 0.823224, -1.043274, -1.141511]
        )

    def test_what_no_token_was_paid_is_paid_to_the_last_one(self):
        made = episodes([1.0], [[2, 1]])
        assert all_tokens(made, reinforce_pp.rewards_to_go(made, 0.5)) == [0.25, 0.5, 1]

    def test_reinforce_pp_with_a_group_baseline(self):
        """Deviations from the group's mean are .5, -.5, 0 and 0; the first episode has two tokens."""
        made = episodes([1, 0, 2, 2], [[2], [1], [1], [1]], groups=[0, 0, 1, 1])
        of_tokens = np.array([0.5, 0.5, -0.5, 0, 0])
        expected = (of_tokens - 0.1) / math.sqrt(0.7 / 4)
        assert all_tokens(made, reinforce_pp.group_advantages(made)) == close(expected.tolist())

    @pytest.mark.parametrize(
        ("paid", "values", "gamma", "expected"),
        [
            ([0, 0, 0, 1], [0.5, 0.9, 0.6, 0.7], 1.0, [0.462462, 0.065750, 0.385, 0.3]),
            ([0, 0, 1], [0.5, 0.6, 0.7], 1.0, [0.465750, 0.385, 0.3]),
            ([0, 0, 1], [0.5, 0.6, 0.7], 0.9, [0.284958, 0.286500, 0.3]),
            ([0, 1], [0, 0], 1.0, [0.95, 1]),
        ],
        ids=["all trained", "second is an observation", "discounted", "nothing after the last"],
    )
    def test_gae(self, paid, values, gamma, expected):
        assert ppo.gae(paid, values, gamma, 0.95) == close(expected)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.5, 0.9, 0.6, 0.7], [0.926931, -1.383490, 0.475796, -0.019237]),
            ([0.5, 0.6, 0.7], [0.991344, 0.017092, -1.008436]),
        ],
    )
    def test_ppo_whitens_gae(self, values, expected):
        made = episodes([1.0], [[len(values)]])
        for token, value in zip(made[0].tokens, values, strict=True):
            token.old_value = value
        assert all_tokens(made, statistics.whitened(ppo.advantages(made, lam=0.95))) == close(expected)

    def test_gae_inside_rows_pays_the_whole_return_to_each(self):
        """verl-agent: a row per turn, of two tokens and of one; what single tokens were paid does not matter."""
        made = episodes([1.0], [[2, 1]])
        for token, value, place in zip(made[0].tokens, [0.5, 0.6, 0.7], [(0, 0), (0, 1), (1, 5)], strict=True):
            token.old_value, token.reward, token.place = value, 0.25, place
        assert all_tokens(made, ppo.row_advantages(made)) == close([0.5, 0.4, 0.3], 1e-12)

    def test_the_value_loss(self):
        (made,) = episodes([0.0])
        token = made.tokens[0]
        token.value, token.old_value = 1.2, 0.5
        at = ppo.value_loss([made], {token.place: 1.5})
        assert at.value == close(0.5, 1e-12) and at.values[token.place] == 0
        assert ppo.value_loss([made], {token.place: 1.5}, clip=None).value == close(0.32, 1e-12)
        token.value = 0.6
        near = ppo.value_loss([made], {token.place: 1.5}, coefficient=2.0)
        assert near.values[token.place] == close(2 * (0.6 - 2), 1e-12)
        assert derivative(
            lambda: ppo.value_loss([made], {token.place: 1.5}, coefficient=2.0).value, token, "value"
        ) == close(near.values[token.place])


class TestRolloutCorrection:
    def made(self):
        """Logarithms of the weights .5, -.2 and 1.2, in two turns."""
        (made,) = episodes([0.0], [[2, 1]])
        for token, log in zip(made.tokens, [0.5, -0.2, 1.2], strict=True):
            token.rollout_logp = -log
        return [made]

    def test_weights_of_tokens_and_of_trajectories_are_truncated(self):
        made = self.made()
        of_tokens = rollout_correction.weights(made)
        assert list(rollout_correction.truncated(of_tokens, 2.0).values()) == close([1.648721, 0.818731, 2.0])
        whole = rollout_correction.weights(made, per_trajectory=True)
        assert list(rollout_correction.truncated(whole, 2.0).values()) == [2, 2, 2]
        assert list(whole.values()) == close([math.exp(1.5)] * 3)

    def test_weights_out_of_bounds_are_zeroed_or_leave_with_their_token(self):
        made = self.made()
        of_tokens = rollout_correction.weights(made)
        zeroed = rollout_correction.zeroed(of_tokens, 0.5, 2.0)
        assert list(zeroed.values()) == close([1.648721, 0.818731, 0])
        (left,) = rollout_correction.masked(made, of_tokens, 0.5, 2.0)
        assert [len(turn.tokens) for turn in left.turns] == [2]
        scaled = rollout_correction.normalised(made, zeroed)
        assert np.mean(list(scaled.values())) == close(1, 1e-12)


class TestGSPO:
    @pytest.mark.parametrize(
        ("log_ratios", "ratio"), [([0.02, -0.01, 0.03], 1.013423), ([3, -3, 0.6], 1.221403), ([100, -100], 1.0)]
    )
    def test_the_ratio_is_a_geometric_mean(self, log_ratios, ratio):
        assert gspo.ratio(log_ratios) == (close(ratio), close(ratio))

    def test_the_ratio_ends_at_e_to_the_tenth(self):
        assert gspo.ratio([11.0, 11.0]) == (math.exp(10), 0)

    def losses(self, log_ratios, advantage, **clip):
        row = [Token((0, t), logp=value) for t, value in enumerate(log_ratios)]
        return gspo.token_losses(row, {token.place: advantage for token in row}, **clip)

    def test_losses(self):
        assert list(self.losses([0.02, -0.01, 0.03], 1.0)[0].values()) == close([-1.0004] * 3)
        assert list(self.losses([0.02, -0.01, 0.03], -1.0)[0].values()) == close([1.013423] * 3)
        assert list(self.losses([3, -3, 0.6], 1.0, low=0.2, high=0.2)[0].values()) == close([-1.2] * 3)
        by_token = [loss.ppo_clip(1.0, value)[0] for value in (3, -3, 0.6)]
        assert np.mean(by_token) == close(-0.816596)

    def test_a_long_way_out_and_back_is_not_clipped(self):
        losses, slopes = self.losses([100, -100], 1.0)
        assert list(losses.values()) == list(slopes.values()) == [-1, -1]

    def test_token_losses_have_the_gradient_of_the_papers_objective(self):
        """One ratio per sequence, differentiated as such, and the token form: the same as long as a sequence has one
        advantage."""
        rng = np.random.default_rng(3)
        made = episodes([0] * 4, [[3], [1, 2], [5], [2]])
        advantages = {}
        for trajectory in made:
            a = float(rng.normal())
            for token in trajectory.tokens:
                token.logp = float(rng.normal(0, 0.2))
                advantages[token.place] = a
        written = gspo.policy_loss(made, advantages, low=0.05, high=0.05)
        assert written.value == close(gspo.sequence_objective(made, advantages, 0.05, 0.05), 1e-12)
        assert 0 < sum(value == 0 for value in written.logp.values()) < len(written.logp)
        for trajectory in made:
            for token in trajectory.tokens:
                objective = derivative(lambda: gspo.sequence_objective(made, advantages, 0.05, 0.05), token, "logp")
                assert objective == close(written.logp[token.place], 1e-9)

    def test_on_sequences_of_one_token_it_is_ppo_without_a_dual_clip(self):
        for advantage in (-1.3, 0.7):
            for log_ratio in (-0.5, 0.1, 0.4, 2.0):
                losses, slopes = self.losses([log_ratio], advantage, low=0.2, high=0.28)
                assert (losses[0, 0], slopes[0, 0]) == loss.ppo_clip(advantage, log_ratio, 0.2, 0.28, None)


class TestGiGPO:
    def two(self):
        """a: s0, s1 with rewards 0, 10; b: s0, s1, s1 with none."""
        made = episodes([10.0, 0.0], [[1, 1], [1, 1, 1]])
        made[0].rewards, made[0].anchors = [0, 10], ["s0", "s1"]
        made[1].rewards, made[1].anchors = [0, 0, 0], ["s0", "s1", "s1"]
        return made

    def test_step_returns(self):
        a, b = self.two()
        assert [gigpo.step_return(a, turn, 0.95) for turn in range(2)] == [9.5, 10]
        assert [gigpo.step_return(b, turn, 0.95) for turn in range(3)] == [0, 0, 0]

    def test_means_only(self):
        made = self.two()
        assert all_tokens(made, grpo.advantages(made, std=False)) == [5, 5, -5, -5, -5]
        assert all_tokens(made, grpo.advantages(made, std=False, per_turn=True)) == [6, 6, -4, -4, -4]
        assert all_tokens(made, gigpo.step_advantages(made, std=False)) == close(
            [4.75, 6.666667, -4.75, -3.333333, -3.333333]
        )
        assert all_tokens(made, gigpo.advantages(made, std=False, weight=2.0)) == close(
            [14.5, 18.333333, -14.5, -11.666667, -11.666667]
        )

    def test_means_and_deviations(self):
        made = self.two()
        assert all_tokens(made, grpo.advantages(made, per_turn=True)) == close(
            [1.095445, 1.095445, -0.730297, -0.730297, -0.730297]
        )
        assert all_tokens(made, gigpo.step_advantages(made)) == close(
            [0.707107, 1.154700, -0.707107, -0.577350, -0.577350]
        )

    def test_a_turn_like_no_other_has_no_step_advantage(self):
        made = self.two()
        made[0].anchors = ["s0", "elsewhere"]
        assert all_tokens(made, gigpo.step_advantages(made, std=False)) == [4.75, 0, -4.75, 0, 0]

    def test_observations_of_another_task_are_not_alike(self):
        made = self.two()
        made[1].group = 1
        assert all_tokens(made, gigpo.step_advantages(made, std=False)) == [0] * 5

    def test_clusters_join_the_first_that_is_similar_enough(self):
        texts = ["you see a red mug 1", "you see a red mug 2", "nothing happens"]
        assert gigpo.clusters(texts, 0.9) == {texts[0]: texts[0], texts[1]: texts[0], texts[2]: texts[2]}
        assert gigpo.clusters(texts, 1.0) == {text: text for text in texts}


class TestEPO:
    @pytest.mark.parametrize(
        ("total", "table"),
        [
            (150, {0: 2.0, 1: 1.960789, 37: 1.227638, 75: 1.049787, 100: 1.018316, 150: 1.002479}),
            (125, {0: 2.0, 31: 1.223130, 62: 1.049787, 125: 1.002362}),
        ],
    )
    def test_the_papers_phase_weight(self, total, table):
        for step, beta in table.items():
            assert epo.phase_weight(step, total) == close(beta)
        assert all(a > b > 1 for a, b in pairwise(epo.phase_weight(step, total) for step in range(total)))

    def test_the_released_phase_weight_and_its_jump(self):
        table = {0: 1, 1: 0.994737, 37: 0.874563, 75: 0.827067, 76: 0.768632, 100: 0.294304, 112: 0.182110}
        table |= {125: 0.108268, 150: 0.039830}
        for step, beta in table.items():
            assert epo.official_phase_weight(step) == close(beta)

    def test_hinge_and_indicator(self):
        """Reference .6, corridor .5 to 1.5 of it: .3 to .9. The band of the indicator is open."""
        high = 1.5 * 0.6
        assert [epo.hinge(h, 0.3, high)[0] for h in (0.1, 0.4, high, 1.3)] == close([0.2, 0, 0, 0.4], 1e-12)
        assert [0.1 * epo.indicator(h, 0.3, high)[0] for h in (0.1, 0.4, high, 1.3)] == close([0.1, 0, 0.1, 0.1], 1e-12)

    @pytest.mark.parametrize(
        ("alpha", "by_entropy"), [(0.1, [-0.00115, -0.001, -0.00085]), (1.0, [-0.0025, -0.001, 0.0005])]
    )
    def test_gradients_below_inside_and_above_the_corridor(self, alpha, by_entropy):
        """β 1.5, reference .6."""
        term = epo.EPO(2, 0.001, alpha, 0.5, 1.5, gamma=math.log(2), mode="token-sum", history=[{0: 0.6}])
        assert term.phase(1) == close(1.5, 1e-12)
        made = episodes([0], [[3]])
        for token, entropy in zip(made[0].tokens, [0.1, 0.6, 1.5], strict=True):
            token.entropy = entropy
        written = all_tokens(made, term.step(made).entropy)
        assert written == close(by_entropy, 1e-12)
        term.history = [{0: 0.6}]

        def value():
            at = term.step(made).value
            term.history = [{0: 0.6}]
            return at

        assert [derivative(value, token, "entropy") for token in made[0].tokens] == close(written, 1e-9)

    def test_the_reference_is_the_mean_of_all_steps_so_far(self):
        history = [{0: 1.0}, {0: 3.0}]
        assert epo.reference_entropy(history) == {0: 2}
        assert epo.reference_entropy([*history, {0: 5.0}]) == {0: 3}
        assert epo.reference_entropy([{0: 1.0}] * 99 + [{0: 2.0}]) == close({0: 1.01})
        assert epo.reference_entropy([{0: 0.8, 1: 0.6, 2: 0.4}, {0: 0.6, 1: 0.4, 2: 0.0}]) == close(
            {0: 0.7, 1: 0.5, 2: 0.2}
        )
        assert epo.reference_entropy([{0: 0.8, 1: 0.6}, {0: 0.6}]) == close({0: 0.7, 1: 0.6})

    def test_references_that_forget(self):
        history = [{0: 1.0}, {0: 3.0}, {0: 5.0}]
        assert epo.reference_entropy(history, "window", window=2) == {0: 4}
        assert epo.reference_entropy(history, "ema", decay=0.5) == {0: 3.5}

    def test_missing_turns_are_zeros_in_front_in_the_released_code(self):
        made = episodes([0], [[1, 2]])
        for token, entropy in zip(made[0].tokens, [1.0, 2.0, 4.0], strict=True):
            token.old_entropy = entropy
        assert epo.step_entropy(made) == close({0: 7 / 3})
        assert epo.step_entropy(made, per_turn=True) == {0: 1, 1: 3}
        assert epo.step_entropy(made, per_turn=True, pad=4) == {0: 0, 1: 0, 2: 1, 3: 3}

    def test_the_first_step_has_no_penalty_and_is_remembered_afterwards(self):
        made = episodes([0], [[1, 1]])
        for token in made[0].tokens:
            token.entropy = token.old_entropy = 2.0
        term = epo.EPO(10, kappa_high=0.0)
        assert term.step(made).value == close(-0.002, 1e-12) and term.history == [{0: 2.0}]
        assert term.step(made).value == close(-0.001 * (2 - epo.phase_weight(1, 10) * 0.1 * 2), 1e-12)
        before = epo.EPO(10, kappa_high=0.0, append="before")
        assert before.step(made).value == close(-0.001 * (2 - 2 * 0.1 * 2), 1e-12)

    def test_the_gate_of_the_released_code(self):
        made = episodes([0], [[1] * 4])
        for token in made[0].tokens:
            token.entropy = 9.0
        values = [
            epo.EPO(10, gate_turn=gate, beta="constant", history=[{0: 1.0}]).step(made).value for gate in (None, 3, 4)
        ]
        assert values[0] == values[1] == close(-0.001 * (9 - 0.1 * 7), 1e-12) and values[2] == close(-0.009, 1e-12)


class TestEMPG:
    def made(self, outcomes=(1, -1)):
        """Entropies .2, .6, 1 in the first episode and .4, .2 in the second; the first step has three tokens."""
        made = episodes(list(outcomes), [[3, 1, 1], [1, 2]])
        for trajectory, entropies in zip(made, [[0.2, 0.6, 1.0], [0.4, 0.2]], strict=True):
            for turn, entropy in zip(trajectory.turns, entropies, strict=True):
                for token in turn.tokens:
                    token.old_entropy = entropy
        return made

    def of_steps(self, made, values):
        return [values[turn.tokens[0].place] for trajectory in made for turn in trajectory.turns]

    def test_its_parts(self):
        normal = empg.normalised(empg.step_entropies(self.made()))
        assert list(normal.values()) == close([0, 0.5, 1, 0.25, 0])
        g = empg.scalings(normal)
        assert list(g.values()) == close([1.332193, 0.808016, 0.490086, 1.037513, 1.332193])
        assert np.mean(list(g.values())) == close(1.0, 1e-12)
        assert max(g.values()) / min(g.values()) == close(math.e)
        assert empg.bonuses(normal) == close({(0, 0): 0.606531, (0, 1): 0.367879, (1, 0): 1.0})

    @pytest.mark.parametrize(
        ("k", "expected"),
        [
            (0.0, [1] * 5),
            (0.5, [1.171556, 0.912409, 0.710585, 1.033895, 1.171556]),
            (2.0, [1.607849, 0.591494, 0.217599, 0.975210, 1.607849]),
        ],
    )
    def test_scalings_of_other_strengths(self, k, expected):
        normal = empg.normalised(empg.step_entropies(self.made()))
        assert list(empg.scalings(normal, k).values()) == close(expected)

    def test_the_whole(self):
        made = self.made()
        base = {token.place: t.outcome for t in made for token in t.tokens}
        final = empg.modulate(made, base)
        assert self.of_steps(made, final) == close([1.290657, 0.754548, 0.418224, -1.059375, -1.404055])
        assert sum(self.of_steps(made, final)) == close(0, 1e-12)
        assert final[0, 0] == final[0, 1] == final[0, 2]
        plain = empg.modulate(made, base, k=0, zeta=0)
        assert self.of_steps(made, plain) == close([0.8, 0.8, 0.8, -1.2, -1.2])

    def test_what_the_last_step_of_an_episode_gets(self):
        """Before centring 1.362519, .826410, .490086, -.987513, -1.332193; the mean bonus is .658137."""
        made = self.made()
        base = {token.place: t.outcome for t in made for token in t.tokens}
        with_mean = [1.362519, 0.826410, 0.490086 + 0.05 * 0.658137, -0.987513, -1.332193 + 0.05 * 0.658137]
        assert self.of_steps(made, empg.modulate(made, base, last_bonus="mean")) == close(
            [a - np.mean(with_mean) for a in with_mean]
        )
        centre = np.mean([1.362519, 0.826410, -0.987513])
        assert self.of_steps(made, empg.modulate(made, base, last_bonus="drop")) == close(
            [1.362519 - centre, 0.826410 - centre, 0.490086, -0.987513 - centre, -1.332193]
        )

    def test_bonuses_for_successes_only(self):
        made = self.made()
        base = {token.place: t.outcome for t in made for token in t.tokens}
        gated = [1.362519, 0.826410, 0.490086, -1.037513, -1.332193]
        assert self.of_steps(made, empg.modulate(made, base, successes_only=True)) == close(
            [a - np.mean(gated) for a in gated]
        )

    def test_equal_entropies_leave_advantages_alone(self):
        made = self.made()
        for trajectory in made:
            for token in trajectory.tokens:
                token.old_entropy = 0.3
        normal = empg.normalised(empg.step_entropies(made))
        assert set(normal.values()) == {0} and set(empg.scalings(normal).values()) == {1}


class TestARPO:
    @pytest.mark.parametrize(
        ("chances", "tokens", "vocabulary", "expected"),
        [
            ([0.1] * 10, 20, 152064, 3.859494),
            ([0.1] * 10, 5, 152064, 0.964874),
            ([1.0], 20, 152064, 0),
            ([0.05] * 10, 20, 152064, 2.510659),
            ([0.1] * 10, 20, 32000, 4.439364),
            ([0.1] * 10, 50, 32000, 4.439364),
        ],
    )
    def test_the_released_statistic(self, chances, tokens, vocabulary, expected):
        entropies = [arpo.truncated_entropy(chances)] * tokens
        assert arpo.statistic(entropies, "log_vocab", vocabulary) == close(expected)

    def test_the_papers_rule_branches_wherever_entropy_rises(self):
        """α = τ."""
        assert [arpo.branches(delta) for delta in (-1.0, 0.0, 1e-9, 1.0)] == [False, False, True, True]
        assert arpo.branches(0.4, alpha=0.2, beta=0.5, tau=0.39) and not arpo.branches(0.4, 0.2, 0.5, 0.41)

    def test_the_rise_of_entropy_is_that_of_the_first_tokens_that_both_have(self):
        actions = [[0.5, 1.0, 9.0], [1.0, 2.0], [0.5, 1.0, 9.0, 7.0]]
        assert arpo.rises(actions, "vocab", 3) == [0.5, 0]
        assert arpo.rises(actions, "tokens", 3, probe=1) == [0.5, 0]
        assert arpo.rises([[1.0], [4.0]], "log_vocab", 8) == close([3 / math.log(8)], 1e-12)

    def test_the_released_code_looks_at_the_action_before_the_observation(self):
        """Vocabulary e; its first decision sees no rise, and later a first action of long ago is remembered."""
        actions = [[1.0, 1.0], [3.0], [5.0, 5.0]]
        assert arpo.official_rises(actions, math.e) == close([0, 1], 1e-12)
        assert arpo.official_rises(actions, math.e, remembered=1.5) == close([0.5, 1.5], 1e-12)

    @pytest.mark.parametrize(("rise", "rate"), [(-3, 0), (-1, 0.3), (0, 0.5), (0.5, 0.6), (1, 0.7), (2.5, 1)])
    def test_the_released_rule_is_a_coin(self, rise, rate):
        draws = (np.arange(1000) + 0.5) / 1000
        assert np.mean([arpo.official_branches(draw, rise) for draw in draws]) == close(rate, 1e-12)
        assert np.clip(arpo.probability(rise), 0, 1) == close(rate, 1e-12)

    def forked(self):
        """Advantages 1.5 and -.5; two tokens in common, then two and four of their own."""
        made = episodes([1.5, -0.5], [[2, 2], [2, 4]])
        for number, trajectory in enumerate(made):
            for turn in trajectory.turns:
                for token in turn.tokens:
                    token.node = 0 if turn.index == 0 else 1 + number
        return made, {token.place: t.outcome for t in made for token in t.tokens}

    def test_hard_credit_is_the_mean_of_those_that_share_a_token(self):
        made, base = self.forked()
        assert all_tokens(made, arpo.hard_credit(made, base)) == [0.5, 0.5, 1.5, 1.5, 0.5, 0.5, *[-0.5] * 4]

    def test_a_deeper_tree_shares_less_the_further_down(self):
        made = episodes([3.0, 1.0, -1.0], [[1, 1, 1]] * 3)
        for token, node in zip((token for t in made for token in t.tokens), [0, 1, 2, 0, 1, 3, 0, 4, 5], strict=True):
            token.node = node
        base = {token.place: t.outcome for t in made for token in t.tokens}
        assert all_tokens(made, arpo.hard_credit(made, base)) == [1, 2, 3, 1, 2, 1, 1, -1, -1]
        assert all_tokens(made, arpo.shared_weights(made)) == close([1 / 3, 1 / 2, 1, 1 / 3, 1 / 2, 1, 1 / 3, 1, 1])

    @pytest.mark.parametrize(
        ("mode", "soft", "hard"), [("token-mean", 0.1, 0.1), ("seq-mean-token-mean", 0.145833, 0.104167)]
    )
    def test_soft_and_hard_credit_agree_only_where_every_token_counts_the_same(self, mode, soft, hard):
        """The gradient of one token of the prefix, in both of its copies; uphill is positive."""
        made, base = self.forked()
        for advantages, expected in ((base, soft), (arpo.hard_credit(made, base), hard)):
            slopes = loss.policy_loss(made, advantages, loss.ppo_clip, mode).logp
            assert -(slopes[0, 0] + slopes[1, 0]) == close(expected)

    def test_the_clip_parts_them_too(self):
        """Ratio 1.3: the clip holds the copy with the good advantage and not the one with the bad."""
        made, base = self.forked()
        log_ratio = math.log(1.3)
        soft = [loss.ppo_clip(base[row, 0], log_ratio)[1] for row in (0, 1)]
        hard = arpo.hard_credit(made, base)
        assert sum(soft) == close(0.65)
        assert [loss.ppo_clip(hard[row, 0], log_ratio)[1] for row in (0, 1)] == [0, 0]


class TestAEPO:
    @pytest.mark.parametrize(
        ("budget", "table"),
        [
            (
                16,
                {
                    **{-8: 1, -6: 1, -4: 2, -3: 3, -2: 5, -1: 7, -0.5: 8, 0: 9, 0.5: 9},
                    **{1: 10, 2: 12, 3: 14, 4: 15, 6: 16, 9: 16},
                },
            ),
            (12, {-4: 2, -2: 4, -1: 5, 0: 7, 1: 8, 2: 9, 4: 11, 6: 12}),
        ],
    )
    def test_the_released_split_of_the_budget(self, budget, table):
        for difference, fresh in table.items():
            assert aepo.official_fresh_rollouts(budget, difference + 2.0, 2.0) == fresh

    def test_the_papers_split_of_the_budget(self):
        for difference, fresh in {-3: 2.92, -1: 6.04, 0: 8, 1: 9.96, 3: 13.08}.items():
            assert aepo.fresh_rollouts(16, difference, 0.0) == close(fresh, 0.005)

    @pytest.mark.parametrize(
        ("rise", "table"),
        [
            (0, {0: 0.5, 1: 0.4737, 2: 0.4444, 3: 0.4118, 5: 0.3333, 10: 0, 15: 0, 20: 0}),
            (1, {0: 0.7, 1: 0.6737, 2: 0.6444, 3: 0.6118, 5: 0.5333, 10: 0.2, 15: 0, 20: 0}),
            (2, {0: 0.9, 1: 0.8737, 2: 0.8444, 3: 0.8118, 5: 0.7333, 10: 0.4, 15: 0, 20: 0}),
        ],
    )
    def test_the_released_branch_probability(self, rise, table):
        draws = (np.arange(2000) + 0.5) / 2000
        for consecutive, chance in table.items():
            assert aepo.official_probability(rise, consecutive) == close(chance, 5e-5)
            fires = [aepo.official_branches(draw, rise, consecutive) for draw in draws]
            assert np.mean(fires) == close(chance, 6e-4)

    def test_the_papers_branch_probability_falls_with_every_branch(self):
        assert aepo.probability(1.0, 0) == arpo.probability(1.0) == close(0.7, 1e-12)
        assert aepo.probability(1.0, 4) == close(0.7 * 0.8, 1e-12)
        assert aepo.probability(1.0, 20) == aepo.probability(1.0, 25) == 0

    def test_a_chain_of_branches_is_stopped_by_its_own_length(self):
        """α 1, no γ: P is 1, .75, .5, and so the third does not branch and the fourth does again."""
        assert aepo.chain([0.0] * 4, 1.0, 0.0, 0.5, 0.25) == [(1, True), (0.75, True), (0.5, False), (1, True)]

    @pytest.mark.parametrize(
        ("ratio", "advantage", "value", "by_log_ratio"),
        [
            (0.5, 1, -0.5, -0.5),
            (1.1, 1, -1.1, -1.1),
            (1.5, 1, -1.2, -1.2),
            (4.0, 1, -1.2, -1.2),
            (0.5, -1, 0.8, 0),
            (1.5, -1, 1.5, 1.5),
            (4.0, -1, 3.0, 0),
        ],
    )
    def test_the_clip_that_keeps_a_gradient(self, ratio, advantage, value, by_log_ratio):
        assert aepo.preserving_clip(advantage, math.log(ratio)) == (close(value), close(by_log_ratio))
        assert loss.ppo_clip(advantage, math.log(ratio))[0] == close(value)

    def test_the_two_sided_clip_keeps_one_below_too(self):
        assert aepo.preserving_clip(-1, math.log(0.5), both_sides=True) == (close(0.8), close(0.8))

    def test_its_gradient_is_that_of_the_stop_gradient_surrogate(self):
        """``min(r A, clip(r, 1 - low, (1 + high) / sg(r) · r) A)`` as a loss, with sg(r) held fixed in the central
        difference, which is what a stop-gradient means."""

        def surrogate(advantage, ratio, stopped):
            upper = (1 + 0.2) / stopped * ratio
            value = max(-advantage * ratio, -advantage * min(max(ratio, 1 - 0.2), upper))
            return min(value, -advantage * 3.0) if advantage < 0 else value

        for advantage in (-1.3, 0.7):
            for ratio in (0.3, 0.7, 0.9, 1.1, 1.3, 2.0, 5.0):
                value, slope = aepo.preserving_clip(advantage, math.log(ratio))
                assert surrogate(advantage, ratio, ratio) == close(value, 1e-12)
                sides = [surrogate(advantage, ratio * math.exp(side * 1e-6), ratio) for side in (1, -1)]
                assert (sides[0] - sides[1]) / 2e-6 == close(slope, 1e-8)

    def test_entropy_factors(self):
        made = episodes([1], [[4]])
        for token, entropy in zip(made[0].tokens, [0.2, 0.4, 0.6, 2.0], strict=True):
            token.old_entropy = entropy
        factors = all_tokens(made, aepo.entropy_factors(made))
        assert factors == close([0.853031, 0.902020, 0.951010, 1.293939])
        assert np.mean(factors) == close(1, 1e-12)
        assert all_tokens(made, aepo.entropy_factors(made, 1.0, clamp=(0.6, 2.0)))[0] == 0.6
        assert all_tokens(made, aepo.modulate(made, dict.fromkeys(aepo.entropy_factors(made), -2.0))) == close(
            [-2 * factor for factor in factors], 1e-12
        )

    def test_entropies_that_do_not_differ_and_a_token_alone_change_nothing(self):
        for tokens in (1, 3):
            made = episodes([1], [[tokens]])
            for token in made[0].tokens:
                token.old_entropy = 0.1
            assert set(aepo.entropy_factors(made).values()) == {1}
