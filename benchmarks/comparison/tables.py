"""The tables of a comparison, as cells of text that any form can set.

- ``Table``. ``main_table``, ``repeat_table``: of a panel. ``training_table``: of an environment.
  ``aggregate_table``: over environments.
"""

from __future__ import annotations

from dataclasses import dataclass

from .words import Report, chance, number, percent, points, q_value, seconds, share

EMPTY = "–"


@dataclass(frozen=True)
class Table:
    """Columns of text; the first is set flush left, the others flush right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    """Rows of recipes that are told apart from the baseline: their difference stands out."""
    difference: int | None = None
    """Number of the column that is then marked."""


def main_table(baseline: str, environment: Report, panel: Report) -> Table:
    """Score, difference from the baseline, and cost of every recipe."""
    compared = {each["recipe"]: each for each in panel["comparisons"]}
    spent = {each["recipe"]: each["costs"] for each in environment["recipes"]}
    rows, marked = [], set()
    for index, each in enumerate(panel["recipes"]):
        comparison, costs = compared.get(each["recipe"]), spent[each["recipe"]]
        row = [each["recipe"], percent(each["final"])]
        if comparison:
            tested = comparison["seeds"] > 1
            row.append(points(comparison["difference"]))
            row.append(q_value(comparison["q"]) if tested else EMPTY)
            row.append(chance(comparison["improvement"]) if tested else EMPTY)
            if comparison["differs"]:
                marked.add(index)
        elif compared:
            row += ["baseline" if each["recipe"] == baseline else EMPTY, EMPTY, EMPTY]
        row.append(share(each["area"]["value"]))
        row += [number(costs["env_steps"]), number(costs["tokens"]), seconds(costs["seconds"])]
        rows.append(tuple(row))
    against = (f"difference from {baseline}, points [95 %]", "q", "P(better)") if compared else ()
    columns = ("recipe", "final success, % [95 %]", *against, "AUC, %", "env steps", "tokens", "seconds")
    return Table(columns, tuple(rows), frozenset(marked), difference=2 if compared else None)


def repeat_table(panel: Report) -> Table:
    """Success over repeated episodes of each task, turns, and the cost of reaching the target."""
    samples = min(each["samples"] for each in panel["recipes"])
    chosen = sorted({2, samples} & set(range(2, samples + 1)))
    columns = ["recipe", "pass@1, %"] if samples > 1 else ["recipe"]
    columns += [f"pass@{k}, %" for k in chosen] + [f"pass^{k}, %" for k in chosen]
    columns += ["turns [95 %]", f"env steps to {100 * panel['target']:g} %", "reached by"]
    rows = []
    for each in panel["recipes"]:
        row = [each["recipe"]]
        if samples > 1:
            row.append(share(each["pass_at_k"][0]["value"]))
        row += [share(each[kind][k - 1]["value"]) for kind in ("pass_at_k", "pass_hat_k") for k in chosen]
        turns, target = each["turns"], each["to_target"]
        row.append(f"{turns['value']:.1f} [{turns['low']:.1f}, {turns['high']:.1f}]")
        row.append(EMPTY if target["env_steps"] is None else number(target["env_steps"]))
        row.append(f"{target['reached']} of {target['seeds']}")
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))


def training_table(environment: Report) -> Table:
    """Entropy, the law and alarms of every recipe's runs."""
    columns = ("recipe", "seeds", "episodes", "entropy first → last", "law: ceiling, %", "R²", "alarms")
    rows = []
    for each in environment["recipes"]:
        entropy, law = each["entropy"], each["law"]
        if law is not None and not law["a"]:  # success never moved: there is nothing to fit
            law = None
        told = EMPTY
        if entropy:
            told = f"{entropy[0]['value']:.2f} → {entropy[-1]['value']:.2f}"
        rows.append(
            (
                each["recipe"],
                str(len(each["seeds"])),
                number(each["costs"]["episodes"]),
                told,
                EMPTY if law is None else share(law["ceiling"]),
                EMPTY if law is None else f"{law['r2']:.2f}".replace("-", "−"),
                str(len(each["alarms"])) if each["alarms"] else "none",
            )
        )
    return Table(columns, tuple(rows))


def aggregate_table(report: Report) -> Table:
    """Interquartile mean over all runs, panels and environments."""
    rows = tuple((each["recipe"], percent(each)) for each in report["aggregate"])
    return Table(("recipe", "interquartile mean of final success, % [95 %]"), rows)
