"""Figures with a row for each recipe: scores, differences, success at equal cost.

- ``Figure``: a drawing and what it shows. ``Gallery``: figures of one kind, under one heading.
- ``scores``: all runs and differences of an environment. ``equal_costs``: of a panel. ``overall``: of environments.
- ``budgets``: costs that all recipes reached. ``base_note``: how the baseline is drawn. ``rounded``, ``percents``: a
  range of success, and its axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .findings import DIMENSIONS
from .svg import Kind, Range, Row, short, strips
from .words import Report, enumerated, number, panel_name, percent, points, seconds, share, signed


@dataclass(frozen=True)
class Figure:
    """An SVG, and a caption with its figures."""

    svg: str
    title: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Figures of one kind."""

    title: str
    text: str
    """How to read them, and what they show."""
    figures: Sequence[Figure]
    small: bool = True
    """One for each recipe; else wide ones."""
    folded: bool = False


def scores(baseline: str, environment: Report) -> Iterator[Gallery]:
    """Final scores of all runs, and their differences from the baseline."""
    panels = environment["panels"]
    x_range = _range([row for panel in panels for row in _final_rows(baseline, panel)])
    yield Gallery(
        "Scores of all runs",
        "Point: mean over runs, with its 95 % interval; filled where it is told apart. Ticks below: one for each run."
        + base_note(baseline, environment),
        [_finals(baseline, panel, x_range) for panel in panels],
        small=False,
    )
    if any(panel["comparisons"] for panel in panels):
        yield Gallery(
            f"Differences from {baseline}",
            f"Filled: told apart from {baseline}. Hollow: not. Ticks below: the difference of each seed.",
            [_differences(baseline, panel, panels) for panel in panels if panel["comparisons"]],
            small=False,
        )


def overall(baseline: str, report: Report) -> Figure:
    """Interquartile means over all panels and environments."""
    rows = [
        Row(each["recipe"], percent(each), each["value"], each["low"], each["high"], (), _kind(baseline, each), False)
        for each in report["aggregate"]
    ]
    title, caption = "Interquartile mean over all panels", _extent(rows)
    told = f"{title}. {caption}"
    drawing = strips(told, rows, _range(rows), x_format=percents, x_label="success, %", reference=_reference(rows))
    return Figure(drawing, title, caption)


def base_note(baseline: str, held: Report) -> str:
    """How the baseline is drawn; nothing where it is missing."""
    there = any(each["recipe"] == baseline for each in held["recipes"])
    return f" Square and dotted line: {baseline}." if there else ""


def _final_rows(baseline: str, panel: Report) -> list[Row]:
    differing = {each["recipe"] for each in panel["comparisons"] if each["differs"]}
    return [
        Row(
            each["recipe"],
            percent(each["final"]),
            each["final"]["value"],
            each["final"]["low"],
            each["final"]["high"],
            list(each["final_by_seed"].values()),
            _kind(baseline, each),
            each["recipe"] in differing,
        )
        for each in panel["recipes"]
    ]


def _range(rows: Sequence[Row]) -> Range:
    """Round numbers around all intervals and runs."""
    low = min(min(row.low, row.value, *row.runs) for row in rows)
    return rounded(low, max(max(row.high, row.value, *row.runs) for row in rows))


def _finals(baseline: str, panel: Report, x_range: Range) -> Figure:
    rows = _final_rows(baseline, panel)
    title, caption = panel_name(panel), _extent(rows)
    told = f"Final success on {title}. {caption}"
    drawing = strips(told, rows, x_range, x_format=percents, x_label="success, %", reference=_reference(rows))
    return Figure(drawing, title, caption)


def _difference_rows(baseline: str, panel: Report) -> list[Row]:
    finals = {each["recipe"]: each["final_by_seed"] for each in panel["recipes"]}
    rows = []
    for each in panel["comparisons"]:
        ours, theirs = finals[each["recipe"]], finals[baseline]
        rows.append(
            Row(
                each["recipe"],
                points(each["difference"]),
                each["difference"]["value"],
                each["difference"]["low"],
                each["difference"]["high"],
                [ours[seed] - theirs[seed] for seed in ours if seed in theirs],
                filled=each["differs"],
            )
        )
    return rows


