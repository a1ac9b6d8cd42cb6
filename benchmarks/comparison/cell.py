"""One cell of a grid, in a process of its own that ends with its parent.

- ``Work``: what such a process is told. ``write_work``: for a cell.
- ``CellProcess``: the process. ``Outcome``: how it ended. ``run_cell``: start it and wait.

The processes are forked from one that has imported everything, which takes longer than all else before a first step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ...config import to_toml
from ...errors import AgentropyError
from .grid import Cell

_IMPORTED = ("agentropy.algorithms.trainer", "agentropy.algorithms.report", "agentropy.kernels._numba.paged")


@dataclass(frozen=True)
class Work:
    """Paths, which all machines of a cluster share."""

    folder: str
    """Of the run; where it holds one, that is continued."""
    config: str
    """TOML file of the run's configuration."""
    log: str
    """What the run prints is appended to it."""


@dataclass(frozen=True)
class Outcome:
    """How one attempt at a cell ended."""

    status: int
    """Exit status of the process; 0 when the run is whole."""
    seconds: float
    message: str = ""
    """Why, where it failed: the last line that it wrote, and the signal that ended it, if one did."""


def write_work(cell: Cell, folder: Path) -> Work:
    """Write the configuration of a cell of the grid in ``folder``."""
    name = cell.folder.relative_to(folder)
    config, log = (folder / kind / f"{name}{suffix}" for kind, suffix in (("configs", ".toml"), ("logs", ".log")))
    for path in (config, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(to_toml(cell.config), encoding="utf-8")
    return Work(str(cell.folder), str(config), str(log))


class CellProcess:
    """``agentropy train`` in a process that is running from now on."""

    def __init__(self, work: Work) -> None:
        # Read once, when torch is imported: in the process that all others are forked from.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(list(_IMPORTED))
        self.work = work
        self._started = time.monotonic()
        self._process = server.Process(target=_train, args=(work,))
        self._process.start()

    @property
    def sentinel(self) -> int:
        """Ready for ``multiprocessing.connection.wait`` when the process has ended."""
        return self._process.sentinel

    def outcome(self) -> Outcome:
        """Wait for the end."""
        self._process.join()
        status = self._process.exitcode
        assert status is not None
        seconds = time.monotonic() - self._started
        message = _last_line(Path(self.work.log)) if status else ""
        if status < 0:  # such as by the kernel, where memory ran out; the log's end tells nothing of it
            message = f"ended by {signal.Signals(-status).name}; the last it said: {message}"
        return Outcome(status, seconds, message)

    def stop(self) -> None:
        """End it now; it can be continued from its newest checkpoint."""
        self._process.terminate()
        self._process.join()


def run_cell(work: Work) -> Outcome:
    """Start the cell and wait for its end."""
    process = CellProcess(work)
    try:
        return process.outcome()
    except BaseException:  # this process is told to stop
        process.stop()
        raise


def _train(work: Work) -> None:
    """Begin the run, or continue it, until it or the parent has ended."""
    log = os.open(work.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["COLUMNS"] = "160"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from ...cli import main

    begun = (Path(work.folder) / "config.toml").is_file()
    sys.exit(main(["train", "--resume", work.folder] if begun else ["train", "--config", work.config]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        raise AgentropyError("a cell runs in a process of its own")
    parent.join()
    os._exit(1)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "it printed nothing"
