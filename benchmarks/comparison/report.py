"""The report of a comparison, as JSON, Markdown and one page.

- ``write_report``: all three, from what is finished of a grid.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ...algorithms.runs import write_atomically
from ..machine import describe_machine
from .analysis import analyse
from .grid import Grid
from .markdown import markdown
from .page import page


def write_report(grid: Grid, folder: Path, results: Path | None, console: Console) -> list[Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``folder``, and as ``algorithms-NAME.*`` into
    ``results``; print the Markdown's tables.

    Raises:
        UsageError: no run is finished.
    """
    report = analyse(grid, folder, machine_of(folder))
    text = markdown(report)
    forms = {"json": json.dumps(report, indent=1, allow_nan=False) + "\n", "md": text, "html": page(report)}
    targets = [folder / "report"] + ([results / f"algorithms-{grid.name}"] if results else [])
    written = []
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        for form, content in forms.items():
            path = target.with_name(f"{target.name}.{form}")
            write_atomically(path, content.encode())
            written.append(path)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return written


def remember_machine(folder: Path) -> None:
    """Note what the runs are started on, once: a report may be written elsewhere, and later."""
    path = folder / "machine.json"
    if not path.exists():
        packages = ("torch", "transformers", "numba", "scipy")
        write_atomically(path, json.dumps(describe_machine(packages), indent=1).encode())


def machine_of(folder: Path) -> dict[str, object]:
    """What ``remember_machine`` noted."""
    path = folder / "machine.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else describe_machine()
