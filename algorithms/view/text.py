"""``agentropy view RUN --text``: the episodes of one task as a tree in the terminal, with what was decided where.

- ``draw``: a tree as lines, for any width.
- ``show``: print a tree of a run's saved rollouts. ``load_trees``: those of a step.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from ...agents.branching import EntropyBranching
from ...agents.tree import Node, Trajectory, Tree
from ...config import RunConfig
from ...errors import UsageError, nearest
from ..recipes import recipe
from ..runs import RunFolder
from .index import step_files

_LEAST = 12
"""Columns that a row's text must have; where figures would leave it less, they are left out."""
_PARAGRAPH_LINES = 3
"""Lines of each paragraph of a prompt: worlds name the goal in one of them, and others may be long."""
_COLUMNS = 3
"""Figures of a row: entropy, decision, reward."""
_NOTHING = Text()
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def load_trees(run: RunFolder, step: int | None = None) -> tuple[int, list[Tree]]:
    """The saved trees of ``step``, by default of the newest one, and that step.

    Raises:
        UsageError: there are none, or they cannot be read.
    """
    files = step_files(run.path)
    if not files:
        raise UsageError(f"'{run.path}' holds no trajectories yet; a run saves them with train.save_trajectories on")
    chosen = max(files) if step is None else step
    if chosen not in files:
        closest = min(files, key=lambda other: abs(other - chosen))
        raise UsageError(f"'{run.path}' holds no trajectories of step {chosen}; the nearest step is {closest}")
    try:
        with gzip.open(files[chosen], "rt", encoding="utf-8") as file:
            entries = [json.loads(line) for line in file]
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"cannot read '{files[chosen]}': {error}") from error
    if not entries:
        raise UsageError(f"'{files[chosen]}' is empty: no group of step {chosen} was kept")
    return chosen, [Tree.from_dict(entry) for entry in entries]


def show(run: RunFolder, step: int | None = None, task: str | None = None, depth: int | None = None) -> None:
    """Print one tree of a run.

    Args:
        step: whose rollouts; the newest when None.
        task: a task's id, or the number of a tree in the step; the tree with the most forks when None.
        depth: see ``draw``.

    Raises:
        UsageError: there is no such step or task, or ``depth`` is negative.
    """
    if depth is not None and depth < 0:
        raise UsageError(f"--depth is {depth}; expected the number of turns to draw, 0 or more")
    step, trees = load_trees(run, step)
    number = _choose(trees, task, step)
    title = f"step {step}, tree {number} of {len(trees)}"
    Console(highlight=False).print(draw(trees[number], title=title, rule=_rule(run.config), depth=depth))


def draw(tree: Tree, *, title: str = "", rule: str = "", depth: int | None = None) -> RenderableType:
    """A tree as lines: what several trajectories share is drawn once, and one that leaves another is indented.

    An action's line ends with the mean entropy of its tokens in nats, what was decided at it, and its reward.

    Args:
        title: stands behind the task's id.
        rule: how forks were decided, for the lines where they stand.
        depth: turns to draw; later ones are counted. All when None.
    """
    view = _View(tree, rule, depth)
    rows = list(view.rows())
    widths = tuple(max((row.figures[column].cell_len for row in rows), default=0) for column in range(_COLUMNS))
    for row in rows:
        row.widths = widths
    return Group(*view.header(title), *rows, *view.footer())


def _choose(trees: Sequence[Tree], task: str | None, step: int) -> int:
    if task is None:
        return max(range(len(trees)), key=lambda number: (_View(trees[number]).forks, -number))
    named = [number for number, tree in enumerate(trees) if tree.task == task]
    if named:
        return named[0]
    if task.isdecimal():
        if int(task) < len(trees):
            return int(task)
        raise UsageError(f"step {step} has no tree {task}; expected 0 to {len(trees) - 1}, or a task's id")
    raise UsageError(f"step {step} has no tree of task '{task}'{nearest(task, {tree.task for tree in trees})}")


