"""Fast Downward's translation of a game, the slowest step of loading one, done once and kept on disk.

- ``Translation``: the ground planning task and what the text needs of the PDDL.
- ``translate``: problem and domain to ``Translation``, through the user's cache folder.

``$AGENTROPY_CACHE`` moves the cache; ``AGENTROPY_CACHE=off`` disables it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import threading
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import fast_downward

from ...errors import EnvironmentFailedError
from ..cache import cache_folder
from .facts import Fact
from .games import Game
from .grammar import Types

_FORMAT = 1
_LOCK = threading.Lock()
"""The translator rewrites ``sys.argv``, ``sys.stdout`` and its own global options."""
_OPERATOR = re.compile(r"^begin_operator\n(.*)$", re.MULTILINE)
_FLUENT = re.compile(r"^(?:Negated)?Atom ([^(\n]+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Translation:
    """A ground planning task."""

    sas: str
    """The task in Fast Downward's format."""
    types: Types
    objects: dict[str, str]
    """Object name to type name."""
    parameters: dict[str, tuple[tuple[str, str], ...]]
    """Per action, its parameters' names (without ``?``) and types."""
    init: tuple[tuple[str, ...], ...]
    """The initial atoms: predicate and arguments."""
    most_effects: int
    """The largest number of effects of any operator."""

    @cached_property
    def operators(self) -> tuple[str, ...]:
        """Ground action per operator id, e.g. ``"look agent1 loc_1"``; several operators can share one."""
        return tuple(_OPERATOR.findall(self.sas))

    @cached_property
    def fluents(self) -> frozenset[str]:
        """The predicates that actions can change."""
        return frozenset(_FLUENT.findall(self.sas))

    @property
    def facts(self) -> list[Fact]:
        """The initial atoms with the types of their arguments."""
        return [((name, tuple(self.objects[arg] for arg in args)), tuple(args)) for name, *args in self.init]


def translate(game: Game) -> Translation:
    """Translate ``game``; a damaged or unwritable cache only costs the time."""
    path = _cache_path(game)
    if path is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, zlib.error):
            return _decode(path.read_bytes())
    translation = _translate(game)
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
            partial.write_bytes(_encode(translation))
            os.replace(partial, path)
    return translation


def _translate(game: Game) -> Translation:
    with _LOCK:
        argv, stdout, collecting = sys.argv, sys.stdout, gc.isenabled()
        gc.disable()  # a quarter of the time: a million small objects, few of them garbage
        try:
            task, sas = fast_downward.pddl2sas(game.domain, game.problem)
        except (Exception, SystemExit) as error:
            raise EnvironmentFailedError(f"game {game.id} cannot be translated: {error!r}") from error
        finally:
            sys.argv, sys.stdout = argv, stdout
            if collecting:
                gc.enable()
    return Translation(
        sas=sas,
        types=tuple((kind.name, tuple(kind.supertype_names)) for kind in task.types),
        objects={item.name: item.type_name for item in task.objects},
        parameters={
            action.name: tuple((p.name.strip("?"), p.type_name) for p in action.parameters) for action in task.actions
        },
        init=tuple(
            (atom.predicate, *atom.args)
            for atom in task.init
            if isinstance(atom, fast_downward.translate.pddl.conditions.Atom) and atom.predicate != "="
        ),
        most_effects=max(map(_effect_count, sas.split("begin_operator\n")[1:]), default=0),
    )


def _effect_count(operator: str) -> int:
    """Count the effects of an operator's section: name, prevail conditions with their number, effects with theirs."""
    lines = operator.split("\n")
    return int(lines[2 + int(lines[1])])


@lru_cache(maxsize=1)
def _version() -> str:
    return f"{_FORMAT} {importlib.metadata.version('fast-downward-textworld')}"


def _cache_path(game: Game) -> Path | None:
    if os.environ.get("AGENTROPY_CACHE") == "off":
        return None
    key = "\0".join((_version(), game.domain, game.problem))
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return cache_folder() / "alfworld" / "games" / name[:2] / f"{name[2:]}.z"


def _encode(translation: Translation) -> bytes:
    header = {
        "types": translation.types,
        "objects": translation.objects,
        "parameters": translation.parameters,
        "init": translation.init,
        "most_effects": translation.most_effects,
    }
    return zlib.compress(f"{json.dumps(header)}\n{translation.sas}".encode(), level=1)


def _decode(data: bytes) -> Translation:
    header, _, sas = zlib.decompress(data).decode().partition("\n")
    found = json.loads(header)
    return Translation(
        sas=sas,
        types=tuple((name, tuple(supertypes)) for name, supertypes in found["types"]),
        objects=found["objects"],
        parameters={name: tuple((p, t) for p, t in items) for name, items in found["parameters"].items()},
        init=tuple(tuple(atom) for atom in found["init"]),
        most_effects=int(found["most_effects"]),
    )
