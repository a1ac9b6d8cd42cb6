"""From trajectories to an update; importing this package loads nothing.

- ``Minibatch``: rows of tokens with what was sampled and what it earned.
- ``recipe``, ``recipes``: a training method by name, and the names.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Minibatch
    from .recipes import recipe, recipes

__all__ = ["Minibatch", "recipe", "recipes"]

_HOMES = {"Minibatch": ".batch", "recipe": ".recipes", "recipes": ".recipes"}


class _Lazy(ModuleType):
    """Imports what is named above when it is asked for: to look at a run needs no torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name], __name__), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the modules `recipe` and `recipes` would put them before the functions of these names.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Lazy
