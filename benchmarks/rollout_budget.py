"""What a finished trajectory costs: independent episodes (GRPO) beside rollouts that fork (ARPO, AEPO).

``python -m agentropy.benchmarks.rollout_budget`` plays the same ALFWorld tasks with every recipe at M = 8 and 16
episodes a task, and prints a table and writes JSON: environment steps, sampled tokens and prefilled tokens for each
finished trajectory. Steps and tokens before a fork count once; what AEPO's probes cost counts too. Each figure is the
mean over all task groups of all seeds, with a 95 % interval; prefilled tokens are the mean over seeds, since groups
share the engine's cache.

The policy is a checkpoint (``--model``), or a small model after a warm start that this command makes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from ..agents.engines.base import Engine
from ..agents.rollout import RolloutTask
from ..agents.tree import Tree
from ..algorithms.assembly import (
    Agent,
    engine_policy,
    load_agent,
    make_engine,
    make_pool,
    play_tasks,
    prepare_device,
    seed_from,
    tasks_of,
)
from ..algorithms.budget import rollout_metrics
from ..algorithms.checkpoint import latest_checkpoint
from ..algorithms.display import Display
from ..algorithms.recipe import Recipe
from ..algorithms.recipes import recipe
from ..algorithms.runs import RunFolder
from ..algorithms.trainer import Trainer
from ..config import RunConfig, load_config
from ..envs.pool import EnvPool
from .machine import describe_machine, summary

ROWS: tuple[tuple[str, str | None], ...] = (
    ("grpo", None),
    ("arpo", None),
    ("arpo", "paper"),
    ("arpo", "official"),
    ("aepo", None),
    ("aepo", "paper"),
    ("aepo", "official"),
)
"""Recipe and preset of each row of the table."""


def warm_start(config: RunConfig, folder: Path) -> Path:
    """Train a small model on expert play and return its checkpoint."""
    config = config.model_copy(deep=True)
    config.run_dir, config.train.steps, config.eval.tasks = str(folder), 0, 32
    run = RunFolder.plan(config)
    with Display(Console(stderr=True)) as display:
        Trainer(run, display).train()
    run.close()
    found = latest_checkpoint(run.checkpoints)
    assert found is not None
    return found


def play(
    config: RunConfig,
    agent: Agent,
    engine: Engine,
    pool: EnvPool,
    made: Recipe,
    size: int,
    seed: int,
) -> tuple[list[Tree], dict[str, float]]:
    """The trees of one recipe on the tasks of ``seed``, and what the engine did for them."""
    names = tasks_of(config.env, config.env.train_split)
    order = np.random.default_rng([seed, 1]).permutation(len(names))[: config.train.tasks_per_step]
    tasks = [RolloutTask(names[place], size, seed_from(seed, 2, place)) for place in order.tolist()]
    engine.load_weights(None, version=0)
    before = (engine.stats.decode_tokens, engine.stats.prefill_tokens)
    top_k = made.branching.entropy_top_k if made.branching is not None else 0
    policy = engine_policy(agent, engine, config, config.agent.temperature, top_k)
    started = time.perf_counter()
    trees = play_tasks(config, policy, pool, agent.format, tasks, config.env.train_split, branching=made.branching)
    seconds = time.perf_counter() - started
    episodes = size * len(tasks)
    return trees, {
        "prefilled": (engine.stats.prefill_tokens - before[1]) / episodes,
        "sampled": (engine.stats.decode_tokens - before[0]) / episodes,
        "seconds": seconds / episodes,
        **rollout_metrics(trees),
    }


def sampled_tokens(tree: Tree) -> int:
    """Tokens that the policy wrote for the group, its probe included."""
    return sum(len(node.tokens) for node in tree.nodes if node.sampled) + tree.info.get("probe", {}).get("tokens", 0)


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and half-width of its 95 % interval."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    quantile = float(student.ppf(0.975, max(1, len(values) - 1)))
    return {"mean": float(np.mean(values)), "half_width": quantile * spread / len(values) ** 0.5}


def measure(config: RunConfig, agent: Agent, sizes: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each recipe and group size."""
    engine = make_engine(agent)
    entries = []
    for size in sizes:
        slots = size * config.train.tasks_per_step
        with make_pool(config.env, config.env.train_split, slots, **config.env.train_kwargs) as pool:
            for row in ROWS:
                made = recipe(row[0], preset=row[1])  # one for all seeds, so that what it remembers plays its part
                groups: list[Tree] = []
                costs: list[dict[str, float]] = []
                for seed in seeds:
                    trees, cost = play(config, agent, engine, pool, made, size, seed)
                    groups += trees
                    costs.append(cost)
                episodes = [episode for tree in groups for episode in tree.trajectories]
                entries.append(
                    {
                        "recipe": row[0],
                        "preset": row[1],
                        "group_size": size,
                        "groups": len(groups),
                        "env_steps": mean_interval([tree.env_steps / size for tree in groups]),
                        "sampled_tokens": mean_interval([sampled_tokens(tree) / size for tree in groups]),
                        "prefilled_tokens": mean_interval([cost["prefilled"] for cost in costs]),
                        "turns": mean_interval(
                            [float(np.mean([e.turns for e in tree.trajectories])) for tree in groups]
                        ),
                        "won": float(np.mean([episode.won for episode in episodes])),
                        "fresh": float(np.mean([tree.info.get("initial", size) for tree in groups])),
                        "probe_steps": float(np.mean([cost.get("branch/probe_steps", 0.0) for cost in costs])),
                        "seconds": float(np.median([cost["seconds"] for cost in costs])),
                    }
                )
    return entries


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """The table for people; shares are of GRPO at the same group size."""
    out = Table(title="cost of one finished trajectory (95 % interval over task groups)")
    for column in (
        "M",
        "recipe",
        "fresh",
        "env steps",
        "of GRPO",
        "sampled",
        "of GRPO",
        "prefilled",
        "of GRPO",
        "turns",
    ):
        out.add_column(column, justify="right" if column != "recipe" else "left", no_wrap=True)
    base = {entry["group_size"]: entry for entry in entries if entry["recipe"] == "grpo"}
    for entry in entries:
        cells = [str(entry["group_size"]), entry["recipe"] + (f" ({entry['preset']})" if entry["preset"] else "")]
        cells.append(f"{entry['fresh']:.1f}")
        for name in ("env_steps", "sampled_tokens", "prefilled_tokens"):
            value = entry[name]
            cells += [
                f"{value['mean']:.1f} ± {value['half_width']:.1f}",
                f"{value['mean'] / base[entry['group_size']][name]['mean']:.2f}",
            ]
        out.add_row(*cells, f"{entry['turns']['mean']:.1f}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.rollout_budget", description=__doc__)
    parser.add_argument("--model", help="checkpoint folder; a small model after a warm start when left out")
    parser.add_argument("--warm-start", type=int, default=800, help="expert tasks of the warm start")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tasks", type=int, default=16, help="tasks for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rollout_budget.json"))
    options = parser.parse_args(argv)
    config = load_config(None, [f"train.tasks_per_step={options.tasks}", f"sft.tasks={options.warm_start}"])
    device = prepare_device(config)
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or warm_start(config, Path(folder) / "warm")
        agent = load_agent(config, path, device)
    machine = describe_machine(("torch", "transformers"))
    entries = measure(config, agent, options.group_sizes, options.seeds)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table(entries))
    console.print(summary(machine), style="dim")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    made = f"small model after a warm start on {options.warm_start} tasks"
    document = {"machine": machine, "model": Path(options.model).name if options.model else made}
    options.out.write_text(json.dumps(document | {"entries": entries}, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {options.out}", style="dim")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
