"""The rollout loop: a policy plays groups of episodes in a pool of environments, and trees come out.

- ``RolloutTask``: one task and how often it is played.
- ``Progress``: counts for a progress callback.
- ``rollout``: the loop.
"""

from __future__ import annotations

import copy
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from ..errors import UsageError, nearest
from .branching import Branching, Group
from .messages import Format
from .policies import Act, Context, Policy
from .tree import Float32Array, Int32Array, Role, Trajectory, Tree, merge

if TYPE_CHECKING:
    from ..envs.pool import EnvPool, EnvResult

ContextMode = Literal["full", "window"]


@dataclass(frozen=True, slots=True)
class RolloutTask:
    """One task, played by ``group_size`` members that start from the same first observation or fork on their way."""

    task: str
    group_size: int
    seed: int
    """Not negative. It seeds the environment, and with the member's number every action."""


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
    progress: Callable[[Progress], None] | None = None,
) -> list[Tree]:
    """Play every task and return one tree per task, in the order of ``tasks``.

    The pool's slots form two cohorts that take turns in a fixed order: while one's actions are generated,
    the other's environments step. A cohort waits for all its environments and freed slots take the next
    episode in line, so batches never depend on timing, and an episode only on its task, seed and member.

    With ``branching``, the members of a group run side by side in one cohort, whose slots are reserved for all of
    them, and decide in the order of their numbers; so a tree, too, depends on nothing but its task and seed. A fork
    copies the environment and points to its parent's nodes, and its first action joins the cohort's next batch.
    ``Trajectory.info`` says what was decided (``branching``) and where a member left its parent (``fork``), and
    ``Tree.info`` how many episodes began afresh (``initial``) and what looking around has cost (``probe``).

    A broken environment leaves its trajectory marked ``failed``; a context without room for another action
    ends the episode as ``truncated`` with ``info["overflow"]``. After an exception, close the pool.

    Args:
        context: ``full`` appends to one growing context; ``window`` renders each turn from the last ones.
        window: earlier turns that the ``window`` context shows.
        branching: where to fork; None plays ``group_size`` independent episodes.
        max_context_tokens: longest context, the action included.
        progress: called after every turn of a cohort.

    Raises:
        UsageError: an option is wrong, a first prompt does not fit the context, or the world, the pool or the policy
            does not allow forks.
    """
    if context not in get_args(ContextMode):
        raise UsageError(f"unknown context mode '{context}'{nearest(context, get_args(ContextMode))}")
    if window < 0:
        raise UsageError(f"window is {window}; expected the number of earlier turns, 0 or more")
    for task in tasks:
        if task.group_size < 1 or task.seed < 0:
            raise UsageError(f"{task} needs a group of 1 or more and a seed of 0 or more")
    rendering = _Rendering(
        format, window if context == "window" else None, max_context_tokens, policy.max_action_tokens
    )
    units: list[list[_Unit]] = []
    for place, task in enumerate(tasks):
        if branching is None:
            units.append([_Single(task, member, split, rendering) for member in range(task.group_size)])
        else:
            group = branching.group(place, task.group_size, task.seed, _vocabulary(policy))
            units.append([_Branched(task, group, split, rendering)])
    _Loop(policy, pool, [unit for group in units for unit in group], progress).run()
    return [merge([unit.finish() for unit in group]) for group in units]


def _vocabulary(policy: Policy) -> int:
    size = getattr(policy, "vocabulary", None)
    if size is None:
        raise UsageError(f"{type(policy).__name__} has no entropies; branching needs a policy that samples tokens")
    return int(size)


@dataclass(frozen=True, slots=True)
class _Rendering:
    format: Format
    window: int | None
    """None for the full context."""
    max_tokens: int
    reserve: int


