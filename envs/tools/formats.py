"""The two forms in which an agent calls tools, and what it hears when it keeps to neither.

- ``Call``, ``Answer``, ``Mistake``: what one action says.
- ``FORMATS``: the names of the forms. ``parse``: read an action.
- ``write_call``, ``write_answer``, ``write_results``: the same in the other direction.
- ``describe_tools``: the instructions for an agent.

*Tagged*: ``<python>print(6 * 7)</python>``; a tool with one text argument takes it as it is, any other a JSON object.
*JSON*: ``<tool_call>{"name": "python", "arguments": {"code": "print(6 * 7)"}}</tool_call>``, as Hermes and Qwen write
it, or the object alone. An answer is ``<answer>42</answer>`` in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import nearest
from .protocol import Tool

FORMATS = ("tagged", "json")
MAX_CALLS = 8
"""Calls in one action; more are a mistake."""
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCE = re.compile(r"\A\s*```\w*[ \t]*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; its arguments are not checked yet."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The final answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Mistake:
    """An action or a part of one that is neither; the message is for the agent."""

    message: str


def parse(action: str, tools: Mapping[str, Tool], form: str) -> list[Call | Mistake] | Answer:
    """Read an action: its calls in order, or its answer. An answer after a call counts as none.

    What stands in ``<think>`` is no part of it. At least one item is returned.
    """
    text = _THOUGHT.sub("", action)
    return (_parse_tagged if form == "tagged" else _parse_json)(text, tools)


def _elements(
    text: str, tags: Sequence[str], read: Callable[[str, str], Call | Mistake]
) -> list[Call | Mistake] | Answer:
    """Return what ``read`` makes of each element, given its tag and content, up to the answer; or the answer alone."""
    opening = re.compile("<(" + "|".join(map(re.escape, tags)) + ")>")
    items: list[Call | Mistake] = []
    at = 0
    while found := opening.search(text, at):
        name = found[1]
        end = text.find(f"</{name}>", found.end())
        if end < 0:
            items.append(Mistake(f"<{name}> is not closed: end it with </{name}>."))
            break
        content, at = text[found.end() : end], end + len(name) + 3
        if name == "answer":
            if not items:
                return Answer(content.strip())
            break
        items.append(read(name, content))
    return items


def _parse_tagged(text: str, tools: Mapping[str, Tool]) -> list[Call | Mistake] | Answer:
    items = _elements(text, [*tools, "answer"], lambda name, content: _tagged_call(tools[name], content))
    if isinstance(items, Answer):
        return items
    return _checked(items, _missing_tagged(text, tools))


def _tagged_call(tool: Tool, content: str) -> Call | Mistake:
    argument = tool.text_argument
    fence = _FENCE.match(content)
    content = fence[1] if fence else content.strip("\n") if argument else content.strip()
    if argument is not None:
        return Call(tool.name, {argument: content if "\n" in content else content.strip()})
    if not content:
        return Call(tool.name, {})
    return _with_arguments(tool.name, content)


def _missing_tagged(text: str, tools: Mapping[str, Tool]) -> str:
    forms = ", ".join(f"<{name}>…</{name}>" for name in tools)
    unknown = re.search(r"<(\w{1,40})>", text)
    hint = f"There is no tool <{unknown[1]}>" + nearest(unknown[1], tools) + ". " if unknown else ""
    return f"{hint}Call a tool ({forms}) or answer with <answer>…</answer>."


def _parse_json(text: str, tools: Mapping[str, Tool]) -> list[Call | Mistake] | Answer:
    items = _elements(text, ["tool_call", "answer"], lambda _, content: _json_call(content, tools))
    if isinstance(items, Answer):
        return items
    bare = _FENCE.sub(r"\1", text).strip()
    if not items and bare.startswith("{"):
        items.append(_json_call(bare, tools))
    if len(items) == 1 and isinstance(only := items[0], Call) and only.tool == "answer" and "answer" not in tools:
        values = [str(value) for value in only.arguments.values()]
        return Answer(values[0].strip() if values else "")
    example = '<tool_call>{"name": …, "arguments": {…}}</tool_call>'
    return _checked(items, f"Call a tool ({', '.join(tools)}) with {example} or answer with <answer>…</answer>.")


def _json_call(content: str, tools: Mapping[str, Tool]) -> Call | Mistake:
    fence = _FENCE.match(content)
    value = _load(fence[1] if fence else content)
    if isinstance(value, Mistake):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Mistake('A tool call is a JSON object {"name": …, "arguments": {…}}.')
    name = value["name"]
    if name not in tools and name != "answer":
        return Mistake(f"There is no tool {name[:40]!r}{nearest(name[:40], tools)}.")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # as some interfaces write them
        return _with_arguments(name, arguments)
    if not isinstance(arguments, dict):
        return Mistake(f"The arguments of {name} must be a JSON object, not {_kind(arguments)}.")
    return Call(name, arguments)


def _with_arguments(name: str, text: str) -> Call | Mistake:
    arguments = _load(text)
    if isinstance(arguments, Mistake):
        return arguments
    if not isinstance(arguments, dict):
        return Mistake(f"The arguments of {name} must be a JSON object, not {_kind(arguments)}.")
    return Call(name, arguments)


def _load(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        return Mistake(f"The call is not valid JSON: {error.msg} ({where}).")
    except (ValueError, RecursionError):
        return Mistake("The call is not valid JSON: nested too deeply, or a number with too many digits.")


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _checked(items: list[Call | Mistake], missing: str) -> list[Call | Mistake]:
    if not items:
        return [Mistake(missing)]
    if len(items) > MAX_CALLS:
        return [Mistake(f"{len(items)} calls in one turn; make at most {MAX_CALLS}.")]
    return items


def write_call(call: Call, tools: Mapping[str, Tool], form: str) -> str:
    """Return the action that makes ``call``."""
    if form == "json":
        body = json.dumps({"name": call.tool, "arguments": dict(call.arguments)}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"
    argument = tools[call.tool].text_argument
    if argument is None:
        content = json.dumps(dict(call.arguments), ensure_ascii=False)
    else:
        content = str(call.arguments[argument])
    around = "\n" if "\n" in content else ""
    return f"<{call.tool}>{around}{content}{around}</{call.tool}>"


def write_answer(answer: str) -> str:
    """Return the action that answers."""
    return f"<answer>{answer}</answer>"


def write_results(results: Sequence[str], form: str) -> str:
    """Return the observation after some calls."""
    tag = "result" if form == "tagged" else "tool_response"
    return "\n".join(f"<{tag}>\n{result}\n</{tag}>" for result in results)


def describe_tools(tools: Mapping[str, Tool], form: str) -> str:
    """Return the instructions: what the tools are and how they are called."""
    if form == "json":
        schemas = [
            {"type": "function", "function": {"name": name, "description": tool.description, "parameters": tool.schema}}
            for name, tool in tools.items()
        ]
        listed = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
        call = '<tool_call>\n{"name": <name>, "arguments": <JSON object>}\n</tool_call>'
        how = f"Call a tool with a JSON object inside <tool_call></tool_call>:\n{call}\n"
        return (
            f"Solve the task with these tools.\n<tools>\n{listed}\n</tools>\n{how}"
            "Its output comes back in <tool_response></tool_response>. "
            "When you know the answer, write only <answer>the answer</answer>."
        )
    lines = []
    for name, tool in tools.items():
        argument = tool.text_argument
        content = argument if argument is not None else json.dumps(tool.schema, ensure_ascii=False)
        shape = f"<{name}>{content}</{name}>" if argument is not None else f"<{name}>{{…}}</{name}>, JSON of {content}"
        lines.append(f"- {shape}: {tool.description}")
    return (
        "Solve the task with these tools:\n" + "\n".join(lines) + "\nThe output comes back in <result></result>. "
        "When you know the answer, write only <answer>the answer</answer>."
    )
