"""ALFWorld as a Gymnasium environment: episodes, snapshots, the expert, errors, and where it can be made."""

import pickle
import subprocess
import sys

import gymnasium as gym
import pytest

pytest.importorskip("textworld")
pytest.importorskip("fast_downward")

import numpy as np
from gymnasium.error import ResetNeeded
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.envs.alfworld import env as env_module
from agentropy.envs.alfworld.env import ALFWorldEnv
from agentropy.envs.alfworld.games import TASK_TYPES
from agentropy.errors import MissingDependencyError, UsageError

ENV_ID = "agentropy/ALFWorld-v0"
INFO_KEYS = {"task", "split", "goal", "won", "score", "admissible", "turn", "invalid"}


@pytest.fixture(scope="module")
def env() -> ALFWorldEnv:
    return ALFWorldEnv(split="valid_seen")


def play(env: ALFWorldEnv, rng: np.random.Generator, steps: int) -> list[tuple]:
    """Take random admissible or inadmissible steps until the episode ends."""
    seen = []
    admissible = env.restore(env.snapshot())[1]["admissible"]
    for _ in range(steps):
        action = "dance" if rng.random() < 0.1 else admissible[int(rng.integers(len(admissible)))]
        seen.append(env.step(action))
        admissible = seen[-1][4]["admissible"]
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


def test_first_observation_is_the_room_and_the_task(env):
    observation, info = env.reset(seed=0)
    assert observation.startswith("You are in the middle of a room.")
    assert observation.endswith(f"\n\nYour task is to: {info['goal']}")
    assert "Welcome" not in observation
    assert set(info) == INFO_KEYS
    assert (info["split"], info["turn"], info["won"], info["score"]) == ("valid_seen", 0, False, 0.0)
    assert info["task"] in env.tasks()
    assert info["admissible"] == sorted(info["admissible"])
    assert {"look", "inventory", "help"} <= set(info["admissible"])


def test_seed_chooses_the_task_and_no_seed_continues_the_generator(env):
    def drawn() -> list[str]:
        return [env.reset(seed=7)[1]["task"]] + [env.reset()[1]["task"] for _ in range(5)]

    first = drawn()
    assert first == drawn()
    assert len(set(first)) > 1


def test_task_option_chooses_the_game_in_any_split(env):
    for split in ("valid_seen", "train", "valid_unseen"):
        task = env.tasks(split)[3]
        _, info = env.reset(options={"task": task})
        assert (info["task"], info["split"]) == (task, split)


def test_success_ends_the_episode_with_the_scaled_reward():
    env = ALFWorldEnv(split="valid_seen", reward_scale=10.0)
    env.reset(seed=3)
    rewards = []
    for action in env.expert():
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
    assert terminated and not truncated and info["won"] and info["score"] == 1.0
    assert rewards == [0.0] * (len(rewards) - 1) + [10.0]
    assert list(env.expert()) == []
    with pytest.raises(ResetNeeded):
        env.step("look")


def test_turn_limit_truncates():
    env = ALFWorldEnv(split="valid_seen", max_turns=3)
    env.reset(seed=0)
    for turn in (1, 2, 3):
        _, reward, terminated, truncated, info = env.step("look")
        assert (reward, terminated, truncated, info["turn"]) == (0.0, False, turn == 3, turn)
    with pytest.raises(ResetNeeded):
        env.step("look")
    env.reset()
    assert not env.step("look")[3]


def test_invalid_command_costs_a_turn_and_changes_nothing(env):
    _, before = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("eat the fridge")
    assert (observation, reward, terminated, truncated) == ("Nothing happens.", 0.0, False, False)
    assert info["invalid"] and info["turn"] == 1
    assert info["admissible"] == before["admissible"]
    assert not env.step("  look\n")[4]["invalid"]


def test_nothing_works_before_reset():
    env = ALFWorldEnv(split="valid_seen")
    for use in (lambda: env.step("look"), env.snapshot, lambda: next(env.expert())):
        with pytest.raises(ResetNeeded):
            use()


