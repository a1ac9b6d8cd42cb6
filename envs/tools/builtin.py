"""The tools that come with the environment: Python, a calculator, search.

- ``PythonTool``, ``CalculatorTool``, ``SearchTool``.
- ``Retriever``: what search needs: the passages nearest to each of some queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .calculator import CalculatorError, calculate
from .interpreters import Interpreter
from .protocol import Tool, ToolError


def _schema(name: str, description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": description}},
        "required": [name],
        "additionalProperties": False,
    }


def _text(tool: Tool, arguments: Mapping[str, Any], name: str) -> str:
    """Return the one argument of a tool."""
    others = [key for key in arguments if key != name]
    if others:
        raise ToolError(f"{tool.name}: unknown argument {str(others[0])[:40]!r}; it takes {name!r}")
    if name not in arguments:
        raise ToolError(f"{tool.name}: the argument {name!r} is missing")
    value = arguments[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ToolError(f"{tool.name}: {name!r} must be a text")
    return value


class PythonTool(Tool):
    """An interpreter of untrusted Python whose variables live as long as the episode."""

    name = "python"
    description = "run Python code; variables are kept between calls; shows what is printed and the last line's value"
    schema = _schema("code", "Python code")

    def __init__(self, interpreter: Interpreter) -> None:
        """Take the interpreter, which belongs to the tool from now on."""
        self.interpreter = interpreter

    def call(self, arguments: Mapping[str, Any]) -> str:
        ran = self.interpreter.run(_text(self, arguments, "code"))
        if not ran.ok:
            raise ToolError(ran.text)
        return ran.text

    def clear(self) -> None:
        self.interpreter.clear()

    def save(self) -> Any:
        return self.interpreter.save()

    def load(self, state: Any) -> None:
        self.interpreter.load(state)

    def close(self) -> None:
        self.interpreter.close()


class CalculatorTool(Tool):
    """Exact arithmetic."""

    name = "calculator"
    description = "the value of an arithmetic expression, such as (3 + 4) * 2 / 7"
    schema = _schema("expression", "arithmetic: + - * / // % ^ ! ( ) sqrt round min max …")

    def call(self, arguments: Mapping[str, Any]) -> str:
        try:
            return calculate(_text(self, arguments, "expression"))
        except CalculatorError as error:
            raise ToolError(f"calculator: {error}") from error


class Retriever(Protocol):
    """What finds passages."""

    def search(self, queries: Sequence[str], k: int) -> Sequence[Sequence[Any]]:
        """Return for each query its ``k`` best passages, best first; each has ``title`` and ``text``."""
        ...


class SearchTool(Tool):
    """Passages from a corpus."""

    name = "search"
    description = "passages that match a query"
    schema = _schema("query", "what to look for")

    def __init__(self, retriever: Retriever, passages: int = 3) -> None:
        """Take what finds passages, and how many to show."""
        self._retriever, self._passages = retriever, passages

    def call(self, arguments: Mapping[str, Any]) -> str:
        query = _text(self, arguments, "query").strip()[:1000]
        if not query:
            raise ToolError("search: the query is empty")
        try:
            found = self._retriever.search([query], self._passages)[0]
        except Exception as error:
            raise ToolError(f"search failed: {type(error).__name__}: {error}") from error
        return "\n".join(f"[{place}] {_passage(item)}" for place, item in enumerate(found, 1)) or "nothing found"


def _passage(item: Any) -> str:
    """Return title and text of a passage, which a retriever may wrap with its score."""
    passage = getattr(item, "passage", item)
    if isinstance(passage, Mapping):
        title, text = passage.get("title", ""), passage.get("text", passage.get("contents", ""))
    else:
        title, text = getattr(passage, "title", ""), getattr(passage, "text", passage)
    return f"{title}: {text}" if title else str(text)
