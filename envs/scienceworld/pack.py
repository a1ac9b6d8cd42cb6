"""Write the solutions that are shipped with the package: ``python -m agentropy.envs.scienceworld.pack``.

- ``wanted``: the variations of a task in the order in which they are worth having.
- ``write``: the file of solutions.
- ``main``: gather solutions that are kept on disk, let the simulator write missing ones, and pack them.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .gold import SHIPPED, cached_at, gold_path, stored, version
from .simulator import Seat
from .tasks import TASKS, VARIATIONS, resolve, split_variations

MOST_BYTES = 400_000


def wanted(task: str) -> Iterator[int]:
    """Yield the first variation of each split, then the training ones so that every prefix is spread evenly."""
    train = split_variations(task, "train")
    firsts = [split_variations(task, split)[0] for split in ("train", "dev", "test")]
    yield from firsts
    step = 1 << len(train).bit_length()
    seen = set(firsts)
    while step:
        for variation in train[::step]:
            if variation not in seen:
                seen.add(variation)
                yield variation
        step //= 2


def write(paths: Mapping[str, Mapping[int, Sequence[str]]], file: Path) -> int:
    """Write solutions by task and variation; return the size in bytes."""
    ordered = {
        task: {str(number): list(paths[task][number]) for number in sorted(paths[task])} for task in sorted(paths)
    }
    text = json.dumps({version(): ordered}, separators=(",", ":"))
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    file.write_bytes(packed)
    return len(packed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and pack."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.envs.scienceworld.pack", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the simulator may write solutions")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    paths: dict[str, dict[int, tuple[str, ...]]] = {task: {} for task in TASKS}
    for task in TASKS:
        for variation in range(VARIATIONS[task]):
            if path := stored(task, variation):
                paths[task][variation] = path
            elif cached_at(task, variation, resolve(("easy",), task)).exists():
                paths[task][variation] = ()  # read below
    seat = Seat()
    try:
        for task in TASKS:
            for variation, path in paths[task].items():
                paths[task][variation] = path or gold_path(seat.simulator, task, variation, resolve(("easy",), task))
        # One more of each task in turn, until time is up.
        end = time.monotonic() + options.seconds
        orders = {task: wanted(task) for task in TASKS}
        while orders and time.monotonic() < end:
            for task in list(orders):
                missing = next((one for one in orders[task] if one not in paths[task]), None)
                if missing is None:
                    del orders[task]
                elif time.monotonic() < end:
                    paths[task][missing] = gold_path(seat.simulator, task, missing, resolve(("easy",), task))
    finally:
        seat.leave()
    size = write(paths, options.out)
    print(f"{sum(map(len, paths.values()))} solutions, {size} bytes{' (too many)' if size > MOST_BYTES else ''}")


if __name__ == "__main__":
    main()
