"""What a comparison can tell, and what it cannot, in sentences.

- ``findings``: of a whole report, each a ``Finding``. ``panel_findings``: of one panel.
- ``costs``, ``alarmed``: what the runs of an environment spent, and the alarms that they raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .words import Report, enumerated, missing, number, panel_name, plural, points, q_value, seconds, share

DIMENSIONS = {"env_steps": "environment steps", "tokens": "sampled tokens", "seconds": "seconds"}


@dataclass(frozen=True)
class Finding:
    """Sentences about one thing."""

    about: str
    text: str


def findings(report: Report) -> list[Finding]:
    """In the order of their weight: differences, what would have been missed, costs, what is not finished."""
    found = []
    several = len(report["environments"]) > 1
    for environment in report["environments"]:
        for panel in environment["panels"]:
            about = (f"{environment['label']}, " if several else "") + panel_name(panel)
            found.append(Finding(about, " ".join(panel_findings(report["baseline"], panel))))
    for kind, tell in (("Costs", costs), ("Alarms", alarmed)):
        for environment in report["environments"]:
            text = tell(environment)
            if text:
                found.append(Finding(f"{environment['label']}, {kind.lower()}" if several else kind, text))
    left = missing(report)
    if left:
        count = f"{plural(len(report['missing']), 'run')} of {report['planned']}"
        found.append(Finding("Not finished", f"{count}, and nothing here is of them: {'; '.join(left)}."))
    return found


def panel_findings(baseline: str, panel: Report) -> list[str]:
    """Which recipes differ from the baseline on a panel, and how large a difference would have been seen."""
    compared: Sequence[Mapping[str, Any]] = panel["comparisons"]
    if not compared:
        others = [each["recipe"] for each in panel["recipes"] if each["recipe"] != baseline]
        if len(others) < len(panel["recipes"]):
            rest = " shares a seed with it" if others else " is finished"
            return [f"Nothing was compared, since no recipe but {baseline}{rest}."]
        return [f"Nothing was compared, since the baseline {baseline} has no finished run."]
    testable = [each for each in compared if each["seeds"] > 1]
    if not testable:
        return [
            f"Nothing can be told apart from {baseline}: with one seed, the chance that lies between runs cannot be "
            "seen. Intervals are of those runs alone, over tasks."
        ]
    found = []
    for each in testable:
        if each["differs"]:
            side = "above" if each["difference"]["value"] > 0 else "below"
            found.append(
                f"{each['recipe']} is {side} {baseline}: {points(each['difference'])} points, "
                f"q {_is(q_value(each['q']))}."
            )
    alike = [each["recipe"] for each in testable if not each["differs"]]
    if alike and not found:
        found.append(f"No recipe can be told apart from {baseline}.")
    elif alike:
        found.append(f"{enumerated(alike)} cannot be told apart from {baseline}.")
    found += _sensitivity(testable)
    short = [each for each in compared if each["seeds"] < max(other["seeds"] for other in compared)]
    if short:
        by_count = (f"{each['recipe']} on {plural(each['seeds'], 'seed')}" for each in short)
        found.append(f"Fewer seeds were compared for {enumerated(list(by_count))}.")
    return found


def _sensitivity(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """The difference that would still have been missed one time in five."""
    sizes = [each["smallest_effect"]["among_all"] for each in compared]
    if not any(sizes):
        return ["The differences of all seeds are the same, so the chance between runs cannot be estimated."]
    low, high = min(filter(None, sizes)), max(filter(None, sizes))
    counts = sorted({each["seeds"] for each in compared})
    seeds = plural(counts[-1], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    if low >= 1:
        return [f"With {seeds}, differences of single seeds vary so much that none of any size would surely be found."]
    if share(low) == share(high):
        size = f"{share(low)} points"
    else:
        size = f"{share(low)} to {share(high)} points (by recipe)" if high < 1 else f"{share(low)} points or more"
    return [f"With {seeds}, a true difference of {size} would have been missed 1 time in 5."]


def costs(environment: Report) -> str | None:
    """What the runs of each recipe spent, where that differs by a tenth or more."""
    recipes = environment["recipes"]
    if len(recipes) < 2:
        return None
    told = []
    for name, words in DIMENSIONS.items():
        least, most = (choose(recipes, key=lambda each: each["costs"][name]) for choose in (min, max))
        tell = seconds if name == "seconds" else number
        if most["costs"][name] >= 1.1 * least["costs"][name]:
            low, high = (tell(each["costs"][name]) for each in (least, most))
            told.append(f"{low} ({least['recipe']}) to {high} ({most['recipe']}) {words}")
    if not told:
        return "All recipes spent about the same: environment steps, tokens and seconds differ by less than a tenth."
    return f"Equal steps are not equal costs: runs took {enumerated(told)}."


def alarmed(environment: Report) -> str | None:
    """Which recipes raised alarms, and in how many runs."""
    told = []
    for recipe in environment["recipes"]:
        kinds = sorted({alarm["kind"] for alarm in recipe["alarms"]})
        for kind in kinds:
            runs = len({alarm["seed"] for alarm in recipe["alarms"] if alarm["kind"] == kind})
            told.append(f"{kind} in {runs} of {plural(len(recipe['seeds']), 'run')} of {recipe['recipe']}")
    return f"{enumerated(told)}." if told else None


def _is(q: str) -> str:
    return q if q.startswith("<") else f"= {q}"
