"""GiGPO: step returns, anchor groups and their advantages (arXiv 2505.10978, and verl-agent's ``core_gigpo``)."""

import difflib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.slots.credit import _clusters
from agentropy.errors import UsageError


def batch_of(episodes, *, group=None, window=False):
    """Trajectories as lists of (observation, reward), one token per turn."""
    longest = max(map(len, episodes))
    rows = [(owner, [turn]) for owner, steps in enumerate(episodes) for turn in range(len(steps))]
    if not window:
        rows = [(owner, list(range(len(steps)))) for owner, steps in enumerate(episodes)]
    turn = torch.full((len(rows), longest), -1)
    for row, (_, turns) in enumerate(rows):
        turn[row, : len(turns)] = torch.tensor(turns)
    owner = torch.tensor([owner for owner, _ in rows])
    paid = [[reward for _, reward in steps] + [0.0] * (longest - len(steps)) for steps in episodes]
    return Minibatch(
        mask=turn >= 0,
        turn=turn,
        old_logprobs=torch.zeros(turn.shape, dtype=torch.float64),
        group=torch.zeros_like(owner) if group is None else torch.tensor(group)[owner],
        trajectory=owner,
        returns=torch.tensor([sum(row) for row in paid], dtype=torch.float64)[owner],
        turn_rewards=torch.tensor(paid)[owner],
        anchor=[tuple(text for text, _ in episodes[name]) for name in owner.tolist()],
    )


def advantages(batch, **options):
    """Advantage of each trained token, row by row."""
    return recipe("gigpo", **options).plan(batch).advantages[batch.mask].tolist()


TWO = [[("s0", 0.0), ("s1", 10.0)], [("s0", 0.0), ("s1", 0.0), ("s1", 0.0)]]
"""One trajectory reaches the reward from s1; the other stays there. Step returns: 9.5, 10 and 0, 0, 0."""


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(
    ("std", "stats", "episode", "step"),
    [
        (False, "turns", [6, 6, -4, -4, -4], [4.75, 6.666667, -4.75, -3.333333, -3.333333]),
        (False, "trajectories", [5, 5, -5, -5, -5], [4.75, 6.666667, -4.75, -3.333333, -3.333333]),
        (
            True,
            "turns",
            [1.095445, 1.095445, -0.730297, -0.730297, -0.730297],
            [0.707107, 1.154700, -0.707107, -0.577350, -0.577350],
        ),
    ],
)
def test_golden(window, std, stats, episode, step):
    """Both modes of verl-agent's core_gigpo, over rows; and over trajectories, as the paper counts."""
    batch, options = batch_of(TWO, window=window), {"normalize_std": std, "group_stats": stats}
    whole = advantages(batch, step_weight=0.0, **options)
    assert whole == pytest.approx(episode, abs=2e-6)
    both = advantages(batch, step_weight=1.0, **options)
    assert [a - e for a, e in zip(both, whole, strict=True)] == pytest.approx(step, abs=2e-6)
    assert advantages(batch, step_weight=0.5, **options) == pytest.approx(
        [e + s / 2 for e, s in zip(episode, step, strict=True)], abs=4e-6
    )


def plain(batch, weight, gamma, std):
    """The equations, one turn after the other; a dictionary of (trajectory, turn)."""

    def compare(sample, value):
        return (value - np.mean(sample)) / (np.std(sample, ddof=1) + 1e-6 if std else 1)

    returns, groups, values, anchors = {}, {}, {}, {}
    for row in range(len(batch)):
        owner = batch.trajectory[row].item()
        groups[owner], returns[owner] = batch.group[row].item(), batch.returns[row].item()
        for turn in set(batch.turn[row][batch.mask[row]].tolist()):
            rewards = batch.turn_rewards[row].tolist()[turn:]
            values[owner, turn] = sum(gamma**k * reward for k, reward in enumerate(rewards))
            anchors[owner, turn] = (groups[owner], batch.anchor[row][turn])
    result = {}
    for owner, turn in values:
        sample = [returns[other] for other in returns if groups[other] == groups[owner]]
        alike = [values[key] for key in values if anchors[key] == anchors[owner, turn]]
        step = compare(alike, values[owner, turn]) if len(alike) > 1 else 0.0
        result[owner, turn] = compare(sample, returns[owner]) + weight * step
    return result


@given(
    seed=st.integers(0, 2**16),
    window=st.booleans(),
    std=st.booleans(),
    gamma=st.sampled_from([0.0, 0.95, 1.0]),
    weight=st.sampled_from([0.5, 1.0]),
)
def test_equals_a_plain_loop(ragged, seed, window, std, gamma, weight):
    batch, *_ = ragged(seed, window=window)
    gigpo = recipe("gigpo", step_weight=weight, step_gamma=gamma, normalize_std=std)
    found, expected = gigpo.plan(batch).advantages, plain(batch, weight, gamma, std)
    for row, column in batch.mask.nonzero().tolist():
        key = batch.trajectory[row].item(), batch.turn[row, column].item()
        # Values that are equal but for rounding are divided by 1e-6 in the plain loop.
        assert found[row, column].item() == pytest.approx(expected[key], abs=1e-8)


