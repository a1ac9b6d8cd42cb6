"""The 800 tasks of BFCL play as the benchmark has them, the same everywhere, and from any point again."""

import decimal
import json
import os
import pickle
import random
import subprocess
import sys

import pytest

from agentropy.envs.bfcl import source
from agentropy.envs.bfcl.calls import Call, write
from agentropy.errors import UsageError

mpmath = pytest.importorskip("mpmath")
if source.locate() is None:
    pytest.skip("needs the files of bfcl-eval: `agentropy data bfcl`", allow_module_level=True)

from agentropy.envs.bfcl.env import CANNOT, DONE, MOST_CALLS, MOST_STEPS, BFCLEnv  # noqa: E402
from agentropy.envs.bfcl.tasks import load  # noqa: E402


def call(name: str, /, **arguments: object) -> str:
    return write([Call(name, arguments)])


def start(task: str, **options: object) -> BFCLEnv:
    env = BFCLEnv(**options)
    env.reset(options={"task": task})
    return env


def finish(env: BFCLEnv) -> tuple[float, dict]:
    """Let the expert play to the end; return the sum of rewards and the last info."""
    total, info = 0.0, {}
    for action in env.expert():
        _, reward, _, truncated, info = env.step(action)
        total += reward
        assert not truncated
    return total, info


def test_expert_wins_all_800_tasks():
    env = BFCLEnv(reward="dense")
    played = [task for split in env.splits for task in env.tasks(split)]
    assert len(played) == len(set(played)) == 800
    for task in played:
        env.reset(options={"task": task})
        total, info = finish(env)
        assert info["won"] and info["score"] == 1.0, task
        assert total == pytest.approx(1.0)


def test_no_scenario_is_in_both_splits():
    env = BFCLEnv()
    numbers = {split: {task.partition("/")[2] for task in env.tasks(split)} for split in env.splits}
    assert {split: len(env.tasks(split)) for split in env.splits} == {"train": 600, "test": 200}
    assert not numbers["train"] & numbers["test"]
    categories = [task.partition("/")[0] for task in env.tasks("test")]
    assert {name: categories.count(name) for name in set(categories)} == dict.fromkeys(source.CATEGORIES, 50)


def test_categories_are_kept_to():
    env = BFCLEnv(categories=["miss_func", "base"])
    assert {task.partition("/")[0] for task in env.tasks()} == {"base", "miss_func"}
    assert BFCLEnv(categories="base").tasks("test")[0] == "base/003"
    with pytest.raises(UsageError, match="did you mean 'miss_func'"):
        BFCLEnv(categories=["mis_func"])


@pytest.mark.parametrize("option", ["documents", "form", "reward", "malformed"])
def test_unknown_options_are_refused(option):
    with pytest.raises(UsageError, match="unknown"):
        BFCLEnv(**{option: "nonsense"})


@pytest.mark.parametrize("form", ["hermes", "json", "python"])
def test_expert_wins_in_every_form(form):
    env = BFCLEnv("test", form=form)
    for task in env.tasks()[::10]:
        env.reset(options={"task": task})
        assert finish(env)[1]["won"], task


def test_final_reward_is_paid_once_at_the_end():
    env = start("base/000")
    rewards = [env.step(action)[1] for action in env.expert()]
    assert rewards[-1] == 1.0 and not any(rewards[:-1])


def test_a_turn_without_calls_fails_and_only_that_turn():
    env = start("base/045", reward="dense")
    _, reward, _, _, info = env.step("I would rather not.")
    assert reward == 0.0 and info["failure"] == "turn 0: no function was called"
    assert info["goal"].startswith("Make a copy")
    total, info = finish(env)
    assert (total, info["score"], info["won"]) == (0.5, 0.5, False)


def test_a_wrong_state_fails_the_turn():
    env = start("base/045", reward="dense")
    env.step(call("find", path="ResearchDocs", name="draft"))
    env.step(call("mkdir", dir_name="mine"))
    info = env.step(DONE)[-1]
    assert info["failure"] == "turn 0: the state of GorillaFileSystem is another one"


def test_a_result_that_was_not_seen_fails_the_turn():
    env = start("base/045")
    env.step(call("ls"))
    assert env.step(DONE)[-1]["failure"] == "turn 0: a result that is needed was not seen"


def test_a_failed_episode_may_end_at_once():
    env = start("base/045", stop_on_failure=True)
    _, reward, over, _, info = env.step("No.")
    assert over and reward == 0.0 and not info["won"]


