"""From the runs of a grid to its report, as values that JSON can hold.

- ``analyse``: everything that the report says, before it is written for people.

The final score of a run is the mean of its last evaluations, ``Grid.last`` of them: the maximum over evaluations, which
is often published, grows with their number alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

from ...algorithms.instruments.alarms import alarms
from ...algorithms.instruments.law import fit_law
from ...algorithms.instruments.support import pass_at_k, pass_hat_k
from ...algorithms.stats import panel_hash
from ...errors import UsageError
from . import statistics
from .grid import Cell, EnvironmentEntry, Grid, RecipeEntry, cells, to_toml
from .results import Evaluation, Run, read_evaluations, read_run

Floats = NDArray[np.float64]
Report = dict[str, Any]

FORMAT_VERSION = 1
COSTS = ("episodes", "env_steps", "tokens", "seconds")
TARGET_RISE = 0.1
"""Above the start's success: the target, where the grid names none."""


def analyse(grid: Grid, folder: Path, machine: Mapping[str, Any]) -> Report:
    """The report of what is finished of a grid in ``folder``.

    Every interval is drawn by a generator of one seed, so equal runs give equal reports.

    Raises:
        UsageError: nothing is finished, or runs of one panel were evaluated on different tasks or steps.
    """
    rng = np.random.default_rng(0)
    planned = cells(grid, folder)
    finished = [cell for cell in planned if cell.done]
    if not finished:
        raise UsageError(f"'{folder}' holds no finished run of this comparison yet")
    environments = [
        _environment(grid, folder, entry, [cell for cell in finished if cell.environment.title == entry.title], rng)
        for entry in grid.environment
        if any(cell.environment.title == entry.title for cell in finished)
    ]
    _adjust(environments)
    return {
        "format": FORMAT_VERSION,
        "name": grid.name,
        "machine": dict(machine),
        "grid": to_toml(grid),
        "baseline": grid.baseline,
        "warm_start": grid.warm_start.per,
        "last": grid.last,
        "seeds": grid.seeds,
        "planned": len(planned),
        "finished": len(finished),
        "missing": [cell.title for cell in planned if not cell.done],
        "environments": environments,
        "aggregate": _aggregate(grid, environments, rng),
    }


def _environment(
    grid: Grid, folder: Path, entry: EnvironmentEntry, finished: Sequence[Cell], rng: np.random.Generator
) -> Report:
    splits = list(entry.panels.values())
    begun = {cell.start.folder for cell in finished if cell.start is not None}
    first = {start: {split: read_evaluations(start, split) for split in splits} for start in begun}
    # In the order of the grid, whatever is finished.
    runs: dict[str, list[Run]] = {recipe.title: [] for recipe in grid.recipe}
    for cell in finished:
        assert cell.recipe is not None
        run = read_run(cell.folder, cell.seed, splits)
        if cell.start is not None:
            before = first[cell.start.folder]
            run = replace(run, evaluations={split: (*before[split], *run.evaluations[split]) for split in splits})
        runs[cell.recipe.title].append(run)
    runs = {title: each for title, each in runs.items() if each}
    panels = [_panel(grid, entry, kind, split, runs, rng) for kind, split in entry.panels.items()]
    recipes = {recipe.title: recipe for recipe in grid.recipe}
    return {
        "label": entry.title,
        "id": entry.id,
        "panels": panels,
        "recipes": [_training(recipes[title], folder, each) for title, each in runs.items()],
    }


