"""The words and figures that the Markdown and the page of a comparison share.

- ``percent``, ``share``, ``points``, ``signed``, ``number``, ``seconds``, ``q_value``, ``chance``: figures as people
  read them.
- ``enumerated``, ``plural``: lists and counts in a sentence.
- ``head``, ``machine``: what was compared, on what. ``how_to_read``: the terms. ``panel_name``, ``missing``: names of
  panels, and of runs that are not finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

HOW_TO_READ = (
    "The final score of a run is the mean success over its last {last}, never the maximum over evaluations, which "
    "grows with their number alone. In brackets: 95 % intervals, from a bootstrap that draws whole runs and whole "
    "tasks (of one seed: tasks alone).",
    "Differences are paired by seed and task; q is the p-value of a paired t-test over seeds, corrected for all "
    "comparisons in this report (Benjamini and Hochberg). Two recipes are told apart, marked {mark}, where q < 0.05 "
    "and the interval excludes 0. Recipes are compared with the baseline, not with each other, and all with the same "
    "runs of it: its luck is in every difference.",
    "P(better) is the chance that a run scores above one of the baseline, ties counting half; where the "
    "runs of the two do not overlap, a bootstrap has no interval to give. AUC is the mean success over training steps. "
    "Environment steps, tokens and seconds are means over runs and leave evaluations out; environment steps to a level "
    "are the median over runs, with none where half of them or more did not come so far.",
)
SHARED_START = (
    "All runs of an environment began from one warm start, whatever their seed: what another start would have given is "
    "in no interval and no test here."
)


def percent(entry: Mapping[str, float]) -> str:
    """A share and its interval, in percent.

    >>> percent({"value": 0.5234, "low": 0.41, "high": 0.6})
    '52.3 [41.0, 60.0]'
    """
    return f"{share(entry['value'])} [{share(entry['low'])}, {share(entry['high'])}]"


def share(value: float) -> str:
    """In percent, with one decimal."""
    return _minus(f"{100 * value:.1f}")


def points(entry: Mapping[str, float]) -> str:
    """A difference of shares and its interval, in percentage points.

    >>> points({"value": -0.0251, "low": -0.1, "high": 0.05})
    '−2.5 [−10.0, +5.0]'
    """
    return f"{signed(entry['value'])} [{signed(entry['low'])}, {signed(entry['high'])}]"


def signed(value: float) -> str:
    """In percentage points, with its sign; 0.0 has none."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else _minus(text)


def number(value: float) -> str:
    """A count, with thousands set apart.

    >>> number(1234567.4)
    '1,234,567'
    """
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """With one decimal below a hundred."""
    return number(value) if value >= 100 else f"{value:.1f}"


def q_value(value: float) -> str:
    """Three decimals, and no claim to more.

    >>> q_value(0.00012), q_value(0.31)
    ('< 0.001', '0.310')
    """
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def chance(entry: Mapping[str, float]) -> str:
    """A probability and its interval, if it has one.

    >>> chance({"value": 0.84, "low": 0.5, "high": 1.0}), chance({"value": 1.0, "low": 1.0, "high": 1.0})
    ('0.84 [0.50, 1.00]', '1.00')
    """
    if entry["low"] == entry["high"]:
        return f"{entry['value']:.2f}"
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def plural(count: int, word: str) -> str:
    """The count with its noun.

    >>> plural(1, "seed"), plural(5, "seed")
    ('1 seed', '5 seeds')
    """
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def enumerated(names: Sequence[str]) -> str:
    """The names as a list in a sentence.

    >>> enumerated(["arpo"]), enumerated(["arpo", "epo", "empg"])
    ('arpo', 'arpo, epo and empg')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def panel_name(panel: Report) -> str:
    """The split, and what kind of panel it is."""
    return f"{panel['split']} ({panel['kind']})"


def head(report: Report) -> list[str]:
    """Sentences: the extent of the grid, the panels, and the machine."""
    environments = report["environments"]
    recipes = {recipe["recipe"] for each in environments for recipe in each["recipes"]}
    seeds = f"{plural(len(report['seeds']), 'seed')} ({', '.join(map(str, report['seeds']))})"
    extent = f"{plural(len(recipes), 'recipe')} × {plural(len(environments), 'environment')} × {seeds}"
    extent += f", {report['finished']} of {plural(report['planned'], 'run')} finished"
    budgets = {each["label"]: _budget(each) for each in environments}
    shared = set(budgets.values())
    budget = shared.pop() if len(shared) == 1 else "; ".join(f"{name}: {each}" for name, each in budgets.items())
    panels = [
        f"{each['label']}: "
        + "; ".join(f"{panel_name(panel)}, {number(panel['tasks'])} tasks, {panel['hash']}" for panel in each["panels"])
        for each in environments
    ]
    return [f"{extent}; {budget}.", f"Panels, with their hashes: {'. '.join(panels)}.", machine(report["machine"])]


def _budget(environment: Report) -> str:
    episodes = sorted({round(recipe["costs"]["episodes"]) for recipe in environment["recipes"]})
    spent = " to ".join(number(each) for each in sorted({episodes[0], episodes[-1]}))
    return f"{plural(environment['panels'][0]['steps'][-1], 'training step')}, {spent} episodes a run"


def machine(described: Report) -> str:
    """What the runs were made on, in one sentence; whatever was not noted is left out."""
    packages = described.get("packages") or {}
    parts = [
        described.get("cpu"),
        plural(described["usable_cores"], "core") if described.get("usable_cores") else None,
        described.get("gpu"),
        f"Python {described['python']}" if described.get("python") else None,
        *(f"{name} {version}" for name, version in packages.items() if name in ("agentropy", "torch") and version),
        f"commit {described['git_commit']}" if described.get("git_commit") else None,
        str(described.get("date") or "")[:10],
    ]
    return ", ".join(part for part in parts if part) + "."


def how_to_read(report: Report, mark: str) -> list[str]:
    """Sentences on intervals, q-values and scores; ``mark`` is how this form marks a difference."""
    last = "evaluation" if report["last"] == 1 else f"{report['last']} evaluations"
    shared = [SHARED_START] if report["warm_start"] == "environment" else []
    return [*(sentence.format(last=last, mark=mark) for sentence in HOW_TO_READ), *shared]


def missing(report: Report) -> list[str]:
    """``recipe, environment: seeds`` of what is planned and not finished."""
    found: dict[str, list[str]] = {}
    for title in report["missing"]:
        name, _, seed = title.rpartition(", seed ")
        found.setdefault(name, []).append(seed)
    return [f"{name}: seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}" for name, seeds in found.items()]


def _minus(text: str) -> str:
    return text.replace("-", "−")
