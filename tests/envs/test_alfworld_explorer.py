"""The explorer wins, and nothing that the episode has not shown changes what it does."""

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

pytest.importorskip("textworld")
pytest.importorskip("fast_downward")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.alfworld.engine import GroundedGame, Node, ground
from agentropy.envs.alfworld.env import ALFWorldEnv
from agentropy.envs.alfworld.expert import Fact, parse_problem
from agentropy.envs.alfworld.explorer import explorer_action, reveals
from agentropy.envs.alfworld.games import TASK_TYPES, Game, open_index
from agentropy.envs.alfworld.generator import GeneratedGames
from agentropy.errors import UsageError


class Episode:
    """A game, where it stands, and what has been revealed in it."""

    def __init__(self, game: Game) -> None:
        self.grounded: GroundedGame = ground(game)
        self.node: Node = self.grounded.root
        self.text = self.grounded.intro
        self.seen: set[str] = set()
        self.played: list[str] = []
        self.pddl = {shown: name for name, shown in self.grounded.names.items()}

    @property
    def facts(self) -> frozenset[Fact]:
        return self.grounded.facts(self.node)

    @property
    def admissible(self) -> tuple[str, ...]:
        return self.grounded.admissible(self.node)

    @property
    def unseen(self) -> list[str]:
        """Receptacles whose content nobody has looked at."""
        return sorted(fact[1] for fact in self.facts if fact[0] == "receptacleatlocation" and fact[1] not in self.seen)

    def advice(self, facts: frozenset[Fact] | None = None) -> str | None:
        facts = self.facts if facts is None else facts
        return explorer_action(self.grounded.game, facts, self.seen, self.admissible, self.grounded.names)

    def play(self, *commands: str) -> "Episode":
        for command in commands:
            move = self.grounded.step(self.node, command)
            assert move is not None, (command, self.admissible)
            self.node, self.text = move
            self.played.append(command)
            if (shown := reveals(command, self.facts, self.grounded.names)) is not None:
                self.seen.add(shown)
        return self


def games(number: int, **options) -> list[Game]:
    """The smallest of the first generated games, which are translated fastest, in turn over their types."""
    chosen = []
    for kind in TASK_TYPES:
        index = GeneratedGames(task_types=[kind], **options)
        found = [index.load("train", task) for task in index.tasks("train")[::9]]
        chosen.append(sorted(found, key=lambda game: len(game.problem)))
    return list(itertools.islice(itertools.chain.from_iterable(zip(*chosen, strict=False)), number))


def won(env: ALFWorldEnv, task: str) -> bool:
    info = env.reset(options={"task": task})[1]
    for action in env.expert():
        assert action in info["admissible"]
        info = env.step(action)[4]
    return info["won"]


def test_generated_games_are_won():
    env = ALFWorldEnv("train", expert="explorer")
    assert sum(won(env, game.id) for game in games(20)) >= 19


@pytest.mark.slow
@pytest.mark.parametrize(("source", "split", "step"), [("generated", "train", 20), ("generated", "valid_unseen", 2)])
def test_the_whole_panel_is_won(source, split, step):
    env = ALFWorldEnv(split, source, expert="explorer")
    results = [won(env, task) for task in env.tasks()[::step]]
    assert len(results) == 100 and sum(results) >= 99


@pytest.mark.slow
def test_published_games_are_won(shared_data):
    env = ALFWorldEnv("valid_seen", "pack", shared_data / "alfworld", expert="explorer")
    results = [won(env, task) for task in env.tasks()]
    assert sum(results) >= 0.95 * len(results)


