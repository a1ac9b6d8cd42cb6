"""The benchmark's simulators, loaded from its sources and kept from everything that would make them differ.

- ``Simulators``: the simulators of one episode: calls are played on them, and their state is saved and compared.
- ``parameters``: names of a function's parameters, in order.
- ``functions``: names of a simulator's functions.
- ``contained``: whether all of some results have been seen.

The sources run as they are but for four places, which look at the clock, the time zone or the order of a hash table
(``_PATCHES``). A call is looked up by name and made with its arguments; upstream puts it together as a text and
evaluates that, so that an agent can run any expression. Some arguments would keep the machine busy for ever, such as
an exponent of a billion: those are answered by an error (``_GUARDS``).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import pickle
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import localcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .calls import Call
from .source import DOCUMENTS, LONG_CONTEXT, code

STATELESS = frozenset(("MathAPI",))
_PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
_PRIVATE = __name__ + "_"
"""Before the names under which the sources are loaded, so that an installed package is another one."""
_TODAY = "datetime(2026, 3, 23)"
"""When the benchmark's version came out. Travellers born less than 18 years before it are under age."""
_PATCHES = {
    "gorilla_file_system": [("datetime.datetime.now()", "None")],
    "ticket_api": [
        ("set(updates.keys()) - valid_fields", "[field for field in updates.keys() if field not in valid_fields]")
    ],
    "trading_bot": [
        ("int(start_date.timestamp())", "0"),
        ("int(end_date.timestamp())", "86400"),
        ("datetime.fromtimestamp(random_timestamp)", "start_date + timedelta(seconds=random_timestamp)"),
    ],
    "travel_booking": [("datetime.today()", _TODAY)],
}
_LARGEST_BITS = 1 << 14
"""Of an integer; Python prints none that is longer."""
_MOST_DIGITS = 1000
_LARGE_EXPONENT = re.compile(r"[eE][+-]?[\d_]{5}")
_MOST_ENTRIES = 50_000
_LONGEST_PATHS = 1 << 24
"""Files and folders that a search looks at, and characters in their paths; the benchmark's have some hundreds."""


@cache
def _module(root: Path, name: str) -> ModuleType:
    """Load the source file ``name``."""
    text = (root / code(name)).read_text(encoding="utf-8").replace(_PACKAGE + ".", _PRIVATE)
    for old, new in _PATCHES.get(name, ()):
        if old not in text:
            raise AssertionError(f"{name}.py has no {old!r}")
        text = text.replace(old, new)
    if f"{_PRIVATE}{LONG_CONTEXT} " in text:
        _module(root, LONG_CONTEXT)
    module = ModuleType(_PRIVATE + name)
    module.__file__ = str(root / code(name))
    sys.modules[module.__name__] = module
    exec(compile(text, module.__file__, "exec"), vars(module))
    return module


@cache
def _class(root: Path, simulator: str) -> type[Any]:
    loaded: type[Any] = getattr(_module(root, DOCUMENTS[simulator]), simulator)
    return loaded


@cache
def functions(root: Path, simulator: str) -> tuple[str, ...]:
    """Return the names of a simulator's functions, sorted."""
    methods = inspect.getmembers(_class(root, simulator), inspect.isfunction)
    return tuple(name for name, _ in methods if not name.startswith("_"))


@cache
def parameters(root: Path, simulator: str, function: str) -> tuple[str, ...]:
    """Return the names of a function's parameters, in order."""
    return tuple(inspect.signature(getattr(_class(root, simulator), function)).parameters)[1:]


@cache
def _shared_defaults(root: Path, simulator: str, function: str) -> Mapping[str, Any]:
    """Return the parameters whose default is a list or the like, which Python would share between all calls."""
    signature = inspect.signature(getattr(_class(root, simulator), function))
    return {name: p.default for name, p in signature.parameters.items() if isinstance(p.default, list | dict | set)}


@cache
def _owners(root: Path, simulators: tuple[str, ...]) -> Mapping[str, str]:
    """Return the simulator of each function."""
    return {name: simulator for simulator in simulators for name in functions(root, simulator)}


