"""Whatever wrappers a text world has, it is a text world: it forks, pickles, has tasks and an expert."""

import copy
import doctest
import importlib
import json
import pickle
import pkgutil
import subprocess
import sys
import warnings
from dataclasses import replace

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.envs import wrappers
from agentropy.envs.pool import EnvPool
from agentropy.envs.wrappers import WRAPPERS, wrap, wrapper_specs
from agentropy.errors import UsageError

from .wrapper_worlds import Quiz, Sums

# Every wrapper with the options that make it do the most.
SPECS = [
    {"name": "observation-cap", "max_characters": 60, "keep": "both"},
    {"name": "history-window", "turns": 2},
    {"name": "reminder", "every": 2},
    {"name": "turn-cost", "cost": 0.25, "free": 1},
    {"name": "tool-penalty", "penalty": 0.5, "free": 1, "most": 1.0},
    {"name": "format-check", "malformed": "reject", "patience": 1},
    {"name": "format-check", "form": "action", "malformed": "play"},
    {"name": "retry-invalid", "retries": 1, "penalty": 0.125},
    {"name": "retry-invalid", "retries": 2, "exhausted": "end"},
    {"name": "retry", "attempts": 3},
    {"name": "prompt-templates", "seed": 4},
    {"name": "prompt-templates", "place": "observation", "weight": 0.5},
]
NAMES = sorted(WRAPPERS)

commands = st.sampled_from(["add 1", "add 3", "add 9", "fly", "", "<search>x</search>", "é\ud800"])
actions = st.one_of(
    commands,
    commands.map("<action>{}</action>".format),
    commands.map("<think>so</think><action>{}</action>".format),
    commands.map("<think>\n</think>\n<answer>\n\\boxed{{{}}}\n</answer>".format),
)
stacks = st.lists(st.sampled_from(SPECS), max_size=5)


def play(env: gym.Env, played: list[str]) -> list:
    """Return what each action led to, up to the end of the episode."""
    seen = []
    for action in played:
        seen.append(env.step(action))
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


@given(stack=stacks, before=st.lists(actions, max_size=6), detour=st.lists(actions, max_size=4), after=st.data())
@settings(max_examples=150)
def test_restoring_in_the_middle_equals_never_having_left(stack, before, detour, after):
    env = wrap(Sums(expert_info=True), stack)
    seen = [env.reset(seed=3), *play(env, before)]
    over = len(seen) > 1 and (seen[-1][2] or seen[-1][3])
    snapshot = env.get_wrapper_attr("snapshot")()
    frozen = pickle.dumps(snapshot)
    rest = after.draw(st.lists(actions, max_size=6))
    if not over:
        play(env, detour)
    env.reset()

    other = wrap(Sums(expert_info=True), stack)  # never reset
    for copied in (env, other):
        shown = copied.get_wrapper_attr("restore")(pickle.loads(frozen))
        assert shown == (seen[-1][0], seen[-1][-1])
    if over:
        with pytest.raises(ResetNeeded):
            env.step("add 1")
        return
    straight = wrap(Sums(expert_info=True), stack)
    straight.reset(seed=3)
    play(straight, before)
    expected = play(straight, rest)
    assert play(env, rest) == play(other, rest) == expected
    assert pickle.loads(frozen) == snapshot  # what happened later has not changed it


@given(stack=stacks, played=st.lists(actions, max_size=8))
def test_what_is_shown_is_in_the_space_and_starts_anew_after_a_reset(stack, played):
    env = wrap(Sums(), stack)
    first = env.reset(seed=1)
    for observation, *_ in [first, *play(env, played)]:
        assert env.observation_space.contains(observation)
    if not any(spec["name"] == "prompt-templates" for spec in stack):
        assert env.reset(seed=1) == first


@given(stack=stacks, played=st.lists(actions, max_size=5), rest=st.lists(actions, max_size=3))
@settings(max_examples=30)
def test_a_wrapped_environment_survives_pickling_and_copying(stack, played, rest):
    env = gym.make("Sums-v0", expert_info=True)
    env = wrap(env, stack)
    env.reset(seed=2)
    if (seen := play(env, played)) and (seen[-1][2] or seen[-1][3]):
        env.reset()
    copies = [pickle.loads(pickle.dumps(env)), copy.deepcopy(env)]
    expected = [play(env, rest), env.reset()]
    for copied in copies:
        assert [play(copied, rest), copied.reset()] == expected


