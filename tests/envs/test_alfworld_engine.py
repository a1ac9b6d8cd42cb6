"""The fast engine plays exactly as stock TextWorld does, and episodes that share a game do not disturb each other."""

import dataclasses
import os
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("textworld")
pytest.importorskip("fast_downward")

import textworld
from agentropy.envs.alfworld import engine as engine_module
from agentropy.envs.alfworld.engine import GroundedGame, Node, ground
from agentropy.envs.alfworld.games import TASK_TYPES, Game, open_index
from agentropy.envs.alfworld.grammar import _expression
from agentropy.envs.alfworld.planner import PlannerPool
from agentropy.envs.alfworld.translation import _cache_path, _translate, translate
from agentropy.errors import EnvironmentFailedError, UsageError
from alfworld.agents.utils.misc import Demangler
from textworld.envs.pddl.pddl import PddlEnv


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


def pack_games(shared_data: Path) -> list[Game]:
    index = open_index("pack", shared_data / "alfworld")
    tasks = index.tasks("valid_seen")
    chosen = [next(task for task in tasks if task.startswith(kind)) for kind in TASK_TYPES[::2]]
    return [index.load("valid_seen", task) for task in chosen]


def generated_games(count: int) -> list[Game]:
    index = open_index("generated")
    tasks = index.tasks("valid_unseen")
    return [index.load("valid_unseen", task) for task in tasks[:: len(tasks) // count][:count]]


def mixed_commands(game: Game, steps: int, seed: int):
    """Yield the walkthrough, then None for a reset, then a random walk that prefers to do things over moving."""
    rng = random.Random(seed)
    yield from (lambda admissible, command=command: command for command in game.walkthrough)
    yield None
    for _ in range(steps):

        def choose(admissible):
            doing = [command for command in admissible if not command.startswith("go to")]
            if rng.random() < 0.1:
                return "open the pod bay doors"
            return rng.choice(doing if doing and rng.random() < 0.7 else admissible)

        yield choose


def assert_plays_as_stock(game: Game, steps: int, seed: int) -> None:
    stock, fast = Stock(game), ground(game)
    state, node = stock.reset(), fast.root
    assert state.feedback == fast.intro
    assert tuple(state["admissible_commands"]) == fast.admissible(node)
    for choose in mixed_commands(game, steps, seed):
        if choose is None:
            assert node.won
            state, node = stock.reset(), fast.root
            continue
        command = choose(fast.admissible(node))
        state, _, _ = stock.step(command)
        move = fast.step(node, command)
        node, feedback = move or (node, "Nothing happens.")
        assert feedback == state.feedback, command
        assert fast.admissible(node) == tuple(state["admissible_commands"]), command
        assert node.won == state["won"]
        facts = {(name, *row) for (name, _), table in node.facts.tables.items() for row in table.rows}
        stock_facts = {(fact.name, *fact.names) for fact in state["_facts"]}
        assert facts == {fact for fact in stock_facts if not fact[0].startswith("new-axiom")}, command


def test_published_games_play_as_in_stock_textworld(shared_data):
    for seed, game in enumerate(pack_games(shared_data)):
        assert_plays_as_stock(game, steps=25, seed=seed)


def test_generated_games_play_as_in_stock_textworld():
    for seed, game in enumerate(generated_games(2)):
        assert_plays_as_stock(game, steps=40, seed=seed)


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


@pytest.mark.parametrize(
    "text", ["__import__('os')", "o.__class__", "o.name * 3", "o.name.upper()", "o.", "[o]"]
)
def test_grammar_expressions_never_run_code(text):
    with pytest.raises(UsageError, match="expression"):
        _expression(text)