def test_expert_goes_on_after_looking_around_and_gives_up_after_harm():
    env = start("base/045")
    env.step(call("pwd"))
    env.step(call("find", path="ResearchDocs", name="draft"))
    env.step(call("ls", a=True))
    assert next(env.expert()) == DONE
    assert finish(env)[1]["won"]

    env = start("base/045")
    env.step(call("rm", file_name="ResearchDocs"))
    assert env._expert_action() is None
    assert list(env.expert()) == []


def test_the_21st_message_with_calls_ends_the_episode():
    env = start("base/045")
    for _ in range(MOST_STEPS):
        assert not env.step(call("pwd"))[2]
    observation, reward, over, truncated, info = env.step(call("pwd"))
    assert over and not truncated and reward == 0.0 and not info["won"]
    assert "More than 20 messages" in observation
    assert info["failure"] == "turn 0: more than 20 messages with calls"


def test_turns_limit_truncates():
    env = start("base/045", max_turns=2)
    env.step(call("pwd"))
    _, _, over, truncated, info = env.step(call("pwd"))
    assert truncated and not over and not info["won"]


def test_withheld_functions_are_offered_in_their_turn():
    env = start("miss_func/000")

    def offered() -> set[str]:
        return {tool["function"]["name"] for tool in env.tools()}

    assert "sort" not in offered() and '"name": "sort"' not in env.instructions
    seen = []
    for action in env.expert():
        observation, *_, info = env.step(action)
        seen.append((action, info["user_turn"], observation))
        assert ("sort" in offered()) == (info["user_turn"] >= 3)
    assert [turn for action, turn, _ in seen if action == CANNOT] == [3]
    (brought,) = (text for action, _, text in seen if action == CANNOT)
    assert '"name": "sort"' in brought and brought.endswith("What about now?")


def test_calls_where_none_fits_fail_only_when_that_is_asked_for():
    for irrelevance in (False, True):
        env = start("miss_func/003", irrelevance=irrelevance)
        env.step(call("pwd"))
        info = env.step(DONE)[-1]
        assert info["failure"] == ("turn 0: a function was called where none fits" if irrelevance else None)
        assert finish(env)[1]["won"] != irrelevance


def test_malformed_calls_end_the_turn_as_in_the_benchmark_or_are_answered():
    env = start("base/045")
    info = env.step("<tool_call>{</tool_call>")[-1]
    assert info["user_turn"] == 1 and info["invalid"]
    env = start("base/045", malformed="error")
    observation, *_, info = env.step("<tool_call>{</tool_call>")
    assert info["user_turn"] == 0 and info["invalid"] and observation.startswith("Error: not valid JSON")
    assert env.step(DONE)[-1]["failure"] == "turn 0: no function was called"


def test_invalid_means_that_a_call_could_not_be_made():
    env = start("base/045")
    observation, *_, info = env.step(call("launch_rocket"))
    assert info["invalid"] and observation == "Error during execution: name 'launch_rocket' is not defined"
    observation, *_, info = env.step(call("cd", place="x"))
    assert info["invalid"] and "unexpected keyword argument 'place'" in observation
    observation, *_, info = env.step(call("cd", folder="nowhere"))
    assert not info["invalid"] and "No such file or directory" in observation
    assert not env.step("Done.")[-1]["invalid"]


def test_nothing_private_and_nothing_of_python_can_be_called():
    env = start("base/045")
    for name in ("_load_scenario", "__init__", "__class__", "print", "eval", "GorillaFileSystem.cd", "ls.__call__"):
        observation = env.step(f"{name}('x')")[0]
        assert observation == f"Error during execution: name {name!r} is not defined"


@pytest.mark.parametrize("documents", ["instructions", "observation", "names", "none"])
def test_documents_are_where_they_are_asked_for(documents):
    env = BFCLEnv(documents=documents)
    observation, info = env.reset(options={"task": "base/045"})
    schema, signature = '"name": "standard_deviation", "description"', "standard_deviation(numbers)"
    assert (schema in info["instructions"]) == (documents == "instructions")
    assert (schema in observation) == (documents == "observation")
    assert (signature in observation) == (documents == "names")
    assert observation.endswith(info["goal"])
    assert {tool["function"]["name"] for tool in env.tools()} >= {"standard_deviation", "ls"}
    assert "<tool_call>" in info["instructions"]


def test_no_first_observation_is_cut():
    env = BFCLEnv(documents="observation")
    for split in env.splits:
        for task in env.tasks(split):
            observation, info = env.reset(options={"task": task})
            assert observation.endswith(info["goal"])


def test_schemas_have_the_types_of_json_schema():
    env = start("base/045")
    env.reset(options={"task": "base/045"})
    text = json.dumps(env.tools())
    assert '"type": "dict"' not in text and '"type": "float"' not in text and '"type": "object"' in text


