"""The rollout loop: a policy plays groups of episodes in a pool of environments, and trees come out.

- ``RolloutTask``: one task and how often it is played.
- ``Progress``: counts for a progress callback.
- ``rollout``: the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import UsageError, nearest
from .branching import Branching
from .episodes import Branched, Episode, Rendering, RolloutTask, Single, Unit
from .messages import Format
from .policies import Act, ActStream, Policy, act_stream
from .tree import Int32Array, Tree, merge

if TYPE_CHECKING:
    from ..envs.pool import EnvPool

__all__ = ["ContextMode", "Progress", "RolloutTask", "rollout"]

ContextMode = Literal["full", "window"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a rollout has done so far."""

    episodes: int
    """Ended, of ``total``."""
    total: int
    won: int
    env_steps: int
    """Commands that environments were given; those before a fork count once."""
    tokens: int
    """Written by the policy."""


def rollout(
    policy: Policy,
    pool: EnvPool,
    format: Format,
    tasks: Sequence[RolloutTask],
    *,
    split: str,
    max_context_tokens: int,
    context: ContextMode = "full",
    window: int = 2,
    branching: Branching | None = None,
    lag: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> list[Tree]:
    """Play every task and return one tree per task, in the order of ``tasks``.

    The loop goes in ticks. A tick takes in the answers of environments that are due and hands their contexts to the
    policy, lets the policy work on all of its contexts (an engine: one token each), and plays the actions that are
    whole by then; freed slots take the next episode in line at once. An answer is due ``lag`` ticks after its action,
    or when the policy has nothing else to do, and is then waited for. So what happens in a tick never depends on
    timing, and an episode depends only on its task, seed and member.

    With ``branching``, the members of a group run side by side in slots reserved for all of them. They take turns
    together: when all that run have their actions, they decide in the order of their numbers; so a tree, too, depends
    on nothing but its task and seed. A fork copies the environment and points to its parent's nodes, and it chooses
    its first action in the group's next turn. ``Trajectory.info`` says what was decided (``branching``) and where a
    member left its parent (``fork``), and ``Tree.info`` how many episodes began afresh (``initial``) and what looking
    around has cost (``probe``).

    A broken environment leaves its trajectory marked ``failed``; a context without room for another action
    ends the episode as ``truncated`` with ``info["overflow"]``. After an exception the policy has nothing left to do;
    close the pool.

    Args:
        context: ``full`` appends to one growing context; ``window`` renders each turn from the last ones.
        window: earlier turns that the ``window`` context shows.
        branching: where to fork; None plays ``group_size`` independent episodes.
        lag: ticks after which an answer is due, 1 or more. With 1, environments work while actions are played; with
            2, beside a piece of the policy's work as well. It changes the order of the work and no tree.
        max_context_tokens: longest context, the action included.
        progress: called after every tick that played or ended something.

    Raises:
        UsageError: an option is wrong, a first prompt does not fit the context, or the world, the pool or the policy
            does not allow forks.
    """
    if context not in get_args(ContextMode):
        raise UsageError(f"unknown context mode '{context}'{nearest(context, get_args(ContextMode))}")
    if window < 0:
        raise UsageError(f"window is {window}; expected the number of earlier turns, 0 or more")
    if lag < 1:
        raise UsageError(f"lag is {lag}; expected the number of ticks that environments have, 1 or more")
    for task in tasks:
        if task.group_size < 1 or task.seed < 0:
            raise UsageError(f"{task} needs a group of 1 or more and a seed of 0 or more")
    rendering = Rendering(format, window if context == "window" else None, max_context_tokens, policy.max_action_tokens)
    units: list[list[Unit]] = []
    for place, task in enumerate(tasks):
        if branching is None:
            units.append([Single(task, member, split, rendering) for member in range(task.group_size)])
        else:
            group = branching.group(place, task.group_size, task.seed, _vocabulary(policy))
            units.append([Branched(task, group, split, rendering)])
    _Loop(policy, pool, [unit for group in units for unit in group], lag, progress).run()
    return [merge([unit.finish() for unit in group]) for group in units]


def _vocabulary(policy: Policy) -> int:
    size = getattr(policy, "vocabulary", None)
    if size is None:
        raise UsageError(f"{type(policy).__name__} has no entropies; branching needs a policy that samples tokens")
    return int(size)


@dataclass(slots=True, eq=False)
class _Table:
    """A unit at work. Either all of its environments owe an answer, or all of its episodes choose an action."""

    unit: Unit
    episodes: dict[int, Episode] = field(default_factory=dict)
    """By slot, in the order of members: a shared tree's nodes are numbered in it, whoever has which slot."""
    acts: dict[int, Act] = field(default_factory=dict)
    """By slot, what has been chosen; one of each episode makes a round."""


class _Loop:
    """Every slot has at most one answer outstanding, the environment's or the policy's."""

    def __init__(
        self,
        policy: Policy,
        pool: EnvPool,
        units: Sequence[Unit],
        lag: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._policy = policy
        self._pool = pool
        self._line = deque(units)
        self._lag = lag
        self._progress = progress
        self._total = sum(unit.reserved for unit in units)
        self._widest = max((unit.reserved for unit in units), default=0)
        self._room = min(pool.num_envs, self._total)
        """Slots that no unit at work may need."""
        self._free = list(range(self._room))
        self._now = 0
        self._due: deque[tuple[int, _Table]] = deque()
        """Tables whose environments work, with the tick that waits for them; ticks never decrease."""
        self._tickets: dict[int, tuple[_Table, int]] = {}
        """What the policy works on: table and slot."""
        self._done = self._won = self._steps = self._tokens = 0

    def run(self) -> None:
        if self._widest > self._room:
            raise UsageError(
                f"a group of {self._widest} that forks needs as many environments; the pool has {self._pool.num_envs}"
            )
        with closing(act_stream(self._policy)) as stream:
            self._admit()
            while self._due or self._tickets:
                before = self._done, self._steps
                self._tick(stream)
                if self._progress is not None and before != (self._done, self._steps):
                    self._progress(Progress(self._done, self._total, self._won, self._steps, self._tokens))

    def _tick(self, stream: ActStream) -> None:
        while self._due and (self._due[0][0] <= self._now or not self._tickets):
            last = max(self._due[0][0], self._now)
            tables = []
            while self._due and self._due[0][0] <= last:
                tables.append(self._due.popleft()[1])
            self._receive(tables, stream)
        if self._tickets:
            for ticket, act in sorted(stream.step(), key=itemgetter(0)):
                table, slot = self._tickets.pop(ticket)
                table.acts[slot] = act
                if len(table.acts) == len(table.episodes):
                    self._round(table)
        self._now += 1

    def _receive(self, tables: Sequence[_Table], stream: ActStream) -> None:
        """Wait for the answers of these tables' environments, and let the policy begin with what goes on."""
        slots = [slot for table in tables for slot in table.episodes]
        results = {result.slot: result for result in self._pool.wait(slots, all=True)}
        going: list[tuple[_Table, int, Episode]] = []
        finished: list[Int32Array] = []
        for table in tables:
            before = len(going)
            for slot, episode in list(table.episodes.items()):
                if episode.receive(results[slot]):
                    going.append((table, slot, episode))
                else:
                    finished.append(episode.tokens)
                    self._end(table, slot)
            if len(going) == before:
                self._expect(table)
        if finished:
            self._policy.release(finished)
        for table, slot, episode in going:
            self._tickets[stream.add(episode.context())] = table, slot

    def _round(self, table: _Table) -> None:
        """Record the actions and step their environments, after copying them for each fork."""
        unit, acts, finished = table.unit, table.acts, []
        table.acts = {}
        for slot, episode in list(table.episodes.items()):
            act = acts[slot]
            if not len(act.tokens):
                episode.overflow()
                finished.append(episode.tokens)
                self._end(table, slot)
                continue
            for _ in range(unit.decide(episode, act)):
                self._pool.fork(slot, self._seat(table, unit.fork(episode)))
            episode.record(act)
            self._pool.step(slot, act.parsed.command)
            self._steps += 1
            self._tokens += len(act.tokens)
        if finished:
            self._policy.release(finished)
        unit.end_round()
        self._expect(table)

    def _expect(self, table: _Table) -> None:
        """The environments of this table are at work, if it has any."""
        if table.episodes:
            self._due.append((self._now + self._lag, table))

    def _admit(self) -> None:
        """Begin the next units in line while there is room for whole ones."""
        while self._line and self._line[0].reserved <= self._room:
            table = _Table(self._line.popleft())
            self._room -= table.unit.reserved
            for episode in table.unit.start():
                self._reset(table, episode)
            self._expect(table)

    def _seat(self, table: _Table, episode: Episode) -> int:
        """Give ``episode`` a free slot."""
        slot = self._free.pop()
        table.episodes[slot] = episode
        return slot

    def _reset(self, table: _Table, episode: Episode) -> None:
        self._pool.reset(self._seat(table, episode), task=episode.task.task, seed=episode.task.seed)

    def _end(self, table: _Table, slot: int) -> None:
        episode, before = table.episodes.pop(slot), table.unit.reserved
        self._free.append(slot)
        for begun in table.unit.end(episode):
            self._reset(table, begun)
        if table.unit.reserved < before:  # a probe counts for nothing
            self._done += 1
            self._won += episode.trajectory.won
            self._room += before - table.unit.reserved
        self._admit()
