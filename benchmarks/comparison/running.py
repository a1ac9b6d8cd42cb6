"""Run what is left of a grid, side by side, on this machine or over Ray.

- ``run_all``: run cells until each is whole or has failed. ``processes``, ``ray_tasks``: the two ways.
- ``fits``: whether a machine has what a cell takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...algorithms.display import clock
from ...errors import MissingDependencyError
from .cell import CellProcess, Outcome, Work, run_cell, write_work
from .grid import Cell, Resources

Backend = Literal["processes", "ray"]
Ended = Generator[tuple[int, Outcome], None, None]
"""Numbers of cells with their outcomes, as they end."""


def run_all(
    cells: Sequence[Cell], folder: Path, resources: Resources, backend: Backend, console: Console
) -> dict[str, Outcome]:
    """Run those of ``cells`` that are not done, and return the outcomes of those that failed, by title.

    A cell that fails leaves the others alone. Cells that were begun go on from their newest checkpoint.

    Raises:
        MissingDependencyError: the backend is not installed.
    """
    left = [cell for cell in cells if not cell.done]
    if not left:
        return {}
    work = [write_work(cell, folder) for cell in left]
    play: Callable[[Sequence[Work], Resources], Ended]
    play = processes if backend == "processes" else ray_tasks
    failed: dict[str, Outcome] = {}
    started = time.monotonic()
    told = f"{len(left)} runs, {min(resources.jobs, len(left))} at once …"
    # Closed here, whatever happens: what it has started must not go on alone.
    with console.status(told) as status, closing(play(work, resources)) as ended:
        for number, (index, outcome) in enumerate(ended, 1):
            cell, elapsed = left[index], time.monotonic() - started
            told = clock(outcome.seconds)
            if outcome.status or not cell.done:
                failed[cell.title] = outcome
                told = f"failed after {told}: {outcome.message or 'it left no last checkpoint'}"
            line = f"[{clock(elapsed)}] {number}/{len(left)} {cell.title}: {told}"
            console.print(line, highlight=False, markup=False, style="red" if cell.title in failed else None)
            remaining = elapsed / number * (len(left) - number)
            status.update(f"{len(left) - number} runs left, about {clock(remaining)}")
    return failed


def processes(work: Sequence[Work], resources: Resources) -> Ended:
    """Run cells in processes of this machine; yields the number of each with its outcome, as they end."""
    waiting = list(enumerate(work))
    running: dict[int, tuple[int, CellProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < resources.jobs:
                index, each = waiting.pop(0)
                process = CellProcess(each)
                running[process.sentinel] = index, process
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                index, process = running.pop(sentinel)
                yield index, process.outcome()
    finally:
        for _, process in running.values():
            process.stop()


def ray_tasks(work: Sequence[Work], resources: Resources) -> Ended:
    """Run cells as tasks of Ray: on the cluster that ``RAY_ADDRESS`` names, else on a local one.

    All machines must see the grid's folder under one path, and have this package. Where no machine has what a cell
    takes, that is said, and waited for: a cluster may grow.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("Ray is not installed: pip install 'agentropy[cluster]'") from error

    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    if not any(fits(resources, node["Resources"]) for node in ray.nodes() if node["Alive"]):
        logging.getLogger(__name__).warning(
            "no machine of the Ray cluster has the %g CPUs and %g GPUs that a run takes; waiting for one "
            "(resources.cpus, resources.gpus)",
            resources.cpus,
            resources.gpus,
        )
    # Ray ends a worker after a task with GPUs, so the next one sees its own devices.
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(run_cell)
    waiting = list(enumerate(work))
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < resources.jobs:
                index, each = waiting.pop(0)
                running[remote.remote(each)] = index
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            try:
                yield index, ray.get(done)
            except ray.exceptions.RayError as error:  # a machine was lost: the cell can be continued
                # Of an error of ours, Ray's own text begins with the name of the task.
                cause = str(getattr(error, "cause", None) or error).strip() or type(error).__name__
                yield index, Outcome(1, 0.0, cause.splitlines()[0])
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.shutdown()


def fits(resources: Resources, machine: Mapping[str, float]) -> bool:
    """Whether a machine of so many ``CPU`` and ``GPU`` can ever hold a cell."""
    return resources.cpus <= machine.get("CPU", 0) and resources.gpus <= machine.get("GPU", 0)
