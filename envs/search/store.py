"""What searching computes once and every process then shares.

- ``cached``: a folder of the cache, made by whoever comes first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ...errors import UsageError
from ..cache import cache_folder


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``key``; where it is not there, ``build`` fills an empty one that then takes its place.

    The folder appears complete or not at all. Of several processes that want it one builds, the others wait; a lock
    whose holder dies is free again, and what it had left half done is removed.

    Raises:
        UsageError: the cache folder cannot be written.
    """
    root = cache_folder() / "search"
    folder = root / key
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / f"{key}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"cannot write the cache folder {root} ({error}); AGENTROPY_CACHE names another") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        for left in root.glob(f".{key}-*"):
            shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
        try:
            build(made)
            made.chmod(0o755)
            os.replace(made, folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return folder
