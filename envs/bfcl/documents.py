"""What an agent is told of the functions.

- ``PLACES``: where the functions are described: ``documents=`` of the environment.
- ``function_names``: names of the functions of some simulators.
- ``schemas``: JSON schemas of functions as text, one per line.
- ``tool_schemas``: the same as chat templates and model servers take them.
- ``signatures``: names of functions and of their parameters, optional ones with a question mark.
- ``instructions``: the system prompt.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .source import documents

PLACES = ("instructions", "observation", "names", "none")
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""The benchmark's names of types that JSON Schema calls otherwise."""
_EXAMPLES = {
    "hermes": '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    "json": '{"name": <function-name>, "arguments": <args-json-object>}',
    "python": "[function_name1(name1=value1, name2=value2), function_name2(name=value)]",
}
_RULES = """\
You serve a user by calling functions. To call one or more functions, write each call as
{example}
You are then shown the results and may call more. When the request is fulfilled, write a short message without a call; \
the user's next request follows. If no function can do what is asked, or a detail that a call needs is missing, say so \
instead of calling."""
_TOOLS = "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>"


def function_names(root: Path, simulators: Iterable[str]) -> tuple[str, ...]:
    """Return the names of all functions of ``simulators``, in the benchmark's order."""
    return tuple(name for simulator in simulators for name in _schemas(root, simulator))


def schemas(root: Path, simulators: Iterable[str], offered: Container[str]) -> str:
    """Return the schemas of the functions in ``offered`` as text, one per line."""
    listed = (_schemas(root, simulator).items() for simulator in simulators)
    return "\n".join(text for functions in listed for name, text in functions if name in offered)


def tool_schemas(root: Path, simulators: Iterable[str], offered: Container[str]) -> list[dict[str, Any]]:
    """Return ``schemas`` as chat templates and model servers take them."""
    return [json.loads(line) for line in schemas(root, simulators, offered).splitlines()]


def signatures(root: Path, simulators: Iterable[str], offered: Container[str]) -> str:
    """Return the functions and their parameters, such as ``cd(folder), ls(a?)``."""
    listed = []
    for tool in tool_schemas(root, simulators, offered):
        function = tool["function"]
        required = function["parameters"].get("required", ())
        shown = (name if name in required else name + "?" for name in function["parameters"]["properties"])
        listed.append(f"{function['name']}({', '.join(shown)})")
    return ", ".join(listed)


def instructions(form: str, listed: str = "") -> str:
    """Return the system prompt: how calls are written, and the schemas in ``listed`` if there are any."""
    return _RULES.format(example=_EXAMPLES[form]) + (_TOOLS.format(tools=listed) if listed else "")


@cache
def _schemas(root: Path, simulator: str) -> Mapping[str, str]:
    """Return the schema of each function, as one line of text."""
    functions = [_typed(json.loads(line)) for line in (root / documents(simulator)).read_bytes().splitlines()]
    return {function["name"]: json.dumps({"type": "function", "function": function}) for function in functions}


def _typed(schema: Any) -> Any:
    """Return a schema with JSON Schema's names of types."""
    if isinstance(schema, Mapping):
        kind = schema.get("type")
        typed = {key: _typed(value) for key, value in schema.items()}
        return {**typed, "type": _TYPES.get(kind, kind)} if isinstance(kind, str) else typed
    return [_typed(value) for value in schema] if isinstance(schema, list) else schema
