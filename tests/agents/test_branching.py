"""Forks are true copies, budgets are kept exactly, and a tree depends on its task and seed alone."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.agents.branching import EntropyBranching, global_share
from agentropy.agents.policies import ExpertPolicy
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.errors import UsageError

from .inline import FORMAT, Corridor, InlinePool, LatePool, act_seed, babbler, plainly

ARPO_CODE = {"rule": "bernoulli", "scale": "log_vocab", "align": False, "lookahead": False, "root": "slot"}
AEPO_CODE = ARPO_CODE | {"rule": "reversed", "penalty": 0.05, "penalty_scope": "group", "separate_draws": True}
KINDS = {
    "paper": {},
    "eager": {"rule": "bernoulli", "alpha": 1.0, "branches": 3},
    "arpo-code": ARPO_CODE | {"separate_draws": True, "top_up": "one"},
    "aepo-code": AEPO_CODE | {"monitor": True, "monitor_root": True, "rounding": "up"},
    "aepo": {"penalty": 0.3, "monitor": True},
    "never": {"rule": "bernoulli", "alpha": 0.0, "beta": 0.0},
}


def branch(tasks, branching, *, slots=None, shuffle=0, pool=InlinePool, loop=rollout, engine=None, **options):
    policy = babbler(**engine or {})
    worlds = pool(slots or sum(task.group_size for task in tasks), shuffle)
    options = {"split": "train", "max_context_tokens": 400, "branching": branching} | options
    return loop(policy, worlds, FORMAT, tasks, **options), policy.engine, worlds


def dumped(trees):
    return [json.dumps(tree.to_dict()) for tree in trees]


def actions(tree, trajectory):
    """The nodes of a trajectory's actions, in order."""
    found = {}
    for leaf in trajectory.leaves:
        found |= {node.turn: node for node in tree.path(leaf) if node.role == "action"}
    return [found[turn] for turn in sorted(found)]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    spare=st.integers(0, 12),
    seed=st.integers(0, 2**40),
    kind=st.sampled_from(sorted(KINDS)),
    initial=st.none() | st.integers(1, 7),
    mode=st.sampled_from(["full", "window"]),
    limit=st.integers(30, 120),
    broken=st.booleans(),
)
def test_every_group_has_exactly_its_size_and_every_fork_is_a_true_copy(
    sizes, spare, seed, kind, initial, mode, limit, broken
):
    names = ["crashing" if broken and n == 1 else f"task-{n}" for n in range(len(sizes))]
    tasks = [RolloutTask(name, size, seed + n) for n, (name, size) in enumerate(zip(names, sizes, strict=True))]
    made = EntropyBranching(**KINDS[kind] | ({} if KINDS[kind].get("monitor") else {"initial": initial}))
    trees, engine, pool = branch(
        tasks, made, slots=max(sizes) + spare, shuffle=seed, context=mode, max_context_tokens=limit
    )
    heard = forks = 0
    for task, tree in zip(tasks, trees, strict=True):
        assert len(tree.trajectories) == task.group_size
        forked = [trajectory for trajectory in tree.trajectories if "fork" in trajectory.info]
        assert tree.info["initial"] + len(forked) == task.group_size
        forks += len(forked)
        heard += sum(node.role == "action" for node in tree.nodes) + tree.info.get("probe", {}).get("env_steps", 0)
        for member, trajectory in enumerate(tree.trajectories):
            said = actions(tree, trajectory)
            assert trajectory.turns == len(said) and len({node.index for node in said}) == len(said)
            # What was played gives the same rewards and texts in a world that was never copied.
            world, reward = Corridor(task.task), 0.0
            world.answer(0)
            for node in said:
                if task.task == "crashing" and node.turn == 2:
                    break
                answer = world.answer(0, FORMAT.parse(node.tokens.tolist(), {}).command)
                assert node.reward == answer.reward
                reward += answer.reward
            else:
                assert trajectory.reward == reward and trajectory.won == answer.info["won"]
                assert trajectory.info["last_observation"] == answer.observation
            if (fork := trajectory.info.get("fork")) is None:
                start = 0
            else:
                parent, start = tree.trajectories[fork["parent"]], fork["turn"]
                assert fork["parent"] < member and start > 0
                theirs = actions(tree, parent)
                assert [node.index for node in said[:start]] == [node.index for node in theirs[:start]]
                if len(said) > start:  # what the child said first hangs beside what its parent said
                    assert said[start].index != theirs[start].index and said[start].parent == theirs[start].parent
                record = [entry for entry in parent.info["branching"] if entry["turn"] == start]
                assert len(record) == 1 and record[0]["forks"] > 0
                assert record[0]["delta_entropy"] == fork["delta_entropy"]
            for node in said[start:]:  # and every action is the engine's answer to the member's own request
                request, completion = engine.heard[act_seed(task, member, node.turn)]
                assert np.array_equal(request.tokens, tree.tokens(node.parent))
                assert np.array_equal(completion.tokens, node.tokens)
                assert np.array_equal(completion.entropies, node.entropies)
    assert heard == len(engine.heard) and forks == pool.forks


