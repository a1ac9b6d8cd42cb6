"""Rollouts that fork, in every world of the suite: what a branch was told and paid is what a world that was never
copied says."""

import zlib

import gymnasium as gym
import numpy as np
import pytest

from agentropy.agents.branching import EntropyBranching
from agentropy.agents.messages import ParsedAction
from agentropy.agents.policies import Act
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.envs import ENV_IDS
from agentropy.envs.pool import EnvPool

from .test_conformance import REMOTE, REQUIRED, server  # noqa: F401

OPTIONS = {"agentropy/ScienceWorld-v0": {"max_turns": 6}, "agentropy/TextWorld-v0": {"max_turns": 8}}


class Bytes:
    """A format that needs no tokenizer: a token is a byte."""

    stop_token_ids = (0,)
    stop_strings = ()

    def prompt(self, observation, info):
        return [*observation.encode()[:200], 1]

    def observation(self, text, info, *, closed=True):
        return [*text.encode()[:200], 1]

    def render_action(self, command, info):
        return [*command.encode(), 0]


class Wanderer:
    """Plays random commands, half of them sensible, and makes up their entropies."""

    max_action_tokens = 400
    vocabulary = 256

    def act(self, contexts):
        return [self._one(context) for context in contexts]

    def release(self, finished):
        pass

    def _one(self, context):
        rng = np.random.default_rng(context.seed)
        known = sorted(context.info.get("admissible") or []) or ["look", "inventory", "help"]
        expert = context.info.get("expert")
        command = expert if expert is not None and rng.random() < 0.5 else known[int(rng.integers(len(known)))]
        tokens = np.array(Bytes().render_action(command, {}), np.int32)
        numbers = rng.random((2, len(tokens))).astype(np.float32)
        return Act(tokens, ParsedAction(command, True, True, command), True, numbers[0], numbers[1])


@pytest.mark.parametrize("env_id", sorted(ENV_IDS))
def test_branches_are_true_copies(env_id, request, monkeypatch):
    for module in REQUIRED.get(env_id, ()):
        pytest.importorskip(module)
    kwargs = dict(OPTIONS.get(env_id, {}))
    if env_id == REMOTE:
        kwargs = {"url": request.getfixturevalue("server"), "env_id": "agentropy/ALFWorld-v0", "max_turns": 10}
    world = gym.make(env_id, split="train", disable_env_checker=True, **kwargs).unwrapped
    names = list(world.demonstrations("train") if hasattr(world, "demonstrations") else world.tasks("train"))
    slow = env_id in OPTIONS
    chosen = [names[0]] if slow else [names[0], names[len(names) // 2]]
    tasks = [RolloutTask(name, 5, zlib.crc32(name.encode())) for name in chosen]
    with EnvPool(env_id, {"split": "train", **kwargs}, num_envs=10, num_workers=1 if slow else 2) as pool:
        trees = rollout(
            Wanderer(),
            pool,
            Bytes(),
            tasks,
            split="train",
            max_context_tokens=100_000,
            branching=EntropyBranching(rule="bernoulli", alpha=0.6, beta=0.0, initial=2),
        )
    forks = 0
    for task, tree in zip(tasks, trees, strict=True):
        assert len(tree.trajectories) == 5 and not any(t.failed for t in tree.trajectories)
        for trajectory in tree.trajectories:
            forks += "fork" in trajectory.info
            observation, info = world.reset(seed=task.seed, options={"task": task.task})
            walk = tree.path(trajectory.leaves[-1])
            assert walk[0].text == observation
            for node, after in zip(walk[1::2], [*walk[2::2], None], strict=True):
                observation, reward, terminated, truncated, info = world.step(node.text)
                assert node.reward == pytest.approx(reward)
                if after is not None:
                    assert after.text == observation and not terminated
            assert (terminated or truncated) and trajectory.won == info["won"]
            assert trajectory.info["last_observation"] == observation
    assert forks >= len(tasks)
    world.close()
