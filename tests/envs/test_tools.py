"""The tool environment: calls, rewards, forks, experts and what an agent is told."""

import json
import pickle

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("pydantic_monty")

from agentropy.envs.tools import sandbox_lockdown
from agentropy.envs.tools.env import ToolsEnv
from agentropy.envs.tools.formats import FORMATS
from agentropy.envs.tools.protocol import Tool, ToolError
from agentropy.errors import EnvironmentFailedError, UsageError

INTERPRETERS = [
    "monty",
    pytest.param("cpython", marks=pytest.mark.skipif(not sandbox_lockdown.support(), reason="no Landlock or seccomp")),
]


@pytest.fixture
def make():
    made = []

    def build(**arguments) -> ToolsEnv:
        made.append(ToolsEnv(**arguments))
        return made[-1]

    yield build
    for env in made:
        env.close()


def play_expert(env: ToolsEnv) -> tuple[float, list[str]]:
    total, seen = 0.0, []
    for action in env.expert():
        observation, reward, _, _, _ = env.step(action)
        total += reward
        seen += [action, observation]
    return total, seen


def test_an_episode_as_the_docstring_tells_it(make):
    env = make(kinds=["numbers"])
    env.reset(options={"task": "numbers/train-000000"})
    observation, reward, terminated, truncated, info = env.step(
        "Let me see. <python>print(sum(v for v in [61, 8, 94, 35, 52, 77] if v % 2 == 0))</python>"
    )
    assert (observation, reward, terminated, truncated) == ("<result>\n154\n</result>", 0.0, False, False)
    assert (info["tool_calls"], info["tool_errors"], info["invalid"], info["won"]) == (1, 0, False, False)
    observation, reward, terminated, _, info = env.step("<answer>surely wrong</answer>")
    assert (observation, reward, terminated) == ("The answer is wrong.", 0.0, True)
    assert (info["won"], info["score"], info["answer"]) == (False, 0.0, "surely wrong")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_the_expert_wins_every_kind_with_the_real_interpreter(make, difficulty, format):
    env = make(split="test", difficulty=difficulty, format=format)
    for task in env.tasks()[::4]:
        env.reset(options={"task": task})
        total, seen = play_expert(env)
        assert total == 1.0 and len(seen) >= 4, (task, seen)


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_both_interpreters_give_the_expert_the_same_results(make, interpreter):
    env, reference = make(interpreter=interpreter), make()
    for kind in ("table", "letters", "days", "sequence"):
        for one in (env, reference):
            one.reset(options={"task": f"{kind}/train-000001"})
        assert play_expert(env) == play_expert(reference)


def test_the_expert_finds_back_after_wrong_turns(make):
    env = make(kinds=["table"])
    env.reset(options={"task": "table/train-000002"})
    for action in (
        "<python>rows = total = None</python>",
        "nonsense",
        next(env.expert()),
        "<python>del total</python>",
    ):
        env.step(action)
    assert play_expert(env)[0] == 1.0


def test_gsm8k_solutions_win_by_calculator(make, shared_data):
    env = make(source="gsm8k", data=shared_data / "math", tools=("calculator",), max_turns=30)
    called = 0
    for task in env.tasks()[::200]:
        env.reset(options={"task": task})
        total, seen = play_expert(env)
        assert total == 1.0
        called += len(seen) > 2
    assert called > 25


