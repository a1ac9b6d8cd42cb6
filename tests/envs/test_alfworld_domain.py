"""The domain, grammar and names are those of the published games, and need no package of ALFWorld's."""

import subprocess
import sys

import pytest

from agentropy.envs.alfworld import domain, upstream
from agentropy.envs.alfworld.expert import parse_problem
from agentropy.envs.alfworld.games import open_index


def test_the_domain_is_the_published_one(shared_data):
    assert domain.domain_pddl() == (shared_data / "alfworld" / "domain.pddl").read_text()


def test_the_grammar_is_the_published_one_with_the_task_filled_in(shared_data):
    template = (shared_data / "alfworld" / "grammar.twl2").read_text()
    task = "put a hot potato in fridge."
    assert domain.grammar(task) == template.replace("UNKNOWN GOAL", task)


def test_any_sink_cleans():
    assert "\n                (receptacleType ?r SinkType)" in domain.domain_pddl()
    assert (
        ";(receptacleType ?r SinkType)\n                (receptacleType ?r SinkBasinType)" not in domain.domain_pddl()
    )


def test_nothing_of_alfworld_or_textworld_is_imported():
    code = (
        "import sys; from agentropy.envs.alfworld.generator import GeneratedGames; g = GeneratedGames();"
        "g.load('train', g.tasks('train')[0]);"
        "print([m for m in sys.modules if m.split('.')[0] in ('alfworld', 'textworld', 'fast_downward', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_ships_is_what_alfworlds_package_holds():
    pytest.importorskip("alfworld")
    assert upstream.upstream() == upstream.read_package()
    assert "MIT License" in upstream.upstream().licence


def test_a_generated_game_is_played_without_alfworlds_packages():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('alfworld', 'textworld', 'fast_downward')));"
        "import gymnasium, agentropy.envs; env = gymnasium.make('agentropy/ALFWorld-v0').unwrapped;"
        "env.reset(seed=0); print([env.step(action) for action in env.expert()][-1][2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


class Variable:
    """What ALFWorld's own class reads of a TextWorld entity."""

    def __init__(self, id: str) -> None:
        self.id = id


def test_names_are_those_that_alfworld_gives(shared_data):
    pytest.importorskip("alfworld")
    from alfworld.agents.utils.misc import Demangler

    index = open_index("pack", shared_data / "alfworld")
    tasks = [("train", task) for task in index.tasks("train")[::40]]
    tasks += [("valid_seen", task) for task in index.tasks("valid_seen")[::4]]
    for split, task in tasks:
        ids = parse_problem(index.load(split, task).problem).objects
        theirs = Demangler(game_infos={name: Variable(name) for name in ids})
        expected = {name: theirs.demangle_alfred_name(name).strip() for name in ids}
        assert domain.display_names(ids) == expected


def test_names_do_not_depend_on_the_order_or_case_of_ids():
    ids = ["Sink_bar__plus_01_bar_SinkBasin", "Sink_bar__plus_01", "Mug_bar__plus_02", "Mug_bar__minus_02", "agent1"]
    names = domain.display_names(ids)
    assert names == domain.display_names([name.lower() for name in reversed(ids)])
    assert sorted(names.values()) == ["agent1", "mug 1", "mug 2", "sink 1", "sinkbasin 1"]
