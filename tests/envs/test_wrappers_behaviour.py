"""What each wrapper does to observations, rewards and actions."""

import collections
import json
import os
import subprocess
import sys

import gymnasium as gym
import pytest
from gymnasium.error import ResetNeeded
from hypothesis import assume, given
from hypothesis import strategies as st

from agentropy.envs.text import cut
from agentropy.envs.wrappers import (
    FormatCheck,
    HistoryWindow,
    ObservationCap,
    PromptTemplates,
    Reminder,
    Retry,
    RetryInvalid,
    ToolPenalty,
    TurnCost,
    wrap,
)
from agentropy.envs.wrappers.actions import FORMATS
from agentropy.envs.wrappers.calls import blocks, count_calls, function_calls
from agentropy.envs.wrappers.retry import VERDICT, Attempt, tells
from agentropy.envs.wrappers.templates import TEMPLATES, boxed
from agentropy.errors import EnvironmentFailedError, UsageError

from .wrapper_worlds import Quiz, Sums

commands = st.lists(st.sampled_from(["add 1", "add 2", "add 9", "fly", "é" * 50]), max_size=8)


def play(env: gym.Env, actions: list[str]) -> list[tuple]:
    """Return what each action led to, up to the end of the episode."""
    seen = []
    for action in actions:
        seen.append(env.step(action))
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


# --- what an agent reads


