"""Many episodes through the pool while its workers are killed: nothing lost, nothing left, memory flat.

``python -m agentropy.benchmarks.pool_soak --episodes 10000 --kills 40`` plays random or expert actions on the tasks of
a world in turn, one after another in every slot, and sends SIGKILL to a worker at random moments. An episode whose
worker died is reported by the pool as failed and begun again. In the end every episode must be accounted for: finished
once, after as many failures as the pool told of, and no process may be left. Memory of this process and of all that it
started is sampled through the run; the growth reported is the slope of a straight line through the samples after the
first fifth, over the rest of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..config import load_config
from ..envs.pool import EnvPool, EnvResult, usable_cores
from .machine import descendants, describe_machine, resident, summary

SAMPLES = 200
"""Samples of memory in a run."""


class Soak:
    """The episodes of one run."""

    def __init__(self, pool: EnvPool, tasks: Sequence[str], episodes: int, turns: int, seed: int) -> None:
        self.finished: Counter[int] = Counter()
        self.failures: Counter[int] = Counter()
        self.steps = 0
        self.memory: list[tuple[float, int]] = []
        self._pool = pool
        self._tasks = tasks
        self._turns = turns
        self._seed = seed
        self._waiting = deque(range(episodes))
        self._playing: dict[int, int] = {}
        self._generator = np.random.default_rng(seed)

    def run(self, kills: int) -> None:
        """Play all episodes; kill ``kills`` workers at moments spread over them."""
        total = len(self._waiting)
        moments = deque(sorted(self._generator.integers(1, total, kills).tolist()))
        sampled = 0
        start = time.perf_counter()
        for slot in range(self._pool.num_envs):
            self._begin(slot)
        while self._playing:
            for result in self._pool.wait():
                self._go_on(result)
            done = self.finished.total()
            while moments and done >= moments[0]:
                moments.popleft()
                self._kill()
            if done * SAMPLES >= sampled * total:
                sampled = done * SAMPLES // total + 1
                here = os.getpid()
                memory = resident(here)
                self.memory.append((time.perf_counter() - start, memory))

    def _begin(self, slot: int) -> None:
        if not self._waiting:
            return
        episode = self._waiting.popleft()
        self._playing[slot] = episode
        self._pool.reset(slot, task=self._tasks[episode % len(self._tasks)])

    def _go_on(self, result: EnvResult) -> None:
        episode = self._playing[result.slot]
        if result.failed:
            self.failures[episode] += 1
            self._waiting.appendleft(episode)
        elif not (result.terminated or result.truncated) and result.info["turn"] < self._turns:
            self._pool.step(result.slot, self._action(episode, result.info))
            self.steps += 1
            return
        else:
            self.finished[episode] += 1
        del self._playing[result.slot]
        self._begin(result.slot)

    def _action(self, episode: int, info: dict[str, Any]) -> str:
        if info.get("expert"):
            return str(info["expert"])
        listed = info.get("admissible") or ["look"]
        generator = np.random.default_rng([self._seed, episode, int(info["turn"])])
        return str(listed[generator.integers(len(listed))])

    def _kill(self) -> None:
        pids = self._pool.pids()
        os.kill(pids[int(self._generator.integers(len(pids)))], signal.SIGKILL)


def growth(samples: Sequence[tuple[float, int]]) -> float:
    """Relative growth of memory over the run after its first fifth, by least squares."""
    kept = np.array(samples[len(samples) // 5 :], float)
    slope, level = np.polyfit(kept[:, 0], kept[:, 1], 1)
    first = slope * kept[0, 0] + level
    return float(slope * (kept[-1, 0] - kept[0, 0]) / first)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, play, print and write; exit with status 1 where something was lost or left."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.pool_soak", description=main.__doc__)
    parser.add_argument("--env", default="alfworld", help="world, as for `agentropy train`")
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--turns", type=int, default=8, help="turns after which an episode is left")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--tasks", type=int, default=500, help="tasks played in turn, evenly spaced over the split")
    parser.add_argument("--expert", action="store_true", help="play the expert's actions, not random ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    config = load_config(None, [f"env.id={options.env}"])
    kwargs = {"split": config.env.train_split, **({"expert_info": True} if options.expert else {})}
    machine = describe_machine(["gymnasium"])
    before = set(descendants(os.getpid()))
    start = time.perf_counter()
    with EnvPool(config.env.id, kwargs, num_envs=options.slots, num_workers=options.workers) as pool:
        tasks = pool.tasks(config.env.train_split)
        tasks = tasks[:: max(1, len(tasks) // options.tasks)][: options.tasks]
        soak = Soak(pool, tasks, options.episodes, options.turns, options.seed)
        soak.run(options.kills)
    seconds = time.perf_counter() - start
    left = set(descendants(os.getpid())) - before
    once = sum(count == 1 for count in soak.finished.values())
    report = {
        "machine": machine,
        "world": config.env.id,
        "episodes": options.episodes,
        "finished_once": once,
        "kills": options.kills,
        "failed_and_played_again": soak.failures.total(),
        "steps": soak.steps,
        "seconds": round(seconds, 1),
        "memory_mib": [round(memory / 2**20, 1) for _, memory in soak.memory],
        "memory_growth": round(growth(soak.memory), 4),
        "processes_left": len(left),
    }
    console = Console(highlight=False)
    console.print(
        f"{config.env.id}: {once} of {options.episodes} episodes finished once, {soak.failures.total()} failed with "
        f"{options.kills} killed workers and were played again; {soak.steps} steps in {seconds:.0f} s\n"
        f"memory {report['memory_mib'][len(soak.memory) // 5]:.0f} MiB after a fifth of the run, "  # type: ignore[index]
        f"{report['memory_mib'][-1]:.0f} MiB at its end, trend {report['memory_growth']:+.1%}; "  # type: ignore[index]
        f"processes left: {len(left)}\n{summary(machine)}"
    )
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    if once != options.episodes or left:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
