"""The expert wins from the start and from wherever anyone has led the game."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

pytest.importorskip("textworld")
pytest.importorskip("fast_downward")

from agentropy.envs.alfworld.engine import GroundedGame, Node, ground
from agentropy.envs.alfworld.expert import Goal, oracle_action, parse_goal
from agentropy.envs.alfworld.games import TASK_TYPES, Game, open_index
from agentropy.envs.alfworld.generator import GeneratedGames


def advice(grounded: GroundedGame, node: Node) -> str | None:
    return oracle_action(grounded.game, grounded.facts(node), grounded.admissible(node), grounded.names)


def follow(grounded: GroundedGame, node: Node, commands: Sequence[str]) -> Node:
    for command in commands:
        move = grounded.step(node, command)
        assert move is not None, (command, grounded.admissible(node))
        node = move[0]
    return node


def finish(grounded: GroundedGame, node: Node) -> list[str]:
    """What the expert plays from ``node`` until the game is won; fails after 50 turns."""
    played: list[str] = []
    while not node.won:
        command = advice(grounded, node)
        assert command is not None and len(played) < 50, (grounded.game.id, played)
        played.append(command)
        node = follow(grounded, node, [command])
    return played


def wander(grounded: GroundedGame, steps: int, seed: int) -> Node:
    """Random admissible commands, which prefer to do things over moving; stops short of winning."""
    rng, node = random.Random(seed), grounded.root
    for _ in range(steps):
        commands = grounded.admissible(node)
        doing = [command for command in commands if command.split()[0] not in ("go", "look", "help", "inventory")]
        after = follow(grounded, node, [rng.choice(doing if doing and rng.random() < 0.5 else commands)])
        if not after.won:
            node = after
    return node


def small_games(kind: str, number: int) -> list[Game]:
    """The smallest of the first generated games of a type: they are translated fastest."""
    index = GeneratedGames(task_types=[kind])
    games = [index.load(split, task) for split in ("train", "valid_unseen") for task in index.tasks(split)[::9]]
    return sorted(games, key=lambda game: len(game.problem))[:number]


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_generated_games_are_won_as_their_walkthrough_says(kind):
    for game in small_games(kind, 3):
        grounded = ground(game)
        assert tuple(finish(grounded, grounded.root)) == game.walkthrough
        for seed in range(10):
            finish(grounded, wander(grounded, 25, seed))


def test_published_games_are_won(shared_data):
    index = open_index("pack", shared_data / "alfworld")
    games = [index.load("valid_seen", task) for task in index.tasks("valid_seen")]
    for kind in TASK_TYPES:
        for game in sorted((g for g in games if g.task_type == kind), key=lambda game: len(game.problem))[:2]:
            grounded = ground(game)
            assert len(finish(grounded, grounded.root)) <= len(game.walkthrough) + 3
            assert advice(grounded, follow(grounded, grounded.root, game.walkthrough)) is None
            finish(grounded, wander(grounded, 10, seed=3))


@pytest.mark.slow
def test_the_whole_panel_is_won(shared_data):
    """200 generated games, 140 of valid_seen and 300 of train, from the start and after ten random commands.

    A published game has dead ends (nothing holds a teddy bear once it was taken): these are not counted.
    """
    generated, pack = GeneratedGames(), open_index("pack", shared_data / "alfworld")
    panel = [generated.load("train", task) for task in generated.tasks("train")[::20]]
    panel += [generated.load("valid_unseen", task) for task in generated.tasks("valid_unseen")[::2]]
    panel += [pack.load("valid_seen", task) for task in pack.tasks("valid_seen")]
    panel += [pack.load("train", task) for task in pack.tasks("train")[::11][:300]]
    for seed, game in enumerate(panel):
        grounded = ground(game)
        assert len(finish(grounded, grounded.root)) <= 50
        node = wander(grounded, 10, seed)
        held = next((fact[2] for fact in grounded.facts(node) if fact[0] == "holds"), "")
        if not held.startswith(("teddybear", "papertowelroll")):
            finish(grounded, node)


@pytest.fixture(scope="module")
def heating() -> GroundedGame:
    """A game whose object does not start in a receptacle of the goal's type."""
    for game in small_games("pick_heat_then_place_in_recep", 20):
        receptacle = game.id.partition("/")[0].split("-")[3].lower()
        source = through(game.walkthrough, "take")[-1].partition(" from ")[2]
        if not source.startswith(receptacle) and "CounterTop_bar" in game.problem:
            return ground(game)
    raise AssertionError("no such game among the smallest 20")


