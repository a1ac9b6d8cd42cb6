"""Shapes: AEPO's entropy factor, ARPO's hard credit over shared prefixes, and whitening.

Golden numbers were computed in float64 from the equations of arXiv 2510.14545 and 2507.19849, and of verl's
``core_algos``.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.slots import use
from agentropy.errors import UsageError


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def row(*entropies):
    """One row with a token per entropy."""
    return Minibatch(mask=torch.ones(1, len(entropies)).bool(), old_entropy=tensor(entropies))


def factor(batch, **options):
    """The factor of each trained token: what becomes of advantages of one."""
    return use("shape", "entropy_factor", **options)(batch, torch.ones(batch.mask.shape))[batch.mask].tolist()


def test_entropy_factor_golden():
    """Deviations are unbiased ones: -.734847, -.489898, -.244949 and 1.469694 of them."""
    batch = row(0.2, 0.4, 0.6, 2.0)
    assert factor(batch) == pytest.approx([0.853031, 0.902020, 0.951010, 1.293939], abs=1e-6)
    assert factor(batch, weight=1.0) == pytest.approx([0.265153, 0.510102, 0.755051, 2.469694], abs=1e-6)
    assert factor(batch, weight=0.0) == [1, 1, 1, 1]


@given(st.lists(st.floats(0, 5), min_size=1, max_size=20), st.floats(0, 2))
def test_the_factor_has_mean_one_and_rises_with_entropy(entropies, weight):
    found = factor(row(*entropies), weight=weight)
    assert np.mean(found) == pytest.approx(1, abs=1e-9)
    order = np.argsort(entropies, kind="stable")
    assert (np.diff(np.array(found)[order]) >= -1e-12).all()


@pytest.mark.parametrize("entropies", [[], [0.7], [0.1] * 3, [1 / 3] * 7, [0.0] * 2, [1e8] * 5])
def test_one_entropy_leaves_advantages_exactly_as_they_are(entropies):
    assert factor(row(*entropies)) == [1.0] * len(entropies)


@pytest.mark.parametrize("junk", [1e9, math.nan, math.inf])
def test_the_factor_takes_its_statistics_from_trained_tokens_only(junk):
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    entropy = torch.where(mask, torch.tensor([[0.2, 0.0, 0.4], [0.6, 2.0, 0.0]]).double(), junk)
    batch = Minibatch(mask=mask, old_entropy=entropy)
    assert factor(batch) == pytest.approx([0.853031, 0.902020, 0.951010, 1.293939], abs=1e-6)
    found = use("shape", "entropy_factor")(batch, torch.where(mask, 1.0, junk))
    assert not found[~mask].any()


def test_a_clamp_keeps_the_sign_of_the_advantage():
    """100 tokens of entropy 1 and one of 0, some 10 deviations below the mean."""
    batch = row(*[1.0] * 100, 0.0)
    assert factor(batch)[-1] == pytest.approx(-0.99, abs=0.01)
    assert factor(batch, clamp=(0.0, 2.0))[-1] == 0
    assert factor(batch, clamp=[0.5, 2.0])[-1] == 0.5
    assert factor(batch, clamp=(0.0, 2.0))[:-1] == factor(batch)[:-1]
    for wrong in ([2.0, 0.0], [1.0]):
        with pytest.raises(UsageError, match="expected a lower and an upper bound"):
            factor(batch, clamp=wrong)


def test_no_gradient_flows_through_the_factor():
    batch = row(0.2, 0.4, 0.6)
    batch = batch.replace(old_entropy=batch.old_entropy.requires_grad_(), returns=torch.ones(1))
    plan = recipe("grpo", slots={"shapes": [{"type": "entropy_factor"}]}).plan(batch)
    assert plan.advantages.any() and not plan.advantages.requires_grad


def walks(paths, *, lengths, width=None, trajectory=None, returns=None):
    """One row per path of tree nodes; node ``n`` has ``lengths[n]`` tokens, all of them trained."""
    width = width or max(sum(lengths[node] for node in path) for path in paths)
    node = torch.full((len(paths), width), -1)
    for index, path in enumerate(paths):
        filled = [name for name in path for _ in range(lengths[name])]
        node[index, : len(filled)] = torch.tensor(filled)
    return Minibatch(
        mask=node >= 0,
        node=node,
        old_logprobs=torch.zeros(node.shape, dtype=torch.float64),
        trajectory=None if trajectory is None else torch.tensor(trajectory),
        returns=None if returns is None else torch.tensor(returns, dtype=torch.float64),
    )


def merged(batch, advantages):
    """Advantages of trained tokens, row by row, where ``advantages`` gives one to each row."""
    spread = tensor(*advantages)[:, None].expand(batch.mask.shape)
    found = use("shape", "shared_prefix_mean")(batch, spread)
    return [found[index][batch.mask[index]].tolist() for index in range(len(batch))]


def test_a_shared_token_gets_the_mean_over_the_trajectories_that_contain_it():
    """A tree of depth 2: the root has all four, its left branch two, its right branch and the leaves one each.

          0
        /   \\
       1     4
      / \\   / \\
     2   3 5   6
    """
    paths = [[0, 1, 2], [0, 1, 3], [0, 4, 5], [0, 4, 6]]
    batch = walks(paths, lengths=[2, 1, 1, 2, 1, 1, 1])
    assert merged(batch, [4.0, 2.0, -1.0, 3.0]) == [
        [2, 2, 3, 4],
        [2, 2, 3, 2, 2],
        [2, 2, 1, -1],
        [2, 2, 1, 3],
    ]


@given(seed=st.integers(0, 2**16), size=st.integers(2, 8))
def test_what_the_whole_group_shares_learns_nothing(seed, size):
    """The mean of a group's relative advantages is 0."""
    paths = [[0, 1 + member] for member in range(size)]
    returns = np.random.default_rng(seed).normal(size=size)
    batch = walks(paths, lengths=[3] + [2] * size, returns=returns)
    hard = recipe("grpo", slots={"shapes": [{"type": "shared_prefix_mean"}]})
    found, plain = hard.plan(batch).advantages, recipe("grpo").plan(batch).advantages
    assert found[:, :3].abs().max() < 1e-12
    assert torch.equal(found[:, 3:], plain[:, 3:])


