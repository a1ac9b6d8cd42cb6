"""The report of a comparison as one page that asks for nothing from outside and needs no script.

- ``page``: the whole page.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from .curves import curves
from .figures import Figure, Gallery, overall, scores
from .findings import findings
from .style import STYLE
from .tables import Table, aggregate_table, main_table, repeat_table, training_table
from .words import Report, head, how_to_read, panel_name

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser itself refuses whatever the page would fetch."""


def page(report: Report) -> str:
    """Findings first, then the tables and figures of each environment, how to read them, and the whole grid."""
    title = f"{report['name']}: recipes compared with {report['baseline']}"
    body = [f"<h1>{escape(title)}</h1>", *(f'<p class="muted">{_text(text)}</p>' for text in head(report))]
    body.append(_contents(report))
    body += ['<h2 id="told">What can be told</h2>', _findings(report)]
    for number, environment in enumerate(report["environments"]):
        body.append(f'<h2 id="environment-{number}">{escape(environment["label"])}</h2>')
        body += [_gallery(each) for each in scores(report["baseline"], environment)]
        for panel in environment["panels"]:
            body.append(f"<h3>{escape(panel_name(panel))}</h3>")
            body.append(_table(main_table(report["baseline"], environment, panel), f"Scores on {panel_name(panel)}"))
            body.append(_table(repeat_table(panel), f"Repeated episodes on {panel_name(panel)}"))
        body += ["<h3>Training</h3>", _table(training_table(environment), "Training")]
        body += [_gallery(each) for each in curves(report["baseline"], environment)]
    if len(report["environments"]) > 1 and report["aggregate"]:
        body += ['<h2 id="all">All environments</h2>', _table(aggregate_table(report), "All environments")]
        body.append(f'<div class="grid wide">{_figure(overall(report["baseline"], report))}</div>')
        body.append('<p class="muted">Only recipes that finished every seed are in it.</p>')
    body += [
        '<h2 id="reading">How to read this</h2>',
        _list(_text(sentence) for sentence in how_to_read(report, "with ▲ or ▼")),
    ]
    body += [_details("The grid, as its file", report["grid"]), _details("The machine", _machine(report))]
    body.append(_details("The runs", "\n".join(_runs(report))))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
{chr(10).join(body)}
</body></html>
"""


def _table(table: Table, name: str) -> str:
    """In a box of its own, which scrolls where the page is narrow and can be reached by keyboard."""
    columns = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = []
    for index, row in enumerate(table.rows):
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for number, cell in enumerate(row[1:], 1):
            text = escape(cell)
            if number == table.difference and index in table.marked:
                text = f"<strong>{'▼' if cell.startswith('−') else '▲'} {text}</strong>"
            cells.append(f"<td>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name, quote=True)}">'
        f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(figure: Figure) -> str:
    caption = f"<figcaption><b>{escape(figure.title)}</b>{_text(figure.caption)}</figcaption>"
    return f"<figure>{caption}{figure.svg}</figure>"


def _gallery(gallery: Gallery) -> str:
    figures = "\n".join(map(_figure, gallery.figures))
    kind = "small" if gallery.small else "wide" if len(gallery.figures) < 3 else "middle"
    grid = f'<div class="grid {kind}">{figures}</div>'
    text = f"<p>{_text(gallery.text)}</p>"
    if gallery.folded:
        return f'<details class="gallery"><summary>{escape(gallery.title)}</summary>{text}{grid}</details>'
    return f'<section class="gallery"><h3>{escape(gallery.title)}</h3>{text}{grid}</section>'


def _contents(report: Report) -> str:
    places = [(f"environment-{number}", each["label"]) for number, each in enumerate(report["environments"])]
    links = [("told", "What can be told"), *places, ("reading", "How to read this")]
    told = (f'<a href="#{place}">{escape(name)}</a>' for place, name in links)
    return f"<nav>{' · '.join(told)}</nav>"


def _findings(report: Report) -> str:
    return _list(f"<b>{escape(each.about)}</b>: {_text(each.text)}" for each in findings(report))


def _list(items: Iterable[str]) -> str:
    """``items`` are HTML."""
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _text(text: str) -> str:
    """Escaped, and without a break within a figure."""
    text = escape(text)
    for joint in (" %", "q = ", "q &lt; ", " points"):
        text = text.replace(joint, joint.replace(" ", "\u00a0"))
    return text


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _machine(report: Report) -> str:
    lines = []
    for name, value in report["machine"].items():
        told = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name.replace('_', ' ')}: {told}")
    return "\n".join(lines)


def _runs(report: Report) -> Iterable[str]:
    for environment in report["environments"]:
        for recipe in environment["recipes"]:
            yield from recipe["runs"]
            yield from (
                f"    seed {alarm['seed']}, step {alarm['step']}: {alarm['text']}" for alarm in recipe["alarms"]
            )