def elsewhere(game: Game) -> tuple[Game, set[str]]:
    """Return the game with one object of its goal's type in another receptacle, and the two receptacles."""
    problem = parse_problem(game.problem)
    kinds = {fact[1]: fact[2] for fact in problem.facts if fact[0] == "objecttype"}
    places = {fact[1]: fact[2] for fact in problem.facts if fact[0] == "receptacleatlocation"}
    thing, old = next(
        fact[1:]
        for fact in sorted(problem.facts)
        if fact[0] == "inreceptacle" and kinds[fact[1]] == problem.goal.object
    )
    new = max(name for name in places if places[name] != places[old])
    text = game.problem.lower()
    for before, after in (
        (f"(inreceptacle {thing} {old})", f"(inreceptacle {thing} {new})"),
        (f"(objectatlocation {thing} {places[old]})", f"(objectatlocation {thing} {places[new]})"),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    return replace(game, problem=text), {old, new}


@pytest.mark.parametrize("game", games(6), ids=lambda game: game.task_type)
def test_games_that_differ_in_a_hidden_place_are_played_alike_until_it_is_seen(game):
    moved, places = elsewhere(game)
    first, second = Episode(game), Episode(moved)
    while not first.node.won and not places & first.seen:
        action = first.advice()
        assert action is not None and action == second.advice()
        first.play(action), second.play(action)
        assert first.seen == second.seen
    assert first.played
    assert (first.text == second.text) == (not places & first.seen)


@pytest.fixture(scope="module")
def wanderings() -> list[Callable[[int, int], Episode]]:
    """Of a game of each type: the episode after some commands, half of them random and half the explorer's."""

    def wander(game: Game, turns: int, seed: int) -> Episode:
        episode, rng = Episode(game), np.random.default_rng(seed)
        for _ in range(turns):
            advice = episode.advice()
            if episode.node.won or advice is None:
                break
            episode.play(advice if rng.random() < 0.5 else str(rng.choice(episode.admissible)))
        return episode

    return [lambda turns, seed, game=game: wander(game, turns, seed) for game in games(6)]


@given(data=st.data(), turns=st.integers(0, 12), seed=st.integers(0, 9))
def test_what_unseen_receptacles_hold_changes_nothing(wanderings, data, turns, seed):
    episode = data.draw(st.sampled_from(wanderings))(turns, seed)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="rearrangement"))
    hidden = [
        fact
        for fact in episode.facts
        if fact[0] == "inreceptacle" and fact[1] not in episode.seen and fact[2] not in episode.seen
    ]
    rearranged = {
        ("inreceptacle", thing, str(rng.choice(episode.unseen))) for _, thing, _ in hidden if rng.random() < 0.8
    }
    assert episode.advice((episode.facts - set(hidden)) | rearranged) == episode.advice()


@given(data=st.data(), turns=st.integers(0, 12), seed=st.integers(0, 9))
def test_which_distant_unseen_receptacles_open_changes_nothing(wanderings, data, turns, seed):
    episode = data.draw(st.sampled_from(wanderings))(turns, seed)
    here = next(fact[2] for fact in episode.facts if fact[0] == "atlocation")
    places = {fact[1]: fact[2] for fact in episode.facts if fact[0] == "receptacleatlocation"}
    distant = [name for name in episode.unseen if places[name] != here]
    opening = data.draw(st.sets(st.sampled_from(distant)) if distant else st.just(set()))
    kept = {fact for fact in episode.facts if fact[0] != "openable" or fact[1] not in distant}
    assert episode.advice(frozenset(kept | {("openable", name) for name in opening})) == episode.advice()


def rooms_with(wanted: Callable[[Episode], Iterator[tuple[str, str]]]) -> tuple[Episode, str, str]:
    """The first small game with a pair that ``wanted`` yields, and that pair's display names."""
    for game in games(60):
        episode = Episode(game)
        for pair in wanted(episode):
            first, second = (episode.grounded.names[name] for name in pair)
            return episode, first, second
    raise AssertionError("no such game")


def receptacles(episode: Episode) -> tuple[dict[str, str], set[str]]:
    """Locations of the receptacles, and those that open."""
    places = {fact[1]: fact[2] for fact in episode.facts if fact[0] == "receptacleatlocation"}
    return places, {fact[1] for fact in episode.facts if fact[0] == "openable"}


def closed_and_plain(episode: Episode) -> Iterator[tuple[str, str]]:
    places, openable = receptacles(episode)
    yield from itertools.product(sorted(openable), sorted(places.keys() - openable))


def plain_neighbours(episode: Episode) -> Iterator[tuple[str, str]]:
    places, openable = receptacles(episode)
    for pair in itertools.permutations(sorted(places.keys() - openable), 2):
        if places[pair[0]] == places[pair[1]]:
            yield pair


def test_content_is_revealed_when_the_text_tells_it():
    episode, closed, plain = rooms_with(closed_and_plain)
    for command, shown in [
        ("look", None),
        (f"go to {closed}", None),
        (f"examine {closed}", None),
        (f"open {closed}", closed),
        (f"close {closed}", None),
        (f"go to {plain}", plain),
        (f"examine {plain}", plain),
        (f"go to {closed}", None),
        ("inventory", None),
    ]:
        name = reveals(command, episode.play(command).facts, episode.grounded.names)
        assert name == (None if shown is None else episode.pddl[shown]), command
        assert shown is None or "you see" in episode.text


def test_what_was_seen_in_a_closed_receptacle_is_remembered():
    episode, closed, plain = rooms_with(closed_and_plain)
    episode.play(f"go to {closed}", f"open {closed}", f"close {closed}", f"go to {plain}")
    assert episode.seen == {episode.pddl[closed], episode.pddl[plain]}


