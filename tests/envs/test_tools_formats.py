"""Reading calls, checking arguments and answers, calculating: exact, and with a message for everything else."""

from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.tools.answers import number, same_answer
from agentropy.envs.tools.builtin import CalculatorTool, SearchTool
from agentropy.envs.tools.calculator import CalculatorError, calculate
from agentropy.envs.tools.formats import (
    FORMATS,
    MAX_CALLS,
    Answer,
    Call,
    Mistake,
    describe_tools,
    parse,
    write_answer,
    write_call,
)
from agentropy.envs.tools.protocol import FunctionTool, Tool, ToolError
from agentropy.errors import UsageError


class Python(Tool):
    name, description = "python", "run code"
    schema = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}  # noqa: RUF012

    def call(self, arguments):
        return str(arguments)


def distance(x: float, y: float = 0.0, unit: Literal["km", "m"] = "km") -> str:
    """Say how far a point is.

    It is no more than that.

    Args:
        x: to the east.
        y (float): to the north.
    """
    return f"{(x**2 + y**2) ** 0.5:g} {unit}"


TOOLS = {tool.name: tool for tool in (Python(), CalculatorTool(), FunctionTool(distance))}


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("<python>1 + 1</python>", [Call("python", {"code": "1 + 1"})]),
        ("I think.\n<python>\nif x:\n    y\n</python> so", [Call("python", {"code": "if x:\n    y"})]),
        ("<python>```python\nx = 1\nx\n```</python>", [Call("python", {"code": "x = 1\nx"})]),
        ("<python> 1 </python>", [Call("python", {"code": "1"})]),
        ("<calculator>2 < 3</calculator>", [Call("calculator", {"expression": "2 < 3"})]),
        ('<distance>{"x": 3, "y": 4}</distance>', [Call("distance", {"x": 3, "y": 4})]),
        ("<answer> 42 </answer>", Answer("42")),
        ("<think><python>no</python></think><answer>42</answer>", Answer("42")),
        ("<python>1</python><calculator>2</calculator>", [Call("python", {"code": "1"}),
        Call("calculator", {"expression": "2"})]),
        ("<python>1</python> so <answer>1</answer>", [Call("python", {"code": "1"})]),
        ("<answer></answer>", Answer("")),
        ("<python>print('<answer>')</python>", [Call("python", {"code": "print('<answer>')"})]),
    ],
)  # fmt: skip
def test_tagged_actions(action, said):
    assert parse(action, TOOLS, "tagged") == said


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ('<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>', [Call("python", {"code": "1"})]),
        ('{"name": "distance", "arguments": {"x": 1}}', [Call("distance", {"x": 1})]),
        ('```json\n{"name": "distance", "parameters": {"x": 1}}\n```', [Call("distance", {"x": 1})]),
        ('{"name": "python", "arguments": "{\\"code\\": \\"1\\"}"}', [Call("python", {"code": "1"})]),
        ('{"name": "answer", "arguments": {"answer": 42}}', Answer("42")),
        ("<answer>42</answer>", Answer("42")),
        (
            '<tool_call>{"name": "python", "arguments": {"code": "a\nb"}}</tool_call>',
            [Call("python", {"code": "a\nb"})],
        ),
        (
            '<tool_call>{"name": "distance", "arguments": {}}</tool_call><answer>1</answer>',
            [Call("distance", {})],
        ),
    ],
)
def test_json_actions(action, said):
    assert parse(action, TOOLS, "json") == said