@settings(max_examples=12)
@given(seed=st.integers(0, 7), before=st.integers(0, 12), after=st.integers(1, 20))
def test_restored_episode_continues_as_the_original(env, seed, before, after):
    env.reset(seed=seed)
    play(env, np.random.default_rng(seed), before)
    snapshot = env.snapshot()
    if snapshot.turn == env.max_turns or env.restore(snapshot)[1]["won"]:
        return
    first = play(env, np.random.default_rng(seed + 1), after)
    play_elsewhere(env, seed)
    env.restore(snapshot)
    assert env.snapshot() == snapshot
    assert play(env, np.random.default_rng(seed + 1), after) == first
    other = ALFWorldEnv(split="train")
    other.restore(pickle.loads(pickle.dumps(snapshot)))
    assert play(other, np.random.default_rng(seed + 1), after) == first


def play_elsewhere(env: ALFWorldEnv, seed: int) -> None:
    """Diverge, in the same game and then in another."""
    play(env, np.random.default_rng(seed + 2), 8) if not env._over else None
    env.reset()
    play(env, np.random.default_rng(seed + 3), 8)


def test_two_environments_on_one_game_do_not_interfere(env):
    task = env.tasks()[0]
    other = ALFWorldEnv(split="valid_seen")

    def episode(chosen: ALFWorldEnv, seed: int) -> list[tuple]:
        chosen.reset(options={"task": task})
        return play(chosen, np.random.default_rng(seed), 15)

    alone = episode(env, 1), episode(env, 2)
    env.reset(options={"task": task})
    other.reset(options={"task": task})
    rngs = np.random.default_rng(1), np.random.default_rng(2)
    together: tuple[list, list] = [], []
    for _ in range(15):
        for at, chosen in enumerate((env, other)):
            if not chosen._over:
                together[at].extend(play(chosen, rngs[at], 1))
    assert together == alone


