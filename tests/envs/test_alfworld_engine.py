"""The fast engine plays exactly as stock TextWorld does, and episodes that share a game do not disturb each other."""

import dataclasses
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("textworld")
pytest.importorskip("fast_downward")

import textworld
from alfworld.agents.utils.misc import Demangler
from textworld.envs.pddl.pddl import PddlEnv

from agentropy.envs.alfworld import engine as engine_module
from agentropy.envs.alfworld.engine import GroundedGame, Node, ground
from agentropy.envs.alfworld.games import TASK_TYPES, Game, open_index
from agentropy.envs.alfworld.grammar import _expression
from agentropy.envs.alfworld.planner import PlannerPool
from agentropy.envs.alfworld.translation import _cache_path, _translate, translate
from agentropy.errors import EnvironmentFailedError, UsageError


class Stock(PddlEnv):
    """TextWorld's own engine with ALFWorld's display names, as ``alfworld`` wraps it."""

    def __init__(self, game: Game) -> None:
        super().__init__(textworld.EnvInfos(won=True, admissible_commands=True))
        self.load(
            {
                "pddl_domain": game.domain,
                "grammar": game.grammar,
                "pddl_problem": game.problem,
                "walkthrough": list(game.walkthrough),
            }
        )
        names = Demangler(game_infos=self._entity_infos)
        for info in self._entity_infos.values():
            info.name = names.demangle_alfred_name(info.id)


def pack_games(shared_data: Path, per_type: int) -> list[Game]:
    """The smallest published games of each type: stock TextWorld takes seconds for each."""
    index = open_index("pack", shared_data / "alfworld")
    games = sorted(
        (index.load("valid_seen", task) for task in index.tasks("valid_seen")),
        key=lambda game: len(game.problem),
    )
    return [game for kind in TASK_TYPES for game in [g for g in games if g.task_type == kind][:per_type]]


def generated_games(count: int) -> list[Game]:
    index = open_index("generated")
    tasks = index.tasks("valid_unseen")
    return [index.load("valid_unseen", task) for task in tasks[:: len(tasks) // count][:count]]


def assert_plays_as_stock(game: Game, steps: int, seed: int) -> None:
    """Play the walkthrough, then a random walk that prefers to do things over moving, in both engines."""
    stock, fast = Stock(game), ground(game)
    state, node = stock.reset(), fast.root
    assert state.feedback == fast.intro
    assert tuple(state["admissible_commands"]) == fast.admissible(node)
    rng = random.Random(seed)
    for turn in range(len(game.walkthrough) + steps):
        admissible = fast.admissible(node)
        doing = [command for command in admissible if not command.startswith("go to")]
        if turn < len(game.walkthrough):
            command = game.walkthrough[turn]
        elif rng.random() < 0.1:
            command = "open the pod bay doors"
        else:
            command = rng.choice(doing if rng.random() < 0.7 else admissible)
        state, _, _ = stock.step(command)
        node, feedback = fast.step(node, command) or (node, "Nothing happens.")
        assert feedback == state.feedback, command
        assert fast.admissible(node) == tuple(state["admissible_commands"]), command
        assert node.won == state["won"]
        assert node.won or turn + 1 != len(game.walkthrough)
        facts = {(name, *row) for (name, _), table in node.facts.tables.items() for row in table.rows}
        stock_facts = {(fact.name, *fact.names) for fact in state["_facts"]}
        assert facts == {fact for fact in stock_facts if not fact[0].startswith("new-axiom")}, command


def test_published_games_play_as_in_stock_textworld(shared_data):
    for seed, game in enumerate(pack_games(shared_data, 1)[::3]):
        assert_plays_as_stock(game, steps=25, seed=seed)


def test_generated_games_play_as_in_stock_textworld():
    for seed, game in enumerate(generated_games(2)):
        assert_plays_as_stock(game, steps=40, seed=seed)


@pytest.mark.slow
def test_many_games_play_as_in_stock_textworld(shared_data):
    for seed, game in enumerate([*pack_games(shared_data, 3), *generated_games(20)]):
        assert_plays_as_stock(game, steps=80, seed=seed)


@pytest.fixture(scope="module")
def game() -> Game:
    return generated_games(1)[0]


@pytest.fixture(scope="module")
def other_game() -> Game:
    return generated_games(2)[1]


def walk(fast: GroundedGame, node: Node, rng: random.Random, steps: int) -> list[tuple]:
    seen: list[tuple] = []
    for _ in range(steps):
        node, feedback = fast.step(node, rng.choice(fast.admissible(node)))
        seen.append((feedback, fast.admissible(node), node.won, fast.facts(node)))
    return seen


def test_episodes_of_one_game_interleave_without_interference(game):
    alone = [walk(one := GroundedGame(game), one.root, random.Random(seed), 30) for seed in range(3)]
    shared = GroundedGame(game)
    nodes, rngs = [shared.root] * 3, [random.Random(seed) for seed in range(3)]
    for turn in range(30):
        for at in range(3):
            nodes[at], feedback = shared.step(nodes[at], rngs[at].choice(shared.admissible(nodes[at])))
            now = (feedback, shared.admissible(nodes[at]), nodes[at].won, shared.facts(nodes[at]))
            assert now == alone[at][turn]


def test_games_that_take_turns_with_one_planner_play_as_with_their_own(game, other_game, monkeypatch):
    expected = {
        game: walk(one := GroundedGame(game), one.root, random.Random(1), 25),
        other_game: walk(two := GroundedGame(other_game), two.root, random.Random(2), 25),
    }
    pool = PlannerPool(1)
    monkeypatch.setattr(engine_module, "_PLANNERS", pool)
    fast = {item: GroundedGame(item) for item in expected}
    nodes = {item: fast[item].root for item in expected}
    rngs = {game: random.Random(1), other_game: random.Random(2)}
    for turn in range(25):
        for item, one in fast.items():
            nodes[item], feedback = one.step(nodes[item], rngs[item].choice(one.admissible(nodes[item])))
            now = (feedback, one.admissible(nodes[item]), nodes[item].won, one.facts(nodes[item]))
            assert now == expected[item][turn]
    assert len(pool) == 1


def test_a_planner_is_used_again_when_its_game_is_gone(game, monkeypatch):
    pool = PlannerPool(4)
    monkeypatch.setattr(engine_module, "_PLANNERS", pool)
    for _ in range(3):
        fast = GroundedGame(game)
        fast.admissible(fast.root)
        del fast
    assert len(pool) == 1


def test_threads_that_load_and_play_at_once_do_not_interfere(monkeypatch):
    monkeypatch.setenv("AGENTROPY_CACHE", "off")
    monkeypatch.setattr(engine_module, "_PLANNERS", PlannerPool(2))
    games = generated_games(4)

    def play(game: Game) -> list[tuple]:
        one = GroundedGame(game)
        return walk(one, one.root, random.Random(game.id), 15)

    alone = [play(game) for game in games]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(play, games)) == alone


def test_states_that_coincide_share_one_node(game):
    fast = GroundedGame(game)
    place, other = [command for command in fast.admissible(fast.root) if command.startswith("go to")][:2]
    there, _ = fast.step(fast.root, place)
    elsewhere, _ = fast.step(there, other)
    again, _ = fast.step(elsewhere, place)
    back, _ = fast.step(again, other)
    assert back is elsewhere


def test_translation_leaves_the_interpreter_as_it_was(game):
    argv, stdout = sys.argv, sys.stdout
    _translate(game)
    assert sys.argv is argv and sys.stdout is stdout


def test_cached_translation_equals_a_new_one_and_damage_is_ignored(game, tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path))
    first = translate(game)
    path = _cache_path(game)
    assert path is not None and tmp_path in path.parents
    assert translate(game) == first == _translate(game)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    for damage in (b"", b"not zlib", path.read_bytes()[:-20]):
        path.write_bytes(damage)
        assert translate(game) == first


def test_cache_can_be_switched_off(game, monkeypatch):
    monkeypatch.setenv("AGENTROPY_CACHE", "off")
    assert _cache_path(game) is None
    assert translate(game).operators


def test_unwritable_cache_only_costs_time(game, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("AGENTROPY_CACHE", str(blocked))
    assert translate(game).operators
    assert os.listdir(tmp_path) == ["file"]


def test_a_problem_that_does_not_translate_names_the_game(game):
    broken = dataclasses.replace(game, problem="(define (problem x)")
    with pytest.raises(EnvironmentFailedError, match="cannot be translated"):
        _translate(broken)


@pytest.mark.parametrize("text", ["__import__('os')", "o.__class__", "o.name * 3", "o.name.upper()", "o.", "[o]"])
def test_grammar_expressions_never_run_code(text):
    with pytest.raises(UsageError, match="expression"):
        _expression(text)
