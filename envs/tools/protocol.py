"""What a tool is, and tools made of Python functions.

- ``Tool``: a name, a description, a JSON schema, and a call that returns text.
- ``ToolError``: a call that failed; its message is for the agent.
- ``FunctionTool``: any function with type hints, whose schema pydantic derives.
- ``check_name``, ``explain``, ``as_text``, ``without_titles``: what other kinds of tools need as well.
"""

from __future__ import annotations

import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ...errors import UsageError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}\Z")
RESERVED = ("answer", "think", "result", "tool_call", "tool_response")
_SECTION = re.compile(r"\n\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Note)s?:\s*\n")
_ARGUMENT = re.compile(r"^ {0,8}(\w+)(?: \([^)]*\))?: *(.+)$")


class ToolError(Exception):
    """A call that failed; the agent reads the message."""


class Tool(ABC):
    """Something that an agent can call.

    A tool whose answers depend on earlier calls of the episode defines ``clear``, ``save`` and ``load``, or, where it
    cannot, sets ``replayed``: a snapshot then keeps the actions instead, and coming back plays them again.
    """

    name: str
    description: str
    schema: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    replayed: ClassVar[bool] = False
    """The state can only be brought back by calling again."""

    @abstractmethod
    def call(self, arguments: Mapping[str, Any]) -> str:
        """Return what the agent reads.

        Raises:
            ToolError: the arguments are wrong, or the call failed.
        """

    @property
    def text_argument(self) -> str | None:
        """The one argument, if it is a text: then its tag holds it as it is."""
        properties = self.schema.get("properties", {})
        required = self.schema.get("required", [])
        names = [name for name in properties if name in required] if len(properties) > 1 else list(properties)
        if len(names) == 1 and properties[names[0]].get("type") == "string":
            return str(names[0])
        return None

    def clear(self) -> None:  # noqa: B027
        """Forget the last episode."""

    def save(self) -> Any:
        """Return the state as it is now, picklable; None where there is none."""
        return None

    def load(self, state: Any) -> None:  # noqa: B027
        """Come back to a state that ``save`` returned."""

    def close(self) -> None:  # noqa: B027
        """Free what the tool holds; a second call changes nothing."""


class FunctionTool(Tool):
    """A Python function as a tool. It runs in this process: the function is trusted, its arguments are checked."""

    def __init__(self, function: Callable[..., Any], name: str | None = None, description: str | None = None) -> None:
        """Derive name, description and schema.

        Args:
            function: has type hints; what it returns is shown as text, or as JSON where it is a container.
            name: by default the function's.
            description: by default the first paragraph of its docstring; a Google-style ``Args`` section describes
                the arguments.

        Raises:
            UsageError: a parameter has no type hint or cannot be named, the function is asynchronous, or its name
                cannot be a tag.
        """
        from pydantic import TypeAdapter, validate_call
        from pydantic.errors import PydanticUserError

        self.name = name or str(getattr(function, "__name__", ""))
        check_name(self.name)
        if inspect.iscoroutinefunction(function):
            raise UsageError(f"tool {self.name!r} is asynchronous; wrap it in a function that waits for its result")
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise UsageError(f"tool {self.name!r}: parameter {parameter.name!r} cannot be passed by name")
            if parameter.annotation is parameter.empty:
                raise UsageError(f"tool {self.name!r}: parameter {parameter.name!r} has no type hint")
        try:
            self._call = validate_call(function)
            adapter: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]
            schema = adapter.json_schema()
        except PydanticUserError as error:
            raise UsageError(f"tool {self.name!r} has no JSON schema: {error.message}") from error
        text = "\n" + inspect.cleandoc(function.__doc__ or "")
        body = _SECTION.split(text, maxsplit=1)[0]
        self.description = description or " ".join(body.split("\n\n")[0].split()) or self.name
        for argument, words in _argument_docs(text).items():
            if argument in schema.get("properties", {}):
                schema["properties"][argument].setdefault("description", words)
        self.schema = without_titles(schema)

    def call(self, arguments: Mapping[str, Any]) -> str:
        from pydantic import ValidationError

        try:
            value = self._call(**arguments)
        except ValidationError as error:
            raise ToolError(f"{self.name}: {explain(error)}") from error
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(f"{type(error).__name__}: {error}") from error
        return as_text(value)


def check_name(name: str) -> None:
    """Raise ``UsageError`` unless a tool may have this name."""
    if not NAME.match(name) or name in RESERVED:
        raise UsageError(f"a tool cannot be called {name!r}: expected letters, digits and _ . -, none of {RESERVED}")


def explain(error: Any) -> str:
    """Return pydantic's complaints in one line, without the values."""
    parts = []
    for item in error.errors(include_url=False)[:4]:
        where = ".".join(str(part) for part in item["loc"])
        parts.append(f"{where}: {item['msg']}" if where else str(item["msg"]))
    return "; ".join(parts)


def as_text(value: Any) -> str:
    """Return a result as an agent reads it: texts as they are, containers as JSON."""
    if isinstance(value, str):
        return value
    try:
        from pydantic_core import to_json

        return to_json(value).decode() if value is not None else json.dumps(None)
    except Exception:
        return str(value)


def _argument_docs(docstring: str) -> dict[str, str]:
    parts = _SECTION.split(docstring)
    found: dict[str, str] = {}
    for title, body in zip(parts[1::2], parts[2::2], strict=False):
        if title in ("Args", "Arguments", "Parameters"):
            for line in inspect.cleandoc(body).split("\n"):
                if match := _ARGUMENT.match(line):
                    found[match[1]] = match[2].strip()
    return found


def without_titles(schema: Any) -> Any:
    """Drop the titles that pydantic makes of names; a property that is called ``title`` stays."""
    if isinstance(schema, list):
        return [without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: without_titles(item) for name, item in value.items()}
        if key in ("properties", "$defs") and isinstance(value, dict)
        else without_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }
