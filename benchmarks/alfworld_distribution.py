"""Generated ALFWorld games beside the published ones: rooms, objects, solutions and text.

``python -m agentropy.benchmarks.alfworld_distribution --pack FOLDER`` reads games of both sources, plays the
walkthroughs of some of them, prints one table (Markdown) and writes JSON. Without ``--pack`` only generated games are
described.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from ..envs.alfworld.engine import GroundedGame
from ..envs.alfworld.expert import parse_problem
from ..envs.alfworld.games import TASK_TYPES, Game, GameIndex, open_index
from .machine import describe_machine

KINDS: Final = {0: "kitchen", 2: "living room", 3: "bedroom", 4: "bathroom"}
Measures = dict[str, list[float]]


def room_kind(task_id: str) -> str:
    """Return the kind of room from the floor plan's number in a task id."""
    return KINDS[int(task_id.partition("/")[0].rpartition("-")[2]) // 100]


def describe(game: Game) -> Measures:
    """Return what can be counted in a problem without playing it; keys name the rows of the table."""
    problem = parse_problem(game.problem)
    facts: defaultdict[str, list[Any]] = defaultdict(list)
    for predicate, *arguments in problem.facts:
        facts[predicate].append(arguments)
    kinds = dict(facts["objecttype"])
    closed = {name for (name,) in facts["openable"]}
    carried = {name for (name,) in facts["pickupable"]}
    inside = [(name, place) for name, place in facts["inreceptacle"] if name in carried]
    targets = [(name, place) for name, place in inside if kinds.get(name) == problem.goal.object]
    room = room_kind(game.id)
    return {
        f"{room}: objects that can be taken": [len({name for name, _ in inside})],
        f"{room}: receptacles": [len(facts["receptacletype"])],
        f"{room}: receptacles that open": [len(closed)],
        "instances of the goal's object": [len({name for name, _ in targets})],
        "share of the goal's objects in closed receptacles": [float(place in closed) for _, place in targets],
        "share of all objects in closed receptacles": [float(place in closed) for _, place in inside],
        "receptacles reached from one place": list(
            map(float, Counter(at for _, at in facts["receptacleatlocation"]).values())
        ),
        f"walkthrough, {game.task_type}": [len(game.walkthrough)],
    }


def play(game: Game) -> Measures:
    """Play the walkthrough and return the lengths of what is read, in characters, and of the lists of commands."""
    grounded = GroundedGame(game)
    node = grounded.root
    texts, menus = [], [len(grounded.admissible(node))]
    for command in game.walkthrough:
        move = grounded.step(node, command)
        if move is None:
            break
        node, text = move
        texts.append(len(text))
        menus.append(len(grounded.admissible(node)))
    return {
        "first observation, characters": [len(grounded.intro)],
        "later observations, characters": list(map(float, texts)),
        "admissible commands": list(map(float, menus)),
    }


def collect(index: GameIndex, split: str, games: int, played: int) -> tuple[Measures, dict[str, float]]:
    """Return the measures of ``games`` evenly spaced games, ``played`` of them with text, and the mix of task types."""
    tasks = spaced(index.tasks(split), games)
    measures: defaultdict[str, list[float]] = defaultdict(list)
    for task in tasks:
        _extend(measures, describe(index.load(split, task)))
    for task in spaced(tasks, played):
        _extend(measures, play(index.load(split, task)))
    counts = Counter(task.partition("-")[0] for task in index.tasks(split))
    return dict(measures), {kind: counts[kind] / sum(counts.values()) for kind in TASK_TYPES}


def spaced(tasks: Sequence[str], number: int) -> list[str]:
    """Return ``number`` of ``tasks`` at even distances."""
    number = min(number, len(tasks))
    return [tasks[at * len(tasks) // number] for at in range(number)]


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Return mean, median and the 10th and 90th percentile."""
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "mean": statistics.fmean(ordered),
        "p10": ordered[len(ordered) // 10],
        "median": statistics.median(ordered),
        "p90": ordered[min(len(ordered) - 1, 9 * len(ordered) // 10)],
    }


def markdown(columns: dict[str, dict[str, Any]]) -> str:
    """Return the table of all sources: mean, then median and the range from the 10th to the 90th percentile."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column["measures"]))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for kind in TASK_TYPES:
        cells = (f"{column['task_types'][kind]:.3f}" for column in columns.values())
        lines.append(f"| share of {kind} | " + " | ".join(cells) + " |")
    for name in sorted(rows):
        cells = (_cell(name, column["measures"].get(name)) for column in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, summary: dict[str, float] | None) -> str:
    if summary is None:
        return "-"
    if name.startswith("share"):
        return f"{summary['mean']:.3f}"
    return f"{summary['mean']:.1f} ({summary['median']:g}; {summary['p10']:g} to {summary['p90']:g})"


def _extend(measures: defaultdict[str, list[float]], more: Measures) -> None:
    for name, values in more.items():
        measures[name] += values


def main(arguments: Iterable[str] | None = None) -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="pack of the published games (file or folder)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--games", type=int, default=2000, help="games per source that are counted")
    parser.add_argument("--played", type=int, default=100, help="games per source that are played for their text")
    parser.add_argument("--output", type=Path, default=Path("alfworld_distribution.json"))
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    sources = {"published": open_index("pack", options.pack)} if options.pack else {}
    sources["generated"] = open_index("generated")
    columns: dict[str, dict[str, Any]] = {}
    for name, index in sources.items():
        measures, types = collect(index, options.split, options.games, options.played)
        summaries = {row: summarise(values) for row, values in measures.items() if values}
        columns[name] = {"games": len(index.tasks(options.split)), "task_types": types, "measures": summaries}
    print(markdown(columns))
    result = {"machine": describe_machine(["alfworld", "textworld"]), "split": options.split, "sources": columns}
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
