"""Wrappers that let an agent try again.

- ``Retry``: an episode that failed starts again, with feedback, up to a number of attempts.
- ``RetryInvalid``: an invalid action is taken back, with feedback, up to a number of times a turn.
- ``Attempt``: what a teacher is told of a failed attempt.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from ...errors import EnvironmentFailedError, UsageError, nearest
from ..text import TextSpace, cut, storable
from .base import Info, Reply, WorldWrapper
from .rewards import price

SECRETS = ("answer", "answers", "solution", "target", "expert", "walkthrough")
"""Keys of ``info`` whose values no feedback may say."""
VERDICT = "That attempt did not succeed. Try again."
_LONGEST_FEEDBACK = 1000


@dataclass(frozen=True, slots=True)
class Attempt:
    """A failed attempt, for a teacher."""

    number: int
    """From 1."""
    question: str
    """The first observation."""
    actions: tuple[str, ...]
    observation: str
    """The last one, which the agent does not see."""
    reward: float
    """Of the last turn."""
    info: Info
    """The last one; it may hold the answer, which feedback must not say."""


Teacher = Callable[[Attempt], str]


@dataclass(frozen=True, slots=True)
class _Attempts:
    number: int
    question: str
    actions: tuple[str, ...]
    start: tuple[Any, tuple[int, ...]]


class Retry(WorldWrapper):
    """Turns a task into an episode of attempts: where one fails, the task starts again, with feedback.

    This is the multi-turn process of RISE (Qu et al. 2024, arXiv 2407.18219), whose state is the question with the
    attempts and the feedback so far: at most ``attempts`` attempts, until one succeeds. An attempt fails when the
    world ends it, or its turns run out, and ``info["won"]`` is False. Every attempt earns what it earns without the
    wrapper, and ends the turn that it ended before; only the end of the episode moves. What the world shows at the
    end of a failed attempt is not shown, as it may tell the answer.

    RISE's feedback says only that the attempt failed. A ``teacher`` says more, as in "Improving Interactive In-Context
    Learning from Natural Language Feedback" (Klissarov et al. 2026, arXiv 2602.16066): it is told everything, the
    answer included. Feedback that holds a value of ``SECRETS`` is replaced by the plain verdict.

    ``info["attempt"]`` is the number of the attempt that the next action belongs to, ``info["feedback"]`` what was
    said on the turn that an attempt failed.

    >>> import gymnasium as gym
    >>> env = Retry(gym.make("agentropy/ALFWorld-v0", max_turns=1), attempts=3)
    >>> question, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step("look")
    >>> observation == "That attempt did not succeed. Try again.\\n\\n" + question
    True
    >>> reward, terminated, truncated, info["attempt"]
    (0.0, False, False, 2)
    """

    name = "retry"

    def __init__(
        self,
        env: gymnasium.Env[str, str],
        attempts: int = 5,
        truncated: bool = True,
        feedback: str = VERDICT,
        teacher: Teacher | str | None = None,
    ) -> None:
        """Set how often.

        Args:
            env: a text world whose ``info`` has ``won``.
            attempts: the most in one episode, at least 1 (RISE: 5).
            truncated: an attempt whose turns ran out has failed too; else it ends the episode.
            feedback: the verdict.
            teacher: writes feedback, given an ``Attempt``; a function, or its name as ``"module:function"``.

        Raises:
            UsageError: an argument is none of these.
        """
        if attempts < 1:
            raise UsageError(f"attempts must be at least 1, got {attempts}")
        feedback = cut(feedback, _LONGEST_FEEDBACK)
        super().__init__(env, attempts=attempts, truncated=truncated, feedback=feedback, teacher=teacher)
        self._attempts, self._truncated, self._feedback = attempts, truncated, feedback
        self._teacher = _load(teacher) if isinstance(teacher, str) else teacher
        longest: int = env.observation_space.max_length  # type: ignore[attr-defined]
        self.observation_space = TextSpace(longest + _LONGEST_FEEDBACK + 2)

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        if "won" not in info:
            raise UsageError("retrying needs info['won'], which this environment does not have")
        self._state = _Attempts(1, observation, (), self._save_below())
        return observation, {"attempt": 1}

    def _turn(self, action: str) -> Reply:
        reply = self._below(action)
        state: _Attempts = self._state
        actions = (*state.actions, action)
        ended = reply.terminated or (reply.truncated and self._truncated)
        if not ended or reply.info.get("won") or state.number >= self._attempts:
            self._state = _Attempts(state.number, state.question, actions, state.start)
            reply.notes["attempt"] = state.number
            return reply
        failed = Attempt(state.number, state.question, actions, reply.observation, reply.reward, reply.info)
        feedback = self._feedback_on(failed)
        _, info = self._load_below(*state.start)
        self._state = _Attempts(state.number + 1, state.question, (), state.start)
        notes = {"attempt": state.number + 1, "feedback": feedback}
        return Reply(f"{feedback}\n\n{state.question}", reply.reward, False, False, info, notes)

    def _feedback_on(self, failed: Attempt) -> str:
        if self._teacher is None:
            return self._feedback
        said = self._teacher(failed)
        if not isinstance(said, str):
            raise EnvironmentFailedError(f"a teacher must return a text, and this returned a {type(said).__name__}")
        return self._feedback if tells(said, failed.info) else cut(storable(said), _LONGEST_FEEDBACK)

    def _texts(self) -> Sequence[str]:
        return (self._feedback,)


class RetryInvalid(WorldWrapper):
    """Takes back an action that the world calls invalid, tells the agent so, and lets it try again.

    An action that was taken back costs no turn of the world and ``penalty`` instead of its reward. After ``retries``
    invalid actions on one turn the next one is played (it costs a turn) or, with ``exhausted="end"``, taken back too
    and the episode truncated: then no invalid action ever reaches the state of the world.

    ``info["retries"]`` counts the actions that were taken back on this turn. The world takes a snapshot before
    every action, which costs little, and restores one for each that is taken back, which costs what a restore costs.

    >>> import gymnasium as gym
    >>> env = RetryInvalid(gym.make("agentropy/ALFWorld-v0"), retries=1)
    >>> _ = env.reset(seed=0)
    >>> print(env.step("fly away")[0])
    Nothing happens.
    That action is not possible here, and was not played. Try another one.
    """

    name = "retry-invalid"
    feedback = "That action is not possible here, and was not played. Try another one."

    def __init__(
        self, env: gymnasium.Env[str, str], retries: int = 2, penalty: float = 0.0, exhausted: str = "play"
    ) -> None:
        """Set how often.

        Args:
            env: a text world whose ``info`` has ``invalid``.
            retries: on one turn; not negative.
            penalty: for an action that is taken back; not negative.
            exhausted: ``"play"`` or ``"end"``: what becomes of the next invalid action.

        Raises:
            UsageError: an argument is none of these.
        """
        if retries < 0:
            raise UsageError(f"retries must not be negative, got {retries}")
        if exhausted not in ("play", "end"):
            raise UsageError(f"unknown way out {exhausted!r}{nearest(exhausted, ('play', 'end'))}")
        penalty = price("penalty", penalty)
        super().__init__(env, retries=retries, penalty=penalty, exhausted=exhausted)
        self._retries, self._penalty, self._end = retries, penalty, exhausted == "end"
        longest: int = env.observation_space.max_length  # type: ignore[attr-defined]
        self.observation_space = TextSpace(longest + len(self.feedback) + 1)

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        if "invalid" not in info:
            raise UsageError("retrying needs info['invalid'], which this environment does not have")
        self._state = 0
        return observation, {"retries": 0}

    def _turn(self, action: str) -> Reply:
        last = self._state >= self._retries
        before = None if last and not self._end else self._save_below()
        reply = self._below(action)
        if before is None or not reply.info.get("invalid"):
            self._state = 0
            reply.notes["retries"] = 0
            return reply
        _, info = self._load_below(*before)
        self._state += 1
        notes = {"retries": self._state, "invalid": True}
        observation = f"{reply.observation}\n{self.feedback}"
        return Reply(observation, -self._penalty, False, last, info, notes)

    def _texts(self) -> Sequence[str]:
        return (self.feedback,)


def tells(text: str, info: Info, secrets: Sequence[str] = SECRETS) -> bool:
    """Whether ``text`` holds, as whole words and in any case, a value that ``info`` has under one of ``secrets``.

    >>> tells("Think of paris again.", {"answer": "Paris"}), tells("Compare them.", {"answer": "Paris"})
    (True, False)
    """
    plain = " ".join(text.casefold().split())
    for key in secrets:
        for value in _leaves(info.get(key)):
            words = " ".join(value.casefold().split())
            if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", plain):
                return True
    return False


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in nested lists and mappings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _load(name: str) -> Teacher:
    module, _, attribute = name.partition(":")
    try:
        teacher: Teacher = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"no teacher {name!r}: expected module:function ({error})") from error
    return teacher