@pytest.mark.parametrize(
    ("form", "action", "message"),
    [
        ("tagged", "<python>1 + 1", "<python> is not closed: end it with </python>."),
        ("tagged", "", "Call a tool (<python>…</python>, <calculator>…</calculator>, <distance>…</distance>) or"),
        ("tagged", "<pyhton>1</pyhton>", "There is no tool <pyhton>; did you mean 'python'?. Call a tool"),
        ("tagged", "<distance>3</distance>", "The arguments of distance must be a JSON object, not a number."),
        ("tagged", "<distance>{x: 3}</distance>", "The call is not valid JSON: Expecting property name"),
        ("tagged", "<python>1</python>" * (MAX_CALLS + 1), f"{MAX_CALLS + 1} calls in one turn; make at most"),
        ("json", "so it is 42", "Call a tool (python, calculator, distance) with <tool_call>"),
        ("json", '<tool_call>{"name": "pyton"}</tool_call>', "There is no tool 'pyton'; did you mean 'python'?"),
        ("json", '<tool_call>{"nam": 1}</tool_call>', 'A tool call is a JSON object {"name": …, "arguments": {…}}.'),
        ("json", '<tool_call>{"name": "python"', "<tool_call> is not closed"),
        ("json", '<tool_call>{"name": "python", "arguments": [1]}</tool_call>', "must be a JSON object, not a list."),
        ("json", "<tool_call>" + "[" * 100_000 + "</tool_call>", "The call is not valid JSON"),
        ("json", "<tool_call>" + "9" * 10_000 + "</tool_call>",
        "The call is not valid JSON: nested too deeply, or a number"),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(form, action, message):
    (said,) = parse(action, TOOLS, form)
    assert isinstance(said, Mistake) and message in said.message


@given(st.text(alphabet="<>/{}[]\"':,. abpython_toolcalnswer\n`\\1", max_size=200), st.sampled_from(FORMATS))
def test_any_text_is_read(action, form):
    said = parse(action, TOOLS, form)
    assert isinstance(said, Answer) or said


@given(st.text(min_size=1).map(str.strip).filter(lambda t: t and "</" not in t and not t.startswith("```")))
def test_what_is_written_is_read_again(text):
    for form in FORMATS:
        call = Call("calculator", {"expression": text})
        (said,) = parse(write_call(call, TOOLS, form), TOOLS, form)
        assert said == call or "<think>" in text
        assert parse(write_answer(text), TOOLS, form) == Answer(text) or "<think>" in text


def test_instructions_list_every_tool_and_its_arguments():
    for form in FORMATS:
        told = describe_tools(TOOLS, form)
        assert all(name in told for name in TOOLS)
        assert "to the north" in told and "<answer>" in told


def test_a_functions_schema_comes_from_its_hints_and_docstring():
    tool = FunctionTool(distance)
    assert tool.description == "Say how far a point is."
    assert tool.schema == {
        "type": "object",
        "properties": {
            "x": {"type": "number", "description": "to the east."},
            "y": {"type": "number", "default": 0.0, "description": "to the north."},
            "unit": {"type": "string", "enum": ["km", "m"], "default": "km"},
        },
        "required": ["x"],
        "additionalProperties": False,
    }
    assert tool.call({"x": 3, "y": 4}) == "5 km"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "distance: x: Missing required argument"),
        ({"x": "far"}, "distance: x: Input should be a valid number"),
        ({"x": 1, "z": 1}, "distance: z: Unexpected keyword argument"),
        ({"x": 1, "unit": "mile"}, "distance: unit: Input should be 'km' or 'm'"),
        ({"x": 1e200}, "OverflowError"),
    ],
)
def test_wrong_arguments_and_failures_are_messages(arguments, message):
    with pytest.raises(ToolError, match=message):
        FunctionTool(distance).call(arguments)


def test_results_are_text():
    def pair(a: int) -> dict[str, list[int]]:
        return {"pair": [a, a]}

    def nothing() -> None:
        """Return nothing."""

    assert FunctionTool(pair).call({"a": 2}) == '{"pair":[2,2]}'
    assert FunctionTool(nothing).call({}) == "null"


async def later(x: int) -> int:
    return x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, "cannot be called '<lambda>'"),
        (later, "is asynchronous"),
        (print, "cannot be passed by name"),
    ],
)
def test_functions_that_are_no_tools_are_refused(function, message):
    with pytest.raises(UsageError, match=message):
        FunctionTool(function)


def test_a_parameter_needs_a_hint():
    def half(x):
        return x

    with pytest.raises(UsageError, match="parameter 'x' has no type hint"):
        FunctionTool(half)


class Shelf:
    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        return [[{"title": "Ada", "text": "wrote programs."}, {"title": "", "text": "other"}][:k] for _ in queries]


