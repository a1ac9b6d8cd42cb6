"""What the documentation's build does besides Markdown.

- ``on_files``: add the pages that are generated, so that they cannot be stale.
- ``on_page_markdown``: fill in tables that stand in pages as ``<!-- name: argument -->``; ``FILLINGS`` are these.
- ``command_line``, ``configuration``, ``arguments``, ``challenges``, ``wrappers``: their Markdown. None loads torch.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agentropy import cli, config

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_TYPES = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for path, write in (("reference/cli.md", command_line), ("reference/configuration.md", configuration)):
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated (an event of MkDocs). An unknown name ends the build."""

    def fill(found: re.Match[str]) -> str:
        return FILLINGS[found[1]](found[2] or "")

    return re.sub(r"^<!-- (\w+)(?:: (\S+))? -->$", fill, markdown, flags=re.MULTILINE)


def command_line() -> str:
    """The page of all commands and their options."""
    parser = cli._parser(serving=True)
    lines = [
        "# Command line",
        "",
        "Made from the parsers of the command itself. `agentropy COMMAND --help` prints the same.",
        "",
        "Exit status: 0 on success, 1 when something failed, 2 on wrong input, 130 when interrupted.",
        "",
        "A configuration is built from a TOML file (`--config`), then flags, then `--set`; later ones win. "
        "The options that `--set` reaches are on [the next page](configuration.md).",
    ]
    for names, command in _commands(parser, ()):
        lines += ["", f"## agentropy {' '.join(names)}", "", _sentence(command.description or ""), "", *_usage(command)]
        rows = [
            f"| {_invocation(action)} | {_sentence(action.help or '')}{_default(action)} |"
            for action in command._actions
            if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
        ]
        if rows:
            lines += ["", "| option | meaning |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _commands(
    parser: argparse.ArgumentParser, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command that can be run, depth first, with its help as description where it has none."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if names and (not groups or parser.get_default("run")):
        yield names, parser
    for group in groups:
        told = {choice.dest: choice.help for choice in group._choices_actions}
        for name, command in group.choices.items():
            command.description = command.description or told.get(name)
            yield from _commands(command, (*names, name))


def _usage(command: argparse.ArgumentParser) -> list[str]:
    # The width of the terminal must not matter.
    command.formatter_class = _Wide
    usage = command.format_usage().removeprefix("usage: ").rstrip()
    return ["```", usage.replace("\n       ", "\n"), "```"]


class _Wide(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=88)


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = "" if action.nargs == 0 else f" {action.metavar or _choices(action) or action.dest.upper()}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _choices(action: argparse.Action) -> str:
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""


def _default(action: argparse.Action) -> str:
    unsaid = action.default in (None, argparse.SUPPRESS) or action.default is False or action.default == []
    return "" if unsaid or "default" in (action.help or "") else f" Default `{_cell(str(action.default))}`."


def configuration() -> str:
    """The page of all options of the configuration."""
    lines = [
        "# Configuration",
        "",
        "Made from the schema. In TOML, `section.key` is the key `key` of the table `[section]`; on the command line "
        "it is `--set section.key=VALUE`, where VALUE is TOML or plain text. Unknown keys are errors that name the "
        "nearest valid one. `agentropy train --dry-run` prints the whole configuration, resolved.",
        "",
        "Defaults that depend on the world or the model stand in [a table below](#defaults-that-depend-on-the-world).",
        "",
        "## The run",
        "",
        *_table(config.RunConfig, "", skip=_sections()),
    ]
    for name, schemas in _sections().items():
        for schema in schemas:
            kind = f', `type = "{schema.model_fields["type"].default}"`' if len(schemas) > 1 else ""
            lines += ["", f"## {name}{kind}", ""]
            if schema.__doc__ and schema.__doc__ != config.Section.__doc__:
                lines += [_cell(schema.__doc__), ""]
            lines += _table(schema, f"{name}.", skip=())
    lines += [
        "",
        "## Defaults that depend on the world",
        "",
        "| world | model | option | default |",
        "|---|---|---|---|",
    ]
    for model, table in (
        ("any", config.WORLD_DEFAULTS),
        ("small", config.SMALL_DEFAULTS),
        ("pretrained", config.PRETRAINED_DEFAULTS),
    ):
        for world, values in table.items():
            lines += [f"| `{world}` | {model} | `{key}` | {_value(value)} |" for key, value in _leaves(values)]
    lines += [f"| all but ALFWorld | any | `{key}` | {_value(value)} |" for key, value in _leaves(config.ELSEWHERE)]
    lines += [
        "",
        "## Options of recipes that a run sets",
        "",
        "Unless `algorithm.overrides` or `algorithm.preset` is given. Of composed recipes, those that all parts share.",
        "",
        "| recipe | `algorithm.overrides` |",
        "|---|---|",
        *(f"| `{name}` | {_value(values)} |" for name, values in config.RUN_OVERRIDES.items()),
    ]
    return "\n".join(lines) + "\n"


def arguments(path: str) -> str:
    """The arguments of ``module:Class``, with their defaults and what the docstring says of them."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name).__init__
    told = _documented(inspect.getdoc(function) or "")
    rows = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        meaning = told.get(stars + parameter.name) or told.get(parameter.name, "")
        rows.append(f"| `{stars}{parameter.name}` | {default} | {_sentence(meaning)} |")
    return "\n".join(["| argument | default | meaning |", "|---|---|---|", *rows])


def _documented(docstring: str) -> dict[str, str]:
    """What the section ``Args`` of a docstring says of each argument."""
    found = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.findall(r"^    (\*{0,2}\w+): ((?:.*\n?)(?:[ ]{5,}.*\n?)*)", found[1] if found else "", re.MULTILINE)
    return dict(entries)


def challenges(_: str = "") -> str:
    """The options of TextWorld's challenges."""
    from agentropy.envs.textworld.challenges import CHALLENGES

    lines = ["| challenge | option | default | allowed | meaning |", "|---|---|---|---|---|"]
    for challenge, options in CHALLENGES.items():
        for name, option in options.items():
            values = option.allowed
            listed = ", ".join(f"`{value!r}`" for value in values)
            allowed = f"{values[0]} to {values[-1]}" if isinstance(values, range) else listed
            lines.append(
                f"| `{challenge}` | `{name}` | `{option.default!r}` | {allowed} | {_sentence(option.meaning)} |"
            )
    return "\n".join(lines)


def wrappers(_: str = "") -> str:
    """Every wrapper with its options."""
    from agentropy.envs.wrappers import WRAPPERS

    lines = ["| name | what it does | options and defaults |", "|---|---|---|"]
    for name, wrapper in sorted(WRAPPERS.items()):
        options = list(inspect.signature(wrapper.__init__).parameters.values())[2:]
        listed = ", ".join(f"`{option.name}={option.default!r}`" for option in options)
        what = (inspect.getdoc(wrapper) or "").partition("\n\n")[0]
        lines.append(f"| `{name}` | {_sentence(what)} | {listed} |")
    return "\n".join(lines)


def _sections() -> dict[str, tuple[type[BaseModel], ...]]:
    """The sections of a run by name; the model has a schema for each of its types."""
    found: dict[str, tuple[type[BaseModel], ...]] = {}
    for name, field in config.RunConfig.model_fields.items():
        schemas = [kind for kind in get_args(field.annotation) or (field.annotation,) if isinstance(kind, type)]
        if schemas and all(issubclass(kind, BaseModel) for kind in schemas):
            found[name] = tuple(schemas)
    return found


def _table(schema: type[BaseModel], prefix: str, skip: Mapping[str, Any] | tuple[()]) -> list[str]:
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema.model_fields.items():
        if name in skip:
            continue
        default = "required" if field.is_required() else _value(field.default)
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {default} | {_sentence(field.description or '')} |")
    return rows


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(part, name):g}"
        for part in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(part, name, None) is not None
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        kinds = [_kind(kind) for kind in arguments if kind is not type(None)]
        return " or ".join(kinds) + (" or unset" if type(None) in arguments else "")
    if origin is dict:
        return "table"
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}" if arguments else "list"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f"`{choice.value}`" for choice in annotation)
    name = getattr(annotation, "__name__", str(annotation))
    return _TYPES.get(name, name)


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {_plain(item)}" for key, item in value.items())
        return f"`{{{inner}}}`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """As TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_plain(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options below ``values`` with their full names; tables that are given as a whole are leaves."""
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in config._WHOLE:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sentence(text: str) -> str:
    text = _cell(text)
    text = text[:1].upper() + text[1:] if not text.startswith("`") else text
    return text if not text or text.endswith((".", "!", "?")) else text + "."


def _cell(text: str) -> str:
    """One line that may stand in a table."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


FILLINGS: dict[str, Callable[[str], str]] = {
    "arguments": arguments,
    "challenges": challenges,
    "wrappers": wrappers,
}
