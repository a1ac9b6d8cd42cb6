"""The build backend: setuptools, plus the ``.pth`` file that lets Gymnasium know of the environments.

- ``build_wheel``, ``build_editable``: as setuptools does, with ``agentropy-gymnasium.pth`` added to the wheel.

``agentropy/registry.py`` says why the file is needed; setuptools alone cannot put one beside a package.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# Named to be read after the file of an editable installation, which makes the package importable. A broken or half
# removed package must not disturb every start of Python, so nothing it raises gets out.
NAME = "agentropy-gymnasium.pth"
CONTENT = (
    b"import sys; exec('try:\\n from agentropy.registry import install_hook\\n install_hook()\\n"
    b"except Exception: pass')\n"
)


def build_wheel(directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build the wheel and return its file name."""
    return _with_hook(directory, build_meta.build_wheel(directory, config_settings, metadata_directory))


def build_editable(directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build the wheel of an editable installation and return its file name."""
    return _with_hook(directory, build_meta.build_editable(directory, config_settings, metadata_directory))


def _with_hook(directory: str, name: str) -> str:
    """Write the wheel anew with one more file and its line in RECORD."""
    path = Path(directory) / name
    with zipfile.ZipFile(path) as wheel:
        entries = [(info, wheel.read(info)) for info in wheel.infolist()]
    digest = base64.urlsafe_b64encode(hashlib.sha256(CONTENT).digest()).rstrip(b"=").decode()
    line = f"{NAME},sha256={digest},{len(CONTENT)}\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for info, content in entries:
            if info.filename.endswith(".dist-info/RECORD"):
                wheel.writestr(NAME, CONTENT)
                content += line
            wheel.writestr(info, content)
    return name
