"""From trajectories to an update.

- ``Minibatch``: rows of tokens with what was sampled and what it earned.
- ``recipe``, ``recipes``: a training method by name, and the names.
"""

from .batch import Minibatch
from .recipes import recipe, recipes

__all__ = ["Minibatch", "recipe", "recipes"]