@pytest.mark.parametrize("spec", [*SPECS, SPECS], ids=str)
@pytest.mark.parametrize("env_id", ["Sums-v0", "agentropy/ALFWorld-v0"])
def test_gymnasiums_checker_has_no_complaint(spec, env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version", category=UserWarning)
        check_env(wrap(gym.make(env_id), spec))
        check_env(wrap(gym.make(env_id, disable_env_checker=True, render_mode="ansi"), spec))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("world", [Sums, Quiz])
def test_the_expert_wins_wrapped(spec, world):
    for task in world().tasks()[:6]:
        env = wrap(world(expert_info=True), spec)
        _, info = env.reset(options={"task": task})
        for action in env.expert():
            assert action == info["expert"]
            _, _, terminated, truncated, info = env.step(action)
        assert terminated and info["won"] and not truncated and info["expert"] is None


def test_the_expert_wins_alfworld_under_every_wrapper_at_once():
    env = wrap(gym.make("agentropy/ALFWorld-v0"), [*SPECS[:6], *SPECS[7:]])  # two forms of one tag do not nest
    for task in env.tasks("valid_seen")[:5]:
        env.reset(options={"task": task})
        for action in env.expert():
            *_, info = env.step(action)
            assert not info["malformed"]
        assert info["won"]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(
    "action", ["", "\0", "\ud800", "é漢🙂" * 30_000, "<think>" * 15_000, "</action>" * 11_000, "\\boxed{" * 14_000,
               "<" * 100_000, "[" * 100_000, '{"name":' * 12_000, "<tool_call>[[" * 8_000, "<think>" + "x" * 100_000]
)  # fmt: skip
def test_no_action_raises(spec, action):
    env = wrap(Sums(), spec)
    env.reset(seed=0)
    observation, *_, info = env.step(action)
    assert env.observation_space.contains(observation)
    observation.encode()
    pickle.dumps(info)
    env.restore(env.snapshot())


def test_the_contract_goes_through_the_stack():
    world, env = Sums(), wrap(Sums(), SPECS)
    assert env.tasks() == world.tasks() and env.tasks("test") == world.tasks("test")
    assert env.tasks_hash() == world.tasks_hash()
    assert env.has_expert is True and env.splits == ("train", "test") and env.split == "train"
    assert set(world.corpus(3)) < set(env.corpus(3))
    env.reset(seed=0)
    assert "Actions are: add N." in env.instructions and env.instructions != world.instructions
    with pytest.raises(UsageError, match="lists no admissible commands"):
        env.admissible()
    assert not hasattr(env, "lexicon")
    env.close()
    env.close()


def test_alfworlds_own_methods_go_through_the_stack():
    env = wrap(gym.make("agentropy/ALFWorld-v0"), SPECS)
    _, info = env.reset(seed=0)
    assert list(env.admissible()) == info["admissible"]
    assert set(env.unwrapped.lexicon()) < set(env.lexicon())


@pytest.mark.parametrize("world", [Sums, Quiz])  # with instructions and without
def test_info_says_how_an_agent_must_write(world):
    env = wrap(world(max_turns=3), ["format-check", "retry", "prompt-templates", "turn-cost"])
    _, first = env.reset(seed=0)
    for info in (first, *(env.step("x")[4] for _ in range(2))):
        assert info["instructions"] == env.instructions
        assert "<action>" in info["instructions"] and world.instructions in info["instructions"]
        assert info["free_text"] is env.free_text is True
    plain = wrap(world(), ["turn-cost", "history-window"])
    assert "free_text" not in plain.reset()[1] and plain.free_text is False


def test_nothing_works_before_a_reset():
    env = wrap(Sums(), SPECS)
    for call in (lambda: env.step("add 1"), env.snapshot, lambda: next(env.expert())):
        with pytest.raises(ResetNeeded):
            call()


def test_an_environment_without_snapshots_has_none_wrapped_either():
    class Plain(gym.Env):
        observation_space = action_space = gym.spaces.Text(10)

        def reset(self, *, seed=None, options=None):
            return "", {}

    wrapped = wrap(Plain(), "turn-cost")
    assert not hasattr(wrapped, "snapshot") and not hasattr(wrapped, "restore")
    assert wrapped.reset()[0] == ""


def test_a_snapshot_needs_the_same_wrappers():
    def started(specs) -> gym.Env:
        env = wrap(Sums(), specs)
        env.reset(seed=0)
        return env

    capped = started(["turn-cost", {"name": "observation-cap", "max_characters": 50}])
    snapshot = capped.snapshot()
    assert snapshot.world == "observation-cap(turn-cost(Sums))"
    for specs, why in [
        ([], r"of a observation-cap\(turn-cost\(Sums\)\), not of a Sums"),
        (["turn-cost"], "under the wrapper 'observation-cap', not 'turn-cost'"),
        (["observation-cap"], "under another 'observation-cap': with {'max_characters': 50"),
        ([{"name": "observation-cap", "max_characters": 50}], r"of a turn-cost\(Sums\), not of a Sums"),
    ]:
        env = started(specs)
        before = env.get_wrapper_attr("snapshot")()
        with pytest.raises(UsageError, match=why):
            env.get_wrapper_attr("restore")(snapshot)
        assert env.get_wrapper_attr("snapshot")() == before
    with pytest.raises(UsageError, match="without the wrapper 'observation-cap'"):
        capped.restore(Sums.snapshot(capped.unwrapped))


def test_gymnasiums_own_wrappers_may_stand_in_between():
    def make() -> gym.Env:
        env = gym.make("Sums-v0", max_episode_steps=4)  # checker, order and time limit
        return wrap(TimeLimit(wrap(env, "turn-cost"), 5), ["reminder", "retry-invalid"])

    env, fresh = make(), make()
    env.reset(seed=0)
    play(env, ["add 1", "add 1", "fly"])  # the last one is taken back, also for the time limits
    shown = fresh.restore(pickle.loads(pickle.dumps(env.snapshot())))
    assert shown[1]["turn"] == 2
    for copied in (env, fresh):
        seen = play(copied, ["add 1"] * 9)
        assert [step[3] for step in seen] == [False, True]
    with pytest.raises(UsageError, match="under 1 time limits, not under 0"):
        wrap(gym.make("Sums-v0", max_episode_steps=-1), "turn-cost").restore(env.snapshot().inner.inner)


def test_the_stack_is_built_from_a_picklable_spec():
    spec = replace(gym.spec("agentropy/ALFWorld-v0"), additional_wrappers=wrapper_specs(SPECS))
    spec = EnvSpec.from_json(pickle.loads(pickle.dumps(spec)).to_json())
    env, direct = gym.make(spec), wrap(gym.make("agentropy/ALFWorld-v0"), SPECS)
    assert str(env) == str(direct) and env.spec == direct.spec
    assert env.reset(seed=5) == direct.reset(seed=5)
    rebuilt = gym.make(env.spec)
    assert rebuilt.restore(env.snapshot())[0] == env.restore(env.snapshot())[0]


def test_specs_are_names_or_mappings():
    assert str(wrap(Sums(), "turn-cost")) == "<TurnCost<Sums instance>>"
    assert str(wrap(Sums(), {"name": "reminder", "every": 3})) == "<Reminder<Sums instance>>"
    assert str(wrap(Sums(), ["turn-cost", {"name": "reminder"}])) == "<Reminder<TurnCost<Sums instance>>>"
    assert str(wrap(Sums(), [])) == "<Sums instance>"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("observation-cab", "unknown wrapper 'observation-cab'; did you mean 'observation-cap'"),
        ({"name": "turn-cost", "costs": 1}, "unknown option 'costs' of the wrapper 'turn-cost'; did you mean 'cost'"),
        ({"cost": 1}, "a wrapper needs a name"),
        ({"name": "observation-cap", "max_characters": 0}, "max_characters must be at least 1, got 0"),
        ({"name": "observation-cap", "keep": "heads"}, "did you mean 'head'"),
        ({"name": "history-window", "turns": -1}, "turns must not be negative, got -1"),
        ({"name": "reminder", "every": 0}, "every must be at least 1"),
        ({"name": "reminder", "text": "Remember!"}, "needs {goal}"),
        ({"name": "turn-cost", "cost": -1}, "cost must be a number that is not negative, got -1"),
        ({"name": "turn-cost", "cost": float("nan")}, "got nan"),
        ({"name": "tool-penalty", "free": -1}, "free must not be negative"),
        ({"name": "format-check", "form": "think"}, "unknown action format 'think'"),
        ({"name": "format-check", "malformed": "rejects"}, "did you mean 'reject'"),
        ({"name": "retry", "attempts": 0}, "attempts must be at least 1"),
        ({"name": "retry", "teacher": "no_such_module:f"}, "no teacher 'no_such_module:f'"),
        ({"name": "retry-invalid", "exhausted": "stop"}, "unknown way out 'stop'"),
        ({"name": "prompt-templates", "templates": ["abell"]}, "did you mean 'abel'"),
        ({"name": "prompt-templates", "templates": []}, "at least one template"),
        ({"name": "prompt-templates", "place": "system"}, "unknown place 'system'"),
    ],
)
def test_errors_say_what_was_wrong(spec, why):
    with pytest.raises(UsageError, match=why):
        wrap(Sums(), spec)


