"""How fast ALFWorld resets and steps: the plain alfworld/TextWorld loop, both engines, and the pool.

``python -m agentropy.benchmarks.env_throughput`` plays the same games with the same random admissible commands in
every variant, in turns (all variants play a block of games before the next block starts, so that a noisy machine
disturbs all alike), checks that all read the same text, prints a table and writes JSON.

- *native*: the default engine; every game is one that was never loaded before.
- *textworld*: the engine that runs the domain and grammar as they are. *First visit*: a game that was never loaded on
  this machine; *cached*: its translation is on disk from an earlier process; *again*: the same episodes once more in
  the same process, every transition known.

A reset includes loading the game and its first list of admissible commands; a step includes the next list.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..envs.alfworld.games import Game, open_index
from ..envs.pool import EnvPool, EnvResult, usable_cores
from ..errors import EnvironmentFailedError, UsageError
from .machine import describe_machine, summary

WORLD = "agentropy/ALFWorld-v0"
STOCK = "alfworld/TextWorld loop"
BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"
REPEAT_SECONDS = 0.3
"""Episodes played *again* are repeated for at least so long, since one pass takes milliseconds."""


@dataclass
class Timing:
    """Counts and seconds of some episodes, and a digest of all that was read in each game."""

    resets: int = 0
    reset_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, other: Timing) -> None:
        self.resets += other.resets
        self.reset_seconds += other.reset_seconds
        self.steps += other.steps
        self.step_seconds += other.step_seconds
        self.digests |= other.digests


class Player:
    """Random admissible commands for one game; remembers what it read, to be compared later."""

    def __init__(self, task: str, seed: int) -> None:
        key = hashlib.blake2b(task.encode(), digest_size=8).digest()
        self._generator = np.random.default_rng([seed, int.from_bytes(key)])
        self._read: list[tuple[str, list[str]]] = []

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        commands = sorted(admissible)
        self._read.append((observation, commands))
        return commands[self._generator.integers(len(commands))]

    def end(self, observation: str, admissible: Sequence[str], won: bool) -> str:
        """Return a digest of the whole episode; the stock loop lists no commands after the goal."""
        self._read.append((observation, [] if won else sorted(admissible)))
        self._read[0] = (self._read[0][0].removeprefix(BANNER), self._read[0][1])
        return hashlib.blake2b(json.dumps(self._read).encode(), digest_size=16).hexdigest()


def play_stock(games: Sequence[Game], steps: int, seed: int) -> Timing:
    """The loop that alfworld runs: load, reset, step."""
    timing, env = Timing(), _stock_environment()
    for game in games:
        player = Player(game.id, seed)
        data = {"pddl_domain": game.domain, "pddl_problem": game.problem, "grammar": game.grammar}
        start = time.perf_counter()
        env.load(data)
        state = env.reset()
        timing.reset_seconds += time.perf_counter() - start
        timing.resets += 1
        done = False
        for _ in range(steps):
            action = player.act(state["feedback"], state["admissible_commands"])
            start = time.perf_counter()
            state, _, done = env.step(action)
            timing.step_seconds += time.perf_counter() - start
            timing.steps += 1
            if done:
                break
        timing.digests[game.id] = player.end(state["feedback"], state["admissible_commands"], done)
    return timing


@functools.cache
def _stock_environment() -> Any:
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv

    return AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))


def play_one(world: tuple[tuple[str, Any], ...], tasks: Sequence[str], steps: int, seed: int) -> Timing:
    """One environment, one episode after the other."""
    timing, env = Timing(), _environment(world)
    for task in tasks:
        player = Player(task, seed)
        start = time.perf_counter()
        observation, info = env.reset(options={"task": task})
        timing.reset_seconds += time.perf_counter() - start
        timing.resets += 1
        done = False
        for _ in range(steps):
            action = player.act(observation, info["admissible"])
            start = time.perf_counter()
            observation, _, done, _, info = env.step(action)
            timing.step_seconds += time.perf_counter() - start
            timing.steps += 1
            if done:
                break
        timing.digests[task] = player.end(observation, info["admissible"], done)
    return timing


@functools.cache
def _environment(world: tuple[tuple[str, Any], ...]) -> gymnasium.Env[str, str]:
    return gymnasium.make(WORLD, **dict(world), disable_env_checker=True)


def play_pool(pool: EnvPool, tasks: Sequence[str], steps: int, seed: int) -> Timing:
    """One episode per slot, all at once; a slot's next command is sent as soon as its answer is there."""
    timing, players = Timing(), [Player(task, seed) for task in tasks]
    start = time.perf_counter()
    for slot, task in enumerate(tasks):
        pool.reset(slot, task=task)
    results = pool.wait(all=True)
    timing.reset_seconds = time.perf_counter() - start
    timing.resets = len(tasks)
    left = [steps] * len(tasks)
    last: dict[int, EnvResult] = {}
    start = time.perf_counter()
    while True:
        for result in results:
            if result.failed:
                raise EnvironmentFailedError(f"{tasks[result.slot]}: {result.error}")
            if result.terminated or not left[result.slot]:
                last[result.slot] = result
                continue
            pool.step(result.slot, players[result.slot].act(result.observation, result.info["admissible"]))
            left[result.slot] -= 1
            timing.steps += 1
        if len(last) == len(tasks):
            break
        results = pool.wait()
    timing.step_seconds = time.perf_counter() - start
    for slot, result in last.items():
        timing.digests[tasks[slot]] = players[slot].end(
            result.observation, result.info["admissible"], result.terminated
        )
    return timing