def test_trajectories_count_and_not_rows():
    """Turns as rows: trajectories 5 and 9 share the row of node 0, and 5 holds it twice."""
    paths = [[0], [1], [0], [0], [2]]
    batch = walks(paths, lengths=[2, 1, 1], trajectory=[5, 5, 9, 5, 9])
    assert merged(batch, [3.0, 3.0, -1.0, 3.0, -1.0]) == [[1, 1], [3], [1, 1], [1, 1], [-1]]


def test_advantages_that_differ_inside_a_node_are_merged_token_by_token():
    batch = walks([[0, 1], [0, 2]], lengths=[2, 1, 1])
    found = use("shape", "shared_prefix_mean")(batch, torch.tensor([[1.0, 2.0, 3.0], [5.0, 8.0, 9.0]]))
    assert found.tolist() == [[3, 5, 3], [3, 5, 9]]


def test_the_place_of_a_node_in_its_row_does_not_matter():
    """The first token of node 4 is the first one of it, behind prompts of 1 and 3 tokens."""
    node = torch.tensor([[-1, 4, 4, 5, -1], [-1, -1, -1, 4, 4]])
    advantages = torch.tensor([[9.0, 1.0, 2.0, 7.0, 9.0], [9.0, 9.0, 9.0, 3.0, 8.0]])
    found = use("shape", "shared_prefix_mean")(Minibatch(mask=node >= 0, node=node), advantages)
    assert found.tolist() == [[0, 2, 5, 7, 0], [0, 0, 0, 2, 5]]


def test_tool_tokens_between_nodes_belong_to_no_one():
    """The shared node stands at the same place in both rows; what is off the mask is ignored, and 0."""
    node = torch.tensor([[-1, 4, 4, -1, -1, 7], [-1, 4, 4, -1, 8, -1]])
    batch = Minibatch(mask=node >= 0, node=node)
    advantages = torch.where(node >= 0, torch.tensor([[2.0], [-1.0]]), math.nan)
    found = use("shape", "shared_prefix_mean")(batch, advantages)
    assert found.tolist() == [[0, 0.5, 0.5, 0, 0, 2], [0, 0.5, 0.5, 0, -1, 0]]


def test_without_nodes_nothing_is_shared():
    batch = Minibatch(mask=torch.ones(2, 2).bool())
    assert merged(batch, [1.0, -1.0]) == [[1, 1], [-1, -1]]
    alone = batch.replace(node=torch.tensor([[0, 0], [1, 2]]))
    assert merged(alone, [1.0, -1.0]) == [[1, 1], [-1, -1]]
    empty = alone.replace(mask=torch.zeros(2, 2).bool())
    assert not use("shape", "shared_prefix_mean")(empty, torch.ones(2, 2)).any()


