"""The tree stores every token once, and every walk of it gives back exactly what was put in."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.agents.tree import FORMAT_VERSION, Trajectory, Tree, merge
from agentropy.errors import UsageError

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
NATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def trees(draw, walks=None):
    """A random tree; ``walks`` collects for each node the plain lists that its walk must give."""
    tree = Tree("task", "train")
    walks = {} if walks is None else walks
    for index in range(draw(st.integers(1, 12))):
        parent = draw(st.integers(-1, index - 1))
        role = "prompt" if parent == -1 else draw(st.sampled_from(["observation", "action"]))
        sampled = role == "action" and draw(st.booleans())
        tokens = draw(TOKENS)
        numbers = [draw(st.lists(NATS, min_size=len(tokens), max_size=len(tokens))) for _ in range(2)]
        turn = draw(st.integers(0, 50))
        given_floats = dict(zip(("logprobs", "entropies"), numbers, strict=True)) if sampled else {}
        assert tree.add(parent, role, tokens, sampled=sampled, turn=turn, **given_floats) == index
        fills = (tokens, [False], [0.0], [0.0], [-1])
        chosen = (tokens, [True] * len(tokens), *numbers, [turn] * len(tokens))
        own = chosen if sampled else tuple(fill if fill is tokens else fill * len(tokens) for fill in fills)
        before = walks.get(parent, ([],) * 5)
        walks[index] = tuple(old + list(new) for old, new in zip(before, own, strict=True))
    return tree


@given(st.data())
def test_a_walk_is_the_concatenation_of_what_its_nodes_added(data):
    walks: dict[int, tuple[list, ...]] = {}
    tree = data.draw(trees(walks))
    for leaf, expected in walks.items():
        arrays = (
            tree.tokens(leaf),
            tree.mask(leaf),
            tree.logprobs(leaf),
            tree.entropies(leaf),
            tree.turns(leaf),
        )
        assert [array.tolist() for array in arrays] == list(map(list, expected))
        assert [array.dtype for array in arrays] == [np.int32, np.bool_, np.float32, np.float32, np.int32]


@given(trees(), st.floats(-10, 10), st.booleans())
def test_json_round_trip_is_exact(tree, reward, won):
    tree.trajectories = [Trajectory((len(tree.nodes) - 1,), reward, won, 0.1, 3, seed=7, info={"a": 1})]
    again = Tree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert again.to_dict() == tree.to_dict()
    assert again.trajectories == tree.trajectories
    for old, new in zip(tree.nodes, again.nodes, strict=True):
        assert old.logprobs.tobytes() == new.logprobs.tobytes()
        assert old.tokens.dtype == new.tokens.dtype
        assert (old.parent, old.role, old.sampled, old.turn) == (new.parent, new.role, new.sampled, new.turn)


@given(st.lists(trees(), min_size=1, max_size=4))
def test_merging_keeps_every_walk_and_shares_equal_prompts(parts):
    for part in parts:
        part.trajectories = [Trajectory(tuple(range(len(part.nodes))))]
    merged = merge(parts)
    for part, trajectory in zip(parts, merged.trajectories, strict=True):
        for old, new in zip(range(len(part.nodes)), trajectory.leaves, strict=True):
            assert merged.tokens(new).tolist() == part.tokens(old).tolist()
            assert merged.mask(new).tolist() == part.mask(old).tolist()
            assert merged.logprobs(new).tolist() == part.logprobs(old).tolist()
    prompts = [node.tokens.tobytes() for node in merged.nodes if node.parent == -1]
    assert len(prompts) == len(set(prompts))


def test_a_fork_is_a_second_child():
    tree = Tree("task", "train")
    root = tree.add(-1, "prompt", [1, 2])
    left = tree.add(root, "action", [3], sampled=True, logprobs=[-0.5], entropies=[0.7], turn=0)
    right = tree.add(root, "action", [4], sampled=True, logprobs=[-0.9], entropies=[0.7], turn=0)
    assert tree.children(root) == [left, right] and tree.children(-1) == [root]
    assert tree.tokens(left).tolist() == [1, 2, 3] and tree.tokens(right).tolist() == [1, 2, 4]
    assert sum(len(node.tokens) for node in tree.nodes) == 4


@pytest.mark.parametrize(
    ("parent", "role", "extra", "message"),
    [
        (5, "action", {}, "parent 5"),
        (-1, "action", {}, "a root is a prompt"),
        (0, "prompt", {}, "a root is a prompt"),
        (0, "observation", {"sampled": True}, "only an action"),
        (0, "action", {"sampled": True}, "needs its log-probabilities"),
        (0, "action", {"sampled": True, "logprobs": [0.0], "entropies": [0.0, 0.0]}, "logprobs"),
        (0, "action", {"logprobs": [0.0, 0.0]}, "only a sampled node"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(parent, role, extra, message):
    tree = Tree("task", "train")
    tree.add(-1, "prompt", [1])
    with pytest.raises(ValueError, match=message):
        tree.add(parent, role, [1, 2], **extra)


def test_newer_and_foreign_files_are_refused_in_one_sentence():
    newer = Tree("task", "train").to_dict() | {"format": FORMAT_VERSION + 1}
    with pytest.raises(UsageError, match="upgrade it"):
        Tree.from_dict(newer)
    with pytest.raises(UsageError, match="not a trajectory tree"):
        Tree.from_dict({"nodes": []})


def test_merging_different_tasks_is_refused():
    with pytest.raises(ValueError, match="one task"):
        merge([Tree("a", "train"), Tree("b", "train")])
