"""Message formats by name.

- ``make_format``: ``PlainFormat`` or ``ChatFormat``, which are also exported here with their protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UsageError, nearest
from .chat import ChatFormat
from .messages import Format, History, Info, ParsedAction
from .plain import PlainFormat

__all__ = ["ChatFormat", "Format", "History", "Info", "ParsedAction", "PlainFormat", "make_format"]

_FORMATS: dict[str, Callable[..., Format]] = {"plain": PlainFormat, "chat": ChatFormat}


def make_format(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Format:
    """The format called ``plain``, ``chat`` or ``auto`` (chat where the tokenizer has a chat template).

    Raises:
        UsageError: the name or an option is unknown, or the tokenizer does not fit the format.
    """
    chosen = name
    if name == "auto":
        chosen = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    if chosen not in _FORMATS:
        raise UsageError(f"unknown format '{name}'{nearest(name, [*_FORMATS, 'auto'])}")
    known = list(signature(_FORMATS[chosen]).parameters)[1:]
    for option in options:
        if option not in known:
            raise UsageError(f"the {chosen} format has no option '{option}'{nearest(option, known)}")
    return _FORMATS[chosen](tokenizer, **options)