def test_going_back_equals_never_having_left():
    env, other, generator = BFCLEnv(expert_info=True), BFCLEnv("test", expert_info=True), random.Random(3)
    for task in generator.sample(env.tasks(), 25):
        env.reset(options={"task": task})
        points, seen, plan = [env.snapshot()], [], []
        for action in env.expert():
            seen.append(env.step(action))
            points.append(env.snapshot())
            plan.append(action)
        at = generator.randrange(len(plan))
        there = pickle.loads(pickle.dumps(points[at]))
        observation, info = other.restore(there)
        assert info["expert"] == plan[at] and (at == 0 or (observation, info) == (seen[at - 1][0], seen[at - 1][-1]))
        other.step(call("no_such_function"))
        other.step(DONE)
        other.restore(there)
        assert [other.step(action) for action in plan[at:]] == seen[at:]


def test_a_snapshot_is_made_of_pythons_own_types():
    env = start("long_context/000")
    env.step(call("cd", folder="document"))
    state = env.snapshot().state[1]
    assert b"GorillaFileSystem" in state and b"agentropy" not in state and b"bfcl_eval" not in state


def test_one_episode_leaves_no_trace_in_another():
    # In upstream a mention is added to the default value of a parameter, and stays for the life of the process.
    for _ in range(2):
        env = start("base/147")
        tweet = json.loads(env.step(call("post_tweet", content="x"))[0])
        assert tweet["mentions"] == [] and tweet["tags"] == []
        env.step(call("mention", tweet_id=tweet["id"], mentioned_usernames=["@y"]))
        assert json.loads(env.step(call("get_tweet", tweet_id=tweet["id"]))[0])["mentions"] == ["@y"]
        env.reset(options={"task": "base/147"})
        assert finish(env)[1]["won"]


def test_global_state_is_neither_read_nor_written():
    env = BFCLEnv()
    tasks = [task for task in env.tasks() if task.startswith(("base", "long"))][::9]
    random.seed(1)
    before = random.getstate(), decimal.getcontext().prec, mpmath.mp.prec

    def play() -> list:
        seen: list = []
        for task in tasks:
            env.reset(options={"task": task})
            seen += [env.step(action) for action in env.expert()]
        env.reset(options={"task": "base/045"})
        seen.append(env.step("[logarithm(value=8, base=2, precision=40), square_root(number=2, precision=40)]"))
        return seen

    first = play()
    assert (random.getstate(), decimal.getcontext().prec, mpmath.mp.prec) == before
    assert "1.414213562373095048801688724209698078570" in first[-1][0]
    random.seed(2)
    decimal.getcontext().prec, mpmath.mp.prec = 5, 20
    try:
        assert play() == first
    finally:
        decimal.getcontext().prec, mpmath.mp.prec = before[1:]


PROGRAM = """
import hashlib
from agentropy.envs.bfcl.env import BFCLEnv
env, seen = BFCLEnv(), []
for task in env.tasks()[::40]:
    env.reset(options={"task": task})
    seen += [env.step(action) for action in env.expert()]
for seed in range(3):
    seen.append(env.reset(seed=seed))
env.reset(options={"task": "base/133"})
seen.append(env.step("[fund_account(amount=5.0), get_transaction_history()]"))
seen.append(env.step("[ticket_login('x', 'y'), create_ticket('z'), edit_ticket(1, {'d': 1, 'a': 2, 'c': 3, 'b': 4})]"))
print(hashlib.sha256(repr(seen).encode()).hexdigest())
"""


