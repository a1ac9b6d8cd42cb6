"""Which environments clients may open, and with which arguments.

- ``check``: raise unless an id is served and its arguments are harmless.
- ``TEXTS``: arguments that a client may set to words.

A text may name a file, a program, a module or an address, and what a world does with one happens on the server. So
words are allowed under names that are known to choose among a world's own variants, and other texts where the operator
says so. Numbers and booleans are allowed everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import UsageError, nearest
from . import wire

TEXTS = frozenset(
    {
        "split", "source", "reward", "engine", "expert", "form", "format", "task_types", "task_names", "categories",
        "kinds", "challenge", "simplifications", "documents", "malformed", "retriever", "tools", "interpreter",
    }
)  # fmt: skip
_WORDS = re.compile(r"[\w ,.+-]*")
"""Texts with which no address, no module's function and no file in another folder can be named."""


def check(env_id: Any, arguments: Any, env_ids: Collection[str], allowed: Collection[str]) -> dict[str, Any]:
    """Return the arguments as keywords.

    Raises:
        UsageError: the id is not served, or an argument is not for clients to set.
    """
    if not isinstance(env_id, str):
        raise UsageError(f"env_id must be the id of an environment, not {type(env_id).__name__}")
    if env_id not in env_ids:
        raise UsageError(f"this server has no environment {env_id!r}{nearest(env_id, env_ids)}")
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UsageError("the arguments of an environment are an object of names and values")
    for name, value in arguments.items():
        if name == "render_mode":
            raise UsageError("'render_mode' is for the client's side: the server draws nothing")
        if not ("*" in allowed or name in allowed or _harmless(value, name in TEXTS)):
            raise UsageError(
                f"clients of this server may not set {name!r} of {env_id} to {value!r:.80}, which may name a file or a "
                f"program; its operator can allow it with --allow {name}"
            )
    return dict(arguments)


def key(env_id: str, arguments: Mapping[str, Any]) -> str:
    """Return what environments of one id and equal arguments have in common."""
    return env_id + json.dumps(json.loads(wire.encode(dict(arguments), wire.JSON)), sort_keys=True)


def _harmless(value: Any, words: bool) -> bool:
    """Whether ``value`` holds numbers only, under any names, or also ``words``."""
    if value is None or isinstance(value, bool | int | float):
        return True
    if isinstance(value, str):
        return words and _WORDS.fullmatch(value) is not None
    if isinstance(value, list | tuple):
        return all(_harmless(item, words) for item in value)
    return isinstance(value, dict) and all(_harmless(item, words) for item in value.values())