@pytest.mark.parametrize("mode", ["full", "window"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"arpo-code", "aepo-code"}))
def test_a_tree_is_the_same_alone_and_in_a_batch_whatever_the_pool(kind, mode):
    names = ("task-0", "crashing", "task-2", "task-3", "task-4", "task-5")
    sizes = (5, 2, 3, 6, 4, 2)
    tasks = [RolloutTask(name, size, 10 + n) for n, (name, size) in enumerate(zip(names, sizes, strict=True))]
    made = EntropyBranching(**KINDS[kind])
    together, *_ = branch(tasks, made, context=mode)
    alone = [branch([task], made, context=mode)[0][0] for task in tasks]
    assert dumped(together) == dumped(alone)
    for slots in (6, 7, 9, 12, 13):
        assert dumped(branch(tasks, made, slots=slots, shuffle=slots, context=mode)[0]) == dumped(together)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    spare=st.integers(0, 12),
    seed=st.integers(0, 2**40),
    kind=st.sampled_from(sorted(KINDS)),
    mode=st.sampled_from(["full", "window"]),
    limit=st.integers(30, 120),
    lag=st.integers(1, 3),
    engine=st.fixed_dictionaries({"rows": st.integers(1, 9), "shuffle": st.integers(0, 9)}),
)
def test_forks_are_those_of_the_plainest_loop(sizes, spare, seed, kind, mode, limit, lag, engine):
    names = ["crashing" if n == 1 else f"task-{n}" for n in range(len(sizes))]
    tasks = [RolloutTask(name, size, seed + n) for n, (name, size) in enumerate(zip(names, sizes, strict=True))]
    options = {"slots": max(sizes) + spare, "context": mode, "max_context_tokens": limit}
    made, plain = EntropyBranching(**KINDS[kind]), EntropyBranching(**KINDS[kind])
    trees, *_ = branch(tasks, made, lag=lag, engine=engine, shuffle=seed, **options)
    assert dumped(trees) == dumped(branch(tasks, plain, loop=plainly, **options)[0])
    assert made.state_dict() == plain.state_dict()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_forks_do_not_depend_on_when_worlds_answer(kind):
    tasks = [RolloutTask(f"task-{n}", size, n) for n, size in enumerate((6, 3, 5, 4))]
    seen = []
    for shuffle, pool in ((0, InlinePool), (1, LatePool), (2, LatePool)):
        trees, engine, _ = branch(tasks, EntropyBranching(**KINDS[kind]), slots=9, shuffle=shuffle, pool=pool)
        seen.append((dumped(trees), engine.steps, engine.released))
    assert seen[1] == seen[0] and seen[2] == seen[0]


def test_groups_do_not_wait_for_each_other():
    """The members of a group act together, so that its row of steps is that of the group alone."""
    tasks = [RolloutTask(f"task-{n}", 4, n) for n in range(3)]
    _, together, _ = branch(tasks, EntropyBranching(), engine={"max_action_tokens": 12})
    for task in tasks:
        _, alone, _ = branch([task], EntropyBranching(), engine={"max_action_tokens": 12})
        mine = [[seed for seed in seeds if seed in alone.heard] for seeds in together.steps]
        assert [seeds for seeds in mine if seeds] == alone.steps


def test_groups_of_initial_episodes_alone_are_independent_episodes_bit_for_bit():
    tasks = [RolloutTask(f"task-{n}", 4, n) for n in range(3)]
    whole, *_ = branch(tasks, EntropyBranching(rule="bernoulli", alpha=1.0, initial=4))
    plain, *_ = branch(tasks, None)
    for one, other in zip(whole, plain, strict=True):
        assert [one.tokens(t.leaves[0]).tolist() for t in one.trajectories] == [
            other.tokens(t.leaves[0]).tolist() for t in other.trajectories
        ]
        assert [t.reward for t in one.trajectories] == [t.reward for t in other.trajectories]
        assert not any("branching" in t.info for t in one.trajectories)