@given(text=st.text(max_size=300), limit=st.integers(0, 300), keep=st.sampled_from(["head", "tail", "both"]))
def test_a_cut_text_is_short_enough_and_says_what_is_missing(text, limit, keep):
    shown = cut(text, limit, keep)
    assert len(shown) <= limit
    assert (shown == text) == (len(text) <= limit)
    if len(text) > limit > 60:
        note = next(line for line in shown.splitlines() if line.endswith("characters left out]"))
        kept = len(shown) - len(note) - (2 if keep == "both" else 1)
        assert int(note.split()[0][1:]) == len(text) - kept
        head = {"head": kept, "tail": 0, "both": kept - kept // 2}[keep]
        assert shown.startswith(text[:head]) and shown.endswith(text[len(text) - kept + head :])


@given(actions=commands, limit=st.integers(1, 80), keep=st.sampled_from(["head", "tail", "both"]))
def test_no_observation_is_longer_than_the_cap(actions, limit, keep):
    env, bare = ObservationCap(Sums(), limit, keep), Sums()
    pairs = zip([env.reset(seed=0), *play(env, actions)], [bare.reset(seed=0), *play(bare, actions)], strict=True)
    for (observation, *rest), (whole, *expected) in pairs:
        assert len(observation) <= limit and rest == expected
        assert observation == whole or len(whole) > limit
    assert env.observation_space.max_length == limit


@given(actions=commands, turns=st.integers(0, 4), goal=st.booleans())
def test_the_window_shows_exactly_the_last_turns(actions, turns, goal):
    env, bare = HistoryWindow(Sums(), turns, goal), Sums()
    seen = [bare.reset(seed=0)[0]]
    assert env.reset(seed=0)[0] == seen[0]
    for step, expected in zip(play(env, actions), play(bare, actions), strict=True):
        *past, now = (*seen, expected[0])
        lines = step[0].split("\n\n")
        if goal:
            assert lines.pop(0) == f"Task: {step[4]['goal']}"
        assert lines.pop() == f"Observation {len(past) + 1}: {now}"
        first = max(0, len(past) - turns)
        window = [
            line
            for number in range(first, len(past))
            for line in (f"Observation {number + 1}: {past[number]}", f"Action {number + 1}: {actions[number]}")
        ]
        assert "\n".join(lines).splitlines()[1:] == window
        assert len(lines) == (1 if turns else 0)
        assert step[1:] == expected[1:]
        seen.append(now)


@given(actions=commands, every=st.integers(1, 4))
def test_the_goal_is_said_again_every_few_turns(actions, every):
    env, bare = Reminder(Sums(), every, text="Mind: {goal}!"), Sums()
    assert env.reset(seed=0) == bare.reset(seed=0)
    pairs = zip(play(env, actions), play(bare, actions), strict=True)
    for turn, (step, expected) in enumerate(pairs, 1):
        due = turn % every == 0 and not (expected[2] or expected[3])
        assert step[0] == expected[0] + (f"\nMind: {expected[4]['goal']}!" if due else "")
        assert step[1:] == expected[1:]


# --- what an agent earns


@given(actions=commands, cost=st.floats(0, 2), free=st.integers(0, 5))
def test_turn_costs_add_up(actions, cost, free):
    env, bare = TurnCost(Sums(), cost, free), Sums()
    env.reset(seed=0), bare.reset(seed=0)
    steps, expected = play(env, actions), play(bare, actions)
    paid = sum(step[1] for step in expected) - sum(step[1] for step in steps)
    assert paid == pytest.approx(cost * max(0, len(steps) - free))
    if steps:
        assert steps[-1][4]["turn_cost"] == pytest.approx(paid)


calls = st.lists(st.sampled_from(["add 1", "<search>a</search>", "<search>a</search><python>b</python>", "<think>"]))


@given(actions=calls, penalty=st.floats(0, 2), free=st.integers(0, 3), most=st.none() | st.floats(0, 3))
def test_tool_penalties_add_up(actions, penalty, free, most):
    env, bare = ToolPenalty(Sums(), penalty, free, most=most), Sums()
    env.reset(seed=0), bare.reset(seed=0)
    steps, expected = play(env, actions), play(bare, actions)
    made = sum(action.count("</") for action in actions[: len(steps)])
    due = max(0, made - free) * penalty
    due = due if most is None else min(most, due)
    assert sum(step[1] for step in expected) - sum(step[1] for step in steps) == pytest.approx(due)
    if steps:
        assert steps[-1][4]["calls"] == made
        assert steps[-1][4]["call_penalty"] == pytest.approx(due)


@pytest.mark.parametrize(
    ("text", "tools", "number"),
    [
        ("go to desk 1", None, 0),
        ("<search>a</search> then <python>b</python>", None, 2),
        ("<search>a</search> then <python>b</python>", ("python",), 1),
        ("<search>a<python>b</python></search>", None, 1),
        ("<search>never closed", None, 0),
        ("<think><search>a</search></think><answer>b</answer>", None, 0),
        ('{"name": "ls", "arguments": {}}', None, 1),
        ('{"name": "ls", "arguments": {}}', ("cd",), 0),
        ('<think>{}</think>\n[{"name": "ls", "parameters": {}}, {"name": "cd", "arguments": {}}]', None, 2),
        ('```json\n{"function": {"name": "ls", "arguments": "{}"}}\n```', None, 1),
        ('<tool_call>{"name": "ls", "arguments": {}}</tool_call>' * 2, None, 2),
        ('<tool_call>[{"name": "ls", "arguments": {}}, {"name": "cd", "arguments": {}}]</tool_call>', ("cd",), 1),
        ("<tool_call>no JSON</tool_call>", None, 1),
        ('{"name": "ls"}', None, 0),
        ("[" * 100_000, None, 0),
    ],
)
def test_calls_are_counted(text, tools, number):
    assert count_calls(text, tools) == number


@given(st.text(alphabet="<>/ab ", max_size=60))
def test_blocks_are_what_they_say(text):
    for block in blocks(text, ("a", "b")):
        assert text[block.start : block.end] == f"<{block.tag}>{block.content}</{block.tag}>"


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_that_calls_nothing_is_no_call(value):
    assert function_calls(json.dumps(value)) is None


# --- how an agent must write

WELL_FORMED = {
    "action": ["<action>x</action>", " <action> x </action>\n", "<think>a</think> <action>x</action>"],
    "think-action": ["<think>a</think><action>x</action>", "<think>\n</think>\n<action>x</action>"],
    "search": ["<search>x</search>", "<answer>x</answer>", "<think>a</think><search>x</search>"],
    "think-search": ["<think>a</think>\n<search>x</search>"],
    "tools": ["<python>1 < 2</python>", "<answer>7</answer>", "<think>a</think><calculator>1+1</calculator>"],
    "think-tools": ["<think>a</think><python>x</python>"],
    "json": ['{"name": "ls", "arguments": {}}', '<tool_call>{"name": "ls", "arguments": {}}</tool_call> ' * 2],
    "think-json": ['<think>a</think>[{"name": "ls", "arguments": {}}]'],
}
MALFORMED = {
    "action": ["x", "", "<action></action>", "<action>x", "<action>x</action>.", "<action>x</action>" * 2,
               "<action><action>x</action></action>", "<ACTION>x</ACTION>"],
    "think-action": ["<action>x</action>", "<action>x</action><think>a</think>", "<think>a</think>",
                     "so <think>a</think><action>x</action>", "<think>a</think> so <action>x</action>",
                     "<think>a</think><think>b</think>", "<think>a</think></think><action>x</action>"],
    "search": ["<search>x</search><answer>y</answer>", "x"],
    "think-search": ["<search>x</search>"],
    "tools": ["<python>x</python> and so on"],
    "think-tools": ["<python>x</python>"],
    "json": ["ls()", '{"name": "ls"}', "[]", "<tool_call>ls</tool_call>", '<tool_call>{"name": "ls", "arguments": {}}'],
    "think-json": ['{"name": "ls", "arguments": {}}'],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_each_form_takes_what_has_it_and_nothing_else(form):
    for message in WELL_FORMED[form]:
        assert FORMATS[form].read(message) == ("x" if FORMATS[form].unwrap else message)
    for message in MALFORMED[form]:
        assert FORMATS[form].read(message) is None, message


@given(action=st.text(alphabet="go to desk12\n", min_size=1), form=st.sampled_from(["action", "think-action"]))
def test_what_is_said_in_a_form_is_read_again(action, form):
    assume(action.strip())
    assert FORMATS[form].read(FORMATS[form].say(action)) == action.strip()


@pytest.mark.parametrize("form", ["think-search", "think-tools", "think-json"])
def test_an_action_in_the_worlds_own_form_only_gets_a_thought(form):
    action = WELL_FORMED[form.removeprefix("think-")][0]
    assert FORMATS[form].say(action).endswith(action)
    assert FORMATS[form].read(FORMATS[form].say(action))
    assert FORMATS[form.removeprefix("think-")].say(action) == action


def test_a_malformed_action_is_played_and_costs():
    env, bare = FormatCheck(Sums(), form="action", penalty=0.25), Sums()
    env.reset(seed=0), bare.reset(seed=0)
    for message, read, malformed in (("add 1", "add 1", True), ("<action>add 1</action>", "add 1", False)):
        observation, reward, _, _, info = env.step(message)
        expected = bare.step(read)
        assert (observation, reward) == (expected[0], expected[1] - 0.25 * malformed)
        assert info["malformed"] is malformed


@given(st.lists(st.sampled_from(["add 1", "<action>add 1</action>", "<action>fly</action>", ""]), max_size=9))
def test_a_rejected_action_never_reaches_the_world(messages):
    env, bare = FormatCheck(Sums(), form="action", malformed="reject", penalty=0.25, patience=2), Sums()
    env.reset(seed=0), bare.reset(seed=0)
    in_a_row = 0
    for message in messages:
        observation, reward, terminated, truncated, info = env.step(message)
        if message.startswith("<action>"):
            in_a_row = 0
            assert (observation, reward, terminated, truncated) == bare.step(message[8:-9])[:4]
        else:
            in_a_row += 1
            assert observation.startswith("Not in the form asked for. Give one action inside <action> </action>")
            assert (reward, terminated, truncated) == (-0.25, False, in_a_row > 2)
            assert info["invalid"] and info["malformed"]
        assert info["turn"] == bare._turn
        if terminated or truncated:
            with pytest.raises(ResetNeeded):
                env.step("<action>add 1</action>")
            break


# --- trying again


@given(actions=st.lists(st.sampled_from(["add 1", "fly", "add 0"]), max_size=12), retries=st.integers(0, 3))
def test_invalid_actions_cost_a_turn_only_after_the_retries(actions, retries):
    env = RetryInvalid(Sums(max_turns=5), retries, penalty=0.25)
    env.reset(options={"task": "train-29"})
    in_a_row = turns = traces = 0
    for action, step in zip(actions, play(env, actions), strict=False):
        observation, reward, _, truncated, info = step
        if action == "add 1":
            in_a_row, turns = 0, turns + 1
        elif in_a_row == retries:  # played: it costs a turn and leaves its trace
            in_a_row, turns, traces = 0, turns + 1, traces + 1
            assert reward == -0.5
        else:
            in_a_row += 1
            assert reward == -0.25 and info["invalid"] and not truncated
            assert observation == f"What is {action!r}?\n{RetryInvalid.feedback}"
        assert (info["turn"], info["traces"], info["retries"]) == (turns, traces, in_a_row)
        assert truncated == (turns == 5)


@given(actions=st.lists(st.sampled_from(["add 1", "fly", ""]), max_size=9), retries=st.integers(0, 2))
def test_an_invalid_action_is_never_let_through_where_the_episode_ends_instead(actions, retries):
    env = RetryInvalid(Sums(max_turns=20), retries, exhausted="end")
    env.reset(options={"task": "train-29"})
    in_a_row = 0
    for action, (_, reward, terminated, truncated, info) in zip(actions, play(env, actions), strict=False):
        in_a_row = 0 if action == "add 1" else in_a_row + 1
        assert info["traces"] == 0
        assert truncated == (in_a_row > retries) and not terminated
        assert reward == (0.0 if in_a_row else info["turn"] / 8)
    if in_a_row > retries:
        with pytest.raises(ResetNeeded):
            env.step("add 1")


@given(answers=st.lists(st.sampled_from(["3", "4", "5", "x"]), min_size=1, max_size=6), attempts=st.integers(1, 4))
def test_an_episode_is_attempts_until_one_succeeds(answers, attempts):
    env, bare = Retry(Quiz(), attempts), Quiz()
    task = {"task": "2+2"}
    question, info = env.reset(options=task)
    assert question == bare.reset(options=task)[0] and info["attempt"] == 1
    for number, answer in enumerate(answers, 1):
        observation, reward, terminated, truncated, info = env.step(answer)
        bare.reset(options=task)
        alone = bare.step(answer)
        assert reward == alone[1], "an attempt earns what the single turn earns"
        if answer == "4" or number == attempts:
            assert (observation, terminated, truncated) == (alone[0], True, False)
            assert info["won"] is (answer == "4") and info["attempt"] == number
            break
        assert observation == f"{VERDICT}\n\n{question}" and not terminated and not truncated
        assert (info["attempt"], info["turn"], info["won"], info["feedback"]) == (number + 1, 0, False, VERDICT)
        assert "4" not in observation


def test_an_attempt_also_fails_when_its_turns_run_out():
    for counts in (True, False):
        env = Retry(Sums(max_turns=2), attempts=2, truncated=counts)
        env.reset(options={"task": "train-29"})
        ends = [step[2:4] for step in play(env, ["add 1"] * 9)]
        assert ends == [(False, False)] * (3 if counts else 1) + [(False, True)]


def test_a_teacher_is_told_everything_and_its_feedback_tells_no_answer():
    env = Retry(Quiz(), 9, teacher=f"{Quiz.__module__}:hint")
    env.reset(options={"task": "3+4"})
    said = [env.step(answer)[4]["feedback"] for answer in ("1", "9", "tell")]
    assert said == ["Higher.", "Lower.", VERDICT]

    told = []
    env = Retry(Sums(max_turns=2), 2, teacher=lambda attempt: told.append(attempt) or "x" * 5000)
    env.reset(options={"task": "train-20"})
    observation = [step[0] for step in play(env, ["add 1", "add 2"])][-1]
    assert len(observation) <= 1000 + len("\n\nReach 20.") and env.observation_space.contains(observation)
    (attempt,) = told
    assert attempt == Attempt(1, "Reach 20.", ("add 1", "add 2"), "ééé 3, 0 traces", 3 / 8, attempt.info)
    assert attempt.info["turn"] == 2

    env = Retry(Quiz(), 9, teacher=lambda attempt: f"{attempt.number}: {', '.join(attempt.actions)}")
    env.reset(options={"task": "3+4"})
    assert [env.step(answer)[4]["feedback"] for answer in ("x", "y")] == ["1: x", "2: y"]

    env = Retry(Quiz(), 2, teacher=lambda attempt: None)
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailedError, match="NoneType"):
        env.step("x")


@pytest.mark.parametrize(
    ("text", "info", "told"),
    [
        ("It is Paris.", {"answer": "Paris"}, True),
        ("it is  NEW\nyork!", {"answers": ["NYC", "New York"]}, True),
        ("Parisian?", {"answer": "Paris"}, False),
        ("Try 17.", {"answer": 7}, False),
        ("Try 7.", {"answer": 7}, True),
        ("Take two.", {"solution": {"steps": ["one", ("two",)]}}, True),
        ("True, but no.", {"answer": True, "expert": None, "answers": [], "target": ""}, False),
        ("Paris", {"goal": "Paris"}, False),
    ],
)
def test_feedback_that_tells_a_secret_is_found(text, info, told):
    assert tells(text, info) is told


def test_retrying_needs_to_know_of_success():
    class Silent(Sums):
        def _info(self):
            return {}

    for wrapper, missing in ((Retry, "won"), (RetryInvalid, "invalid"), (Reminder, "goal")):
        with pytest.raises(UsageError, match=rf"info\['{missing}'\]"):
            wrapper(Silent()).reset(seed=0)


def test_an_episode_that_a_wrapper_ends_has_no_expert_action_left():
    env = RetryInvalid(Sums(expert_info=True), retries=0, exhausted="end")
    _, info = env.reset(options={"task": "train-29"})
    expert = env.expert()
    assert next(expert) == info["expert"] == "add 9"
    *_, truncated, info = env.step("fly")
    assert truncated and info["expert"] is None and next(expert, None) is None


# --- prompt templates

# How many parts each template requires: verl/utils/reward_score/format_reward.py of wenquanlu/prompt-augmentation-GRPO
# (commit ff1ded4), where a plain template always scores 1.
REQUIRED = {
    "abel": 0, "simplerl": 0, "qwen-math": 0, "open-r1": 4, "open-r1-teacher": 3, "deepseek-r1": 4,
    "deepseek-r1-teacher": 3, "formal": 0, "lm_eval_prompt1": 1, "lm_eval_prompt4": 1, "lm_eval_prompt8": 0,
    "reflective_prompt": 4, "reflective_prompt-teacher": 3,
}  # fmt: skip
OPENINGS = {"abel", "open-r1-teacher", "deepseek-r1-teacher", "lm_eval_prompt1", "lm_eval_prompt8",
            "reflective_prompt-teacher"}  # fmt: skip


def test_the_thirteen_templates_and_what_they_require():
    assert {name: len(template.required) for name, template in TEMPLATES.items()} == REQUIRED
    assert {name for name, template in TEMPLATES.items() if template.opening} == OPENINGS
    for name, template in TEMPLATES.items():
        asked = template.system + template.ending
        assert "\\boxed{" in asked, f"{name} does not say where the action goes"
        for part in template.required:
            assert part.strip() in asked, f"{name} requires {part!r} and does not say so"
            assert part not in template.opening


# From the same file: a part counts when it is there exactly once.
@pytest.mark.parametrize(
    ("name", "message", "score"),
    [
        ("abel", "whatever", 1.0),
        ("open-r1", "<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0),
        ("open-r1", "<think>a</think><answer>b</answer>", 0.0),
        ("open-r1", "<think>\na\n</think>\n<answer>b</answer>", 0.5),
        ("open-r1-teacher", "a\n</think>\n<answer>\nb\n</answer>", 1.0),
        ("open-r1-teacher", "<think>\na\n</think>\n<answer>b", 1 / 3),
        ("deepseek-r1", "<think>a</think><answer>b</answer>", 1.0),
        ("deepseek-r1", "<think><think>a</think><answer>b</answer>", 0.75),
        ("deepseek-r1", "<think>a</think><answer>b</answer><answer>c</answer>", 0.5),
        ("deepseek-r1-teacher", "a</think><answer>b</answer>", 1.0),
        ("lm_eval_prompt1", "The final action is: b", 1.0),
        ("lm_eval_prompt4", "The final action is: b. The final action is: c", 0.0),
        ("reflective_prompt", "<solution>\na\n</solution>\n<check>\nLet's verify step by step: b\n</check>", 1.0),
        ("reflective_prompt", "<solution>\na\n</solution>\n<check>\nb\n</check>", 0.75),
        ("reflective_prompt-teacher", "a\n</solution>\n<check>\nLet's verify step by step\n</check>", 1.0),
    ],
)
def test_scores_are_those_of_the_paper(name, message, score):
    assert TEMPLATES[name].score(message) == pytest.approx(score)


@given(name=st.sampled_from(sorted(TEMPLATES)), action=st.text(alphabet="ab {}()\n", max_size=30))
def test_what_is_said_in_a_template_scores_1_and_is_read_again(name, action):
    depth = 0
    for character in action:
        depth += (character == "{") - (character == "}")
        assume(depth >= 0)
    assume(depth == 0)
    message = TEMPLATES[name].say(action)
    assert TEMPLATES[name].score(message) == 1.0
    assert boxed(message) == boxed(TEMPLATES[name].opening + message) == action.strip()


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("look", None),
        ("\\boxed{look}", "look"),
        ("\\boxed{a} \\boxed{b}", "b"),
        ("\\boxed{{}", "{"),
        ("\\boxed{look", None),
        ("\\boxed{}", ""),
    ],
)
def test_the_last_box_counts(text, inside):
    assert boxed(text) == inside


