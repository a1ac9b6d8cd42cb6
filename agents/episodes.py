"""Episodes as the rollout loop plays them, alone or in groups that fork.

- ``RolloutTask``: one task and how often it is played.
- ``Rendering``: how turns become contexts. ``Episode``: one member's episode, which writes the tree.
- ``Unit``: episodes that need slots together: ``Single``, an independent one, or ``Branched``, a group that forks.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import UsageError
from .branching import Group
from .messages import Format
from .policies import Act, Context
from .tree import Float32Array, Int32Array, Role, Trajectory, Tree

if TYPE_CHECKING:
    from ..envs.pool import EnvResult


@dataclass(frozen=True, slots=True)
class RolloutTask:
    """One task, played by ``group_size`` members that start from the same first observation or fork on their way."""

    task: str
    group_size: int
    seed: int
    """Not negative. It seeds the environment, and with the member's number every action."""


@dataclass(frozen=True, slots=True)
class Rendering:
    format: Format
    window: int | None
    """None for the full context."""
    max_tokens: int
    reserve: int


class Episode:
    """One member's episode. Its nodes stand in a tree of its own, or in one that it shares with its group."""

    def __init__(self, task: RolloutTask, member: int, tree: Tree, rendering: Rendering) -> None:
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

    def fork(self, member: int) -> Episode:
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


class Unit(Protocol):
    """Episodes that need slots together."""

    reserved: int
    """Slots that its running episodes hold and those still to come may need."""

    def start(self) -> list[Episode]:
        """The episodes to begin with."""

    def decide(self, episode: Episode, act: Act) -> int:
        """How many copies of ``episode``, as it stands before ``act``, are to begin."""

    def fork(self, parent: Episode) -> Episode:
        """Make one of them."""

    def end_round(self) -> None:
        """All running episodes have acted."""

    def end(self, episode: Episode) -> list[Episode]:
        """``episode`` is over; the episodes that begin now."""

    def finish(self) -> Tree:
        """The tree of all that was played."""


class Single:
    """An independent episode; see ``Unit``."""

    def __init__(self, task: RolloutTask, member: int, split: str, rendering: Rendering) -> None:
        self.reserved = 1
        self._tree = Tree(task.task, split)
        self._episode = Episode(task, member, self._tree, rendering)

    def start(self) -> list[Episode]:
        return [self._episode]

    def decide(self, episode: Episode, act: Act) -> int:
        return 0

    def fork(self, parent: Episode) -> Episode:
        raise AssertionError("an independent episode does not fork")

    def end_round(self) -> None:
        pass

    def end(self, episode: Episode) -> list[Episode]:
        self.reserved = 0
        return []

    def finish(self) -> Tree:
        self._tree.trajectories = [self._episode.finish()]
        return self._tree


class Branched:
    """A group that forks; see ``Unit``. Its tree is shared from the first token on."""

    def __init__(self, task: RolloutTask, group: Group, split: str, rendering: Rendering) -> None:
        self.reserved = group.size
        self._task = task
        self._group = group
        self._rendering = rendering
        self._tree = Tree(task.task, split)
        self._members: list[Episode] = []
        self._running = 0
        self._begun = 0
        """Episodes begun in this round."""
        # A number that no member has, so that no member repeats the probe.
        self._probe = Episode(task, group.size, Tree(task.task, split), rendering) if group.probing else None

    def start(self) -> list[Episode]:
        if self._probe is not None:
            return [self._probe]
        return self._begin(self._group.initial)

    def decide(self, episode: Episode, act: Act) -> int:
        if episode is self._probe:
            return 0
        turn, room = len(episode.entropies), self._group.size - len(self._members)
        decision = self._group.decide(episode.member, turn, act.entropies, room)
        if decision is None:
            return 0
        episode.trajectory.info.setdefault("branching", []).append({"turn": turn, **asdict(decision)})
        return decision.forks

    def fork(self, parent: Episode) -> Episode:
        child = parent.fork(len(self._members))
        last = {key: value for key, value in parent.trajectory.info["branching"][-1].items() if key != "forks"}
        child.trajectory.info["fork"] = {"parent": parent.member, **last}
        self._group.forked(parent.member, child.member)
        self._add(child)
        return child

    def end_round(self) -> None:
        self._group.end_round(self._begun)
        self._begun = 0

    def end(self, episode: Episode) -> list[Episode]:
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

    def _begin(self, number: int) -> list[Episode]:
        self._tree.info["initial"] = self._tree.info.get("initial", 0) + number
        first = len(self._members)
        begun = [Episode(self._task, first + index, self._tree, self._rendering) for index in range(number)]
        for episode in begun:
            self._add(episode)
        if not first:
            self._begun = 0  # what a group begins with belongs to no round
        return begun

    def _add(self, episode: Episode) -> None:
        self._members.append(episode)
        self._running += 1
        self._begun += 1