class Simulators:
    """The simulators of one episode."""

    def __init__(self, root: Path, names: tuple[str, ...], instances: dict[str, Any]) -> None:
        """Take the instances; ``start`` and ``load`` make them."""
        self._root = root
        self._names = names
        self._instances = instances
        self._owners = _owners(root, names)

    @classmethod
    def start(cls, root: Path, names: tuple[str, ...], config: Mapping[str, Any], long_context: bool) -> Simulators:
        """Set up the simulators ``names`` as the benchmark's ``initial_config`` says, which they may then change."""
        instances = {}
        for name in names:
            instance = instances[name] = _class(root, name)()
            if name not in STATELESS:
                instance._load_scenario(config.get(name, {}), long_context=long_context)
        # The long-context variants would share records between episodes; the way through a saved state copies them.
        return cls.load(root, names, cls(root, names, instances).save())

    @classmethod
    def load(cls, root: Path, names: tuple[str, ...], state: bytes) -> Simulators:
        """Set up the simulators in the state that ``save`` returned, in any process."""
        instances = {}
        saved = pickle.loads(state)
        for name in names:
            instance = instances[name] = _class(root, name)()
            attributes = vars(instance)
            attributes.update(saved[name])
            if "_random" in attributes:
                instance._random = random.Random(0)
                instance._random.setstate(saved[name]["_random"])
            if "_tables" in attributes:
                _build(instance, attributes.pop("_tables"), _module(root, DOCUMENTS[name]))
        return cls(root, names, instances)

    def save(self) -> bytes:
        """Return the state: a pickle of nothing but Python's own types."""
        return pickle.dumps(self._plain(), pickle.HIGHEST_PROTOCOL)

    def fingerprint(self) -> str:
        """Return a text that is the same for states in which every call has the same result."""
        return repr(self._plain())

    def play(self, call: Call) -> str:
        """Make a call and return its result as the benchmark writes it; whatever goes wrong is such a result."""
        owner = self._owners.get(call.name)
        if owner is None:
            return _error(f"name {call.name!r} is not defined")
        for value in (*call.positional, *call.arguments.values()):
            if isinstance(value, float) and not math.isfinite(value):
                return _error(f"name {str(value).removeprefix('-')!r} is not defined")
        instance = self._instances[owner]
        names = parameters(self._root, owner, call.name)
        arguments = {**dict(zip(names, call.positional, strict=False)), **call.arguments}
        try:
            if guard := _GUARDS.get(call.name):
                guard(instance, arguments)
            # What is kept in the state must be neither the caller's nor any other call's.
            fresh = _shared_defaults(self._root, owner, call.name)
            named = {name: default for name, default in fresh.items() if name not in arguments}
            named = _copied({**named, **call.arguments})
            if owner not in STATELESS:
                return _text(getattr(instance, call.name)(*_copied(call.positional), **named))
            with localcontext(), _precision():
                return _text(getattr(instance, call.name)(*call.positional, **named))
        except Exception as error:
            return _error(str(error))

    def matches(self, other: Simulators) -> str | None:
        """Return the first simulator whose public state is not that of ``other``; None when all are equal."""
        for name in self._names:
            mine, theirs = vars(self._instances[name]), vars(other._instances[name])
            try:
                if any(mine[key] != value for key, value in theirs.items() if not key.startswith("_")):
                    return name
            except (RecursionError, KeyError):  # a folder that has been put into itself
                return name
        return None

    def _plain(self) -> dict[str, dict[str, Any]]:
        """Return the attributes of each instance, with tables for what has a class of its own."""
        state = {}
        for name, instance in self._instances.items():
            attributes = dict(vars(instance))
            attributes.pop("_api_description", None)
            if name == "GorillaFileSystem":
                attributes["_tables"] = _tables(instance)
                del attributes["root"], attributes["_current_dir"]
            if "_random" in attributes:
                attributes["_random"] = instance._random.getstate()
            state[name] = attributes
        return state