def things_of_neighbours(episode: Episode) -> Iterator[tuple[str, str]]:
    """Objects that can be moved to a receptacle at the same place."""
    kinds = {fact[1]: fact[2] for fact in episode.facts if fact[0] in ("objecttype", "receptacletype")}
    for first, second in plain_neighbours(episode):
        for predicate, thing, *place in sorted(episode.facts):
            fits = ("cancontain", kinds[second], kinds.get(thing)) in episode.facts
            if predicate == "inreceptacle" and place == [first] and fits and ("pickupable", thing) in episode.facts:
                yield thing, second


def test_an_object_is_known_where_it_was_put_and_nothing_else_is():
    """The neighbour that it is put into has not been looked at."""
    episode, thing, neighbour = rooms_with(things_of_neighbours)
    source = next(fact[2] for fact in episode.facts if fact[:2] == ("inreceptacle", episode.pddl[thing]))
    shown = episode.grounded.names[source]
    episode.play(f"go to {shown}", f"take {thing} from {shown}", f"examine {thing}")
    assert episode.seen == {source}
    episode.play(f"move {thing} to {neighbour}")
    assert episode.seen == {source, episode.pddl[thing]}


def test_what_was_put_where_nobody_looked_is_taken_from_there_again():
    """Of all things, only the one that the agent put down is left in the facts."""
    for game in games(300):
        goal = parse_problem(game.problem).goal
        if goal.state is None:  # putting it down may win
            continue
        episode = Episode(game)
        things = {fact[1] for fact in episode.facts if fact[0] == "objecttype" and fact[2] == goal.object}
        blind = [pair for pair in things_of_neighbours(episode) if pair[0] in things]
        if not blind:
            continue
        thing, neighbour = (episode.grounded.names[name] for name in blind[0])
        source = next(fact[2] for fact in episode.facts if fact[:2] == ("inreceptacle", blind[0][0]))
        shown = episode.grounded.names[source]
        episode.play(f"go to {shown}", f"take {thing} from {shown}", f"move {thing} to {neighbour}")
        left = {fact for fact in episode.facts if fact[0] != "inreceptacle" or fact[1] == blind[0][0]}
        assert episode.advice(frozenset(left)) == f"take {thing} from {neighbour}"
        return
    raise AssertionError("no such game")


def test_receptacles_that_share_a_place_are_examined():
    """From the place that two share, the second is looked into without going anywhere."""
    episode, first, second = rooms_with(plain_neighbours)
    episode.play(f"go to {first}")
    places, _ = receptacles(episode)
    episode.seen |= {name for name in places if name not in (episode.pddl[first], episode.pddl[second])}
    everywhere = frozenset(fact for fact in episode.facts if fact[0] != "inreceptacle")
    assert episode.advice(everywhere) == f"examine {second}"
    episode.play(f"examine {second}")
    assert episode.advice(everywhere) is None


def test_a_restored_episode_knows_what_it_had_seen():
    env = ALFWorldEnv("train", expert="explorer", expert_info=True)
    for number, game in enumerate(games(6)):
        rng = np.random.default_rng(number)
        info = env.reset(options={"task": game.id})[1]
        for _ in range(8):
            if info["won"]:
                break
            action = info["expert"] if rng.random() < 0.6 else str(rng.choice(info["admissible"]))
            info = env.step(action)[4]
        snapshot = env.snapshot()
        rest = [(action, env.step(action)) for action in env.expert()]
        other = ALFWorldEnv("valid_seen", expert="explorer", expert_info=True)
        other.reset(seed=number)
        assert other.restore(pickle.loads(pickle.dumps(snapshot)))[1] == info
        assert [(action, other.step(action)) for action in other.expert()] == rest


def test_a_new_episode_has_seen_nothing():
    env = ALFWorldEnv("train", expert="explorer")
    task = games(1)[0].id
    assert won(env, task)
    first = env.snapshot().state.commands
    assert won(env, task)
    assert env.snapshot().state.commands == first


def test_an_unknown_expert_is_named():
    with pytest.raises(UsageError, match="unknown ALFWorld expert 'explore'; did you mean 'explorer'"):
        ALFWorldEnv(expert="explore")


def test_published_games_start_with_nothing_that_only_the_agent_could_know(shared_data):
    """The explorer takes these facts for the agent's own doing."""
    indexes = [(open_index("pack", shared_data / "alfworld"), "valid_seen"), (open_index("generated"), "train")]
    for index, split in indexes:
        for task in index.tasks(split)[::10]:
            problem = parse_problem(index.load(split, task).problem)
            wanted = {fact[1] for fact in problem.facts if fact[0] == "objecttype" and fact[2] == problem.goal.object}
            assert not {fact[0] for fact in problem.facts} & {"opened", "istoggled", "holds"}
            assert not wanted & {fact[1] for fact in problem.facts if fact[0] == problem.goal.state}