def drawn(env: PromptTemplates, number: int, **kwargs) -> list[str]:
    return [env.reset(**kwargs)[1]["template"] for _ in range(number)]


def test_all_templates_are_drawn_about_equally():
    env = PromptTemplates(Sums())
    env.reset(seed=0)
    counts = collections.Counter(drawn(env, 2600))
    assert set(counts) == set(TEMPLATES)
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 32.9  # chi-squared, 12 degrees of freedom, p = 0.001
    assert set(drawn(PromptTemplates(Sums(), templates=("abel", "formal")), 50)) == {"abel", "formal"}


def test_a_group_of_one_task_and_seed_shares_one_template():
    for seed in range(20):
        options = {"task": f"train-{seed + 5}"}
        group = [PromptTemplates(Sums()) for _ in range(3)]
        group[0].reset(seed=99), group[0].reset(), group[1].reset()  # whatever they played before
        assert len({env.reset(seed=seed, options=options)[1]["template"] for env in group}) == 1


def test_no_seed_goes_on_and_a_seed_starts_again():
    env = PromptTemplates(Sums())
    options = {"task": "train-7"}
    first = drawn(env, 1, seed=3, options=options) + drawn(env, 30, options=options)
    assert first == drawn(env, 1, seed=3, options=options) + drawn(env, 30, options=options)
    assert len(set(first)) > 5
    other = PromptTemplates(Sums(), seed=1)
    assert first != drawn(other, 1, seed=3, options=options) + drawn(other, 30, options=options)


