"""Wrappers that change what an agent reads.

- ``ObservationCap``: no observation is longer than a number of characters.
- ``HistoryWindow``: every observation comes with the last turns.
- ``Reminder``: the goal is said again every few turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from ...errors import UsageError, nearest
from ..text import TextSpace, cut
from .base import Info, Reply, WorldWrapper

_LONGEST_GOAL = 1000
_KEEP = ("head", "tail", "both")


class ObservationCap(WorldWrapper):
    """Cuts observations to ``max_characters``, the note of what was left out included.

    >>> import gymnasium as gym
    >>> env = ObservationCap(gym.make("agentropy/ALFWorld-v0"), max_characters=100)
    >>> print(env.reset(seed=0)[0])  # doctest: +ELLIPSIS
    You are in the middle of a room. Looking quickly around you, you see a ...
    [... characters left out]
    """

    name = "observation-cap"

    def __init__(self, env: gymnasium.Env[str, str], max_characters: int = 2000, keep: str = "head") -> None:
        """Set the cap.

        Args:
            env: a text world.
            max_characters: length of the longest observation, at least 1.
            keep: which part of a longer one stays: ``"head"``, ``"tail"`` (where results come last), or ``"both"``.

        Raises:
            UsageError: an argument is none of these.
        """
        if max_characters < 1:
            raise UsageError(f"max_characters must be at least 1, got {max_characters}")
        if keep not in _KEEP:
            raise UsageError(f"unknown part to keep {keep!r}{nearest(keep, _KEEP)}")
        super().__init__(env, max_characters=max_characters, keep=keep)
        self._keep = keep
        longest: int = env.observation_space.max_length  # type: ignore[attr-defined]
        self._cap = max_characters
        self.observation_space = TextSpace(min(max_characters, longest))

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        return cut(observation, self._cap, self._keep), {}

    def _turn(self, action: str) -> Reply:
        reply = self._below(action)
        reply.observation = cut(reply.observation, self._cap, self._keep)
        return reply


@dataclass(frozen=True, slots=True)
class _Window:
    turns: tuple[tuple[str, str], ...]
    """The last ones, oldest first: what was observed, and the action that answered it."""
    last: str
    """The current observation."""
    count: int
    """Turns so far."""


class HistoryWindow(WorldWrapper):
    """Shows the last ``turns`` turns, observations and actions, before every observation after the first.

    For agents that see one observation at a time, as in verl-agent, whose prompts hold a window of the last turns.
    The task heads the window, as the observation that stated it leaves the window.

    >>> import gymnasium as gym
    >>> env = HistoryWindow(gym.make("agentropy/ALFWorld-v0"), turns=1)
    >>> _ = env.reset(seed=0), env.step("inventory")
    >>> print(env.step("look")[0])  # doctest: +ELLIPSIS
    Task: ...
    <BLANKLINE>
    The last turn:
    Observation 2: You are not carrying anything.
    Action 2: look
    <BLANKLINE>
    Observation 3: You are in the middle of a room. Looking quickly around you, you see nothing.
    """

    name = "history-window"

    def __init__(self, env: gymnasium.Env[str, str], turns: int = 5, goal: bool = True) -> None:
        """Set the window.

        Args:
            env: a text world.
            turns: how many of the last turns are shown; 0 shows the task and the observation.
            goal: head the window with ``info["goal"]``.

        Raises:
            UsageError: ``turns`` is negative.
        """
        if turns < 0:
            raise UsageError(f"turns must not be negative, got {turns}")
        super().__init__(env, turns=turns, goal=goal)
        self._length, self._goal = turns, goal
        longest: int = env.observation_space.max_length  # type: ignore[attr-defined]
        self._longest_action: int = env.action_space.max_length  # type: ignore[attr-defined]
        per_turn = longest + self._longest_action + 60  # the labels, with numbers of up to 18 digits
        self.observation_space = TextSpace((turns + 1) * per_turn + _LONGEST_GOAL + 60)

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        self._state = _Window((), observation, 0)
        return observation, {}

    def _turn(self, action: str) -> Reply:
        reply = self._below(action)
        before: _Window = self._state
        turns = (*before.turns, (before.last, cut(action, self._longest_action)))
        turns = turns[max(0, len(turns) - self._length) :]
        self._state = _Window(turns, reply.observation, before.count + 1)
        goal = cut(str(reply.info.get("goal", "")), _LONGEST_GOAL) if self._goal else ""
        reply.observation = show_window(turns, reply.observation, before.count + 1, goal)
        return reply

    def _texts(self) -> Sequence[str]:
        return (show_window((("", ""), ("", "")), "", 2, " "), show_window((("", ""),), "", 1, ""))


def show_window(turns: Sequence[tuple[str, str]], observation: str, count: int, goal: str = "") -> str:
    """Return the text that ``HistoryWindow`` shows.

    Args:
        turns: the last ones, oldest first: observation and action.
        observation: the current one.
        count: turns so far; turns are numbered from 1.
        goal: heads the text; none when empty.
    """
    parts = [f"Task: {goal}"] if goal else []
    if turns:
        lines = ["The last turn:" if len(turns) == 1 else f"The last {len(turns)} turns:"]
        for number, (seen, action) in enumerate(turns, count - len(turns) + 1):
            lines += [f"Observation {number}: {seen}", f"Action {number}: {action}"]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, f"Observation {count + 1}: {observation}"])


class Reminder(WorldWrapper):
    """Says the goal again at the end of every ``every``-th observation after the first.

    "Drift No More?" (Dongre et al. 2025, arXiv 2510.07777) measures how far an agent's predictions drift from those
    of a goal-consistent reference, turn by turn, and finds that such reminders pull them back.

    >>> import gymnasium as gym
    >>> env = Reminder(gym.make("agentropy/ALFWorld-v0"), every=2)
    >>> _ = env.reset(seed=0), env.step("look")
    >>> print(env.step("inventory")[0])  # doctest: +ELLIPSIS
    You are not carrying anything.
    Reminder: your task is to ...
    """

    name = "reminder"

    def __init__(
        self, env: gymnasium.Env[str, str], every: int = 5, text: str = "Reminder: your task is to {goal}"
    ) -> None:
        """Set how often.

        Args:
            env: a text world.
            every: turns from one reminder to the next, at least 1.
            text: what is said; ``{goal}`` stands for ``info["goal"]``.

        Raises:
            UsageError: ``every`` is too small, or ``text`` has no place for the goal.
        """
        if every < 1:
            raise UsageError(f"every must be at least 1, got {every}")
        if "{goal}" not in text:
            raise UsageError(f"the text of a reminder needs {{goal}} where the goal goes, and this has none: {text!r}")
        super().__init__(env, every=every, text=text)
        self._every, self._text = every, text
        longest: int = env.observation_space.max_length  # type: ignore[attr-defined]
        self.observation_space = TextSpace(longest + 1 + len(text) + text.count("{goal}") * _LONGEST_GOAL)

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        if not isinstance(info.get("goal"), str):
            raise UsageError("a reminder says info['goal'] again, and this environment has none")
        self._state = 0
        return observation, {}

    def _turn(self, action: str) -> Reply:
        reply = self._below(action)
        self._state += 1
        if self._state % self._every == 0 and not (reply.terminated or reply.truncated):
            goal: Any = reply.info["goal"]
            reply.observation += "\n" + self._text.replace("{goal}", cut(goal, _LONGEST_GOAL))
        return reply

    def _texts(self) -> Sequence[str]:
        return (self._text.replace("{goal}", ""),)
