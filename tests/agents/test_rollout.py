"""The rollout loop writes down exactly what the policy read and said, whatever else plays beside it."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.agents.branching import EntropyBranching
from agentropy.agents.engines.base import SamplingParams
from agentropy.agents.policies import Context, EnginePolicy, ExpertPolicy, RandomPolicy, act_stream
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.agents.tokenizer import END
from agentropy.agents.tree import Tree
from agentropy.errors import UsageError

from .inline import (
    COMMANDS,
    FORMAT,
    TOKENIZER,
    TURNS,
    BabblingEngine,
    InlinePool,
    LatePool,
    act_seed,
    babble,
    babbler,
    plainly,
)


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


def groups(*sizes, seed=0):
    return [RolloutTask(f"task-{n}", size, seed + n) for n, size in enumerate(sizes)]


OPTIONS = {"split": "train", "max_context_tokens": 400}


@pytest.mark.parametrize("mode", ["full", "window"])
@pytest.mark.parametrize("who", [babbler, lambda: ExpertPolicy(FORMAT, noise=0.3, slips=0.2)])
def test_the_trees_are_those_of_the_plainest_loop_whatever_runs_beside_what(who, mode):
    tasks = [RolloutTask(name, 3, n) for n, name in enumerate(["task", "crashing", "other", "unreadable", "last"])]
    options = OPTIONS | {"context": mode, "window": 1}
    expected = dumped(plainly(who(), InlinePool(3), FORMAT, tasks, **options))
    for slots in range(1, 17):
        for lag in (1, 2, 5):
            trees = rollout(who(), InlinePool(slots, shuffle=slots), FORMAT, tasks, lag=lag, **options)
            assert dumped(trees) == expected
    for rows in (1, 2, 7):  # an engine with fewer rows than episodes lets the others queue
        policy = babbler(rows=rows, shuffle=rows)
        assert dumped(rollout(policy, InlinePool(9), FORMAT, tasks, **options)) == dumped(
            plainly(babbler(), InlinePool(1), FORMAT, tasks, **options)
        )
        assert max(map(len, policy.engine.steps)) == rows


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_nothing_depends_on_when_worlds_answer(lag):
    tasks = groups(3, 3, 3, 3)
    seen = []
    for shuffle, pool in ((0, InlinePool(5)), (1, LatePool(5, 1)), (2, LatePool(5, 2)), (3, LatePool(5, 3))):
        policy = babbler(shuffle=shuffle)  # nor on the order in which what ended is handed back
        trees = rollout(policy, pool, FORMAT, tasks, lag=lag, **OPTIONS)
        seen.append((dumped(trees), policy.engine.steps, policy.engine.released))
    assert all(other == seen[0] for other in seen)


def test_finished_rows_are_taken_at_once():
    """Actions of 1 to 12 tokens: in lock-step, rows wait for the longest action of their turn."""
    policy = babbler(max_action_tokens=12)
    (tree,) = rollout(policy, InlinePool(16), FORMAT, groups(96), lag=1, **OPTIONS)
    tokens = sum(len(node.tokens) for node in tree.nodes if node.role == "action")
    assert tokens == sum(map(len, policy.engine.steps))
    assert tokens / (16 * len(policy.engine.steps)) > 0.85  # 0.54 in lock-step: the mean of 1 to 12 over 12

    (tree,) = rollout(policy := babbler(max_action_tokens=12), InlinePool(16), FORMAT, groups(16), lag=1, **OPTIONS)
    turns = [
        [len(node.tokens) for node in tree.nodes if node.role == "action" and node.turn == n] for n in range(TURNS)
    ]
    assert len(policy.engine.steps) < 0.8 * sum(max(lengths, default=0) for lengths in turns)


class Diary(InlinePool):
    """Writes down what is asked of it and of the engine, in order."""

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.events = []

    def step(self, slot, action):
        super().step(slot, action)
        self.events.append(("step", slot))

    def wait(self, slots, *, all):
        self.events.extend(("wait", slot) for slot in slots)
        return super().wait(slots, all=all)

    def engine(self):
        diary = self

        class Writing(BabblingEngine):
            def stream(self, params):
                stream = super().stream(params)
                step = stream.step
                stream.step = lambda: (diary.events.append(("tick", None)), step())[1]
                return stream

        return Writing(len(TOKENIZER), 2)


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_worlds_have_lag_ticks_for_an_answer(lag):
    pool = Diary(6)
    rollout(
        EnginePolicy(pool.engine(), FORMAT, SamplingParams(), max_action_tokens=8),
        pool,
        FORMAT,
        groups(30),
        lag=lag,
        **OPTIONS,
    )
    asked, ticks, gaps = {}, 0, []
    for what, slot in pool.events:
        ticks += what == "tick"
        if what == "step":
            asked[slot] = ticks
        elif what == "wait" and slot in asked:
            gaps.append(ticks - asked.pop(slot))
    assert max(gaps) == lag - 1
    assert gaps.count(lag - 1) > 0.9 * len(gaps)  # the others were awaited for want of other work


def test_the_next_in_line_acts_one_tick_after_a_slot_became_free():
    policy, (task,) = babbler(), groups(60)
    rollout(policy, InlinePool(6), FORMAT, [task], lag=1, **OPTIONS)
    steps = policy.engine.steps
    first = {act_seed(task, member, 0) for member in range(60)}
    begun = [len(first & set(seeds) - set(before)) for before, seeds in pairwise([[], *steps])]
    last = max(number for number, count in enumerate(begun) if count)
    assert begun[0] == 6 and sum(begun) == 60
    assert [6 - len(seeds) for seeds in steps[:last]] == begun[1 : last + 1]


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


def test_an_engine_without_streams_answers_all_that_were_added():
    policy = babbler()
    waves = SimpleNamespace(generate=policy.engine.generate, release=policy.engine.release)
    trees = rollout(
        EnginePolicy(waves, FORMAT, SamplingParams(), max_action_tokens=4), InlinePool(4), FORMAT, groups(9), **OPTIONS
    )
    assert dumped(trees) == dumped(babble(groups(9))[0])
    assert all(stream.closed or not stream.running for stream in policy.engine.streams)


def test_an_action_says_what_the_filters_kept():
    policy = babbler()
    context = Context(np.arange(1, 4, dtype=np.int32), 5, 0, "", {})
    completion = policy.engine.answer(policy.request(context))
    kept = replace(completion, kept_logmass=-np.arange(len(completion.tokens), dtype=np.float32))
    assert np.array_equal(policy.read(context, kept).kept_logmass, kept.kept_logmass)
    assert not len(RandomPolicy(FORMAT).act([replace(context, info={"admissible": COMMANDS})])[0].kept_logmass)


class Unwell(InlinePool):
    """Raises at the eighth command, or at the eighth time that it is waited for."""

    def __init__(self, num_envs, where):
        super().__init__(num_envs)
        self.where, self.calls = where, 0

    def _count(self, where):
        self.calls += where == self.where
        if self.calls == 8:
            raise OSError("the pool broke")

    def step(self, slot, action):
        self._count("step")
        super().step(slot, action)

    def wait(self, slots, *, all):
        self._count("wait")
        return super().wait(slots, all=all)


@pytest.mark.parametrize("where", ["step", "wait"])
@pytest.mark.parametrize("branching", [None, EntropyBranching()])
def test_an_exception_leaves_nothing_running(where, branching):
    policy = babbler()
    with pytest.raises(OSError, match="the pool broke"):
        rollout(policy, Unwell(8, where), FORMAT, groups(8, 8), branching=branching, **OPTIONS)
    (stream,) = policy.engine.streams
    assert stream.closed and not stream.running and policy.engine.steps


def test_an_interrupted_rollout_leaves_nothing_running_and_one_that_ended_too():
    def interrupt(report):
        if report.env_steps > 20:
            raise KeyboardInterrupt

    policy = babbler()
    with pytest.raises(KeyboardInterrupt):
        rollout(policy, InlinePool(8), FORMAT, groups(8), progress=interrupt, **OPTIONS)
    again = dumped(rollout(policy := babbler(), InlinePool(8), FORMAT, groups(8), **OPTIONS))
    assert again == dumped(babble(groups(8))[0])
    assert [stream.closed for stream in policy.engine.streams] == [True]


class Speechless(RandomPolicy):
    """Finds no room for an action in the third turn of odd seeds, as an engine does at a model's last position."""

    def __init__(self):
        super().__init__(FORMAT)
        self.released = []

    def act(self, contexts):
        acts = super().act(contexts)
        return [
            replace(act, tokens=act.tokens[:0]) if context.turn == 2 and context.seed % 2 else act
            for context, act in zip(contexts, acts, strict=True)
        ]

    def release(self, finished):
        self.released += [tokens.tolist() for tokens in finished]


