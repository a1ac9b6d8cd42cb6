"""GRPO: its advantages, in both ways of counting, and its loss against a plain reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe
from agentropy.errors import UsageError


def advantages(returns, *, trajectory=None, **options):
    """Advantage of each row of one group whose rows have one token."""
    rows = len(returns)
    batch = Minibatch(
        mask=torch.ones(rows, 1).bool(),
        turn=torch.zeros(rows, 1).long() if trajectory is None else _turns(trajectory),
        returns=torch.tensor(returns, dtype=torch.float64),
        trajectory=None if trajectory is None else torch.tensor(trajectory),
        old_logprobs=torch.zeros(rows, 1, dtype=torch.float64),
    )
    return recipe("grpo", **options).plan(batch).advantages[:, 0].tolist()


def _turns(trajectory):
    return torch.tensor([[trajectory[:row].count(name)] for row, name in enumerate(trajectory)])


def test_group_statistics_golden():
    """Unbiased std plus 1e-6; without it, Dr. GRPO's advantage."""
    assert advantages([1, 0, 0, 1]) == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-6)
    assert advantages([2, 0, 1, -1]) == pytest.approx([1.161894, -0.387298, 0.387298, -1.161894], abs=1e-6)
    assert advantages([1, 0, 0, 1], normalize_std=False) == [0.5, -0.5, -0.5, 0.5]


def test_a_long_trajectory_counts_once_or_once_per_turn():
    """One trajectory of one turn earns 1 and one of three turns 0 (verl-agent, issue 138)."""
    rows, returns = [0, 1, 1, 1], [1, 0, 0, 0]
    once = advantages(returns, trajectory=rows)
    assert once == pytest.approx([0.707106, -0.707106, -0.707106, -0.707106], abs=1e-6)
    per_turn = advantages(returns, trajectory=rows, group_stats="turns")
    assert per_turn == pytest.approx([1.499997, -0.499999, -0.499999, -0.499999], abs=1e-6)


def test_a_full_row_counts_its_turns_like_window_rows():
    batch = Minibatch(
        mask=torch.tensor([[1, 0, 0, 0, 0], [1, 0, 1, 0, 1]]).bool(),
        turn=torch.tensor([[0, -1, -1, -1, -1], [0, -1, 1, -1, 2]]),
        returns=torch.tensor([1.0, 0.0]),
    )
    plan = recipe("grpo", group_stats="turns").plan(batch)
    assert plan.advantages[:, 0].tolist() == pytest.approx([1.499997, -0.499999], abs=1e-6)


@given(seed=st.integers(0, 2**16), window=st.booleans(), gamma=st.sampled_from([0.0, 0.5, 1.0]))
def test_turn_credit_against_a_plain_loop(ragged, seed, window, gamma):
    batch, *_ = ragged(seed, window=window)
    plan = recipe("grpo", turn_credit=2.0, turn_gamma=gamma).plan(batch)
    whole = recipe("grpo").plan(batch).advantages
    value, groups = {}, {}
    for row in range(len(batch)):
        for turn in set(batch.turn[row][batch.mask[row]].tolist()):
            paid = batch.turn_rewards[row].tolist()[turn:]
            value[batch.trajectory[row].item(), turn] = sum(gamma**k * reward for k, reward in enumerate(paid))
            groups[batch.trajectory[row].item()] = batch.group[row].item()
    for row, column in batch.mask.nonzero().tolist():
        trajectory, turn = batch.trajectory[row].item(), batch.turn[row, column].item()
        others = [value[key] for key in value if groups[key[0]] == groups[trajectory]]
        alone = len(others) == 1
        mean, std = (0, 1) if alone else (np.mean(others), np.std(others, ddof=1) + 1e-6)
        expected = whole[row, column].item() + 2.0 * (value[trajectory, turn] - mean) / std
        assert plan.advantages[row, column].item() == pytest.approx(expected, abs=1e-9)


