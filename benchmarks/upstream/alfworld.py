"""The loop that ``alfworld`` runs: TextWorld's ``PddlEnv`` under ALFWorld's names.

- ``Upstream``: load, reset, step, with the admissible commands that agents are shown.
"""

from __future__ import annotations

import os
from typing import Any

from ...envs.alfworld.games import open_index


class Upstream:
    """One environment, as ``AlfredTWEnv`` wraps it."""

    def __init__(self, source: str = "generated", data: str | os.PathLike[str] | None = None) -> None:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        self._index = open_index(source, data)
        self._env: Any = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))

    def reset(self, task: str) -> None:
        game = self._index.load("train", task)
        self._env.load({"pddl_domain": game.domain, "pddl_problem": game.problem, "grammar": game.grammar})
        self._env.reset()

    def step(self, action: str) -> bool:
        return bool(self._env.step(action)[2])

    def close(self) -> None:
        self._env.close()
