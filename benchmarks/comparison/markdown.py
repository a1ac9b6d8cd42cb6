"""The report of a comparison as Markdown that also reads well as plain text.

- ``markdown``: the whole report. ``set_table``: one table, its columns aligned.
"""

from __future__ import annotations

import re

from .findings import findings
from .tables import Table, aggregate_table, main_table, repeat_table, training_table
from .words import Report, head, how_to_read, panel_name


def markdown(report: Report) -> str:
    """Findings first, then the tables of each environment and panel, then how to read them."""
    lines = [f"# {escaped(report['name'])}: recipes compared with {escaped(report['baseline'])}", ""]
    lines += [escaped(" ".join(head(report))), ""]
    lines += [*(f"- **{escaped(each.about)}**: {escaped(each.text)}" for each in findings(report)), ""]
    for environment in report["environments"]:
        lines += [f"## {escaped(environment['label'])}", ""]
        for panel in environment["panels"]:
            lines += [f"### {escaped(panel_name(panel))}", ""]
            lines += [set_table(main_table(report["baseline"], environment, panel)), ""]
            lines += [set_table(repeat_table(panel)), ""]
        lines += ["### Training", "", set_table(training_table(environment)), ""]
    if len(report["environments"]) > 1 and report["aggregate"]:
        lines += ["## All environments", "", set_table(aggregate_table(report)), ""]
        lines += ["Only recipes that finished every seed are in it.", ""]
    lines += ["## How to read this", ""]
    lines += [f"- {sentence}" for sentence in how_to_read(report, "in bold")]
    return "\n".join(lines) + "\n"


def set_table(table: Table) -> str:
    """The table with all cells of a column padded to one width."""
    rows = [[escaped(cell) for cell in row] for row in (table.columns, *table.rows)]
    if table.difference is not None:
        for index in table.marked:
            rows[index + 1][table.difference] = f"**{rows[index + 1][table.difference]}**"
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    set_rows = [
        [cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(each)]
        for each in (zip(row, widths, strict=True) for row in rows)
    ]
    rule = ["-" * width if not number else "-" * (width - 1) + ":" for number, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [set_rows[0], rule, *set_rows[1:]])


def escaped(text: str) -> str:
    """``text`` on one line, with what Markdown or HTML would take for marks of their own made harmless.

    Intervals stay readable: a bracket or a sign that opens nothing is left alone.

    >>> escaped("a | b <i> [52.1, 60.3] q < 0.001")
    'a \\\\| b &lt;i> [52.1, 60.3] q < 0.001'
    """
    text = re.sub(r"([\\`*|])|(?<=\])(\()", r"\\\1\2", " ".join(text.split()))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
