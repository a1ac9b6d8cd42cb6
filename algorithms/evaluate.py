"""Success on a fixed panel of tasks, with its interval.

- ``evaluate``: play every task of a panel once. ``Evaluation``: what came of it.
- ``evaluate_checkpoint``: the command ``agentropy eval``. ``panel_of``: the panel that a configuration names.
- ``summarise``: success, turns and entropy of any trees.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..agents.messages import Format
from ..agents.policies import Policy
from ..agents.rollout import Progress, RolloutTask
from ..agents.tree import Trajectory, Tree
from ..config import RunConfig
from .assembly import (
    engine_policy,
    load_agent,
    make_engine,
    make_pool,
    play_tasks,
    prepare_device,
    seed_from,
    select_tasks,
    tasks_of,
)
from .runs import write_atomically
from .stats import Proportion, panel_hash


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one pass over a panel.

    A task whose world failed counts as not won, and ``failed`` says how many did.
    ``families`` groups tasks by the part of their id before the first dash (ALFWorld's six task types).
    """

    split: str
    panel: str
    success: Proportion
    families: dict[str, Proportion]
    turns: float
    score: float
    entropy: float
    failed: int
    outcomes: dict[str, Any] = field(default_factory=dict)
    """What came of every episode: ``tasks`` [T], and ``won``, ``turns``, ``score``, each [T][samples]."""

    def metrics(self) -> dict[str, Any]:
        """The row for ``metrics.jsonl``."""
        low, high = self.success.interval
        return {
            "split": self.split,
            "panel": self.panel,
            "success/rate": self.success.rate,
            "success/low": low,
            "success/high": high,
            "success/wins": self.success.successes,
            "success/tasks": self.success.trials,
            **{f"success/{name}": value.rate for name, value in self.families.items()},
            "turns": self.turns,
            "score": self.score,
            "entropy/action_mean": self.entropy,
            "env/failed": self.failed,
        }


def panel_of(config: RunConfig, split: str) -> tuple[str, ...]:
    """``config.eval.tasks`` ids, evenly spaced over the sorted split, so of all families; or all of them."""
    return select_tasks(tasks_of(config.env, split), config.eval.tasks)


def evaluate(
    policy: Policy,
    format: Format,
    config: RunConfig,
    split: str,
    tasks: Sequence[str],
    *,
    samples: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Play every task ``samples`` times; success, score and turns are those of each task's first episode, whatever
    their number, and entropy is that of all. Seeds depend on ``config.eval.seed``, the task's id and the episode's
    number only."""
    panel = [RolloutTask(task, samples, seed_from(config.eval.seed, zlib.crc32(task.encode()))) for task in tasks]
    with make_pool(config.env, split, min(config.eval.batch, len(tasks) * samples)) as pool:
        trees = play_tasks(config, policy, pool, format, panel, split, progress)
    played = {
        name: [[getattr(episode, name) for episode in tree.trajectories] for tree in trees]
        for name in ("won", "turns", "score")
    }
    for tree in trees:
        del tree.trajectories[1:]
    return replace(summarise(trees, split, panel_hash(tasks)), outcomes={"tasks": list(tasks), **played})


def evaluate_checkpoint(config: RunConfig, path: str, split: str, *, out: str | None = None) -> Evaluation:
    """Evaluate a checkpoint or hub model on ``split``, print the result, and write it to ``out`` as JSON."""
    from rich.console import Console

    console = Console(highlight=False)
    tasks = panel_of(config, split)
    device = prepare_device(config)
    agent = load_agent(config, path, device)
    console.print(f"panel {panel_hash(tasks)}: {len(tasks)} tasks of {split}, temperature {config.eval.temperature:g}")
    with closing(make_engine(agent, config.engine)) as engine, console.status("playing …") as status:
        result = evaluate(
            engine_policy(agent, engine, config, config.eval.temperature),
            agent.format,
            config,
            split,
            tasks,
            progress=lambda count: status.update(f"{count.episodes}/{count.total} tasks"),
        )
    for name, success in result.families.items():
        console.print(f"  {name:32} {success}  ({success.trials} tasks)")
    failed = f", {result.failed} with a failed world" if result.failed else ""
    console.print(f"success {result.success} on {len(tasks)} tasks, {result.turns:.1f} turns{failed}", style="bold")
    if out is not None:
        write_atomically(Path(out), json.dumps({"model": path, **result.metrics()}, indent=2).encode())
    return result


def summarise(trees: Sequence[Tree], split: str, panel: str = "") -> Evaluation:
    """Success, turns and entropy over every trajectory of ``trees``."""
    episodes = [trajectory for tree in trees for trajectory in tree.trajectories]
    families: dict[str, list[Trajectory]] = defaultdict(list)
    for tree in trees:
        families[tree.task.split("-", 1)[0]] += tree.trajectories
    entropies = [node.entropies for tree in trees for node in tree.nodes if node.sampled and len(node.entropies)]
    return Evaluation(
        split=split,
        panel=panel,
        success=_proportion(episodes),
        families={name: _proportion(families[name]) for name in sorted(families)},
        turns=float(np.mean([episode.turns for episode in episodes])),
        score=float(np.mean([episode.score for episode in episodes])),
        entropy=float(np.concatenate(entropies).mean(dtype=np.float64)) if entropies else 0.0,
        failed=sum(episode.failed for episode in episodes),
    )


def _proportion(episodes: Sequence[Trajectory]) -> Proportion:
    return Proportion(sum(episode.won for episode in episodes), len(episodes))