def _rule(config: RunConfig) -> str:
    options = {"total_steps": max(1, config.train.steps)} | config.algorithm.overrides
    branching = recipe(config.algorithm.name, config.algorithm.preset, **options).branching
    if not isinstance(branching, EntropyBranching):
        return ""
    return f"threshold {branching.tau:g}" if branching.rule == "threshold" else branching.rule


@dataclass
class _Row:
    """One line; its text gives way to its figures."""

    turn: str
    lanes: str
    text: Text
    figures: tuple[Text, ...] = (_NOTHING,) * _COLUMNS
    lines: int = 1
    """A text that is longer is wrapped, up to so many lines, and then cut."""
    below: str = ""
    """Lanes of the lines after the first."""
    widths: tuple[int, ...] = (0,) * _COLUMNS

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        start, below = f"{self.turn:>3} {self.lanes}", " " * 4 + self.below
        figures, taken = Text(), sum(width + 2 for width in self.widths if width)
        if any(self.figures) and options.max_width - len(start) - taken >= _LEAST:
            for figure, width in zip(self.figures, self.widths, strict=True):
                if width:
                    figures.append(" " * (2 + width - figure.cell_len)).append_text(figure)
        room = options.max_width - figures.cell_len
        width = max(1, room - len(start))
        wrapped = list(self.text.wrap(console, width)) if self.lines > 1 else [self.text]
        for number, line in enumerate(wrapped[: self.lines]):
            line.rstrip()
            if number == self.lines - 1 < len(wrapped) - 1:
                line.append(" …")
            whole = Text.assemble((below if number else start, "dim"), line)
            whole.truncate(room, overflow="ellipsis", pad=bool(figures))
            whole.append_text(figures)
            whole.rstrip()
            yield whole


@dataclass
class _Step:
    """A node on the walks of ``members``; ``ends`` are those whose last one it is."""

    node: Node
    first: bool
    members: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    after: dict[int, _Step] = field(default_factory=dict)

    def below(self) -> Iterator[_Step]:
        """This step and all after it."""
        waiting = [self]
        while waiting:
            step = waiting.pop()
            yield step
            waiting.extend(reversed(step.after.values()))


