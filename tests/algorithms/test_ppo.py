"""PPO and REINFORCE++: credit by tokens, whitening, the value loss, and what observations do to them.

Golden numbers were computed in float64 from the formulas of verl's ``core_algos`` as of pull requests 2337 (advantages)
and 7300 (rewards-to-go).
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.signals import masked_whiten
from agentropy.algorithms.slots import use
from agentropy.errors import UsageError

SEEDS = st.integers(0, 2**32 - 1)


def paid(rewards, mask, values=None, **fields):
    """A float64 batch whose tokens were paid ``rewards``."""
    rewards, mask = torch.tensor(rewards, dtype=torch.float64), torch.tensor(mask).bool()
    values = None if values is None else torch.tensor(values, dtype=torch.float64)
    old = torch.zeros_like(rewards)
    return Minibatch(mask=mask, token_rewards=rewards, values=values, old_logprobs=old, **fields)


def advantages(name, batch, **options):
    return recipe(name, **options).plan(batch).advantages


@pytest.mark.parametrize(
    ("mask", "gamma", "raw", "white"),
    [
        ([1, 1, 1, 1], 1.0, [0.462462, 0.065750, 0.385, 0.3], [0.926931, -1.383490, 0.475796, -0.019237]),
        ([1, 0, 1, 1], 1.0, [0.465750, 0, 0.385, 0.3], [0.991344, 0, 0.017092, -1.008436]),
        ([1, 0, 1, 1], 0.9, [0.284958, 0, 0.2865, 0.3], None),
    ],
)
def test_advantages_golden(mask, gamma, raw, white):
    batch = paid([[0, 0, 0, 1]], [mask], [[0.5, 0.9, 0.6, 0.7]])
    options = {"gamma": gamma, "lam": 0.95}
    assert advantages("ppo", batch, whiten=False, **options)[0].tolist() == pytest.approx(raw, abs=1e-6)
    if white is not None:
        assert advantages("ppo", batch, **options)[0].tolist() == pytest.approx(white, abs=1e-6)


@pytest.mark.parametrize("junk", [100.0, 1e9, math.nan, math.inf])
def test_a_value_behind_the_last_action_reaches_no_action(junk):
    """ROLL's pull request 447: where masked values leak, the first two advantages are 5.7 and 6."""
    batch = paid([[0, 1, 0]], [[1, 1, 0]], [[0, 0, junk]])
    assert advantages("ppo", batch, lam=0.95, whiten=False)[0].tolist() == pytest.approx([0.95, 1, 0])


def test_rewards_to_go_golden():
    batch = paid([[0, 0, 1]], [[1, 0, 1]])
    to_go = use("credit", "reward_to_go", gamma=0.5)(batch, batch.returns, None)
    assert to_go.tolist() == [[0.5, 0, 1]]
    batch = paid([[0, 0, 1], [0, -1, 0]], [[1, 1, 1], [1, 1, 0]])
    to_go = use("credit", "reward_to_go", gamma=0.9)(batch, batch.returns, None)
    assert to_go.flatten().tolist() == pytest.approx([0.81, 0.9, 1, -0.9, -1, 0])
    white = [0.636574, 0.724987, 0.823224, -1.043274, -1.141511, 0]
    assert advantages("reinforce_pp", batch, gamma=0.9).flatten().tolist() == pytest.approx(white, abs=1e-6)


def test_what_a_trajectory_earns_beyond_its_tokens_is_paid_at_the_last_trained_one():
    """Not at the last token, where an observation would swallow it."""
    batch = paid([[0.25, 0, 0, 0]], [[1, 0, 1, 0]], [[0.5] * 4], returns=torch.tensor([1.25]))
    assert advantages("ppo", batch, lam=0.5, whiten=False).tolist() == [[0.5, 0, 0.5, 0]]
    to_go = use("credit", "reward_to_go", gamma=0.5)(batch, batch.returns, None)
    assert to_go.tolist() == [[0.75, 0, 1, 0]]


def as_turns(batch):
    """The rows of ``batch``, which are trajectories, as one row per turn, in a random order and at other places."""
    parts = []
    for row in range(len(batch)):
        for turn in batch.turn[row][batch.mask[row]].unique().tolist():
            mask = batch.mask[row] & (batch.turn[row] == turn)
            first = int(mask.nonzero()[0, 0])
            order = torch.arange(batch.mask.shape[1]).roll(-max(0, first - 1))
            parts.append((row, torch.where(mask, batch.turn[row], -1)[order], order))
    parts = [parts[index] for index in torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))]
    rows, turn = torch.tensor([row for row, *_ in parts]), torch.stack([turn for _, turn, _ in parts])
    columns = torch.stack([order for *_, order in parts])
    moved = {name: getattr(batch, name)[rows[:, None], columns] for name in ("token_rewards", "values", "old_logprobs")}
    split = Minibatch(
        mask=turn >= 0, turn=turn, trajectory=batch.trajectory[rows], returns=batch.returns[rows], **moved
    )
    return split, rows[:, None].expand_as(turn), columns


