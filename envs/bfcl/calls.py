"""Function calls as a model writes them.

- ``Call``: a function's name and its arguments.
- ``Message``: what an action holds: calls, or none where it is a message to the user.
- ``read``: find the calls in a text, whatever text it is.
- ``write``: a text that ``read`` reads as these calls.
- ``FORMS``: the forms that ``write`` knows; ``read`` knows all of them always.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMS = ("hermes", "json", "python")
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_TAG = re.compile(r"</think>|</?tool_call>")
_PYTHON = re.compile(r"\[?\s*[A-Za-z_][\w.]*\s*\(")
_DEEPEST = 32
"""Levels of lists and dictionaries in an argument."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function's name and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[Any, ...] = ()
    """Those without a name, which only the Python form has."""


@dataclass(frozen=True, slots=True)
class Message:
    """What an action holds."""

    calls: tuple[Call, ...] = ()
    problem: str | None = None
    """Why something that looks like a call is none."""


class _MalformedError(ValueError):
    """Something that looks like a call is none."""


def read(text: str) -> Message:
    """Return the calls in ``text``.

    They are JSON objects ``{"name": ..., "arguments": {...}}`` in ``<tool_call>`` tags with any text around them
    (Hermes, Qwen), or all of the message: one such object, a list of them, or Python calls as BFCL's own prompt asks
    for, ``[ls(a=True), cd(folder="x")]``. Thoughts before ``</think>`` and a code fence around the message are left
    out. ``"parameters"`` and ``"function"`` are read for ``"arguments"`` and ``"name"``, and arguments may be a JSON
    text, as in the messages of OpenAI's interface.

    >>> read('I look. <tool_call>{"name": "ls", "arguments": {"a": true}}</tool_call>').calls
    (Call(name='ls', arguments={'a': True}, positional=()),)
    >>> read("All done.")
    Message(calls=(), problem=None)
    """
    text = text.rpartition("</think>")[2]
    blocks = _BLOCK.findall(text)
    if blocks:
        return _collect(lambda block: list(_from_json(_parsed(block))), blocks)
    body = text.strip()
    if body.startswith("```") and body.endswith("```"):
        body = body.partition("\n")[2]
    body = body.strip("`\n\t ")
    if _PYTHON.match(body) and body[-1] in ")]":
        message = _collect(_from_python, [body])
        # A sentence may look like a call: "Sorry (no such file)".
        return message if message.calls or body.startswith("[") else Message()
    if body.startswith(("{", "[")):
        return _collect(lambda block: list(_from_json(_parsed(block))), [body])
    return Message()


def write(calls: Iterable[Call], form: str = "hermes") -> str:
    """Return ``calls``, whose arguments all have names, in one of ``FORMS``.

    >>> write([Call("cd", {"folder": "x"})], "python")
    "[cd(folder='x')]"
    """
    if form == "python":
        written = (f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})" for call in calls)
        return _without_tags(f"[{', '.join(written)}]", "\\x3c")
    values = ({"name": call.name, "arguments": dict(call.arguments)} for call in calls)
    texts = [_without_tags(json.dumps(value, ensure_ascii=False), "\\u003c") for value in values]
    if form == "json":
        return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def _without_tags(text: str, escape: str) -> str:
    """Write the brackets of tags, which only arguments can have here, as escapes."""
    return _TAG.sub(lambda tag: escape + tag[0][1:], text)


def _collect(parse: Any, texts: Iterable[str]) -> Message:
    """Return what ``parse`` finds in each text, and the first problem."""
    calls: list[Call] = []
    problem: str | None = None
    for text in texts:
        try:
            calls += parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError) as error:
            problem = problem or _explained(error)
    return Message(tuple(calls), problem)


def _explained(error: BaseException) -> str:
    if isinstance(error, _MalformedError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at character {error.pos}"
    if isinstance(error, SyntaxError):
        return f"not a valid list of calls: {error.msg}"
    return "a call is too large or nested too deeply"


def _parsed(text: str) -> Any:
    return json.loads(text.strip())


def _from_json(value: Any) -> Iterator[Call]:
    """Yield the calls of a JSON value."""
    if isinstance(value, list):
        for each in value:
            if not isinstance(each, dict):
                raise _MalformedError("each call must be a JSON object")
            yield from _from_json(each)
        return
    if not isinstance(value, dict):
        raise _MalformedError("a call must be a JSON object")
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or not name:
        raise _MalformedError('a call needs "name", the name of a function')
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _MalformedError('"arguments" must be a JSON object')
    _check(arguments)
    yield Call(name, arguments)


def _from_python(text: str) -> list[Call]:
    """Return the calls of a Python expression, which is parsed and never run."""
    if len(text) > 1 << 16:
        raise _MalformedError("the message is too long")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the model's strings
        body = ast.parse(text, mode="eval").body
    return [_python_call(node) for node in (body.elts if isinstance(body, ast.List) else [body])]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise _MalformedError("each element of the list must be a call")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _MalformedError("** is not allowed in a call")
        arguments[keyword.arg] = _literal(keyword.value)
    positional = tuple(_literal(value) for value in node.args)
    _check(arguments)
    _check(positional)
    return Call(ast.unparse(node.func), arguments, positional)


def _literal(node: ast.expr) -> Any:
    """Return a literal's value; a bare word is a text, as the benchmark's own decoder reads it."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise _MalformedError("arguments must be literals") from error


def _check(value: Any) -> None:
    """Raise unless ``value`` is made of what JSON has, in few levels.

    Other values, such as sets, print in another order in another process.
    """
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise _MalformedError(f"arguments may be nested {_DEEPEST} levels deep")


def _inside(value: Any) -> Iterable[Any]:
    if value is None or isinstance(value, str | int | float):
        return ()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return (*value, *value.values())
    raise _MalformedError(f"arguments must be of JSON's types, not {type(value).__name__}")
