"""What a part of this package needs beside it, and the command that installs that.

- ``require``: raise unless some modules can be imported; nothing is imported to find out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping

from .errors import MissingDependencyError


def require(what: str, extra: str, modules: Iterable[str]) -> None:
    """Raise unless every module is installed.

    Args:
        what: the part of this package that needs them, such as ``"ScienceWorld"``.
        extra: the extra that installs them.
        modules: top-level modules; a mapping gives the name of the package that has each, where it is another.

    Raises:
        MissingDependencyError: one is absent; the message ends with the command that installs it.
    """
    packages = modules if isinstance(modules, Mapping) else {module: module for module in modules}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f'{what} needs {", ".join(missing)}, which is not installed; run: pip install "agentropy[{extra}]"'
        )