class _View:
    """What is drawn of a tree: its trajectories' walks, as far as they are the same drawn once.

    A walk in ``window`` context is the walks of all its turns, one behind the other.
    """

    def __init__(self, tree: Tree, rule: str = "", depth: int | None = None) -> None:
        self._tree = tree
        self._rule = rule
        self._depth = depth
        self._decided: dict[int, Mapping[str, Any]] = {}
        """What was decided at an action, by its node."""
        self._starts: dict[int, _Step] = {}
        self._unplayed: list[int] = []
        """Trajectories without any action."""
        for member, trajectory in enumerate(tree.trajectories):
            self._walk(member, trajectory)
        self._steps = [step for start in self._starts.values() for step in start.below()]
        self.forks = sum(self._is_fork(step, branch) for step in self._steps for branch in self._divided(step)[0])
        records = [*self._decided.values(), *(t.info["fork"] for t in tree.trajectories if "fork" in t.info)]
        largest = max((abs(record["delta_entropy"]) for record in records), default=0.0)
        # Two digits of the largest one: some rules divide by the size of the vocabulary.
        digits = max(2, 1 - math.floor(math.log10(largest))) if largest else 2
        self._format = f"+.{digits}f" if digits < 5 else "+.1e"

    def _walk(self, member: int, trajectory: Trajectory) -> None:
        nodes = [node for leaf in trajectory.leaves for node in self._tree.path(leaf)]
        if not nodes:
            self._unplayed.append(member)
            return
        after, step = self._starts, None
        for node in nodes:
            step = after.setdefault(node.index, _Step(node, first=step is None))
            step.members.append(member)
            after = step.after
        assert step is not None
        step.ends.append(member)
        acted = {node.turn: node.index for node in nodes if node.role == "action"}
        for record in trajectory.info.get("branching", ()):
            self._decided[acted[record["turn"]]] = record

    def _divided(self, step: _Step) -> tuple[list[_Step], _Step | None]:
        """The branches that are indented, and the one that goes straight on, if any."""
        branches = list(step.after.values())
        own = [branch for branch in branches if self._fork(branch) is None]
        # Episodes that begin afresh stand side by side; what leaves another on its way hangs below that one.
        straight = own[0] if own and (len(own) == 1 or not step.first) else None
        return [branch for branch in branches if branch is not straight], straight

    def _fork(self, branch: _Step) -> Mapping[str, Any] | None:
        """Where and why the first member of ``branch`` left its parent, if it did so here."""
        fork = self._tree.trajectories[branch.members[0]].info.get("fork")
        here = fork is not None and branch.node.role == "action" and branch.node.turn == fork["turn"]
        return fork if here else None

    def _is_fork(self, step: _Step, branch: _Step) -> bool:
        return not step.first or self._fork(branch) is not None

    def header(self, title: str) -> Iterator[Text]:
        """The task, and what there is of it."""
        tree = self._tree
        nodes = {step.node.index: len(step.node.tokens) for step in self._steps}
        stored = sum(nodes.values())
        read = sum(len(node.tokens) for t in tree.trajectories for leaf in t.leaves for node in tree.path(leaf))
        saved = 100 * (1 - stored / read) if read else 0.0
        yield Text.assemble((_plain(tree.task), "bold"), (f"  {', '.join(filter(None, (tree.split, title)))}", "dim"))
        yield Text(
            f"{_count(len(tree.trajectories), 'trajectory', 'trajectories')}, {_count(self.forks, 'fork')}, "
            f"{_count(len(nodes), 'node')}, {stored:,} tokens for the {read:,} of all walks: "
            f"sharing saves {saved:.0f} %"
        )
        yield Text()

    def footer(self) -> Iterator[Text]:
        """Whether entropy had risen where episodes forked."""
        rises: dict[bool, list[float]] = {True: [], False: []}
        for record in self._decided.values():
            rises[record["forks"] > 0].append(record["delta_entropy"])
        words = [
            f"{self._rise(float(np.mean(values)))} at {_count(len(values), 'decision')} that {outcome}"
            for values, outcome in ((rises[True], "forked"), (rises[False], "did not fork"))
            if values
        ]
        yield Text()
        if words:
            yield Text(f"mean {', '.join(words)}")
        legend = [
            *(["H mean entropy of an action's tokens in nats"] if any(_has_entropy(s) for s in self._steps) else []),
            *(["ΔH its rise as the rule measures it"] if self._decided or self.forks else []),
            *(["⑂ forks"] if self.forks else []),
        ]
        if legend:
            yield Text(", ".join(legend), style="dim")

    def rows(self) -> Iterator[_Row]:
        for start in self._starts.values():
            yield from self._line(start, "")
        for outcome in self._outcomes(self._unplayed):
            yield _Row("", "", outcome + Text(", without an action"))

    def _line(self, step: _Step, outer: str) -> Iterator[_Row]:
        """The rows from ``step`` to the end of its line, with what leaves it indented below; ``outer`` are the lanes
        on its left."""
        while True:
            node = step.node
            if self._depth is not None and node.role == "action" and node.turn >= self._depth:
                yield from self._hidden(step, outer)
                return
            yield from self._message(step, outer)
            outcomes = self._outcomes(step.ends)
            for number, outcome in enumerate(outcomes):
                last = not step.after and number == len(outcomes) - 1
                yield _Row("", f"{outer}{'╰' if last else '├'} ", outcome)
            leaving, straight = self._divided(step)
            for branch in leaving:
                last = straight is None and branch is leaving[-1]
                label = self._label(branch, self._is_fork(step, branch))
                yield _Row("", f"{outer}{'╰' if last else '├'}─╮ ", label)
                yield from self._line(branch, f"{outer}{'  ' if last else '│ '}")
            if straight is None:
                return
            step = straight

    def _message(self, step: _Step, outer: str) -> Iterator[_Row]:
        node, lanes = step.node, f"{outer}│ "
        if node.role == "action":
            command = _command(node.text)
            text = Text(command, style="bold") if command else Text("(no words)", style="dim italic")
            yield _Row(str(node.turn), lanes, text, self._figures(step))
        elif step.first:
            paragraphs = [_plain(line) for line in node.text.splitlines() if line.strip()] or [""]
            for number, paragraph in enumerate(paragraphs):
                head = f"{outer}● " if number == 0 else lanes
                yield _Row("", head, Text(paragraph), lines=_PARAGRAPH_LINES, below=lanes)
        else:
            yield _Row("", f"{lanes}  ", Text(_plain(node.text), style="dim"))

    def _hidden(self, step: _Step, outer: str) -> Iterator[_Row]:
        """In place of ``step`` and all after it: how much it is, and how it ended."""
        steps = list(step.below())
        turns = sum(other.node.role == "action" for other in steps)
        forks = sum(len(self._divided(other)[0]) for other in steps)
        words = _count(turns, "turn") + (f" and {_count(forks, 'fork')}" if forks else "") + " more"
        yield _Row("", f"{outer}┆ ", Text(words, style="dim italic"))
        outcomes = self._outcomes([member for other in steps for member in other.ends])
        for number, outcome in enumerate(outcomes):
            yield _Row("", f"{outer}{'╰' if number == len(outcomes) - 1 else '├'} ", outcome)

    def _label(self, branch: _Step, forked: bool) -> Text:
        member, fork = branch.members[0], self._fork(branch)
        if fork is None:
            return Text(f"⑂ #{member}" if forked else f"#{member}", style="magenta" if forked else "dim")
        return Text.assemble(
            (f"⑂ #{member} leaves #{fork['parent']}", "magenta"),
            "  ",
            self._risen(fork["delta_entropy"]),
            f"  P {fork['probability']:.2f}",
            (f"  {self._rule}", "dim"),
        )

    def _figures(self, step: _Step) -> tuple[Text, ...]:
        node, record = step.node, self._decided.get(step.node.index)
        entropy = f"H {node.entropies.mean(dtype=np.float64):.2f}" if _has_entropy(step) else ""
        decision = Text()
        if record is not None:
            forks = f" ⑂ {record['forks']}" if record["forks"] else " " * 4
            decision = Text.assemble(self._risen(record["delta_entropy"]), (forks, "magenta"))
        style = "green" if node.reward > 0 else "red"
        return Text(entropy), decision, Text(f"r {node.reward:+.2f}" if node.reward else "", style=style)

    def _rise(self, delta: float) -> str:
        return f"ΔH {delta:{self._format}}"

    def _risen(self, delta: float) -> Text:
        return Text(self._rise(delta), style="yellow" if delta > 0 else "dim")

    def _outcomes(self, members: Sequence[int]) -> list[Text]:
        """How trajectories that end at one place ended; equal ends are counted."""
        ends: dict[tuple[str, str, str], list[int]] = {}
        for member in members:
            trajectory = self._tree.trajectories[member]
            ends.setdefault((*_ending(trajectory), f"{trajectory.reward:.2f}"), []).append(member)
        return [
            Text.assemble(
                (f"{words} ×{len(same)}" if len(same) > 1 else words, style),
                f"  return {reward}  ",
                (" ".join(f"#{member}" for member in same), "dim"),
            )
            for (words, style, reward), same in ends.items()
        ]


def _ending(trajectory: Trajectory) -> tuple[str, str]:
    """How an episode ended, and in which style to say so."""
    if trajectory.failed:
        return "! failed", "bold red"
    if trajectory.won:
        return "✓ won", "bold green"
    if trajectory.truncated:
        return "… truncated" + (" by a full context" if trajectory.info.get("overflow") else ""), "yellow"
    return "✗ lost", "red"


def _has_entropy(step: _Step) -> bool:
    return len(step.node.entropies) > 0


def _command(text: str) -> str:
    """What the environment was told; the reasoning before it would fill the row."""
    found = _ACTION.findall(text)
    return _plain(found[-1] if found else text)


def _plain(text: str) -> str:
    """One line of what can be printed: a model may write anything, also what moves the cursor."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _count(number: int, thing: str, things: str = "") -> str:
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