def test_the_group_is_soon_at_its_full_width():
    """A group of eight that begins with one and forks at every chance is at its full width after three rounds."""
    made = EntropyBranching(rule="bernoulli", alpha=1.0, beta=0.0, initial=1)
    _, engine, _ = branch([RolloutTask("task", 8, 0)], made)
    widths = [len(batch) for batch in engine.batches]
    assert widths[0] == 1 and max(widths) == 8
    made = EntropyBranching(rule="bernoulli", alpha=1.0, beta=0.0, initial=1, branches=7)
    _, engine, _ = branch([RolloutTask("task", 8, 1)], made)
    assert [len(batch) for batch in engine.batches[:3]][:2] == [1, 1] and len(engine.batches[2]) == 8


def test_children_do_not_decide_where_they_were_born():
    made = EntropyBranching(rule="bernoulli", alpha=1.0, beta=0.0, initial=1)
    (tree,), *_ = branch([RolloutTask("task", 6, 4)], made)
    for trajectory in tree.trajectories:
        if (fork := trajectory.info.get("fork")) is not None:
            assert all(entry["turn"] > fork["turn"] for entry in trajectory.info.get("branching", []))
        assert all(entry["turn"] > 0 for entry in trajectory.info.get("branching", []))


def entropies(*values):
    return np.array(values, np.float32)


def group(vocabulary=100, size=16, place=0, seed=5, **options):
    return EntropyBranching(**options).group(place, size, seed, vocabulary)


def rise(later, first=(1.0, 2.0), **options):
    """ΔH of an action after one whose entropies were ``first``."""
    made = group(**options)
    made.decide(0, 0, entropies(*first), 8)
    return made.decide(0, 1, entropies(*later), 8).delta_entropy


def test_the_rise_compares_probes_token_by_token():
    assert rise([3.0, 2.5, 9.0]) == pytest.approx((2 + 0.5) / 2)
    assert rise([3.0, 2.5, 9.0], probe_tokens=1) == pytest.approx(2)
    assert rise([3.0, 2.5, 9.0], scale="vocab") == pytest.approx(2.5 / 100)  # ARPO, Eq. 4
    assert rise([3.0, 2.5, 9.0], scale="log_vocab", align=False) == pytest.approx(11.5 / math.log(100))
    assert rise([3.0], align=False, scale="log_vocab") == pytest.approx(0)


def test_the_papers_rule_fires_exactly_where_entropy_rose():
    for later, forks in (([1.001, 2.0], 1), ([1.0, 2.0], 0), ([0.9, 2.0], 0)):
        made = group()
        made.decide(0, 0, entropies(1.0, 2.0), 8)
        assert made.decide(0, 1, entropies(*later), 8).forks == forks
    made = group(branches=3)
    made.decide(0, 0, entropies(1.0), 8)
    assert made.decide(0, 1, entropies(2.0), 8).forks == 3
    assert made.decide(0, 2, entropies(2.0), 2).forks == 2
    assert made.decide(0, 3, entropies(2.0), 0) is None


def test_the_released_code_judges_the_segment_before_the_observation():
    made = group(**ARPO_CODE, alpha=0.5)
    assert made.decide(0, 0, entropies(1.0), 8) is None
    assert made.decide(0, 1, entropies(5.0), 8).delta_entropy == 0  # one step late: the first rise is always 0
    assert made.decide(0, 2, entropies(0.0), 8).delta_entropy == pytest.approx(4 / math.log(100))


@pytest.mark.parametrize(("delta", "chance"), [(-3, 0), (-1, 0.3), (0, 0.5), (0.5, 0.6), (1, 0.7), (2.5, 1)])
def test_arpos_rate_of_forks(delta, chance):
    """Table of the released code's rule, clip(0.5 + 0.2 ΔH, 0, 1), and its rate over 10^4 draws."""
    made = EntropyBranching(rule="bernoulli")
    assert made.probability(delta, 0) == pytest.approx(chance)
    running = made.group(0, 16, 1, 100)
    draws = [running._draw(member, 3, chance, 1) for member in range(10_000)]
    assert abs(np.mean(draws) - chance) < 4 * math.sqrt(max(chance * (1 - chance), 1e-9) / 10_000) + 1e-12


