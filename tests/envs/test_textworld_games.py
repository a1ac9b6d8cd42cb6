"""Where TextWorld's games come from: the generator, its cache, and the user's own files."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("textworld")

from agentropy.envs.textworld import games as games_module
from agentropy.envs.textworld import upstream
from agentropy.envs.textworld.challenges import Recipe, recipe
from agentropy.envs.textworld.compiling import digest
from agentropy.envs.textworld.env import TextWorldEnv
from agentropy.envs.textworld.storing import folder, load_story, save_story
from agentropy.errors import EnvironmentFailedError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:Game .* is not fully supported")
SCRIPT = """
import sys
from agentropy.envs.textworld.challenges import recipe
from agentropy.envs.textworld.compiling import digest
from agentropy.envs.textworld.upstream import make_game
for name, options in (("custom", {}), ("cooking", {"recipe": 2, "cut": True})):
    print(digest(make_game(recipe(name, options), 3)))
"""


def subprocess_digests(hash_seed: int, directory: Path) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_games_depend_on_recipe_and_seed_alone(tmp_path):
    (tmp_path / "textworld_data" / "logic").mkdir(parents=True)  # TextWorld would read its rules from here
    (tmp_path / "textworld_data" / "text_grammars").mkdir()
    first = subprocess_digests(0, Path.cwd())
    assert len(set(first.split())) == 2
    assert subprocess_digests(1, Path.cwd()) == first
    assert subprocess_digests(2, tmp_path) == first


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coin_collector", {"level": 4}),
        ("cooking", {"recipe": 2, "take": 2, "go": 6, "open": True, "cook": True, "cut": True}),
    ],
)
def test_walkthroughs_found_without_compiling_are_those_of_the_compiled_game(monkeypatch, name, options):
    quick = digest(upstream.make_game(recipe(name, options), 3))
    monkeypatch.setattr(upstream, "_quicker", contextlib.nullcontext)
    assert digest(upstream.make_game(recipe(name, options), 3)) == quick


def test_generation_leaves_global_randomness_alone():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    env = TextWorldEnv(rooms=2, quest_length=2, objects=3)
    observation = env.reset(options={"task": "seed-0000004"})[0]
    assert (random.random(), np.random.random()) == expected
    np.random.seed(77)
    upstream_game = upstream.make_game(recipe("simple", {}), 1)
    np.random.seed(78)
    assert digest(upstream.make_game(recipe("simple", {}), 1)) == digest(upstream_game)
    assert observation == TextWorldEnv(rooms=2, quest_length=2, objects=3).reset(options={"task": "seed-0000004"})[0]


def test_a_game_is_made_once_and_read_from_the_cache_after_that(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path))
    monkeypatch.setattr(games_module, "_recent", games_module._Recent())
    options = {"options": {"task": "seed-0000002"}}
    arguments = {"rooms": 2, "quest_length": 3}
    first = TextWorldEnv(**arguments).reset(**options)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["2.story"]
    monkeypatch.setattr(games_module, "_recent", games_module._Recent())
    monkeypatch.setattr(games_module, "make_game", lambda *_: pytest.fail("made again"))
    assert TextWorldEnv(**arguments).reset(**options) == first


@pytest.mark.parametrize("damage", [b"", b"no story", None])
def test_a_damaged_cache_is_made_anew(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path))
    options = {"options": {"task": "seed-0000002"}}
    arguments = {"rooms": 2, "quest_length": 3}
    first = TextWorldEnv(**arguments).reset(**options)
    (path,) = (path for path in tmp_path.rglob("*.story")) if list(tmp_path.rglob("*.story")) else (None,)
    path = path or folder(recipe("custom", arguments)) / "2.story"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.read_bytes()[:-9] if damage is None and path.is_file() else damage or b"")
    assert load_story(path) is None
    monkeypatch.setattr(games_module, "_recent", games_module._Recent())
    assert TextWorldEnv(**arguments).reset(**options) == first
    assert load_story(path) is not None


def test_stories_are_stored_whole(tmp_path):
    story = games_module._compiled(upstream.make_game(recipe("cooking", {"cook": True, "drop": True}), 2))
    save_story(tmp_path / "game.story", story)
    assert load_story(tmp_path / "game.story") == story
    assert [path.name for path in tmp_path.iterdir()] == ["game.story"]


def test_a_recipe_that_no_game_fits_fails_with_its_options(monkeypatch):
    monkeypatch.setattr(upstream, "ATTEMPTS", 2)
    impossible = recipe("custom", {"rooms": 1, "objects": 1, "quest_length": 2, "quest_breadth": 4})
    with pytest.raises(EnvironmentFailedError, match=r"no custom game with .*'quest_breadth': 4.* in 2 attempts"):
        upstream.make_game(impossible, 0)


def test_cooking_uses_the_foods_of_its_split():
    env = TextWorldEnv(challenge="cooking", recipe=3)
    mixed = TextWorldEnv(challenge="cooking", recipe=3, foods="all")
    task = {"options": {"task": "seed-1000001"}}
    assert env.reset(**task)[0] != mixed.reset(**task)[0]
    assert Recipe("cooking", (("recipe", 1),), "train").key != Recipe("cooking", (("recipe", 1),), "valid").key


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder with one of TextWorld's games, compiled, and another as ``.json`` alone."""
    path = tmp_path_factory.mktemp("own")
    env = TextWorldEnv(rooms=2, quest_length=2)
    for number, name in enumerate(("first", "second")):
        compiled = env.file(env.tasks()[number])
        shutil.copy(compiled.with_suffix(".json"), path / f"{name}.json")
        if name == "first":
            shutil.copy(compiled, path / f"{name}.z8")
    (path / "notes.json").write_text('{"not": "a game"}')
    return path


