"""The wrapper that checks how actions are written.

- ``FormatCheck``: passes on what has the form that was asked for; what has not costs, or never reaches the world.
- ``ActionFormat``: such a form; ``FORMATS`` has the usual ones by name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import gymnasium

from ...errors import UsageError, nearest
from ..text import TextSpace
from .base import Info, Reply, WorldWrapper
from .calls import blocks, function_calls
from .rewards import price

_LONGEST_MESSAGE = 1 << 14


@dataclass(frozen=True, slots=True)
class ActionFormat:
    """How an agent must write: a thought or none, and then one block or call, and nothing else."""

    name: str
    tags: tuple[str, ...]
    """The block is of one of these; with none, the message is a function call in JSON or ``<tool_call>`` blocks."""
    think: bool
    """``<think>…</think>`` must come first; else it may."""
    unwrap: bool
    """The world reads what is inside the block, not the message."""

    @property
    def how(self) -> str:
        """What an agent is told of it."""
        first = "First reason inside <think> </think>, then " if self.think else ""
        if self.tags:
            choice = " or ".join(f"<{tag}> </{tag}>" for tag in self.tags)
            rest = f"give one {'action' if self.unwrap else 'block'} inside {choice}, and nothing after it."
        else:
            rest = (
                'call functions as JSON: {"name": ..., "arguments": {...}}, or a list of such calls, and nothing else.'
            )
        return first + rest if first else rest[0].upper() + rest[1:]

    def read(self, message: str) -> str | None:
        """Return what the world should read, or None where ``message`` has not this form.

        >>> FORMATS["think-action"].read("<think>The desk.</think><action>go to desk 1</action>")
        'go to desk 1'
        >>> FORMATS["think-action"].read("<action>go to desk 1</action> I hope.") is None
        True
        """
        text = message.strip()
        own = self.tags or ("tool_call",)
        found = blocks(text, {"think", *own})
        thought = found.pop(0) if found and found[0].tag == "think" else None
        if thought is None and self.think:
            return None
        if thought is not None and text[: thought.start].strip():
            return None
        rest = text[thought.end if thought else 0 :].strip()
        if any(text.count(f"<{tag}>") != text.count(f"</{tag}>") for tag in ("think", *own)):
            return None
        if not self.tags and not found:
            return message if function_calls(rest) else None
        if not found or rest != text[found[0].start : found[-1].end] or (self.tags and len(found) > 1):
            return None
        if not self.tags:
            gaps = "".join(text[one.end : other.start] for one, other in pairwise(found))
            return None if gaps.strip() or not all(function_calls(block.content) for block in found) else message
        content = found[0].content.strip()
        if found[0].tag == "think" or not content or any(f"<{tag}>" in content for tag in ("think", *own)):
            return None
        return content if self.unwrap else message

    def say(self, action: str) -> str:
        """Return a message of this form from which the world reads ``action``."""
        if not self.unwrap:
            return f"<think>\n</think>\n{action}" if self.think and self.read(action) is None else action
        return ("<think>\n</think>\n" if self.think else "") + f"<{self.tags[0]}>{action}</{self.tags[0]}>"


FORMATS = {
    form.name: form
    for form in (
        ActionFormat("action", ("action",), think=False, unwrap=True),
        ActionFormat("think-action", ("action",), think=True, unwrap=True),
        ActionFormat("search", ("search", "answer"), think=False, unwrap=False),
        ActionFormat("think-search", ("search", "answer"), think=True, unwrap=False),
        ActionFormat("tools", ("python", "calculator", "search", "answer"), think=False, unwrap=False),
        ActionFormat("think-tools", ("python", "calculator", "search", "answer"), think=True, unwrap=False),
        ActionFormat("json", (), think=False, unwrap=False),
        ActionFormat("think-json", (), think=True, unwrap=False),
    )
}


class FormatCheck(WorldWrapper):
    """Checks that actions have a form such as ``<think>…</think><action>…</action>``.

    ``info["malformed"]`` says whether the last one had not. A malformed action costs ``penalty``. Then it is played
    as it is, as verl-agent does, or rejected: the world never sees it and does not count a turn, the agent is told
    the form, and after more than ``patience`` such actions in a row the episode is truncated. Agents and experts give
    whole messages then, so ``info["free_text"]`` is True. Two checks for one tag do not nest.

    >>> import gymnasium as gym
    >>> env = FormatCheck(gym.make("agentropy/ALFWorld-v0"), malformed="reject")
    >>> _ = env.reset(seed=0)
    >>> env.step("inventory")[0]  # doctest: +ELLIPSIS
    'Not in the form asked for. First reason inside <think> </think>, then give one action inside <action> ...'
    >>> env.step("<think>What have I got?</think><action>inventory</action>")[0]
    'You are not carrying anything.'
    """

    name = "format-check"
    reads_messages = True

    def __init__(
        self,
        env: gymnasium.Env[str, str],
        form: str = "think-action",
        malformed: str = "play",
        penalty: float = 0.1,
        patience: int = 3,
    ) -> None:
        """Choose the form.

        Args:
            env: a text world.
            form: a name in ``FORMATS``.
            malformed: ``"play"`` or ``"reject"``.
            penalty: for a malformed action; not negative (verl-agent: 0.1).
            patience: rejected actions in a row that an episode survives.

        Raises:
            UsageError: an argument is none of these.
        """
        if form not in FORMATS:
            raise UsageError(f"unknown action format {form!r}{nearest(form, FORMATS)}")
        if malformed not in ("play", "reject"):
            raise UsageError(
                f"unknown answer to a malformed action {malformed!r}{nearest(malformed, ('play', 'reject'))}"
            )
        penalty = price("penalty", penalty)
        if patience < 0:
            raise UsageError(f"patience must not be negative, got {patience}")
        super().__init__(env, form=form, malformed=malformed, penalty=penalty, patience=patience)
        self._form, self._reject, self._penalty, self._patience = (
            FORMATS[form],
            malformed == "reject",
            penalty,
            patience,
        )
        self._complaint = f"Not in the form asked for. {self._form.how}"
        longest: int = env.observation_space.max_length  # type: ignore[attr-defined]
        self.observation_space = TextSpace(max(longest, len(self._complaint)))
        self.action_space = TextSpace(max(env.action_space.max_length, _LONGEST_MESSAGE))  # type: ignore[attr-defined]

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        self._state = 0
        return observation, {"malformed": False}

    def _turn(self, action: str) -> Reply:
        command = self._form.read(action)
        if command is not None:
            self._state = 0
            reply = self._below(command)
            reply.notes["malformed"] = False
            return reply
        if self._reject:
            self._state += 1
            info = copy.deepcopy(self._info)
            notes = {"malformed": True, "invalid": True}
            return Reply(self._complaint, -self._penalty, False, self._state > self._patience, info, notes)
        reply = self._below(action)
        reply.reward -= self._penalty
        reply.notes["malformed"] = True
        return reply

    def _say(self, action: str) -> str:
        return self._form.say(action)

    def _instruct(self, instructions: str) -> str:
        return f"{instructions}\n{self._form.how}".strip()

    def _texts(self) -> Sequence[str]:
        return self._complaint, self._form.say("")
