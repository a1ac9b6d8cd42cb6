"""The loops that a world's own package offers, to measure ours beside them.

- ``Upstream``: what each module here has under this name: one episode after another, as its users write it.
"""

from __future__ import annotations

from typing import Protocol


class Upstream(Protocol):
    """One environment of a world's own package."""

    def reset(self, task: str) -> None:
        """Start ``task``, named as in this package."""
        ...

    def step(self, action: str) -> bool:
        """Play one action; return whether the episode is over."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...
