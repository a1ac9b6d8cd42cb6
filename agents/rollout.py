"""The rollout loop: a policy plays groups of episodes in a pool of environments, and trees come out.

- ``RolloutTask``: one task and how often it is played.
- ``Progress``: counts for a progress callback.
- ``rollout``: the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ..errors import UsageError, nearest
from .messages import Format
from .policies import Act, Context, Policy
from .tree import Int32Array, Role, Trajectory, Tree, merge

if TYPE_CHECKING:
    from ..envs.pool import EnvPool, EnvResult

ContextMode = Literal["full", "window"]


@dataclass(frozen=True, slots=True)
class RolloutTask:
    """One task, played by ``group_size`` members from the same first observation."""

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
    progress: Callable[[Progress], None] | None = None,
) -> list[Tree]:
    """Play every task and return one tree per task, in the order of ``tasks``.

    The pool's slots form two cohorts that take turns in a fixed order: while one's actions are generated,
    the other's environments step. A cohort waits for all its environments and freed slots take the next
    episode in line, so batches never depend on timing, and an episode only on its task, seed and member.

    A broken environment leaves its trajectory marked ``failed``; a context without room for another action
    ends the episode as ``truncated`` with ``info["overflow"]``. After an exception, close the pool.

    Args:
        context: ``full`` appends to one growing context; ``window`` renders each turn from the last ones.
        window: earlier turns that the ``window`` context shows.
        max_context_tokens: longest context, the action included.
        progress: called after every turn of a cohort.

    Raises:
        UsageError: an option is wrong, or a first prompt does not fit the context.
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
    groups = [[_Episode(task, member, split, rendering) for member in range(task.group_size)] for task in tasks]
    _Loop(policy, pool, [episode for group in groups for episode in group], progress).run()
    return [merge([episode.finish() for episode in group]) for group in groups]


@dataclass(frozen=True, slots=True)
class _Rendering:
    format: Format
    window: int | None
    """None for the full context."""
    max_tokens: int
    reserve: int


class _Episode:
    """One member's episode, in a tree of its own until all of the group have ended."""

    def __init__(self, task: RolloutTask, member: int, split: str, rendering: _Rendering) -> None:
        self.task = task
        self.member = member
        self.trajectory = Trajectory(leaves=(), seed=task.seed, info={"invalid": 0, "malformed": 0})
        self.tokens: Int32Array = np.empty(0, np.int32)
        self._appends = rendering.window is None
        self._tree = Tree(task.task, split)
        self._rendering = rendering
        self._history: deque[tuple[str, str]] = deque(maxlen=rendering.window or 0)
        self._actions: list[int] = []
        self._leaf = -1
        self._closed = True
        self._goal: str | None = None
        self._last: EnvResult

    def receive(self, result: EnvResult) -> bool:
        """Take in what the environment answered, and return whether the policy is to act."""
        trajectory, info = self.trajectory, result.info
        self._last = result
        if result.failed:
            trajectory.failed = True
            trajectory.info["error"] = result.error
            return False
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
        self._closed = act.parsed.closed
        self._history.append((self._last.observation, act.parsed.command))
        self.tokens = np.concatenate([self.tokens, act.tokens])
        self.trajectory.info["malformed"] += not act.parsed.valid

    def overflow(self) -> None:
        """End for want of room in the context."""
        self.trajectory.truncated = True
        self.trajectory.info["overflow"] = True

    def finish(self) -> Tree:
        """The tree of this one trajectory."""
        trajectory = self.trajectory
        trajectory.turns = len(self._actions)
        trajectory.leaves = tuple(self._actions[-1:] if self._appends else self._actions)
        trajectory.info["last_observation"] = self._last.observation
        self._tree.trajectories = [trajectory]
        return self._tree


class _Loop:
    """Two cohorts of slots, each slot with one episode and exactly one answer outstanding."""

    def __init__(
        self,
        policy: Policy,
        pool: EnvPool,
        episodes: Sequence[_Episode],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._policy = policy
        self._pool = pool
        self._waiting = deque(episodes)
        self._progress = progress
        self._total = len(episodes)
        self._done = self._won = self._steps = self._tokens = 0

    def run(self) -> None:
        slots = min(self._pool.num_envs, self._total)
        cohorts: tuple[dict[int, _Episode], ...] = ({}, {})
        for slot in range(slots):
            self._start(cohorts[2 * slot >= slots], slot)
        while any(cohorts):
            for cohort in cohorts:
                if cohort:
                    self._advance(cohort)

    def _start(self, cohort: dict[int, _Episode], slot: int) -> None:
        """Give the slot the next episode in line, or retire it when there is none."""
        if not self._waiting:
            cohort.pop(slot, None)
            return
        episode = cohort[slot] = self._waiting.popleft()
        self._pool.reset(slot, task=episode.task.task, seed=episode.task.seed)

    def _end(self, cohort: dict[int, _Episode], slot: int) -> None:
        self._done += 1
        self._won += cohort[slot].trajectory.won
        self._start(cohort, slot)

    def _advance(self, cohort: dict[int, _Episode]) -> None:
        """One turn of a cohort: answers in, actions out."""
        acting: list[tuple[int, _Episode]] = []
        finished: list[Int32Array] = []
        for result in sorted(self._pool.wait(list(cohort), all=True), key=lambda result: result.slot):
            episode = cohort[result.slot]
            if episode.receive(result):
                acting.append((result.slot, episode))
            else:
                finished.append(episode.tokens)
                self._end(cohort, result.slot)
        if finished:
            self._policy.release(finished)
        if acting:
            acts = self._policy.act([episode.context() for _, episode in acting])
            for (slot, episode), act in zip(acting, acts, strict=True):
                if not len(act.tokens):
                    episode.overflow()
                    self._end(cohort, slot)
                    continue
                episode.record(act)
                self._pool.step(slot, act.parsed.command)
                self._steps += 1
                self._tokens += len(act.tokens)
        if self._progress is not None:
            self._progress(Progress(self._done, self._total, self._won, self._steps, self._tokens))