def test_turn_credit_blames_the_turn_that_was_fined():
    """Both trajectories earn 1 in all; only the command that cost something loses by it."""
    batch = Minibatch(
        mask=torch.ones(2, 2).bool(),
        turn=torch.tensor([[0, 1], [0, 1]]),
        returns=torch.tensor([1.0, 1.0]),
        turn_rewards=torch.tensor([[-0.5, 1.5], [0.0, 1.0]]),
    )
    plan = recipe("grpo", turn_credit=1.0, turn_gamma=0.0).plan(batch)
    assert plan.advantages.tolist()[0] == pytest.approx([-1.095444, 1.095444], abs=1e-5)
    assert recipe("grpo").plan(batch).advantages.tolist() == [[0, 0], [0, 0]]


def test_turn_credit_without_the_turns_rewards_is_refused():
    with pytest.raises(UsageError, match="turn_rewards"):
        recipe("grpo", turn_credit=1.0).plan(Minibatch(mask=torch.ones(2, 1).bool()))


@pytest.mark.parametrize("options", [{}, {"group_stats": "turns"}, {"normalize_std": False}])
def test_equal_returns_give_exactly_zero_and_a_single_one_itself(options):
    assert advantages([0.1, 0.1, 0.1], **options) == [0, 0, 0]
    assert advantages([0.7], **options) == [0.7]


@given(
    seed=st.integers(0, 2**32 - 1),
    window=st.booleans(),
    turns=st.booleans(),
    mode=st.sampled_from(["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "turn-mean"]),
)
@example(seed=1925516, window=False, turns=True, mode="seq-mean-token-mean")
def test_plan_and_loss_equal_a_plain_reference(ragged, seed, window, turns, mode):
    batch, logprobs, entropy = ragged(seed, window=window)
    stats = "turns" if turns else "trajectories"
    grpo = recipe("grpo", group_stats=stats, aggregation=mode, kl_coef=0.05, clip_high=0.28)
    loss, _ = grpo.loss(batch, grpo.plan(batch), logprobs, entropy)
    # A group of equal rewards has deviations of rounding, which the epsilon of 1e-6 under them makes a million times
    # larger.
    assert loss.item() == pytest.approx(reference_loss(batch, logprobs, turns, mode), rel=1e-10, abs=1e-9)


def reference_loss(batch, logprobs, per_turn, mode):
    """The equations, token by token."""
    trained = [
        (row, t, int(batch.trajectory[row]), int(batch.turn[row, t]))
        for row in range(len(batch))
        for t in range(batch.mask.shape[1])
        if batch.mask[row, t]
    ]
    returns = {int(j): (int(g), float(r)) for j, g, r in zip(batch.trajectory, batch.group, batch.returns, strict=True)}
    turn_count = {j: len({turn for _, _, owner, turn in trained if owner == j}) for j in returns}

    def advantage(j):
        group, value = returns[j]
        sample = [
            r for other, (g, r) in returns.items() if g == group for _ in range(turn_count[other] if per_turn else 1)
        ]
        return value if len(sample) == 1 else (value - np.mean(sample)) / (np.std(sample, ddof=1) + 1e-6)

    rows = {row for row, *_ in trained}
    owners = {j for _, _, j, _ in trained}
    total = 0.0
    for row, t, j, turn in trained:
        ratio = math.exp(float(logprobs[row, t] - batch.old_logprobs[row, t]))
        a = advantage(j)
        token = max(-a * ratio, -a * min(max(ratio, 0.8), 1.28))
        if a < 0:
            token = min(token, -3 * a)
        d = float(logprobs[row, t] - batch.ref_logprobs[row, t])
        token += 0.05 * (math.exp(-d) + d - 1)
        in_row = sum(other == row for other, *_ in trained)
        in_turn = sum((o, k) == (j, turn) for _, _, o, k in trained)
        total += (
            token
            / {
                "token-mean": len(trained),
                "token-sum": 1,
                "seq-mean-token-sum": len(rows),
                "seq-mean-token-mean": len(rows) * in_row,
                "turn-mean": len(owners) * turn_count[j] * in_turn,
            }[mode]
        )
    return total


def test_a_kl_term_needs_reference_logprobs():
    grpo = recipe("grpo", preset="paper")
    assert grpo.needs_reference and not recipe("grpo").needs_reference
    with pytest.raises(UsageError, match="ref_logprobs"):
        grpo.plan(Minibatch(mask=torch.ones(1, 1).bool()))
