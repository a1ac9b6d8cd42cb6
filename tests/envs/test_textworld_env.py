"""TextWorld as a Gymnasium environment: episodes, rewards, snapshots, the expert, errors, both engines."""

import pickle
import random

import gymnasium as gym
import pytest

pytest.importorskip("textworld")

from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.envs.textworld.env import INVALID, TextWorldEnv
from agentropy.errors import MissingDependencyError, UsageError

INFO_KEYS = {"task", "split", "goal", "won", "lost", "score", "admissible", "turn", "invalid", "instructions"}
COOKING = {"challenge": "cooking", "recipe": 2, "go": 6, "open": True, "cook": True, "cut": True}


@pytest.fixture(scope="module")
def env() -> TextWorldEnv:
    return TextWorldEnv(max_turns=40)


@pytest.fixture(scope="module")
def cooking() -> TextWorldEnv:
    return TextWorldEnv(**COOKING)


@pytest.fixture(scope="module")
def inform() -> TextWorldEnv:
    env = TextWorldEnv(max_turns=40, engine="inform")
    yield env
    env.close()


def walk(env: TextWorldEnv, rng: random.Random, steps: int) -> list[tuple]:
    """Take random steps, one in ten of them nonsense, until the episode ends."""
    seen = []
    for _ in range(steps):
        commands = env.admissible()
        if not commands:
            break
        seen.append(env.step("dance" if rng.random() < 0.1 else rng.choice(commands)))
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


def test_first_observation_is_the_objective_and_the_room(env):
    observation, info = env.reset(options={"task": "seed-0000003"})
    assert set(info) == INFO_KEYS
    assert observation.startswith(f"{info['goal']}\n\n-= ")
    assert "$$" not in observation and "\n\n\n" not in observation and not observation.endswith(("\n", ">"))
    assert info["admissible"] == sorted(info["admissible"])
    assert {"look", "inventory"} <= set(info["admissible"])
    assert (info["won"], info["lost"], info["score"]) == (False, False, 0.0)


def test_look_shows_the_room_again(env):
    observation, info = env.reset(options={"task": "seed-0000003"})
    room = observation.removeprefix(info["goal"]).strip()
    assert env.step("look")[0] == room
    assert env.step("inventory")[0].startswith("You are carrying")


def test_expert_wins_the_first_games_of_each_split_in_a_few_commands(env):
    for split in ("train", "valid", "test"):
        for task in env.tasks(split)[:3]:
            env.reset(options={"task": task})
            rewards = []
            for action in env.expert():
                _, reward, terminated, truncated, info = env.step(action)
                rewards.append(reward)
            assert terminated and not truncated and info["won"] and info["score"] == 1.0
            assert 3 <= len(rewards) <= 15
            assert sum(rewards) == pytest.approx(1.0)


def test_dense_reward_is_the_share_of_points_and_sparse_that_of_winning():
    env = TextWorldEnv(**COOKING)
    sparse = TextWorldEnv(**COOKING, reward="sparse")
    task = env.tasks()[0]
    env.reset(options={"task": task})
    sparse.reset(options={"task": task})
    dense_rewards, sparse_rewards, score = [], [], 0.0
    for action in env.expert():
        _, reward, _, _, info = env.step(action)
        dense_rewards.append(reward)
        assert info["score"] - score == pytest.approx(reward)
        score = info["score"]
        sparse_rewards.append(sparse.step(action)[1])
    assert sum(value > 0 for value in dense_rewards) > 3
    assert sum(dense_rewards) == pytest.approx(1.0)
    assert sparse_rewards == [0.0] * (len(sparse_rewards) - 1) + [1.0]


def test_losing_ends_the_episode(cooking):
    cooking.reset(options={"task": cooking.tasks()[0]})
    for action in cooking.expert():
        _, _, terminated, _, info = cooking.step(action)
        if action.startswith("cook"):
            observation, reward, terminated, truncated, info = cooking.step(action)
            break
    assert terminated and not truncated
    assert info["lost"] and not info["won"] and info["score"] < 1.0
    assert reward == 0.0
    assert info["admissible"] == []
    assert "You burned the" in observation and "*** You lost! ***" in observation
    assert list(cooking.expert()) == []


