"""``agentropy bench algorithms``: run a grid of methods, and report it.

- ``main``: the command. ``check_recipes``: compose what it would run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ...errors import UsageError
from .grid import Cell, Grid, cells, load_grid, starts

if TYPE_CHECKING:
    from .cell import Outcome
    from .running import Backend


def main(arguments: argparse.Namespace) -> int:
    """Run what is missing, then report. Returns 1 when a run failed; the report is then of the others, if any.

    Raises:
        UsageError: the grid, or the configuration of one of its runs, is wrong, or the folder is not for it; nothing
            has been started by then.
    """
    jobs = [] if arguments.jobs is None else [f"resources.jobs={arguments.jobs}"]
    grid = load_grid(arguments.config, [*arguments.overrides, *jobs])
    # Absolute: on a cluster, runs start in other folders.
    folder = Path(arguments.out or Path("runs") / f"bench-{grid.name}").absolute()
    before, runs = starts(grid, folder), cells(grid, folder)
    console = Console()
    if arguments.dry_run:
        check_recipes(runs)
        _list(console, grid, before, runs)
        return 0
    from .claim import alone, claim, starts_are_whole
    from .report import remember_machine, write_report

    failed: dict[str, Outcome] = {}
    if arguments.report:
        claim(grid, folder, [*before, *runs], report_only=True)
    else:
        check_recipes(runs)
        with alone(folder):
            claim(grid, folder, [*before, *runs], report_only=False)
            starts_are_whole(before, runs)
            remember_machine(folder)
            _list(console, grid, before, runs)
            failed = _run(grid, folder, before, runs, arguments.backend, console)
    if not failed or any(cell.done for cell in runs):
        for path in write_report(grid, folder, Path(arguments.results) if arguments.results else None, console):
            console.print(f"report {path}", highlight=False, soft_wrap=True)
    for title, outcome in failed.items():
        console.print(f"failed {title}: {outcome.message}", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def _run(
    grid: Grid, folder: Path, before: list[Cell], runs: list[Cell], backend: Backend, console: Console
) -> dict[str, Outcome]:
    """Run the starts, and then what begins from those that are whole; the outcomes of what failed, by title."""
    from .running import run_all

    failed = run_all(before, folder, grid.resources, backend, console)
    ready = [cell for cell in runs if cell.start is None or cell.start.done]
    return failed | run_all(ready, folder, grid.resources, backend, console)


def check_recipes(runs: list[Cell]) -> None:
    """Compose the recipe of every run, so that a wrong option is found before anything is spent.

    Raises:
        UsageError: a recipe, preset or option is unknown, or they contradict each other; the message names the run.
    """
    from ...algorithms.recipes import recipe

    for cell in runs:
        algorithm = cell.config.algorithm
        options = {"total_steps": max(1, cell.config.train.steps)} | algorithm.overrides
        try:
            recipe(algorithm.name, preset=algorithm.preset, **options)
        except UsageError as error:
            raise UsageError(f"{cell.title}: {error}") from error


def _list(console: Console, grid: Grid, before: list[Cell], runs: list[Cell]) -> None:
    """What the grid spans, and how much of it is done."""
    console.print(
        f"{grid.name}: {len(before)} warm starts ({sum(cell.done for cell in before)} done), {len(runs)} runs "
        f"({sum(cell.done for cell in runs)} done)",
        highlight=False,
    )
    for environment in grid.environment:
        config = next(cell.config for cell in runs if cell.environment is environment)
        panels = " and ".join(f"{config.eval.tasks or 'all'} tasks of {split}" for split in environment.panels.values())
        console.print(f"{environment.title}: panels of {panels}", highlight=False)
    table = Table("recipe", "environment")
    for name in ("steps", "episodes each", "seeds done"):
        table.add_column(name, justify="right")
    for environment in grid.environment:
        for entry in grid.recipe:
            same = [cell for cell in runs if cell.environment is environment and cell.recipe is entry]
            train = same[0].config.train
            episodes, done = train.tasks_per_step * train.group_size, sum(cell.done for cell in same)
            table.add_row(entry.title, environment.title, str(train.steps), str(episodes), f"{done}/{len(same)}")
    console.print(table)
