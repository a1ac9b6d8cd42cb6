"""Slots: golden values of the primitives, the clip, the aggregations and the estimators; and the registry.

Golden numbers were computed in float64 from the formulas of verl's ``core_algos`` and of the papers named there.
"""

import math

import pytest
import torch

from agentropy.algorithms import Minibatch
from agentropy.algorithms.selectors import outside_band, reaches_turn
from agentropy.algorithms.signals import masked_mean, masked_sum, masked_var, masked_whiten, turn_cells
from agentropy.algorithms.slots import DEFAULT_SLOTS, components, use
from agentropy.algorithms.slots.regulariser import kl_estimate
from agentropy.errors import UsageError


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_masked_statistics_ignore_what_is_masked():
    mask = torch.tensor([1, 1, 0, 1])
    for junk in (3.0, 1e9, math.nan, math.inf):
        x = tensor(1, 2, junk, 4)
        assert masked_sum(x, mask) == 7
        assert masked_mean(x, mask) == pytest.approx(2.333333, abs=1e-6)
        assert masked_var(x, mask) == pytest.approx(2.333333, abs=1e-6)
        white = masked_whiten(x, mask)[mask.bool()]
        assert white.tolist() == pytest.approx([-0.872872, -0.218218, 1.091089], abs=1e-6)
    unshifted = masked_whiten(tensor(1, 2, 3, 4), mask, shift_mean=False)
    assert unshifted[0].item() == pytest.approx(-0.872872 + 2.333333, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.1, 1, -1.1),
        (1.5, 1, -1.2),
        (0.5, 1, -0.5),
        (1.1, -1, 1.1),
        (0.5, -1, 0.8),
        (1.5, -1, 1.5),
        (5, -1, 3.0),
    ],
)
def test_ppo_clip_golden(ratio, advantage, loss):
    clip = use("clip", "ppo")
    value, clipped = clip(tensor(math.log(ratio)), tensor(0), tensor(advantage), torch.tensor([True]))
    assert clipped.item() == (loss != -ratio * advantage)
    assert value.item() == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("dual", [3.0, None])
def test_ppo_gradient_vanishes_exactly_where_a_clip_binds(dual):
    for advantage in (-1.0, 1.0):
        for ratio in (0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1):
            logprob = tensor(math.log(ratio)).requires_grad_()
            loss, _ = use("clip", "ppo", dual=dual)(logprob, tensor(0), tensor(advantage), torch.tensor([True]))
            loss.backward()
            bound = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
            bound |= dual is not None and advantage < 0 and ratio > dual
            assert logprob.grad.item() == pytest.approx(0 if bound else -advantage * ratio, abs=1e-12)


def test_the_log_ratio_is_clamped_so_that_the_loss_stays_finite():
    loss, _ = use("clip", "ppo", dual=None)(tensor(500), tensor(-500), tensor(-1), torch.tensor([True]))
    assert loss.item() == pytest.approx(math.exp(20))


@pytest.mark.parametrize(
    ("mode", "golden"),
    [
        ("token-mean", 2.5),
        ("token-sum", 10.0),
        ("seq-mean-token-sum", 5.0),
        ("seq-mean-token-sum-norm", 1.25),
        ("seq-mean-token-mean", 3.0),
        ("turn-mean", 3.0),
    ],
)
def test_aggregation_golden(mode, golden):
    loss = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    coefficients = use("aggregation", mode)(Minibatch(mask=mask), mask)
    assert (coefficients * loss).sum().item() == pytest.approx(golden, abs=1e-12)


@pytest.mark.parametrize("mode", components("aggregation"))
def test_aggregation_gives_nothing_to_an_empty_batch_and_leaves_empty_rows_out(mode):
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert not use("aggregation", mode)(Minibatch(mask=empty), empty).any()
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]]).bool()
    both, one = (use("aggregation", mode)(Minibatch(mask=m), m) for m in (mask, mask[:1]))
    assert torch.equal(both[:1], one)