class _Episode:
    """One member's episode. Its nodes stand in a tree of its own, or in one that it shares with its group."""

    def __init__(self, task: RolloutTask, member: int, tree: Tree, rendering: _Rendering) -> None:
        self.task = task
        self.member = member
        self.trajectory = Trajectory(leaves=(), seed=task.seed, info={"invalid": 0, "malformed": 0})
        self.tokens: Int32Array = np.empty(0, np.int32)
        self.entropies: list[Float32Array] = []
        """Of each action."""
        self._appends = rendering.window is None
        self._tree = tree
        self._rendering = rendering
        self._history: deque[tuple[str, str]] = deque(maxlen=rendering.window or 0)
        self._actions: list[int] = []
        self._leaf = -1
        self._closed = True
        self._forked = False
        """Begun as a copy whose environment has not answered yet."""
        self._goal: str | None = None
        self._last: EnvResult

    def fork(self, member: int) -> _Episode:
        """A copy as it stands before its next action."""
        child = copy.copy(self)
        child.member = member
        child.trajectory = copy.deepcopy(self.trajectory)
        for key in ("branching", "fork"):
            child.trajectory.info.pop(key, None)
        child.entropies, child._actions = list(self.entropies), list(self._actions)
        child._history = self._history.copy()
        child._forked = True
        return child

    def receive(self, result: EnvResult) -> bool:
        """Take in what the environment answered, and return whether the policy is to act."""
        trajectory, info = self.trajectory, result.info
        self._last = result
        if result.failed:
            trajectory.failed = True
            trajectory.info["error"] = result.error
            return False
        if self._forked:
            self._forked = False
            return True
        if self._actions:
            self._tree.nodes[self._actions[-1]].reward = float(result.reward)
            trajectory.reward += float(result.reward)
            trajectory.info["invalid"] += bool(info.get("invalid", False))
        trajectory.won = bool(info.get("won", False))
        trajectory.score = float(info.get("score", 0.0))
        if result.terminated or result.truncated:
            trajectory.truncated = result.truncated and not result.terminated
            return False
        return self._read(result)

    def _read(self, result: EnvResult) -> bool:
        rendering, info = self._rendering, result.info
        format, turn = rendering.format, len(self._actions)
        if self._goal is None:
            self._goal = str(info.get("goal", result.observation))
        if not self._appends:
            added = format.window(self._history, result.observation, {**info, "goal": self._goal})
        elif turn == 0:
            added = format.prompt(result.observation, info)
        else:
            added = format.observation(result.observation, info, closed=self._closed)
        tokens = np.asarray(added, np.int32)
        starts = turn == 0 or not self._appends
        whole = tokens if starts else np.concatenate([self.tokens, tokens])
        if len(whole) + rendering.reserve > rendering.max_tokens:
            if turn == 0:
                raise UsageError(
                    f"the first prompt of task {self.task.task} has {len(whole)} tokens, which leaves no "
                    f"room for an action of {rendering.reserve} in max_context_tokens={rendering.max_tokens}"
                )
            self.overflow()
            return False
        self.tokens = whole
        parent = -1 if starts else self._leaf
        role: Role = "prompt" if starts else "observation"
        self._leaf = self._tree.add(parent, role, tokens, turn=-1 if starts else turn - 1, text=result.observation)
        return True

    def context(self) -> Context:
        turn = len(self._actions)
        seed = np.random.SeedSequence((self.task.seed, self.member, turn)).generate_state(1, np.uint64)[0]
        return Context(self.tokens, int(seed), turn, self._last.observation, self._last.info)

    def record(self, act: Act) -> None:
        """Add the action to the tree."""
        sampled = act.sampled
        self._leaf = self._tree.add(
            self._leaf,
            "action",
            act.tokens,
            sampled=sampled,
            logprobs=act.logprobs if sampled else None,
            entropies=act.entropies if sampled else None,
            turn=len(self._actions),
            text=act.parsed.text,
            version=act.version,
        )
        self._actions.append(self._leaf)
        self.entropies.append(act.entropies)
        self._closed = act.parsed.closed
        self._history.append((self._last.observation, act.parsed.command))
        self.tokens = np.concatenate([self.tokens, act.tokens])
        self.trajectory.info["malformed"] += not act.parsed.valid

    def overflow(self) -> None:
        """End for want of room in the context."""
        self.trajectory.truncated = True
        self.trajectory.info["overflow"] = True

    def finish(self) -> Trajectory:
        """The whole trajectory."""
        trajectory = self.trajectory
        trajectory.turns = len(self._actions)
        trajectory.leaves = tuple(self._actions[-1:] if self._appends else self._actions)
        trajectory.info["last_observation"] = self._last.observation
        return trajectory