def test_expert_reads_the_cookbook_while_it_is_on_the_walkthrough_and_wins_off_it(cooking):
    cooking.reset(options={"task": cooking.tasks()[1]})
    played = []
    for action in cooking.expert():
        cooking.step(action)
        played.append(action)
    assert "examine cookbook" in played
    _, info = cooking.reset(options={"task": cooking.tasks()[1]})
    rng = random.Random(0)
    for _ in range(8):
        harmless = [name for name in info["admissible"] if name.startswith(("go", "open", "close", "take", "drop"))]
        info = cooking.step(rng.choice(harmless))[4]
    for action in cooking.expert():
        info = cooking.step(action)[4]
    assert info["won"]


def test_nonsense_costs_a_turn_and_the_penalty_and_changes_nothing():
    env = TextWorldEnv(invalid_penalty=0.25)
    _, before = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("eat the universe")
    assert (observation, reward, terminated, truncated) == (INVALID, -0.25, False, False)
    assert info["invalid"] and info["turn"] == 1
    assert info["admissible"] == before["admissible"]
    assert not env.step(" L ")[4]["invalid"]


@pytest.mark.parametrize(
    "action", ["", "   ", "\x00\n", "caf\u00e9 \ud83d", "x" * 100_000, "restart", "save", "tw-print version"]
)
def test_any_text_is_an_action(env, inform, action):
    for world in (env, inform):
        _, before = world.reset(options={"task": "seed-0000003"})
        observation, reward, terminated, _, info = world.step(action)
        assert observation and (reward, terminated) == (0.0, False)
        assert info["admissible"] == before["admissible"]
        assert world.step("look")[0].startswith("-= ")


def test_both_engines_show_the_same_episode(env, inform):
    rng = random.Random(1)
    ours, theirs = (world.reset(options={"task": "seed-0000003"}) for world in (env, inform))
    assert ours == theirs
    info = ours[1]
    for _ in range(30):
        action = rng.choice([*info["admissible"], "l", "inv"])
        ours, theirs = env.step(action), inform.step(action)
        assert ours == theirs
        info = ours[4]
        if ours[2]:
            break
    assert inform.reset(options={"task": "seed-0000003"}) == env.reset(options={"task": "seed-0000003"})
    assert [inform.step(action)[4]["won"] for action in inform.expert()][-1]


@pytest.mark.parametrize(
    "text",
    ["n", "s", "e", "w", "get {0}", "take the {0}", "pick up {0}", "x {1}", "look at the {1}", "go e", "run west", "I"],
)
def test_short_forms_mean_what_the_games_parser_takes_them_for(env, inform, text):
    _, info = env.reset(options={"task": "seed-0000003"})
    inform.reset(options={"task": "seed-0000003"})
    things = [command.removeprefix("examine ") for command in info["admissible"] if command.startswith("examine ")]
    takes = [command.removeprefix("take ").split(" from ")[0] for command in info["admissible"] if "take " in command]
    action = text.format((takes or things)[0], things[-1])
    ours, theirs = env.step(action), inform.step(action)
    if ours[4]["invalid"]:
        assert theirs[4]["admissible"] == ours[4]["admissible"]
    else:
        assert ours[:4] == theirs[:4]  # TextWorld's own tracking misses a "get" that names no place


@settings(max_examples=25)
@given(seed=st.integers(0, 5), before=st.integers(0, 20), after=st.integers(1, 20))
def test_restored_episode_continues_as_the_original(env, seed, before, after):
    env.reset(options={"task": env.tasks()[seed]})
    walk(env, random.Random(seed), before)
    if env._over:
        return
    snapshot = env.snapshot()
    point = (env._observation, env._info())
    first = walk(env, random.Random(after), after)
    other = TextWorldEnv(max_turns=40)
    assert other.restore(pickle.loads(pickle.dumps(snapshot))) == point
    assert walk(other, random.Random(after), after) == first
    assert env.restore(snapshot) == point
    assert walk(env, random.Random(after), after) == first


def test_snapshots_are_small(cooking):
    cooking.reset(options={"task": cooking.tasks()[0]})
    walk(cooking, random.Random(0), 20)
    assert len(pickle.dumps(cooking.snapshot())) < 2_000


