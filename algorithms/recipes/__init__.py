"""One file per method; a new file with a registered ``Method`` is a new recipe.

- ``recipe``: make a recipe by name. ``recipes``: the names.
- ``available_presets``: the presets of a name. ``describe``: all about a name, as text for people.
"""

from __future__ import annotations

import importlib
import pkgutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from ...errors import UsageError, nearest
from ..recipe import METHODS, Method, Recipe

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_WIDTH = 100


def recipes() -> tuple[str, ...]:
    """Names that ``recipe`` knows, sorted."""
    return tuple(sorted(METHODS))


def available_presets(name: str) -> tuple[str, ...]:
    """Presets of the last method of ``name``, sorted."""
    return tuple(sorted(METHODS[_parts(name)[-1]].presets))


def recipe(
    name: str,
    preset: str | None = None,
    *,
    total_steps: int = 150,
    slots: Mapping[str, Any] | None = None,
    allow_conflicts: bool = False,
    **overrides: Any,
) -> Recipe:
    """Compose the recipe ``name``; without more, its vetted defaults.

    ``a+b`` composes methods from left to right, the one that can stand alone first, wherever it is named.
    ``total_steps`` is the length of the run in RL steps, for methods with a schedule. An override is an option of one
    of the methods; ``method.option`` where two have it. Methods that contradict each other are refused unless
    ``allow_conflicts``.

    >>> recipe("epo", "corridor", clip_high=0.28).methods["grpo"].clip_high
    0.28

    Raises:
        UsageError: unknown recipe, preset or option, with the nearest valid one, a bad value, or a contradiction.
    """
    parts = _parts(name)
    options: dict[str, dict[str, Any]] = {part: {} for part in parts}
    if preset is not None:
        known = METHODS[parts[-1]].presets
        if preset not in known:
            hint = nearest(preset, known) if known else "; it has none"
            raise UsageError(f"recipe '{name}' has no preset '{preset}'{hint}")
        _route(name, options, known[preset])
    _route(name, options, overrides)
    if total_steps < 1:
        raise UsageError(f"total_steps must be at least 1, not {total_steps}")
    methods = {part: _build(part, values) for part, values in options.items()}
    return Recipe(name, methods, total_steps, preset, slots, allow_conflicts)


def describe(name: str) -> str:
    """Presets, slots, equations, sources and options of a recipe, as lines of text; the first is ``name: summary``.

    Raises:
        UsageError: unknown recipe, with the nearest valid one.
    """
    parts, named = _parts(name), name.split("+")
    told = recipe(name).describe()
    lines = [f"{name}: {'; '.join(METHODS[part].summary for part in named)}"]
    lines += [f"  on top of {part}: {METHODS[part].summary}" for part in parts if part not in named]
    presets = METHODS[parts[-1]].presets
    sections = {
        "presets": _table((preset, _settings(values)) for preset, values in sorted(presets.items())),
        "slots": _table(
            (slot, "; ".join(filling) or "none" if isinstance(filling, list) else filling)
            for slot, filling in told["slots"].items()
        ),
        "equations": [f"  {equation}" for equation in told["equations"]],
        "sources": [f"  {source}" for source in told["sources"]],
    }
    for part in parts:
        sections[f"options of {part}"] = _table(_options(METHODS[part]))
    for title, rows in sections.items():
        if rows:
            lines += ["", title, *rows]
    return "\n".join(lines)


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{option}={value!r}" for option, value in values.items()) or "the defaults"


def _options(method: type[Method]) -> Iterable[tuple[str, str]]:
    """Per option, ``name=default`` and what is known of it."""
    for option, field in method.model_fields.items():
        words = [field.description] if field.description else []
        if get_origin(field.annotation) is Literal:
            words.append(f"One of {', '.join(get_args(field.annotation))}.")
        yield f"{option}={field.default!r}", " ".join(" ".join(words).replace("``", "`").split())


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Two columns, the second one wrapped."""
    rows = list(rows)
    first = 2 + max((len(left) for left, _ in rows), default=0) + 2
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, max(40, _WIDTH - first), break_on_hyphens=False) or [""]
        lines.append(f"  {left}".ljust(first) + wrapped[0])
        lines += [" " * first + line for line in wrapped[1:]]
    return [line.rstrip() for line in lines]


def _parts(name: str) -> list[str]:
    """Methods of ``a+b``: the one that stands alone, by default the first one's base, and then the others in order."""
    named = list(dict.fromkeys(name.split("+")))
    for part in named:
        if part not in METHODS:
            raise UsageError(f"unknown recipe '{part}'{nearest(part, METHODS)}")
    alone = [part for part in named if METHODS[part].base is None]
    if len(alone) > 1:
        raise UsageError(f"recipe '{name}': {' and '.join(alone)} each make a whole method; expected one of them")
    base = METHODS[named[0]].base
    return [*(alone or ([base] if base else [])), *(part for part in named if part not in alone)]


def _route(name: str, options: dict[str, dict[str, Any]], values: Mapping[str, Any]) -> None:
    """Give each value to the method that has the option."""
    for key, value in values.items():
        part, _, option = key.rpartition(".")
        owners = [method for method in options if option in METHODS[method].model_fields and part in ("", method)]
        if not owners:
            every = {field for method in options for field in METHODS[method].model_fields} | {
                "total_steps",
                "slots",
                "allow_conflicts",
            }
            raise UsageError(f"recipe '{name}' has no option '{key}'{nearest(option, every)}")
        if len(owners) > 1:
            raise UsageError(f"option '{key}' belongs to {' and '.join(owners)}; write '{owners[-1]}.{key}'")
        # TOML has no null.
        if value == "none" and type(None) in get_args(METHODS[owners[0]].model_fields[option].annotation):
            value = None
        options[owners[0]][option] = value


def _build(part: str, values: Mapping[str, Any]) -> Method:
    try:
        return METHODS[part](**values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(key) for key in problem["loc"])
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise UsageError(f"option '{where}' of recipe '{part}': {message}, not {problem['input']!r}") from error