def through(commands: Sequence[str], verb: str) -> list[str]:
    """The commands up to the first one that starts with ``verb``."""
    at = next(at for at, command in enumerate(commands) if command.startswith(verb))
    return list(commands[: at + 1])


def test_what_has_cooled_again_is_heated_again(heating):
    start = through(heating.game.walkthrough, "heat")
    wanted = start[-1].removeprefix("heat ").partition(" with ")[0]
    fridge = next(name for name in heating.names.values() if name.startswith("fridge "))
    node = follow(heating, heating.root, [*start, f"go to {fridge}", f"cool {wanted} with {fridge}"])
    assert finish(heating, node)[:2] == [f"go to {start[-1].partition(' with ')[2]}", start[-1]]


def test_a_heated_object_that_was_put_down_is_taken_again_and_not_reheated(heating):
    start = through(heating.game.walkthrough, "heat")
    wanted = start[-1].removeprefix("heat ").partition(" with ")[0]
    source = next(command for command in start if command.startswith("take")).partition(" from ")[2]
    back = [f"go to {source}", f"move {wanted} to {source}", "look"]
    played = finish(heating, follow(heating, heating.root, [*start, *back]))
    assert played[0] == f"take {wanted} from {source}" and not any(command.startswith("heat") for command in played)


def test_a_wrong_object_is_put_down_where_it_may_lie(heating):
    goal = parse_goal(heating.game.problem)
    for place in [name for name in heating.names.values() if name.startswith("countertop")]:
        node = follow(heating, heating.root, [f"go to {place}"])
        takes = [command for command in heating.admissible(node) if command.startswith("take")]
        for take in takes:
            wanted = take.removeprefix("take ").partition(" ")[0]
            if f"{wanted}type" != goal.object:
                played = finish(heating, follow(heating, node, [take]))
                assert played[0] == f"move {take.removeprefix('take ').partition(' from ')[0]} to {place}"
                return
    pytest.fail("no countertop with another object")


def test_two_objects_that_lie_apart_are_brought_together():
    """One in each of two receptacles of the goal's type is not enough."""
    for game in small_games("pick_two_obj_and_place", 40):
        receptacle = game.id.partition("/")[0].split("-")[3].lower()
        grounded = ground(game)
        targets = sorted(name for name in grounded.names.values() if name.rpartition(" ")[0] == receptacle)
        if len(targets) < 2:
            continue
        plan = list(game.walkthrough)
        moves = [at for at, command in enumerate(plan) if command.startswith("move")]
        first = plan[: moves[0] + 1]
        used = first[-1].rpartition(" to ")[2]
        other = next(name for name in targets if name != used)
        node = follow(grounded, grounded.root, [*first, *through(plan[moves[0] + 1 :], "take"), f"go to {other}"])
        thing = next(fact[2] for fact in grounded.facts(node) if fact[0] == "holds")
        if f"open {other}" in grounded.admissible(node):
            node = follow(grounded, node, [f"open {other}"])
        node = follow(grounded, node, [f"move {grounded.names[thing]} to {other}"])
        assert not node.won
        assert finish(grounded, node)
        return
    pytest.fail("no game with two receptacles of the goal's type")


def test_a_lamp_that_is_on_is_not_used_again():
    game = small_games("look_at_obj_in_light", 1)[0]
    grounded = ground(game)
    use = next(command for command in game.walkthrough if command.startswith("use"))
    at_lamp = [command for command in game.walkthrough if command.startswith("go to")][-1]
    node = follow(grounded, grounded.root, [at_lamp, use])
    played = finish(grounded, node)
    assert use not in played


def test_goals_are_read_from_the_problem():
    goals = {kind: parse_goal(small_games(kind, 1)[0].problem) for kind in TASK_TYPES}
    assert [goals[kind].state for kind in TASK_TYPES] == [None, None, "isclean", "iscool", "ishot", None]
    assert [goals[kind].count for kind in TASK_TYPES] == [1, 1, 1, 1, 1, 2]
    assert goals["look_at_obj_in_light"].lamp == "desklamptype"
    assert isinstance(goals["pick_two_obj_and_place"], Goal)


def test_where_nothing_can_be_done_the_expert_is_silent():
    game = small_games("pick_and_place_simple", 1)[0]
    receptacle = game.id.partition("/")[0].split("-")[3]
    grounded = ground(game)
    elsewhere = replace(game, problem=game.problem.replace(f"?r {receptacle}Type", "?r NoSuchType"))
    node = grounded.root
    assert oracle_action(elsewhere, grounded.facts(node), grounded.admissible(node), grounded.names) is None
