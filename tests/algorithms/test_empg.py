"""EMPG: its golden example, its invariants and its options (arXiv 2509.09265, Eq. 7, 8 and 10 to 12).

Golden numbers were computed in float64 from the equations.
"""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.recipe import METHODS, Method
from agentropy.algorithms.slots import use
from agentropy.errors import UsageError

GOLDEN = [[0.2, 0.6, 1.0], [0.4, 0.2]]
"""Entropies of the steps of two trajectories, the first of which has advantage +1 and the second -1."""
STEPS = st.lists(st.lists(st.floats(0.0, 3.0, width=32), min_size=1, max_size=5), min_size=1, max_size=6)


def batch_of(entropies, tokens=lambda owner, turn: 1, window=False):
    """Trajectories as lists of step entropies, all tokens of a step alike; one row each, or one per step."""
    rows = []
    for owner, steps in enumerate(entropies):
        pieces = [(turn, value, tokens(owner, turn)) for turn, value in enumerate(steps)]
        rows += [(owner, [piece]) for piece in pieces] if window else [(owner, pieces)]
    width = max(sum(count for *_, count in pieces) for _, pieces in rows)
    turn = torch.full((len(rows), width), -1)
    entropy = torch.zeros(len(rows), width, dtype=torch.float64)
    for row, (_, pieces) in enumerate(rows):
        start = 0
        for index, value, count in pieces:
            turn[row, start : start + count], entropy[row, start : start + count] = index, value
            start += count
    return Minibatch(
        mask=turn >= 0,
        turn=turn,
        old_logprobs=torch.zeros_like(entropy),
        old_entropy=entropy,
        trajectory=torch.tensor([owner for owner, _ in rows]),
    )


def signs(batch):
    """Advantage +1 of even trajectories and -1 of odd ones, ``[B, L]``."""
    return (1.0 - 2.0 * (batch.trajectory % 2)).double()[:, None].expand(batch.mask.shape)


def shaped(batch, advantages=None, **options):
    """``{(trajectory, turn): advantage}``, one entry per step; all tokens of a step agree."""
    result = use("shape", "entropy_modulation", **options)(batch, signs(batch) if advantages is None else advantages)
    steps = {}
    for row, column in batch.mask.nonzero().tolist():
        key = batch.trajectory[row].item(), batch.turn[row, column].item()
        assert steps.setdefault(key, result[row, column].item()) == pytest.approx(result[row, column].item(), abs=1e-12)
    return steps


def scale(batch, k=1.0):
    """g of each step: with advantages of one and ζ = 0, the result is g - 1, for the mean of g is 1."""
    return {key: 1 + value for key, value in shaped(batch, torch.ones(batch.mask.shape), k=k, zeta=0.0).items()}


def future(batch, k_future=1.0, **options):
    """f of each step's next one, less the mean: with advantages of zero and ζ = 1, nothing else is left."""
    return shaped(batch, torch.zeros(batch.mask.shape), k_future=k_future, zeta=1.0, **options)


@pytest.mark.parametrize("window", [False, True])
def test_golden(window):
    batch = batch_of(GOLDEN, window=window)
    assert list(shaped(batch).values()) == pytest.approx([1.290657, 0.754548, 0.418224, -1.059375, -1.404055], abs=1e-6)
    assert list(scale(batch).values()) == pytest.approx([1.332193, 0.808016, 0.490086, 1.037513, 1.332193], abs=1e-6)
    bonus = np.array([0.606531, 0.367879, 0, 1, 0])
    assert list(future(batch).values()) == pytest.approx(bonus - bonus.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("k", "golden"),
    [
        (0.0, [1, 1, 1, 1, 1]),
        (0.5, [1.171556, 0.912409, 0.710585, 1.033895, 1.171556]),
        (2.0, [1.607849, 0.591494, 0.217599, 0.975210, 1.607849]),
    ],
)
def test_scale_golden(k, golden):
    assert list(scale(batch_of(GOLDEN), k).values()) == pytest.approx(golden, abs=1e-6)


