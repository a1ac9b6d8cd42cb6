"""The files of ``bfcl-eval`` that the world reads: questions, gold calls, function documents and simulators.

- ``VERSION``: of the package; its tasks are those of BFCL v4.
- ``locate``: the folder of an installed package or of the fetched files; None when neither is there.
- ``fetch``: download the package's wheel without its dependencies and unpack these files into the cache.
- ``source``: ``locate``, or else ``fetch``.

The package asks for forty others, model providers' clients among them, of which none is needed to play. So it is never
imported: an installed copy is read where it lies, and without one the wheel comes from the package index that pip or
uv is set up for. Either way the content is that of ``VERSION``, byte for byte, or it is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ...errors import MissingDependencyError
from ..cache import cache_folder

VERSION = "2026.3.23"
_REQUIREMENT = f"bfcl-eval=={VERSION}"
_COMMAND = f"pip install --no-deps {_REQUIREMENT}"
_WHEEL = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
_CONTENT = "d5a709bfa0c35846eb0656fb2ae3fd9da4aecfae38556b1cb1ba8e9603b75033"
_SECONDS = 600

CATEGORIES = ("base", "long_context", "miss_func", "miss_param")
DOCUMENTS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Simulator to the name of its source file and of its function documents."""
LONG_CONTEXT = "long_context"
"""Name of the source file that has the texts of the long-context variants."""


def questions(category: str) -> str:
    """Return where the tasks of ``category`` lie in the package."""
    return f"data/BFCL_v4_multi_turn_{category}.json"


def answers(category: str) -> str:
    """Return where the gold calls of ``category`` lie in the package."""
    return f"data/possible_answer/BFCL_v4_multi_turn_{category}.json"


def documents(simulator: str) -> str:
    """Return where the function documents of ``simulator`` lie in the package."""
    return f"data/multi_turn_func_doc/{DOCUMENTS[simulator]}.json"


def code(name: str) -> str:
    """Return where the source file ``name`` of a simulator lies in the package."""
    return f"eval_checker/multi_turn_eval/func_source_code/{name}.py"


FILES = (
    *(path(category) for category in CATEGORIES for path in (questions, answers)),
    *(documents(simulator) for simulator in DOCUMENTS),
    *(code(name) for name in (*DOCUMENTS.values(), LONG_CONTEXT)),
)
"""All that is read of the package, relative to it."""


def source() -> Path:
    """Return the folder that has ``FILES``; fetch them when they are nowhere on this machine.

    Raises:
        MissingDependencyError: they could not be fetched.
    """
    return locate() or fetch()


@cache
def _known(folder: Path) -> bool:
    """Whether ``folder`` has ``FILES`` with the content of ``VERSION``."""
    return content(folder) == _CONTENT


def locate() -> Path | None:
    """Return the folder that has ``FILES``, of an installed package first; None when there is none."""
    spec = importlib.util.find_spec("bfcl_eval")
    installed = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in (*installed, _target()):
        if folder.is_dir() and _known(folder):
            return folder
    return None


def fetch() -> Path:
    """Download the wheel of ``VERSION`` and unpack ``FILES`` into the cache, unless they are there; return the folder.

    Several processes may call this at once: one works, the others wait for it.

    Raises:
        MissingDependencyError: there is no pip or uv, no index could be reached, or what came is not ``VERSION``.
    """
    target = _target()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent / "lock"):
            if not (target.is_dir() and content(target) == _CONTENT):
                _replace(target)
    except OSError as error:
        raise _failed(str(error)) from error
    _known.cache_clear()
    return target


def _replace(target: Path) -> None:
    """Put what the index has in the place of ``target``."""
    for left in target.parent.glob("fetch-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="fetch-", dir=target.parent))
    try:
        unpacked = _download(work)
        if content(unpacked) != _CONTENT:
            raise _failed(f"what the index has under that name is not {_REQUIREMENT}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unpacked, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def content(folder: Path) -> str:
    """Return a hash of all ``FILES`` in ``folder``; the empty text when one is missing."""
    digest = hashlib.sha256()
    for name in FILES:
        try:
            data = (folder / name).read_bytes()
        except OSError:
            return ""
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _target() -> Path:
    return cache_folder() / "bfcl" / VERSION


def _download(work: Path) -> Path:
    """Return a folder in ``work`` with ``FILES``, straight from the index."""
    unpacked = work / "files"
    if importlib.util.find_spec("pip") is not None:
        download = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
        _run([sys.executable, "-m", *download, "--dest", str(work), _REQUIREMENT])
        wheels = sorted(work.glob("*.whl"))
        if len(wheels) != 1 or hashlib.sha256(wheels[0].read_bytes()).hexdigest() != _WHEEL:
            raise _failed(f"what came is not the wheel of {_REQUIREMENT}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in FILES:
                _place(unpacked / name, wheel.read(f"bfcl_eval/{name}"))
        return unpacked
    uv = shutil.which("uv")
    if uv is None:
        raise _failed("this Python has no pip, and there is no uv")
    site = work / "site"
    _run([uv, "pip", "install", "--no-deps", "--python", sys.executable, "--target", str(site), _REQUIREMENT])
    for name in FILES:
        _place(unpacked / name, (site / "bfcl_eval" / name).read_bytes())
    return unpacked


def _place(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(str(error)) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        raise _failed((errors or lines or [f"exit status {done.returncode}"])[-1])


def _failed(why: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"BFCL needs the files of {_REQUIREMENT}, and fetching them failed ({why}); run: {_COMMAND}"
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    with path.open("w") as lock:
        try:
            import fcntl
        except (
            ImportError
        ):  # no such locks on Windows: the last one to move its folder into place is the one that stays
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
