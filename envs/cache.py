"""Where everything that can be recomputed is kept between processes.

- ``cache_folder``: ``$AGENTROPY_CACHE``, or ``agentropy`` in the user's cache folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$AGENTROPY_CACHE``, or ``agentropy`` in the user's cache folder; it may not exist yet."""
    override = os.environ.get("AGENTROPY_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentropy"
