"""The native engine plays as TextWorld's own loop does on the compiled games, word for word."""

import random

import pytest

pytest.importorskip("textworld")

import textworld

from agentropy.envs.textworld.challenges import recipe
from agentropy.envs.textworld.compiling import compile_story
from agentropy.envs.textworld.env import TextWorldEnv
from agentropy.envs.textworld.expert import Expert
from agentropy.envs.textworld.native import NativeGame
from agentropy.envs.textworld.text import clean
from agentropy.envs.textworld.upstream import make_game, package

pytestmark = pytest.mark.filterwarnings("ignore:Game .* is not fully supported")
GAMES = {
    "custom": {},
    "custom-parallel": {"rooms": 3, "quests": 2, "quest_length": 3, "adjectives": True, "brief_objective": True},
    "coin_collector": {"level": 104},
    "treasure_hunter": {"level": 12},
    "cooking": {"recipe": 3, "take": 2, "go": 6, "open": True, "cook": True, "cut": True},
    "cooking-drop": {"recipe": 2, "go": 6, "open": True, "cook": True, "cut": True, "drop": True},
    "simple": {},
}
WALKS = 4
STEPS = 45


@pytest.fixture(scope="module", params=GAMES)
def env(request) -> TextWorldEnv:
    return TextWorldEnv(challenge=request.param.split("-")[0], **GAMES[request.param])


@pytest.fixture(scope="module")
def task(env) -> str:
    return env.tasks()[7]


@pytest.fixture(scope="module")
def native(env, task) -> NativeGame:
    return env._games.load("train", task, "native").game


@pytest.fixture(scope="module")
def upstream(env, task):
    """TextWorld's own loop on the compiled game."""
    names = ("admissible_commands", "score", "max_score", "won", "lost", "objective")
    with package():
        loop = textworld.start(str(env.file(task)), textworld.EnvInfos(**dict.fromkeys(names, True)))
    yield loop
    loop.close()


def test_random_walks_read_the_same(native, upstream):
    for walk in range(WALKS):
        rng = random.Random(walk)
        theirs, ours = upstream.reset(), native.root
        assert clean(theirs.feedback) == native.intro
        assert theirs.max_score == native.story.max_score
        for _ in range(STEPS):
            commands = list(native.admissible(ours))
            assert commands == theirs.admissible_commands
            command = rng.choice(commands)
            ours, text = native.step(ours, command)
            theirs, _, over = upstream.step(command)
            assert text == clean(theirs.feedback), command
            assert (ours.score, ours.won, ours.lost) == (theirs.score, theirs.won, theirs.lost)
            assert over == (ours.won or ours.lost)
            if over:
                break


def test_experts_episode_reads_the_same_and_wins(native, upstream):
    theirs, ours = upstream.reset(), native.root
    for command in native.story.walkthrough:
        ours, text = native.step(ours, command)
        theirs, _, _ = upstream.step(command)
        assert text == clean(theirs.feedback)
    assert ours.won and theirs.won
    assert ours.score == theirs.score == native.story.max_score
    assert "*** The End ***" in text


def test_expert_wins_from_wherever_a_random_walk_leads(native):
    expert, wins = Expert(native), 0
    for walk in range(6):
        rng, state = random.Random(walk), native.root
        for _ in range(rng.randrange(25)):
            after = native.step(state, rng.choice(list(native.admissible(state))))[0]
            state = state if after.lost or after.won else after
        planned = len(expert.plan(state) or ())
        for _ in range(planned):
            assert expert.action(state) == expert.action(state)
            state = native.step(state, expert.action(state))[0]
        wins += state.won
    assert wins >= 5  # food that the quest needs may have been eaten


def test_admissible_commands_are_those_of_textworlds_engine_of_the_rules(env, task):
    """The engine of ``.json`` files, which prints no text; it takes "prepare meal" for done with any ingredient."""
    path = env.file(task).with_suffix(".json")
    with package():
        loop = textworld.start(str(path), textworld.EnvInfos(admissible_commands=True, score=True, won=True))
        native = NativeGame(compile_story(textworld.Game.load(str(path))))
    for walk in range(WALKS):
        rng = random.Random(100 + walk)
        theirs, ours = loop.reset(), native.root
        for _ in range(STEPS):
            commands = list(native.admissible(ours))
            assert commands == theirs.admissible_commands
            command = rng.choice([name for name in commands if name != "prepare meal"])
            ours = native.step(ours, command)[0]
            theirs, score, over = loop.step(command)
            assert (ours.score, ours.won) == (score, theirs.won)
            if over or ours.lost:
                break


def test_burned_food_is_told_and_loses():
    story = compile_story(make_game(recipe("cooking", {"cook": True}), 5))
    game = NativeGame(story)
    food = story.things[story.ingredients[0][0]].name
    state, texts = game.root, []
    for command in story.walkthrough:
        state = (game.step(state, command) or (state, ""))[0]
        if command.startswith(f"cook {food} with"):
            again = game.step(state, command)
            assert again is not None
            texts.append(again[1])
            assert again[0].lost and not again[0].won
            assert list(game.admissible(again[0])) == []
    assert len(texts) == 1
    assert texts[0].startswith(f"You burned the {food}!\n\n*** You lost! ***\n\nYou scored ")