def _panel(
    grid: Grid,
    entry: EnvironmentEntry,
    kind: str,
    split: str,
    runs: Mapping[str, Sequence[Run]],
    rng: np.random.Generator,
) -> Report:
    """One panel: every recipe's scores on it, and each against the baseline."""
    one = next(iter(runs.values()))[0]
    some = one.evaluations[split]
    tasks, steps = some[0].tasks, [each.step for each in some]
    for run in (run for each in runs.values() for run in each):
        found = run.evaluations[split]
        if [each.step for each in found] != steps or any(each.tasks != tasks for each in found):
            raise UsageError(
                f"'{run.folder}' was evaluated on other tasks of {split} or after other steps than '{one.folder}' and "
                "its start; the runs of a comparison must share both"
            )
    start = np.stack([run.evaluations[split][0].rates for each in runs.values() for run in each])
    target = grid.target if grid.target is not None else min(1.0, round(float(start.mean()) + TARGET_RISE, 2))
    scores = {
        title: np.stack([_final(run.evaluations[split], grid.last) for run in each]) for title, each in runs.items()
    }
    return {
        "kind": kind,
        "split": split,
        "tasks": len(tasks),
        "hash": panel_hash(tasks),
        "steps": steps,
        "target": target,
        "recipes": [
            {"recipe": title, **_scores(each, split, scores[title], target, rng)} for title, each in runs.items()
        ],
        "comparisons": _comparisons(grid.baseline, runs, scores, rng),
    }


def _final(evaluations: Sequence[Evaluation], last: int) -> Floats:
    """[T]: success of each task over the last evaluations; the start is not one of them where there are others."""
    after = [each for each in evaluations if each.step > 0] or list(evaluations)
    return np.mean([each.rates for each in after[-last:]], axis=0)


def _scores(runs: Sequence[Run], split: str, final: Floats, target: float, rng: np.random.Generator) -> Report:
    curves = np.stack([[each.rates for each in run.evaluations[split]] for run in runs])  # [S, E, T]
    steps = np.array([each.step for each in runs[0].evaluations[split]], np.float64)
    ends = [run.evaluations[split][-1] for run in runs]
    areas = trapezoid(curves, steps, axis=1) / (steps[-1] - steps[0]) if len(steps) > 1 else final
    samples = min(each.won.shape[1] for each in ends)
    counts = np.stack([each.won[:, :samples].sum(1) for each in ends]).astype(np.int64)  # [S, T]

    def by_k(estimate: Any) -> list[Report]:
        every = range(1, samples + 1)
        return [{"k": k} | statistics.rate_interval(estimate(samples, counts, k), rng).to_dict() for k in every]

    return {
        "final": statistics.rate_interval(final, rng).to_dict(),
        "final_by_seed": {str(run.seed): float(row.mean()) for run, row in zip(runs, final, strict=True)},
        "area": statistics.rate_interval(areas, rng).to_dict(),
        "curve": [
            {"step": int(step)} | statistics.rate_interval(curves[:, number], rng).to_dict()
            for number, step in enumerate(steps)
        ],
        "costs": [
            {"step": int(step)}
            | {name: float(np.mean([getattr(run.spent_by(int(step)), name) for run in runs])) for name in COSTS}
            for step in steps
        ],
        "samples": samples,
        "pass_at_k": by_k(pass_at_k),
        "pass_hat_k": by_k(pass_hat_k),
        "turns": statistics.crossed_interval(np.stack([each.turns.mean(1) for each in ends]), rng).to_dict(),
        "to_target": _to_target(runs, split, target),
    }


def _to_target(runs: Sequence[Run], split: str, target: float) -> Report:
    """Environment steps by the first evaluation at the target: the median over all seeds, where one that never came so
    far has taken more than any. Of those alone that did, a recipe that seldom does would look cheap."""
    spent = []
    for run in runs:
        hit = next((each.step for each in run.evaluations[split] if each.rates.mean() >= target), None)
        spent.append(math.inf if hit is None else run.spent_by(hit).env_steps)
    middle = median(spent)
    reached = sum(map(math.isfinite, spent))
    return {"reached": reached, "seeds": len(runs), "env_steps": middle if math.isfinite(middle) else None}


