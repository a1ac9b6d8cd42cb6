"""What a world needs beside this package, and the command that installs it.

- ``require``: raise unless some modules can be imported; nothing is imported to find out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from ..errors import MissingDependencyError


def require(what: str, extra: str, modules: Mapping[str, str]) -> None:
    """Raise unless every module is installed.

    Args:
        what: the part of this package that needs them, such as ``"ScienceWorld"``.
        extra: the extra that installs them.
        modules: top-level module to the name of the package that has it.

    Raises:
        MissingDependencyError: one is absent; the message ends with the command that installs it.
    """
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f'{what} needs {", ".join(missing)}, which is not installed; run: pip install "agentropy[{extra}]"'
        )
