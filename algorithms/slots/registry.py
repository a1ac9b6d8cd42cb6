"""The registry of components: what can fill a slot, by name.

- ``register``: add a function or a dataclass to a slot.
- ``use``: make a component by name, with its options bound. ``Component``: a function so bound.
- ``components``: the names of a slot.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import UsageError, nearest

Target = TypeVar("Target", bound=Callable[..., Any])
_REGISTRY: dict[str, dict[str, Callable[..., Any]]] = {}


@dataclass(frozen=True)
class Component:
    """A function of the data with its options bound."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]

    def __call__(self, *data: Any) -> Any:
        return self.function(*data, **self.options)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.options.items())})"


def register(slot: str, name: str) -> Callable[[Target], Target]:
    """Register a function or class; its keyword-only parameters are the component's options."""

    def add(target: Target) -> Target:
        _REGISTRY.setdefault(slot, {})[name] = target
        return target

    return add


def components(slot: str) -> tuple[str, ...]:
    """Names that ``use(slot, …)`` accepts, sorted."""
    return tuple(sorted(_REGISTRY.get(slot, {})))


def use(slot: str, name: str, **options: Any) -> Any:
    """The component ``name`` of ``slot``; an option that is not given keeps its default.

    Raises:
        UsageError: unknown component or option, with the nearest valid one.
    """
    known = _REGISTRY.get(slot, {})
    if name not in known:
        raise UsageError(f"unknown {slot} '{name}'{nearest(name, known)}")
    target = known[name]
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(target).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in defaults:
            hint = nearest(option, defaults) if defaults else "; it has none"
            raise UsageError(f"{slot} '{name}' has no option '{option}'{hint}")
    bound = defaults | options
    if missing := [option for option, value in bound.items() if value is inspect.Parameter.empty]:
        raise UsageError(f"{slot} '{name}' needs the option '{missing[0]}'")
    return target(**options) if isinstance(target, type) else Component(name, target, bound)