def test_without_entropy_the_rate_is_alpha():
    tasks = [RolloutTask(f"task-{n}", 64, n) for n in range(12)]
    made = EntropyBranching(rule="bernoulli", alpha=0.3, beta=0.0, initial=16)
    trees, *_ = branch(tasks, made, slots=128)
    records = [entry for tree in trees for t in tree.trajectories for entry in t.info.get("branching", [])]
    rate, count = np.mean([entry["forks"] for entry in records]), len(records)
    assert count > 300 and abs(rate - 0.3) < 4 * math.sqrt(0.21 / count)


@pytest.mark.parametrize(
    ("delta", "chances"),
    [
        (0, [0.5, 0.4737, 0.4444, 0.4118, 0.3333, 0, 0, 0]),
        (1, [0.7, 0.6737, 0.6444, 0.6118, 0.5333, 0.2, 0, 0]),
        (2, [0.9, 0.8737, 0.8444, 0.8118, 0.7333, 0.4, 0, 0]),
    ],
)
def test_aepos_released_penalty_golden(delta, chances):
    made = EntropyBranching(rule="reversed", penalty=0.05)
    counts = [0, 1, 2, 3, 5, 10, 15, 20]
    assert [made.probability(delta, count) for count in counts] == pytest.approx(chances, abs=5e-5)
    # Without forks before, it is ARPO's probability at α = 0.5, and only there.
    assert made.probability(delta, 0) == pytest.approx(EntropyBranching(rule="bernoulli").probability(delta, 0))
    other = {"alpha": 0.3, "rule": "reversed"}
    assert EntropyBranching(**other).probability(delta, 0) == pytest.approx(min(0.7 + 0.2 * delta, 1))


def test_consecutive_forks_of_a_chain_are_penalised_and_a_pause_forgives():
    made = group(penalty=0.25, size=30)
    made.decide(0, 0, entropies(1.0), 8)
    seen = []
    for turn in range(1, 5):
        seen.append(made.decide(0, turn, entropies(2.0), 8))
        if turn == 1:
            made.forked(0, 1)
            assert made.decide(1, 1, entropies(2.0), 8) is None
    # 0.7, then 0.7 * 0.75 = 0.525 > 0.5, then 0.35: no fork, which resets the chain
    assert [decision.probability for decision in seen] == pytest.approx([0.7, 0.525, 0.35, 0.7])
    assert [decision.forks for decision in seen] == [1, 1, 0, 1]
    assert made.decide(1, 2, entropies(2.0), 8).probability == pytest.approx(0.525)  # the child inherits the chain


def test_what_a_group_begins_with_is_no_round_of_the_released_penalty():
    made = EntropyBranching(**AEPO_CODE | {"beta": 0.0}, initial=2)
    (tree,), *_ = branch([RolloutTask("task", 6, 1)], made)
    chances = [t.info["branching"][0]["probability"] for t in tree.trajectories[:2] if "branching" in t.info]
    assert chances and set(chances) == {0.5}


def test_the_released_penalty_counts_rounds_of_the_group():
    made = group(**AEPO_CODE)
    made.decide(0, 0, entropies(1.0), 8)
    made.end_round(4)
    made.end_round(1)
    assert made.decide(0, 1, entropies(1.0), 8).probability == pytest.approx(1 - 0.5 / 0.9)
    made.end_round(0)
    assert made.decide(0, 2, entropies(1.0), 8).probability == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("size", "table"),
    [
        (
            16,
            {
                -8: 1,
                -6: 1,
                -4: 2,
                -3: 3,
                -2: 5,
                -1: 7,
                -0.5: 8,
                0: 9,
                0.5: 9,
                1: 10,
                2: 12,
                3: 14,
                4: 15,
                6: 16,
                9: 16,
            },
        ),
        (12, {-4: 2, -2: 4, -1: 5, 0: 7, 1: 8, 2: 9, 4: 11, 6: 12}),
    ],
)
def test_aepos_split_of_the_budget_golden(size, table):
    """Values of the released code, int(n σ(d / 2)) + 1; and the paper's real numbers for 16."""
    made = EntropyBranching(rounding="up")
    assert {difference: made.fresh(size, difference) for difference in table} == table
    real = [global_share(16, difference) for difference in (-3, -1, 0, 1, 3)]
    assert real == pytest.approx([2.92, 6.04, 8, 9.96, 13.08], abs=5e-3)