def test_same_episodes_in_any_process_time_zone_and_hash_seed():
    def digest(zone: str, hash_seed: str) -> str:
        env = {**os.environ, "TZ": zone, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert digest("Asia/Tokyo", "1") == digest("America/New_York", "2")


def test_clock_time_zone_and_hash_order_are_not_looked_at():
    env = start("base/133")
    # Upstream's own, where the time zone is UTC.
    history = json.loads(env.step("[fund_account(amount=5.0), get_transaction_history()]")[0].splitlines()[1])
    assert history["transaction_history"] == [{"type": "deposit", "amount": 5.0, "timestamp": "2024-09-02 05:40:15"}]
    env.step("[ticket_login('x', 'y'), create_ticket('z')]")
    answer = env.step("edit_ticket(1, {'d': 1, 'a': 2, 'c': 3, 'b': 4})")[0]
    assert json.loads(answer) == {"error": "Invalid fields for update: d, a, c, b"}
    env = start("base/150")
    name = json.loads(load(source.source(), "base/150").config)["TravelAPI"]
    person = {"first_name": name["user_first_name"], "last_name": name["user_last_name"], "passport_number": "US1"}
    for birth, adult in (("2008-03-23", True), ("2008-03-24", False)):  # 18 years before the package's version
        result = json.loads(env.step(call("verify_traveler_information", date_of_birth=birth, **person))[0])
        assert result["verification_status"] == adult


HOSTILE = {
    "power": "power(base=10, exponent=1000000000)",
    "tower": "power(base=-7, exponent=99999999999999999999)",
    "precision": "logarithm(value=2, base=3, precision=1000000000)",
    "precision as a text": "logarithm(value=2, base=3, precision=' 1_000_000_000')",
    "pair": "logarithm(value=(1, 1000000000000), base=3, precision=5)",
    "text": "logarithm(value='1e99999999999', base=3, precision=5)",
    "root": "square_root(number=2, precision=999999999)",
    "round": "round_number(number=5, decimal_places=-9999999999)",
    "infinite": '{"name": "add", "arguments": {"a": 1e999, "b": 1}}',
    "not a number": '{"name": "add", "arguments": {"a": NaN, "b": 1}}',
}


@pytest.mark.parametrize("action", HOSTILE.values(), ids=HOSTILE)
def test_calls_that_would_never_end_are_answered(action):
    env = start("base/045")
    observation, *_, info = env.step(action)
    assert observation.startswith("Error during execution: ") and info["invalid"]
    assert finish(env)[1]["won"]


def test_folders_in_folders_stop_nothing():
    env = start("base/045")
    doubling = ["mkdir('a0')"]
    for level in range(40):  # each folder twice in the next: 2 ** 40 paths
        a, b, c = f"a{level}", f"b{level}", f"a{level + 1}"
        doubling += [f"cp('{a}', '{b}')", f"mkdir('{c}')", f"mv('{a}', '{c}')", f"mv('{b}', '{c}')"]
    env.step(f"[{', '.join(doubling)}]")
    for action in ("find()", "du()"):
        assert env.step(action)[0] == "Error during execution: too many files and folders"
    env.step("[cp('a40', 'a40'), cp('a40', 'a40')]")  # and now into itself
    deep = "[" + ", ".join(["mkdir('d'), cd('d')"] * (MOST_CALLS // 2)) + "]"
    for _ in range(8):
        env.step(deep)
    point = pickle.loads(pickle.dumps(env.snapshot()))
    after = [env.step(action) for action in ("ls()", "cd('..')", "pwd()", DONE)]
    env.restore(point)
    assert [env.step(action) for action in ("ls()", "cd('..')", "pwd()", DONE)] == after
    assert after[-1][-1]["failure"].endswith("the state of GorillaFileSystem is another one")


def test_one_message_holds_a_limited_number_of_calls():
    env = start("base/045")
    observation = env.step(f"[{', '.join(['pwd()'] * (MOST_CALLS + 9))}]")[0]
    lines = observation.splitlines()
    assert len(lines) == MOST_CALLS + 1 and lines[-1] == "Error: only the first 256 of 265 calls were made"


@pytest.mark.parametrize(
    "action", ["", "\ud800", "é" * 100_000, "[" * 100_000, "<tool_call>" * 9_000, "ls(a='\ud800')"]
)
def test_any_text_is_an_action(action):
    env = start("base/045")
    observation, *_ = env.step(action)
    assert env.observation_space.contains(observation)
    observation.encode()


def test_random_calls_never_raise():
    generator, env = random.Random(11), BFCLEnv("test", malformed="error")
    values = [
        "",
        "..",
        "x",
        "AAPL",
        0,
        -1,
        2.5,
        10**30,
        True,
        None,
        [],
        ["a"],
        [[1]],
        {},
        {"status": "x"},
        "2024-01-01",
    ]
    for task in env.tasks()[::4]:
        env.reset(options={"task": task})
        functions = [tool["function"] for tool in env.tools()]
        for _ in range(18):
            function = generator.choice(functions)
            arguments = {name: generator.choice(values) for name in function["parameters"]["properties"]}
            observation = env.step(call(function["name"], **arguments))[0]
            assert env.observation_space.contains(observation)
        env.restore(pickle.loads(pickle.dumps(env.snapshot())))
        assert not env.step(DONE)[2] or env._ended


def test_corpus_has_requests_calls_and_results():
    texts = BFCLEnv(documents="names").corpus(tasks=10)
    assert any('"name": "' in text and "<tool_call>" in text for text in texts)
    assert DONE in texts and CANNOT in texts
    assert len(texts) == len(set(texts))


def test_info_of_an_unfinished_episode():
    info = start("miss_param/010")._info()
    assert {key: info[key] for key in ("benchmark_id", "category", "user_turn", "won", "score", "failure")} == {
        "benchmark_id": "multi_turn_miss_param_10",
        "category": "miss_param",
        "user_turn": 0,
        "won": False,
        "score": 0.0,
        "failure": None,
    }