def test_turn_mean_weighs_turns_alike_and_token_mean_tokens():
    """One trajectory with turns of 1 and 9 tokens whose entropies are 1 and 0 (spec of EPO's Eq. 2)."""
    mask = torch.ones(1, 10, dtype=torch.bool)
    turn = torch.tensor([[0] + [1] * 9])
    entropy = torch.tensor([[1.0] + [0.0] * 9], dtype=torch.float64)
    batch = Minibatch(mask=mask, turn=turn)
    assert (use("aggregation", "turn-mean")(batch, mask) * entropy).sum() == 0.5
    assert (use("aggregation", "token-mean")(batch, mask) * entropy).sum().item() == pytest.approx(0.1)


def test_turn_mean_is_the_same_whether_turns_are_rows_or_share_a_row():
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]]).bool()
    turn = torch.tensor([[-1, 0, 0, -1, 1], [-1, 0, -1, -1, -1]])
    full = use("aggregation", "turn-mean")(Minibatch(mask=mask, turn=turn), mask)
    windows = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]).bool()
    rows = Minibatch(
        mask=windows,
        turn=torch.tensor([[-1, 0, 0, -1, -1], [-1, -1, -1, -1, 1], [-1, 0, -1, -1, -1]]),
        trajectory=torch.tensor([7, 7, 3]),
    )
    window = use("aggregation", "turn-mean")(rows, windows)
    assert torch.equal(window[windows], full[mask])
    cells = turn_cells(windows, rows.trajectory, rows.turn)
    assert cells.turns.tolist() == [1, 2] and sorted(cells.tokens.tolist()) == [1, 1, 2]


@pytest.mark.parametrize(
    ("d", "k1", "k2", "k3"), [(0.1, 0.1, 0.005, 0.004837), (-0.5, -0.5, 0.125, 0.148721), (0, 0, 0, 0)]
)
def test_kl_estimators_golden(d, k1, k2, k3):
    for name, golden in {"k1": k1, "k2": k2, "k3": k3, "k1+": k1, "k3+": k3}.items():
        logprob = tensor(d).requires_grad_()
        value = kl_estimate(logprob, tensor(0), name)
        value.sum().backward()
        gradient = {"k1": 1.0, "k3": 1 - math.exp(-d)}.get(name, d)
        assert value.item() == pytest.approx(golden, abs=1e-6)
        assert logprob.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_k3_is_clamped():
    assert kl_estimate(tensor(-400), tensor(0)).item() == 10


@pytest.mark.parametrize("values", [[1.0], [0.1] * 3, [1 / 3] * 7, [-1e8] * 5])
def test_group_baseline_of_equal_values_is_exactly_zero_and_of_one_is_the_value(values):
    advantages = use("baseline", "group")(
        tensor(*values), torch.zeros(len(values), dtype=torch.int64), torch.ones(len(values))
    )
    assert advantages.tolist() == ([0.0] * len(values) if len(values) > 1 else values)


def test_selectors():
    low, high = tensor(0, 0, 0, 0) + 0.3, tensor(0, 0, 0, 0) + 0.9
    signal = tensor(0.1, 0.3, 0.9, 1.3)
    assert outside_band(signal, low, high).tolist() == [True, False, False, True]
    assert outside_band(signal, low, high, strict=True).all()
    batch = Minibatch(mask=torch.ones(1, 2).bool(), turn=torch.tensor([[0, 3]]))
    assert reaches_turn(batch, 3).all() and not reaches_turn(batch, 4).any()


def test_a_slot_is_filled_by_name_and_mistakes_name_the_nearest():
    slots = DEFAULT_SLOTS.override({"clip": {"type": "ppo", "high": 0.28}})
    assert str(slots.clip) == "ppo(low=0.2, high=0.28, dual=3.0)"
    bonus = {"type": "entropy", "coefficient": 0.1}
    assert DEFAULT_SLOTS.override({"regularisers": [bonus]}).regularisers[0].coefficient == 0.1
    for tables, message in [
        ({"clop": {}}, "did you mean 'clip'"),
        ({"clip": {"type": "poo"}}, "did you mean 'ppo'"),
        ({"clip": {"type": "ppo", "hihg": 1}}, "did you mean 'high'"),
        ({"clip": "ppo"}, "a clip is a table with a type, one of .*ppo"),
        ({"regularisers": [{"type": "entropy"}]}, "needs the option 'coefficient'"),
    ]:
        with pytest.raises(UsageError, match=message):
            DEFAULT_SLOTS.override(tables)
