"""TextWorld's own loop on compiled games, as its users run it.

- ``Upstream``: ``textworld.start``, ``reset`` and ``step``, with the same information asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import textworld

from ...envs.textworld.env import TextWorldEnv


class Upstream:
    """One interpreter; a game is compiled when it is first asked for."""

    def __init__(self, **kwargs: Any) -> None:
        """Take the arguments of the environment whose tasks are played."""
        self._ours = TextWorldEnv(**{**kwargs, "engine": "inform"})
        self._files: dict[str, Path] = {}
        self._env: Any = None
        self.observation = ""
        """What the last call of ``reset`` or ``step`` led to."""

    def prepare(self, task: str) -> None:
        """Compile the game of ``task``, which its users have done before they play."""
        if task not in self._files:
            self._files[task] = self._ours.file(task)

    def reset(self, task: str) -> None:
        """Load and start ``task``, named as in this package."""
        self.prepare(task)
        self.close()
        names = ("admissible_commands", "policy_commands", "score", "max_score", "won", "lost", "objective", "moves")
        infos = textworld.EnvInfos(**dict.fromkeys(names, True))
        self._env = textworld.start(str(self._files[task]), infos)
        self.observation = self._env.reset().feedback

    def step(self, action: str) -> bool:
        """Play one action; return whether the episode is over."""
        state, _, over = self._env.step(action)
        self.observation = state.feedback
        return bool(over)

    def close(self) -> None:
        """Free the interpreter."""
        if self._env is not None:
            self._env.close()
            self._env = None
