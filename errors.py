"""The errors a person sees: one sentence that names what was wrong, what was expected and the way out.

- ``AgentropyError``: the base of all errors that this package raises on purpose.
- ``UsageError``: bad input from the user; the command line prints its message without a traceback.
- ``MissingDependencyError``: an extra, program or dataset is absent; the message holds the command that fixes it.
- ``EnvironmentFailedError``: a world failed through no fault of the agent's action.
- ``nearest``: the "did you mean" half of a message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AgentropyError(Exception):
    """Base of every error that this package raises on purpose."""


class UsageError(AgentropyError, ValueError):
    """The input was wrong. The message says what was wrong, what was expected and the nearest valid choice."""


class MissingDependencyError(UsageError):
    """Something is not installed. The message ends with the command that installs it."""


class EnvironmentFailedError(AgentropyError):
    """A world broke (crashed worker, unreadable game); never raised for an action that is merely invalid."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``choices``, or the list of all when none is close.

    >>> nearest("valid_sen", ["train", "valid_seen"])
    "; did you mean 'valid_seen'?"
    >>> nearest("zzz", ["b", "a"])
    '; expected one of a, b'
    """
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of {', '.join(options)}"