def test_own_files_are_named_after_them_and_play(own):
    for given in (own, str(own), [own / "first.json", own / "second.json"], [own]):
        env = TextWorldEnv(games=given)
        assert env.splits == ("train",)
        assert env.tasks() == ("first", "second")
    env.reset(options={"task": "second"})
    assert [env.step(action)[4]["won"] for action in env.expert()][-1]


def test_own_files_may_be_given_for_each_split(own, tmp_path):
    env = TextWorldEnv(games={"train": own / "first.json", "test": [own / "second.json"]})
    assert env.splits == ("train", "test")
    assert (env.tasks(), env.tasks("test")) == (("first",), ("second",))
    for split, name in (("train", "first"), ("valid", "second")):
        (tmp_path / split).mkdir()
        shutil.copy(own / f"{name}.json", tmp_path / split)
    env = TextWorldEnv("valid", games=tmp_path)
    assert (env.splits, env.tasks()) == (("train", "valid"), ("second",))


def test_a_compiled_game_alone_plays_without_commands_listed(own, tmp_path):
    shutil.copy(own / "first.z8", tmp_path / "alone.z8")
    env = TextWorldEnv(games=tmp_path / "alone.z8")
    full = TextWorldEnv(games=own / "first.json")
    observation, info = env.reset(seed=0)
    assert observation == full.reset(seed=0)[0]
    assert "admissible" not in info
    for action in full.expert():
        expected = full.step(action)
        played = env.step(action)
        assert played[0] == expected[0]
    assert played[1:4] == (1.0, True, False) and played[4]["won"]
    env.close()


def test_a_game_with_rules_of_its_own_is_played_by_the_interpreter(own, tmp_path):
    data = json.loads((own / "second.json").read_text())
    for name, info in data["infos"]:
        if name.startswith("r_"):
            info["desc"] += "[if unvisited] It is new.[end if]"
    (tmp_path / "new.json").write_text(json.dumps(data))
    env = TextWorldEnv(games=tmp_path / "new.json")
    first, info = env.reset(seed=0)
    assert "It is new." in first and info["admissible"]
    assert "It is new." not in env.step("look")[0]
    assert [env.step(action)[4]["won"] for action in env.expert()][-1]
    env.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("game.ulx", b"Glul", "Glulx.*no longer plays since version 1.7; compile it as .z8"),
        ("game.txt", b"hello", "no game file: TextWorld plays .json"),
        ("game.json", b"{}", "no game that TextWorld saved"),
        ("game.json", b"{", "no game that TextWorld saved"),
        ("game.z8", b"zzz", "no game for the Z-machine: it does not start as one"),
        ("game.z5", b"\x05" + bytes(25) + b"\x40\x00" + bytes(100), "it has 128 of 65536 bytes"),
        ("game.z5", b"\x05" + bytes(25) + b"\x00\x20" + b"\x12\x34" + bytes(98), "its checksum is wrong"),
    ],
)
def test_files_that_cannot_be_played_say_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        TextWorldEnv(games=tmp_path / name).reset()


def test_games_that_are_not_there_say_so(own, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    for given, message in (
        (tmp_path / "no.z8", "no game at"),
        (empty, "has no game: TextWorld plays .json and .z8 files"),
        ([], "names no file"),
        ({}, "names no split"),
        (3, "must be a path"),
        ({"dev": own}, "unknown split 'dev'"),
        ([own / "first.json", _copy(own / "second.json", tmp_path / "other" / "first.json")], "two games are called"),
    ):
        with pytest.raises(UsageError, match=message):
            TextWorldEnv(games=given)
    for arguments, message in (({"rooms": 2}, "takes no rooms"), ({"challenge": "simple"}, "takes no challenge")):
        with pytest.raises(UsageError, match=message):
            TextWorldEnv(games=own, **arguments)
    with pytest.raises(UsageError, match="unknown TextWorld split 'test'"):
        TextWorldEnv("test", games=own)


def _copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    shutil.copy(source, target)
    return target
