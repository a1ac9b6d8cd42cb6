"""Text worlds as Gymnasium environments; importing this package registers them and loads no engine and no torch.

- ``ENV_IDS``: the registered ids and where each class lives.
- ``register``: puts them into Gymnasium's registry.
"""

from __future__ import annotations

from gymnasium.envs import registration

from ..registry import ENV_IDS, register_into

__all__ = ["ENV_IDS", "register"]


def register() -> None:
    """Register every id that is not yet registered."""
    register_into(registration)


register()