class _Unit(Protocol):
    """Episodes that need slots together."""

    reserved: int
    """Slots that its running episodes hold and those still to come may need."""

    def start(self) -> list[_Episode]:
        """The episodes to begin with."""

    def decide(self, episode: _Episode, act: Act) -> int:
        """How many copies of ``episode``, as it stands before ``act``, are to begin."""

    def fork(self, parent: _Episode) -> _Episode:
        """Make one of them."""

    def end_round(self) -> None:
        """All running episodes have acted."""

    def end(self, episode: _Episode) -> list[_Episode]:
        """``episode`` is over; the episodes that begin now."""

    def finish(self) -> Tree:
        """The tree of all that was played."""


class _Single:
    """An independent episode; see ``_Unit``."""

    def __init__(self, task: RolloutTask, member: int, split: str, rendering: _Rendering) -> None:
        self.reserved = 1
        self._tree = Tree(task.task, split)
        self._episode = _Episode(task, member, self._tree, rendering)

    def start(self) -> list[_Episode]:
        return [self._episode]

    def decide(self, episode: _Episode, act: Act) -> int:
        return 0

    def fork(self, parent: _Episode) -> _Episode:
        raise AssertionError("an independent episode does not fork")

    def end_round(self) -> None:
        pass

    def end(self, episode: _Episode) -> list[_Episode]:
        self.reserved = 0
        return []

    def finish(self) -> Tree:
        self._tree.trajectories = [self._episode.finish()]
        return self._tree


class _Branched:
    """A group that forks; see ``_Unit``. Its tree is shared from the first token on."""

    def __init__(self, task: RolloutTask, group: Group, split: str, rendering: _Rendering) -> None:
        self.reserved = group.size
        self._task = task
        self._group = group
        self._rendering = rendering
        self._tree = Tree(task.task, split)
        self._members: list[_Episode] = []
        self._running = 0
        self._begun = 0
        """Episodes begun in this round."""
        # A number that no member has, so that no member repeats the probe.
        self._probe = _Episode(task, group.size, Tree(task.task, split), rendering) if group.probing else None

    def start(self) -> list[_Episode]:
        if self._probe is not None:
            return [self._probe]
        return self._begin(self._group.initial)

    def decide(self, episode: _Episode, act: Act) -> int:
        if episode is self._probe:
            return 0
        turn, room = len(episode.entropies), self._group.size - len(self._members)
        decision = self._group.decide(episode.member, turn, act.entropies, room)
        if decision is None:
            return 0
        episode.trajectory.info.setdefault("branching", []).append({"turn": turn, **asdict(decision)})
        return decision.forks

    def fork(self, parent: _Episode) -> _Episode:
        child = parent.fork(len(self._members))
        last = {key: value for key, value in parent.trajectory.info["branching"][-1].items() if key != "forks"}
        child.trajectory.info["fork"] = {"parent": parent.member, **last}
        self._group.forked(parent.member, child.member)
        self._add(child)
        return child

    def end_round(self) -> None:
        self._group.end_round(self._begun)
        self._begun = 0

    def end(self, episode: _Episode) -> list[_Episode]:
        if episode is self._probe:
            self._group.probed(episode.entropies)
            steps, tokens = len(episode.entropies), sum(map(len, episode.entropies))
            self._tree.info["probe"] = {"env_steps": steps, "tokens": tokens}
            return self._begin(self._group.initial)
        self._running -= 1
        missing = self._group.size - len(self._members)
        self.reserved = self._running + missing
        return self._begin(self._group.top_up(missing)) if missing and not self._running else []

    def finish(self) -> Tree:
        self._tree.trajectories = [episode.finish() for episode in self._members]
        return self._tree

    def _begin(self, number: int) -> list[_Episode]:
        self._tree.info["initial"] = self._tree.info.get("initial", 0) + number
        first = len(self._members)
        begun = [_Episode(self._task, first + index, self._tree, self._rendering) for index in range(number)]
        for episode in begun:
            self._add(episode)
        if not first:
            self._begun = 0  # what a group begins with belongs to no round
        return begun

    def _add(self, episode: _Episode) -> None:
        self._members.append(episode)
        self._running += 1
        self._begun += 1


