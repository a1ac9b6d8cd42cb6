"""A real model, the real engine and the real ALFWorld in a pool of processes."""

import gymnasium
import numpy as np
import pytest
import torch

import agentropy.envs  # noqa: F401  (registers the world)
from agentropy.agents.engines.base import SamplingParams
from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.agents.formats import PlainFormat
from agentropy.agents.models import build_small_model
from agentropy.agents.policies import EnginePolicy, ExpertPolicy, RandomPolicy
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.envs.pool import EnvPool

WORLD = "agentropy/ALFWorld-v0"
TURNS = 6


@pytest.fixture(scope="module")
def pool():
    with EnvPool(WORLD, {"max_turns": TURNS, "expert_info": True}, num_envs=6, num_workers=2) as pool:
        yield pool


@pytest.fixture(scope="module")
def tasks(pool):
    return [RolloutTask(task, 2, seed) for seed, task in enumerate(pool.tasks("train")[::500])]


@pytest.fixture(scope="module")
def format(tasks):
    world, texts = gymnasium.make(WORLD), []
    for task in tasks:
        observation, info = world.reset(options={"task": task.task})
        texts += [observation, *info["admissible"]]
    return PlainFormat(build_word_tokenizer(texts))


@pytest.fixture(scope="module")
def model():
    return build_small_model(600, hidden=32, layers=2, heads=2, intermediate=64)


def sampled(pool, format, model, tasks, *, mode="full"):
    engine = TorchEngine(model, cache_tokens=16_384)
    policy = EnginePolicy(engine, format, SamplingParams(temperature=0.8), max_action_tokens=8)
    trees = rollout(policy, pool, format, tasks, split="train", max_context_tokens=1024, context=mode)
    engine.close()
    return trees, engine.stats


def leaves(trees):
    return [(tree, leaf) for tree in trees for trajectory in tree.trajectories for leaf in trajectory.leaves]


@pytest.mark.parametrize("mode", ["full", "window"])
def test_one_forward_pass_over_a_walk_gives_the_numbers_of_the_sampler(pool, format, model, tasks, mode):
    trees, _ = sampled(pool, format, model, tasks[:2], mode=mode)
    for tree, leaf in leaves(trees):
        tokens, mask = torch.from_numpy(tree.tokens(leaf)).long(), tree.mask(leaf)
        with torch.no_grad():
            logprobs = (model(tokens[None]).logits[0, :-1].float() / 0.8).log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[1:, None])[:, 0].numpy()
        entropies = -(logprobs.exp() * logprobs).sum(-1).numpy()
        assert mask.any() and not mask[0]
        np.testing.assert_allclose(tree.logprobs(leaf)[1:], np.where(mask[1:], chosen, 0), atol=1e-4)
        np.testing.assert_allclose(tree.entropies(leaf)[1:], np.where(mask[1:], entropies, 0), atol=1e-4)


def test_an_episode_is_the_same_twice_alone_and_in_a_batch(pool, format, model, tasks):
    together, _ = sampled(pool, format, model, tasks)
    again, _ = sampled(pool, format, model, tasks)
    alone = [sampled(pool, format, model, [task])[0][0] for task in tasks]
    assert [tree.to_dict() for tree in together] == [tree.to_dict() for tree in again]
    for (tree, leaf), (other, same) in zip(leaves(together), leaves(alone), strict=True):
        assert np.array_equal(tree.tokens(leaf), other.tokens(same))
        np.testing.assert_allclose(tree.logprobs(leaf), other.logprobs(same), atol=1e-4)


def test_turns_of_an_episode_reuse_the_cache(pool, format, model, tasks):
    trees, stats = sampled(pool, format, model, tasks)
    read = sum(len(tree.tokens(leaf)) for tree, leaf in leaves(trees))
    assert stats.prefill_tokens < read < stats.cached_tokens


def test_the_expert_wins_every_task_in_a_pool(format):
    with EnvPool(WORLD, {"expert_info": True}, num_envs=4, num_workers=2) as pool:
        panel = [RolloutTask(task, 1, 0) for task in pool.tasks("valid_unseen")[::40]]
        trees = rollout(ExpertPolicy(format), pool, format, panel, split="valid_unseen", max_context_tokens=4096)
    for tree in trees:
        assert tree.trajectories[0].won and tree.trajectories[0].reward == 1.0
        assert tree.trajectories[0].info["invalid"] == 0


def test_members_of_a_group_read_the_same_first_observation(pool, format, tasks):
    trees = rollout(RandomPolicy(format), pool, format, tasks, split="train", max_context_tokens=4096)
    assert all(len(tree.children(-1)) == 1 for tree in trees)
    assert all(trajectory.turns <= TURNS for tree in trees for trajectory in tree.trajectories)