def test_an_action_without_a_token_ends_the_episode_for_want_of_room():
    (tree,) = play(policy := Speechless(), groups(40))
    cut = [trajectory for trajectory in tree.trajectories if trajectory.info.get("overflow")]
    assert 0 < len(cut) < 40 and all(t.truncated and not t.won and t.turns == 2 for t in cut)
    assert len(policy.released) == 40
    for lag, slots in ((1, 40), (2, 3)):
        assert dumped(play(Speechless(), groups(40), slots=slots, lag=lag)) == dumped([tree])


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
        FORMAT,
        tasks,
        split="train",
        max_context_tokens=400,
        **options,
    )


def test_the_expert_wins_and_is_sampled_with_probability_one():
    (tree,) = play(ExpertPolicy(FORMAT), [RolloutTask("task", 2, 0)])
    for trajectory in tree.trajectories:
        assert (trajectory.won, trajectory.reward, trajectory.turns) == (True, 1.0, 2)
        assert trajectory.score == 1.0 and not trajectory.truncated
        leaf = trajectory.leaves[0]
        spoken = tree.tokens(leaf)[tree.mask(leaf)]
        assert TOKENIZER.decode(spoken) == "go right <end> go right <end>"
        assert not tree.logprobs(leaf).any()
        assert [node.reward for node in tree.path(leaf) if node.role == "action"] == [0.0, 1.0]


