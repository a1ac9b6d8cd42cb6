"""Small figures, one for each recipe beside the baseline, rather than all recipes in one.

- ``curves``: of an environment: success over steps and costs, repeated episodes, entropies and laws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .figures import Figure, Gallery, base_note, budgets, equal_costs, percents, rounded
from .findings import DIMENSIONS
from .svg import Kind, Series, lines
from .words import Report, enumerated, number, panel_name, seconds, share


def curves(baseline: str, environment: Report) -> Iterator[Gallery]:
    """Learning curves, costs, repeated episodes, entropies and laws; what has no data is left out."""
    panels = environment["panels"]
    for panel in panels:
        yield Gallery(
            f"Learning curves on {panel_name(panel)}",
            _against(baseline, panel, "Bands: 95 % intervals."),
            _curves(baseline, panel, "step"),
        )
    for panel in panels:
        reached = budgets(panel)
        if reached:
            yield Gallery(
                f"Success at equal cost on {panel_name(panel)}",
                "At the largest cost that the runs of every recipe have reached, interpolated between evaluations. "
                f"No test was made of these.{base_note(baseline, panel)}",
                equal_costs(baseline, panel, reached),
                small=False,
            )
            yield Gallery(
                f"Curves over cost on {panel_name(panel)}",
                _against(baseline, panel, "Bands: 95 % intervals."),
                [figure for name in reached for figure in _curves(baseline, panel, name)],
                folded=True,
            )
    for panel in panels:
        if all(each["samples"] > 1 for each in panel["recipes"]):
            yield Gallery(
                f"Repeated episodes on {panel_name(panel)}",
                _against(baseline, panel, "▲ pass@k: at least one of k episodes wins. ▼ pass^k: all of them."),
                _repeats(baseline, panel),
            )
    entropies = _entropies(baseline, environment)
    if entropies:
        yield Gallery(
            "Entropy while training",
            _against(baseline, environment, "Nats a sampled token. Bands: lowest to highest run. ▼ above: an alarm."),
            entropies,
        )
    laws = list(_laws(environment))
    if laws:
        yield Gallery(
            "The law of entropy and success",
            "R = −a exp(H) + b over all training steps of all runs (2505.22617); points are means over runs, the line "
            "across is the ceiling b − a, where no entropy is left. It need not hold where a recipe steers entropy.",
            laws,
        )


def _against(baseline: str, held: Report, text: str) -> str:
    there = len(held["recipes"]) > 1 and any(each["recipe"] == baseline for each in held["recipes"])
    return f"Full line: the recipe. Dashed: {baseline}. {text}" if there else text


def _pairs(baseline: str, recipes: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Any]]:
    """Each recipe with the baseline's entry, or None where there is none; the baseline alone where it is the only."""
    base = next((each for each in recipes if each["recipe"] == baseline), None)
    others = [(each, base) for each in recipes if each is not base]
    return others or [(each, None) for each in recipes]


def _curves(baseline: str, panel: Report, over: str) -> list[Figure]:
    """Success against steps or a cost, for each recipe and the baseline."""
    entries = [entry for each in panel["recipes"] for entry in each["curve"]]
    y_range = rounded(min(entry["low"] for entry in entries), max(entry["high"] for entry in entries))
    axes = {each["recipe"]: [entry[over] for entry in each["costs"]] for each in panel["recipes"]}
    x_range = (0.0, float(max(max(places) for places in axes.values())))
    words = DIMENSIONS.get(over, "training steps")
    figures = []
    for each, base in _pairs(baseline, panel["recipes"]):
        series = [_curve("own", axes[each["recipe"]], each["curve"])]
        caption = f"{share(each['curve'][-1]['value'])} %"
        if base is not None:
            series.insert(0, _curve("base", axes[baseline], base["curve"]))
            caption += f"; {baseline} {share(base['curve'][-1]['value'])} %"
        if over != "step":
            tell = seconds if over == "seconds" else number
            caption = f"{tell(axes[each['recipe']][-1])} {words}: {caption}"
            if base is not None:
                caption += f" after {tell(axes[baseline][-1])}"
        drawing = lines(
            f"Success of {each['recipe']} on {panel_name(panel)} over {words}: {caption}.",
            series,
            x_range,
            y_range,
            x_label=words,
            y_format=percents,
        )
        figures.append(Figure(drawing, each["recipe"], f"{caption}."))
    return figures


def _curve(kind: Kind, places: Sequence[float], curve: Sequence[Mapping[str, float]]) -> Series:
    value, low, high = ([entry[name] for entry in curve] for name in ("value", "low", "high"))
    return Series(kind, places, value, low, high, label=share(value[-1]))