def test_a_failed_reset_draws_nothing():
    env, straight = PromptTemplates(Sums()), PromptTemplates(Sums())
    env.reset(seed=1), straight.reset(seed=1)
    with pytest.raises(UsageError):
        env.reset(options={"task": "no such task"})
    with pytest.raises(UsageError, match="unknown template 'abell'; did you mean 'abel'"):
        env.reset(options={"template": "abell"})
    assert drawn(env, 9) == drawn(straight, 9)


def test_draws_are_the_same_in_every_process():
    program = """
import gymnasium, agentropy.envs
from agentropy.envs.wrappers import wrap
env = wrap(gymnasium.make("agentropy/ALFWorld-v0"), "prompt-templates")
print([env.reset(seed=3)[1]["template"], *(env.reset()[1]["template"] for _ in range(9))])
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    env = wrap(gym.make("agentropy/ALFWorld-v0"), "prompt-templates")
    here = [env.reset(seed=3)[1]["template"], *(env.reset()[1]["template"] for _ in range(9))]
    assert said == {f"{here}\n".encode()}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["instructions", "observation"])
def test_an_agent_is_told_what_the_template_asks(name, place):
    template = TEMPLATES[name]
    env = PromptTemplates(Sums(), place=place)
    observation, info = env.reset(seed=0, options={"template": name, "task": "train-9"})
    ending = f"\n{template.ending}" if template.ending else ""
    head = f"{template.system}\n\n" if place == "observation" else ""
    assert observation == f"{head}Reach 9.{ending}"
    told = Sums.instructions if place == "observation" else f"{template.system}\n{Sums.instructions}"
    assert info["instructions"] == told
    assert info["template"] == name and info.get("opening", "") == template.opening
    observation, *_, info = env.step(template.say("add 2"))
    assert observation == f"éé 2, 0 traces{ending}"
    assert info["format_score"] == 1.0 and info.get("opening", "") == template.opening


def test_the_reward_is_the_worlds_and_the_mean_format_score():
    env = PromptTemplates(Quiz())  # one turn: accuracy plus format score, as in the paper
    for message, reward in (
        ("<think>a</think><answer>\\boxed{5}</answer>", 2.0),
        ("<think>a</think><answer>\\boxed{6}</answer>", 1.0),
        ("<think>a</think>\\boxed{5}", 1.5),
        ("5", 1.0),
        ("6", 0.0),
    ):
        env.reset(options={"template": "deepseek-r1", "task": "2+3"})
        assert env.step(message)[1] == reward

    env = PromptTemplates(Sums(max_turns=2), weight=0.5)
    env.reset(options={"template": "deepseek-r1", "task": "train-29"})
    rewards = [step[1] for step in play(env, ["<think>a</think>\\boxed{add 1}", "add 1"])]
    assert rewards == [1 / 8, 2 / 8 + 0.5 * (0.5 + 0.0) / 2]
