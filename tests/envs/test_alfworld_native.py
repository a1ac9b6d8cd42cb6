"""The native engine plays exactly as TextWorld's does, and leaves to it the games that it does not know."""

import dataclasses
import random

import gymnasium as gym
import pytest

pytest.importorskip("textworld")
pytest.importorskip("fast_downward")

from agentropy.benchmarks.alfworld_native import difference
from agentropy.envs.alfworld import env as env_module
from agentropy.envs.alfworld.engine import ground
from agentropy.envs.alfworld.env import ALFWorldEnv
from agentropy.envs.alfworld.expert import goal_of, parse_problem
from agentropy.envs.alfworld.games import TASK_TYPES, Game, open_index
from agentropy.envs.alfworld.native import NativeGame, _goal_text, _irregular, _tight, unsupported

ENV_ID = "agentropy/ALFWorld-v0"


def games(source: str, data=None, *, splits=("train", "valid_seen", "valid_unseen"), per_type: int = 1) -> list[Game]:
    """Games of every split and type, evenly spaced over the sorted ids."""
    index = open_index(source, data)
    found = []
    for split in splits:
        for kind in TASK_TYPES:
            tasks = [task for task in index.tasks(split) if task.startswith(kind)]
            found += [index.load(split, task) for task in tasks[:: max(1, len(tasks) // per_type)][:per_type]]
    return found


def test_generated_games_play_the_same_on_both_engines():
    for seed, game in enumerate(games("generated", per_type=2)):
        assert difference(game, random.Random(seed), steps=30) is None


def test_published_games_play_the_same_on_both_engines(shared_data):
    for seed, game in enumerate(games("pack", shared_data / "alfworld", splits=("train", "valid_seen"))):
        assert difference(game, random.Random(seed), steps=30) is None


@pytest.mark.slow
def test_many_games_play_the_same_on_both_engines(shared_data):
    chosen = games("generated", per_type=10) + games("pack", shared_data / "alfworld", splits=("train",), per_type=10)
    for seed, game in enumerate(chosen):
        assert difference(game, random.Random(seed), steps=40) is None


def test_a_difference_would_be_found(monkeypatch):
    """The comparison above can fail: an engine that forgets one effect, text or command is caught."""
    game = games("generated", splits=("train",))[2]
    monkeypatch.setattr(NativeGame, "_description", lambda self, state, name: "something else")
    found = [difference(game, random.Random(seed), steps=60) for seed in range(5)]
    assert any("examine" in text for text in found if text)


def test_environments_of_both_engines_return_the_same():
    one, two = (gym.make(ENV_ID, split="valid_seen", engine=engine) for engine in ("native", "textworld"))
    assert one.reset(seed=3) == two.reset(seed=3)
    for seed in range(30):
        action = random.Random(seed).choice([*one.unwrapped._info()["admissible"], "fly"])
        first, second = one.step(action), two.step(action)
        assert first == second
        if first[2] or first[3]:
            break
    one.reset(seed=4), two.reset(seed=4)
    assert list(_all_of(one)) == list(_all_of(two))


def _all_of(env: gym.Env):
    for action in env.unwrapped.expert():
        yield action, env.step(action)


def test_snapshots_pass_between_engines():
    one, two = (ALFWorldEnv(split="valid_seen", engine=engine) for engine in ("native", "textworld"))
    one.reset(seed=1)
    for action in [action for action, _ in zip(one.expert(), range(1), strict=False)]:
        one.step(action)
    two.reset(seed=2)
    assert two.restore(one.snapshot()) == (one._observation, one._info())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda game: {"domain": game.domain.replace("coolable ?o", "heatable ?o", 1)}, "domain"),
        (lambda game: {"grammar": game.grammar.replace("You arrive at", "You come to")}, "grammar"),
        (lambda game: {"problem": game.problem.replace("(and", "(or")}, "goal"),
    ],
)
def test_other_games_are_named(change, reason):
    game = games("generated", splits=("train",))[1]
    assert unsupported(game) is None
    why = unsupported(dataclasses.replace(game, **change(game)))
    assert why is not None and reason in why


def test_irregular_problems_are_named():
    problem = parse_problem(games("generated", splits=("train",))[1].problem)
    assert _irregular(problem) is None
    place = next(fact for fact in problem.facts if fact[0] == "receptacleatlocation")
    for extra, reason in (
        ((*place[:2], "elsewhere"), "more than one place"),
        (("atlocation", "agent1", "elsewhere"), "not in one place"),
        (("isclean", "mug"), "already begun"),
    ):
        changed = dataclasses.replace(problem, facts=problem.facts | {extra})
        assert reason in (_irregular(changed) or "")


def test_goals_are_written_as_the_games_write_them(shared_data):
    for game in games("generated") + games("pack", shared_data / "alfworld", splits=("train", "valid_seen")):
        assert _goal_text(goal_of(game)) == _tight(game.problem[game.problem.index("(:goal") :])


def test_a_game_of_another_grammar_is_played_by_textworld_with_a_warning(monkeypatch):
    env = ALFWorldEnv(split="valid_seen")
    task = env.tasks()[0]
    game = env._index.load("valid_seen", task)
    other = dataclasses.replace(game, grammar=game.grammar.replace("You arrive at", "You come to"))
    monkeypatch.setattr(env._index, "load", lambda split, task: other)
    with pytest.warns(UserWarning, match="TextWorld's engine: its grammar is not the published one"):
        _, info = env.reset(options={"task": task})
    action = next(command for command in info["admissible"] if command.startswith("go to"))
    assert env.step(action)[0].startswith("You come to")
    assert env.snapshot().identity == other.digest
    assert env._playable is ground(other)


def test_the_native_engine_needs_no_planner(monkeypatch, shared_data):
    real = env_module.importlib.util.find_spec
    monkeypatch.setattr(
        env_module.importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("fast_downward", "textworld") else real(name, *rest),
    )
    assert "Your task is to" in ALFWorldEnv().reset(seed=0)[0]
    assert ALFWorldEnv("valid_seen", source="pack", data=shared_data / "alfworld").reset(seed=0)[1]["goal"]
