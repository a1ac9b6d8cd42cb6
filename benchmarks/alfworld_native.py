"""Plays ALFWorld games on both engines side by side, and measures how fast the native one is.

``python -m agentropy.benchmarks.alfworld_native --pack FOLDER`` follows the walkthrough of every game of the pack and
of ``--generated`` games of each generated split, evenly spaced over its ids, and ``--steps`` random commands in
``--walks`` games of each split; it stops at the first difference in texts, admissible commands, display names, facts
or endings. It also measures resets and steps a second of the native engine on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from ..envs.alfworld.engine import GroundedGame
from ..envs.alfworld.games import Game, GameIndex, open_index
from ..envs.alfworld.native import NativeGame, unsupported
from .machine import describe_machine


def difference(game: Game, rng: random.Random, steps: int) -> str | None:
    """Play ``game`` on both engines: its walkthrough, then ``steps`` random commands; return what differs first."""
    why = unsupported(game)
    if why is not None:
        return f"{game.id}: not played natively, its {why}"
    ours, theirs = NativeGame(game), GroundedGame(game)
    if ours.intro != theirs.intro or ours.names != theirs.names:
        return f"{game.id}: the first text or the names: {ours.intro!r} != {theirs.intro!r}"

    def at(path: list[str], one: object, two: object) -> str | None:
        for what, first, second in (
            ("commands", ours.admissible(one), theirs.admissible(two)),  # type: ignore[arg-type]
            ("facts", ours.facts(one), theirs.facts(two)),  # type: ignore[arg-type]
            ("end", one.won, two.won),  # type: ignore[attr-defined]
        ):
            if first != second:
                return f"{game.id}: {what} after {path}: {first!r} != {second!r}"
        return None

    for walk in (game.walkthrough, None):
        one, two = ours.root, theirs.root
        path: list[str] = []
        found = at(path, one, two)
        for turn in range(steps if walk is None else len(walk)):
            if found:
                return found
            if walk is not None:
                command = walk[turn]
            else:  # half of the commands that do something lead elsewhere; rarely those, or little happens anywhere
                near = [command for command in ours.admissible(one) if not command.startswith("go to")]
                command = rng.choice(near if rng.random() < 0.7 else ours.admissible(one))
            path.append(command)
            after, expected = ours.step(one, command), theirs.step(two, command)
            if after is None or expected is None or after[1] != expected[1]:
                return f"{game.id}: the answer to {path}: {after and after[1]!r} != {expected and expected[1]!r}"
            one, two = after[0], expected[0]
            found = at(path, one, two)
        if found:
            return found
        if walk and not one.won:
            return f"{game.id}: the walkthrough does not win"
    return None


def compare(index: GameIndex, games: int | None, steps: int, walks: int) -> dict[str, int]:
    """Compare ``games`` (None: all) of each split of ``index``; the random walk is taken in ``walks`` of them."""
    counts = {}
    for split in index.splits:
        tasks = index.tasks(split)
        tasks = tasks[:: max(1, len(tasks) // games)][:games] if games else tasks
        walked = set(random.Random(0).sample(tasks, min(walks, len(tasks))))
        for number, task in enumerate(tasks):
            found = difference(index.load(split, task), random.Random(number), steps if task in walked else 0)
            if found:
                raise SystemExit(f"the engines differ: {found}")
        counts[split] = len(tasks)
        print(f"{split}: {len(tasks)} walkthroughs and {len(walked)} walks of {steps} steps are the same", flush=True)
    return counts


def speed(index: GameIndex, split: str, games: int, steps: int) -> dict[str, float]:
    """Measure first resets (reading the game included) and random steps, each with its admissible commands."""
    tasks = random.Random(0).sample(index.tasks(split), games)
    started = time.perf_counter()
    loaded = []
    for task in tasks:
        game = index.load(split, task)
        if unsupported(game):
            raise SystemExit(f"{task} is not played natively")
        loaded.append(NativeGame(game))
        loaded[-1].admissible(loaded[-1].root)
    reset_seconds = time.perf_counter() - started
    rng = random.Random(0)
    started = time.perf_counter()
    for played in loaded:
        state = played.root
        for _ in range(steps):
            move = played.step(state, rng.choice(played.admissible(state)))
            assert move is not None
            state = move[0]
            played.admissible(state)
    return {
        "resets_per_second": games / reset_seconds,
        "steps_per_second": games * steps / (time.perf_counter() - started),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="a pack of published games to play as well")
    parser.add_argument("--walks", type=int, default=250, help="games of each split that are walked at random")
    parser.add_argument("--steps", type=int, default=20, help="random commands in each of them")
    parser.add_argument("--generated", type=int, default=200, help="games of each generated split")
    parser.add_argument("--games", type=int, default=400, help="games whose speed is measured")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    sources = {"generated": open_index("generated")}
    if options.pack is not None:
        sources["pack"] = open_index("pack", options.pack)
    result: dict[str, object] = {"machine": describe_machine(["textworld", "fast-downward-textworld", "alfworld"])}
    for name, index in sources.items():
        print(f"{name} games")
        result[name] = {
            "speed": (measured := speed(index, "train", options.games, 50)),
            "same": compare(index, options.generated if name == "generated" else None, options.steps, options.walks),
        }
        print(f"{measured['resets_per_second']:.0f} resets/s, {measured['steps_per_second']:,.0f} steps/s on one core")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