def test_a_weight_of_zero_is_the_base_bit_for_bit(ragged):
    for options in ({}, {"normalize_std": False}, {"group_stats": "turns"}):
        batch, *_ = ragged(4)
        base, gigpo = recipe("grpo", **options), recipe("gigpo", step_weight=0.0, **options)
        assert torch.equal(gigpo.plan(batch).advantages, base.plan(batch).advantages)


def test_a_state_seen_once_is_compared_with_nothing():
    """Only the trajectory's advantage stays; the convention of groups, the value itself, would give 9.5 and 10."""
    episodes = [[("a", 0.0), ("b", 10.0)], [("c", 0.0)]]
    assert advantages(batch_of(episodes), normalize_std=False) == [5, 5, -5]


def test_states_are_shared_within_a_task_and_not_between_tasks():
    episodes = [[("s", 1.0)], [("s", 3.0)], [("s", 100.0)], [("t", 100.0)]]
    batch = batch_of(episodes, group=[0, 0, 1, 1])
    assert advantages(batch, normalize_std=False) == [-2, 2, 0, 0]


def test_turns_of_one_trajectory_are_compared_where_it_comes_back_to_a_state():
    """It was in s before turns 0 and 2, with values 1 + γ² and 1."""
    batch = batch_of([[("s", 0.0), ("t", 1.0), ("s", 1.0)]])
    whole = 2.0  # A trajectory alone in its group.
    values = 0.5 + 0.25, 1.0
    assert advantages(batch, normalize_std=False, step_gamma=0.5) == pytest.approx(
        [whole + (values[0] - values[1]) / 2, whole, whole + (values[1] - values[0]) / 2]
    )


def test_equal_outcomes_give_exactly_zero():
    batch = batch_of([[("s", 0.1), ("s", 0.1)], [("t", 0.2)]])
    assert advantages(batch, step_gamma=0.0)[:2] == advantages(batch, step_weight=0.0)[:2]
    assert advantages(batch_of([[("s", 0.1)]] * 3)) == [0, 0, 0]


def test_similar_observations_share_a_group_when_asked_to():
    """One more word changes 9 of some 80 letters; the third text says something else."""
    room = "You are in the kitchen. On the table 1 you see a mug 1 and an apple 2."
    episodes = [[(room, 4.0)], [(room + " And dust.", 0.0)], [("You are in the garden.", 5.0)]]
    batch = batch_of(episodes)
    whole = advantages(batch, normalize_std=False, step_weight=0.0)

    def step(similarity):
        both = advantages(batch, normalize_std=False, similarity=similarity)
        return [a - e for a, e in zip(both, whole, strict=True)]

    assert step(None) == step(1.0) == step(0.95) == [0, 0, 0]
    assert step(0.9) == [2, -2, 0]
    assert step(0.1) == [1, -3, 2]


def test_a_text_joins_the_first_cluster_whose_first_text_it_resembles():
    """a resembles b and b resembles c, but c is compared with a, which stands for the cluster of both."""
    a, b, c = "aaaaaaaaaa", "aaaaaaaabb", "aaaaaabbbb"
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    assert ratio == 0.8 and difflib.SequenceMatcher(None, a, c).ratio() == 0.6
    assert _clusters([a, b, c], 0.8) == {a: 0, b: 0, c: 1}
    assert _clusters([a, b, c], 0.6) == {a: 0, b: 0, c: 0}


def test_long_texts_resemble_each_other_as_short_ones_do():
    """Beyond 200 characters ``difflib`` by default takes common letters for noise, and these texts for strangers."""
    one = "abcde fghij klmno pqrst uvwxy " * 8
    other = "".join(letter + ("." if place % 10 == 9 else "") for place, letter in enumerate(one))
    assert difflib.SequenceMatcher(None, one, other).ratio() < 0.9
    assert _clusters([one, other], 0.95) == {one: 0, other: 0}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]])
def test_clusters_depend_neither_on_the_order_of_rows_nor_on_the_names_of_trajectories(order):
    """The middle text resembles both others, which do not resemble each other: who comes first decides."""
    texts = ["aaaaaaaaaa", "aaaaaaaabb", "aaaaaabbbb"]
    batch = batch_of([[(texts[place], float(place))] for place in order])
    shuffled = batch.select([1, 2, 0])
    options = {"similarity": 0.8, "normalize_std": False, "step_weight": 3.0}
    expected = [-1.0 - 1.5, 0.0 + 1.5, 1.0]
    assert advantages(batch, **options) == pytest.approx([expected[place] for place in order])
    assert advantages(shuffled, **options) == pytest.approx([expected[order[row]] for row in (1, 2, 0)])