def _comparisons(
    baseline: str, runs: Mapping[str, Sequence[Run]], scores: Mapping[str, Floats], rng: np.random.Generator
) -> list[Report]:
    """Each recipe against the baseline, on the seeds that both have finished."""
    if baseline not in runs:
        return []
    found = []
    for title in runs:
        if title == baseline:
            continue
        seeds = sorted({run.seed for run in runs[title]} & {run.seed for run in runs[baseline]})
        if not seeds:
            continue
        ours, theirs = (
            scores[name][[next(i for i, run in enumerate(runs[name]) if run.seed == seed) for seed in seeds]]
            for name in (title, baseline)
        )
        result = statistics.compare(ours, theirs, rng)
        found.append(
            {
                "recipe": title,
                "difference": result.difference.to_dict(),
                "p": result.p,
                "improvement": result.improvement.to_dict(),
                "deviation": None if math.isnan(result.deviation) else result.deviation,
                "seeds": result.seeds,
            }
        )
    return found


def _adjust(environments: Sequence[Report]) -> None:
    """Correct all comparisons of the report together, and say which of them tell two recipes apart. Those of one seed,
    which have no test, are not among them."""
    every = [entry for each in environments for panel in each["panels"] for entry in panel["comparisons"]]
    for entry in every:
        entry |= {"q": 1.0, "differs": False, "smallest_effect": {"alone": None, "among_all": None}}
    tested = [entry for entry in every if entry["deviation"] is not None]
    for entry, q in zip(tested, statistics.adjust([entry["p"] for entry in tested]), strict=True):
        entry["q"] = q
        entry["differs"] = statistics.differs(q, statistics.Interval(**entry["difference"]))
        entry["smallest_effect"] = {
            name: statistics.smallest_effect(entry["deviation"], entry["seeds"], number)
            for name, number in (("alone", 1), ("among_all", len(tested)))
        }


def _training(recipe: RecipeEntry, folder: Path, runs: Sequence[Run]) -> Report:
    """What a recipe's runs did while they trained."""
    steps = [row["step"] for row in runs[0].train]
    # None where it was not finite.
    entropies = np.array([[row["entropy/action_mean"] for row in run.train] for run in runs], np.float64)
    known = [number for number in range(len(steps)) if np.isfinite(entropies[:, number]).all()]
    spent = [run.costs[-1] for run in runs]
    return {
        "recipe": recipe.title,
        "name": recipe.name,
        "preset": recipe.preset,
        "options": recipe.options,
        "seeds": [run.seed for run in runs],
        "runs": [run.folder.relative_to(folder).as_posix() for run in runs],
        "costs": {name: float(np.mean([getattr(cost, name) for cost in spent])) for name in COSTS},
        "entropy": [{"step": steps[number], **_spread(entropies[:, number])} for number in known],
        "success": [
            {"step": steps[number], "value": float(np.mean([run.train[number]["success/rate"] for run in runs]))}
            for number in known
        ],
        "law": _law(runs),
        "alarms": [
            {"seed": run.seed, "step": alarm.step, "kind": alarm.kind, "text": alarm.text}
            for run in runs
            for alarm in alarms(run.train)
        ],
    }


def _spread(values: Floats) -> Report:
    return {"value": float(values.mean()), "low": float(values.min()), "high": float(values.max())}


def _law(runs: Sequence[Run]) -> Report | None:
    """R = -a exp(H) + b over the training steps of all runs, taken in the order of steps."""
    rows = sorted((row for run in runs for row in run.train), key=lambda row: row["step"])
    fit = fit_law([row["entropy/action_mean"] for row in rows], [row["success/rate"] for row in rows])
    return None if fit is None else asdict(fit)


def _aggregate(grid: Grid, environments: Sequence[Report], rng: np.random.Generator) -> list[Report]:
    """Interquartile mean of the final scores over all runs and panels, for recipes that finished every seed."""
    found = []
    for recipe in grid.recipe:
        columns = []
        for panel in (panel for each in environments for panel in each["panels"]):
            entry = next((entry for entry in panel["recipes"] if entry["recipe"] == recipe.title), None)
            columns.append([entry["final_by_seed"].get(str(seed)) for seed in grid.seeds] if entry else [None])
        if any(score is None for column in columns for score in column):
            continue
        scores = np.array(columns, np.float64).T
        found.append({"recipe": recipe.title, **statistics.interquartile_mean(scores, rng).to_dict()})
    return found
