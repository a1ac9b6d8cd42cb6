"""Generated games are stable, varied, well-formed, worded as the published ones, and solvable."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.alfworld.expert import parse_problem
from agentropy.envs.alfworld.games import SPLITS, TASK_TYPES, open_index
from agentropy.envs.alfworld.generator import GeneratedGames
from agentropy.envs.alfworld.layouts import HELD_OUT, KINDS, room, rules
from agentropy.envs.alfworld.placement import Stream
from agentropy.envs.alfworld.problem import SENTENCES
from agentropy.envs.alfworld.published import TASK_MIX
from agentropy.errors import UsageError

GAMES = GeneratedGames()


def parts(task: str) -> tuple[str, str, str, int]:
    kind, wanted, _, receptacle, number = task.partition("/")[0].split("-")
    return kind, wanted, receptacle, int(number)


def any_game(draw_split: str, number: int, seed: int):
    """The game of a number, whatever its id: a source of that size lists it."""
    index = GeneratedGames(seed=seed, num_games={draw_split: number + 1})
    task = next(task for task in index.tasks(draw_split) if task.endswith(f"_{number:05d}"))
    return index.load(draw_split, task)


games = st.builds(any_game, st.sampled_from(SPLITS), st.integers(0, 60), st.integers(0, 2**40))


def test_splits_have_the_promised_sizes_and_sorted_unique_ids():
    for split, size in (("train", 10_000), ("valid_seen", 200), ("valid_unseen", 200)):
        tasks = GAMES.tasks(split)
        assert len(set(tasks)) == len(tasks) == size
        assert list(tasks) == sorted(tasks)


def test_unseen_rooms_are_never_seen():
    rooms = {split: {parts(task)[3] for task in GAMES.tasks(split)} for split in SPLITS}
    assert rooms["valid_unseen"] == HELD_OUT >= {10, 219, 308, 424}
    assert rooms["valid_seen"] <= rooms["train"]
    assert not rooms["train"] & HELD_OUT


def test_rooms_of_every_kind_are_varied():
    used = Counter(parts(task)[3] for task in GAMES.tasks("train"))
    for numbers in KINDS.values():
        assert len(used.keys() & set(numbers)) >= 25


def test_every_split_has_every_task_type_and_train_the_published_mix():
    for split in SPLITS:
        assert {parts(task)[0] for task in GAMES.tasks(split)} == set(TASK_TYPES)
    counts = Counter(parts(task)[0] for task in GAMES.tasks("train"))
    published = {kind: sum(mix.values()) for kind, mix in TASK_MIX.items()}
    for kind in TASK_TYPES:
        # Four standard deviations of a binomial of 10,000 games.
        share = published[kind] / sum(published.values())
        assert abs(counts[kind] / 10_000 - share) < 4 * (share * (1 - share) / 10_000) ** 0.5


def test_published_counts_are_those_of_the_pack(shared_data):
    index = open_index("pack", shared_data / "alfworld")
    counts = Counter(parts(task)[0] for task in index.tasks("train"))
    assert counts == {kind: sum(mix.values()) for kind, mix in TASK_MIX.items()}
    assert not HELD_OUT & {parts(task)[3] for task in index.tasks("train")}


@given(games)
def test_games_are_well_formed(game):
    kind, wanted, receptacle, number = parts(game.id)
    problem = parse_problem(game.problem)
    facts: dict[str, list[list[str]]] = {}
    for predicate, *arguments in problem.facts:
        facts.setdefault(predicate, []).append(arguments)
    assert kind in TASK_TYPES and (number in HELD_OUT) == (game.split == "valid_unseen")
    assert len(set(problem.objects)) == len(problem.objects)
    assert {argument for fact in problem.facts for argument in fact[1:]} <= set(problem.objects)
    objects, receptacles = dict(facts["objecttype"]), dict(facts["receptacletype"])
    inside, at = dict(facts["inreceptacle"]), dict(facts["receptacleatlocation"])
    assert inside.keys() == objects.keys() and set(inside.values()) <= receptacles.keys() == at.keys()
    assert ("atlocation", "agent1") in {fact[:2] for fact in problem.facts}
    (start,) = (where for _, where in facts["atlocation"])
    assert start not in at.values()
    # Whatever can be taken can be put back, so there is no dead end.
    held = {(receptacles[inside[name]], objects[name]) for (name,) in facts["pickupable"]}
    assert held <= {tuple(pair) for pair in facts["cancontain"]}
    targets = [name for name, type in objects.items() if type == f"{wanted}type".lower()]
    assert len(targets) >= (2 if kind == "pick_two_obj_and_place" else 1)
    if kind in ("pick_and_place_simple", "pick_two_obj_and_place"):
        assert f"{receptacle}type".lower() not in {receptacles[inside[name]] for name in targets}
    if kind == "look_at_obj_in_light":
        assert f"{receptacle}type".lower() in objects.values()
    else:
        assert [f"{receptacle}type".lower(), f"{wanted}type".lower()] in facts["cancontain"]
    assert 3 <= len(game.walkthrough) <= 12
    assert game.task in {form.format(obj=wanted.lower(), recep=receptacle.lower()) for form in SENTENCES[kind]}
    assert f'Your task is to: {game.task}"' in game.grammar


@given(st.sampled_from(SPLITS), st.integers(0, 199))
def test_a_game_does_not_depend_on_what_was_made_before(split, at):
    task = GAMES.tasks(split)[at]
    assert GeneratedGames().load(split, task) == GAMES.load(split, task)


def test_games_are_the_same_in_every_process():
    """The digest also pins the games across versions: a change of it changes everyone's tasks."""
    code = (
        "from agentropy.envs.alfworld.generator import GeneratedGames; import hashlib\n"
        "g = GeneratedGames(num_games={'train': 2000})\n"
        "ids = [(s, t) for s in g.splits for t in g.tasks(s)]\n"
        "games = [(x.id, x.task, x.problem, x.walkthrough) for x in (g.load(*i) for i in ids[::50])]\n"
        "print(hashlib.sha256(repr([ids, games]).encode()).hexdigest()[:16])"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {"3b09e3d3aec89422"}


def test_more_games_extend_the_default_ones():
    more = GeneratedGames(num_games={"train": 11_000})
    assert set(GAMES.tasks("train")) < set(more.tasks("train"))
    far = GeneratedGames(num_games={"train": 10**7})
    for task in GAMES.tasks("train")[:3]:
        assert far.load("train", task) == GAMES.load("train", task)


def test_another_seed_gives_other_games():
    other = GeneratedGames(seed=1)
    assert len(set(GAMES.tasks("train")) & set(other.tasks("train"))) < 100


def test_task_types_filter_the_same_games():
    only = GeneratedGames(task_types=["pick_heat_then_place_in_recep"]).tasks("train")
    assert only == tuple(task for task in GAMES.tasks("train") if task.startswith("pick_heat"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GAMES.tasks("valid_sen"), "did you mean 'valid_seen'"),
        (lambda: GAMES.load("train", "pick_up_the_pieces"), "unknown task"),
        (lambda: GAMES.load("valid_seen", GAMES.tasks("train")[0]), "unknown task"),
        (lambda: GAMES.load("train", GAMES.tasks("train")[0].replace("DeskLamp", "Desk")), "did you mean"),
        (lambda: GeneratedGames(num_games={"train": 1}).load("train", GAMES.tasks("train")[5]), "unknown task"),
        (lambda: GeneratedGames(task_types=["pick_heat"]), "unknown ALFWorld task type"),
        (lambda: GeneratedGames(num_games={"test": 3}), "unknown ALFWorld split"),
        (lambda: GeneratedGames(seed=-1), "negative"),
    ],
)
def test_bad_requests_are_explained(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_goals_sentences_and_rules_are_the_published_ones(shared_data):
    """Per task type: the goal's PDDL up to white space, all wordings, and who can hold or become what."""
    index = open_index("pack", shared_data / "alfworld")
    forms: dict[str, set[str]] = {kind: set() for kind in TASK_TYPES}
    goals: dict[str, set[str]] = {kind: set() for kind in TASK_TYPES}
    for at, task in enumerate(index.tasks("train")[::5]):
        game = index.load("train", task)
        kind, wanted, receptacle, _ = parts(task)
        wordings = [(form, form.format(obj=wanted.lower(), recep=receptacle.lower())) for form in SENTENCES[kind]]
        assert game.task in [sentence for _, sentence in wordings]
        forms[kind] |= {form for form, sentence in wordings if sentence == game.task}
        goals[kind].add(goal_form(game.problem, wanted, receptacle))
        if at % 25 == 0:
            assert_same_rules(game.problem)
    for task in GAMES.tasks("train")[::20]:
        kind, wanted, receptacle, _ = parts(task)
        assert {goal_form(GAMES.load("train", task).problem, wanted, receptacle)} == goals[kind]
    assert forms == {kind: set(all) for kind, all in SENTENCES.items()}


def goal_form(problem: str, wanted: str, receptacle: str) -> str:
    goal = squeezed(problem[problem.index("(:goal") :]).replace(f"{receptacle}Type", "RECEP")
    return goal.replace(f"{wanted}Type", "OBJ").rstrip(")")


def assert_same_rules(problem: str) -> None:
    facts: dict[str, set[tuple[str, ...]]] = {}
    for predicate, *arguments in parse_problem(problem).facts:
        facts.setdefault(predicate, set()).add(tuple(arguments))
    places = {kind for _, kind in facts["receptacletype"]}
    kinds = dict(facts["objecttype"])
    holds = {(f"{place}type".lower(), f"{kind}type".lower()) for place, all in rules().holds.items() for kind in all}
    present = set(kinds.values())
    assert facts["cancontain"] == {(place, kind) for place, kind in holds if place in places and kind in present}
    for name, types in rules().properties.items():
        having = {f"{kind}type".lower() for kind in types}
        assert {object for (object,) in facts.get(name.lower(), ())} == {
            o for o, kind in kinds.items() if kind in having
        }


def test_rooms_have_the_published_receptacles(shared_data):
    index = open_index("pack", shared_data / "alfworld")
    seen: set[int] = set()
    for task in index.tasks("train"):
        number = parts(task)[3]
        if number in seen:
            continue
        seen.add(number)
        published = parse_problem(index.load("train", task).problem).facts
        ours = room(number).receptacles
        assert Counter(f"{r.type}type".lower() for r in ours) == Counter(
            f[2] for f in published if f[0] == "receptacletype"
        )
        openable = {f[1] for f in published if f[0] == "openable"}
        assert {r.name.lower() for r in ours if r.openable} == openable
    assert len(seen) == 108


def test_the_stream_is_pinned_to_pcg64():
    """Raw PCG64 words of SeedSequence((1, 2))"""
    stream = Stream(1, 2)
    assert [stream.below(1000) for _ in range(8)] == [448, 430, 419, 277, 821, 49, 92, 874]


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=4), st.integers(1, 50))
def test_draws_stay_in_range_and_weights_of_zero_are_never_drawn(key, n):
    stream = Stream(*key)
    assert all(0 <= stream.below(n) < n for _ in range(20))
    assert {stream.weighted({"a": n, "b": 0, "c": 1}) for _ in range(20)} <= {"a", "c"}
