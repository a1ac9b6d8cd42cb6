"""The rollout loop writes down exactly what the policy read and said, whatever else plays beside it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.agents.formats import PlainFormat
from agentropy.agents.policies import ExpertPolicy, RandomPolicy
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.agents.tokenizer import END
from agentropy.agents.tree import Tree
from agentropy.errors import UsageError

from .inline import COMMANDS, TOKENIZER, TURNS, InlinePool, act_seed, babble


def dumped(trees: list[Tree]) -> list[str]:
    return [json.dumps(tree.to_dict()) for tree in trees]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    slots=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    mode=st.sampled_from(["full", "window"]),
    window=st.integers(0, 3),
    limit=st.integers(30, 120),
)
def test_trees_hold_exactly_what_the_engine_read_and_said(sizes, slots, seed, mode, window, limit):
    tasks = [RolloutTask(f"task-{n}", size, seed + n) for n, size in enumerate(sizes)]
    trees, engine = babble(tasks, slots=slots, max_context_tokens=limit, context=mode, window=window)
    turns = 0
    for task, tree in zip(tasks, trees, strict=True):
        assert tree.task == task.task and len(tree.trajectories) == task.group_size
        for member, trajectory in enumerate(tree.trajectories):
            turns += trajectory.turns
            heard = [engine.heard[act_seed(task, member, turn)] for turn in range(trajectory.turns)]
            assert len(trajectory.leaves) == (1 if mode == "full" else trajectory.turns)
            for leaf, upto in zip(
                trajectory.leaves, [len(heard)] if mode == "full" else range(1, len(heard) + 1), strict=True
            ):
                request, completion = heard[upto - 1]
                spoken = heard[:upto] if mode == "full" else heard[upto - 1 : upto]
                expected = np.concatenate([request.tokens, completion.tokens])
                assert np.array_equal(tree.tokens(leaf), expected)
                assert len(request.tokens) + 4 <= limit
                mask = np.zeros(len(expected), bool)
                logprobs, entropies = np.zeros((2, len(expected)), np.float32)
                for earlier, said in spoken:
                    start = len(earlier.tokens)
                    assert np.array_equal(expected[:start], earlier.tokens)
                    place = slice(start, start + len(said.tokens))
                    mask[place], logprobs[place], entropies[place] = True, said.logprobs, said.entropies
                assert np.array_equal(tree.mask(leaf), mask)
                assert np.array_equal(tree.logprobs(leaf), logprobs)
                assert np.array_equal(tree.entropies(leaf), entropies)
    assert turns == len(engine.heard)


@pytest.mark.parametrize("mode", ["full", "window"])
def test_an_episode_is_the_same_alone_and_in_a_batch(mode):
    tasks = [RolloutTask(f"task-{n}", 3, 10 + n) for n in range(5)]
    together, _ = babble(tasks, slots=6, context=mode)
    alone = [babble([task], slots=1, context=mode)[0][0] for task in tasks]
    assert dumped(together) == dumped(alone)


def test_batches_do_not_depend_on_the_order_in_which_worlds_answer():
    tasks = [RolloutTask(f"task-{n}", 3, n) for n in range(4)]
    trees, engine = babble(tasks, slots=5, shuffle=1)
    again, other = babble(tasks, slots=5, shuffle=2)
    assert dumped(trees) == dumped(again)
    assert engine.batches == other.batches


def test_two_cohorts_take_turns_and_freed_slots_are_filled():
    _, engine = babble([RolloutTask("task", 12, 0)], slots=6)
    assert [len(batch) for batch in engine.batches[:4]] == [3, 3, 3, 3]
    assert len(engine.heard) > 12


def test_a_group_starts_at_one_prompt_and_its_members_differ():
    trees, _ = babble([RolloutTask("task", 4, 5)])
    tree = trees[0]
    assert len(tree.children(-1)) == 1 and len(tree.children(0)) == 4
    assert len({tree.tokens(trajectory.leaves[0]).tobytes() for trajectory in tree.trajectories}) == 4


def test_an_unclosed_action_is_closed_by_the_observation_after_it():
    trees, _ = babble([RolloutTask("task", 16, 1)])
    end = TOKENIZER.convert_tokens_to_ids(END)
    seen = set()
    for node in trees[0].nodes:
        if node.role == "observation":
            cut = trees[0].nodes[node.parent].tokens[-1] != end
            assert (node.tokens[0] == end) == cut
            assert not node.sampled and node.turn == trees[0].nodes[node.parent].turn
            seen.add(bool(cut))
    assert seen == {True, False}


def test_finished_sequences_are_released_once():
    for mode in ("full", "window"):
        trees, engine = babble([RolloutTask("task", 5, 2)], context=mode)
        ends = [trees[0].tokens(trajectory.leaves[-1]) for trajectory in trees[0].trajectories]
        assert sorted(engine.released) == sorted(tokens[:-1].tolist() for tokens in ends)


def test_a_broken_world_leaves_a_failed_trajectory_and_spares_the_others():
    tasks = [RolloutTask(name, 2, n) for n, name in enumerate(["unreadable", "task", "crashing"])]
    trees, _ = babble(tasks, slots=3)
    unreadable, fine, crashing = trees
    assert [trajectory.leaves for trajectory in unreadable.trajectories] == [(), ()]
    for trajectory in (*unreadable.trajectories, *crashing.trajectories):
        assert trajectory.failed and trajectory.reward == 0.0 and not trajectory.won
        assert trajectory.info["error"] == "the world broke"
    assert [trajectory.turns for trajectory in crashing.trajectories] == [3, 3]
    assert dumped([fine]) == dumped(babble([tasks[1]])[0])


def test_a_full_context_truncates_the_episode():
    (tree,), _ = babble([RolloutTask("task", 6, 0)], max_context_tokens=30)
    cut = [trajectory for trajectory in tree.trajectories if trajectory.info.get("overflow")]
    assert cut and all(t.truncated and not t.won and 0 < t.turns < TURNS for t in cut)
    assert all(len(tree.tokens(trajectory.leaves[0])) <= 30 for trajectory in tree.trajectories)


def test_a_first_prompt_that_does_not_fit_is_an_error_that_names_the_option():
    with pytest.raises(UsageError, match="max_context_tokens=12"):
        babble([RolloutTask("task", 1, 0)], max_context_tokens=12)


def play(policy, tasks, *, slots=4, **options):
    return rollout(
        policy,
        InlinePool(slots),
        PlainFormat(TOKENIZER),
        tasks,
        split="train",
        max_context_tokens=400,
        **options,
    )


def test_the_expert_wins_and_is_sampled_with_probability_one():
    (tree,) = play(ExpertPolicy(PlainFormat(TOKENIZER)), [RolloutTask("task", 2, 0)])
    for trajectory in tree.trajectories:
        assert (trajectory.won, trajectory.reward, trajectory.turns) == (True, 1.0, 2)
        assert trajectory.score == 1.0 and not trajectory.truncated
        leaf = trajectory.leaves[0]
        spoken = tree.tokens(leaf)[tree.mask(leaf)]
        assert TOKENIZER.decode(spoken) == "go right <end> go right <end>"
        assert not tree.logprobs(leaf).any()
        assert [node.reward for node in tree.path(leaf) if node.role == "action"] == [0.0, 1.0]


def test_noise_plays_admissible_commands_that_are_not_sampled():
    (tree,) = play(ExpertPolicy(PlainFormat(TOKENIZER), noise=0.5), [RolloutTask("task", 40, 0)])
    actions = [node for node in tree.nodes if node.role == "action"]
    noise = [node.text for node in actions if not node.sampled]
    assert set(noise) == set(COMMANDS)
    assert {node.text for node in actions if node.sampled} == {"go right"}
    assert 0.4 < len(noise) / len(actions) < 0.6
    assert all(trajectory.info["invalid"] == 0 for trajectory in tree.trajectories)


def test_slips_play_commands_that_are_not_admissible_and_not_sampled():
    (tree,) = play(ExpertPolicy(PlainFormat(TOKENIZER), slips=0.4), [RolloutTask("task", 60, 0)])
    actions = [node for node in tree.nodes if node.role == "action"]
    slips = [node.text for node in actions if not node.sampled]
    # All that the head of one command and the tail of another make, but for the commands themselves.
    assert set(slips) == {"go", "look left", "look right"}
    assert {node.text for node in actions if node.sampled} == {"go right"}
    assert 0.3 < len(slips) / len(actions) < 0.5
    assert sum(trajectory.info["invalid"] for trajectory in tree.trajectories) == len(slips)
    assert all(trajectory.won for trajectory in tree.trajectories if not trajectory.truncated)


def test_noise_and_slips_together_leave_the_expert_the_rest():
    (tree,) = play(ExpertPolicy(PlainFormat(TOKENIZER), noise=0.3, slips=0.7), [RolloutTask("task", 20, 0)])
    assert not any(node.sampled for node in tree.nodes)


def test_random_play_is_never_sampled_and_repeats_with_its_seed():
    policy = RandomPolicy(PlainFormat(TOKENIZER))
    trees = play(policy, [RolloutTask("task", 8, 3)])
    assert not any(node.sampled for node in trees[0].nodes)
    assert dumped(trees) == dumped(play(policy, [RolloutTask("task", 8, 3)], slots=1))


def test_progress_counts_what_happened():
    reports = []
    (tree,) = play(ExpertPolicy(PlainFormat(TOKENIZER)), [RolloutTask("task", 5, 0)], progress=reports.append)
    last = reports[-1]
    assert (last.episodes, last.total, last.won, last.env_steps, last.tokens) == (5, 5, 5, 10, 30)
    assert [report.episodes for report in reports] == sorted(report.episodes for report in reports)
    assert len(tree.trajectories) == 5


def test_nothing_to_play_gives_no_trees():
    assert play(ExpertPolicy(PlainFormat(TOKENIZER)), []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "windows"}, "did you mean 'window'"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        play(ExpertPolicy(PlainFormat(TOKENIZER)), [RolloutTask("task", 1, 0)], **options)


def test_wrong_groups_and_noise_are_named():
    with pytest.raises(UsageError, match="group of 1 or more"):
        play(ExpertPolicy(PlainFormat(TOKENIZER)), [RolloutTask("task", 0, 0)])
    with pytest.raises(UsageError, match="no probabilities"):
        ExpertPolicy(PlainFormat(TOKENIZER), noise=1.5)
    for noise, slips in ((0.6, 0.6), (0.0, -0.1), (-0.5, 1.0)):
        with pytest.raises(UsageError, match="together"):
            ExpertPolicy(PlainFormat(TOKENIZER), noise=noise, slips=slips)