def test_only_text_worlds_can_be_wrapped():
    with pytest.raises(UsageError, match="for text worlds"):
        wrap(gym.make("CartPole-v1"), "turn-cost")


def test_a_fork_in_another_process_goes_on_the_same():
    specs = [spec for spec in SPECS if spec["name"] != "retry-invalid"]
    env = wrap(gym.make("agentropy/ALFWorld-v0", expert_info=True), specs)
    _, info = env.reset(seed=8)
    for _ in range(3):
        *_, info = env.step(info["expert"])
    program = f"""
import pickle, sys, gymnasium, agentropy.envs
from agentropy.envs.wrappers import wrap
env = wrap(gymnasium.make("agentropy/ALFWorld-v0", expert_info=True), {specs!r})
_, info = env.restore(pickle.load(sys.stdin.buffer))
seen = [env.step(info["expert"]), env.step("fly"), env.reset(), env.reset(seed=8)]
sys.stdout.buffer.write(pickle.dumps(seen))
"""
    state = pickle.dumps(env.snapshot())
    done = subprocess.run([sys.executable, "-c", program], input=state, capture_output=True, check=True)
    there = pickle.loads(done.stdout)
    assert there[:2] == [env.step(info["expert"]), env.step("fly")]
    assert there[3] == env.reset(seed=8)


