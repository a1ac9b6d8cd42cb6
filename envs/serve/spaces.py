"""Spaces of texts, as plain values.

- ``describe_space``, ``build_space``: to them and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymnasium.spaces import Space, Text

from ...errors import UsageError
from ..text import TextSpace


def describe_space(space: Space[Any], env_id: str) -> dict[str, Any]:
    """Return a space of texts as plain values, for ``build_space``.

    Raises:
        UsageError: it is a space of something else.
    """
    if isinstance(space, TextSpace):
        return {"max_length": space.max_length}
    if isinstance(space, Text):
        return {
            "max_length": space.max_length,
            "min_length": space.min_length,
            "charset": "".join(sorted(space.character_set)),
        }
    raise UsageError(f"'{env_id}' cannot be served: its {type(space).__name__} space is none of texts")


def build_space(description: Mapping[str, Any]) -> Text:
    """Return the space that ``describe_space`` described."""
    if "charset" in description:
        return Text(**description)
    return TextSpace(**description)
