"""Python for agents: what an interpreter of untrusted code does, and which ones there are.

- ``Interpreter``: runs pieces of code, keeps their variables, and can be put back to an earlier point.
- ``Ran``: what one piece of code printed.
- ``INTERPRETERS``: their names. ``make_interpreter``: open one. ``describe_sandboxes``: what confines each one here.
- ``SandboxReport``: one line of that.

Whatever code does, ``run`` returns: a call that breaks a limit or its process is answered by a message and undone, so
that the variables are those from before the call.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError, nearest

INTERPRETERS = ("monty", "cpython")
OUTPUT_BYTES = 1 << 18
"""Code that prints more in one call is stopped."""
UNDONE = "; nothing of this call was kept"
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Ran:
    """What one piece of code led to."""

    text: str
    """What it printed, its last line's value as at a prompt, and its error in one line."""
    ok: bool
    """It ended without an error."""


@dataclass(frozen=True, slots=True)
class SandboxReport:
    """What confines an interpreter on this machine."""

    interpreter: str
    available: bool
    means: tuple[str, ...]
    reason: str = ""
    """Why it is not available."""

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.interpreter}: {', '.join(self.means) if self.available else 'unavailable: ' + self.reason}"


class Interpreter(ABC):
    """Runs pieces of code one after another in another process."""

    name: str

    def __init__(self, time_limit: float, memory_mb: int, max_output: int) -> None:
        """Keep the limits of one call: seconds, MiB, and characters of output that the agent reads."""
        self.time_limit, self.memory_mb, self.max_output = time_limit, memory_mb, max_output

    @abstractmethod
    def run(self, code: str) -> Ran:
        """Run ``code``, whatever it is, within the limits."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all variables."""

    @abstractmethod
    def save(self) -> Any:
        """Return the current point, picklable; later calls do not change it."""

    @abstractmethod
    def load(self, state: Any) -> None:
        """Come back to a point that ``save`` returned, in this process or another.

        Raises:
            EnvironmentFailedError: the code did not lead there again.
        """

    @abstractmethod
    def close(self) -> None:
        """End what runs; the next call starts it again."""

    def _ran(self, printed: str, error: str, fate: str) -> Ran:
        """Put together what the agent reads: no memory addresses, and no more than ``max_output`` characters.

        What was printed before the time was up depends on the machine, so it is left out.
        """
        if fate:
            error = fate + UNDONE
            printed = "" if fate.startswith("TimeoutError") else printed[:OUTPUT_BYTES]
        limit = self.max_output
        printed = printed.rstrip("\n")
        if len(printed) > limit:
            printed = f"{printed[:limit]}\n[{len(printed) - limit} characters left out]"
        error = error if len(error) <= limit else error[:limit] + " …"
        text = "\n".join(part for part in (printed, error) if part) or "(no output)"
        return Ran(_ADDRESS.sub("at 0x…", text), not error)


def make_interpreter(
    name: str = "monty", *, time_limit: float = 2.0, memory_mb: int = 64, max_output: int = 2000
) -> Interpreter:
    """Open an interpreter; nothing runs before the first call.

    Args:
        name: ``"monty"`` (a Python subset in Rust, half a millisecond, cheap to fork) or ``"cpython"`` (all of
            Python and its standard library under Landlock and seccomp).
        time_limit: seconds per call.
        memory_mb: MiB that code may take.
        max_output: characters of output that are shown.

    Raises:
        UsageError: there is no such interpreter, a limit is not positive, or this machine cannot confine it.
        MissingDependencyError: its package is not installed.
    """
    if name not in INTERPRETERS:
        raise UsageError(f"unknown interpreter {name!r}{nearest(name, INTERPRETERS)}")
    for what, value in (("time_limit", time_limit), ("memory_mb", memory_mb), ("max_output", max_output)):
        if not value > 0:
            raise UsageError(f"{what} must be more than 0, got {value}")
    if name == "monty":
        from .monty import MontyInterpreter

        return MontyInterpreter(time_limit, memory_mb, max_output)
    from .cpython import CPythonInterpreter

    return CPythonInterpreter(time_limit, memory_mb, max_output)


def describe_sandboxes() -> tuple[SandboxReport, ...]:
    """Return for each interpreter whether it can run here and what confines it."""
    from . import cpython, monty

    return monty.report(), cpython.report()