def test_snapshot_is_small_and_restores_in_a_fresh_process(env, tmp_path):
    env.reset(seed=11)
    play(env, np.random.default_rng(11), 10)
    snapshot = env.snapshot()
    data = pickle.dumps(snapshot)
    assert len(data) < 8000
    code = (
        "import pickle, sys, agentropy.envs, gymnasium\n"
        f"snapshot = pickle.loads({data!r})\n"
        f"env = gymnasium.make({ENV_ID!r}).unwrapped\n"
        "observation, info = env.restore(snapshot)\n"
        "sys.stdout.buffer.write(pickle.dumps((observation, info, env.step('look'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    assert pickle.loads(done.stdout) == (*env.restore(snapshot), env.step("look"))


def test_snapshot_of_another_game_of_the_same_name_is_refused(env):
    env.reset(seed=0)
    snapshot = env.snapshot()
    object.__setattr__(snapshot, "identity", "0" * 32)
    with pytest.raises(UsageError, match="another task"):
        env.restore(snapshot)


def test_expert_wins_from_wherever_the_agent_has_strayed():
    env = ALFWorldEnv(split="valid_seen", max_turns=100, expert_info=True)
    for seed in range(12):
        _, info = env.reset(seed=seed)
        assert info["expert"] == next(env.expert())
        for result in play(env, np.random.default_rng(seed), 15):
            info = result[4]
        while info["expert"] is not None:
            assert info["expert"] in info["admissible"]
            info = env.step(info["expert"])[4]
        assert info["won"], info["task"]


def test_expert_wins_published_games(shared_data):
    env = ALFWorldEnv(split="valid_seen", source="pack", data=shared_data / "alfworld")
    for task in env.tasks()[::35]:
        _, info = env.reset(options={"task": task})
        for action in env.expert():
            info = env.step(action)[4]
        assert info["won"], task


def test_only_the_chosen_task_types_are_drawn():
    env = ALFWorldEnv(split="valid_seen", task_types=["look_at_obj_in_light"])
    assert env.tasks() and all(task.startswith("look_at_obj_in_light-") for task in env.tasks())
    whole = ALFWorldEnv(split="valid_seen")
    assert {task.split("-")[0] for task in whole.tasks()} == set(TASK_TYPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid_sen"}, "did you mean 'valid_seen'"),
        ({"source": "pakc"}, "did you mean 'pack'"),
        ({"engine": "textwrld"}, "did you mean 'textworld'"),
        ({"task_types": ["pick_and_place"]}, "did you mean 'pick_and_place_simple'"),
        ({"max_turns": 0}, "at least 1"),
        ({"render_mode": "rgb"}, "unknown render mode"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        ALFWorldEnv(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tsk": "x"}, "did you mean 'task'"),
        ({"task": "nonsense"}, "unknown ALFWorld task 'nonsense'"),
        ({"task": 3}, "unknown ALFWorld task 3"),
    ],
)
def test_bad_reset_options_are_named(env, options, message):
    with pytest.raises(UsageError, match=message):
        env.reset(options=options)


def test_missing_engine_says_what_to_install(monkeypatch):
    real = env_module.importlib.util.find_spec
    monkeypatch.setattr(
        env_module.importlib.util, "find_spec", lambda name: None if name == "fast_downward" else real(name)
    )
    with pytest.raises(MissingDependencyError, match=r"fast-downward-textworld.*g\+\+ cmake.*agentropy\[alfworld\]"):
        ALFWorldEnv(engine="textworld")


def test_rendering(capsys):
    env = gym.make(ENV_ID, split="valid_seen", render_mode="ansi")
    observation, _ = env.reset(seed=0)
    assert env.render() == observation
    env = gym.make(ENV_ID, split="valid_seen", render_mode="human")
    observation, _ = env.reset(seed=0)
    assert capsys.readouterr().out == observation + "\n"
    env.step("look")
    assert capsys.readouterr().out.startswith("> look\n")


def test_importing_the_environments_loads_no_engine(tmp_path):
    code = (
        "import sys, agentropy.envs, gymnasium; gymnasium.spec('agentropy/ALFWorld-v0');"
        "print([name for name in ('torch', 'textworld', 'fast_downward', 'alfworld') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_gymnasium_imports_the_environment_by_its_module_name(tmp_path):
    code = "import gymnasium as gym; print(gym.make('agentropy.envs:agentropy/ALFWorld-v0').reset(seed=0)[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Your task is to:" in done.stdout


def test_an_inadmissible_command_costs_its_penalty_and_nothing_else():
    env = ALFWorldEnv(split="valid_seen", invalid_penalty=0.1)
    env.reset(seed=0)
    assert env.step("dance")[1] == pytest.approx(-0.1)
    assert env.step("look")[1] == 0.0
    *_, last = ((*env.step(action)[1:3],) for action in env.expert())
    assert last == (1.0, True)


@pytest.mark.parametrize("expert", ["oracle", "explorer"])
def test_progress_is_paid_once_whatever_the_way(expert):
    """A potential: what an episode earns by it depends on where it began and ended alone."""
    env = ALFWorldEnv(split="valid_seen", progress_reward=2.0, reward_scale=0.0, expert=expert)
    for seed in range(4):
        env.reset(seed=seed)
        paid = [env.step(action)[1] for action in env.expert()]
        assert env._point.won
        assert sum(paid) == pytest.approx(2.0)
        assert expert == "explorer" or min(paid) > 0


def test_progress_is_paid_back_and_what_changes_nothing_earns_nothing():
    env = ALFWorldEnv(split="valid_seen", progress_reward=1.0)
    env.reset(seed=0)
    while not (action := next(env.expert())).startswith("take "):
        env.step(action)
    taken = env.step(action)[1]
    assert taken > 0
    assert env.step("look")[1] == env.step("fly")[1] == 0
    point = env.snapshot()
    put_back = action.replace("take ", "move ").replace(" from ", " to ")
    assert env.step(put_back)[1] == pytest.approx(-taken)
    env.restore(point)
    assert env.step(put_back)[1] == pytest.approx(-taken)
