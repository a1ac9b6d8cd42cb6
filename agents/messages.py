"""What a message format is: from observations to the tokens a model reads, from its tokens to commands.

- ``Format``: the protocol. A call gives only the tokens that a message adds: nothing is tokenised twice.
- ``ParsedAction``: what a model's tokens say.
- ``Info``, ``NO_INFO``, ``History``: what a format is told beside the observation.
- ``admissible``: the commands that the world lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from ..errors import UsageError

Info = Mapping[str, Any]
NO_INFO: Info = MappingProxyType({})
History = Sequence[tuple[str, str]]
"""Earlier turns, oldest first: what was observed and the command that answered it."""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What a model's tokens say."""

    command: str
    """For the environment; whatever can be made of it when not ``valid``."""
    valid: bool
    """Whether the message had the form that was asked for. Says nothing about the world."""
    closed: bool
    """Whether the message ends with its end token; if not, the next observation must add it."""
    text: str
    """The whole message, decoded, without special tokens."""


class Format(Protocol):
    """How messages become tokens. Lists that are returned are cached: do not change them."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an action; the first is the one that demonstrations use."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an action."""
        ...

    def prompt(self, observation: str, info: Info) -> list[int]:
        """Tokens of the first message, up to where the model must act."""
        ...

    def observation(self, text: str, info: Info, *, closed: bool = True) -> list[int]:
        """Tokens between two actions; opens with the end token when the action was not ``closed``."""
        ...

    def window(self, history: History, observation: str, info: Info) -> list[int]:
        """Tokens of a conversation rendered anew from its last turns; ``info["goal"]`` is the task."""
        ...

    def render_action(self, command: str, info: Info = NO_INFO) -> list[int]:
        """Tokens with which a model says ``command`` in answer to a turn with ``info``, the end token included."""
        ...

    def parse(self, token_ids: Sequence[int], info: Info = NO_INFO) -> ParsedAction:
        """Read an action out of tokens that were sampled in answer to a turn with ``info``, whatever they are."""
        ...


def admissible(info: Info) -> Sequence[str]:
    """The admissible commands in ``info``.

    Raises:
        UsageError: the world lists none.
    """
    commands = info.get("admissible")
    if not commands:
        raise UsageError("this environment lists no admissible commands, which are needed here")
    return commands