@given(steps=STEPS, k=st.floats(0.1, 3.0))
def test_the_scale_has_mean_one_and_falls_with_entropy_by_e_to_the_k(steps, k):
    entropies = [value for row in steps for value in row]
    found = list(scale(batch_of(steps), k).values())
    assert np.mean(found) == pytest.approx(1, abs=1e-9) and min(found) > 0
    if max(entropies) - min(entropies) > 0.1:
        assert max(found) / min(found) == pytest.approx(math.exp(k), rel=1e-6)
    order = np.argsort(entropies)
    assert all(found[low] >= found[high] - 1e-12 for low, high in pairwise(order))


@given(steps=STEPS, k_future=st.floats(0.0, 3.0))
def test_the_bonus_is_zero_on_last_steps_and_else_at_least_e_to_minus_k(steps, k_future):
    found = future(batch_of(steps), k_future)
    last = {(owner, len(row) - 1) for owner, row in enumerate(steps)}
    floor = [found[key] for key in found if key in last]
    others = [found[key] - floor[0] for key in found if key not in last]
    assert floor == pytest.approx([floor[0]] * len(floor), abs=1e-12)
    assert all(math.exp(-k_future) - 1e-6 <= value <= 1 + 1e-12 for value in others)


def test_without_its_terms_it_only_centres(ragged):
    batch, *_ = ragged(3)
    base = recipe("grpo").plan(batch).advantages
    found = recipe("empg", k=0.0, zeta=0.0).plan(batch).advantages
    steps = {}
    for row, column in batch.mask.nonzero().tolist():
        steps[batch.trajectory[row].item(), batch.turn[row, column].item()] = base[row, column].item()
    expected = torch.where(batch.mask, base - np.mean(list(steps.values())), 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("minmax", ["exact", "percentile"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 2.5])
def test_one_entropy_everywhere_scales_nothing_and_pays_every_next_step_alike(value, minmax):
    batch = batch_of([[value] * 3, [value] * 2], tokens=lambda owner, turn: 1 + 2 * turn + owner)
    mean = 3 * 0.05 / 5
    found = shaped(batch, minmax=minmax)
    expected = [1 + 0.05, 1 + 0.05, 1, -1 + 0.05, -1]
    assert list(found.values()) == pytest.approx([a - 0.2 - mean for a in expected], abs=1e-7)


@given(steps=STEPS, stretch=st.floats(0.5, 4.0), shift=st.floats(0.0, 2.0))
def test_only_relative_entropies_matter(steps, stretch, shift):
    entropies = [value for row in steps for value in row]
    assume(max(entropies) - min(entropies) > 0.05)
    moved = [[stretch * value + shift for value in row] for row in steps]
    one, two = shaped(batch_of(steps)), shaped(batch_of(moved))
    assert list(two.values()) == pytest.approx(list(one.values()), abs=2e-6)


@given(seed=st.integers(0, 2**16), window=st.booleans())
def test_the_mean_over_steps_is_zero(ragged, seed, window):
    """Steps, not tokens; a batch's advantages may differ inside a step, where its mean counts."""
    batch, *_ = ragged(seed, window=window)
    random = torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(batch.mask.shape)))
    for last_bonus in ("zero", "mean"):
        found = use("shape", "entropy_modulation", last_bonus=last_bonus)(batch, random)
        steps = {}
        for row, column in batch.mask.nonzero().tolist():
            key = batch.trajectory[row].item(), batch.turn[row, column].item()
            steps.setdefault(key, []).append(found[row, column].item())
        assert np.mean([np.mean(values) for values in steps.values()]) == pytest.approx(0, abs=1e-10)


