"""Finished runs of a grid from a known model, in the files that training leaves, without any training.

- ``fabricate``: write them. ``make_grid``: a grid in few words. ``MACHINE``: what they were not run on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentropy.algorithms.runs import evaluation_path
from agentropy.algorithms.stats import Proportion, panel_hash
from agentropy.benchmarks.comparison.grid import Cell, Grid, cells, starts
from agentropy.config import to_toml

MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "cpu": "Abacus 3000",
    "usable_cores": 2,
    "memory_gib": 8.0,
    "load_average": 0.5,
    "system": "Linux 6.1",
    "python": "3.11.7",
    "packages": {"agentropy": "0.1.0", "torch": "2.13.0"},
    "git_commit": "0123456789ab",
}
START, RISE = 0.3, 0.2
"""Mean success before training, and what training adds without any effect."""
WHOLE_SPLIT = 64
"""Tasks of a panel whose size the grid leaves open."""


def make_grid(
    recipes: Sequence[str] = ("grpo", "epo", "arpo"),
    *,
    seeds: int = 5,
    environments: Sequence[str] = ("alfworld",),
    panels: int = 2,
    tasks: int = 64,
    steps: int = 6,
    every: int = 2,
    samples: int = 3,
    **other: Any,
) -> Grid:
    """A grid whose baseline is the first of ``recipes``; ``other`` are keys of its own."""
    data = {
        "name": "fabricated",
        "seeds": list(range(seeds)),
        "baseline": recipes[0],
        "last": 2,
        "run": {
            "train": {"steps": steps, "tasks_per_step": 4, "group_size": 4},
            "eval": {"tasks": tasks, "every": every, "samples": samples},
        },
        "environment": [
            {"id": name, "out_of_distribution": "valid_unseen"}
            | ({"in_distribution": "valid_seen"} if panels == 2 else {})
            for name in environments
        ],
        "recipe": [{"name": "grpo", "label": name} for name in recipes],
    }
    return Grid.model_validate(data | other)


def fabricate(
    grid: Grid,
    folder: Path,
    rng: np.random.Generator,
    *,
    effect: Mapping[str, float] | None = None,
    seed_sd: float = 0.03,
    interaction_sd: float = 0.0,
    spread: float = 0.2,
    cost: Mapping[str, float] | None = None,
    last_entropy: Mapping[str, float] | None = None,
    unfinished: Collection[str] = (),
) -> None:
    """Write every run of ``grid`` into ``folder``, as it would be after the last step.

    A task is won with probability START + progress (RISE + effect + run) + task + interaction, held within [0, 1]:
    progress goes from 0 to 1 over the steps; ``task`` is uniform in ±``spread`` and shared by all recipes and seeds;
    ``run`` is normal, one number per run; ``interaction`` is normal, one number per recipe and task.

    Args:
        effect: by title of the recipe, what it adds to the probability by the end; else 0.
        seed_sd: standard deviation of ``run``.
        interaction_sd: standard deviation of ``interaction``.
        cost: by title, environment steps, tokens and seconds relative to the others; else 1.
        last_entropy: by title, nats a token at the end; else 0.5. All begin at 1.2.
        unfinished: titles of cells that are left out.
    """
    panels: dict[tuple[str, str], np.ndarray] = {}
    interactions: dict[tuple[str, str, str], np.ndarray] = {}
    for cell in [*starts(grid, folder), *cells(grid, folder)]:
        gain = RISE + rng.normal(0, seed_sd)
        title = None if cell.recipe is None else cell.recipe.title
        if title is not None:
            gain += (effect or {}).get(title, 0.0)
        levels = {}
        for split in cell.environment.panels.values():
            size = cell.config.eval.tasks or WHOLE_SPLIT
            key = (cell.environment.title, split)
            if key not in panels:
                panels[key] = rng.uniform(-spread, spread, size)
            levels[split] = panels[key]
            if title is not None:
                if (title, *key) not in interactions:
                    interactions[title, *key] = rng.normal(0, interaction_sd, size)
                levels[split] = panels[key] + interactions[title, *key]
        if cell.title not in unfinished:
            relative = (cost or {}).get(title or "", 1.0)
            _write(cell, levels, gain, relative, (last_entropy or {}).get(title or "", 0.5), rng)


def _write(
    cell: Cell,
    levels: Mapping[str, np.ndarray],
    gain: float,
    cost: float,
    last_entropy: float,
    rng: np.random.Generator,
) -> None:
    config = cell.config
    (cell.folder / "evaluations").mkdir(parents=True)
    (cell.folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    steps, every = config.train.steps, config.eval.every
    rows: list[dict[str, Any]] = []
    if config.eval.before or not steps:
        rows += _evaluate(cell, 0, levels, 0.0, rng)
    for step in range(1, steps + 1):
        progress = _progress(step / steps)
        rows.append(_train_row(cell, step, gain * progress, cost, 1.2 + (last_entropy - 1.2) * progress, rng))
        if step == steps or (every and step % every == 0):
            rows += _evaluate(cell, step, levels, gain * progress, rng)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (cell.folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    cell.checkpoint.mkdir(parents=True)
    (cell.checkpoint / "state.json").write_text('{"version": 1, "state": {"dict": []}}', encoding="utf-8")


def _progress(share: float) -> float:
    """Fast at first; 0 at 0 and 1 at 1."""
    return float((1 - np.exp(-2 * share)) / (1 - np.exp(-2)))


def _train_row(
    cell: Cell, step: int, gain: float, cost: float, entropy: float, rng: np.random.Generator
) -> dict[str, Any]:
    episodes = cell.config.train.tasks_per_step * cell.config.train.group_size
    success = Proportion(int(rng.binomial(episodes, np.clip(START + gain, 0, 1))), episodes)
    turns = float(40 - 20 * success.rate)
    return {
        "phase": "train",
        "step": step,
        "success/rate": success.rate,
        "success/low": success.interval[0],
        "success/high": success.interval[1],
        "episodes": episodes,
        "turns": turns,
        "reward": success.rate,
        "env/failed": 0,
        "env/steps": turns * episodes * cost,
        "entropy/action_mean": float(entropy + rng.normal(0, 0.02)),
        "entropy/by_turn": [entropy, entropy / 2],
        "tokens/sampled": int(turns * episodes * 5 * cost),
        "time/rollout_seconds": 2.0 * cost * rng.uniform(0.9, 1.1),
        "time/update_seconds": 3.0 * cost * rng.uniform(0.9, 1.1),
    }


def _evaluate(
    cell: Cell, step: int, levels: Mapping[str, np.ndarray], gain: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Play each panel, write what came of it, and return the rows."""
    config, rows = cell.config, []
    samples = config.eval.samples if step == config.train.steps else 1
    for split, level in levels.items():
        chance = np.clip(START + gain + level, 0, 1)
        won = rng.random((len(chance), samples)) < chance[:, None]
        turns = np.where(won, rng.integers(8, 30, won.shape), 50)
        tasks = [f"{split}/task-{number:04d}" for number in range(len(chance))]
        found = {
            "step": step,
            "split": split,
            "panel": panel_hash(tasks),
            "temperature": config.eval.temperature,
            "tasks": tasks,
            "won": won.tolist(),
            "turns": turns.tolist(),
            "score": won.astype(float).tolist(),
        }
        path = evaluation_path(cell.folder, step, split)
        path.write_text(json.dumps(found), encoding="utf-8")
        success = Proportion(int(won[:, 0].sum()), len(tasks))
        low, high = success.interval
        rows.append(
            {"phase": "eval" if split == config.env.eval_split else f"eval/{split}", "step": step, "split": split}
            | {"panel": found["panel"], "success/rate": success.rate, "success/low": low, "success/high": high}
            | {"success/wins": success.successes, "success/tasks": success.trials}
            | {"turns": float(turns[:, 0].mean()), "env/failed": 0, "time/seconds": 1.0}
        )
    return rows
