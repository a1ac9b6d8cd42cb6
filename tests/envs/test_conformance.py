"""Every registered environment keeps Gymnasium's contract and the suite's own."""

import pickle
import warnings

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from agentropy.envs import ENV_IDS, register

REQUIRED = {
    "agentropy/ALFWorld-v0": ("textworld", "fast_downward", "alfworld"),
}


@pytest.fixture(params=sorted(ENV_IDS))
def env_id(request) -> str:
    for module in REQUIRED.get(request.param, ()):
        pytest.importorskip(module)
    return request.param


def test_gymnasiums_checker_has_no_complaint(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not within the observation space.*unwrapped", category=UserWarning)
        check_env(gym.make(env_id).unwrapped)
        check_env(gym.make(env_id, render_mode="ansi").unwrapped)


def test_checker_accepts_the_wrapped_environment(env_id):
    check_env(gym.make(env_id), skip_render_check=True)


def test_registering_twice_changes_nothing(env_id):
    spec = gym.spec(env_id)
    register()
    assert gym.spec(env_id) is spec


def test_tasks_are_sorted_distinct_and_stable(env_id):
    tasks = gym.make(env_id).unwrapped.tasks()
    assert tasks and list(tasks) == sorted(set(tasks))
    assert gym.make(env_id).unwrapped.tasks() == tasks


def test_same_seed_and_actions_give_the_same_episode(env_id):
    def episode() -> list:
        env = gym.make(env_id)
        seen: list = [env.reset(seed=5)]
        for _ in range(8):
            seen.append(env.step(seen[-1][-1]["admissible"][0]))
        return seen

    assert episode() == episode()


def test_info_names_the_task(env_id):
    env = gym.make(env_id)
    task = env.unwrapped.tasks()[-1]
    observation, info = env.reset(options={"task": task})
    assert info["task"] == task
    assert env.observation_space.contains(observation)
    assert {"task", "split", "won", "score", "turn"} <= set(info)


def test_snapshot_survives_pickling_and_restores(env_id):
    env = gym.make(env_id).unwrapped
    _, info = env.reset(seed=1)
    observation, _, _, _, info = env.step(info["admissible"][0])
    snapshot = pickle.loads(pickle.dumps(env.snapshot()))
    env.step(info["admissible"][-1])
    assert env.restore(snapshot) == (observation, info)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments(env_id, mode):
    envs = gym.make_vec(
        env_id, num_envs=2, vectorization_mode=mode, vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP}
    )
    try:
        observations, infos = envs.reset(seed=[0, 1])
        assert len(observations) == 2 and all(isinstance(item, str) and item for item in observations)
        single = gym.make(env_id)
        expected, info = single.reset(seed=1)
        assert observations[1] == expected
        action = info["admissible"][0]
        observations, rewards, terminated, truncated, infos = envs.step((action, action))
        assert observations[1] == single.step(action)[0]
        assert infos["turn"].tolist() == [1, 1]
        assert rewards.shape == terminated.shape == truncated.shape == (2,)
    finally:
        envs.close()