@given(seed=st.integers(0, 2**16), data=st.data())
def test_the_order_of_rows_and_their_layout_do_not_matter(ragged, seed, data):
    """Turns of a trajectory need not be neighbours, nor in order."""
    batch, *_ = ragged(seed, window=True)
    order = data.draw(st.permutations(range(len(batch))))
    empg = recipe("empg")
    moved = empg.plan(batch.select(order)).advantages
    torch.testing.assert_close(moved, empg.plan(batch).advantages[order], rtol=1e-12, atol=1e-12)
    steps = [[float(value) for value in np.random.default_rng(seed).uniform(0, 2, size=size)] for size in (3, 1, 4)]
    assert shaped(batch_of(steps, window=True)) == pytest.approx(shaped(batch_of(steps)), abs=1e-12)


@pytest.mark.parametrize("junk", [1e9, math.nan, math.inf])
def test_entropies_and_advantages_off_the_mask_change_nothing(junk):
    batch = batch_of(GOLDEN, tokens=lambda owner, turn: 2 + turn)
    spoiled = batch.replace(old_entropy=torch.where(batch.mask, batch.old_entropy, junk))
    advantages = torch.where(batch.mask, signs(batch), junk)
    assert shaped(spoiled, advantages) == shaped(batch)
    assert use("shape", "entropy_modulation")(spoiled, advantages)[~batch.mask].eq(0).all()


def test_a_step_that_is_neither_least_nor_greatest_moves_only_itself_and_the_denominator():
    """The ratios of the others' scales stay, and so does the bonus of all but the step before it."""
    changed = [[0.2, 0.7, 1.0], [0.4, 0.2]]
    one, two = scale(batch_of(GOLDEN)), scale(batch_of(changed))
    others = [key for key in one if key != (0, 1)]
    ratio = two[0, 0] / one[0, 0]
    assert [two[key] / one[key] for key in others] == pytest.approx([ratio] * 4, abs=1e-9) and ratio > 1
    assert two[0, 1] / one[0, 1] == pytest.approx(ratio * math.exp(-0.1 / 0.8), abs=1e-6)
    one, two = future(batch_of(GOLDEN)), future(batch_of(changed))
    shift = two[1, 1] - one[1, 1]
    assert [key for key in one if two[key] - one[key] != pytest.approx(shift, abs=1e-9)] == [(0, 0)]


def test_long_steps_count_as_much_as_short_ones():
    lengths = {(0, 0): 3, (0, 1): 300, (1, 0): 7}
    long = batch_of(GOLDEN, tokens=lambda owner, turn: lengths.get((owner, turn), 1))
    assert shaped(long) == pytest.approx(shaped(batch_of(GOLDEN)), abs=1e-12)
    even = scale(batch_of([[0.5, 0.5, 1.0, 0.0]], tokens=lambda owner, turn: (3, 300, 1, 1)[turn]))
    assert even[0, 0] == pytest.approx(even[0, 1], abs=1e-12)


def test_no_gradient_flows_through_the_entropy():
    batch = batch_of(GOLDEN)
    batch = batch.replace(old_entropy=batch.old_entropy.requires_grad_(), returns=torch.tensor([1.0, 0.0]))
    plan = recipe("empg").plan(batch)
    assert plan.advantages.any() and not plan.advantages.requires_grad


def test_a_certain_right_step_learns_more_and_an_uncertain_one_less():
    """The point of the method, against the base on the same batch."""
    batch = batch_of([[0.1, 2.0], [0.1, 2.0]]).replace(returns=torch.tensor([1.0, 0.0]))
    base, empg = (recipe(name).plan(batch).advantages for name in ("grpo", "empg"))
    assert empg[0, 0] > base[0, 0] > empg[0, 1] > 0
    assert empg[1, 0] < base[1, 0] < empg[1, 1] < 0