def test_noise_plays_admissible_commands_that_are_not_sampled():
    (tree,) = play(ExpertPolicy(FORMAT, noise=0.5), [RolloutTask("task", 40, 0)])
    actions = [node for node in tree.nodes if node.role == "action"]
    noise = [node.text for node in actions if not node.sampled]
    assert set(noise) == set(COMMANDS)
    assert {node.text for node in actions if node.sampled} == {"go right"}
    assert 0.4 < len(noise) / len(actions) < 0.6
    assert all(trajectory.info["invalid"] == 0 for trajectory in tree.trajectories)


def test_slips_play_commands_that_are_not_admissible_and_not_sampled():
    (tree,) = play(ExpertPolicy(FORMAT, slips=0.4), [RolloutTask("task", 60, 0)])
    actions = [node for node in tree.nodes if node.role == "action"]
    slips = [node.text for node in actions if not node.sampled]
    # All that the head of one command and the tail of another make, but for the commands themselves.
    assert set(slips) == {"go", "look left", "look right"}
    assert {node.text for node in actions if node.sampled} == {"go right"}
    assert 0.3 < len(slips) / len(actions) < 0.5
    assert sum(trajectory.info["invalid"] for trajectory in tree.trajectories) == len(slips)
    assert all(trajectory.won for trajectory in tree.trajectories if not trajectory.truncated)


def test_noise_and_slips_together_leave_the_expert_the_rest():
    (tree,) = play(ExpertPolicy(FORMAT, noise=0.3, slips=0.7), [RolloutTask("task", 20, 0)])
    assert not any(node.sampled for node in tree.nodes)


def test_random_play_is_never_sampled_and_repeats_with_its_seed():
    policy = RandomPolicy(FORMAT)
    trees = play(policy, [RolloutTask("task", 8, 3)])
    assert not any(node.sampled for node in trees[0].nodes)
    assert dumped(trees) == dumped(play(policy, [RolloutTask("task", 8, 3)], slots=1))


def test_progress_counts_what_happened():
    reports = []
    (tree,) = play(ExpertPolicy(FORMAT), [RolloutTask("task", 5, 0)], progress=reports.append)
    last = reports[-1]
    assert (last.episodes, last.total, last.won, last.env_steps, last.tokens) == (5, 5, 5, 10, 30)
    assert [report.episodes for report in reports] == sorted(report.episodes for report in reports)
    assert len(tree.trajectories) == 5


def test_a_policy_without_a_stream_answers_all_that_was_added():
    stream = act_stream(ExpertPolicy(FORMAT))
    context = Context(np.zeros(1, np.int32), 1, 0, "", {"expert": "look"})
    assert [stream.add(context), stream.add(context)] == [0, 1]
    assert [ticket for ticket, _ in stream.step()] == [0, 1]
    assert stream.add(context) == 2 and stream.add(context) == 3
    assert [(ticket, act.parsed.command) for ticket, act in stream.step()] == [(2, "look"), (3, "look")]


def test_nothing_to_play_gives_no_trees():
    assert play(ExpertPolicy(FORMAT), []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "windows"}, "did you mean 'window'"),
        ({"window": -1}, "window is -1"),
        ({"lag": 0}, "lag is 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        play(ExpertPolicy(FORMAT), [RolloutTask("task", 1, 0)], **options)


def test_wrong_groups_and_noise_are_named():
    with pytest.raises(UsageError, match="group of 1 or more"):
        play(ExpertPolicy(FORMAT), [RolloutTask("task", 0, 0)])
    with pytest.raises(UsageError, match="no probabilities"):
        ExpertPolicy(FORMAT, noise=1.5)
    for noise, slips in ((0.6, 0.6), (0.0, -0.1), (-0.5, 1.0)):
        with pytest.raises(UsageError, match="together"):
            ExpertPolicy(FORMAT, noise=noise, slips=slips)
