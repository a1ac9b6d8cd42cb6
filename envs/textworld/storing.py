"""Stories on disk, so that a game is made once.

- ``load_story``, ``save_story``: read and write one; what cannot be read is as good as absent.
- ``folder``: where the games of a recipe are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..cache import cache_folder
from .challenges import Recipe
from .story import Move, Quest, Story, Thing

FORMAT = 1
"""Raised whenever stories come out differently, so that older ones are made anew."""


def folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe's games; it may not exist yet."""
    from importlib.metadata import version

    return cache_folder() / "textworld" / f"{version('textworld')}-{FORMAT}" / recipe.key / (recipe.split or "all")


def load_story(path: Path) -> Story | None:
    """Return the story in a file, None where there is no readable one."""
    try:
        data = json.loads(zlib.decompress(path.read_bytes()))
        return _story(data)
    except (OSError, zlib.error, ValueError, KeyError, TypeError):
        return None


def save_story(path: Path, story: Story) -> None:
    """Write a story whole or not at all; a folder that cannot be written is left alone."""
    data = zlib.compress(json.dumps(_plain(story), separators=(",", ":")).encode())
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)


def _plain(story: Story) -> dict[str, Any]:
    data = {field.name: getattr(story, field.name) for field in fields(story)}
    data["always"] = sorted(story.always)
    for name in ("things", "moves", "quests"):
        data[name] = [[getattr(item, field.name) for field in fields(item)] for item in data[name]]
    return data


def _story(data: dict[str, Any]) -> Story:
    data = {name: _tuples(value) for name, value in data.items()}
    data["always"] = frozenset(data["always"])
    for name, kind in (("things", Thing), ("moves", Move), ("quests", Quest)):
        data[name] = tuple(kind(*item) for item in data[name])
    return Story(**data)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