def test_advantages_that_differ_inside_a_step_are_scaled_token_by_token():
    """Steps of two and one tokens; the centring takes the mean of the step means."""
    batch = batch_of([[0.0, 1.0]], tokens=lambda owner, turn: 2 - turn)
    found = use("shape", "entropy_modulation", zeta=0.0)(batch, torch.tensor([[1.0, 3.0, 5.0]]))[0].tolist()
    g = np.array([1.0, math.exp(-1)]) / np.mean([1.0, math.exp(-1)])
    mean = np.mean([2.0 * g[0], 5.0 * g[1]])
    assert found == pytest.approx([1.0 * g[0] - mean, 3.0 * g[0] - mean, 5.0 * g[1] - mean], abs=1e-7)


def test_the_next_step_is_the_next_turn_and_not_the_next_one_that_is_trained():
    """Turn 1 was not sampled by the policy, so nobody knows what turn 0 led to."""
    turn = torch.tensor([[0, -1, 2, 3]])
    entropy = torch.tensor([[0.0, 9.0, 0.5, 1.0]], dtype=torch.float64)
    batch = Minibatch(mask=turn >= 0, turn=turn, old_entropy=entropy, old_logprobs=torch.zeros_like(entropy))
    bonus = np.array([0, math.exp(-1), 0])
    assert list(future(batch).values()) == pytest.approx(bonus - bonus.mean(), abs=1e-7)


def test_the_next_step_is_one_of_the_same_trajectory():
    """The first trajectory ends with turn 0, and the policy came in at turn 1 of the second."""
    batch = batch_of([[0.0], [0.5, 1.0]])
    late = batch.replace(turn=torch.where(batch.mask & (batch.trajectory == 1)[:, None], batch.turn + 1, batch.turn))
    bonus = np.array([0, math.exp(-1), 0])
    assert list(future(late)) == [(0, 0), (1, 1), (1, 2)]
    assert list(future(late).values()) == pytest.approx(bonus - bonus.mean(), abs=1e-7)


def test_last_steps_get_no_bonus_the_mean_one_or_are_left_out_of_the_centring():
    batch = batch_of(GOLDEN)
    scaled = np.array([1.332193, 0.808016, 0.490086, -1.037513, -1.332193])
    bonus = 0.05 * np.array([0.606531, 0.367879, 0, 1, 0])
    last = np.array([False, False, True, False, True])
    filled = np.where(last, bonus[~last].mean(), bonus)
    expected = {
        "zero": scaled + bonus - (scaled + bonus).mean(),
        "mean": scaled + filled - (scaled + filled).mean(),
        "drop": np.where(last, scaled, scaled + bonus - (scaled + bonus)[~last].mean()),
    }
    for option, values in expected.items():
        assert list(shaped(batch, last_bonus=option).values()) == pytest.approx(values, abs=1e-6)
    # The centring no longer lowers last steps.
    assert shaped(batch, last_bonus="mean")[1, 1] > shaped(batch)[1, 1]


def test_trajectories_of_a_single_step_have_no_next_one():
    batch = batch_of([[0.3], [0.9]])
    for option in ("zero", "mean"):
        assert sum(shaped(batch, last_bonus=option).values()) == pytest.approx(0, abs=1e-12)
    certainty = 1, math.exp(-1)
    expected = [2 * certainty[0] / sum(certainty), -2 * certainty[1] / sum(certainty)]
    assert list(shaped(batch, last_bonus="drop").values()) == pytest.approx(expected, abs=1e-7)


def test_the_gate_pays_only_those_that_earned_more_than_their_group():
    """Group 0 has a winner, group 1 equal returns, and one trajectory each is alone with 1 and with 0."""
    batch = batch_of([[0.0, 0.5, 1.0]] * 6).replace(
        group=torch.tensor([0, 0, 1, 1, 2, 3]), returns=torch.tensor([1.0, 0.0, 0.1, 0.1, 1.0, 0.0])
    )
    bonus = np.zeros((6, 3))
    bonus[[0, 4], :2] = np.exp([-0.5, -1.0])
    found = future(batch, bonus_gate="success")
    assert list(found.values()) == pytest.approx((bonus - bonus.mean()).ravel(), abs=1e-7)
    bonus[[0, 4], 2] = np.exp([-0.5, -1.0]).mean()
    found = future(batch, bonus_gate="success", last_bonus="mean")
    assert list(found.values()) == pytest.approx((bonus - bonus.mean()).ravel(), abs=1e-7)