@given(seed=SEEDS, gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.5, 1.0]))
def test_turns_in_rows_of_their_own_are_worth_what_they_are_in_one_row(ragged, seed, gamma, lam):
    batch, *_ = ragged(seed)
    split, rows, columns = as_turns(batch)
    for name, options in (("ppo", {"gamma": gamma, "lam": lam, "whiten": False}), ("reinforce_pp", {"gamma": gamma})):
        whole, turns = advantages(name, batch, **options), advantages(name, split, **options)
        torch.testing.assert_close(
            turns[split.mask], whole[rows[split.mask], columns[split.mask]], rtol=1e-10, atol=1e-10
        )


def walks(batch, unit):
    """Positions of trained tokens of each trajectory or row, in order."""
    lines = {}
    for row, column in batch.mask.nonzero().tolist():
        owner = batch.trajectory[row].item() if unit == "trajectories" else row
        lines.setdefault(owner, []).append((batch.turn[row, column].item(), column, row))
    return [[(row, column) for _, column, row in sorted(line)] for line in lines.values()]


@given(
    seed=SEEDS,
    window=st.booleans(),
    unit=st.sampled_from(["trajectories", "rows"]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_advantages_equal_a_plain_loop(ragged, seed, window, unit, gamma, lam):
    batch, *_ = ragged(seed, window=window)
    plan = recipe("ppo", gae_unit=unit, gamma=gamma, lam=lam, whiten=False).plan(batch)
    for line in walks(batch, unit):
        rewards = [batch.token_rewards[at].item() if unit == "trajectories" else 0.0 for at in line]
        rewards[-1] += batch.returns[line[-1][0]].item() - sum(rewards)
        advantage = value = 0.0
        for at, reward in zip(reversed(line), reversed(rewards), strict=True):
            here = batch.values[at].item()
            advantage = reward + gamma * value - here + gamma * lam * advantage
            value = here
            assert plan.advantages[at].item() == pytest.approx(advantage, abs=1e-9)
            assert plan.terms["value"].inputs["target"][at].item() == pytest.approx(advantage + here, abs=1e-9)


def test_with_lambda_one_the_critic_learns_the_return_whatever_it_said_before(ragged):
    batch, *_ = ragged(4, window=True)
    to_go = use("credit", "reward_to_go", gamma=0.9)(batch, batch.returns, None)
    for values in (batch.values, -5 * batch.values):
        target = recipe("ppo", gamma=0.9).plan(batch.replace(values=values)).terms["value"].inputs["target"]
        torch.testing.assert_close(target, to_go, rtol=1e-9, atol=1e-9)


def test_verl_agents_critic_learns_the_whole_return_from_every_turn():
    batch = paid(
        [[0, 0, 1], [0, 2, 0]], [[0, 1, 1], [1, 1, 0]], [[9, 1, 1], [2, 0, 9]], trajectory=torch.tensor([5, 5])
    )
    made = recipe("ppo", "verl-agent", whiten=False, kl_coef=0.0)
    plan = made.plan(batch.replace(turn=torch.tensor([[-1, 0, 0], [1, 1, -1]])))
    assert plan.terms["value"].inputs["target"].tolist() == [[0, 3, 3], [3, 3, 0]]
    assert plan.advantages.tolist() == [[0, 2, 2], [1, 3, 0]]


def test_whitening_is_of_the_batch_and_can_be_left_out(ragged):
    batch, *_ = ragged(6)
    white = advantages("ppo", batch)[batch.mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-9) and white.var().item() == pytest.approx(1, abs=1e-6)
    raw = advantages("ppo", batch, whiten=False)[batch.mask]
    torch.testing.assert_close((raw - raw.mean()) / raw.std(), white, rtol=1e-6, atol=1e-6)


def test_the_groups_mean_is_taken_from_every_token_before_whitening():
    """REINFORCE++-baseline: two tasks of different difficulty; only what is better than its own group gains."""
    batch = paid(
        [[0, 1, 0], [0, 0, 0], [5, 0, 0], [4, 0, 0]],
        [[1, 1, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0]],
        group=torch.tensor([0, 0, 1, 1]),
    )
    centred = torch.tensor([0.5, 0.5, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    expected = (centred - centred.mean()) / (centred.var() + 1e-8).sqrt()
    found = advantages("reinforce_pp", batch, baseline="group")
    torch.testing.assert_close(found[batch.mask], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(advantages("reinforce_pp", batch)[batch.mask], expected)


def test_a_penalty_in_the_reward_is_paid_token_by_token():
    """``-coefficient (logp - ref_logp)`` counts for its own token and those before it."""
    batch = paid([[0, 0, 0, 1]], [[0, 1, 1, 1]], [[0.0] * 4], ref_logprobs=torch.tensor([[9, 0, -2.0, 0]]))
    found = advantages("ppo", batch, kl_reward_coef=0.1, whiten=False)
    assert found[0].tolist() == pytest.approx([0, 0.8, 0.8, 1])
    white = masked_whiten(found, batch.mask)[batch.mask]
    torch.testing.assert_close(advantages("reinforce_pp", batch, kl_reward_coef=0.1)[batch.mask], white)
    for name in ("ppo", "reinforce_pp"):
        assert recipe(name, kl_reward_coef=0.1).needs_reference and not recipe(name).needs_reference


def test_value_loss_golden():
    """v 1.2, V .5, R 2, c .5: the clipped value 1 is further from the target, so its error of 1 counts, halved."""
    batch = paid([[2.0]], [[1]], [[0.5]])
    for clip, golden, slope in ((0.5, 0.5, 0.0), (1.0, 0.32, -0.8), (None, 0.32, -0.8)):
        made = recipe("ppo", value_clip=clip, value_coef=3.0, whiten=False)
        values = torch.tensor([[1.2]], dtype=torch.float64, requires_grad=True)
        still = torch.zeros(1, 1, dtype=torch.float64)
        _, metrics = made.loss(batch, made.plan(batch), still, still, values)
        assert metrics["value_loss"].item() == pytest.approx(3 * golden, abs=1e-12)
        value = made.slots.regularisers[-1].value(batch, made.plan(batch).terms["value"], still, still, values)
        assert torch.autograd.grad(value.sum(), values)[0].item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("clip", [0.2, None])
def test_a_critic_that_has_not_moved_learns_as_without_a_clip(ragged, clip):
    batch, logprobs, entropy = ragged(8)
    made = recipe("ppo", value_clip=clip)
    plan, values = made.plan(batch), batch.values.clone().requires_grad_()
    loss, _ = made.loss(batch, plan, logprobs, entropy, values)
    error = torch.where(batch.mask, batch.values - plan.terms["value"].inputs["target"], 0) / batch.mask.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], error, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "turn-mean"])
def test_the_value_loss_has_the_policys_aggregation(ragged, mode):
    batch, logprobs, entropy = ragged(8, window=True)
    made = recipe("ppo", aggregation=mode, value_clip=None)
    plan = made.plan(batch)
    _, metrics = made.loss(batch, plan, logprobs, entropy, batch.values)
    errors = torch.where(batch.mask, (batch.values - plan.terms["value"].inputs["target"]) ** 2 / 2, 0)
    expected = (use("aggregation", mode)(batch, batch.mask) * errors).sum()
    assert metrics["value_loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_what_is_missing_is_named():
    ppo, still = recipe("ppo"), torch.zeros(1, 1)
    assert ppo.needs_values and not recipe("reinforce_pp").needs_values
    with pytest.raises(UsageError, match=r"credit 'gae' needs values .* the learner needs a critic"):
        ppo.plan(Minibatch(mask=torch.ones(1, 1).bool()))
    with pytest.raises(UsageError, match=r"the value loss needs values .* the learner needs a critic"):
        recipe("grpo", slots={"regularisers": [{"type": "value"}]}).plan(Minibatch(mask=torch.ones(1, 1).bool()))
    batch = Minibatch(mask=torch.ones(1, 1).bool(), values=still)
    with pytest.raises(UsageError, match="the critic's current values"):
        ppo.loss(batch, ppo.plan(batch), still, still)
    with pytest.raises(UsageError, match=r"option 'value_coef' of recipe 'ppo': .*greater than 0, not 0"):
        recipe("ppo", value_coef=0)


@pytest.mark.parametrize("name", ["ppo", "reinforce_pp"])
def test_a_batch_without_trained_tokens_has_an_empty_plan(name):
    batch = Minibatch(mask=torch.zeros(2, 3).bool(), values=torch.full((2, 3), math.nan), returns=torch.ones(2))
    assert not recipe(name).plan(batch).advantages.any()


@pytest.mark.parametrize("tokens", [1, 2, 3, 1000])
def test_long_walks_are_discounted_exactly(tokens):
    rewards = np.random.default_rng(tokens).normal(size=(1, tokens))
    expected = [sum(rewards[0, t:] * 0.97 ** np.arange(tokens - t)) for t in range(tokens)]
    batch = paid(rewards.tolist(), np.ones((1, tokens)).tolist())
    to_go = use("credit", "reward_to_go", gamma=0.97)(batch, batch.returns, None)
    assert to_go[0].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