def _repeats(baseline: str, panel: Report) -> list[Figure]:
    figures = []
    most = min(each["samples"] for each in panel["recipes"])
    for each, base in _pairs(baseline, panel["recipes"]):
        series = []
        for kind, entry in _both(base, each):
            for name, marker in (("pass_at_k", "▲"), ("pass_hat_k", "▼")):
                places = [float(found["k"]) for found in entry[name][:most]]
                values = [found["value"] for found in entry[name][:most]]
                series.append(Series(kind, places, values, marker=marker, label=share(values[-1])))
        caption = f"pass@{most} {series[-2].label} %, pass^{most} {series[-1].label} %"
        if base is not None:
            caption += f"; {baseline} {series[0].label} and {series[1].label} %"
        drawing = lines(
            f"Repeated episodes of {each['recipe']} on {panel_name(panel)}: {caption}.",
            series,
            (1.0, float(most)),
            (0.0, 1.0),
            x_label="k episodes of a task",
            y_format=percents,
        )
        figures.append(Figure(drawing, each["recipe"], f"{caption}."))
    return figures


def _both(base: Report | None, own: Report) -> list[tuple[Kind, Report]]:
    """The baseline first, so that the recipe is drawn over it."""
    return [("own", own)] if base is None else [("base", base), ("own", own)]


def _entropies(baseline: str, environment: Report) -> list[Figure]:
    recipes = [each for each in environment["recipes"] if each["entropy"]]
    entries = [entry for each in recipes for entry in each["entropy"]]
    if not entries:
        return []
    y_range = (0.0, max(entry["high"] for entry in entries) * 1.05 or 1.0)
    x_range = (float(min(entry["step"] for entry in entries)), float(max(entry["step"] for entry in entries)))
    figures = []
    for each, base in _pairs(baseline, recipes):
        series = []
        for kind, found in _both(base, each):
            step, value, low, high = (
                [entry[name] for entry in found["entropy"]] for name in ("step", "value", "low", "high")
            )
            series.append(Series(kind, step, value, low, high, label=f"{value[-1]:.2f}"))
        first, last = each["entropy"][0]["value"], each["entropy"][-1]["value"]
        caption = f"{first:.2f} to {last:.2f} nats"
        alarms = [(alarm["step"], f"seed {alarm['seed']}: {alarm['text']}") for alarm in each["alarms"]]
        if alarms:
            kinds = sorted({alarm["kind"] for alarm in each["alarms"]})
            runs = len({alarm["seed"] for alarm in each["alarms"]})
            caption += f"; {enumerated(kinds)} in {runs} of {len(each['seeds'])} runs"
        drawing = lines(
            f"Entropy of {each['recipe']}: {caption}.",
            series,
            x_range,
            y_range,
            x_label="training steps",
            y_format=lambda value: f"{value:g}",
            marks=alarms,
        )
        figures.append(Figure(drawing, each["recipe"], f"{caption}."))
    return figures


def _laws(environment: Report) -> Iterator[Figure]:
    """Success against entropy where the fit has a slope; all of one range."""
    fitted = [each for each in environment["recipes"] if each["law"] and each["law"]["a"] and each["entropy"]]
    if not fitted:
        return
    heights = [entry["value"] for each in fitted for entry in each["entropy"]]
    x_range = (0.0, max(heights))
    for each in fitted:
        law = each["law"]
        entropy = [entry["value"] for entry in each["entropy"]]
        success = [entry["value"] for entry in each["success"]]
        places = np.linspace(0.0, max(entropy), 24)
        fit = law["b"] - law["a"] * np.exp(places)
        inside = (fit >= 0) & (fit <= 1)
        series = [Series("own", entropy, success, points_only=True)]
        if inside.any():
            series.append(Series("own", places[inside].tolist(), fit[inside].tolist()))
        caption = f"Ceiling {share(law['ceiling'])} %, R² {law['r2']:.2f}"
        if law["heldout_error"] is not None:
            caption += f"; from the first half, the second is missed by {share(law['heldout_error'])} points"
        ceiling = law["ceiling"]
        drawing = lines(
            f"Entropy and success of {each['recipe']}: {caption}.",
            series,
            x_range,
            (0.0, 1.0),
            x_label="entropy, nats a token",
            y_format=percents,
            x_format=lambda value: f"{value:g}",
            level=(ceiling, share(ceiling)) if 0 <= ceiling <= 1 else None,
        )
        yield Figure(drawing, each["recipe"], f"{caption}.")
