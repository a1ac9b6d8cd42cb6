"""The environments of this package, and how Gymnasium learns of them before anything of it is imported.

- ``ENV_IDS``: every id and where its class lives.
- ``register_into``: enter them into a registry. ``install_hook``: do so as soon as ``gymnasium`` is imported.

Gymnasium 1.0 stopped reading the ``gymnasium.envs`` entry points. So the installed package has a ``.pth`` file that
imports this module when Python starts, and the hook does what the entry point did. It loads nothing else, costs well
under a millisecond, and ``AGENTROPY_NO_PLUGIN=1`` switches it off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

ENV_IDS: dict[str, str] = {
    "agentropy/ALFWorld-v0": "agentropy.envs.alfworld.env:ALFWorldEnv",
    "agentropy/BFCL-v0": "agentropy.envs.bfcl.env:BFCLEnv",
    "agentropy/Remote-v0": "agentropy.envs.remote:RemoteEnv",
    "agentropy/ScienceWorld-v0": "agentropy.envs.scienceworld.env:ScienceWorldEnv",
    "agentropy/Search-v0": "agentropy.envs.search.env:SearchEnv",
    "agentropy/TextWorld-v0": "agentropy.envs.textworld.env:TextWorldEnv",
    "agentropy/Tools-v0": "agentropy.envs.tools.env:ToolsEnv",
}

_REGISTRATION = "gymnasium.envs.registration"


class _Hook:
    """A finder that watches for one import, steps aside, and lets registration follow it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRATION:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register_into(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install_hook() -> None:
    """Register now if Gymnasium is there, else as soon as it is; a second call changes nothing."""
    if os.environ.get("AGENTROPY_NO_PLUGIN", "") not in ("", "0"):
        return
    if _REGISTRATION in sys.modules:
        register_into(sys.modules[_REGISTRATION])
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def register_into(registration: ModuleType) -> None:
    """Enter every id that is not there yet; the worlds truncate by themselves, so no ``TimeLimit`` is added."""
    for name, entry_point in ENV_IDS.items():
        if name not in registration.registry:
            registration.register(id=name, entry_point=entry_point)
