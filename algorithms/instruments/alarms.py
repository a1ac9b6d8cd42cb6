"""Alarms over the rows of a run: entropy that collapses or explodes, success that collapses.

- ``Alarm``: one of them, at the step where it was raised. ``alarms``: all of a run.
- ``alarm_metrics``: which of them hold in the newest step, as metrics.

An alarm needs ``PERSISTENCE`` steps in a row that are out of bounds, since single steps play different tasks and differ
by chance. It is raised once, and again only after as many steps in a row within bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args

Kind = Literal["entropy collapse", "entropy explosion", "success collapse"]
KINDS: tuple[Kind, ...] = get_args(Kind)

BASELINE = 5
"""First steps within bounds, whose median entropy is what later steps are compared with; before there are so many, what
there is of them."""
PERSISTENCE = 3
"""Steps in a row that raise an alarm, or end it."""
COLLAPSE = 0.25
"""Of the baseline: an entropy below it has collapsed. Where success rises, a half is usual; at a quarter, samples of a
group are nearly the same, and there is little left to compare."""
EXPLOSION = 1.5
"""Of the baseline: an entropy above it, that also rose by ``RISE``, has exploded."""
RISE = 0.2
"""Nats a token: less than this is no explosion, however little there was."""
LOSS = 0.5
"""Of the best success: a rate at or below it has collapsed, if its interval agrees."""
SUCCESS_WINDOW = 3
"""Steps in a row whose median is a success that the policy had; the best of them is compared with."""


@dataclass(frozen=True)
class Alarm:
    """Raised once, at the last of the steps that it needs."""

    step: int
    kind: Kind
    text: str
    """One line for people, with the figures."""


def alarms(rows: Sequence[Mapping[str, Any]]) -> list[Alarm]:
    """Every alarm of a run, in the order of its steps.

    Args:
        rows: of ``metrics.jsonl``, in order; those of other phases than ``train`` are passed over. ``step``,
            ``entropy/action_mean``, ``success/rate``, ``success/low`` and ``success/high`` are read; a row without the
            figures of an alarm neither raises nor ends it.
    """
    return [alarm for _, raised in _watch(rows) for alarm in raised]


def alarm_metrics(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], list[Alarm]]:
    """``alarm/entropy_collapse`` and so on, 1 where the alarm holds after the last of ``rows`` and else 0; and the
    alarms that this row raised."""
    holds: frozenset[Kind] = frozenset()
    raised: list[Alarm] = []
    for holds, raised in _watch(rows):  # noqa: B007 - the last one is wanted
        pass
    return {f"alarm/{kind.replace(' ', '_')}": float(kind in holds) for kind in KINDS}, raised


def _watch(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[frozenset[Kind], list[Alarm]]]:
    """For each training row, the alarms that hold and those that it raised."""
    judges = (_Entropy(), _Success())
    streaks = dict.fromkeys(KINDS, 0)
    holds: set[Kind] = set()
    for row in rows:
        if row.get("phase", "train") != "train":
            continue
        raised = []
        for kind, reason in ((kind, reason) for judge in judges for kind, reason in judge(row).items()):
            streaks[kind] = streaks[kind] + 1 if (reason is not None) != (kind in holds) else 0
            if streaks[kind] < PERSISTENCE:
                continue
            streaks[kind] = 0
            if reason is None:
                holds.discard(kind)
            else:
                holds.add(kind)
                raised.append(Alarm(int(row["step"]), kind, f"{kind}: {reason}"))
        yield frozenset(holds), raised


class _Entropy:
    """Compares a step's entropy with the median of the first ones."""

    def __init__(self) -> None:
        self._first: list[float] = []

    def __call__(self, row: Mapping[str, Any]) -> dict[Kind, str | None]:
        """Why the step is out of bounds, or None; nothing where nothing can be said."""
        now = row.get("entropy/action_mean")
        if now is None or now != now:
            return {}
        before = median(self._first or [now])
        collapsed, exploded = now < COLLAPSE * before, now > EXPLOSION * before and now > before + RISE
        if len(self._first) < BASELINE and not (collapsed or exploded):
            self._first.append(now)
        figures = f"from {before:.3f} to {now:.3f} nats a token"
        return {
            "entropy collapse": f"fallen {figures}" if collapsed else None,
            "entropy explosion": f"risen {figures}" if exploded else None,
        }


class _Success:
    """Compares a step's success with the best that the policy had for some steps."""

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._lows: list[float] = []
        self._best = self._floor = 0.0

    def __call__(self, row: Mapping[str, Any]) -> dict[Kind, str | None]:
        rate, low, high = (row.get(f"success/{name}") for name in ("rate", "low", "high"))
        if rate is None or low is None or high is None or rate != rate:
            return {}
        best, floor = self._best, self._floor
        self._rates.append(rate)
        self._lows.append(low)
        if len(self._rates) >= SUCCESS_WINDOW:
            level = median(self._rates[-SUCCESS_WINDOW:])
            if level > best:
                self._best, self._floor = level, median(self._lows[-SUCCESS_WINDOW:])
        collapsed = high < floor and rate <= LOSS * best
        return {
            "success collapse": f"fallen from {best:.2f} to {rate:.2f} [{low:.2f}, {high:.2f}]" if collapsed else None
        }