def again(play: Callable[..., Timing], *arguments: Any) -> Timing:
    """Repeat ``play`` for ``REPEAT_SECONDS``."""
    total, end = Timing(), time.perf_counter() + REPEAT_SECONDS
    while not total.resets or time.perf_counter() < end:
        total.add(play(*arguments))
    return total


def measure(
    games: Sequence[Game], world: Mapping[str, Any], *, blocks: int, steps: int, seed: int, workers: int
) -> dict[str, list[Timing]]:
    """Play all games in every variant, block by block; the first game only warms everything up.

    Returns:
        One ``Timing`` per block for each variant, in the order of the table.
    """
    warm_up, *games = games
    world = {**world, "max_turns": steps + 1}
    native, textworld = (tuple(sorted({**world, "engine": engine}.items())) for engine in ("native", "textworld"))
    parts = [list(part) for part in np.array_split(np.array(games, dtype=object), blocks)]
    slots = max(workers, max(map(len, parts)))
    timings: dict[str, list[Timing]] = {}
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(tempfile.TemporaryDirectory())
        stock, fast, first, cached = (stack.enter_context(_process(here)) for _ in range(4))
        pool = stack.enter_context(EnvPool(WORLD, dict(native), num_envs=slots, num_workers=workers))

        def run(part: Sequence[Game]) -> Iterator[tuple[str, Timing]]:
            tasks = [game.id for game in part]
            yield STOCK, stock.submit(play_stock, part, steps, seed).result()
            yield "native, one environment", fast.submit(play_one, native, tasks, steps, seed).result()
            name = f"native, pool of {workers} worker{'s' if workers > 1 else ''}"
            yield name, play_pool(pool, tasks, steps, seed)
            yield "textworld, first visit", first.submit(play_one, textworld, tasks, steps, seed).result()
            yield "textworld, cached", cached.submit(play_one, textworld, tasks, steps, seed).result()
            yield "textworld, again", first.submit(again, play_one, textworld, tasks, steps, seed).result()

        play_pool(pool, [warm_up.id] * slots, 1, seed)
        for _ in run([warm_up]):
            pass
        for number, part in enumerate(parts, 1):
            for name, timing in run(part):
                timings.setdefault(name, []).append(timing)
            Console(stderr=True).print(f"block {number} of {blocks} played", style="dim")
    return timings


def _process(cache: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_use_cache, initargs=(cache,))


def _use_cache(folder: str) -> None:
    os.environ["AGENTROPY_CACHE"] = folder


def rates(timings: Sequence[Timing]) -> dict[str, list[float]]:
    """Resets and steps per second of each block."""
    return {
        "resets_per_second": [timing.resets / timing.reset_seconds for timing in timings],
        "steps_per_second": [timing.steps / timing.step_seconds for timing in timings],
    }