def test_a_pool_hosts_wrapped_environments():
    env = wrap(gym.make("agentropy/ALFWorld-v0"), SPECS)
    first, info = env.reset(seed=5, options={"task": env.tasks()[7]})
    played = ["<action>fly</action>", next(env.expert())]
    expected = [env.step(action) for action in played]
    with EnvPool("agentropy/ALFWorld-v0", wrappers=SPECS, num_envs=3, num_workers=2) as pool:
        assert pool.tasks("train") == env.tasks()

        def play(slot: int, action: str) -> tuple:
            pool.step(slot, action)
            (result,) = pool.wait()
            return result.observation, result.reward, result.terminated, result.truncated, result.info

        pool.reset(0, task=info["task"], seed=5)
        (result,) = pool.wait()
        assert (result.observation, result.info) == (first, info)
        assert play(0, played[0]) == expected[0]
        pool.fork(0, 1)
        pool.wait()
        pool.restore(2, pickle.loads(pickle.dumps(pool.snapshot(0))))
        pool.wait()
        for slot in range(3):
            assert play(slot, played[1]) == expected[1]


def test_the_examples_in_the_documentation_are_true():
    for module in pkgutil.iter_modules(wrappers.__path__, wrappers.__name__ + "."):
        failed, _ = doctest.testmod(importlib.import_module(module.name))
        assert not failed
    assert not doctest.testmod(wrappers).failed


def test_every_wrapper_takes_what_json_can_write():
    for spec in SPECS:
        wrap(Sums(), json.loads(json.dumps(spec)))
    assert {spec["name"] for spec in SPECS} == set(NAMES)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_wrapped_environments_in_a_vector(mode):
    def build(env: gym.Env) -> gym.Env:
        return wrap(env, SPECS)

    envs = gym.make_vec("agentropy/ALFWorld-v0", num_envs=2, vectorization_mode=mode, wrappers=[build])
    single = wrap(gym.make("agentropy/ALFWorld-v0"), SPECS)
    try:
        assert envs.reset(seed=[0, 1])[0][1] == single.reset(seed=1)[0]
        for action in ("fly", next(single.expert())):
            observations, rewards, *_ = envs.step((action, action))
            observation, reward, *_ = single.step(action)
            assert (observations[1], rewards[1]) == (observation, reward)
    finally:
        envs.close()