@pytest.mark.parametrize(
    ("action", "observation"),
    [
        ("I do not know", "Call a tool (<python>…</python>, <calculator>…</calculator>) or answer with <answer>"),
        ("<python>1", "<python> is not closed: end it with </python>."),
        ("<pythn>1</pythn>", "There is no tool <pythn>; did you mean 'python'?. Call a tool"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_and_the_episode_goes_on(make, action, observation):
    env = make(format_penalty=0.25)
    env.reset(seed=0)
    told, reward, terminated, _, info = env.step(action)
    assert told.startswith(observation) and not terminated
    assert (reward, info["invalid"], info["format_errors"], info["tool_calls"]) == (-0.25, True, 1, 0)
    assert env.step("<calculator>6 * 7</calculator>")[:2] == ("<result>\n42\n</result>", 0.0)


def test_a_call_that_fails_is_counted_and_no_mistake_of_form(make):
    env = make(format_penalty=0.25)
    env.reset(seed=0)
    told, reward, _, _, info = env.step("<calculator>1 / 0</calculator>")
    assert told == "<result>\ncalculator: division by zero\n</result>"
    assert (reward, info["invalid"], info["tool_errors"], info["tool_calls"]) == (0.0, False, 1, 1)


def test_several_calls_in_one_action(make):
    env = make()
    env.reset(seed=0)
    told, *_, info = env.step("<python>x = 5</python> then <python>x * 2</python><calculator>1 +</calculator>")
    assert told == (
        "<result>\n(no output)\n</result>\n<result>\n10\n</result>\n"
        "<result>\ncalculator: the expression ends too early\n</result>"
    )
    assert (info["tool_calls"], info["tool_errors"]) == (3, 1)


def test_an_answer_in_the_same_action_as_a_call_has_not_been_given(make):
    env = make()
    env.reset(seed=0)
    told, _, terminated, _, info = env.step("<calculator>1 + 1</calculator><answer>2</answer>")
    assert told == "<result>\n2\n</result>" and not terminated and info["answer"] is None


def test_json_calls(make):
    env = make(format="json")
    env.reset(seed=0)
    call = json.dumps({"name": "python", "arguments": {"code": "2 ** 10"}})
    assert env.step(f"<tool_call>\n{call}\n</tool_call>")[0] == "<tool_response>\n1024\n</tool_response>"
    assert env.step(call)[0] == "<tool_response>\n1024\n</tool_response>"
    wrong = json.dumps({"name": "python", "arguments": {"cod": "2"}})
    assert env.step(wrong)[0] == "<tool_response>\npython: unknown argument 'cod'; it takes 'code'\n</tool_response>"


def test_variables_live_as_long_as_the_episode(make):
    env = make()
    env.reset(seed=0)
    env.step("<python>x = 1</python>")
    assert env.step("<python>x</python>")[0] == "<result>\n1\n</result>"
    env.reset(seed=0)
    assert "NameError" in env.step("<python>x</python>")[0]


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_a_fork_does_not_disturb_the_episode(make, interpreter):
    env, other = make(interpreter=interpreter), make(interpreter=interpreter)
    env.reset(seed=3)
    env.step("<python>x = [1]</python>")
    point = pickle.loads(pickle.dumps(env.snapshot()))
    env.step("<python>x.append(2)</python>")
    assert other.restore(point)[0] == "<result>\n(no output)\n</result>"
    assert other.step("<python>x</python>")[0] == "<result>\n[1]\n</result>"
    assert env.step("<python>x</python>")[0] == "<result>\n[1, 2]\n</result>"
    assert env.restore(point)[1]["tool_calls"] == 1
    assert env.step("<python>x</python>")[0] == "<result>\n[1]\n</result>"


def test_random_episodes_continue_from_any_point_as_if_never_left(make):
    env, other = make(), make()
    generator = np.random.default_rng(0)
    actions = [
        "<python>n = 1</python>", "<python>n += 1\nn</python>", "<python>import random\nrandom.random()</python>",
        "<python>1/0</python>", "<calculator>2 * 3</calculator>", "hm", "<python>s = 'a' * 1000\nlen(s)</python>",
    ]  # fmt: skip

    for episode in range(20):
        env.reset(seed=episode)
        played = [actions[generator.integers(len(actions))] for _ in range(6)]
        for action in played[:3]:
            env.step(action)
        point = env.snapshot()
        onwards = [env.step(action) for action in played[3:]]
        other.restore(point)
        assert [other.step(action) for action in played[3:]] == onwards


def test_environments_take_turns(make):
    envs = [make() for _ in range(6)]
    for number, env in enumerate(envs):
        env.reset(seed=0)
        env.step(f"<python>x = {number}</python>")
    for _ in range(2):
        assert [env.step("<python>x</python>")[0] for env in envs] == [f"<result>\n{n}\n</result>" for n in range(6)]


def double(n: int) -> int:
    """Double a number."""
    return 2 * n


class Notes(Tool):
    """A tool with a state."""

    name, description = "note", "remember a text"
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}  # noqa: RUF012

    def __init__(self):
        self.notes = ()

    def call(self, arguments):
        if not arguments.get("text"):
            raise ToolError("nothing to note")
        self.notes += (arguments["text"],)
        return "; ".join(self.notes)

    def clear(self):
        self.notes = ()

    def save(self):
        return self.notes

    def load(self, state):
        self.notes = state


def test_functions_and_tools_of_ones_own(make):
    env = make(tools=("calculator", double, Notes()))
    assert "Double a number." in env.instructions
    env.reset(seed=0)
    assert env.step('<double>{"n": 21}</double>')[0] == "<result>\n42\n</result>"
    assert "n: Input should be a valid integer" in env.step('<double>{"n": "x"}</double>')[0]
    env.step("<note>one</note>")
    point = env.snapshot()
    assert env.step("<note>two</note>")[0] == "<result>\none; two\n</result>"
    env.restore(point)
    assert env.step("<note>three</note>")[0] == "<result>\none; three\n</result>"
    env.reset(seed=0)
    assert env.step("<note>four</note>")[0] == "<result>\nfour\n</result>"


class Replayed(Notes):
    """Cannot be put back, only called again."""

    replayed = True

    def load(self, state):
        raise AssertionError("not loaded")


class Fickle(Replayed):
    """Never answers the same."""

    answers = 0

    def call(self, arguments):
        Fickle.answers += 1
        return str(Fickle.answers)


def test_tools_without_a_saved_state_are_called_again(make):
    env, other = make(tools=(Replayed(),)), make(tools=(Replayed(),))
    env.reset(seed=0)
    env.step("<note>one</note>")
    other.restore(env.snapshot())
    assert other.step("<note>two</note>")[0] == "<result>\none; two\n</result>"


def test_a_tool_that_does_not_repeat_is_noticed(make):
    env = make(tools=(Fickle(),))
    env.reset(seed=0)
    env.step("<note>one</note>")
    with pytest.raises(EnvironmentFailedError, match="did not play again"):
        env.restore(env.snapshot())


def test_long_results_are_cut(make):
    def flood(n: int) -> str:
        return "y" * n

    env = make(tools=(flood,), max_output=100)
    env.reset(seed=0)
    assert "[9800 characters left out]" in env.step('<flood>{"n": 10000}</flood>')[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "action", ["", "é" * 100_000, "<python>" + "x" * 100_000 + "</python>", "\ud800",
    "<answer>" + "9" * 100_000 + "</answer>",
               "{" * 100_000, '{"name": "python", "arguments": ' + "[" * 50_000, "<python></python>",
               "<calculator>" + "(" * 50_000 + "</calculator>"]
)  # fmt: skip
def test_any_action_is_answered(make, format, action):
    env = make(format=format)
    env.reset(seed=0)
    observation, *_ = env.step(action)
    assert observation and env.observation_space.contains(observation)


def test_truncation_is_no_answer(make):
    env = make(max_turns=2)
    env.reset(seed=0)
    assert env.step("<calculator>1</calculator>")[2:4] == (False, False)
    assert env.step("<calculator>1</calculator>")[2:4] == (False, True)


def test_info_says_what_confines_the_code(make):
    env = make()
    assert env.reset(seed=0)[1]["sandbox"].startswith("monty: ")
    assert "sandbox" not in make(tools=("calculator",)).reset(seed=0)[1]


def test_goals_are_short(make):
    env = make(difficulty=3)
    for task in env.tasks()[::500]:
        goal = env.reset(options={"task": task})[1]["goal"]
        assert goal and len(goal) <= 300 and goal.endswith("?") | goal.endswith("."), goal


def test_the_corpus_holds_what_experts_read_and_write(make):
    env = make()
    texts = "".join(env.corpus())
    for task in env.tasks()[7::900]:
        observation, _ = env.reset(options={"task": task})
        for text in (observation, *play_expert(env)[1]):
            assert set(text) <= set(texts)
    assert env.instructions in texts and "<result>\n" in texts and "The answer is right." in texts


def test_search_beside_python(make):
    pytest.importorskip("bm25s")
    env = make(tools=("search", "python"), passages=2)
    env.reset(seed=0)
    observation, *_ = env.step("<search>city</search>")
    assert observation.startswith("<result>\n[1] ") and "\n[2] " in observation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, "did you mean 'train'"),
        ({"format": "jsn"}, "did you mean 'json'"),
        ({"interpreter": "mont"}, "did you mean 'monty'"),
        ({"tools": ("pyton",)}, "did you mean 'python'"),
        ({"tools": ()}, "there are no tools"),
        ({"tools": ("python", "python")}, "two tools are called 'python'"),
        ({"time_limit": -1}, "time_limit must be more than 0"),
        ({"num_tasks": {"train": 0}}, "has no tasks"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        ToolsEnv(**arguments)


def test_it_is_registered_and_starts_nothing_before_it_is_needed():
    env = gym.make("agentropy/Tools-v0")
    observation, info = env.reset(seed=1)
    assert observation and "<python>" in info["instructions"]
    assert env.unwrapped.tasks_hash() == ToolsEnv().tasks_hash()
    env.close()
    env.close()
