"""Two kinds of figures as inline SVG, drawn in the colours of the page's style sheet, light or dark.

- ``lines``: curves with bands over one axis, for small multiples. ``Series``: one of the curves.
- ``strips``: a row for each recipe with its interval and its runs. ``Row``: one of them.
- ``ticks``, ``short``, ``fitted``: round places on an axis, large numbers and long names in few characters.

The baseline is dashed and grey, or a square; what stands against it is a full line, or a circle that is filled where
the two can be told apart. So nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Kind = Literal["own", "base"]
Format = Callable[[float], str]
Range = tuple[float, float]

LINE_SIZE = (320, 205)
STRIP_WIDTH, STRIP_HEIGHT = 380, 38
NAME_LENGTH = 28
"""Characters of a name that leave room for the figure beside it."""
LABEL_GAP = 12.0
"""Least distance between the labels at the ends of two curves."""


@dataclass(frozen=True)
class Series:
    """A curve, with a band where ``low`` and ``high`` are given."""

    kind: Kind
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marker: str = ""
    """Character at each of the points."""
    label: str = ""
    """At the end of the curve."""
    points_only: bool = False


@dataclass(frozen=True)
class Row:
    """A name, a figure in words, and the same on the axis."""

    name: str
    text: str
    value: float
    low: float
    high: float
    runs: Sequence[float] = ()
    """One tick each, below the interval."""
    kind: Kind = "own"
    filled: bool = True


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` round numbers within [low, high].

    >>> ticks(0, 1), ticks(0, 18)
    ([0.0, 0.5, 1.0], [0.0, 5.0, 10.0, 15.0])
    """
    if high <= low:
        return [low]
    exponent = math.floor(math.log10(high - low)) - 1
    while True:
        for step in (factor * 10.0**exponent for factor in (1, 2, 5)):
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first < most:
                return [round(index * step, max(0, -exponent)) for index in range(first, last + 1)]
        exponent += 1