@given(size=st.integers(1, 64), values=st.lists(st.floats(-50, 50), min_size=2), up=st.booleans())
def test_the_split_is_monotone_and_leaves_at_least_one(size, values, up):
    made = EntropyBranching(rounding="up" if up else "nearest")
    shares = [made.fresh(size, difference) for difference in sorted(values)]
    assert shares == sorted(shares) and shares[0] >= 1 and shares[-1] <= size


def test_the_probe_is_played_and_thrown_away():
    (tree,), engine, _ = branch([RolloutTask("task", 4, 0)], EntropyBranching(monitor=True))
    probe = [seed for batch in engine.batches for seed in batch if seed == act_seed(RolloutTask("task", 4, 0), 4, 0)]
    assert len(probe) == 1 and tree.info["probe"]["env_steps"] > 0
    assert len(tree.trajectories) == 4
    first = engine.heard[probe[0]][1].entropies
    assert not any(np.array_equal(node.entropies, first) for node in tree.nodes)


def test_the_probe_counts_as_no_episode():
    reports = []
    branch(
        [RolloutTask("task", 4, 0), RolloutTask("task", 4, 1)], EntropyBranching(monitor=True), progress=reports.append
    )
    assert {report.total for report in reports} == {8} and reports[-1].episodes == 8
    assert reports[0].episodes == 0


def test_what_the_probe_saw_sets_the_split():
    for root, later, count in (([4.0], [0.0], 14), ([0.0], [4.0], 2), ([1.0], [1.0], 8)):
        made = group(monitor=True, size=16)
        made.probed([entropies(*root), entropies(*later), entropies(*later)])
        assert made.initial == count
    made = group(monitor=True, size=16, monitor_root=True)
    made.probed([entropies(4.0), entropies(0.0)])
    assert made.initial == 12  # 16 σ((4 - 2) / 2)
    made = group(monitor=True, size=16)
    made.probed([entropies(4.0)])
    assert made.initial == 8  # no observation, nothing to compare with


def test_episodes_that_never_fork_are_topped_up_together_or_one_by_one():
    for how, batches in (("together", 2), ("one", 4)):
        made = EntropyBranching(**KINDS["never"], initial=2, top_up=how)
        (tree,), engine, _ = branch([RolloutTask("task", 5, 3)], made)
        begun = [i for i, batch in enumerate(engine.batches) if set(batch) & set(first_seeds(5, 3))]
        assert len(tree.trajectories) == 5 and tree.info["initial"] == 5
        assert len(begun) == batches


def first_seeds(size, seed):
    return [act_seed(RolloutTask("task", size, seed), member, 0) for member in range(size)]


def test_roots_of_other_batches_leak_only_where_the_released_code_is_asked_for():
    first, second = [RolloutTask("task-a", 6, 1)], [RolloutTask("task-b", 6, 2)]
    for kind, stale in (("paper", False), ("arpo-code", True)):
        made = EntropyBranching(**KINDS[kind])
        branch(first, made)
        state = json.loads(json.dumps(made.state_dict()))
        after, *_ = branch(second, made)
        fresh, *_ = branch(second, EntropyBranching(**KINDS[kind]))
        assert (dumped(after) != dumped(fresh)) == stale
        resumed = EntropyBranching(**KINDS[kind])
        resumed.load_state_dict(state)
        again, *_ = branch(second, resumed)
        assert dumped(again) == dumped(after)


def test_what_cannot_branch_is_refused_before_anything_is_played():
    tasks = [RolloutTask("task", 6, 0)]
    with pytest.raises(UsageError, match="a group of 6 that forks needs as many environments; the pool has 4"):
        branch(tasks, EntropyBranching(), slots=4)
    with pytest.raises(UsageError, match="ExpertPolicy has no entropies"):
        rollout(
            ExpertPolicy(FORMAT),
            InlinePool(6),
            FORMAT,
            tasks,
            split="train",
            max_context_tokens=400,
            branching=EntropyBranching(),
        )
    for options in ({"branches": 0}, {"initial": 0}, {"probe_tokens": 0}, {"penalty": -1}):
        with pytest.raises(UsageError, match=f"{next(iter(options))} is"):
            EntropyBranching(**options)
    with pytest.raises(UsageError, match="expected align=False"):
        EntropyBranching(root="slot")
