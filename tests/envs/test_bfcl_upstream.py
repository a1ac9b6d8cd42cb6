"""Results and verdicts are those of bfcl_eval's own executor and checker, also for episodes that go wrong."""

import random

import pytest

from agentropy.envs.bfcl import source
from agentropy.envs.bfcl.calls import Call, write

pytest.importorskip("bfcl_eval")
pytest.importorskip("mpmath")
if source.locate() is None:
    pytest.skip("needs the files of bfcl-eval: `agentropy data bfcl`", allow_module_level=True)

from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils
from bfcl_eval.eval_checker.multi_turn_eval.func_source_code.posting_api import TwitterAPI

from agentropy.benchmarks.upstream.bfcl import Upstream
from agentropy.envs.bfcl.env import DONE, BFCLEnv
from agentropy.envs.bfcl.simulators import functions, parameters
from agentropy.envs.bfcl.tasks import SPLITS, Task, gold, load, names

Turns = list[list[list[Call]]]
"""Calls of each message of each turn."""
ALL = [name for split in SPLITS for name in names(split, source.CATEGORIES)]
WHY = {
    "multi_turn:empty_turn_model_response": "no function was called",
    "multi_turn:instance_state_mismatch": "the state of",
    "multi_turn:execution_response_mismatch": "a result that is needed",
}
EPISODES = 300


@pytest.fixture(scope="module")
def arguments() -> dict[str, list[dict]]:
    """Return arguments that the gold calls of each function have."""
    found: dict[str, list[dict]] = {}
    for name in ALL[::3]:
        for call in (call for turn in load(source.source(), name).gold for call in turn):
            found.setdefault(call.name, []).append(dict(call.arguments))
    return found


def some_call(generator: random.Random, task: Task, arguments: dict[str, list[dict]]) -> Call:
    root = source.source()
    simulator = generator.choice(task.simulators)
    function = generator.choice(functions(root, simulator))
    if function in arguments and generator.random() < 0.8:
        return Call(function, generator.choice(arguments[function]))
    values = ["x", "final_report.pdf", "AAPL", 1, 2.5, True, None, ["a"], ".."]
    return Call(function, {name: generator.choice(values) for name in parameters(root, simulator, function)})


def changed(call: Call, generator: random.Random) -> Call:
    """Return ``call`` with another argument."""
    given = dict(call.arguments)
    if given:
        name = generator.choice(sorted(given))
        given[name] = f"{given[name]}x" if isinstance(given[name], str) else 7
    return Call(call.name, given)


def episode(generator: random.Random, task: Task, arguments: dict[str, list[dict]]) -> Turns:
    """Return the gold calls with one thing wrong, or random calls."""
    turns: Turns = [[[call] for call in turn] for turn in task.gold]
    turn = generator.choice([turn for turn in turns if turn])
    at = generator.randrange(len(turn))
    match generator.randrange(11):
        case 0:
            del turn[at]
        case 1:
            turn.insert(at, turn[at])
        case 2:
            generator.shuffle(turn)
        case 3:
            turn[at] = [changed(turn[at][0], generator)]
        case 4:
            generator.choice(turns).append([some_call(generator, task, arguments)])
        case 5:
            turn.clear()
        case 6:
            generator.choice(turns).insert(0, turn.pop(at))
        case 7:
            turn.insert(0, [Call("no_such_function")])
        case 8:
            turn[:] = [[call for step in turn for call in step]]
        case 9:
            calls = [[some_call(generator, task, arguments) for _ in range(2)] for _ in turns]
            return [[step] if generator.random() < 0.8 else [] for step in calls]
        case _:
            turn.append([some_call(generator, task, arguments)])
    return turns


def judged(upstream: Upstream, turns: Turns, model: str) -> dict:
    """Return the verdict of upstream's checker on ``turns`` of the task that ``upstream`` has opened."""
    TwitterAPI.post_tweet.__defaults__ = ([], [])  # to which upstream adds the mentions of earlier episodes
    texts = [[[write([call], "python")[1:-1] for call in step] for step in turn] for turn in turns]
    entry = upstream._entry
    verdict = multi_turn_checker.multi_turn_checker(texts, upstream._gold, entry, "", model)
    for name in [name for name in vars(multi_turn_utils) if name.startswith(model + "_")]:
        delattr(multi_turn_utils, name)
    return verdict


def test_results_and_verdicts_are_upstreams(arguments):
    env, upstream, generator = BFCLEnv(max_observation=1 << 20), Upstream(), random.Random(20260323)
    verdicts = []
    for number in range(EPISODES):
        task = load(source.source(), generator.choice(ALL))
        turns = episode(generator, task, arguments)
        if any(len(turn) > 20 for turn in turns):
            continue
        observation, info = env.reset(options={"task": task.name})
        TwitterAPI.post_tweet.__defaults__ = ([], [])
        upstream.reset(task.name)
        for turn in turns:
            assert observation.endswith(upstream.observation)
            for step in turn:
                upstream.step(write(step))
                assert env.step(write(step))[0] == upstream.observation, (task.name, step)
            observation, _, over, _, info = env.step(DONE)
            assert upstream.step(DONE) == over
        assert over
        verdict = judged(upstream, turns, f"check{number}")
        assert verdict["valid"] == upstream.valid == info["won"], (task.name, turns)
        if not info["won"]:
            assert WHY[verdict["error_type"]] in info["failure"]
        verdicts.append(info["won"])
    upstream.close()
    assert len(verdicts) * 0.2 < sum(verdicts) < len(verdicts) * 0.8


def test_gold_results_are_upstreams():
    upstream = Upstream()
    for name in ALL[::16]:
        upstream.reset(name)
        for calls, results in zip(upstream._gold, gold(source.source(), name).results, strict=True):
            assert tuple(upstream._execute(calls)) == results
    upstream.close()
    assert not [name for name in vars(multi_turn_utils) if name.startswith("model")]


def test_upstreams_loop_agrees_that_the_expert_wins():
    env, upstream = BFCLEnv(), Upstream()
    for name in env.tasks()[::30]:
        env.reset(options={"task": name})
        upstream.reset(name)
        overs = [upstream.step(action) for action in env.expert() if env.step(action)]
        assert overs == [False] * (len(overs) - 1) + [True] and upstream.valid
    upstream.close()
