"""Whose folder it is: of one grid, and of one process at a time.

- ``claim``: refuse a folder that holds other runs. ``alone``: keep other processes out. ``starts_are_whole``: refuse to
  make a start anew that runs have begun from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...algorithms.runs import write_atomically
from ...config import RunConfig, load_config
from ...errors import UsageError
from .grid import Cell, Grid, difference, to_toml


def claim(grid: Grid, folder: Path, planned: Sequence[Cell], *, report_only: bool) -> None:
    """Remember in ``grid.toml`` what ``folder`` is of. Runs that were begun there must be those of ``planned``, so that
    unlike runs are never compared; seeds, recipes and environments may be added, and what only concerns the report may
    change. A report alone writes nothing here.

    Raises:
        UsageError: a run was begun with other options, or there is nothing to report.
    """
    path = folder / "grid.toml"
    if report_only and not path.is_file():
        raise UsageError(f"'{folder}' holds no comparison yet; run it without --report")
    for cell in planned:
        begun = cell.folder / "config.toml"
        unlike = difference(_options(cell.config), _options(load_config(begun))) if begun.is_file() else None
        if unlike is not None:
            key, ours, theirs = unlike
            raise UsageError(
                f"'{folder}' holds another run as '{cell.title}': its {key} is {theirs}, not {ours}; give the "
                "recipe or environment another label, or choose another --out"
            )
    if not report_only:
        write_atomically(path, to_toml(grid).encode())


def starts_are_whole(before: Sequence[Cell], runs: Sequence[Cell]) -> None:
    """A start that is made again need not be the one that was lost, on another machine above all.

    Raises:
        UsageError: runs have begun from a start that is not there any more.
    """
    for start in before:
        if start.done:
            continue
        for cell in runs:
            if cell.start is not None and cell.start.folder == start.folder and (cell.folder / "config.toml").is_file():
                raise UsageError(
                    f"'{cell.title}' began from '{start.checkpoint}', which is not there any more; bring it back, or "
                    "choose another --out"
                )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this lasts, no other process may run the grid of ``folder``, which is made if there is none.

    Raises:
        UsageError: one does.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is running the comparison in '{folder}'; wait for it, or see what is finished with "
                "--report"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def _options(config: RunConfig) -> dict[str, Any]:
    """All that makes the run what it is, and not where it lies: a folder of runs may be moved."""
    options = config.model_dump(exclude={"run_dir"})
    for name in ("path", "start"):
        value = options["model"].get(name)
        if value is not None:
            options["model"][name] = value.rpartition("/start/")[2]
    return options
