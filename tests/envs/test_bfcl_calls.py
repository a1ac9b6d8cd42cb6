"""Function calls are read in every form that models write, and nothing else is taken for one."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentropy.envs.bfcl.calls import FORMS, Call, Message, read, write

LS = Call("ls", {"a": True})
CD = Call("cd", {"folder": "x"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
NAMES = st.from_regex(r"[a-z]+_[a-z0-9]+", fullmatch=True)  # with an underscore: no keyword of Python
CALLS = st.lists(st.builds(Call, NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=4)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "ls", "arguments": {"a": true}}\n</tool_call>\n'
        '<tool_call>\n{"name": "cd", "arguments": {"folder": "x"}}\n</tool_call>',
        'I look.<tool_call>{"name":"ls","arguments":{"a":true}}</tool_call> and <tool_call>{"name":"cd",'
        '"arguments":{"folder":"x"}}',
        '<tool_call>[{"name": "ls", "arguments": {"a": true}}, '
        '{"name": "cd", "arguments": {"folder": "x"}}]</tool_call>',
        '[{"name": "ls", "arguments": {"a": true}}, {"name": "cd", "arguments": {"folder": "x"}}]',
        '```json\n[{"function":"ls","parameters":{"a":true}},{"function":"cd","parameters":{"folder":"x"}}]\n```',
        '[{"type": "function", "function": {"name": "ls", "arguments": "{\\"a\\": true}"}}, '
        '{"function": {"name": "cd", "arguments": {"folder": "x"}}}]',
        "[ls(a=True), cd(folder='x')]",
        '```python\n[ls(a=True), cd(folder="x")]\n```',
        "<think>[rm(file_name='all')] would be wrong.</think>\n\n[ls(a=True), cd(folder=x)]",
    ],
)
def test_all_forms_are_read_alike(text):
    assert read(text) == Message((LS, CD))


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "pwd"}', Call("pwd")),
        ('{"name": "pwd", "arguments": ""}', Call("pwd")),
        ("pwd()", Call("pwd")),
        ("cd('x')", Call("cd", {}, ("x",))),
        ("f(a=-1.5, b=(1, 2), c={'k': [None]})", Call("f", {"a": -1.5, "b": (1, 2), "c": {"k": [None]}})),
    ],
)
def test_a_single_call_needs_no_list(text, call):
    assert read(text) == Message((call,))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Done.",
        "I will call ls(a=True) now.",
        "Sorry (there is no such file).",
        "<think>[ls(a=True)]</think>",
        "[]",
        "...",
        "()",
        "```\n```",
    ],
)
def test_a_message_holds_no_call(text):
    assert read(text) == Message()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<tool_call>{"name": "ls", "arguments": {}</tool_call>', "not valid JSON"),
        ('{"name": "ls", "arguments": [1]}', '"arguments" must be'),
        ('{"answer": 3}', 'needs "name"'),
        ('{"name": 3}', 'needs "name"'),
        ("<tool_call>3</tool_call>", "must be a JSON object"),
        ("[1, 2]", "must be a JSON object"),
        ("[ls(a=True), 3]", "must be a call"),
        ("[ls(a=True]", "not a valid list of calls"),
        ("[cat(file_name=find(name='x'))]", "must be literals"),
        ("[ls(**{'a': True})]", "** is not allowed"),
        ("[echo(content={'a', 'b'})]", "not set"),
        ("[echo(content=b'x')]", "not bytes"),
        ('{"name": "echo", "arguments": {"content": ' + "[" * 40 + "]" * 40 + "}}", "nested 32 levels"),
        ("[f(a=" + "[" * 5000 + "]" * 5000 + ")]", "not a valid list of calls"),
        ('{"name": "f", "arguments": {"a": ' + "[" * 50_000 + "]" * 50_000 + "}}", "nested too deeply"),
        ('{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}", "too large"),
        ("[f(a=" + "-" * 60_000 + "1)]", "too large or nested too deeply"),
        ("[f(" + "x" * 70_000 + ")]", "too long"),
    ],
)
def test_what_looks_like_a_call_but_is_none_is_explained(text, problem):
    message = read(text)
    assert message.calls == ()
    assert problem in (message.problem or "")


def test_calls_beside_a_malformed_one_are_kept():
    message = read('<tool_call>{"name": "ls", "arguments": {"a": true}}</tool_call><tool_call>{</tool_call>')
    assert message.calls == (LS,)
    assert "not valid JSON" in (message.problem or "")


@given(calls=CALLS, form=st.sampled_from(FORMS))
def test_what_is_written_is_read_again(calls, form):
    assert read(write(calls, form)).calls == tuple(calls)


@given(text=st.text() | st.text(alphabet="[]{}()<>/\"\\_:,='`- \nabtol01").map(lambda text: "[" + text))
@example("\ud800")
@example("<tool_call>\ud800")
@example("[f(a='\ud800')]")
@example("[f(a='\x00')]")
@example("<tool_call>" * 9000)
@example("```" + "\n" * 100_000 + "```")
@example("[" * 100_000)
@example("{" * 100_000)
@example("x." * 30_000 + "f()")
@example("[f(" + "1+" * 30_000 + "1)]")
def test_no_text_raises(text):
    message = read(text)
    assert isinstance(message, Message)
    json.dumps([dict(call.arguments) for call in message.calls])