def _text(result: Any) -> str:
    """Write a result as the benchmark does."""
    if type(result) is str:
        return result
    if type(result) is dict:
        try:
            return json.dumps(result)
        except (TypeError, ValueError, RecursionError):
            return str(result)
    return str(result)


def _error(why: str) -> str:
    return f"Error during execution: {why}"


def _copied(value: Any) -> Any:
    """Return a copy of what is made of JSON's types."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def _precision() -> Iterator[None]:
    """Put mpmath's global precision back in the end."""
    import mpmath

    before = mpmath.mp.prec
    try:
        yield
    finally:
        mpmath.mp.prec = before


def _tables(files: Any) -> tuple[Any, ...]:
    """Return a file system as flat tables, whatever is nested in or shared with what."""
    at: dict[int, int] = {}
    nodes: list[Any] = []

    def number(node: Any) -> int:
        if id(node) not in at:
            at[id(node)] = len(nodes)
            nodes.append(node)
        return at[id(node)]

    root, current = number(files.root), number(files._current_dir)
    rows: list[tuple[Any, ...]] = []
    for node in nodes:  # grows as it is walked
        if hasattr(node, "contents"):
            parent = -1 if node.parent is None else number(node.parent)
            rows.append((node.name, parent, [(name, number(child)) for name, child in node.contents.items()]))
        else:
            rows.append((node.name, node.content))
    return root, current, rows


def _build(files: Any, tables: tuple[Any, ...], module: ModuleType) -> None:
    """Undo ``_tables``."""
    root, current, rows = tables
    nodes = [module.File(*row) if len(row) == 2 else module.Directory(row[0]) for row in rows]
    for node, row in zip(nodes, rows, strict=True):
        if len(row) == 3:
            node.parent = nodes[row[1]] if row[1] >= 0 else None
            node.contents = {name: nodes[child] for name, child in row[2]}
    files.root, files._current_dir = nodes[root], nodes[current]


def contained(wanted: Iterable[str], seen: Mapping[str, int]) -> bool:
    """Whether each text is among those seen, as often as it is wanted."""
    return all(seen.get(text, 0) >= times for text, times in Counter(wanted).items())


def _guard_power(_: Any, arguments: Mapping[str, Any]) -> None:
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if not isinstance(base, int) or not isinstance(exponent, int):
        return
    if abs(base) > 1 and base.bit_length() * exponent > _LARGEST_BITS:
        raise ValueError("the result is too large")


def _guard_precision(_: Any, arguments: Mapping[str, Any]) -> None:
    for name in ("precision", "decimal_places"):
        try:
            places = int(arguments.get(name, 0))
        except (TypeError, ValueError, OverflowError):
            continue
        if abs(places) > _MOST_DIGITS:
            raise ValueError(f"{name} must be at most {_MOST_DIGITS}")


def _guard_logarithm(_: Any, arguments: Mapping[str, Any]) -> None:
    _guard_precision(_, arguments)
    for name in ("value", "base"):  # mpmath reads texts, and pairs of mantissa and exponent
        number = arguments.get(name)
        if isinstance(number, tuple) or (isinstance(number, str) and _LARGE_EXPONENT.search(number)):
            raise ValueError(f"{name} must be a number")


def _guard_search(files: Any, _: Mapping[str, Any]) -> None:
    """Folders may share what is in them, so that a few copies make more paths than can be walked."""
    left = [(node, 0) for node in (files.root, files._current_dir)]
    characters = 0
    for _count in range(_MOST_ENTRIES):
        if not left:
            return
        node, length = left.pop()
        characters += length
        if characters > _LONGEST_PATHS:
            break
        left.extend((child, length + len(name) + 1) for name, child in getattr(node, "contents", {}).items())
    raise ValueError("too many files and folders")


_GUARDS: Mapping[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "power": _guard_power,
    "logarithm": _guard_logarithm,
    "square_root": _guard_precision,
    "round_number": _guard_precision,
    "find": _guard_search,
    "du": _guard_search,
}