PREFIX = {"lengths": [2, 2, 4], "paths": [[0, 1], [0, 2]]}
"""Two trajectories of 4 and 6 tokens with a prefix of 2, and advantages 1.5 and -.5."""


def prefix_gradient(shapes, aggregation, ratio=1.0):
    """Gradient of the loss on one token of the prefix, over its copies, with respect to its log-probability."""
    # Each alone in its group, so that its advantage is its return.
    batch = walks(**PREFIX, returns=[1.5, -0.5]).replace(group=torch.tensor([0, 1]))
    made = recipe("grpo", aggregation=aggregation, slots={"shapes": shapes})
    plan = made.plan(batch)
    logprobs = torch.full_like(batch.old_logprobs, math.log(ratio)).requires_grad_()
    loss, _ = made.loss(batch, plan, logprobs, torch.zeros_like(logprobs))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return gradient[:, 0].sum().item()


@pytest.mark.parametrize(
    ("aggregation", "soft", "hard"), [("token-mean", 0.1, 0.1), ("seq-mean-token-mean", 0.145833, 0.104167)]
)
def test_soft_and_hard_credit_agree_under_token_mean_only(aggregation, soft, hard):
    """Golden; GRPO's own mean over tokens and then sequences weighs the copies of a prefix unlike each other."""
    shape = [{"type": "shared_prefix_mean"}]
    assert -prefix_gradient([], aggregation) == pytest.approx(soft, abs=1e-6)
    assert -prefix_gradient(shape, aggregation) == pytest.approx(hard, abs=1e-6)


def test_a_clip_that_binds_on_one_copy_only_turns_the_soft_gradient_round():
    """Golden, sum over tokens: at ratio 1.3 the copy with A > 0 is clipped and the other pushes the prefix down."""
    assert prefix_gradient([], "token-sum", ratio=1.3) == pytest.approx(0.65, abs=1e-9)
    assert prefix_gradient([{"type": "shared_prefix_mean"}], "token-sum", ratio=1.3) == 0


def test_whitening_golden():
    """Over trained tokens, with the unbiased variance; a single one has none and stays as it is."""
    batch = Minibatch(mask=torch.tensor([[1, 1, 0, 1]]).bool())
    for junk in (3.0, math.nan):
        found = use("shape", "whiten")(batch, tensor([1.0, 2.0, junk, 4.0]))
        assert found[0].tolist() == pytest.approx([-0.872872, -0.218218, 0, 1.091089], abs=1e-6)
    kept = use("shape", "whiten", shift_mean=False)(batch, tensor([1.0, 2.0, 3.0, 4.0]))
    assert kept[0, 0].item() == pytest.approx(-0.872872 + 7 / 3, abs=1e-6)
    single = Minibatch(mask=torch.tensor([[0, 1]]).bool())
    assert use("shape", "whiten")(single, tensor([9.0, 0.7]))[single.mask].tolist() == [0.7]


@pytest.mark.parametrize("name", ["shared_prefix_mean", "entropy_factor", "entropy_modulation"])
@given(seed=st.integers(0, 2**16), window=st.booleans(), data=st.data())
def test_shapes_move_with_their_rows_and_do_not_see_padding(ragged, name, seed, window, data):
    batch, *_ = ragged(seed, window=window)
    shape = use("shape", name)
    advantages = torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(batch.mask.shape)))
    whole = torch.where(batch.mask, shape(batch, advantages), 0)
    order = data.draw(st.permutations(range(len(batch))))
    moved = torch.where(batch.mask[order], shape(batch.select(order), advantages[order]), 0)
    torch.testing.assert_close(moved, whole[order], rtol=1e-12, atol=1e-12)

    def wider(values, fill=0):
        return torch.nn.functional.pad(values, (2, 5), value=fill)

    changes = {key: wider(getattr(batch, key)) for key in ("mask", "old_logprobs", "old_entropy", "token_rewards")}
    changes |= {key: wider(getattr(batch, key), -1) for key in ("turn", "node")}
    changes |= dict.fromkeys(("ref_logprobs", "rollout_logprobs", "values"))
    padded = batch.replace(**changes)
    found = torch.where(padded.mask, shape(padded, wider(advantages, math.nan)), 0)
    torch.testing.assert_close(found, wider(whole), rtol=1e-13, atol=1e-15)
