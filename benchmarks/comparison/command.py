"""``agentropy bench algorithms``: run a grid of methods, and report it.

- ``main``: the command. ``check_recipes``: compose what it would run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...errors import UsageError
from .grid import Cell, Grid, cells, load_grid, starts, to_toml


def main(arguments: argparse.Namespace) -> int:
    """Run what is missing, then report. Returns 1 when a run failed; the report is then of the others.

    Raises:
        UsageError: the grid, or the configuration of one of its runs, is wrong; nothing has been started by then.
    """
    grid = load_grid(arguments.config, arguments.overrides)
    if arguments.jobs is not None:
        if arguments.jobs < 1:
            raise UsageError(f"--jobs is {arguments.jobs}; expected 1 or more")
        grid.resources.jobs = arguments.jobs
    # Absolute: on a cluster, runs start in other folders.
    folder = Path(arguments.out or Path("runs") / f"bench-{grid.name}").absolute()
    before, runs = starts(grid, folder), cells(grid, folder)
    console = Console()
    if arguments.dry_run:
        check_recipes(runs)
        _list(console, grid, before, runs)
        return 0
    _claim(grid, folder, report_only=arguments.report)
    failed = {}
    if not arguments.report:
        check_recipes(runs)
        from .report import remember_machine
        from .running import run_all

        remember_machine(folder)
        _list(console, grid, before, runs)
        failed = run_all(before, folder, grid.resources, arguments.backend, console)
        if not failed:
            failed = run_all(runs, folder, grid.resources, arguments.backend, console)
    from .report import write_report

    paths = write_report(grid, folder, Path(arguments.results) if arguments.results else None, console)
    for path in paths:
        console.print(f"report {path}", highlight=False, soft_wrap=True)
    for title, outcome in failed.items():
        console.print(f"[red]failed[/red] {title}: {outcome.message}", highlight=False)
    return 1 if failed else 0


def check_recipes(runs: list[Cell]) -> None:
    """Compose every recipe once, so that a wrong option is found before anything is spent.

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


def _claim(grid: Grid, folder: Path, *, report_only: bool) -> None:
    """Remember what the folder is of; a folder of another grid is refused, so that unlike runs are never compared.

    Seeds, recipes and environments may be added later, and what only concerns the report may change.
    """
    path = folder / "grid.toml"
    if path.is_file():
        held = load_grid(path)
        for name in ("run", "options", "warm_start"):
            if getattr(held, name) != getattr(grid, name):
                raise UsageError(
                    f"'{folder}' holds runs of another comparison: its [{name}] differs; choose another --out"
                )
        for kind in ("recipe", "environment"):
            known = {entry.title: entry for entry in getattr(held, kind)}
            for entry in getattr(grid, kind):
                if known.get(entry.title, entry) != entry:
                    raise UsageError(
                        f"'{folder}' holds runs of another {kind} '{entry.title}'; give it another label, or choose "
                        "another --out"
                    )
    elif report_only:
        raise UsageError(f"'{folder}' holds no comparison yet; run it without --report")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(grid), encoding="utf-8")


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