def test_what_the_batch_lacks_is_named():
    batch = batch_of(TWO)
    for changes, message in [
        ({"turn_rewards": None}, "credit by anchors needs turn_rewards"),
        ({"anchor": None}, "credit by anchors needs anchor"),
        ({"anchor": [("s0",), ("s0", "s1", "s1")]}, "anchor of row 0 holds 1 turns; there are tokens of turn 1"),
        ({"turn_rewards": batch.turn_rewards[:, :2]}, "turn_rewards hold 2 turns; there are tokens of turn 2"),
    ]:
        with pytest.raises(UsageError, match=message):
            recipe("gigpo").plan(batch.replace(**changes))


def test_planning_leaves_the_batch_as_it_was():
    batch = batch_of(TWO).replace(turn_rewards=batch_of(TWO).turn_rewards.double())
    before = batch.turn_rewards.clone()
    recipe("gigpo").plan(batch)
    assert torch.equal(batch.turn_rewards, before)


def test_a_batch_without_trained_tokens_has_no_steps():
    batch = batch_of(TWO).replace(mask=torch.zeros(2, 3).bool())
    assert not recipe("gigpo").plan(batch).advantages.any()


def test_the_foundation_keeps_its_unit_and_its_baseline():
    made = recipe("grpo+gigpo", group_stats="turns", normalize_std=False, similarity=0.9).slots
    assert made.credit.options == {"weight": 1.0, "gamma": 0.95, "unit": "turns", "similarity": 0.9}
    assert not made.baseline.options["std"]


@pytest.mark.parametrize("name", ["ppo", "reinforce_pp"])
def test_a_foundation_with_a_credit_of_its_own_is_refused(name):
    with pytest.raises(UsageError, match=f"{name} has a credit of its own, which gigpo would replace"):
        recipe(f"{name}+gigpo")
    assert recipe(f"{name}+gigpo", allow_conflicts=True).slots.credit.name == "anchors"


def test_two_advantages_of_single_turns_are_refused():
    with pytest.raises(UsageError, match=r"gigpo and turn_credit=1.0 of grpo each give turns an advantage"):
        recipe("gigpo", turn_credit=1.0)
    assert recipe("gigpo", turn_credit=0.0).slots.credit.name == "anchors"


@pytest.mark.parametrize(("preset", "std"), [("alfworld", True), ("webshop", False)])
def test_presets_hold_the_values_of_the_official_scripts(preset, std):
    made = recipe("gigpo", preset)
    base, gigpo = made.methods["grpo"], made.methods["gigpo"]
    assert (gigpo.step_weight, gigpo.step_gamma, gigpo.similarity) == (1.0, 0.95, None)
    assert (base.group_stats, base.kl_coef, base.normalize_std) == ("turns", 0.01, std)


def test_options_out_of_range_are_refused():
    for options in ({"similarity": 0.0}, {"similarity": 1.5}, {"step_gamma": 1.1}, {"step_weight": -1.0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            recipe("gigpo", **options)


def test_rows_of_turns_may_say_what_their_own_turn_was_told_and_paid():
    """GiGPO's example (a: s0, s1 paid 0, 10; b: s0, s1, s1 paid 0), one row a turn, in two notations and orders."""
    owner = torch.tensor([0, 0, 1, 1, 1])
    whole = Minibatch(
        mask=torch.ones(5, 1).bool(),
        turn=torch.tensor([[0], [1], [0], [1], [2]]),
        trajectory=owner,
        returns=torch.tensor([10.0, 10, 0, 0, 0]),
        turn_rewards=torch.tensor([[0.0, 10, 0], [0, 0, 0]])[owner],
        anchor=[("s0", "s1")] * 2 + [("s0", "s1", "s1")] * 3,
    )
    own = Minibatch(
        mask=torch.ones(5, 1).bool(),
        trajectory=owner,
        returns=torch.tensor([10.0, 10, 0, 0, 0]),
        turn_rewards=torch.tensor([0.0, 10, 0, 0, 0]),
        anchor=["s0", "s1", "s0", "s1", "s1"],
    )
    assert torch.equal(own.turn, whole.turn)
    plans = [recipe("gigpo", normalize_std=False).plan(batch).advantages[:, 0] for batch in (whole, own)]
    assert torch.equal(*plans)
    assert plans[0].tolist() == pytest.approx([9.75, 35 / 3, -9.75, -25 / 3, -25 / 3], abs=1e-4)
    order = [3, 0, 4, 2, 1]
    assert torch.equal(recipe("gigpo", normalize_std=False).plan(own.select(order)).advantages[:, 0], plans[1][order])
    numbered = own.replace(anchor=torch.tensor([0, 1, 0, 1, 1]))
    assert torch.equal(recipe("gigpo", normalize_std=False).plan(numbered).advantages[:, 0], plans[1])
    several = {"mask": torch.ones(1, 2).bool(), "turn": torch.tensor([[0, 1]])}
    for fields, message in (
        ({"turn_rewards": torch.ones(1), "anchor": ["s0"]}, "turn_rewards .B. are for rows of one turn each"),
        ({"turn_rewards": torch.ones(1, 2), "anchor": ["s0"]}, "an anchor of one value is for a row of one turn"),
    ):
        batch = Minibatch(**several, **fields)
        recipe("grpo").plan(batch)
        with pytest.raises(UsageError, match=message):
            recipe("gigpo").plan(batch)