def test_compiled_games_restore_by_playing_again(inform):
    inform.reset(options={"task": "seed-0000003"})
    walk(inform, random.Random(3), 8)
    snapshot = inform.snapshot()
    first = walk(inform, random.Random(4), 8)
    inform.restore(pickle.loads(pickle.dumps(snapshot)))
    assert walk(inform, random.Random(4), 8) == first


def test_snapshot_of_another_recipe_is_refused(env, cooking):
    cooking.reset(options={"task": "seed-0000003"})
    snapshot = cooking.snapshot()
    with pytest.raises(UsageError, match="another task called 'seed-0000003'"):
        env.restore(snapshot)


def test_splits_have_games_of_their_own(env):
    splits = [set(env.tasks(split)) for split in env.splits]
    assert [len(tasks) for tasks in splits] == [10_000, 200, 200]
    assert len(set.union(*splits)) == 10_400
    assert env.tasks()[:2] == ("seed-0000000", "seed-0000001")
    assert env.tasks("valid")[0] == "seed-1000000"


def test_game_seed_gives_other_games_and_num_games_fewer():
    first = TextWorldEnv(num_games={"train": 3})
    other = TextWorldEnv(num_games={"train": 3}, game_seed=1)
    assert first.tasks() == other.tasks() == ("seed-0000000", "seed-0000001", "seed-0000002")
    task = {"options": {"task": "seed-0000001"}}
    assert first.reset(**task)[0] != other.reset(**task)[0]
    assert first.reset(**task)[0] == TextWorldEnv().reset(**task)[0]


def test_corpus_has_the_words_of_games_that_were_never_played(env):
    text = "\n".join(env.corpus(tasks=1)).lower()
    assert len(text) < 400_000
    observation = env.reset(options={"task": env.tasks("test")[5]})[0].lower()
    words = {word for word in observation.replace("-=", " ").split() if word.isalpha()}
    assert len([word for word in words if word in text]) / len(words) > 0.95


def test_close_twice_and_go_on(inform):
    inform.reset(options={"task": "seed-0000003"})
    inform.close()
    inform.close()
    assert inform.reset(options={"task": "seed-0000003"})[0].startswith(inform._report()["goal"])


def test_gymnasium_makes_it_with_options():
    env = gym.make("agentropy/TextWorld-v0", challenge="coin_collector", level=3, expert_info=True)
    _, info = env.reset(seed=0)
    assert info["expert"] in info["admissible"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"challenge": "cook"}, "did you mean 'cooking'"),
        ({"room": 3}, "no option 'room'; did you mean 'rooms'"),
        ({"rooms": 0}, "an integer from 1 to 50, got 0"),
        ({"rooms": True}, "an integer from 1 to 50, got True"),
        ({"adjectives": 1}, "one of False, True, got 1"),
        ({"level": 3}, "no option 'level'"),
        ({"challenge": "coin_collector", "level": 301}, "an integer from 1 to 300, got 301"),
        ({"challenge": "coin_collector", "level": 180}, "160 rooms.* at most 100: choose level 1 to 100, 101 to 150"),
        ({"challenge": "treasure_hunter", "level": 31}, "an integer from 1 to 30"),
        ({"challenge": "cooking", "go": 5}, "one of 1, 6, 9, 12, got 5"),
        ({"challenge": "cooking", "recipe": 2, "take": 3}, r"at most recipe \(2\), got 3"),
        ({"challenge": "simple", "goal": "some"}, "one of 'detailed', 'brief', 'none', got 'some'"),
        ({"split": "dev"}, "unknown TextWorld split 'dev'"),
        ({"engine": "nativ"}, "did you mean 'native'"),
        ({"reward": "spars"}, "did you mean 'sparse'"),
        ({"game_seed": 429}, "from 0 to 428"),
        ({"num_games": {"train": 0}}, "from 1 to 1000000, got 0"),
        ({"num_games": {"dev": 5}}, "unknown split 'dev'"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, message):
    with pytest.raises(UsageError, match=message):
        TextWorldEnv(**arguments)


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "agentropy\[textworld\]"'):
        TextWorldEnv()