def short(value: float) -> str:
    """A count in few characters.

    >>> short(950), short(12500), short(2400000)
    ('950', '12.5k', '2.4M')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}".removesuffix(".0") + letter
    return f"{value:.3g}"


def fitted(name: str, length: int) -> str:
    """``name`` in at most ``length`` characters; what tells long names apart is often at their end.

    >>> fitted("epo", 9), fitted("epo with corridor 0.3", 9)
    ('epo', 'epo … 0.3')
    """
    half = length // 2
    return name if len(name) <= length else f"{name[:half]}…{name[half + 1 - length :]}"


def lines(
    title: str,
    series: Sequence[Series],
    x_range: Range,
    y_range: Range,
    *,
    x_label: str,
    y_format: Format,
    x_format: Format = short,
    marks: Iterable[tuple[float, str]] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """Curves over one axis. ``marks`` are places on the x axis to point at; ``level`` is a line across."""
    width, height = LINE_SIZE
    left, right, top, bottom = 38, 44, 14, 34

    def x(value: float) -> float:
        return left + (value - x_range[0]) / ((x_range[1] - x_range[0]) or 1) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - y_range[0]) / ((y_range[1] - y_range[0]) or 1) * (height - top - bottom)

    parts = []
    for tick in ticks(*y_range):
        parts.append(f'<path class="guide" d="M{left} {y(tick):.1f}H{width - right}"/>')
        parts.append(_text(left - 6, y(tick) + 4, y_format(tick), "end"))
    parts += [_text(x(tick), height - bottom + 16, x_format(tick), "middle") for tick in ticks(*x_range)]
    parts.append(_text((left + width - right) / 2, height - 3, x_label, "middle"))
    if level is not None:
        parts.append(f'<path class="level" d="M{left} {y(level[0]):.1f}H{width - right}"/>')
        parts.append(_text(width - right + 4, y(level[0]) + 4, level[1], "start"))
    for each in series:
        if each.low:
            upper = [f"{x(at):.1f} {y(value):.1f}" for at, value in zip(each.x, each.high, strict=True)]
            lower = [f"{x(at):.1f} {y(value):.1f}" for at, value in zip(each.x, each.low, strict=True)]
            parts.append(f'<path class="band {each.kind}" d="M{"L".join(upper + lower[::-1])}Z"/>')
    for each in series:
        places = [(x(at), y(value)) for at, value in zip(each.x, each.y, strict=True)]
        if each.points_only:
            parts += [f'<circle class="dot {each.kind}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>' for px, py in places]
        else:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
            parts.append(f'<path class="line {each.kind}" d="M{path}"/>')
        if each.marker:
            parts += [_text(px, py + 4, each.marker, "middle", f"mark {each.kind}") for px, py in places]
    for at, told in marks:
        parts.append(
            f'<g class="alarm"><title>{escape(told)}</title><path d="M{x(at):.1f} {top}V{height - bottom}"/>'
            f'<text x="{x(at):.1f}" y="{top - 3}" text-anchor="middle">▼</text></g>'
        )
    ends = [(y(each.y[-1]), each) for each in series if each.label]
    for place, each in _apart(ends, height - bottom):
        parts.append(
            _text(x(each.x[-1]) + (9 if each.marker else 4), place + 4, each.label, "start", f"end {each.kind}")
        )
    return _svg(width, height, title, parts)


def strips(
    title: str,
    rows: Sequence[Row],
    x_range: Range,
    *,
    x_format: Format,
    x_label: str,
    reference: float | None = None,
) -> str:
    """A row for each recipe: its name and figure, below them its interval and its runs on the common axis."""
    width, left, right = STRIP_WIDTH, 10, 10
    height = STRIP_HEIGHT * len(rows) + 42

    def x(value: float) -> float:
        return left + (value - x_range[0]) / ((x_range[1] - x_range[0]) or 1) * (width - left - right)

    bottom = STRIP_HEIGHT * len(rows) + 4
    parts = []
    for tick in ticks(*x_range):
        parts.append(f'<path class="guide" d="M{x(tick):.1f} 2V{bottom}"/>')
        parts.append(_text(x(tick), bottom + 15, x_format(tick), "middle"))
    parts.append(_text(width / 2, bottom + 32, x_label, "middle"))
    if reference is not None:
        parts.append(f'<path class="level" d="M{x(reference):.1f} 2V{bottom}"/>')
    for index, row in enumerate(rows):
        top = STRIP_HEIGHT * index
        middle = top + 25
        parts.append(_text(left, top + 14, fitted(row.name, NAME_LENGTH), "start", "name"))
        parts.append(_text(width - right, top + 14, row.text, "end", f"figure {row.kind}"))
        parts.append(f'<path class="interval {row.kind}" d="M{x(row.low):.1f} {middle}H{x(row.high):.1f}"/>')
        rug = "".join(f"M{x(value):.1f} {middle + 5}v6" for value in row.runs)
        if rug:
            parts.append(f'<path class="rug {row.kind}" d="{rug}"/>')
        hollow = "" if row.filled else " hollow"
        if row.kind == "base":
            parts.append(f'<rect class="point base" x="{x(row.value) - 4:.1f}" y="{middle - 4}" width="8" height="8"/>')
        else:
            parts.append(f'<circle class="point own{hollow}" cx="{x(row.value):.1f}" cy="{middle}" r="4.5"/>')
    return _svg(width, height, title, parts)


def _apart(ends: Sequence[tuple[float, Series]], lowest: float) -> list[tuple[float, Series]]:
    """The labels from top to bottom, moved so that none covers another or comes below ``lowest``."""
    ordered = sorted(ends, key=lambda end: end[0])
    places: list[float] = []
    for place, _ in ordered:
        if places and place < places[-1] + LABEL_GAP:
            # Two share the shift, so that both stay near their curves.
            places[-1] -= (places[-1] + LABEL_GAP - place) / 2 if len(places) == 1 else 0.0
            place = places[-1] + LABEL_GAP
        places.append(place)
    for index in reversed(range(len(places))):
        places[index] = min(places[index], lowest)
        lowest = places[index] - LABEL_GAP
    return [(place, each) for place, (_, each) in zip(places, ordered, strict=True)]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    told = escape(title, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{told}">{"".join(parts)}</svg>'