def _differences(baseline: str, panel: Report, panels: Sequence[Report]) -> Figure:
    every = [row for each in panels for row in _difference_rows(baseline, each)]
    reach = max(max(abs(row.low), abs(row.high), *map(abs, row.runs)) for row in every)
    reach = max(0.05, math.ceil(reach * 20 - 1e-9) / 20)
    differing = [each["recipe"] for each in panel["comparisons"] if each["differs"]]
    caption = (
        f"{enumerated(differing)} told apart from {baseline}." if differing else f"None told apart from {baseline}."
    )
    title = panel_name(panel)
    drawing = strips(
        f"Difference from {baseline} on {title}. {caption}",
        _difference_rows(baseline, panel),
        (-reach, reach),
        x_format=lambda value: signed(value).removesuffix(".0"),
        x_label="points of success",
        reference=0.0,
    )
    return Figure(drawing, title, caption)


def budgets(panel: Report) -> dict[str, float]:
    """The largest cost that all recipes reached; nothing with one recipe."""
    if len(panel["recipes"]) < 2:
        return {}
    found = {name: min(each["costs"][-1][name] for each in panel["recipes"]) for name in DIMENSIONS}
    return {name: budget for name, budget in found.items() if budget > 0}


def equal_costs(baseline: str, panel: Report, reached: Mapping[str, float]) -> list[Figure]:
    """Success at each of the budgets, on one range."""
    drawn = {name: _equal_rows(baseline, panel, name, budget) for name, budget in reached.items()}
    x_range = _range([row for rows in drawn.values() for row in rows])
    figures = []
    for name, rows in drawn.items():
        tell = seconds if name == "seconds" else number
        title = f"After {tell(reached[name])} {DIMENSIONS[name]}"
        caption = _extent(rows)
        drawing = strips(
            f"Success on {panel_name(panel)} {title.lower()}. {caption}",
            rows,
            x_range,
            x_format=percents,
            x_label="success, %",
            reference=_reference(rows),
        )
        figures.append(Figure(drawing, title, caption))
    return figures


def _equal_rows(baseline: str, panel: Report, name: str, budget: float) -> list[Row]:
    rows = []
    for each in panel["recipes"]:
        spent = [entry[name] for entry in each["costs"]]
        value, low, high = (
            float(np.interp(budget, spent, [entry[part] for entry in each["curve"]]))
            for part in ("value", "low", "high")
        )
        told = percent({"value": value, "low": low, "high": high})
        rows.append(Row(each["recipe"], told, value, low, high, kind=_kind(baseline, each), filled=False))
    return rows


def _kind(baseline: str, entry: Report) -> Kind:
    return "base" if entry["recipe"] == baseline else "own"


def _extent(rows: Sequence[Row]) -> str:
    """The lowest and the highest of the rows, in words."""
    best, worst = (choose(rows, key=lambda row: row.value) for choose in (max, min))
    if share(best.value) == share(worst.value):
        return f"All at {share(best.value)} %." if len(rows) > 1 else f"{share(best.value)} %."
    return f"From {share(worst.value)} % ({worst.name}) to {share(best.value)} % ({best.name})."


def _reference(rows: Sequence[Row]) -> float | None:
    return next((row.value for row in rows if row.kind == "base"), None)


def rounded(low: float, high: float) -> Range:
    """Outwards to tenths, within [0, 1], and no narrower than a fifth."""
    low, high = math.floor(low * 10 + 1e-9) / 10, math.ceil(high * 10 - 1e-9) / 10
    if high - low < 0.2:
        low, high = (low, low + 0.2) if low <= 0.8 else (0.8, 1.0)
    return max(0.0, low), min(1.0, high)


def percents(value: float) -> str:
    return short(round(100 * value, 6))