class _Cohort:
    """Slots that wait and act together."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.running: dict[int, tuple[int, _Unit, _Episode]] = {}
        """By slot, the episode in it and its unit, with the unit's place in line."""
        self.free = list(slots)
        """A heap."""
        self.units: dict[int, _Unit] = {}
        """Units with running episodes, by their place in line."""
        self._size = len(slots)

    def room(self) -> int:
        """Slots that no unit may need."""
        return self._size - sum(unit.reserved for unit in self.units.values())

    def put(self, place: int, unit: _Unit, episode: _Episode) -> int:
        """Give ``episode`` the lowest free slot."""
        slot = heapq.heappop(self.free)
        self.running[slot] = (place, unit, episode)
        return slot

    def take(self, slot: int) -> tuple[int, _Unit, _Episode]:
        """Free the slot."""
        heapq.heappush(self.free, slot)
        return self.running.pop(slot)


class _Loop:
    """Two cohorts of slots, each slot with one episode and exactly one answer outstanding."""

    def __init__(
        self,
        policy: Policy,
        pool: EnvPool,
        units: Sequence[_Unit],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._policy = policy
        self._pool = pool
        self._waiting = deque(units)
        self._places = count()
        self._progress = progress
        self._total = sum(unit.reserved for unit in units)
        self._widest = max((unit.reserved for unit in units), default=0)
        self._done = self._won = self._steps = self._tokens = 0

    def run(self) -> None:
        slots = min(self._pool.num_envs, self._total)
        if self._widest > slots:
            raise UsageError(
                f"a group of {self._widest} that forks needs as many environments; the pool has {self._pool.num_envs}"
            )
        half = (slots + 1) // 2 if self._widest <= max(1, slots // 2) else slots
        cohorts = (_Cohort(range(half)), _Cohort(range(half, slots)))
        for cohort in cohorts:
            self._admit(cohort)
        while any(cohort.running for cohort in cohorts):
            for cohort in cohorts:
                if cohort.running:
                    self._advance(cohort)

    def _admit(self, cohort: _Cohort) -> None:
        """Begin the next units in line while there is room for whole ones."""
        while self._waiting and self._waiting[0].reserved <= cohort.room():
            unit, place = self._waiting.popleft(), next(self._places)
            cohort.units[place] = unit
            for episode in unit.start():
                self._reset(cohort, place, unit, episode)

    def _reset(self, cohort: _Cohort, place: int, unit: _Unit, episode: _Episode) -> None:
        self._pool.reset(cohort.put(place, unit, episode), task=episode.task.task, seed=episode.task.seed)

    def _end(self, cohort: _Cohort, slot: int) -> None:
        place, unit, episode = cohort.take(slot)
        before = unit.reserved
        for begun in unit.end(episode):
            self._reset(cohort, place, unit, begun)
        if unit.reserved < before:  # a probe counts for nothing
            self._done += 1
            self._won += episode.trajectory.won
        if not unit.reserved:
            del cohort.units[place]
        self._admit(cohort)

    def _advance(self, cohort: _Cohort) -> None:
        """One turn of a cohort: answers in, actions out."""
        acting: list[tuple[int, int, int]] = []
        finished: list[Int32Array] = []
        # By unit and member: the numbers of a shared tree's nodes must not depend on who has which slot.
        order = {slot: (place, episode.member) for slot, (place, _, episode) in cohort.running.items()}
        for result in sorted(self._pool.wait(list(order), all=True), key=lambda result: order[result.slot]):
            place, _, episode = cohort.running[result.slot]
            if episode.receive(result):
                acting.append((place, episode.member, result.slot))
            else:
                finished.append(episode.tokens)
                self._end(cohort, result.slot)
        if finished:
            self._policy.release(finished)
        if acting:
            acting.sort()
            acts = self._policy.act([cohort.running[slot][2].context() for _, _, slot in acting])
            for (_, _, slot), act in zip(acting, acts, strict=True):
                self._play(cohort, slot, act)
            for place in {place for place, _, _ in acting} & cohort.units.keys():
                cohort.units[place].end_round()
        if self._progress is not None:
            self._progress(Progress(self._done, self._total, self._won, self._steps, self._tokens))

    def _play(self, cohort: _Cohort, slot: int, act: Act) -> None:
        """Record an action and step its environment, after copying it for each fork."""
        place, unit, episode = cohort.running[slot]
        if not len(act.tokens):
            episode.overflow()
            self._end(cohort, slot)
            return
        for _ in range(unit.decide(episode, act)):
            self._pool.fork(slot, cohort.put(place, unit, unit.fork(episode)))
        episode.record(act)
        self._pool.step(slot, act.parsed.command)
        self._steps += 1
        self._tokens += len(act.tokens)