def identical_games(timings: Mapping[str, Sequence[Timing]]) -> tuple[int, int]:
    """How many games told the same, word for word, in every variant; and how many there are."""
    told: dict[str, set[str]] = {}
    for blocks in timings.values():
        for timing in blocks:
            for task, digest in timing.digests.items():
                told.setdefault(task, set()).add(digest)
    return sum(len(digests) == 1 for digests in told.values()), len(told)


def table(variants: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """Medians over the blocks, and how many times the stock loop that is."""
    shown = Table(title="ALFWorld throughput", box=box.SIMPLE_HEAD)
    shown.add_column("")
    for heading in ("resets/s", "× stock", "steps/s", "× stock"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, variant in variants.items():
        cells = []
        for metric, values in variant.items():
            median = statistics.median(values)
            cells += [_figure(median), _figure(median / statistics.median(variants[STOCK][metric]))]
        shown.add_row(name, *cells, end_section=name == STOCK or name.startswith("native, pool"))
    return shown


def _figure(value: float) -> str:
    """Two or three significant digits, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def find_world(source: str, data: str | None, split: str) -> dict[str, Any]:
    """The environment's arguments for ``--source``; ``auto`` takes a pack of the published games where there is one."""
    if source in ("auto", "pack") and data is None:
        shared = os.environ.get("AGENTROPY_SHARED_DATA")
        root = Path(shared) if shared else Path(__file__).parents[2] / "shared" / "data"
        found = root / "alfworld"
        if found.is_dir():
            data = str(found)
        elif source == "pack":
            raise UsageError("--source pack needs --data, the path of a pack file or of its folder")
    if source == "auto":
        source = "generated" if data is None else "pack"
    return {"split": split, "source": source} | ({} if source == "generated" else {"data": data})


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.env_throughput", description=main.__doc__)
    parser.add_argument("--games", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=5, help="groups of games to take medians over")
    parser.add_argument("--steps", type=int, default=10, help="steps per episode")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes of the pool")
    parser.add_argument("--source", choices=["auto", "pack", "generated", "dataset"], default="auto")
    parser.add_argument("--data", help="path of the pack or dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "env_throughput.json")
    options = parser.parse_args(arguments)
    if not 1 <= options.blocks <= options.games or options.steps < 1 or options.workers < 1:
        parser.error("expected 1 <= blocks <= games, steps >= 1 and workers >= 1")

    world = find_world(options.source, options.data, options.split)
    index = open_index(world["source"], world.get("data"))
    tasks = index.tasks(options.split)
    count = options.games + 1
    if count > len(tasks):
        parser.error(f"{options.split} has {len(tasks)} games; --games can be at most {len(tasks) - 1}")
    games = [index.load(options.split, tasks[number * len(tasks) // count]) for number in range(count)]

    machine = describe_machine(["gymnasium", "textworld", "alfworld", "fast-downward-textworld"])
    start = time.perf_counter()
    timings = measure(
        games, world, blocks=options.blocks, steps=options.steps, seed=options.seed, workers=options.workers
    )
    seconds = time.perf_counter() - start
    variants = {name: rates(blocks) for name, blocks in timings.items()}
    same, total = identical_games(timings)

    console = Console()
    console.print(table(variants))
    console.print(
        "native and first visit: games never loaded before · cached: translated by an earlier process\n"
        "again: the same episodes in the same process, every transition known\n\n"
        f"{options.games} {'published' if world['source'] != 'generated' else 'generated'} games of {options.split}, "
        f"{options.steps} random admissible commands each; medians of {options.blocks} blocks; {seconds:.0f} s\n"
        f"same text and admissible commands in all variants: {same} of {total} games\n{summary(machine)}",
        highlight=False,
    )
    settings = {name: getattr(options, name) for name in ("games", "blocks", "steps", "workers", "split", "seed")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine,
        "settings": {**settings, "source": world["source"]},
        "seconds": round(seconds, 1),
        "identical_games": same,
        "variants": variants,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"blocks and machine in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
