"""Gymnasium wrappers for text worlds; a wrapped world is a text world again, and can be forked in mid-episode.

- ``WRAPPERS``: every wrapper by the name that configurations use.
- ``wrap``: put wrappers around an environment.
- ``wrapper_specs``: the same as Gymnasium's ``WrapperSpec``, for ``EnvSpec.additional_wrappers``: other processes
  build the same stack from it.

>>> WRAPPERS["turn-cost"].__name__
'TurnCost'
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import WrapperSpec

from ...errors import UsageError, nearest
from .actions import FormatCheck
from .base import WorldWrapper, WrapperSnapshot
from .observations import HistoryWindow, ObservationCap, Reminder
from .prompts import PromptTemplates
from .retry import Retry, RetryInvalid
from .rewards import ToolPenalty, TurnCost

__all__ = [
    "WRAPPERS",
    "FormatCheck",
    "HistoryWindow",
    "ObservationCap",
    "PromptTemplates",
    "Reminder",
    "Retry",
    "RetryInvalid",
    "ToolPenalty",
    "TurnCost",
    "WorldWrapper",
    "WrapperSnapshot",
    "wrap",
    "wrapper_specs",
]

WRAPPERS: dict[str, type[WorldWrapper]] = {
    wrapper.name: wrapper
    for wrapper in (
        FormatCheck,
        HistoryWindow,
        ObservationCap,
        PromptTemplates,
        Reminder,
        Retry,
        RetryInvalid,
        ToolPenalty,
        TurnCost,
    )
}

Spec = str | Mapping[str, Any]
"""A name, or a mapping with ``name`` and the wrapper's options."""


def wrap(env: gymnasium.Env[str, str], specs: Spec | Sequence[Spec]) -> gymnasium.Env[str, str]:
    """Put wrappers around ``env``, the first one innermost.

    The order matters, as each one sees what those inside it make of the world: ``observation-cap`` caps every turn of
    a ``history-window`` from inside and the whole window from outside; ``turn-cost`` counts the turns of all attempts
    of a ``retry`` from outside, and those of each attempt from inside.

    Args:
        env: a text world, wrapped or not.
        specs: wrappers such as ``"turn-cost"`` or ``{"name": "observation-cap", "max_characters": 2000}``.

    Raises:
        UsageError: an unknown wrapper or option, or a value that the wrapper refuses.
    """
    for wrapper, options in _resolve(specs):
        env = wrapper(env, **options)
    return env


def wrapper_specs(specs: Spec | Sequence[Spec]) -> tuple[WrapperSpec, ...]:
    """Return ``specs`` for ``EnvSpec.additional_wrappers``, from which ``gymnasium.make`` builds the stack.

    Values that a wrapper refuses show when it is made.

    >>> wrapper_specs("turn-cost")[0].entry_point
    'agentropy.envs.wrappers.rewards:TurnCost'

    Raises:
        UsageError: an unknown wrapper or option.
    """
    return tuple(wrapper.wrapper_spec(**options) for wrapper, options in _resolve(specs))


def _resolve(specs: Spec | Sequence[Spec]) -> list[tuple[type[WorldWrapper], dict[str, Any]]]:
    resolved = []
    for spec in [specs] if isinstance(specs, (str, Mapping)) else specs:
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("name", None)
        if name is None:
            raise UsageError(f"a wrapper needs a name, and this has none: {spec!r}")
        if name not in WRAPPERS:
            raise UsageError(f"unknown wrapper {name!r}{nearest(str(name), WRAPPERS)}")
        known = [
            option for option in inspect.signature(WRAPPERS[name].__init__).parameters if option not in ("self", "env")
        ]
        for option in options:
            if option not in known:
                raise UsageError(f"unknown option {option!r} of the wrapper {name!r}{nearest(str(option), known)}")
        resolved.append((WRAPPERS[name], options))
    return resolved
