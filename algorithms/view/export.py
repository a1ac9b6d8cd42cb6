"""The page with all that it is told, as files that open without a server.

- ``export``: write them into a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ... import __version__
from ...errors import UsageError
from ..runs import write_atomically
from .app import STATIC, mode_script
from .library import Library

MANIFEST = "agentropy-export.json"
"""Lists the files of an export: what is written over or removed by the next one, and nothing else."""


def export(library: Library, folder: str | Path) -> tuple[int, int]:
    """Write the page and every answer of ``library``, as they are now, into ``folder``.

    An export that the folder holds is replaced; files that no export wrote stay as they are.

    Returns:
        How many files it has, and their bytes.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    old = _written(folder)
    answers = {f"data/{key}.js": key for key in library.all_keys()}
    pages = {path.name: path for path in sorted(STATIC.iterdir()) if path.is_file()}
    new = {*answers, *pages, "mode.js"}
    size = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First, so that an export that was interrupted is known as one.
        _write_manifest(folder, old | new)
        for name, data in _files(library, answers, pages):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            size += len(data)
        for name in old - new:
            (folder / name).unlink(missing_ok=True)
        _write_manifest(folder, new)
    except OSError as error:
        raise UsageError(f"cannot write '{error.filename or folder}': {error.strerror}") from error
    return len(new), size


def _files(library: Library, answers: dict[str, str], pages: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    for name, path in pages.items():
        yield name, path.read_bytes()
    yield "mode.js", mode_script(live=False).encode()
    for name, key in answers.items():
        # A step of a run under way may be gone since its keys were listed.
        body = library.answer(key) or b"null"
        yield name, b"agentropy.receive(" + json.dumps(key).encode() + b", " + body + b");\n"


def _written(folder: Path) -> set[str]:
    """The files that the last export into ``folder`` wrote."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return set()
    try:
        names = json.loads((folder / MANIFEST).read_bytes())["files"]
        inside = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        inside = False
    if not inside:
        raise UsageError(
            f"'{folder}' holds something else than an export; name a folder that is new, empty or an earlier export"
        )
    return set(names)


def _write_manifest(folder: Path, files: set[str]) -> None:
    about = {"version": __version__, "files": sorted(files)}
    write_atomically(folder / MANIFEST, json.dumps(about, indent=0).encode())
