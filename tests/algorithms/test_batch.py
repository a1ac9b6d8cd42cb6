"""Minibatch: what it takes from trees, and how it is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms import Minibatch, recipe
from agentropy.errors import UsageError


def episode(tree, actions, *, reward=1.0, failed=False, window=False, start=0):
    """Add an episode: ``actions`` is one string per turn, upper case where the policy did not choose it."""
    node, leaves = -1, []
    for turn, action in enumerate(actions):
        root = turn == 0 or window
        text = f"room {start + turn}"
        node = tree.add(-1 if root else node, "prompt" if root else "observation", [1, 2], text=text)
        tokens = [ord(letter) for letter in action]
        sampled = action.islower()
        node = tree.add(
            node,
            "action",
            tokens,
            sampled=sampled,
            turn=turn,
            reward=reward * (turn == len(actions) - 1),
            logprobs=-np.arange(1, len(tokens) + 1) if sampled else None,
            entropies=np.full(len(tokens), 0.5) if sampled else None,
        )
        leaves.append(node)
    kept = leaves if window else leaves[-1:]
    tree.trajectories.append(Trajectory(tuple(kept), reward=reward, turns=len(actions), failed=failed))


def test_full_context_makes_one_row_per_trajectory():
    trees = [Tree("a", "train"), Tree("b", "train")]
    episode(trees[0], ["ab", "X", "c"], reward=2.0)
    episode(trees[0], ["d"], failed=True)
    episode(trees[1], ["e"], reward=0.0, start=5)
    batch = Minibatch.from_trees(trees)
    assert batch.failed == 1 and len(batch) == 2
    assert batch.tokens[0].tolist() == [1, 2, ord("a"), ord("b"), 1, 2, ord("X"), 1, 2, ord("c")]
    assert batch.mask[0].tolist() == [False, False, True, True, *[False] * 5, True]
    assert batch.turn[0].tolist() == [-1, -1, 0, 0, -1, -1, -1, -1, -1, 2]
    assert batch.old_logprobs[0].tolist() == [0, 0, -1, -2, 0, 0, 0, 0, 0, -1]
    assert batch.old_entropy[0].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0, 0, 0.5]
    assert batch.token_rewards[0].tolist() == [*[0.0] * 9, 2.0]
    assert batch.length.tolist() == [10, 3] and batch.extent.tolist() == [10, 3]
    assert batch.tokens[1].tolist() == [1, 2, ord("e"), *[0] * 7]
    assert (batch.group.tolist(), batch.trajectory.tolist(), batch.returns.tolist()) == (
        [0, 1],
        [0, 1],
        [2.0, 0.0],
    )
    assert batch.turn_rewards.tolist() == [[0, 0, 2], [0, 0, 0]]
    assert batch.anchor == [("room 0", "room 1", "room 2"), ("room 5",)]


def test_window_context_makes_one_row_per_turn_of_the_same_trajectory():
    tree = Tree("a", "train")
    episode(tree, ["ab", "c"], window=True)
    episode(tree, ["d"], reward=0.0, window=True)
    batch = Minibatch.from_trees([tree])
    assert batch.trajectory.tolist() == [0, 0, 1] and batch.group.tolist() == [0, 0, 0]
    assert [row[row >= 0].tolist() for row in batch.turn] == [[0, 0], [1], [0]]
    assert batch.returns.tolist() == [1, 1, 0]
    assert batch.anchor[0] == batch.anchor[1] == ("room 0", "room 1")
    advantages = recipe("grpo").plan(batch).advantages[batch.mask]
    assert advantages.tolist() == pytest.approx([0.707106, 0.707106, 0.707106, -0.707106], abs=1e-6)


def test_a_failed_episode_does_not_count_in_its_group():
    trees = []
    for failed in (False, True):
        tree = Tree("a", "train")
        episode(tree, ["a"])
        episode(tree, ["b"], reward=0.0)
        if failed:
            episode(tree, ["c"], reward=0.0, failed=True)
        trees.append(tree)
    one, two = (recipe("grpo").plan(Minibatch.from_trees([tree])).advantages for tree in trees)
    assert torch.equal(one, two)


def test_nothing_to_learn_from_is_an_error():
    tree = Tree("a", "train")
    episode(tree, ["a"], failed=True)
    with pytest.raises(UsageError, match="no actions in 1 trees, 1 episodes failed"):
        Minibatch.from_trees([tree])


def test_shapes_are_checked():
    with pytest.raises(UsageError, match="old_entropy has shape"):
        Minibatch(mask=torch.ones(2, 3), old_entropy=torch.zeros(2, 4))
    with pytest.raises(UsageError, match="must be \\[rows, tokens\\]"):
        Minibatch(mask=torch.ones(3))


def test_returns_default_to_the_rewards_of_the_whole_trajectory():
    batch = Minibatch(
        mask=torch.tensor([[1, 1, 0], [1, 0, 0]]),
        token_rewards=torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]),
        trajectory=torch.tensor([3, 3]),
    )
    assert batch.returns.tolist() == [7, 7]


@given(seed=st.integers(0, 2**32 - 1), budget=st.integers(1, 200))
def test_microbatches_hold_every_trained_row_once_within_the_budget(ragged, seed, budget):
    batch, *_ = ragged(seed)
    extent = batch.extent
    parts = list(batch.microbatches(budget))
    assert sorted(torch.cat(parts).tolist()) == extent.nonzero()[:, 0].tolist()
    for rows in parts:
        width = int(extent[rows].max())
        assert len(rows) == 1 or len(rows) * width <= budget
        assert extent[rows].sum() >= 0.75 * len(rows) * width
        part = batch.select(rows, width)
        assert torch.equal(part.mask, batch.mask[rows][:, :width])
        assert not batch.mask[rows][:, width:].any() and torch.equal(part.returns, batch.returns[rows])