def test_groups_of_equal_returns_are_not_drawn_to_certainty_behind_the_gate():
    batch = batch_of([[0.0, 0.5, 1.0]] * 2).replace(returns=torch.tensor([0.1, 0.1]))
    assert recipe("empg").plan(batch).advantages.any()
    assert not recipe("empg", bonus_gate="success").plan(batch).advantages.any()


def test_percentiles_withstand_one_wild_step():
    """200 steps between 0 and 1 and one of 50: by least and greatest, all others look equally certain."""
    tame = [list(np.linspace(0, 1, 200))]
    wild = [*tame, [50.0]]

    def spread(steps, minmax):
        batch = batch_of(steps)
        values = shaped(batch, torch.ones(batch.mask.shape), zeta=0.0, minmax=minmax)
        found = [1 + values[0, turn] for turn in range(200)]
        return max(found) / min(found)

    assert spread(tame, "exact") == pytest.approx(math.e, rel=1e-6)
    assert spread(wild, "exact") < 1.05
    assert spread(wild, "percentile") == pytest.approx(math.e, rel=1e-6)
    batch = batch_of([[0.0, 0.01, 0.5, 1.0]])
    low, high = np.percentile([0.0, 0.01, 0.5, 1.0], [1, 99])
    level = np.clip((np.array([0.0, 0.01, 0.5, 1.0]) - low) / (high - low), 0, 1)
    certainty = np.exp(-level)
    values = shaped(batch, torch.ones(1, 4), zeta=0.0, minmax="percentile")
    assert list(values.values()) == pytest.approx(certainty / certainty.mean() - 1, abs=1e-6)


def test_the_recipe_passes_its_options_on_and_stands_on_what_is_named():
    made = recipe("dapo+empg", k=2.0, k_future=3.0, zeta=0.1, last_bonus="drop", minmax="percentile")
    assert made.slots.shapes[-1].options == {
        "k": 2.0,
        "k_future": 3.0,
        "zeta": 0.1,
        "last_bonus": "drop",
        "bonus_gate": "none",
        "minmax": "percentile",
    }
    assert list(recipe("empg").methods) == ["grpo", "empg"]


def test_an_empty_batch_has_no_steps():
    batch = Minibatch(mask=torch.zeros(2, 3).bool())
    assert not recipe("empg").plan(batch).advantages.any()


def test_damping_and_boosting_uncertain_steps_is_refused(monkeypatch):
    empg = METHODS["empg"]()
    boosting, still = SimpleNamespace(entropy_advantage=0.2), SimpleNamespace(entropy_advantage=0.0)
    assert empg.objection({"grpo": METHODS["grpo"]()}) is None
    assert empg.objection({"aepo": still}) is None
    assert "entropy_advantage=0.2 of aepo boosts them" in empg.objection({"aepo": boosting})

    class Boosting(Method):
        summary = "a stand-in"
        equations = ("A",)
        sources = ("none",)
        base = "grpo"
        entropy_advantage: float = 0.2

        def compose(self, slots, total_steps):
            return slots

    monkeypatch.setitem(METHODS, "aepo", Boosting)
    for name in ("empg+aepo", "aepo+empg"):
        with pytest.raises(UsageError, match=r"empg damps uncertain steps .*allow_conflicts=true"):
            recipe(name)
        assert recipe(name, entropy_advantage=0.0).slots.shapes
        assert recipe(name, allow_conflicts=True).slots.shapes
