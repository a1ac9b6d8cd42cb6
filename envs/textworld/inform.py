"""Compiled games on the interpreter that TextWorld brings.

- ``InformGame``: an episode of a ``.z8`` file; its commands are free text, read by the game's own parser.
- ``compile_game``: a game of the generator as a ``.z8`` file.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import EnvironmentFailedError, UsageError
from .text import clean
from .upstream import package

INVALID = "Invalid command."
_HEADER = 64
"""Bytes before the code of a story file."""
_LONGEST = 200
"""Characters of a command that the interpreter gets; the games read fewer."""
_META = frozenset(
    (
        *("restart", "restore", "save", "quit", "q", "undo", "script", "transcript", "unscript", "notify", "verify"),
        *("version", "superbrief", "print_state", "restrict", "enable", "disable", "actions", "trace", "showme"),
    )
)
"""Commands to the interpreter, not to the player."""
_WON = re.compile(r"\*\*\* +(The End|You have won) +\*\*\*", re.IGNORECASE)


class InformGame:
    """An episode of a compiled game. One that comes with its ``.json`` file lists commands and has a policy."""

    def __init__(self, path: Path) -> None:
        """Open a file; ``reset`` starts it."""
        _check(path)
        self.tracked = path.with_suffix(".json").is_file()
        with package() as textworld, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # most games are "not fully supported"
            names = ["score", "max_score", "won", "lost", "objective", "moves"]
            if self.tracked:
                names += ["admissible_commands", "policy_commands"]
            try:
                self._env = textworld.start(str(path), textworld.EnvInfos(**dict.fromkeys(names, True)))
                self._env.seed(1)
            except Exception as error:  # the interpreter and TextWorld raise whatever they meet
                raise UsageError(f"{path} is no game that TextWorld can play: {error}") from error
        self._state: Any = None
        self.won = self.lost = False

    def reset(self) -> str:
        """Start again; return the first text."""
        with package():
            self._state = self._env.reset()
        self.won = self.lost = False
        return clean(self._state.feedback or "")

    def step(self, command: str) -> tuple[str, bool]:
        """Play a command; return what the game says, and whether it took no turn."""
        command = " ".join(re.sub(r"[^\x20-\x7e]", "?", command[: 4 * _LONGEST]).split())[:_LONGEST]
        words = re.findall(r"[a-z_][a-z_-]*", command.lower())
        if any(word in _META or word.startswith("tw-") for word in words):
            return INVALID, True
        before = self._state.moves
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._state, _, over = self._env.step(command)
        except Exception as error:
            raise EnvironmentFailedError(f"the game's interpreter failed at {command!r}: {error}") from error
        text = clean(self._state.feedback or "")
        self.won = bool(self._state.won) or _WON.search(text) is not None
        self.lost = bool(over or self._state.lost) and not self.won
        return text, self.tracked and self._state.moves == before

    @property
    def objective(self) -> str:
        """What the game asks for, "" where it is not known."""
        return clean(self._state.objective or "")

    @property
    def score(self) -> int:
        """Points so far."""
        return int(self._state.score or 0)

    @property
    def max_score(self) -> int:
        """Most points, 0 where that is not known."""
        most = self._state.max_score
        return int(most) if most and most != float("inf") else 0

    def admissible(self) -> Sequence[str] | None:
        """Return the commands that do something, sorted; None where the game does not come with its ``.json`` file."""
        if not self.tracked:
            return None
        return [] if self.won or self.lost else self._state.admissible_commands

    def policy(self) -> str | None:
        """Return the first command of TextWorld's plan from here, None where it has none."""
        commands = self._state.policy_commands if self.tracked else None
        return commands[0] if commands else None

    def close(self) -> None:
        """Free the interpreter."""
        self._env.close()


def _check(path: Path) -> None:
    """Raise unless the file is a whole story file, since the interpreter ends the process at one that is not."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the game {path}: {error.strerror}") from error
    version = data[0] if data else 0
    problem = ""
    if not 1 <= version <= 8 or len(data) < _HEADER:
        problem = "it does not start as one"
    else:
        unit = 2 if version <= 3 else 4 if version <= 5 else 8
        length = int.from_bytes(data[0x1A:0x1C]) * unit
        if length > len(data):
            problem = f"it has {len(data)} of {length} bytes"
        elif length and sum(data[_HEADER:length]) % (1 << 16) != int.from_bytes(data[0x1C:0x1E]):
            problem = "its checksum is wrong"
    if problem:
        raise UsageError(f"{path} is no game for the Z-machine: {problem}")


def compile_game(game: Any, path: Path) -> None:
    """Write ``game`` (a ``textworld.Game``) as ``path`` (``.z8``), and the ``.json`` beside it.

    Each is written whole or not at all.

    Raises:
        EnvironmentFailedError: Inform could not compile it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with package() as textworld, tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        options = textworld.GameOptions()
        options.path = str(Path(folder) / path.name)
        try:
            made = Path(textworld.generator.compile_game(game, options))
        except Exception as error:
            raise EnvironmentFailedError(f"Inform could not compile the game: {error}") from error
        shutil.move(made.with_suffix(".json"), path.with_suffix(".json"))
        shutil.move(made, path)