def test_search_shows_numbered_passages():
    shelf = Shelf()
    tool = SearchTool(shelf, passages=2)
    assert tool.call({"query": " who? "}) == "[1] Ada: wrote programs.\n[2] other"
    assert shelf.asked == [(["who?"], 2)]
    with pytest.raises(ToolError, match="query is empty"):
        tool.call({"query": " "})
    with pytest.raises(ToolError, match="'query' is missing"):
        tool.call({})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"), ("0.1 + 0.2", "0.3"), ("1/3", "0.333333333333"), ("1/3*3", "1"), ("2^10", "1024"),
        ("-2^2", "-4"), ("2^3^2", "512"), ("2^-1", "0.5"), ("20% * 50", "10"), ("17 % 5", "2"), ("-7 // 2", "-4"),
        ("5!", "120"), ("sqrt(16) + sqrt(1/4)", "4.5"), ("round(2.567, 2)", "2.57"), ("max(3, 1, 2)", "3"),
        ("1,234,567 + 1", "1234568"), ("$3.50 × 4 =", "14"), ("2(", None), ("10 ÷ 4", "2.5"), ("1e3", "1000"),
        ("gcd(12, 18) + lcm(4, 6)", "18"), ("mod(17, 5)", "2"), ("[(1 + 2) * 3]", "9"), ("pi", "3.14159265359"),
        ("2**0.5", "1.41421356237"), ("123456789 * 987654321", "121932631112635269"), ("0.1**20", "1e-20"),
    ],
)  # fmt: skip
def test_calculations(expression, value):
    if value is None:
        with pytest.raises(CalculatorError):
            calculate(expression)
    else:
        assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "nothing to calculate"), ("1/0", "division by zero"), ("5 % 0", "division by zero"), ("0^-1",
        "division by zero"),
        ("9**9**9", "too large"), ("9**999999999999", "too large"), ("10**5000*10**5000", "too large"),
        ("1e9999*1e9999", "too large"), ("1001!", "0 to 1000"), ("exp(1000)", "too large"), ("sqrt(-1)",
        "no square root"),
        ("(-8)^(1/3)", "no such power"), ("(1", "expected '\\)'"), ("1 2", "unexpected '2'"), ("import os",
        "unknown name"),
        ("__import__('os')", "unexpected"), ("log(0)", "log has no value"), ("sin(1, 2)", "another number of values"),
        ("(" * 1000, "nested too deeply"), ("1+" * 1500 + "1", "may have 2000 characters"), ("2^" * 900 + "2",
        "nested|too large"),
    ],
)  # fmt: skip
def test_calculations_without_a_value_say_why(expression, message):
    with pytest.raises(CalculatorError, match=message):
        calculate(expression)


@given(st.text(alphabet="0123456789.+-*/%^()!, esqrtmaxpi", max_size=60))
def test_the_calculator_always_answers(expression):
    try:
        assert calculate(expression)
    except CalculatorError as error:
        assert str(error)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.integers(1, 10**4), st.sampled_from("+-*/"))
def test_the_calculator_agrees_with_fractions(a, b, c, sign):
    values = {"+": Fraction(a + b), "-": Fraction(a - b), "*": Fraction(a * b), "/": Fraction(a, b) if b else None}
    exact = values[sign]
    if exact is not None:
        assert float(calculate(f"(({a}) {sign} ({b})) / {c}")) == pytest.approx(float(exact / c), rel=1e-11, abs=1e-12)


SAME = [
    ("72", "72"), ("72.0", "72"), ("$1,000.00", "1000"), ("1 000", "1000"), ("72 clips", "72"), ("-$5", "-5"),
    ("−5", "-5"),
    ("50%", "50"), ("1/2", "0.5"), ("½", "0.5"), ("3 1/2", "3.5"), ("1e3", "1000"), ("\\boxed{72}", "72"),
    ("$72$", "72"),
    ("\\frac{3}{4}", "0.75"), ("The answer is 72.", "72"), ("= 72", "72"), ("10 km/h", "10"), ("2 cm²", "2"),
    ("72°", "72"),
    ("71.9999999", "72"), ("07", "7"), ("0.3333333", "1/3"), ("Yes.", "yes"), ("[1, 2,3]", "[1,2, 3]"), ("Café",
    "cafe"),
    ("'Bob'", "Bob"), ("new  York", "New York"), ("2024-01-05", "2024-01-05"), ("+7", "7"),
]  # fmt: skip
DIFFERENT = [
    ("72 or 73", "72"), ("73", "72"), ("", "72"), ("", "yes"), ("7 2", "72"), ("1000.5", "1000"), ("1000001",
    "1000000"),
    ("0.33", "1/3"), ("12:30", "12"), ("5 apples and 3 pears", "5"), ("1/0", "0"), ("nan", "0"), ("inf", "0"),
    ("9" * 5000, "9"), ("1e999", "1"), ("no", "yes"), ("2024-01-06", "2024-01-05"), ("-5", "5"), ("1,23", "123"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), SAME)
def test_the_same_answer_in_other_words(answer, expected):
    assert same_answer(answer, expected)


@pytest.mark.parametrize(("answer", "expected"), DIFFERENT)
def test_other_answers(answer, expected):
    assert not same_answer(answer, expected)


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_two_texts_compare_in_both_directions(one, other):
    assert same_answer(one, other) in (True, False)
    if number(one) is None and number(other) is None:
        assert same_answer(one, other) == same_answer(other, one)


@given(st.integers(-(10**30), 10**30))
def test_whole_numbers_are_compared_exactly(value):
    assert same_answer(f"{value:,}", str(value)) and not same_answer(str(value + 1), str(value))
